"""One problem under way: the tree of what its strategy asked for, each node with its budget and its path.

A strategy is a generator (``contracts.Talk``). Each problem is a *job*; each generator or request inside it is a
*node* of a tree, and ``All`` and ``First`` have children. A node's ``path`` (which yield, which child) keys the
random stream of its rows, so results depend neither on the batch nor on the order in which rows end. Nodes know
nothing of who turns the wheel (``runner.py``): they submit rows to it and are called back as rows end.

Where a row fails, or the problem's time is over, the error is thrown into the talk at its ``yield``; what no talk
catches goes up the tree.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from thrifty.contracts import (
    All,
    Call,
    Emit,
    First,
    Grade,
    Hidden,
    Outcome,
    OutOfBudget,
    Problem,
    RowFailed,
    Sample,
    Score,
    Strategy,
    Talk,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines.rows import GONE, Done, Failed, Node, SampleNode, ScoreNode

if TYPE_CHECKING:
    from thrifty.engines.runner import Runner


class Job:
    """One problem: what was tried, what it cost, and how many rows are still out."""

    def __init__(self, runner: Runner, problem: Problem, strategy: Strategy, seed: int, emit: Callable[[str], None]):
        self.runner, self.problem, self.seed, self.emit = runner, problem, seed, emit
        self.tried: list[Trace] = []
        self.usage = Usage()
        self.calls = 0
        self.started = time.monotonic()
        self.rows_out = 0
        self.settled = False
        self.expired = False
        self.chosen: Trace | None = None
        self.failed: RowFailed | None = None
        rng = random.Random(f"{seed}|{problem.id}")
        self.root = _TalkNode(self, (), runner.budget.tokens, self._root_done, strategy.solve(problem, rng))

    def _root_done(self, value: Any) -> None:
        if value is GONE:  # its caller was cancelled
            value = None
        if isinstance(value, Failed):
            assert isinstance(value.error, RowFailed)
            # Its traceback would keep every generator that it passed through.
            self.failed, value = value.error.with_traceback(None), None
        if value is not None and not isinstance(value, Trace):
            raise TypeError(f"a strategy must return a Trace or None, not {type(value).__name__}")
        self.settled, self.chosen = True, value

    @property
    def finished(self) -> bool:
        return self.settled and self.rows_out == 0

    def check(self) -> None:
        """Raise OutOfBudget when calls or seconds are spent (tokens are kept by the nodes)."""
        budget = self.runner.budget
        if budget.calls is not None and self.calls >= budget.calls:
            raise OutOfBudget(f"{self.calls} calls")
        if self.late:
            raise OutOfBudget(f"{budget.seconds} s")

    @property
    def late(self) -> bool:
        """Whether the problem's seconds are over."""
        seconds = self.runner.budget.seconds
        return seconds is not None and time.monotonic() - self.started >= seconds

    def outcome(self) -> Outcome:
        grade = self.runner.grade(self.problem, self.chosen)
        if self.failed is not None:
            grade = Grade(0.0, None, f"failed: {self.failed}")
        return Outcome(self.problem, self.chosen, grade, self.tried, self.usage, self.failed)


class _ManyNode(Node):
    """``All`` (m is None) and ``First``."""

    def __init__(self, job: Job, path: tuple[int, ...], allowance: int | None, done: Done, request: All | First):
        super().__init__(job, path, allowance, done)
        self.m = request.m if isinstance(request, First) else None
        self.stops = None if isinstance(request, First) else request.stop
        self.last = len(request.items) - 1  # whoever stands after it has been stopped
        if self.m is not None and not 1 <= self.m <= len(request.items):
            raise ThriftyError(f"First needs 1 <= m <= {len(request.items)} items, got {self.m}")
        share = None if allowance is None or not request.items else allowance // len(request.items)
        self.answers: dict[int, Any] = {}
        self.failures: dict[int, RowFailed | OutOfBudget] = {}
        self.started = -1
        self.children = [
            _node(job, (*path, i), share, partial(self._child_done, i), item) for i, item in enumerate(request.items)
        ]

    def start(self) -> None:
        if not self.children:
            self.finish([])
        for i, child in enumerate(self.children):
            child.over = i > self.last  # one that ended at once may have stopped it
            if not child.over:
                child.start()
                self.started = i
        self._close()

    def _child_done(self, index: int, value: Any) -> None:
        self.cost = sum(child.cost for child in self.children)
        if isinstance(value, Failed):
            self.failures[index] = value.error
        elif value is not GONE:
            self.answers[index] = value
        if self.m is None:
            self._ended(index, value)
        else:
            self._raced(self.m)
        self._close()

    def _ended(self, index: int, value: Any) -> None:
        """Stop what an ``All`` no longer waits for."""
        failed = index in self.failures
        stops = index in self.answers and self.stops is not None and self.stops(index, value)
        if index > self.last or not (failed or (stops and index < self.last)):
            return
        self.last = index
        # Who stands before one that failed may still say that it was not wanted.
        begin = 0 if failed and self.stops is None else index + 1
        for child in self.children[begin : self.started + 1]:
            if not child.over:
                child.cap(0)

    def _raced(self, m: int) -> None:
        """Bound who can still win; whoever failed is out, and with fewer than ``m`` left nobody goes on."""
        best = sorted((self.children[i].cost, i) for i in self.answers)[:m]
        if len(best) == m:
            # Whoever may still win is cheaper than the m-th best so far: let the others run to there.
            bound, last = best[-1]
            for i, child in enumerate(self.children):
                if not child.over:
                    child.cap(bound if i > last else bound + 1)
        elif len(self.children) - len(self.failures) < m:
            self.last = -1
            for child in self.children[: self.started + 1]:
                if not child.over:
                    child.cap(0)

    def _close(self) -> None:
        """Answer once everything is over; it is lost where something was stopped from above."""
        if self.over or not all(child.over for child in self.children):
            return
        best = sorted((self.children[i].cost, i) for i in self.answers)[: self.m]
        short = self.m is not None and len(best) < self.m
        failed = [i for i in self.failures if (i <= self.last if self.m is None else short)]
        if failed:
            self.finish(Failed(self.failures[min(failed)]))
        elif self.m is not None:
            self.finish([(i, self.answers[i]) for _, i in best])
        elif any(i not in self.answers for i in range(self.last + 1)):
            self.finish(GONE)
        else:
            self.finish([self.answers[i] if i <= self.last else None for i in range(len(self.children))])

    def cap(self, tokens: int) -> None:
        rest = tokens - sum(child.cost for child in self.children if child.over)
        for child in self.children:
            if not child.over:
                child.cap(rest)
        if rest <= 0:
            self.finish(GONE)


class _TalkNode(Node):
    """A generator being talked with."""

    def __init__(self, job: Job, path: tuple[int, ...], allowance: int | None, done: Done, talk: Talk):
        super().__init__(job, path, allowance, done)
        self.talk = talk
        self.turn = 0
        self.current: Node | None = None
        self.bound: int | None = None

    def start(self) -> None:
        self._advance(None)

    def _advance(self, answer: Any, error: BaseException | None = None) -> None:
        while not self.over:
            try:
                request = self.talk.throw(error) if error is not None else self.talk.send(answer)
            except StopIteration as stop:
                self.finish(stop.value)
                return
            except OutOfBudget:
                self.finish(None)
                return
            except RowFailed as failed:
                self.finish(Failed(failed))
                return
            except Exception as fault:
                fault.add_note(f"in the strategy for problem {self.job.problem.id!r}, request path {self.path}")
                raise
            answer, error = None, None
            if isinstance(request, Emit):
                self.job.emit(request.text)
            elif isinstance(request, Call):
                answer = request.tool(request.text)
            else:
                try:
                    self.job.check()
                    if self.allowance is not None and self.allowance < max(1, _least(request)):
                        raise OutOfBudget(f"{self.allowance} tokens are left, too few for a token per row")
                except OutOfBudget as spent:
                    error = spent
                    continue
                self.current = _node(self.job, (*self.path, self.turn), self.allowance, self._answered, request)
                self.turn += 1
                self.current.start()
                return

    def _answered(self, answer: Any) -> None:
        assert self.current is not None
        spent, self.current = self.current.cost, None
        self.cost += spent
        if self.allowance is not None:
            self.allowance -= spent
        if self.bound is not None and self.cost >= self.bound:
            self.stop()
        elif isinstance(answer, Failed):
            self._advance(None, answer.error)
        else:
            self._advance(answer)

    def cap(self, tokens: int) -> None:
        self.bound = tokens
        if tokens - self.cost <= 0:
            self.stop()
        elif self.current is not None:
            self.current.cap(tokens - self.cost)

    def stop(self) -> None:
        if self.over:
            return
        self.over = True
        try:
            self.talk.close()
        finally:  # a strategy that fails even here leaves no rows behind
            current, self.current = self.current, None
            if current is not None:
                current.over = True  # its rows still come back to be counted, but nobody listens
                current.cap(0)
            self.done(GONE)


def _least(item: Any) -> int:
    """Tokens below which an even share leaves some row with none: it could ask for ever without spending anything."""
    if isinstance(item, Sample):
        return item.n
    if isinstance(item, All | First):
        return len(item.items) * max(map(_least, item.items), default=0)
    return 0 if isinstance(item, Score | Hidden) else 1


def _node(job: Job, path: tuple[int, ...], allowance: int | None, done: Done, item: Any) -> Node:
    if isinstance(item, Sample):
        return SampleNode(job, path, allowance, done, item)
    if isinstance(item, Score | Hidden):
        return ScoreNode(job, path, allowance, done, item)
    if isinstance(item, All | First):
        return _ManyNode(job, path, allowance, done, item)
    if hasattr(item, "send") and hasattr(item, "throw"):
        return _TalkNode(job, path, allowance, done, item)
    raise TypeError(
        f"a strategy yielded {type(item).__name__}; yield Sample, Score, Hidden, Call, All, First or Emit, "
        "and use `yield from` for a sub-strategy"
    )
