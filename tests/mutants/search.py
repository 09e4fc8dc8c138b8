"""Strategies that break their contract."""

import asyncio
import contextlib
import itertools
import random
from dataclasses import dataclass, field, replace

from mutants import caught, template
from thrifty.contracts import All, OutOfBudget, Sample

FAMILY = "solve.search"
Sound = template(FAMILY)


@caught(FAMILY, "ends when its budget is spent", "after OutOfBudget")
@dataclass(frozen=True)
class IgnoresItsBudget(Sound):
    def solve(self, problem, rng):
        for _ in range(self.most):
            try:
                [trace] = yield Sample(problem.prompt)
            except OutOfBudget:
                [trace] = yield Sample(problem.prompt, max_tokens=1)
        return trace


@caught(FAMILY, "ends when its budget is spent", "UnboundLocalError")
@dataclass(frozen=True)
class BreaksWhenItIsSpent(Sound):
    def solve(self, problem, rng):
        with contextlib.suppress(OutOfBudget):
            [best] = yield Sample(problem.prompt)
        return best


@caught(FAMILY, "returns a trace it was given or none", "no request was answered with")
@dataclass(frozen=True)
class WritesItsOwnTrace(Sound):
    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt)
        return replace(trace, response="42", answer="42")


@caught(FAMILY, "returns a trace it was given or none", "must return a Trace or None")
@dataclass(frozen=True)
class ReturnsText(Sound):
    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt)
        return trace.response


@caught(FAMILY, "can be stopped at any request", "asks on when it is stopped")
@dataclass(frozen=True)
class CannotLeave(Sound):
    def solve(self, problem, rng):
        try:
            [trace] = yield Sample(problem.prompt)
        except GeneratorExit:
            [trace] = yield Sample(problem.prompt, max_tokens=1)
        return trace


@caught(FAMILY, "does not depend on the batch", "came to another result")
@dataclass(frozen=True)
class CountsAcrossProblems(Sound):
    answered: list = field(default_factory=list, metadata={"help": "memory"}, compare=False)

    def solve(self, problem, rng):
        self.answered.append(problem.id)
        traces = yield Sample(problem.prompt, n=2)
        return traces[len(self.answered) % 2]


@caught(FAMILY, "does not depend on running online", "under asyncio")
@dataclass(frozen=True)
class CheaperOnline(Sound):
    def solve(self, problem, rng):
        online = asyncio._get_running_loop() is not None
        traces = yield Sample(problem.prompt, n=1 if online else 4)
        return traces[-1]


@caught(FAMILY, "survives chains that never close", "bound its rounds")
@dataclass(frozen=True)
class WaitsForAnEnd(Sound):
    def solve(self, problem, rng):
        while True:
            [trace] = yield Sample(problem.prompt)
            if trace.complete:
                return trace


@caught(FAMILY, "survives answers that nobody can parse", "TypeError")
@dataclass(frozen=True)
class TrustsTheParser(Sound):
    def solve(self, problem, rng):
        traces = yield Sample(problem.prompt, n=4)
        return max((t for t in traces if t.complete), key=lambda trace: int(trace.answer), default=None)


@caught(FAMILY, "never looks at the gold answer", "without the gold answer")
@dataclass(frozen=True)
class KnowsTheAnswer(Sound):
    def solve(self, problem, rng):
        traces = yield Sample(problem.prompt, n=4)
        return next((trace for trace in traces if trace.answer == problem.answer), traces[0])


@caught(FAMILY, "never looks at the gold answer", "asked for something else")
@dataclass(frozen=True)
class TellsTheAnswer(Sound):
    def solve(self, problem, rng):
        [trace] = yield Sample(f"{problem.prompt} (the answer is {problem.answer})")
        return trace


@caught(FAMILY, "gives the same result every time", "called twice")
@dataclass(frozen=True)
class DrawsItsTemperature(Sound):
    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt, temperature=random.random())
        return trace


@caught(FAMILY, "gives the same result every time", "called twice")
@dataclass(frozen=True)
class DrawsAPieceOfItsPrompt(Sound):
    def solve(self, problem, rng):
        [[trace]] = yield All([Sample(problem.prompt + str(random.random()))])
        return trace


_calls = itertools.count(1000)


@caught(FAMILY, "gives the same result every time", "called twice")
@dataclass(frozen=True)
class CountsItsCalls(Sound):
    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt, max_tokens=next(_calls))
        return trace


@caught(FAMILY, "gives the same result every time", "bound its rounds")
@dataclass(frozen=True)
class NeverEnds(Sound):
    def solve(self, problem, rng):
        while True:
            yield Sample(problem.prompt)


@caught(FAMILY, "gives the same result every time", "SystemExit: 0")
@dataclass(frozen=True)
class EndsTheProcess(Sound):
    def solve(self, problem, rng):
        yield Sample(problem.prompt)
        raise SystemExit(0)


@caught(FAMILY, "has the verb of its family", "solve to be a generator, but AnswersAtOnce's gives a NoneType")
@dataclass(frozen=True)
class AnswersAtOnce(Sound):
    def solve(self, problem, rng):
        return None


@caught(FAMILY, "has the verb of its family", "raises TypeError: cannot unpack")
@dataclass(frozen=True)
class ForgetsToYield(Sound):
    def solve(self, problem, rng):
        [trace] = Sample(problem.prompt)
        return trace


@caught(FAMILY, "needs what its card says and nothing else", "logprobs")
@dataclass(frozen=True)
class HidesANeed(Sound):
    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt, want=frozenset({"logprobs"}))
        return trace


@caught(FAMILY, "needs what its card says and nothing else", "hidden, which it never asked for", needs=("hidden",))
@dataclass(frozen=True)
class OverstatesItsNeeds(Sound):
    pass
