"""An engine whose answers are written by a function: deterministic, instant, for tests of strategies.

Tokens are words. Rows advance in lockstep, a token a step, ``batch_size`` at a time, so that cancelling and
budgets behave as they do on a model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from thrifty.contracts import (
    END_OF_THOUGHT,
    Finish,
    Hidden,
    Prompt,
    RowFailed,
    Sample,
    Score,
    Scores,
    Span,
    Trace,
    Usage,
)
from thrifty.engines.capabilities import CAPABILITIES

CLOSE = "</think>"
FAILS = "<|fails|>"
"""A row whose script comes to a word that begins so fails there; what follows in the word names an outage."""
Script = Callable[[str, tuple[Hashable, ...]], str]
"""``script(prompt, key) -> the whole response``; ``key`` is (seed, problem id, *path, index)."""


class _Row:
    def __init__(self, ticket: int, request: Sample, prefix: list[int], injected: list[int], reply: list[int]):
        self.ticket, self.request, self.prefix, self.injected = ticket, request, prefix, injected
        self.reply, self.made = reply, 0
        self.limit: int | None = None


class ScriptedEngine:
    """``script`` writes whole responses; a prefix continues the script of the same key's response after it.

    A word ``FAILS`` in a response fails the row there; ``script`` and ``score`` may also raise ``RowFailed``.
    """

    name = "scripted"
    capabilities = CAPABILITIES["scripted"]

    def __init__(self, script: Script, score: Callable[[str, str], float] | None = None, batch_size: int = 64):
        self.script, self.score, self.batch_size = script, score, batch_size
        self.words: list[str] = []
        self.ids: dict[str, int] = {}
        self.rows: list[_Row] = []
        self.replies: list[tuple[int, Trace | Scores | RowFailed]] = []
        self.generated = 0

    def encode(self, text: str) -> list[int]:
        out = []
        for word in text.split():
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            out.append(self.ids[word])
        return out

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        assert not isinstance(request, Hidden), "refused by the runner: a script has no hidden states"
        prompt = request.prompt if isinstance(request.prompt, str) else "\n".join(m["content"] for m in request.prompt)
        if isinstance(request, Score):
            assert self.score is not None, "this scripted engine was given no score function"
            values = [self.score(prompt, text) for text in request.continuations]
            self.replies.append((ticket, Scores(values, Usage(prompt=len(prompt.split()), calls=1))))
            return
        injected = self.encode(request.inject.replace(END_OF_THOUGHT, CLOSE))
        self.rows.append(_Row(ticket, request, list(request.prefix), injected, self.encode(self.script(prompt, key))))

    def limit(self, ticket: int, tokens: int) -> None:
        for row in self.rows:
            if row.ticket == ticket:
                row.limit = tokens if row.limit is None else min(row.limit, tokens)

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        return "<think>", CLOSE

    def poll(self) -> list[tuple[int, Trace | Scores | RowFailed]]:
        for _ in range(16):
            if self.replies:
                break
            for row in self.rows[: self.batch_size]:
                self._step(row)
            self.rows = [row for row in self.rows if row.ticket >= 0]
        replies, self.replies = self.replies, []
        return replies

    def _step(self, row: _Row) -> None:
        if row.limit is not None and row.made >= row.limit:
            return self._end(row, "cancelled")
        if row.request.max_tokens is not None and row.made >= row.request.max_tokens:
            return self._end(row, "length")
        if row.made < len(row.reply):
            if (word := self.words[row.reply[row.made]]).startswith(FAILS):
                self._end(row, "cancelled")
                ticket, made = self.replies.pop()
                assert isinstance(made, Trace)
                failed = RowFailed("the script says that this row fails", word.removeprefix(FAILS), made)
                self.replies.append((ticket, failed))
                return None
            row.made += 1
            self.generated += 1
            word = self.words[row.reply[row.made - 1]]
            if any(word.endswith(stop.replace(END_OF_THOUGHT, CLOSE)) for stop in row.request.until):
                return self._end(row, "until")
        if row.made >= len(row.reply):
            return self._end(row, "stop")
        return None

    def _end(self, row: _Row, finish: Finish) -> None:
        head = row.prefix + row.injected
        ids = head + row.reply[: row.made]
        words = [self.words[i] for i in ids]
        closed = CLOSE in words
        cut = words.index(CLOSE) + 1 if closed else len(words)
        thought = max(0, min(cut, len(ids)) - len(head))
        start = len(row.prefix)
        turn = max(start, cut)
        prompt: Any = row.request.prompt
        trace = Trace(
            ids=np.array(ids, np.int32),
            thought=" ".join(words[: cut - 1] if closed else words),
            response=" ".join(words[cut:]),
            closed=closed,
            finish=finish,
            start=start,
            spans=tuple(s for s in (Span(start, cut, "thought"), Span(turn, len(ids), "answer")) if s.end > s.start),
            usage=Usage(
                prompt=len(str(prompt).split()),
                cached=len(row.prefix),
                thought=thought,
                answer=row.made - thought,
                injected=len(row.injected),
                calls=1,
            ),
        )
        self.replies.append((row.ticket, trace))
        row.ticket = -1
