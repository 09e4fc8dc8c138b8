"""The endpoint engine, against ``transformers serve`` on a shipped student, through a proxy that spoils."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tiny
from faulty_proxy import FaultyProxy, Rewrite
from serving import LONG, QUICK, billed, easy, respelt, run, transformers_serve
from thrifty import tasks
from thrifty.cli import app
from thrifty.contracts import Problem, Sample, ThriftyError, Trace
from thrifty.engines._openai_text import UNKNOWN
from thrifty.engines.local import LocalEngine
from thrifty.engines.openai import OpenAIEngine
from thrifty.engines.runner import Runner
from thrifty.models.load import load
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.solve.search.short_m_at_k import ShortMAtK
from thrifty.solve.search.single_pass import SinglePass

torch.set_num_threads(1)
SAMPLED = {"generation_config": json.dumps({"do_sample": True, "eos_token_id": 1, "pad_token_id": 0})}
"""The student's generation_config.json does not ask for sampling, and transformers serve then ignores temperatures."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with transformers_serve(tmp_path_factory.mktemp("serve") / "log.txt") as url:
        yield url


@pytest.fixture(scope="module")
def module_proxy(server: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(server) as one:
        yield one


@pytest.fixture
def proxy(module_proxy: FaultyProxy) -> FaultyProxy:
    module_proxy.exchanges.clear()
    module_proxy.most = 0
    return module_proxy


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that writes all kinds of bytes, fast."""
    return str(tiny.save(tmp_path_factory.mktemp("model") / "noise", kind="llama"))


@pytest.fixture(scope="module")
def student(module_proxy: FaultyProxy) -> Iterator[OpenAIEngine]:
    """The student through the proxy, its tokenizer known."""
    engine = OpenAIEngine(module_proxy.url, LONG, LONG, concurrency=4, extra=SAMPLED, patience=QUICK, max_tokens=200)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def quick(module_proxy: FaultyProxy, noise: str) -> Iterator[OpenAIEngine]:
    """The random model through the proxy."""
    engine = OpenAIEngine(module_proxy.url, noise, noise, temperature=0.0, max_tokens=12, patience=QUICK)
    yield engine
    engine.close()


def test_the_probe_finds_what_transformers_serve_ignores(student: OpenAIEngine, proxy: FaultyProxy) -> None:
    facts = student.facts
    assert not facts.n
    assert facts.stops == "kept"
    assert facts.continuation == "completions"
    assert facts.chain
    assert {"prefix", "cancel"} <= student.capabilities
    assert "does not say so" in student.missing["logprobs"]

    class Wants:
        def solve(self, problem: Problem, rng: object) -> Any:
            return (yield Sample(problem.prompt, want=frozenset({"logprobs"})))

    with pytest.raises(ThriftyError, match=r"logprobs, which the engine 'openai' has not .*engines that can: local"):
        Runner(student).solve(Wants(), easy(1))
    assert not proxy.exchanges, "refused before any request"


def test_greedy_rows_are_the_local_engines_to_the_last_token(student: OpenAIEngine) -> None:
    problems = easy(2)
    requests = [Sample(p.prompt, temperature=0.0, max_tokens=120) for p in problems]
    requests[1] = replace(requests[1], until=(" so",))
    local = LocalEngine(load(LONG))
    for ticket, request in enumerate(requests):
        local.submit(ticket, request, (ticket,))
    expected: dict[int, Any] = {}
    while local.busy:
        expected.update(local.poll())
    greedy = OpenAIEngine(student.endpoint.base_url, LONG, LONG, concurrency=2, patience=QUICK)
    for ticket, trace in enumerate(run(greedy, *requests)):
        want = expected[ticket]
        assert trace.ids.tolist() == want.ids.tolist()
        assert (trace.thought, trace.response, trace.closed) == (want.thought, want.response, want.closed)
        assert (trace.finish, trace.spans) == (want.finish, want.spans)
        assert trace.prompt_ids is not None
        assert trace.prompt_ids.tolist() == want.prompt_ids.tolist()
        for name in ("thought", "answer", "injected", "discarded", "calls", "partial"):
            assert getattr(trace.usage, name) == getattr(want.usage, name), name
        assert trace.usage.prompt == len(trace.prompt_ids)


@pytest.mark.parametrize("strategy", [SinglePass(), SelfConsistency(k=2)], ids=lambda s: type(s).__name__)
def test_strategies_run_and_every_token_is_counted(strategy: Any, student: OpenAIEngine, proxy: FaultyProxy) -> None:
    outcomes = Runner(student, tasks.load("roll")).solve(strategy, easy(2))
    for outcome in outcomes:
        assert outcome.chosen is not None
        assert outcome.chosen.answer == outcome.grade.parsed
        assert outcome.usage.partial == 0
    assert sum(o.usage.generated for o in outcomes) == billed(proxy)
    assert sum(o.usage.prompt for o in outcomes) == sum(e.usage["prompt_tokens"] for e in proxy.exchanges if e.usage)
    for trace in (t for o in outcomes for t in o.tried):
        assert trace.usage.generated == len(trace.ids) - trace.start
        assert trace.spans[-1].end == len(trace.ids)


def test_short_m_at_k_stops_the_rest_and_continues_the_winner(student: OpenAIEngine, proxy: FaultyProxy) -> None:
    [outcome] = Runner(student, tasks.load("roll")).solve(ShortMAtK(m=1, k=2), easy(1))
    winner, loser = sorted(outcome.tried[:2], key=lambda trace: trace.finish == "cancelled")
    answer = outcome.tried[2]
    assert (winner.finish, loser.finish, answer.finish) == ("until", "cancelled", "stop")
    assert winner.closed
    assert answer.complete
    assert answer.ids[: answer.start].tolist() == winner.ids.tolist()
    assert answer.thought == winner.thought
    assert [e.path for e in proxy.exchanges] == ["/v1/chat/completions"] * 2 + ["/v1/completions"]
    assert proxy.exchanges[2].body["prompt"].endswith("</think>")
    assert outcome.usage.discarded == loser.usage.generated
    assert outcome.usage.partial == loser.usage.partial
    if loser.usage.partial:  # cut while the server wrote it: no usage came
        assert loser.usage.generated == winner.usage.generated
        assert sum(e.left for e in proxy.exchanges) == 1
    assert sum(t.usage.generated for t in outcome.tried if not t.usage.partial) == billed(proxy)


def test_a_limit_closes_the_stream_and_frees_the_server(
    quick: OpenAIEngine, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "max_tokens", None)
    endless = Sample("go on", max_tokens=400)
    began = time.monotonic()
    [whole] = run(quick, endless)
    took = time.monotonic() - began
    assert len(whole.ids) > 100, "the model writes long replies"
    quick.submit(9, endless, (9,))
    while not (len(proxy.exchanges) == 2 and len(proxy.exchanges[1].events) > 8):
        assert not quick.poll()
    began = time.monotonic()
    quick.limit(9, 5)
    answers: dict[int, Any] = {}
    while not answers:
        answers.update(quick.poll())
    trace = answers[9]
    assert (trace.finish, trace.usage.partial) == ("cancelled", 1)
    assert 5 <= len(trace.ids) < len(whole.ids) / 2
    assert trace.usage.discarded == trace.usage.generated == len(trace.ids)
    run(quick, Sample("x", max_tokens=1))
    assert time.monotonic() - began < took / 2, "the server went on with a row that nobody reads"
    assert proxy.exchanges[1].left
    assert not proxy.exchanges[1].done
    assert len(proxy.exchanges[1].events) < len(proxy.exchanges[0].events) / 2


def test_rows_that_wait_are_limited_too(quick: OpenAIEngine, proxy: FaultyProxy) -> None:
    engine = OpenAIEngine(
        quick.endpoint.base_url, quick.model, quick.model, concurrency=2, patience=QUICK, max_tokens=20
    )
    for ticket in range(6):
        engine.submit(ticket, Sample("wait"), (ticket,))
    engine.limit(4, 0)
    engine.limit(5, 0)
    answers: dict[int, Any] = {}
    while engine.busy:
        answers.update(engine.poll())
    assert [answers[i].finish == "cancelled" for i in range(6)] == [False] * 4 + [True] * 2
    assert answers[5].usage.calls == 0
    assert len(proxy.exchanges) == 4
    assert proxy.most <= 2, "no more streams at once than allowed"
    engine.close()


async def test_a_caller_that_goes_away_closes_its_stream(
    quick: OpenAIEngine, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "max_tokens", None)

    class Long:
        def solve(self, problem: Problem, rng: object) -> Any:
            [trace] = yield Sample(problem.prompt, max_tokens=400)
            return trace

    runner = Runner(quick)
    task = asyncio.create_task(runner.asolve(Long(), Problem("1", "go on", None)))
    while not (proxy.exchanges and len(proxy.exchanges[0].events) > 5):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        while not proxy.exchanges[0].left:
            await asyncio.sleep(0.01)


def test_open_chains_are_not_continued_where_their_end_cannot_be_seen(
    student: OpenAIEngine, proxy: FaultyProxy
) -> None:
    ids = student.text.encode([" 8 b +9 = 7 ."])
    with pytest.raises(ThriftyError, match="leaves special tokens out of completions"):
        student.submit(0, Sample("roll mod 10 . a 8 . b +9 .", prefix=ids), (0,))
    assert not proxy.exchanges


def test_a_model_that_the_server_does_not_have_is_told(module_proxy: FaultyProxy) -> None:
    with pytest.raises(ThriftyError, match=module_proxy.url):
        OpenAIEngine(module_proxy.url, "/no/such/model", patience=replace(QUICK, retries=0))


# -------------------------------------------------------------------------------------- chains, spelt otherwise


def as_reasoning(delta: dict[str, Any]) -> None:
    if "reasoning_content" in delta:
        delta["reasoning"] = delta.pop("reasoning_content")


class Inline:
    """``<think>`` and ``</think>`` in the text; without ``opening`` as if the template had prefilled it."""

    def __init__(self, opening: bool) -> None:
        self.opening, self.inside = opening, False

    def __call__(self, delta: dict[str, Any]) -> None:
        if "reasoning_content" in delta:
            delta["content"] = ("<think>" if self.opening and not self.inside else "") + delta.pop("reasoning_content")
            self.inside = True
        elif self.inside and delta.get("content"):
            delta["content"], self.inside = "</think>" + delta["content"], False


@pytest.fixture(scope="module", params=[True, False], ids=["tokenizer", "none"])
def unspoilt(request: Any, student: OpenAIEngine, module_proxy: FaultyProxy) -> tuple[OpenAIEngine, Sample, Trace]:
    ask = Sample(easy(1)[0].prompt, temperature=0.0, max_tokens=120)
    engine = student if request.param else OpenAIEngine(module_proxy.url, LONG, extra=SAMPLED, patience=QUICK)
    return engine, ask, run(engine, ask)[0]


@pytest.mark.parametrize(
    "change", [as_reasoning, Inline(True), Inline(False)], ids=["reasoning", "inline", "prefilled"]
)
def test_chains_are_told_apart_however_they_are_spelt(
    change: Any, unspoilt: tuple[OpenAIEngine, Sample, Trace], proxy: FaultyProxy
) -> None:
    engine, ask, plain = unspoilt
    proxy.spoil(respelt(change))
    [trace] = run(engine, ask)
    assert plain.complete
    assert plain.thought
    assert (trace.thought, trace.response, trace.closed, trace.finish) == (plain.thought, plain.response, True, "stop")
    assert abs(trace.usage.generated - plain.usage.generated) <= 1
    assert abs(trace.usage.thought - plain.usage.thought) <= 1  # the opening tag is nobody's token here
    if engine.text.tokenizer is None:
        assert (trace.ids < 0).all(), "an endpoint names no tokens"
        assert trace.ids.tolist().count(UNKNOWN) <= 2


def test_stop_strings_that_the_server_ignores_end_the_row_here(student: OpenAIEngine, proxy: FaultyProxy) -> None:
    ask = Sample(easy(1)[0].prompt, temperature=0.0, until=(" =",))
    [plain] = run(student, ask)
    proxy.spoil(Rewrite(request=lambda body: {k: v for k, v in body.items() if k != "stop"}))
    [trace] = run(student, ask)
    assert proxy.exchanges[1].body["stop"] == [" ="]
    assert (plain.finish, trace.finish) == ("until", "until")
    assert trace.ids.tolist() == plain.ids.tolist()
    assert trace.thought.endswith("=")
    assert (plain.usage.partial, trace.usage.partial) == (0, 1)


# ------------------------------------------------------------------------------------- the command line


def test_measure_runs_on_an_endpoint(student: OpenAIEngine, proxy: FaultyProxy, tmp_path: Path) -> None:
    words = ["measure", "--engine", "openai", "--base-url", proxy.url, "--model", LONG, "--tokenizer", LONG, "--n", "1"]
    words += ["--runs", str(tmp_path), "--name", "one", "--json", "--max-tokens", "60", "--batch-size", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    [setting] = json.loads((tmp_path / "one" / "result.json").read_text())["settings"]
    exchange = proxy.exchanges[-1]
    assert exchange.body["max_tokens"] == 60
    assert exchange.usage is not None
    assert setting["thought_tokens"] + setting["answer_tokens"] == exchange.usage["completion_tokens"]
    assert (tmp_path / "one" / "traces.parquet").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", "openai"], "needs --base-url"),
        (["--base-url", "http://127.0.0.1:1"], "give --engine openai"),
        (["--engine", "openai", "--base-url", "http://127.0.0.1:1", "--adapter", "a"], "loaded here"),
        (["--engine", "openai", "--base-url", "ftp://a"], "is no base URL"),
        (["--engine", "openai", "--base-url", "http://127.0.0.1:1", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_measure_says_what_does_not_fit(words: list[str], told: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["measure", "--runs", str(tmp_path), *words])
    assert done.exit_code
    assert told in " ".join((done.output or str(done.exception)).split())
