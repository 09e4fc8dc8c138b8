"""A row of the endpoint engine: when its stream has said enough, and the trace that its reply amounts to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from thrifty.contracts import Finish, Sample, Span, Trace, Usage
from thrifty.engines._openai_stream import Channel, Reply, whole
from thrifty.engines._openai_text import UNKNOWN, Text

OVERRUN = 8
"""Deltas beyond the limit of new tokens after which a stream is cut: tokens seldom come in more pieces than one."""
DRIFT = (3, 0.05)
"""Tokens, and share, by which our count and the server's may differ: text can be written in other tokens."""


@dataclass
class Row:
    """One request under way. Touched on the event loop only, once it has started."""

    ticket: int
    request: Sample
    path: str
    body: dict[str, Any]
    text: Text
    echo: str
    """The user's last message where the server sends it back."""
    injected: np.ndarray
    before: str
    """Text of prefix and injection: the response so far."""
    stops: tuple[str, ...]
    sent: bool
    """The server was told the stop strings, and says or shows where it stopped."""
    closing: bool
    """One of the stop strings is the chain's closing tag."""
    cap: int | None
    full: Finish
    """How it ends there."""
    prompt_ids: np.ndarray | None = None
    limit: int | None = None
    cut: Finish | None = None
    """Why the stream was closed here."""
    entered: bool = False
    """Its task has begun: only then can it be cancelled and still answer."""
    started: float = 0.0
    reply: Reply | None = None
    failed: list[Reply] = field(default_factory=list)
    """Attempts that broke off with text: paid for, and lost."""
    count: int = 0
    """New tokens of the attempt, about."""
    hit: tuple[Channel, int] | None = None
    """Where a stop string ended: channel, and how many of its characters to keep."""
    _seen: int = 0
    _tail: dict[str, str] = field(default_factory=dict)
    _length: dict[str, int] = field(default_factory=dict)

    def begin(self) -> Reply:
        """A new attempt."""
        self.started = self.started or time.monotonic()
        if self.reply is not None and self.reply.parts:
            self.failed.append(self.reply)
        self.count, self._seen, self.hit, self.cut = 0, 0, None, None
        self._tail, self._length = {}, {}
        self.reply = Reply(self.echo)
        return self.reply

    def enough(self, reply: Reply) -> bool:
        """Whether what came is all that is wanted: a stop string that the server went past, a limit, a cap."""
        for channel, part in reply.parts[self._seen :]:
            self._seen += 1
            self.count += self.text.count(part)
            if self.hit is not None:  # it goes on behind the stop string
                self.cut = "until"
                return True
            self._find(channel, part)
        if self.hit is not None and not self.sent:
            self.cut = "until"
        elif self.limit is not None and self.count >= self.limit:
            self.cut = "cancelled"
        elif self.cap is not None and self._seen > self.cap + OVERRUN:
            self.cut = self.full
        return self.cut is not None

    def _find(self, channel: Channel, part: str) -> None:
        if not self.stops:
            return
        if self.closing and channel == "text" and self._length.get("thought"):
            self.hit = ("text", 0)
            return
        if channel == "thought" and "thought" not in self._length:  # what stood before the chain belongs to neither
            self._length, self._tail = {}, {}
        longest = max(map(len, self.stops))
        tail = (self._tail.get(channel, "") + part)[-(longest - 1 + len(part)) :]
        self._length[channel] = self._length.get(channel, 0) + len(part)
        ends = [tail.find(stop) + len(stop) for stop in self.stops if stop in tail]
        if ends:
            self.hit = (channel, self._length[channel] - len(tail) + min(ends))
        self._tail[channel] = tail

    def finish(self) -> Finish:
        """Why the row ended."""
        reply = self.reply
        if self.cut is not None or reply is None:
            return self.cut or "cancelled"
        if reply.finish == "length":
            return self.full
        if reply.stop is not None or self.hit is not None or self._closed_by_stop(reply):
            return "until"
        return "stop" if reply.finish in ("stop", "eos", "end_turn") else "cancelled"

    def _closed_by_stop(self, reply: Reply) -> bool:
        """A server that tells chains apart swallows the tag: a stop inside the chain is taken for the tag."""
        told = reply.names_stop or reply.finish != "stop"
        return self.sent and self.closing and reply.separated and not reply.text("text") and not told

    def closed_by(self, finish: Finish) -> bool:
        """The chain's closing tag ended the reply."""
        reply = self.reply
        if reply is None or finish != "until" or not self.closing:
            return False
        return reply.stop == self.text.chat.close or (self.hit or ("", -1))[1] == 0 or self._closed_by_stop(reply)


def build(row: Row, warn: Callable[[str, str], None]) -> Trace:
    """The trace of a row that has ended; ``warn(kind, text)`` hears where the server's counts and ours disagree."""
    text, reply, finish = row.text, row.reply or Reply(), row.finish()
    chat, separated = text.chat, reply.separated
    thoughts, texts = _kept(row, "thought"), _kept(row, "text")
    if finish == "stop":
        texts = _clipped(texts, len(text.trimmed("".join(texts))))
        thoughts = thoughts if texts else _clipped(thoughts, len(text.trimmed("".join(thoughts))))
    swallowed = finish == "until" and reply.stop and not "".join(texts or thoughts).endswith(reply.stop)
    if swallowed and not (separated and reply.stop == chat.close):
        (texts if texts or not separated else thoughts).append(str(reply.stop))
    if separated:
        closing = [chat.close] if texts or row.closed_by(finish) else []
        opening = [] if row.before or text.tokenizer is None or chat.prefilled else [chat.open + chat.before]
        parts = [*opening, *thoughts, *closing, *texts]
    else:
        parts = texts
    full = row.before + "".join(parts)
    # Cut before its closing tag, a chain whose opening tag the template wrote looks like a response.
    open_chain = separated or (row.closing and finish not in ("stop", "until"))
    thought, response, closed = (replace(chat, prefilled=True) if open_chain else chat).split(full)

    start = len(row.request.prefix)
    head = [*map(int, row.request.prefix), *map(int, row.injected)]
    held, chances = _tokens(row, parts, reply)
    new = [int(i) for ids in held for i in ids]
    ended = finish == "stop" and text.tokenizer is not None and not reply.logprobs
    new += [text.tokenizer.eos_token_id if text.tokenizer.eos_token_id is not None else UNKNOWN] if ended else []
    server = reply.count("completion_tokens") if row.cut is None or not reply.streamed else None
    more = max(0, (server or 0) - len(new))
    if server is not None and text.tokenizer is not None and abs(server - len(new)) > max(DRIFT[0], DRIFT[1] * server):
        warn("count", f"the server counted {server} new tokens where {len(new)} came back: it hides some, or its "
                      "tokenizer is another one than the engine was given")  # fmt: skip
    elif server is not None and len(new) > server + DRIFT[0]:
        warn("count", f"{len(new)} pieces came back for {server} tokens by the server's count: give a tokenizer")
    ids, cut = [*head, *new], 0
    if chat.close in full:
        cut = text.cut(ids)
    elif not closed:
        cut = len(ids)
    hidden = reply.count("reasoning_tokens", "completion_tokens_details") or 0
    late = 1 if finish == "stop" and text.tokenizer is None and more else 0  # end of sequence is never spelt out
    early = more - late if cut > len(head) or hidden else 0
    ids = [*head, *[UNKNOWN] * early, *new, *[UNKNOWN] * (more - early)]
    cut += early if cut > len(head) else 0
    if not cut and hidden:
        cut = len(head) + min(early, hidden)

    usage = _usage(row, reply, finish, cut - len(head), len(ids) - len(head))
    trace = Trace(
        ids=text.pieces.keep(np.array(ids, np.int32)), thought=thought, response=response, closed=closed,
        finish=finish, start=start, spans=_spans(start, len(head), cut, len(ids)), usage=usage,
        prompt_ids=row.prompt_ids,
    )  # fmt: skip
    if "logprobs" in row.request.want:
        told = np.full(len(ids) - start, np.nan, np.float32)
        at = len(row.injected) + early
        told[at : at + len(chances)] = chances[: len(told) - at]
        trace = replace(trace, logprobs=told)
    return trace


def lost(row: Row, warn: Callable[[str, str], None], refused: bool) -> Trace:
    """The trace of a row that failed: what had come. Nobody knows what the server did beyond, unless it ``refused``."""
    if row.reply is not None and (row.reply.parts or row.failed):
        row.cut, row.reply.streamed = "cancelled", True
        return build(row, warn)
    seconds = time.monotonic() - row.started if row.started else 0.0
    usage = Usage(calls=1, seconds=seconds, partial=int(not refused))
    nothing = np.zeros(0, np.int32)
    return Trace(nothing, "", "", False, "cancelled", usage=usage, prompt_ids=row.prompt_ids)


def _kept(row: Row, channel: Channel) -> list[str]:
    """A channel's deltas, up to the stop string where the stream was cut for it."""
    reply = row.reply or Reply()
    joined = reply.text(channel)
    first = next((i for i, (name, _) in enumerate(reply.parts) if name == "thought"), 0)
    parts = [part for name, part in reply.parts[first:] if name == channel]
    if joined != "".join(parts):  # a character came in halves
        parts = [joined]
    if row.cut == "until" and row.hit is not None and row.hit[0] == channel:
        return _clipped(parts, row.hit[1])
    return parts


def _clipped(parts: Sequence[str], length: int) -> list[str]:
    """The first ``length`` characters of ``parts``."""
    kept: list[str] = []
    for part in parts:
        if length <= 0:
            break
        kept.append(part[:length])
        length -= len(part)
    return kept


def _tokens(row: Row, parts: list[str], reply: Reply) -> tuple[list[np.ndarray], list[float]]:
    """Ids of the new tokens, in parts, and their log-probabilities where they are wanted and told."""
    if "logprobs" not in row.request.want or not reply.logprobs:
        return [row.text.encode(parts)], []
    ids = []
    for _, token, _ in reply.logprobs:
        found = row.text.encode([whole(token)])
        ids.append(found if len(found) == 1 else row.text.pieces.name([whole(token)]))
    return ids, [chance for _, _, chance in reply.logprobs]


def _usage(row: Row, reply: Reply, finish: Finish, inside: int, new: int) -> Usage:
    if row.reply is None:  # stopped before it was asked
        return Usage()
    thought = min(max(0, inside), new)
    lost = sum(row.text.count(part) for one in row.failed for _, part in one.parts)
    read = reply.count("prompt_tokens")
    if read is None:
        read = 0 if row.prompt_ids is None else len(row.prompt_ids)
    cached = min(read, reply.count("cached_tokens", "prompt_tokens_details") or 0)
    cut = row.cut is not None and reply.streamed
    unknown = cut or reply.count("completion_tokens") is None or reply.count("prompt_tokens") is None
    return Usage(
        prompt=read - cached,
        cached=cached,
        thought=thought + lost,
        answer=new - thought,
        injected=len(row.injected),
        discarded=lost + (new if finish == "cancelled" else 0),
        calls=1 + len(row.failed),
        seconds=time.monotonic() - row.started,
        partial=int(unknown) + len(row.failed),
    )


def _spans(start: int, head: int, cut: int, end: int) -> tuple[Span, ...]:
    edges = sorted({start, head, end, min(max(cut, start), end)})
    return tuple(
        Span(a, b, "thought" if a < cut else "answer", "injected" if a < head else "sampled")
        for a, b in pairwise(edges)
    )
