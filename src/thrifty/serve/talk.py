"""A strategy as one request wants it: its limits, dial and parser laid over every sample, its faults kept to itself.

One runner serves all requests, so what differs between them cannot be the runner's: the strategy's talk is overheard
and its requests are changed on the way. A fault in a strategy must not reach the runner either, where it would end
everybody's work: it is kept in the ``Record``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from thrifty.contracts import (
    END_OF_THOUGHT,
    All,
    Call,
    First,
    Hidden,
    OutOfBudget,
    Problem,
    Prompt,
    RowFailed,
    Sample,
    Score,
    Talk,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines.relay import relayed


@dataclass(eq=False)
class Record:
    """What happened inside one request."""

    fault: BaseException | None = None
    verifier: Usage = field(default_factory=Usage)
    """Of samples that were not answers to the request."""
    answers: list[Trace] = field(default_factory=list)
    """The last samples of the request's own prompt."""
    read: int = 0
    """Samples whose answer the parser found."""
    free: dict[bytes, tuple[int, bool]] = field(default_factory=dict)
    """Samples that nobody interfered with, by their ids: tokens, and whether they ran to their end."""
    closed: set[bytes] = field(default_factory=set)
    """Ids of responses whose chain has closed."""


@dataclass(frozen=True)
class Plain:
    """``n`` samples, the first of them chosen."""

    n: int = 1
    until: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    controls: tuple[Any, ...] = ()
    decoder: Any = None

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        traces = yield Sample(
            problem.prompt, self.n, until=self.until, temperature=self.temperature, top_p=self.top_p,
            controls=self.controls, decoder=self.decoder,
        )  # fmt: skip
        return traces[0]


@dataclass(frozen=True, eq=False)
class Served:
    """``strategy`` under one request's conditions. Token counts are of one response, from its beginning."""

    strategy: Any
    record: Record
    prompt: Prompt
    """What samples of the problem's own prompt are asked in its place: the whole conversation."""
    samples: int
    """The most samples at once."""
    tokens: int | None = None
    """New tokens of a response; None where nobody sets a limit."""
    reserve: int = 1
    """Of these, what is kept for the answer."""
    thinking: int | None = None
    """Tokens after which an open chain is closed by continuing it; None where a control does it, or nobody."""
    empty: str = ""
    """An empty chain, put before the answer where no thinking is wanted at all."""
    adapters: Mapping[str, float] = field(default_factory=dict)
    controls: tuple[Any, ...] = ()
    parse: Callable[[str], str | None] | None = None
    check: Callable[[Sample | Score | Hidden], None] = lambda request: None
    """Raises where the engine could not take a request."""
    rescue: bool = True
    """Whether a response that was cut while it thought is closed and answered."""

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        try:
            chosen = yield from self._drive(self.strategy.solve(problem, rng), problem)
            if self.record.fault is not None:
                return None
        except OutOfBudget:
            chosen = None
        except Exception as fault:
            self.record.fault = self.record.fault or fault
            return None
        try:
            return (yield from self._rescued(chosen, problem))
        except OutOfBudget:
            return chosen
        except Exception as fault:
            self.record.fault = fault
            return None

    def _rescued(self, chosen: Any, problem: Problem) -> Talk:
        """A response that was cut while it thought is closed and answered."""
        mine = self.record.answers
        last = chosen if isinstance(chosen, Trace) else mine[-1] if mine else None
        if last is None or last.closed or last.response or last.finish == "until" or not self.rescue or len(mine) > 1:
            return last
        ask = Sample(self.prompt, prefix=last.ids, inject=END_OF_THOUGHT, max_tokens=self.reserve + 8,
                     adapters=self.adapters)  # fmt: skip
        self.check(ask)
        [trace] = yield ask
        self.record.answers = [trace]
        return self._parsed(trace)

    def _drive(self, talk: Talk, problem: Problem) -> Talk:
        return relayed(talk, lambda request: self._ask(request, problem))

    def _ask(self, request: Any, problem: Problem) -> Talk:
        if isinstance(request, Sample):
            return (yield from self._sample(request, problem))
        if isinstance(request, Score | Hidden):
            request = replace(request, prompt=self._prompt(request.prompt, problem))
            self.check(request)
        elif isinstance(request, All | First):
            if isinstance(request, First) and not 1 <= request.m <= len(request.items):
                raise ThriftyError(f"First needs 1 <= m <= {len(request.items)} items, got {request.m}")
            request = replace(request, items=[self._guarded(item, problem) for item in request.items])
            if isinstance(request, All) and request.stop is not None:
                request = replace(request, stop=self._guarded_stop(request.stop))
        elif isinstance(request, Call):
            request = replace(request, tool=self._guarded_tool(request.tool))
        answer = yield request
        if self.record.fault is not None:
            raise self.record.fault
        return answer

    def _guarded(self, item: Any, problem: Problem) -> Talk:
        """A part of an ``All`` or ``First``; a fault in it is kept, and the whole ends at its next turn."""
        try:
            if hasattr(item, "send"):
                return (yield from self._drive(item, problem))
            return (yield from self._ask(item, problem))
        except (OutOfBudget, RowFailed):
            raise  # the runner knows what becomes of the whole
        except Exception as fault:
            self.record.fault = self.record.fault or fault
            return None

    def _guarded_stop(self, stop: Callable[[int, Any], bool]) -> Callable[[int, Any], bool]:
        def asked(index: int, answer: Any) -> bool:
            try:
                return self.record.fault is not None or stop(index, answer)
            except Exception as fault:
                self.record.fault = self.record.fault or fault
                return True

        return asked

    def _guarded_tool(self, tool: Callable[[str], str]) -> Callable[[str], str]:
        def called(text: str) -> str:
            try:
                return tool(text)
            except Exception as fault:
                self.record.fault = self.record.fault or fault
                return ""

        return called

    def _prompt(self, prompt: Prompt, problem: Problem) -> Prompt:
        return self.prompt if prompt == problem.prompt else prompt

    # Samples ---------------------------------------------------------------------------------------------

    def _sample(self, request: Sample, problem: Problem) -> Talk:
        own = request.prompt == problem.prompt
        free = not (request.inject or request.controls or request.patches or any(self.adapters.values()))
        free = free and own and (not len(request.prefix) or _key(request.prefix) in self.record.free)
        if not 1 <= request.n <= self.samples:
            raise ThriftyError(f"{request.n} samples at once are more than this gateway gives: {self.samples}")
        if request.first is not None and not 1 <= request.first <= request.n:
            raise ThriftyError(f"needs 1 <= m <= {request.n}, got {request.first}: of so many samples so many are kept")
        capped = False
        if own:
            asked = request.max_tokens
            request = self._fitted(request)
            capped = request.max_tokens is not None and (asked is None or request.max_tokens < asked)
        self.check(request)
        traces = yield request
        if self.record.fault is not None:
            raise self.record.fault
        if not own:
            self.record.verifier = sum((t.usage for t in traces), self.record.verifier)
            return traces
        if capped and self.thinking is not None:
            traces = yield from self._closed(request, traces)
        self.record.free.pop(_key(request.prefix), None)
        for trace in traces:
            if trace.closed:
                self.record.closed.add(_key(trace.ids))
            if free:
                forced = any(span.origin == "injected" for span in trace.spans)
                self.record.free[_key(trace.ids)] = len(trace.ids), trace.complete and not forced
        self.record.answers = [self._parsed(trace) for trace in traces]
        return list(self.record.answers)

    def _parsed(self, trace: Trace) -> Trace:
        if self.parse is None or not trace.complete:
            return trace
        answer = self.parse(trace.response)
        self.record.read += answer is not None
        return replace(trace, answer=answer)

    def _fitted(self, request: Sample) -> Sample:
        """``request`` of the conversation, with this request's dial and what room its limits leave."""
        have = len(request.prefix)
        most = request.max_tokens
        controls = request.controls if request.decoder is not None else (*request.controls, *self.controls)
        inject = request.inject
        if self.empty and not have and not inject:
            inject = self.empty
        if self.tokens is not None:
            room = self.tokens - have - (self.reserve if request.decoder is not None else 0)
            if room <= 0 and most != 0:
                raise OutOfBudget(f"the response has its {self.tokens} tokens")
            most = max(0, room) if most is None else min(most, max(0, room))
        open_chain = _key(request.prefix) not in self.record.closed and END_OF_THOUGHT not in inject
        if self.thinking is not None and open_chain and not self.empty:
            left = max(0, self.thinking - have)
            most = left if most is None else min(most, left)
        return replace(
            request, prompt=self.prompt, max_tokens=most, inject=inject, controls=controls,
            adapters=request.adapters or self.adapters,
        )  # fmt: skip

    def _closed(self, request: Sample, traces: list[Trace]) -> Talk:
        """Traces that reached the thinking limit, their chain closed and gone on with."""
        assert self.thinking is not None
        due = [i for i, t in enumerate(traces) if t.finish == "length" and len(t.ids) >= self.thinking]
        going = []
        for i in due:
            until_closed = END_OF_THOUGHT in request.until
            room = None if self.tokens is None else max(0, self.tokens - len(traces[i].ids))
            inject = "" if traces[i].closed else END_OF_THOUGHT
            ask = replace(request, n=1, first=None, prefix=traces[i].ids, inject=inject,
                          max_tokens=0 if until_closed and inject else room)  # fmt: skip
            self.check(ask)
            going.append(ask)
        if going:
            answers = yield All(going)
            if self.record.fault is not None:
                raise self.record.fault
            for i, [trace] in zip(due, answers):
                traces[i] = (
                    replace(trace, finish="until") if END_OF_THOUGHT in request.until and trace.closed else trace
                )
        return traces


def _key(ids: Any) -> bytes:
    """Of token ids, an engine's array or a strategy's list."""
    return np.asarray(ids, np.int32).tobytes()
