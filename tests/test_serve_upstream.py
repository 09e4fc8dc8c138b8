"""The gateway in front of another server: a gateway on the shipped student, through a proxy that spoils."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from click.testing import CliRunner

from faulty_proxy import Answer, Bytewise, Cut, FaultyProxy, HalfJSON, Rewrite, Stall
from serving import free_port
from test_serve import ASK, LONG, calibration, engine_idle, post, started
from thrifty.cli import app as thrifty
from thrifty.commands.serve import gateway
from thrifty.contracts import ThriftyError
from thrifty.models.load import load
from thrifty.serve import upstream as upstream_module
from thrifty.serve.app import build


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    """The upstream."""
    made = gateway(LONG, None, name="long")
    with started(build(made)) as one:
        one.gateway = made
        yield one


@pytest.fixture(scope="module")
def module_proxy(server: SimpleNamespace) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url) as one:
        yield one


@pytest.fixture
def proxy(module_proxy: FaultyProxy) -> FaultyProxy:
    module_proxy.exchanges.clear()
    return module_proxy


@pytest.fixture(scope="module")
def front(module_proxy: FaultyProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The gateway, its efforts calibrated as thinking budgets."""
    file = tmp_path_factory.mktemp("effort") / "effort.json"
    file.write_text(json.dumps(calibration("thinking_token_budget", (4, 12, None))))
    patch = pytest.MonkeyPatch()
    patch.setattr(upstream_module, "MODELS_SECONDS", 1e9)  # no question but the tests' own meets the proxy's faults
    with started(build(gateway(None, module_proxy.url, tokenizer=LONG, calibration=file, max_n=8))) as one:
        yield one
    patch.undo()


@pytest.fixture(scope="module")
def client(front: SimpleNamespace) -> openai.OpenAI:
    found = openai.OpenAI(base_url=front.url, api_key="open-gateway", max_retries=0, timeout=60)
    assert found.models.list().data[0].id == "long"
    return found


def test_a_plain_request_passes_untouched_and_nothing_is_lost(client, server, front, proxy):
    direct = openai.OpenAI(base_url=server.url, api_key="open", max_retries=0)
    asked: dict[str, Any] = {"model": "long", "messages": ASK, "temperature": 0, "user": "ünïcode"}
    through, plain = client.chat.completions.create(**asked), direct.chat.completions.create(**asked)
    assert through.choices == plain.choices
    assert through.usage.completion_tokens == plain.usage.completion_tokens
    assert through.usage.prompt_tokens == plain.usage.prompt_tokens
    assert proxy.exchanges[-1].body == asked
    assert "authorization" not in proxy.exchanges[-1].headers, "a client's key is the gateway's affair"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == plain.choices[0].message.content


def test_a_request_with_tools_passes_untouched_even_to_a_strategys_name(client, proxy):
    tools = [{"type": "function", "function": {"name": "roll", "parameters": {"type": "object", "properties": {}}}}]
    asked = {"messages": ASK, "tools": tools, "tool_choice": "auto"}
    with pytest.raises(openai.BadRequestError, match="no tools"):  # so says the upstream, a local model
        client.chat.completions.create(model="long:self-consistency@3", **asked)
    assert proxy.exchanges[-1].body == {"model": "long", **asked}


def test_characters_in_two_chunks_and_other_fields_reach_the_client(client, proxy):
    def foreign(event: dict[str, Any]) -> dict[str, Any]:
        for choice in event.get("choices", ()):
            if choice["delta"].get("content"):
                choice["delta"] |= {"content": "ü漢🎲", "further": 1}
        return event

    proxy.spoil(Rewrite(event=foreign))
    chunks = list(client.chat.completions.create(model="long", messages=ASK, stream=True))
    assert any(chunk.choices[0].delta.content == "ü漢🎲" for chunk in chunks if chunk.choices)
    proxy.spoil(Bytewise(size=3))
    chunks = list(client.chat.completions.create(model="long", messages=ASK, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("fault", [Cut(after=4), Cut(after=4, clean=True), HalfJSON(after=4)])
def test_a_stream_that_dies_ends_in_an_error_and_not_as_if_all_was_said(client, proxy, front, fault):
    proxy.spoil(fault)
    with pytest.raises(openai.APIError, match=r"stream (broke off|ended)"):
        for _ in client.chat.completions.create(model="long", messages=ASK, stream=True):
            pass
    assert client.chat.completions.create(model="long", messages=ASK).choices
    assert front.app.state.gate.inside == 0


def test_what_the_upstream_refuses_comes_back_as_it_is(client, proxy):
    proxy.spoil(Answer(status=429, headers=(("Retry-After", "7"),)))
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="long", messages=ASK)
    assert refused.value.response.headers["retry-after"] == "7"
    proxy.spoil(Answer(status=307, headers=(("Location", "http://example.invalid/v1/chat/completions"),)))
    with pytest.raises(openai.APIStatusError, match="redirect") as away:
        client.chat.completions.create(model="long", messages=ASK)
    assert away.value.status_code == 502


def test_half_an_answer_is_the_upstreams_fault(client, proxy):
    proxy.spoil(Answer(status=200, body=b'{"choices": [{"mess'))
    with pytest.raises(openai.InternalServerError, match="no whole JSON") as caught:
        client.chat.completions.create(model="long", messages=ASK)
    assert caught.value.status_code == 502


def test_a_client_that_leaves_closes_the_upstreams_stream(client, proxy, front, server):
    proxy.spoil(Stall(after=3))
    stream = client.chat.completions.create(model="long", messages=ASK, stream=True)
    next(stream)
    stream.response.close()
    until = time.monotonic() + 15
    while not proxy.exchanges[-1].left:
        assert time.monotonic() < until, "the upstream's stream is still open"
        time.sleep(0.02)
    assert engine_idle(server)
    assert front.app.state.gate.inside == 0


def test_strategies_run_on_the_upstream_and_their_usage_is_the_upstreams(client, proxy):
    client.chat.completions.create(model="long:single-pass:top_p=1", messages=ASK)  # the server is probed once
    proxy.exchanges.clear()
    reply = client.chat.completions.create(
        model="long:self-consistency@3", messages=ASK, extra_body={"thrifty": {"task": "roll"}}
    )
    told = [exchange.usage for exchange in proxy.exchanges]
    assert len(told) == 3
    assert reply.usage.completion_tokens == sum(one["completion_tokens"] for one in told)
    assert reply.usage.prompt_tokens == sum(one["prompt_tokens"] for one in told)
    assert reply.usage.completion_tokens_details.reasoning_tokens == sum(
        one["completion_tokens_details"]["reasoning_tokens"] for one in told
    )
    assert not reply.thrifty["partial"]
    with pytest.raises(openai.BadRequestError, match="controls"):
        client.chat.completions.create(model="long:tldr-ts:tau=3", messages=ASK)


def test_a_sample_that_the_upstream_refuses_fails_its_own_request_alone(client, proxy, front):
    vote = {"model": "long:self-consistency@3", "messages": ASK, "extra_body": {"thrifty": {"task": "roll"}}}
    assert client.chat.completions.create(**vote).choices
    proxy.spoil(Answer(status=400, body=b'{"error": {"message": "too spicy"}}'))
    with pytest.raises(openai.BadRequestError, match="too spicy"):
        client.chat.completions.create(**vote)
    assert client.chat.completions.create(**vote).thrifty["samples"] == 3
    assert front.app.state.gate.inside == 0


def test_a_thinking_budget_and_an_effort_hold_on_the_upstream_too(client):
    reply = client.chat.completions.create(
        model="long", messages=ASK, temperature=0, extra_body={"thinking_token_budget": 6}
    )
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens_details.reasoning_tokens <= 8
    low = client.chat.completions.create(model="long", messages=ASK, temperature=0, reasoning_effort="low")
    assert low.choices[0].message.content
    assert low.thrifty["effort"] == {"asked": "low", "setting": 4, "calibrated": {"accuracy": 0.5, "tokens": 20}}
    assert low.usage.completion_tokens_details.reasoning_tokens <= 6
    with pytest.raises(openai.BadRequestError, match="not calibrated"):
        client.chat.completions.create(model="long", messages=ASK, reasoning_effort="none")


def test_an_upstream_that_is_down_is_a_502_and_unhealthy():
    with started(build(gateway(None, f"http://127.0.0.1:{free_port()}"))) as one:
        status, told, _ = post(one, {"model": "any", "messages": ASK})
        assert (status, told["error"]["code"]) == (502, "upstream_unavailable")
        status, told, _ = post(one, {"model": "any:self-consistency@2", "messages": ASK, "thrifty": {"task": "roll"}})
        assert status == 502
        status, told, _ = post(one, {"model": "any", "messages": ASK, "stream": True})
        assert status == 502
        health = openai.OpenAI(base_url=one.url.removesuffix("/v1"), api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError) as ill:
            health.get("/healthz", cast_to=object)
        assert ill.value.status_code == 503


def test_an_effort_turns_the_adapter_of_a_local_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load(LONG).model, config).save_pretrained(str(tmp_path / "lora"))
    file = tmp_path / "effort.json"
    levels = calibration("strength", (0.0, 1.0, 4.0))
    file.write_text(json.dumps(levels))
    made = gateway(LONG, None, name="long", adapter=tmp_path / "lora", alpha=0.0, calibration=file)
    with started(build(made)) as one:
        asked = {"model": "long", "messages": ASK, "temperature": 0, "max_tokens": 60}
        replies = {e: post(one, asked | ({"reasoning_effort": e} if e else {}))[1] for e in ("", "low", "high", 0.625)}
    said = {effort: reply["choices"][0]["message"] for effort, reply in replies.items()}
    assert said[""] == said["low"], "strength 0 is the bare model"
    assert said["high"] != said["low"]
    assert replies[0.625]["thrifty"]["effort"]["setting"] == 0.5
    assert replies["high"]["thrifty"]["single_pass"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "one of --model"),
        (["--model", "long", "--upstream", "http://127.0.0.1:1"], "one of --model"),
        (["--model", "long", "--tokenizer", "x"], "--tokenizer belongs to --upstream"),
        (["--upstream", "http://127.0.0.1:1", "--strategy", "short-m-at-q"], "Did you mean 'short-m-at-k'"),
        (["--upstream", "ftp://x"], "http"),
        (["--model", "long", "--calibration", "no-such.json"], "cannot read the calibration"),
        (["--model", "long", "--api-keys", "no-such.txt"], "cannot read the API keys"),
        (["--upstream", "http://127.0.0.1:1", "--upstream-key-env", "NO_SUCH_KEY_HERE"], "NO_SUCH_KEY_HERE"),
    ],
)
def test_the_command_refuses_options_that_do_not_fit(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(thrifty, ["serve", *options])
    assert ended.exit_code == 2
    assert says in ended.output


def test_a_strength_without_an_adapter_is_refused(tmp_path: Path):
    file = tmp_path / "effort.json"
    file.write_text(json.dumps(calibration("strength", (0.0, 0.5, 1.0))))
    with pytest.raises(ThriftyError, match="give --adapter"):
        gateway(LONG, None, calibration=file)
