"""The endpoint engine against a server of our own that speaks as vLLM does: continuing, log-probabilities, scores."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from faulty_proxy import Answer, FaultyProxy, HalfJSON, Rewrite, Stall
from serving import LONG, QUICK, continuing_server, easy, run
from thrifty.contracts import END_OF_THOUGHT, Budget, Problem, Sample, Score, ThriftyError
from thrifty.engines.local import LocalEngine
from thrifty.engines.openai import OpenAIEngine
from thrifty.engines.runner import Runner
from thrifty.models.load import load
from thrifty.solve.search.short_m_at_k import ShortMAtK

torch.set_num_threads(1)
OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


@pytest.fixture(scope="module")
def dialect() -> Iterator[str]:
    with continuing_server(load(LONG), OPEN) as url:
        yield url


def test_without_a_tokenizer_a_chain_is_continued_by_chat(dialect: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = OpenAIEngine(dialect, LONG, temperature=0.0, patience=QUICK, max_tokens=120)
    assert engine.facts.stops == "named"
    assert engine.capabilities >= {"prefix", "logprobs", "cancel"}
    ask = Sample(easy(1)[0].prompt)
    [whole] = run(engine, ask)
    assert whole.complete
    [head] = run(engine, replace(ask, max_tokens=9))
    assert (head.finish, len(head.ids)) == ("length", 9)
    [rest] = run(engine, replace(ask, prefix=head.ids))
    assert (rest.thought, rest.response, rest.closed) == (whole.thought, whole.response, True)
    assert rest.start == 9
    assert len(rest.ids) == len(whole.ids)
    assert rest.usage.generated == len(whole.ids) - 9
    [forked] = run(engine, replace(ask, prefix=rest.ids[:5], until=(END_OF_THOUGHT,)))
    assert (forked.finish, forked.closed, forked.thought) == ("until", True, whole.thought)
    ids = head.ids.tolist()
    assert len(engine.text.pieces) > 5
    del whole, head, rest, forked
    gc.collect()
    assert len(engine.text.pieces) == 0, "the rows have ended and nobody holds their traces"
    with pytest.raises(ThriftyError, match="forgotten"):
        engine.submit(0, replace(ask, prefix=ids), (0,))
    engine.close()
    strange = OpenAIEngine(dialect, LONG, temperature=0.0, patience=QUICK)
    with pytest.raises(ThriftyError, match="another endpoint engine"):
        strange.submit(0, replace(ask, prefix=ids), (0,))
    strange.close()


@pytest.mark.parametrize("known", [True, False], ids=["tokenizer", "none"])
def test_log_probabilities_stand_at_their_tokens(known: bool, dialect: str) -> None:
    loaded = load(LONG)
    ask = Sample(easy(1)[0].prompt, temperature=0.0, max_tokens=12, want=frozenset({"logprobs"}))
    local = LocalEngine(loaded)
    local.submit(0, ask, (0,))
    expected: list[Any] = []
    while not expected:
        expected = local.poll()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = OpenAIEngine(dialect, LONG, LONG if known else None, patience=QUICK)
    [trace] = run(engine, ask)
    np.testing.assert_allclose(trace.logprobs, expected[0][1].logprobs, atol=1e-5)
    assert len(trace.ids) == 12
    if known:
        assert trace.ids.tolist() == expected[0][1].ids.tolist()
    engine.close()


def test_templates_that_mangle_a_turn_are_found_out() -> None:
    loaded = load(LONG)  # its own template closes a chain that an assistant's turn leaves open
    with continuing_server(loaded, loaded.tokenizer.chat_template) as url:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = OpenAIEngine(url, LONG, patience=QUICK)
        assert "prefix" not in engine.capabilities
        assert "as it stands" in engine.missing["prefix"]
        with pytest.raises(ThriftyError, match=r"short-m-at-k needs prefix.*give a tokenizer"):
            Runner(engine).solve(ShortMAtK(), easy(1))
        engine.close()


# --------------------------------------------------------------------------------------------- scores


class Scorer:
    """Three texts behind a prefix; the last is empty."""

    def solve(self, problem: Problem, rng: object) -> Any:
        values = yield Score(problem.prompt, (" 8 b", " 3 so 4", ""), prefix=[5, 6, 7])
        seen.append((problem.id, values))


seen: list[tuple[str, list[float]]] = []


def scored(engine: Any, n: int = 2) -> tuple[dict[str, list[float]], list[Any]]:
    seen.clear()
    outcomes = Runner(engine).solve(Scorer(), easy(n))
    return dict(seen), outcomes


@pytest.mark.parametrize("way", ["echo", "prompt_logprobs"])
def test_scores_are_the_local_engines(way: str) -> None:
    loaded = load(LONG)
    expected, _ = scored(LocalEngine(loaded))
    with continuing_server(loaded, OPEN, way) as url, FaultyProxy(url) as proxy:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = OpenAIEngine(proxy.url, LONG, LONG, patience=QUICK, concurrency=2)
        assert engine.facts.scoring is not None
        assert way in engine.facts.scoring
        proxy.exchanges.clear()
        found, outcomes = scored(engine)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4)
            assert found[name][2] == 0.0
        assert len(proxy.exchanges) == 4, "an empty text is not asked for"
        read = sum(len(e.body["prompt"]) for e in proxy.exchanges)
        assert sum(o.usage.prompt for o in outcomes) == read
        made = 4 * engine.facts.scoring["max_tokens"]
        assert sum(o.usage.generated for o in outcomes) == sum(o.usage.discarded for o in outcomes) == made
        if way == "echo":
            faults(engine, proxy, expected)
        engine.close()


def faults(engine: OpenAIEngine, proxy: FaultyProxy, expected: dict[str, list[float]]) -> None:
    proxy.spoil(Answer(status=503), HalfJSON())
    found, _ = scored(engine)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-4)
    proxy.spoil(Rewrite(request=lambda body: {k: v for k, v in body.items() if k != "echo"}))
    _, outcomes = scored(engine)
    assert sum(o.failed is not None for o in outcomes) == 1
    assert "sent no log-probabilities" in " ".join(o.grade.message for o in outcomes)
    proxy.spoil(*[Stall()] * 4)
    runner = Runner(engine, budget=Budget(seconds=2.0))
    assert [o.failed for o in runner.solve(Scorer(), easy(2))] == [None, None]
    until = time.monotonic() + 10
    while proxy.open or proxy.upstream_open:
        assert time.monotonic() < until, "a stream is open still"
        time.sleep(0.01)


def test_scores_are_refused_where_the_server_tells_none(dialect: str) -> None:
    loaded = load(LONG)
    with continuing_server(loaded, OPEN, "none") as url:
        for where, tokenizer, why in ((url, LONG, "tell no log-probabilities"), (dialect, None, "give a tokenizer")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine = OpenAIEngine(where, LONG, tokenizer, patience=QUICK)
            with pytest.raises(ThriftyError, match=rf"asks for score.*{why}.*engines that can: local"):
                scored(engine)
            engine.close()
