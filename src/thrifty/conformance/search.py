"""Checks of strategies, on an engine whose answers are scripted (on a tiny model where a script cannot do)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thrifty.conformance import PROBES, Failed, Probe, Subject, check, samples
from thrifty.conformance.samples import Mode, plain
from thrifty.contracts import (
    All,
    Budget,
    First,
    Outcome,
    OutOfBudget,
    Problem,
    Strategy,
    Talk,
    Trace,
)
from thrifty.engines import capabilities
from thrifty.engines.relay import relayed
from thrifty.engines.runner import Runner

MOST = 500
"""Requests of one problem; a strategy that asks for more on a chain of a hundred words asks for ever."""
MODES: tuple[Mode, ...] = ("ordinary", "unclosed")
SILENT = frozenset({"seed", "cancel"})
"""Capabilities whose use no request shows."""


@dataclass(eq=False)
class Watched:
    """A strategy, with what it asked for and was given, by problem. Raises where it goes on after OutOfBudget."""

    strategy: Strategy
    asked: dict[str, list[Any]] = field(default_factory=dict)
    given: dict[str, list[Trace]] = field(default_factory=dict)

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        self.asked[problem.id], self.given[problem.id] = [], []
        return (yield from self.watch(self.strategy.solve(problem, rng), problem.id))

    def watch(self, talk: Talk, problem: str) -> Talk:
        spent = False

        def ask(request: Any) -> Talk:
            nonlocal spent
            if spent:
                raise Failed(f"asks for another {type(request).__name__} after OutOfBudget: end, with the best so far")
            if len(self.asked[problem]) > MOST:
                raise Failed(f"has asked more than {MOST} times for one problem and goes on: bound its rounds")
            try:
                answer = yield self.wrap(request, problem)
            except OutOfBudget:
                spent = True
                raise
            self.given[problem] += _traces(answer)
            return answer

        return relayed(talk, ask)

    def wrap(self, request: Any, problem: str) -> Any:
        if hasattr(request, "send"):
            return self.watch(request, problem)
        self.asked[problem].append(request)
        if isinstance(request, All | First):
            return replace(request, items=[self.wrap(item, problem) for item in request.items])
        return request


def _traces(answer: Any) -> Iterator[Trace]:
    if isinstance(answer, Trace):
        yield answer
    elif isinstance(answer, list | tuple):
        for item in answer:
            yield from _traces(item)


def engine(subject: Subject, mode: Mode = "ordinary", batch_size: int = 64, only: bool = False) -> Any:
    """An engine for the subject: scripted where that has what the card needs. ``only``: it has nothing else."""
    if subject.needs <= samples.SCRIPTED:
        has = subject.needs | SILENT if only else samples.SCRIPTED
        return samples.Playbook(mode, has, batch_size)
    from thrifty.conformance import local

    return local.engine(batch_size, subject.needs | SILENT if only else None, 24 if mode == "ordinary" else 6)


def run(
    subject: Subject,
    asked: Sequence[Problem],
    mode: Mode = "ordinary",
    only: bool = False,
    budget: Budget | None = None,
) -> tuple[list[Outcome], Watched]:
    """Outcomes, and the strategy that was watched on the way to them."""
    watched = Watched(subject.make())
    outcomes = samples.solve(watched, engine(subject, mode, only=only), asked, budget)
    for outcome in outcomes:
        if outcome.chosen is not None and all(t is not outcome.chosen for t in watched.given[outcome.problem.id]):
            raise Failed(f"returned a trace that no request was answered with (problem {outcome.problem.id})")
    return outcomes, watched


def told(outcomes: Sequence[Outcome]) -> list[Any]:
    """What must not depend on the batch. Rows that lost may: how far they went before they were stopped is cost."""
    return [
        None if o.chosen is None else (o.chosen.path, o.chosen.thought, o.chosen.response, o.chosen.finish)
        for o in outcomes
    ]


def talked(
    subject: Subject, method: Any, asked: Sequence[Problem], batch_size: int = 64, concurrency: int = 256
) -> tuple[list[Any], dict[str, Any]]:
    """What came of a strategy, and what it asked for on the way, by problem."""
    watched = Watched(method)
    outcomes = samples.solve(watched, engine(subject, batch_size=batch_size), asked, None, concurrency)
    return told(outcomes), {problem: plain(requests) for problem, requests in watched.asked.items()}


PROBES["solve.search"] = Probe(lambda subject: samples.problems(4), talked)


@check("solve.search")
def returns_a_trace_it_was_given_or_none(subject: Subject) -> None:
    run(subject, samples.problems())


@check("solve.search")
def ends_when_its_budget_is_spent(subject: Subject) -> None:
    for calls in range(5):
        run(subject, samples.problems(2), budget=Budget(calls=calls))
    for tokens in (0, 1, 10, 60):
        for mode in MODES:
            outcomes, _ = run(subject, samples.problems(2), mode, budget=Budget(tokens=tokens))
            spent = max(o.usage.generated for o in outcomes)
            if spent > tokens:
                raise Failed(f"spent {spent} tokens of a budget of {tokens}: text put in counts as well")


@check("solve.search")
def can_be_stopped_at_any_request(subject: Subject) -> None:
    problem = samples.problems(1)
    _, watched = run(subject, problem)
    for turns in range(min(len(watched.asked[problem[0].id]), 5)):
        samples.solve(_Leaves(subject.make(), turns), engine(subject), problem)


@dataclass(frozen=True)
class _Leaves:
    """Stops a strategy at a request, so many answers in: its caller went away, or it lost a race."""

    strategy: Strategy
    turns: int

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        talk, answer = self.strategy.solve(problem, rng), None
        try:
            for _ in range(self.turns):
                answer = yield talk.send(answer)
            talk.send(answer)
        except StopIteration:
            return
        try:
            talk.close()
        except RuntimeError:
            raise Failed("asks on when it is stopped: let GeneratorExit through") from None


@check("solve.search")
def does_not_depend_on_the_batch(subject: Subject) -> None:
    asked = samples.problems(6)
    expected, _ = talked(subject, subject.make(), asked)
    for batch_size, concurrency in ((1, 256), (3, 2)):
        found, _ = talked(subject, subject.make(), asked, batch_size, concurrency)
        if found != expected:
            raise Failed(f"in batches of {batch_size} it came to another result than in batches of 64")


@check("solve.search")
def does_not_depend_on_running_online(subject: Subject) -> None:
    asked = samples.problems(4)
    expected, _ = talked(subject, subject.make(), asked)
    runner, method = Runner(engine(subject), samples.task()), Watched(subject.make())

    async def go() -> list[Outcome]:
        return list(await asyncio.gather(*(runner.asolve(method, problem) for problem in asked)))

    if told(asyncio.run(go())) != expected:
        raise Failed("under asyncio it came to another result than offline")


@check("solve.search")
def survives_chains_that_never_close(subject: Subject) -> None:
    run(subject, samples.problems(4), "unclosed")


@check("solve.search")
def survives_answers_that_nobody_can_parse(subject: Subject) -> None:
    run(subject, samples.problems(4), "unparsable")


@check("solve.search")
def never_looks_at_the_gold_answer(subject: Subject) -> None:
    asked = samples.problems(6)
    blind = [replace(problem, answer=None, meta={}) for problem in asked]
    seen, said = talked(subject, subject.make(), asked)
    result, requests = talked(subject, subject.make(), blind)
    if result != seen:
        raise Failed("without the gold answer and the reference chain it came to another result")
    if requests != said:
        raise Failed("without the gold answer and the reference chain it asked for something else")


@check("solve.search")
def needs_what_its_card_says_and_nothing_else(subject: Subject) -> None:
    used: set[str] = set()
    for mode in MODES:
        _, watched = run(subject, samples.problems(), mode, only=True)
        for request in itertools.chain(*watched.asked.values()):
            used |= capabilities.used(request)
            if isinstance(request, First) or getattr(request, "first", None) or getattr(request, "stop", None):
                used.add("cancel")
    if idle := subject.needs - used - {"seed"}:
        raise Failed(f"its card needs {', '.join(sorted(idle))}, which it never asked for")
