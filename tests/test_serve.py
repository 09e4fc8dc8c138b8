"""The gateway in front of the shipped student, started on loopback, asked by the official client and by raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
import uvicorn

from serving import DIRECT, free_port
from thrifty import assets, tasks
from thrifty.commands.serve import gateway
from thrifty.contracts import ThriftyError
from thrifty.engines.scripted import ScriptedEngine
from thrifty.serve import effort, methods
from thrifty.serve.app import build
from thrifty.serve.backend import Answer, Backend, Job
from thrifty.serve.keys import Keys, Limits
from thrifty.serve.schemas import Ask
from thrifty.serve.usage import Metrics

torch.set_num_threads(1)
LONG = str(assets.find("long"))
KEY = "key-of-the-tests"
ROLL = tasks.load("roll").problems("test", 4, levels=(1,))
ASK = [{"role": "user", "content": ROLL[0].prompt}]


@contextlib.contextmanager
def started(app: Any, grace: int = 10) -> Iterator[SimpleNamespace]:
    """``app`` on a free port of loopback, in a thread; ``url`` ends in /v1, ``stop()`` begins the shutdown."""
    port = free_port()
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=grace)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)

    def stop() -> None:
        server.should_exit = True

    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", port=port, stop=stop, thread=thread, app=app)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the gateway did not end"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# for tests\n{KEY}\nanother-key-of-them\n")
    made = gateway(LONG, None, name="long", api_keys=keys, max_body=64 << 10, max_concurrency=6, max_n=8,
                   max_tokens=400)  # fmt: skip
    with started(build(made)) as one:
        one.gateway = made
        yield one


@pytest.fixture(scope="module")
def client(served: SimpleNamespace) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0, timeout=60)


def post(served: SimpleNamespace, body: Any, path: str = "/chat/completions", key: str = KEY) -> tuple[int, dict, Any]:
    """Status, JSON and headers of a raw POST; ``body`` may be bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(served.url + path, data, headers)
    try:
        with DIRECT.open(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


# ------------------------------------------------------------------------------------------- one pass


def test_a_chat_answer_tells_its_chain_from_its_content_and_counts_both(client, served):
    reply = client.chat.completions.create(model="long", messages=ASK, temperature=0, seed=1)
    message = reply.choices[0].message
    assert tasks.load("roll").parse(message.content) is not None
    assert message.reasoning_content
    assert "</think>" not in message.reasoning_content + message.content
    chat = served.gateway.backend.chat
    assert reply.usage.prompt_tokens == len(chat.prompt_ids(ROLL[0].prompt))
    whole = f" {message.reasoning_content}</think> {message.content}<|end|>"
    assert reply.usage.completion_tokens == len(chat.tokenizer.encode(whole, add_special_tokens=False))
    reasoning = reply.usage.completion_tokens_details.reasoning_tokens
    inside = f" {message.reasoning_content}</think>"
    assert reasoning == len(chat.tokenizer.encode(inside, add_special_tokens=False))
    assert reply.thrifty["strategy"] == "none"
    assert reply.thrifty["samples"] == 1
    assert reply.thrifty["single_pass"]["completion_tokens"] == reply.usage.completion_tokens


def test_a_stream_says_piece_by_piece_what_the_whole_answer_says(client):
    asked = {"model": "long", "messages": ASK, "temperature": 0.7, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thoughts = [d.reasoning_content for d in deltas if getattr(d, "reasoning_content", None)]
    contents = [d.content for d in deltas if d.content]
    assert len(thoughts) > 5, "token by token"
    assert "".join(thoughts) == whole.choices[0].message.reasoning_content
    assert "".join(contents) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.completion_tokens_details == whole.usage.completion_tokens_details
    ends = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [end.choices[0].finish_reason for end in ends] == ["stop"]
    assert ends[0].thrifty["samples"] == 1


def test_n_samples_are_n_choices_and_their_tokens_are_all_counted(client):
    reply = client.chat.completions.create(model="long", messages=ASK, n=3, seed=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.thrifty["samples"] == 3
    one = client.chat.completions.create(model="long", messages=ASK, n=1, seed=2)
    assert reply.usage.completion_tokens > one.usage.completion_tokens
    assert reply.thrifty["single_pass"]["completion_tokens"] == pytest.approx(
        reply.usage.completion_tokens / 3, abs=0.1
    )


def test_completions_read_the_prompt_as_it_stands_and_name_the_stop(client, served):
    chat = served.gateway.backend.chat
    prompt = chat.prompt_text(ROLL[0].prompt)
    reply = client.completions.create(model="long", prompt=prompt, temperature=0, stop=["</think>"], max_tokens=300)
    assert reply.choices[0].stop_reason == "</think>"
    assert reply.choices[0].finish_reason == "stop"
    assert "</think>" not in reply.choices[0].text
    answer = client.chat.completions.create(model="long", messages=ASK, temperature=0)
    assert reply.choices[0].text.strip() == answer.choices[0].message.reasoning_content
    chunks = client.completions.create(model="long", prompt=prompt, temperature=0, stop=["</think>"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    both = client.completions.create(model="long", prompt=[prompt, prompt], temperature=0, max_tokens=4)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == both.choices[1].text


# ------------------------------------------------------------------------------------------- dials


@pytest.mark.parametrize("budget", [0, 5, 20])
def test_a_thinking_budget_closes_the_chain_and_leaves_an_answer(client, budget):
    reply = client.chat.completions.create(
        model="long", messages=ASK, temperature=0, extra_body={"thinking_token_budget": budget}
    )
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    reasoning = reply.usage.completion_tokens_details.reasoning_tokens
    assert budget <= reasoning <= budget + 3, "the closing tag is the chain's last token"
    assert reply.thrifty["injected_tokens"] >= 1
    assert reply.thrifty["single_pass"]["at_least"]


@pytest.mark.parametrize("most", [2, 9, 40])
def test_a_limit_of_tokens_holds_and_leaves_an_answer(client, most):
    reply = client.chat.completions.create(model="long", messages=ASK, temperature=0, max_completion_tokens=most)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens <= most


def test_effort_none_thinks_nothing_and_other_efforts_need_a_calibration(client):
    reply = client.chat.completions.create(model="long", messages=ASK, reasoning_effort="none")
    assert not reply.choices[0].message.reasoning_content
    assert reply.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="--calibration"):
        client.chat.completions.create(model="long", messages=ASK, reasoning_effort="low")


# ------------------------------------------------------------------------------------------- strategies


def test_a_vote_by_model_name_and_by_extra_body_are_the_same(client):
    asked = {"messages": ASK, "seed": 3}
    named = client.chat.completions.create(model="long:self-consistency@5", **asked,
                                           extra_body={"thrifty": {"task": "roll"}})  # fmt: skip
    body = {"thrifty": {"strategy": "majority", "k": 5, "task": "roll"}}
    extra = client.chat.completions.create(model="long", **asked, extra_body=body)
    assert named.choices[0].message.content == extra.choices[0].message.content
    assert named.thrifty["samples"] == extra.thrifty["samples"] == 5
    assert named.thrifty["settings"]["k"] == 5
    assert named.usage.completion_tokens == extra.usage.completion_tokens
    assert "note" not in named.thrifty


def test_short_m_at_k_counts_what_it_cancelled_and_says_what_one_pass_costs(client):
    reply = client.chat.completions.create(model="long:short-1@4", messages=ASK, seed=4,
                                           extra_body={"thrifty": {"task": "roll"}})  # fmt: skip
    told = reply.thrifty
    assert (told["strategy"], told["settings"]["m"], told["settings"]["k"]) == ("short-m-at-k", 1, 4)
    assert told["samples"] == 4
    assert 0 < told["cancelled_tokens"] < reply.usage.completion_tokens
    assert told["single_pass"]["at_least"], "the shortest was kept"
    assert told["single_pass"]["completion_tokens"] < reply.usage.completion_tokens


def test_prose_passes_a_vote_untouched_and_says_so(client):
    told = client.chat.completions.create(model="long:self-consistency@5", messages=ASK, seed=6)
    plain = client.chat.completions.create(model="long", messages=ASK, seed=6)
    assert told.thrifty["samples"] == 1
    assert "compare" in told.thrifty["note"]
    assert told.choices[0].message.content == plain.choices[0].message.content


def test_a_strategy_streams_its_answer_with_the_figures(client):
    chunks = list(client.chat.completions.create(
        model="long:truncation:budget=8", messages=ASK, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    last = [c for c in chunks if c.choices][-1]
    assert last.thrifty["settings"]["budget"] == 8
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens <= 9


def test_trimr_counts_its_verifier(client):
    settings = {"markers": [" ."], "agreements": 1, "sentences": 1, "interval": 20, "most": 6}
    reply = client.chat.completions.create(
        model="long", messages=ASK, seed=1, extra_body={"thrifty": {"strategy": "trimr", **settings}}
    )
    assert reply.choices[0].message.content
    assert reply.thrifty["verifier_tokens"] > 0


def test_a_control_and_a_decoder_are_model_names_too(client):
    soon = client.chat.completions.create(model="long:tldr-ts:tau=50", messages=ASK, seed=1)
    plain = client.chat.completions.create(model="long", messages=ASK, seed=1)
    assert soon.usage.completion_tokens < plain.usage.completion_tokens
    assert soon.thrifty["single_pass"] is None, "nothing in it was a plain pass"
    drafted = client.chat.completions.create(model="long:lookahead-trie", messages=ASK, temperature=0)
    greedy = client.chat.completions.create(model="long", messages=ASK, temperature=0)
    assert drafted.choices[0].message.content == greedy.choices[0].message.content


def test_models_are_listed_with_their_strategies(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == "long"
    assert "long:short-m-at-k" in names
    assert client.models.retrieve("long:majority@5").id == "long:majority@5"


# ------------------------------------------------------------------------------------------- bad input


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "lonng"}, 404, "Did you mean 'long'"),
    ({"model": "long:short-m-at-q"}, 404, "Did you mean 'short-m-at-k'"),
    ({"thrifty": {"strategy": "self-consistancy"}}, 400, "Did you mean 'self-consistency'"),
    ({"thrifty": {"strategy": "short-m-at-k", "kk": 3}}, 400, "no field 'kk'"),
    ({"thrifty": {"strategy": "short-m-at-k", "m": -1}}, 400, "negative"),
    ({"thrifty": {"strategy": "short-m-at-k", "m": 5, "k": 2, "task": "roll"}}, 400, "1 <= m"),
    ({"thrifty": {"strategy": "self-consistency", "temperature": "nan"}}, 400, "needs a number"),
    ({"thrifty": {"strategy": "tldr-ts", "tau": 0}}, 400, "tau"),
    ({"thrifty": {"strategy": "majority", "task": "rol"}}, 400, "Did you mean 'roll'"),
    ({"thrifty": []}, 400, "thrifty"),
    ({"thrifty": {"k": 3}}, 400, "no strategy"),
    ({"model": "long:majority@10000"}, 400, "16|8"),
    ({"n": 10000}, 400, "from 1 to 8"),
    ({"n": 0}, 400, "n is 0"),
    ({"n": True}, 400, "n is True"),
    ({"max_tokens": -5}, 400, "max_tokens is -5"),
    ({"max_completion_tokens": 10**9}, 400, "from 1 to 400"),
    ({"thinking_token_budget": -1}, 400, "thinking_token_budget is -1"),
    ({"reasoning_effort": "enormous"}, 400, "reasoning_effort"),
    ({"reasoning_effort": 7}, 400, "0 to 1"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"stop": [""]}, 400, "stop"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "only text"),
    ({"messages": [{"role": "user", "content": "1 + " * 3000}]}, 400, "context"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "no tools"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"temprature": 1}, 400, "Did you mean 'temperature'"),
]


@pytest.mark.parametrize(("fields", "status", "says"), BAD, ids=[json.dumps(one[0])[:40] for one in BAD])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_requests_are_refused_in_openais_shape(served, fields, status, says, stream):
    found, body, _ = post(served, {"model": "long", "messages": ASK, "stream": stream} | fields)
    if stream and found == 200:
        pytest.fail("a stream was begun")
    assert found == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert any(word in body["error"]["message"] for word in says.split("|")), body


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b"", b"\xff\xfe", b'{"model": NaN}', b"[" * 60_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_is_a_400(served, body):
    status, told, _ = post(served, body)
    assert status == 400
    assert told["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused_before_it_is_read(served):
    status, told, _ = post(served, {"model": "long", "messages": ASK, "user": "x" * (80 << 10)})
    assert (status, told["error"]["code"]) == (413, "body_too_large")
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:  # declared, never sent
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode()
                    + b"\r\nContent-Length: 99999999999\r\n\r\n{")  # fmt: skip
        assert b" 413 " in raw.recv(200)


def test_a_wrong_key_opens_nothing_and_health_needs_none(served):
    wrong = openai.OpenAI(base_url=served.url, api_key="key-of-the-testz", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="none of this gateway's"):
        wrong.chat.completions.create(model="long", messages=ASK)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with DIRECT.open(served.url.removesuffix("/v1") + "/healthz") as reply:
        assert json.loads(reply.read())["status"] == "ok"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        DIRECT.open(served.url.removesuffix("/v1") + "/metrics")


def test_header_injection_reaches_no_header(served):
    status, told, headers = post(served, {"model": "long\r\nX-Evil: 1", "messages": ASK})
    assert status == 404
    assert headers["X-Evil"] is None
    assert "\r" not in told["error"]["message"]
    body = json.dumps({"model": "long", "messages": ASK}).encode()
    for line in (b"X-Request-Id: a\x00b", b"X-Request-Id: a\rX-Evil: 1", b"X-Request-Id: a b<script>"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode()
                        + b"\r\n" + line + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
            head = raw.recv(4000).partition(b"\r\n\r\n")[0]
        assert b"evil" not in head.lower()
        assert b"script" not in head


def test_unknown_paths_and_methods_answer_in_openais_shape(served):
    assert post(served, {}, "/embeddings")[1]["error"]["type"] == "not_found_error"
    with pytest.raises(urllib.error.HTTPError, match="405"):
        DIRECT.open(served.url + "/chat/completions")


# ------------------------------------------------------------------------------------------- load, leaving, ending


def engine_idle(served: SimpleNamespace, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    engine, gate = served.gateway.backend.engine, served.app.state.gate
    while engine.busy or gate.inside:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


RAMBLE = {"model": "long", "prompt": "a", "temperature": 5.0, "n": 8, "max_tokens": 400}
"""Noise that seldom ends by itself."""


def test_a_client_that_leaves_ends_its_rows(served):
    meter, left = served.gateway.backend.engine.meter, served.app.state.metrics.left._value
    for stream in (True, False):
        made, gone = meter.total(), left.get()
        body = json.dumps(RAMBLE | {"n": 1, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode()
                        + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
            until = time.monotonic() + 10
            while not served.gateway.backend.engine.busy:
                assert time.monotonic() < until
                time.sleep(0.002)
        assert engine_idle(served), "the rows go on"
        more = meter.total().thought + meter.total().answer - made.thought - made.answer
        assert more < RAMBLE["max_tokens"], "the row ran to its end"
        assert left.get() == gone + 1


def test_too_many_at_once_are_told_when_to_come_again(served):
    statuses: list[tuple[int, Any]] = []
    ask = lambda: statuses.append(post(served, RAMBLE, "/completions")[::2])  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    refused = [headers for status, headers in statuses if status == 429]
    assert refused
    assert {status for status, _ in statuses} == {200, 429}
    assert refused[0]["Retry-After"] == "1"
    assert engine_idle(served)


def test_metrics_count_what_was_answered(served, client):
    page = f"{served.url.removesuffix('/v1')}/metrics"

    def figures() -> dict[str, float]:
        request = urllib.request.Request(page, headers={"Authorization": f"Bearer {KEY}"})
        with DIRECT.open(request) as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = figures()
    reply = client.chat.completions.create(model="long", messages=ASK)
    after = figures()
    kind = 'thrifty_tokens_total{kind="completion"}'
    assert after[kind] - before.get(kind, 0) == reply.usage.completion_tokens
    name = 'thrifty_requests_total{route="chat",status="200",strategy="none"}'
    assert after[name] - before.get(name, 0) == 1


def test_shutdown_lets_what_is_under_way_end():
    made = gateway(LONG, None, name="long")
    with started(build(made)) as one:
        client = openai.OpenAI(base_url=one.url, api_key="none-needed", max_retries=0)
        stream = client.chat.completions.create(model="long", messages=ASK, stream=True)
        next(stream)
        one.stop()
        ends = [chunk.choices[0].finish_reason for chunk in stream]
        assert ends[-1] == "stop"
        one.thread.join(timeout=10)
        assert not one.thread.is_alive()
        with pytest.raises(openai.APIConnectionError):
            client.chat.completions.create(model="long", messages=ASK)


# ------------------------------------------------------------------------------------------- parts


def test_keys_come_from_the_environment_and_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_API_KEYS", "first-key, second-key")
    keys = Keys.read(None)
    keys.check({"authorization": "Bearer second-key"})
    with pytest.raises(Exception, match="no valid API key"):
        keys.check({"authorization": "Basic second-key"})
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    with pytest.raises(ThriftyError, match="holds no API key"):
        Keys.read(empty)
    monkeypatch.setenv("THRIFTY_API_KEYS", "short")
    with pytest.raises(ThriftyError, match="number 1 is no key"):
        Keys.read(None)


def test_whether_a_strategy_compares_answers_is_read_off_its_code():
    compares = {key for key in methods.found() if methods.reads_answers(methods.found()[key].path)}
    assert {"self-consistency", "short-m-at-k"} <= compares
    assert not compares & {"single-pass", "greedy", "truncation", "trimr", "tldr-ts", "lookahead-trie"}


def test_what_a_client_that_left_had_cost_is_told_and_counted():
    engine = ScriptedEngine(lambda prompt, key: "w " * 50_000 + "</think> 1")
    backend, told = Backend(engine, Limits()), list[Answer]()
    backend.unanswered = told.append
    ask = Job(Ask(True, "m", {}, n=2), "a question", methods.Choice("none"))

    async def leave() -> None:
        work = asyncio.create_task(backend.answer(ask))
        while not engine.generated:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        while not told:
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    [answer] = told
    assert answer.traces == []
    assert 0 < answer.outcome.usage.generated == engine.generated
    metrics = Metrics()
    metrics.unanswered(answer)
    page = metrics.page().decode()
    for kind in ("unanswered", "completion", "cancelled"):
        assert f'thrifty_tokens_total{{kind="{kind}"}} {float(engine.generated)}' in page
    engine.script = lambda prompt, key: "w </think> 1"
    asyncio.run(backend.answer(ask))
    assert len(told) == 1, "an answered request is not told"


@pytest.mark.parametrize(
    ("question", "comparable"),
    [("What is 3 + 4? Put it into \\boxed{}.", True), ("End with 'Answer: x'.", True), ("Write a poem.", False)],
)
def test_whether_answers_can_be_compared_is_read_off_the_question(question, comparable):
    assert (methods.parser_for(None, None, question) is not None) is comparable
    assert methods.parser_for("number", None, question)("it is 3") == "3"


def calibration(dial: str, settings: tuple[Any, ...]) -> dict[str, Any]:
    names = ("low", "medium", "high")
    levels = {n: {"setting": s, "accuracy": a, "tokens": t} for n, s, a, t in
              zip(names, settings, (0.5, 0.6, 0.7), (20, 40, 80))}  # fmt: skip
    return {"format": effort.FORMAT, "model": "long", "task": "roll", "n": 100, "dial": dial, "levels": levels}


def test_efforts_between_measured_ones_are_interpolated_and_beyond_them_refused(tmp_path):
    file = tmp_path / "effort.json"
    file.write_text(json.dumps(calibration("thinking_token_budget", (10, 30, 90))))
    known = effort.load(file)
    assert known.at("medium").setting == 30
    half = known.at(0.625)
    assert (half.setting, half.accuracy, half.tokens) == (20, pytest.approx(0.55), 30)
    with pytest.raises(ThriftyError, match="not calibrated: measured are low, medium, high"):
        known.at("none")
    effort.save(known, tmp_path / "again.json")
    assert effort.load(tmp_path / "again.json") == known


@pytest.mark.parametrize(
    ("change", "says"),
    [({"format": "x"}, "format"), ({"dial": "volume"}, "dial"), ({"levels": {}}, "two levels"), ({"n": "many"}, "'n'"),
     ({"levels": {"low": {"setting": -1, "accuracy": 0.5, "tokens": 1}, "high": {}}}, "'low'"),
     ({"levels": {"low": {"setting": 1, "accuracy": 50, "tokens": 1}, "high": {}}}, "accuracy is 50"),
     ({"levels": {"lower": {"setting": 1, "accuracy": 0.5, "tokens": 1}, "high": {}}}, "no such effort")],
)  # fmt: skip
def test_a_broken_calibration_is_named(tmp_path, change, says):
    file = tmp_path / "effort.json"
    file.write_text(json.dumps(calibration("thinking_token_budget", (10, 30, 90)) | change))
    with pytest.raises(ThriftyError, match=says):
        effort.load(file)
