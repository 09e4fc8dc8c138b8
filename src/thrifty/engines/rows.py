"""The nodes of a problem's tree that are rows of an engine: ``Sample``, ``Score`` and ``Hidden``.

A node whose row failed, or whose problem ran out of time, stops what else it has under way, waits for it to be counted,
and is answered by ``Failed``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.contracts import Hidden, OutOfBudget, RowFailed, Sample, Score, Scores, ThriftyError, Trace

if TYPE_CHECKING:
    from thrifty.engines.nodes import Job

Done = Callable[[Any], None]
GONE: Any = object()
"""A node's answer when it was stopped from above: it lost, nobody waits for its value."""


@dataclass(frozen=True, eq=False)
class Failed:
    """A node's answer when a row of it failed, or was stopped because the problem's time was over."""

    error: RowFailed | OutOfBudget


class Node:
    """Something under way. ``allowance`` is how many tokens it may still generate; ``cost`` how many it has."""

    def __init__(self, job: Job, path: tuple[int, ...], allowance: int | None, done: Done):
        self.job, self.path, self.allowance, self.done = job, path, allowance, done
        self.cost = 0
        self.over = False

    def start(self) -> None:
        raise NotImplementedError

    def cap(self, tokens: int) -> None:
        """Stop it once it has generated ``tokens`` in all; its answer is then ``GONE``."""
        raise NotImplementedError

    def finish(self, value: Any) -> None:
        if not self.over:
            self.over = True
            self.done(value)


class SampleNode(Node):
    def __init__(self, job: Job, path: tuple[int, ...], allowance: int | None, done: Done, request: Sample):
        super().__init__(job, path, allowance, done)
        if request.n < 1 or (request.first is not None and not 1 <= request.first <= request.n):
            raise ThriftyError(f"Sample needs n >= 1 and 1 <= first <= n, got n={request.n}, first={request.first}")
        self.request = request
        self.traces: list[Trace | None] = [None] * request.n
        self.tickets: dict[int, int] = {}
        self.failures: dict[int, RowFailed] = {}
        self.needed = request.n if request.first is None else request.first
        self.bound: int | None = None

    def start(self) -> None:
        limit = self.request.max_tokens
        if self.allowance is not None:
            share = self.allowance // self.request.n
            limit = share if limit is None else min(limit, share)
        row = replace(self.request, n=1, first=None, max_tokens=limit)
        self.job.calls += self.request.n
        for index in range(self.request.n):
            key = (self.job.seed, self.job.problem.id, *self.path, index)
            self.tickets[index] = self.job.runner.submit(self.job, row, key, partial(self._row_done, index))

    def _row_done(self, index: int, reply: Any) -> None:
        trace: Trace = reply
        if isinstance(reply, RowFailed):  # out of the race, like a row that was stopped
            self.failures[index] = reply
            nothing = Trace(np.zeros(0, np.int32), "", "", False, "cancelled", usage=reply.usage)
            trace = replace(reply.trace or nothing, finish="cancelled")
        trace = self.job.runner.parsed(replace(trace, problem=self.job.problem.id, path=(*self.path, index)))
        self.traces[index] = trace
        self.tickets.pop(index)
        self.cost += trace.usage.generated
        first = self.request.first
        ended = sorted(
            (len(t.ids) - t.start, i) for i, t in enumerate(self.traces) if t is not None and t.finish != "cancelled"
        )
        if first is not None and len(ended) >= first:
            # Whoever may still win ends with no more tokens than the m-th best so far: let the others run to there.
            for ticket in self.tickets.values():
                self.job.runner.limit(ticket, ended[first - 1][0])
        elif self.request.n - len(self.failures) < self.needed:
            for ticket in self.tickets.values():
                self.job.runner.limit(ticket, 0)
        if not self.tickets:
            winners = {i for _, i in (ended if first is None else ended[:first])}
            for i, t in enumerate(self.traces):
                assert t is not None
                if i not in winners and t.finish != "cancelled":
                    t = replace(t, finish="cancelled", answer=None)
                if t.finish == "cancelled":
                    spent = t.usage.thought + t.usage.answer
                    t = replace(t, usage=replace(t.usage, discarded=spent))
                self.traces[i] = t
                self.job.tried.append(t)
                self.job.usage += t.usage
            lost = self.bound is not None and self.cost >= self.bound
            error = self._error() if len(ended) < self.needed else None
            self.finish(GONE if lost else self.traces if error is None else Failed(error))

    def _error(self) -> RowFailed | OutOfBudget | None:
        if self.failures:
            return self.failures[min(self.failures)]
        return OutOfBudget(f"{self.job.runner.budget.seconds} s") if self.job.expired else None

    def cap(self, tokens: int) -> None:
        self.bound = max(0, tokens)
        for ticket in self.tickets.values():
            self.job.runner.limit(ticket, self.bound)


class ScoreNode(Node):
    """``Score`` and ``Hidden``: text is read, nothing is generated."""

    def __init__(self, job: Job, path: tuple[int, ...], allowance: int | None, done: Done, request: Score | Hidden):
        super().__init__(job, path, allowance, done)
        self.request = request
        self.ticket = 0

    def start(self) -> None:
        self.job.calls += 1
        key = (self.job.seed, self.job.problem.id, *self.path)
        self.ticket = self.job.runner.submit(self.job, self.request, key, self._scored)

    def _scored(self, reply: Any) -> None:
        assert isinstance(reply, Scores | RowFailed)
        self.job.usage += reply.usage
        self.cost += reply.usage.generated
        if isinstance(reply, RowFailed):
            late = self.job.expired and not reply.outage
            self.finish(Failed(OutOfBudget(f"{self.job.runner.budget.seconds} s") if late else reply))
        else:
            self.finish(reply.values)

    def cap(self, tokens: int) -> None:
        if tokens <= 0:  # most engines cannot cut a prefill short: its answer is dropped at once
            self.job.runner.limit(self.ticket, 0)
            self.finish(GONE)
