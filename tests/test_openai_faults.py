"""The endpoint engine through a proxy that spoils what a real server sends: what is asked again, told, or cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import tiny
from faulty_proxy import Answer, Bytewise, Cut, Endless, Fault, FaultyProxy, HalfJSON, Stall
from serving import QUICK, continuing_server, respelt, run
from thrifty.contracts import Budget, Problem, RowFailed, Sample, ThriftyError
from thrifty.engines.openai import OpenAIEngine
from thrifty.engines.runner import OUTAGE, Runner
from thrifty.models.load import load
from thrifty.solve.search.self_consistency import SelfConsistency

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that writes all kinds of bytes, fast."""
    return str(tiny.save(tmp_path_factory.mktemp("model") / "noise", kind="llama"))


@pytest.fixture(scope="module")
def module_proxy(noise: str) -> Iterator[FaultyProxy]:
    loaded = load(noise)
    with continuing_server(loaded, loaded.tokenizer.chat_template) as url, FaultyProxy(url) as one:
        yield one


@pytest.fixture
def proxy(module_proxy: FaultyProxy) -> FaultyProxy:
    module_proxy.exchanges.clear()
    return module_proxy


@pytest.fixture(scope="module")
def quick(module_proxy: FaultyProxy, noise: str) -> Iterator[OpenAIEngine]:
    engine = OpenAIEngine(module_proxy.url, noise, noise, temperature=0.0, max_tokens=12, patience=QUICK)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "fault",
    [
        Answer(status=429, headers=(("retry-after", "0.05"),)),
        Answer(status=503),
        Answer(status=200, kind="text/html", body=b"<html>down for a while</html>"),
        Answer(status=307, headers=(("location", "/v1/chat/completions"),)),
        Answer(status=200, body=b'{"choices": [{"index'),
        Answer(status=200, body=b'{"choices": [7]}'),
        Answer(status=200, kind="text/event-stream", body=b'data: {"choices": {"index": 0}}\n\n'),
        Answer(status=200, kind="text/event-stream", body=b'data: {"error": {"message": "overloaded"}}\n\n'),
        Cut(),
        Cut(after=4),
        Cut(after=4, clean=True),
        HalfJSON(after=4),
        Stall(after=4),
        Bytewise(),
        Bytewise(size=7),
    ],
    ids=repr,
)
def test_what_passes_again_is_asked_again(
    fault: Fault, quick: OpenAIEngine, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Sample("some words")
    [clean] = run(quick, request)
    monkeypatch.setattr(quick.endpoint, "patience", replace(QUICK, stall=2.0))
    proxy.spoil(fault)
    [spoilt] = run(quick, request)
    assert spoilt.ids.tolist() == clean.ids.tolist()
    assert (spoilt.thought, spoilt.response, spoilt.finish) == (clean.thought, clean.response, clean.finish)
    lost = fault.after > 0
    assert spoilt.usage.partial == int(lost), "a stream that broke off has no usage"
    assert (spoilt.usage.generated > clean.usage.generated) == lost, "what was lost was paid for"
    assert spoilt.usage.discarded == spoilt.usage.generated - clean.usage.generated
    assert len(proxy.exchanges) == 2 + (not isinstance(fault, Bytewise))


def test_a_reply_whose_usage_alone_is_lost_is_not_asked_for_again(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    [clean] = run(quick, Sample("some words"))
    proxy.spoil(Cut(after=len(proxy.exchanges[0].events) - 2))  # usage and [DONE] come last
    [cut] = run(quick, Sample("some words"))
    assert (cut.ids.tolist(), cut.finish) == (clean.ids.tolist(), clean.finish)
    assert (cut.usage.partial, cut.usage.discarded, len(proxy.exchanges)) == (1, 0, 2)


def test_only_a_model_with_chains_is_continued_in_one(quick: OpenAIEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    for chain in (True, False):
        monkeypatch.setattr(quick, "facts", replace(quick.facts, chain=chain, continuation="chat"))
        for before in ("So far", "so</think> far", "<think> so"):
            row = quick._row(0, Sample("x", prefix=quick.text.encode([before])), (0,))
            told[chain, before] = row.body["messages"][-1]["content"].replace("\n", " ")
    assert told == {
        (True, "So far"): "<think> So far", (False, "So far"): "So far",
        (True, "so</think> far"): "<think> so</think> far", (False, "so</think> far"): "<think> so</think> far",
        (True, "<think> so"): "<think> so", (False, "<think> so"): "<think> so",
    }  # fmt: skip


@pytest.mark.parametrize("echoes", [False, True])
def test_a_reply_that_quotes_the_question_is_kept_unless_the_server_sends_prompts_back(
    echoes: bool, quick: OpenAIEngine, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    quoted: list[str] = []

    def quote(delta: dict[str, Any]) -> None:
        if not quoted and delta.get("content"):
            quoted.append(delta["content"])
            delta["content"] = f"Some words? {delta['content']}"

    assert not quick.facts.echoes
    monkeypatch.setattr(quick, "facts", replace(quick.facts, echoes=echoes))
    proxy.spoil(respelt(quote))
    [trace] = run(quick, Sample("words"))
    assert trace.response.startswith("Some words?") is not echoes


def test_retry_after_is_honoured_up_to_the_deadline(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(Answer(status=429, headers=(("retry-after", "0.7"),)))
    began = time.monotonic()
    run(quick, Sample("x", max_tokens=1))
    assert time.monotonic() - began >= 0.7
    proxy.spoil(Answer(status=429, headers=(("retry-after", "3600"),)))
    with pytest.raises(ThriftyError, match=r"pause of 3600 s, more than the deadline"):
        run(quick, Sample("x", max_tokens=1))
    assert len(proxy.exchanges) == 3


def test_a_full_server_is_asked_until_it_has_room(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(*[Answer(status=429)] * (2 * QUICK.retries))
    [trace] = run(quick, Sample("x", max_tokens=1))
    assert (len(trace.ids), len(proxy.exchanges)) == (1, 2 * QUICK.retries + 1)


def test_a_server_that_dies_in_a_stream_is_told_after_all_attempts(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(Cut(after=2), Cut(after=3), Answer(status=502))
    with pytest.raises(ThriftyError, match=rf"{proxy.url} answered 502 .*3 attempts.*Is the server up"):
        run(quick, Sample("x"))
    assert len(proxy.exchanges) == 3
    [trace] = run(quick, Sample("x"))
    assert trace.finish == "length", "the engine goes on with other rows"


def test_a_stream_without_end_is_cut(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(Endless(after=6))
    [trace] = run(quick, Sample("x"))
    assert trace.finish == "length"
    assert trace.usage.partial == 1
    assert 12 <= len(trace.ids) <= 120
    proxy.spoil(Endless(after=6))
    engine = OpenAIEngine(proxy.url, quick.model, quick.model, temperature=0.0, patience=replace(QUICK, deadline=8.0))
    with pytest.warns(UserWarning, match="cut at the deadline"):
        [trace] = run(engine, Sample("x"))
    assert trace.finish == "cancelled"
    engine.close()


def test_redirects_lead_nowhere_else(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    with FaultyProxy(proxy.url) as other:
        for target in (other.url, "https://127.0.0.1/v1", "//example.org/v1"):
            proxy.spoil(Answer(status=307, headers=(("location", f"{target}/chat/completions"),)))
            with pytest.raises(ThriftyError, match="redirects to another host"):
                run(quick, Sample("x"))
        assert not other.exchanges
    proxy.spoil(Answer(status=302, headers=(("location", "/v1/elsewhere"),)))
    with pytest.raises(ThriftyError, match="drops the request"):
        run(quick, Sample("x"))


@pytest.mark.parametrize(
    ("status", "words"), [(401, "api_key_env"), (404, "end in /v1"), (400, "refuses"), (501, "501")]
)
def test_what_never_passes_is_told_at_once(status: int, words: str, quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(Answer(status=status, body=b'{"error": {"message": "no\\r\\nway"}}'))
    with pytest.raises(ThriftyError, match=words) as told:
        run(quick, Sample("x"))
    assert proxy.url in str(told.value)
    assert "no way" in str(told.value)
    assert len(proxy.exchanges) == 1


def test_tool_calls_are_refused_clearly(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(respelt(lambda delta: delta.update(tool_calls=[{"index": 0, "function": {"name": "rm"}}])))
    with pytest.raises(ThriftyError, match="tool call"):
        run(quick, Sample("x"))
    with pytest.raises(ThriftyError, match="no tools"):
        quick.submit(1, Sample([{"role": "tool", "content": "4"}]), (1,))


def test_the_key_is_sent_and_never_told(
    quick: OpenAIEngine, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sk-secret\n")
    proxy.spoil(Answer(status=401))
    with pytest.raises(ThriftyError, match="set KEY to a valid key") as told:
        OpenAIEngine(proxy.url, quick.model, api_key_env="KEY", patience=QUICK)
    assert proxy.exchanges[0].headers["authorization"] == "Bearer sk-secret"
    assert "secret" not in str(told.value)


QUESTIONS = [Problem(f"p{i}", f"some words, {i} of them", None) for i in range(40)]


def test_a_row_that_is_refused_fails_its_problem_alone(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    expected = Runner(quick).solve(Greedy(), QUESTIONS[:3])
    proxy.spoil(Answer(status=400, body=b'{"error": {"message": "maximum context length is 12 tokens"}}'))
    refused, *others = Runner(quick, concurrency=1).solve(Greedy(), QUESTIONS[:3])
    assert isinstance(refused.failed, RowFailed)
    assert "maximum context length" in refused.grade.message
    assert (refused.usage.calls, refused.usage.generated, refused.usage.partial) == (1, 0, 0)
    assert [o.tried[0].ids.tolist() for o in others] == [o.tried[0].ids.tolist() for o in expected[1:]]


def test_what_a_broken_row_cost_is_kept(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.spoil(Cut(after=2), Cut(after=3), Cut(after=4))
    broken, other = Runner(quick, concurrency=1).solve(Greedy(), QUESTIONS[:2])
    assert other.failed is None
    assert broken.failed is not None
    assert broken.usage.calls == broken.usage.partial == 3
    [trace] = broken.tried
    assert trace.finish == "cancelled"
    assert broken.usage.discarded == broken.usage.generated > len(trace.ids) > 0


def test_a_server_that_goes_down_stops_the_run(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    proxy.always = Answer(status=503)
    try:
        with pytest.raises(ThriftyError, match=rf"{proxy.url} answered 503 .*rows in a row failed alike"):
            Runner(quick, concurrency=4).solve(Greedy(), QUESTIONS)
    finally:
        proxy.always = None
    assert len(proxy.exchanges) < 3 * (OUTAGE + 8), "three attempts each, and no more rows than it takes"
    assert not quick.busy
    assert all(o.failed is None for o in Runner(quick).solve(Greedy(), QUESTIONS[:2]))


@pytest.mark.parametrize("together", [False, True], ids=["offline", "online"])
def test_streams_are_closed_when_the_time_of_a_problem_is_over(
    together: bool, quick: OpenAIEngine, proxy: FaultyProxy
) -> None:
    proxy.spoil(*[Stall(after=2)] * 6)
    runner = Runner(quick, budget=Budget(seconds=4.0))
    vote = SelfConsistency(k=3, temperature=0.0)
    began = time.monotonic()
    if together:

        async def both() -> list[Any]:
            return list(await asyncio.gather(*(runner.asolve(vote, p) for p in QUESTIONS[:2])))

        outcomes = asyncio.run(both())
    else:
        outcomes = runner.solve(vote, QUESTIONS[:2])
    assert time.monotonic() - began < 20, "the server would stall for ever"
    assert [o.chosen for o in outcomes] == [None, None]
    assert {t.finish for o in outcomes for t in o.tried} == {"cancelled"}
    until = time.monotonic() + 10
    while proxy.open or proxy.upstream_open:
        assert time.monotonic() < until, f"{proxy.open} streams are open still"
        time.sleep(0.01)
    assert all(e.left for e in proxy.exchanges)
    proxy.forgive()


@dataclass(frozen=True)
class Greedy:
    def solve(self, problem: Problem, rng: object) -> Any:
        [trace] = yield Sample(problem.prompt)
        return trace
