"""The runner on the scripted engine: budgets, cancellation, order, and the same results however it is batched."""

import asyncio
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.contracts import All, Budget, Call, Emit, First, Grade, OutOfBudget, Problem, Sample, Score, Trace
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.solve.search.short_m_at_k import ShortMAtK, cost
from thrifty.solve.search.truncation import Truncation

TASK = SimpleNamespace(
    name="toy",
    levels=(1,),
    parse=lambda response: response.split()[-1] if response.split() else None,
    grade=lambda problem, response: Grade(float(response.split()[-1:] == [problem.answer]), response),
)
PROBLEMS = [Problem(f"p{i}", f"question {i}", str(i % 3)) for i in range(7)]


def script(prompt, key):
    """A chain whose length and answer are a function of the row's key alone."""
    rng = random.Random(repr(key))
    return " ".join(["step"] * rng.randrange(1, 30) + ["</think>", str(rng.randrange(3))])


def continued(prompt, key):
    """As ``script`` for the first request of a strategy; an answer only for the second."""
    return script(prompt, key) if key[2] == 0 else str(random.Random(repr(key)).randrange(3))


def solve(strategy, batch_size=64, concurrency=256, budget=None, script=script, problems=PROBLEMS):
    engine = ScriptedEngine(script, score=lambda prompt, text: -float(len(text)), batch_size=batch_size)
    return engine, Runner(engine, TASK, budget, concurrency).solve(strategy, problems)


def signature(outcomes):
    return [(o.problem.id, o.grade.score, o.chosen and (o.chosen.path, tuple(o.chosen.ids))) for o in outcomes]


@dataclass(frozen=True)
class Nested:
    """All inside First inside All, a score and a tool: every kind of request."""

    def branch(self, prompt, n):
        traces = yield Sample(prompt, n=n)
        [score] = yield Score(prompt, ("yes",))
        return traces[0] if score < 0 else None

    def solve(self, problem, rng):
        yield Emit("go")
        word = yield Call(str.upper, "ok")
        assert word == "OK"
        winners = yield First(2, [self.branch(problem.prompt, n) for n in (1, 2, 1)])
        assert len(winners) == 2
        [a, b] = yield All([self.branch(problem.prompt, 1), Sample(problem.prompt, n=3, first=1)])
        best = min([w for _, w in winners] + [a] + [t for t in b if t.finish != "cancelled"], key=lambda t: len(t.ids))
        return best


@pytest.mark.parametrize("strategy", [SelfConsistency(k=5), ShortMAtK(m=2, k=5), Nested()])
def test_results_do_not_depend_on_the_batch(strategy):
    how = continued if isinstance(strategy, ShortMAtK) else script
    expected = signature(solve(strategy, script=how)[1])
    for batch_size, concurrency in [(1, 1), (3, 2), (5, 256), (64, 1)]:
        assert signature(solve(strategy, batch_size, concurrency, script=how)[1]) == expected


@pytest.mark.parametrize("strategy", [SelfConsistency(k=5), ShortMAtK(m=2, k=5), Nested()])
def test_online_equals_offline(strategy):
    how = continued if isinstance(strategy, ShortMAtK) else script

    async def together():
        runner = Runner(ScriptedEngine(how, score=lambda p, t: -1.0), TASK)
        return await asyncio.gather(*(runner.asolve(strategy, p) for p in PROBLEMS))

    assert signature(asyncio.run(together())) == signature(solve(strategy, script=how)[1])


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 4),
    extra=st.integers(0, 4),
    batch=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 40), min_size=8),
)
def test_tokens_in_the_traces_are_the_tokens_made(m, extra, batch, lengths):
    def varied(prompt, key):
        if key[2] > 0:
            return "1"
        return " ".join(["s"] * lengths[key[-1] % len(lengths)] + ["</think>"])

    engine, outcomes = solve(ShortMAtK(m=m, k=m + extra), batch, script=varied)
    assert engine.generated == sum(o.usage.generated for o in outcomes)
    assert engine.generated == sum(len(t.ids) - t.start for o in outcomes for t in o.tried)


def test_a_response_without_a_chain_is_not_gone_on_with():
    talk = ShortMAtK(m=1, k=2).solve(PROBLEMS[0], random.Random(0))
    next(talk)
    ended = [Trace(np.arange(n), "", "7", True, "stop", answer="7") for n in (4, 6)]
    assert talk.send(ended).items == []
    with pytest.raises(StopIteration) as done:
        talk.send([])
    assert done.value.value is ended[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=8, max_size=8), st.integers(1, 8))
def test_short_m_at_k_costs_what_the_paper_says(lengths, m):
    def varied(prompt, key):
        return "1" if key[2] > 0 else " ".join(["s"] * (lengths[key[-1]] - 1) + ["</think>"])

    _, [outcome] = solve(ShortMAtK(m=m, k=8), script=varied, problems=PROBLEMS[:1])
    assert outcome.usage.thought == cost(lengths, m)


def test_first_takes_the_fewest_tokens_and_stops_the_rest():
    lengths = {0: 9, 1: 4, 2: 30, 3: 4, 4: 7}

    @dataclass(frozen=True)
    class Two:
        def solve(self, problem, rng):
            traces = yield Sample(problem.prompt, n=5, first=2)
            assert [i for i, t in enumerate(traces) if t.finish == "stop"] == [1, 3]
            assert [len(t.ids) for t in traces] == [4, 4, 4, 4, 4]
            return traces[1]

    solve(Two(), script=lambda p, key: " ".join(["w"] * lengths[key[-1]]))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_first_over_talks_is_decided_by_tokens_not_by_arrival(batch):
    lengths = {0: 9, 1: 5, 2: 5, 3: 2}

    def talk(prompt, label):
        yield Sample(prompt)
        yield Sample(prompt)
        return label

    seen = []

    @dataclass(frozen=True)
    class Race:
        def solve(self, problem, rng):
            winners = yield First(2, [talk(problem.prompt, name) for name in "abcd"])
            seen.append(winners)
            return (yield Sample(problem.prompt))[0]

    solve(Race(), batch, script=lambda p, key: " ".join(["w"] * lengths[key[3]]) if len(key) > 4 else "w")
    assert seen == [[(3, "d"), (1, "b")]] * len(PROBLEMS)


def test_a_budget_is_never_exceeded_and_is_thrown_into_the_strategy():
    caught = []

    @dataclass(frozen=True)
    class Greedy:
        def solve(self, problem, rng):
            best = None
            try:
                while True:
                    for trace in (yield Sample(problem.prompt, n=2)):
                        best = trace
            except OutOfBudget as spent:
                caught.append(str(spent))
            return best

    _, outcomes = solve(Greedy(), budget=Budget(tokens=40))
    assert len(caught) == len(PROBLEMS)
    assert all(0 < o.usage.generated <= 40 and o.chosen is not None for o in outcomes)
    _, outcomes = solve(Greedy(), budget=Budget(calls=6))
    assert all(o.usage.calls == 6 for o in outcomes)


def test_a_budget_is_shared_evenly_side_by_side():
    _, outcomes = solve(SelfConsistency(k=4), budget=Budget(tokens=40), script=lambda p, k: " ".join(["w"] * 99))
    assert {len(t.ids) for o in outcomes for t in o.tried} == {10}


def test_truncation_closes_the_chain_and_takes_the_answer():
    _, outcomes = solve(
        Truncation(budget=4), script=lambda p, key: " ".join(["s"] * 50) if key[2] == 0 else "2", problems=PROBLEMS[:3]
    )
    for outcome in outcomes:
        assert outcome.chosen.closed
        assert outcome.chosen.answer == "2"
        assert (outcome.usage.thought, outcome.usage.injected, outcome.usage.answer) == (4, 1, 1)


def test_a_strategy_that_yields_nonsense_is_told_so():
    @dataclass(frozen=True)
    class Wrong:
        def solve(self, problem, rng):
            yield "please"

    with pytest.raises(TypeError, match=r"yielded str.*use `yield from`"):
        solve(Wrong())


def test_a_cancelled_caller_stops_its_rows():
    async def leave():
        engine = ScriptedEngine(lambda p, k: " ".join(["w"] * (5 if k[1] == "p1" else 100_000)))
        runner = Runner(engine, TASK)
        long = asyncio.create_task(runner.asolve(SelfConsistency(k=2), PROBLEMS[0]))
        short = asyncio.create_task(runner.asolve(SelfConsistency(k=2), PROBLEMS[1]))
        await short
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        await runner.asolve(SelfConsistency(k=2), PROBLEMS[1])
        await runner._pump
        return engine.generated, runner._waiting

    generated, waiting = asyncio.run(leave())
    assert generated < 1000
    assert not waiting
