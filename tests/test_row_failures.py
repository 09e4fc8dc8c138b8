"""A row that fails for good fails its problem alone: offline and under asyncio, whatever asked for it."""

from __future__ import annotations

import asyncio
import io
import random
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from thrifty.contracts import All, Budget, First, Grade, Outcome, Problem, RowFailed, Sample, Score, ThriftyError
from thrifty.engines.runner import OUTAGE, Runner
from thrifty.engines.scripted import FAILS, ScriptedEngine
from thrifty.lab import Lab
from thrifty.measure import summarise
from thrifty.report.table import table
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.solve.search.short_m_at_k import ShortMAtK
from thrifty.solve.search.single_pass import SinglePass

TASK: Any = SimpleNamespace(
    name="toy",
    levels=(1,),
    parse=lambda response: response.split()[-1] if response.split() else None,
    grade=lambda problem, response: Grade(float(response.split()[-1:] == [problem.answer]), response),
)
PROBLEMS = [Problem(f"p{i}", f"question {i}", str(i % 3)) for i in range(7)]


def script(prompt: str, key: Any) -> str:
    """A chain whose length and answer are a function of the row's key; the answer alone to a second request."""
    rng = random.Random(repr(key))
    chain = [] if key[2] else ["step"] * rng.randrange(5, 30) + ["</think>"]
    return " ".join([*chain, str(rng.randrange(3))])


def failing(problems: set[str], after: int = 3, rows: set[int] | None = None, outage: str = "") -> Any:
    """``script``, but rows of these problems (all, or of these indices) fail after some words."""

    def spoilt(prompt: str, key: Any) -> str:
        words = script(prompt, key).split()
        if key[2] == 0 and key[1] in problems and (rows is None or key[-1] in rows):
            words[after:] = [FAILS + outage]
        return " ".join(words)

    return spoilt


def engine(how: Any = script, batch_size: int = 64) -> ScriptedEngine:
    return ScriptedEngine(how, score=lambda prompt, text: -float(len(text)), batch_size=batch_size)


def online(strategy: Any, on: ScriptedEngine, problems: list[Problem] = PROBLEMS) -> list[Outcome]:
    async def together() -> list[Outcome]:
        runner = Runner(on, TASK)
        return list(await asyncio.gather(*(runner.asolve(strategy, p) for p in problems)))

    return asyncio.run(together())


def signature(outcomes: list[Outcome]) -> list[Any]:
    return [(o.problem.id, o.grade, o.chosen and (o.chosen.path, o.chosen.thought)) for o in outcomes]


@dataclass(frozen=True)
class Nested:
    """A score, and samples inside All inside First."""

    def branch(self, prompt: str, n: int) -> Any:
        traces, [score] = yield All([Sample(prompt, n=n), Score(prompt, ("yes",))])
        return traces[0] if score < 0 else None

    def solve(self, problem: Problem, rng: random.Random) -> Any:
        winners = yield First(2, [self.branch(problem.prompt, n) for n in (1, 2)])
        return winners[0][1]


STRATEGIES = [SinglePass(), SelfConsistency(k=4), ShortMAtK(m=2, k=3), Nested()]


@settings(max_examples=40, deadline=None)
@given(
    strategy=st.sampled_from(STRATEGIES),
    bad=st.sets(st.sampled_from([p.id for p in PROBLEMS]), min_size=1, max_size=6),
    after=st.integers(0, 4),
    batch=st.sampled_from([1, 3, 64]),
    concurrency=st.sampled_from([1, 2, 256]),
)
def test_the_other_problems_do_not_notice(
    strategy: Any, bad: set[str], after: int, batch: int, concurrency: int
) -> None:
    expected = Runner(engine(batch_size=batch), TASK, concurrency=concurrency).solve(strategy, PROBLEMS)
    on = engine(failing(bad, after), batch)
    outcomes = Runner(on, TASK, concurrency=concurrency).solve(strategy, PROBLEMS)
    for outcome, want in zip(outcomes, expected):
        if outcome.problem.id not in bad:
            assert signature([outcome]) == signature([want])
            assert concurrency > 1 or outcome.usage == want.usage  # side by side, costs depend on the batch
            continue
        assert isinstance(outcome.failed, RowFailed)
        assert outcome.chosen is None
        assert outcome.grade == Grade(0.0, None, "failed: the script says that this row fails")
        assert outcome.tried, "what was tried is kept"
        assert outcome.usage.generated == sum(t.usage.generated for t in outcome.tried)
    assert on.generated == sum(o.usage.generated for o in outcomes), "and every token is counted"
    assert not on.rows


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_online_is_as_offline(strategy: Any) -> None:
    offline = Runner(engine(failing({"p1", "p4"})), TASK).solve(strategy, PROBLEMS)
    for one, other in zip(online(strategy, engine(failing({"p1", "p4"}))), offline):
        assert (one.failed is None) == (other.failed is None) == (one.problem.id not in ("p1", "p4"))
        assert one.grade == other.grade


@dataclass(frozen=True)
class Race:
    def solve(self, problem: Problem, rng: random.Random) -> Any:
        traces = yield Sample(problem.prompt, n=3, first=2)
        assert problem.id != "p0" or traces[0].finish == "cancelled"
        return next(t for t in traces if t.finish == "stop")


@dataclass(frozen=True)
class RaceOfTalks:
    def one(self, prompt: str, label: int) -> Any:
        yield Sample(prompt)
        return label

    def solve(self, problem: Problem, rng: random.Random) -> Any:
        winners = yield First(2, [self.one(problem.prompt, i) for i in range(3)])
        assert problem.id != "p0" or [i for i, _ in winners] == [2, 1]
        [trace] = yield Sample(problem.prompt)
        return trace


@pytest.mark.parametrize("strategy", [Race(), RaceOfTalks()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("rows", "fails"), [({0}, False), ({0, 2}, True)])
def test_who_fails_in_a_race_is_out_of_it(strategy: Any, rows: set[int], fails: bool) -> None:
    def lengths(prompt: str, key: Any) -> str:
        if key[1] == "p0" and key[2] == 0 and key[3] in rows:
            return FAILS
        return " ".join(["w"] * (2, 9, 5)[key[3]]) if key[2] == 0 else "w"

    for outcomes in (Runner(engine(lengths), TASK).solve(strategy, PROBLEMS), online(strategy, engine(lengths))):
        assert [o.failed is not None for o in outcomes] == [fails] + [False] * 6


def test_a_strategy_may_catch_it_and_go_on() -> None:
    caught: list[Any] = []

    @dataclass(frozen=True)
    class Again:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            try:
                traces = yield All([Sample(problem.prompt, n=2), Score(problem.prompt, ("x",))])
            except RowFailed as failed:
                caught.append((problem.id, failed.trace is not None))
                traces = [(yield Sample(problem.prompt))]
            return traces[0][0]

    def how(prompt: str, key: Any) -> str:
        return f"a b {FAILS}" if key[1] == "p2" and key[2] == 0 else script(prompt, key)

    for outcomes in (Runner(engine(how), TASK).solve(Again(), PROBLEMS), online(Again(), engine(how))):
        assert all(o.failed is None and o.chosen is not None for o in outcomes)
        assert outcomes[2].usage.discarded == 4
        assert [t.finish for t in outcomes[2].tried] == ["cancelled", "cancelled", "stop"]
    assert caught == [("p2", True)] * 2


def test_what_stood_before_a_failure_may_say_that_it_was_not_wanted() -> None:
    @dataclass(frozen=True)
    class Verified:
        stops: bool

        def solve(self, problem: Problem, rng: random.Random) -> Any:
            [first], _ = yield All([Sample(problem.prompt), Sample(problem.prompt)], stop=lambda i, _: self.stops)
            return first

    def how(prompt: str, key: Any) -> str:
        return FAILS if key[3] == 1 else "a </think> 1"

    for stops in (True, False):
        runner = Runner(engine(how), TASK)
        assert [o.failed is None for o in runner.solve(Verified(stops), PROBLEMS)] == [stops] * 7


def test_a_score_that_fails_fails_its_problem() -> None:
    def score(prompt: str, text: str) -> float:
        if prompt == "question 1":
            raise RowFailed("too long")
        return -1.0

    outcomes = Runner(ScriptedEngine(script, score), TASK).solve(Nested(), PROBLEMS)
    assert [o.failed is None for o in outcomes] == [True, False] + [True] * 5


def test_a_run_in_which_every_row_fails_is_an_error() -> None:
    on = engine(failing({p.id for p in PROBLEMS}, after=0))
    with pytest.raises(RowFailed, match="the script says"):
        Runner(on, TASK).solve(SinglePass(), PROBLEMS)
    runner = Runner(on, TASK)
    runner.answered = 1  # an earlier part of the run went well
    assert all(o.failed for o in runner.solve(SinglePass(), PROBLEMS))


def test_an_outage_stops_the_run_at_once() -> None:
    many = [Problem(f"p{i}", f"question {i}", "1") for i in range(300)]
    ids = {p.id for p in many}
    on = engine(failing(ids - {"p0", "p1"}, after=0, outage="unreachable"))
    ended: list[Outcome] = []
    with pytest.raises(ThriftyError, match=rf"the script says.*{OUTAGE} rows in a row") as told:
        Runner(on, TASK, concurrency=8).solve(SinglePass(), many, on_outcome=ended.append)
    assert not isinstance(told.value, RowFailed), "no strategy catches it"
    assert len(ended) < 60
    assert not on.rows, "the engine is left empty"
    assert all(o.failed is None for o in Runner(on, TASK).solve(SinglePass(), many[:2]))
    # Faults of single rows never add up to an outage, nor do those that pass.
    alone = Runner(engine(failing(ids - {"p299"})), TASK).solve(SinglePass(), many)
    assert sum(o.failed is not None for o in alone) == 299
    now_and_then = {p.id for p in many if int(p.id[1:]) % 10}
    mixed = Runner(engine(failing(now_and_then, outage="503"), 1), TASK, concurrency=1).solve(SinglePass(), many)
    assert sum(o.failed is not None for o in mixed) == 270
    assert (s := summarise(mixed, "x"))["failed"] == 270
    assert s["n"] == 300


def test_an_outage_is_told_to_every_caller() -> None:
    many = [Problem(f"p{i}", f"question {i}", "1") for i in range(60)]

    async def together() -> None:
        on = engine(failing({p.id for p in many}, after=0, outage="unreachable"), 1)
        runner = Runner(on, TASK)
        told = await asyncio.gather(*(runner.asolve(SinglePass(), p) for p in many), return_exceptions=True)
        stopped = [t for t in told if isinstance(t, ThriftyError)]
        assert len(told) - len(stopped) < OUTAGE
        assert all("in a row" in str(t) for t in stopped)
        assert runner._pump is not None
        await runner._pump
        assert not runner._waiting
        on.script = script
        assert (await runner.asolve(SinglePass(), many[0])).failed is None, "and it goes on when the server is back"

    asyncio.run(together())


async def settled(runner: Runner) -> None:
    assert runner._pump is not None
    await runner._pump
    assert not runner._waiting
    assert not runner._ends


def test_who_leaves_hears_what_was_spent() -> None:
    def how(prompt: str, key: Any) -> str:
        return " ".join(["w"] * (50_000 if key[1] == "p0" else 5)) + " </think> 1"

    async def together() -> None:
        on = Paced(how)
        runner, heard = Runner(on, TASK), []
        leaving = asyncio.create_task(runner.asolve(SelfConsistency(k=3), PROBLEMS[0], on_end=heard.append))
        others = [asyncio.create_task(runner.asolve(SinglePass(), p)) for p in PROBLEMS[1:]]
        while not on.generated:
            await asyncio.sleep(0.001)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert all(o.chosen is not None for o in await asyncio.gather(*others))
        await settled(runner)
        [left] = heard
        assert left.chosen is None
        assert [t.finish for t in left.tried] == ["cancelled"] * 3
        assert 0 < left.usage.generated < 30_000
        assert left.usage.generated + 7 * 6 == on.generated, "everything that was made is counted once"
        assert not on.rows

    asyncio.run(together())


def test_whoever_asks_hears_the_end_once_however_it_comes() -> None:
    class Wrong:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            traces = yield Sample(problem.prompt, n=2)
            raise LookupError(str(len(traces)))

    class AtOnce:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            yield All([Sample(problem.prompt), "no request"])

    class Idle:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            return None
            yield

    async def together() -> None:
        for strategy, fault, rows in ((Wrong(), LookupError, 2), (AtOnce(), TypeError, 0), (Idle(), None, 0),
                                      (SinglePass(), None, 1)):  # fmt: skip
            runner, heard = Runner(engine(), TASK), list[Outcome]()
            if fault is None:
                assert await runner.asolve(strategy, PROBLEMS[0], on_end=heard.append) is heard[0]
            else:
                with pytest.raises(fault):
                    await runner.asolve(strategy, PROBLEMS[0], on_end=heard.append)
            if runner._pump is not None:
                await settled(runner)
            assert [len(o.tried) for o in heard] == [rows]

    asyncio.run(together())


class Paced(ScriptedEngine):
    """A little slower than the test, so that things happen in between; its polls fail while ``broken``."""

    broken: str = ""

    def poll(self) -> Any:
        time.sleep(0.001)
        if self.broken == "poll":
            raise ZeroDivisionError("a defect in poll")
        return super().poll()

    def submit(self, ticket: int, request: Any, key: Any) -> None:
        if self.broken == key[1]:
            raise ZeroDivisionError("a defect in submit")
        super().submit(ticket, request, key)


def test_a_defect_of_the_engine_fails_who_waits_and_nobody_else() -> None:
    async def together() -> None:
        on = Paced(script)
        runner, heard = Runner(on, TASK), list[Outcome]()
        for _ in range(2):
            on.broken = "poll"
            waiting = [runner.asolve(SelfConsistency(k=3), p, on_end=heard.append) for p in PROBLEMS]
            told = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(t) for t in told] == [ZeroDivisionError] * 7
            await settled(runner)
            assert not runner._futures
            on.broken = ""
            # The engine still has the old rows: they are stopped, and their replies are nobody's.
            good = await asyncio.gather(*(runner.asolve(SelfConsistency(k=3), p) for p in PROBLEMS))
            assert signature(good) == signature(Runner(engine(), TASK).solve(SelfConsistency(k=3), PROBLEMS))
            await settled(runner)
            assert not on.rows
        assert len(heard) == 14
        assert all(o.chosen is None for o in heard)

    asyncio.run(together())


def test_a_defect_in_submit_is_that_requests_alone() -> None:
    async def together() -> None:
        on = Paced(script)
        on.broken = "p3"
        runner = Runner(on, TASK)
        told = await asyncio.gather(*(runner.asolve(SelfConsistency(k=2), p) for p in PROBLEMS), return_exceptions=True)
        assert [isinstance(t, ZeroDivisionError) for t in told] == [p.id == "p3" for p in PROBLEMS]
        await settled(runner)
        assert not on.rows

    asyncio.run(together())


@pytest.mark.parametrize("where", ["strategy", "on_outcome"])
def test_a_fault_leaves_no_rows_behind_for_the_next_run(where: str) -> None:
    class Faulty:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            if where == "strategy" and problem.id == "p2":
                raise ValueError("a defect")
            [trace] = yield Sample(problem.prompt)
            return trace

    def heard(outcome: Outcome) -> None:
        if where == "on_outcome":
            raise ValueError("a defect")

    on = ScriptedEngine(lambda prompt, key: "w " * (500 if key[1] == "p1" else 5) + "</think> 1")
    with pytest.raises(ValueError, match="a defect"):
        Runner(on, TASK, concurrency=2).solve(Faulty(), PROBLEMS, on_outcome=heard)
    assert not on.rows
    assert not on.replies


def test_one_callers_mistake_is_not_the_others() -> None:
    class Wrong:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            yield Sample(problem.prompt)
            yield Sample(problem.prompt, want=frozenset({"logprobs"}))

    async def together() -> None:
        runner = Runner(engine(), TASK)
        good = [runner.asolve(SelfConsistency(k=3), p) for p in PROBLEMS[1:]]
        bad, *rest = await asyncio.gather(runner.asolve(Wrong(), PROBLEMS[0]), *good, return_exceptions=True)
        assert isinstance(bad, ThriftyError)
        assert "logprobs" in str(bad)
        assert all(isinstance(o, Outcome) and o.chosen is not None for o in rest)
        assert not runner._waiting

    asyncio.run(together())
    with pytest.raises(ThriftyError, match="logprobs"):
        Runner(engine(), TASK).solve(Wrong(), PROBLEMS)


@pytest.mark.parametrize("together", [False, True], ids=["offline", "online"])
def test_the_time_of_a_problem_ends_its_rows(together: bool) -> None:
    def how(prompt: str, key: Any) -> str:
        return " ".join(["w"] * (20_000 if key[1] == "p0" else 3)) + " </think> 1"

    class Slow(ScriptedEngine):
        def poll(self) -> Any:
            time.sleep(0.002)
            return super().poll()

    on = Slow(how)
    got: list[Any] = []

    class Patient:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            [best] = yield Sample(problem.prompt, max_tokens=2)
            try:
                [best] = yield Sample(problem.prompt)
            except Exception as error:
                got.append(error)
            return best

    began = time.monotonic()
    runner = Runner(on, TASK, Budget(seconds=0.4))
    if together:

        async def all_of_them() -> list[Outcome]:
            return list(await asyncio.gather(*(runner.asolve(Patient(), p) for p in PROBLEMS)))

        outcomes = asyncio.run(all_of_them())
    else:
        outcomes = runner.solve(Patient(), PROBLEMS)
    assert time.monotonic() - began < 2
    [spent] = got
    assert type(spent).__name__ == "OutOfBudget"
    assert [o.chosen is not None and o.chosen.finish for o in outcomes] == ["length"] + ["stop"] * 6
    assert outcomes[0].tried[1].finish == "cancelled"
    assert outcomes[0].usage.discarded == outcomes[0].tried[1].usage.generated
    assert not on.rows


def test_a_stage_keeps_what_was_solved_and_tries_the_rest_again(tmp_path: Path, capsys: Any) -> None:
    lab = Lab(tmp_path, "none", TASK)
    expected = signature(Runner(engine(), TASK).solve(SelfConsistency(k=2), PROBLEMS))
    first = lab.solve("one", SelfConsistency(k=2), PROBLEMS, engine(failing({"p3", "p5"})))
    assert [o.failed is not None for o in first] == [False] * 3 + [True, False, True, False]
    assert "one: 2 of 7 problems failed" in capsys.readouterr().err
    again = lab.solve("one", SelfConsistency(k=2), PROBLEMS, engine(failing({"p3"})))
    assert [o.problem.id for o in again if o.failed] == ["p3"], "though all that was left to do failed"
    on = engine()
    assert grades(lab.solve("one", SelfConsistency(k=2), PROBLEMS, on)) == [(id, g.score) for id, g, _ in expected]
    assert 0 < on.generated <= 62, "one problem was left"
    lab.solve("one", SelfConsistency(k=2), PROBLEMS, spent := engine())
    assert not spent.generated


def test_what_was_read_to_score_answers_is_paid_for_after_a_stop_too(tmp_path: Path) -> None:
    class Scored:
        def solve(self, problem: Problem, rng: random.Random) -> Any:
            [trace] = yield Sample(problem.prompt)
            yield Score(problem.prompt, ("yes", "no"))
            return trace

    lab = Lab(tmp_path, "none", TASK)
    lab.solve("one", Scored(), PROBLEMS, engine(failing({"p3"})))
    found = lab.solve("one", Scored(), PROBLEMS, engine())
    expected = Runner(engine(), TASK).solve(Scored(), PROBLEMS)
    assert [o.usage.prompt for o in found] == [o.usage.prompt for o in expected]
    assert [o.usage.prompt > o.tried[0].usage.prompt for o in found] == [True] * 7


def test_what_was_solved_before_an_outage_is_kept(tmp_path: Path) -> None:
    many = [Problem(f"p{i}", f"question {i}", "1") for i in range(60)]
    lab = Lab(tmp_path, "none", TASK)
    late = {p.id for p in many[10:]}
    with pytest.raises(ThriftyError, match="in a row"):
        lab.solve("one", SinglePass(), many, engine(failing(late, outage="503"), 1))
    on = engine()
    outcomes = lab.solve("one", SinglePass(), many, on)
    assert on.generated == sum(o.usage.generated for o in outcomes[10:])
    assert grades(outcomes) == grades(Runner(engine(), TASK).solve(SinglePass(), many))


def grades(outcomes: list[Outcome]) -> list[tuple[str, float]]:
    return [(o.problem.id, o.grade.score) for o in outcomes]


def test_the_table_shows_failed_problems_only_where_there_are_some() -> None:
    settings = [
        {"name": "x", **summarise(o, "x")}
        for o in (Runner(engine(how), TASK).solve(SinglePass(), PROBLEMS) for how in (script, failing({"p1"})))
    ]

    def drawn(some: list[Any]) -> str:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(table({"settings": some}))
        return console.export_text()

    assert "failed" not in drawn(settings[:1])
    assert "given up by the engine" in drawn(settings)
