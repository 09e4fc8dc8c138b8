"""Answers on their way out: chain told from content, as a whole or piece by piece, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from thrifty.contracts import Trace
from thrifty.models.chat import ChatFormat
from thrifty.serve.backend import gone_away

FINISH = {"stop": "stop", "until": "stop", "length": "length", "context": "length", "cancelled": "length"}
DONE = b"data: [DONE]\n\n"
BEAT = b": working\n\n"
"""A comment, which clients skip: it keeps proxies from closing a stream in which nothing is to be said yet."""
BEAT_SECONDS = 10.0


def event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """``text`` up to its first stop string, and which one that was."""
    hits = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not hits:
        return text, None
    at, stop = min(hits)
    return text[:at], stop


def parts(trace: Trace, chat: bool, stops: Sequence[str], decode: Callable[[Any], str] | None) -> dict[str, Any]:
    """The text of a choice and why it ended: ``reasoning_content`` and ``content``, or ``text`` of raw completions."""

    def whole() -> str:
        return decode(trace.ids[trace.start :]) if decode is not None else trace.thought + trace.response

    if chat:
        content, stop = cut(trace.response, stops)
        found: dict[str, Any] = {"reasoning_content": trace.thought, "content": content}
        if stop is None and not trace.response:  # a stop string may stand in the chain
            found["reasoning_content"], stop = cut(trace.thought, stops)
        if stop is None and trace.finish == "until":  # the closing tag and white space at ends are in neither
            stop = cut(whole(), stops)[1]
    else:
        text, stop = cut(whole(), stops)
        found = {"text": text}
    ended = "stop" if stop is not None else FINISH[trace.finish]
    return {"parts": found, "finish_reason": ended, "stop_reason": stop}


class Detokenizer:
    """Token ids to text as they come; a character that is not whole yet waits for its other tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.ids, self.shown, self.done = decode, list[int](), 0, 0
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """All text so far."""
        self.ids += ids
        # Decoded with the tokens before them, since a tokenizer may write a space between two.
        before = self.decode(self.ids[self.done : self.shown])
        after = self.decode(self.ids[self.done :])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            self.text += after[len(before) :]
            self.done, self.shown = self.shown, len(self.ids)
        return self.text


class Splitter:
    """Tells chain from content in a text that grows. What may yet turn out a tag, a stop string or white space at an
    end is held back; what was sent is exactly the beginning of what ``parts`` says in the end.

    Save where a chain turns out one only as it closes, for want of an opening tag: what was sent as content remains
    that, and the response follows it behind ``GAP``.
    """

    GAP = "\n\n"

    def __init__(self, format: ChatFormat | None, stops: Sequence[str]) -> None:
        self.format, self.stops = format, stops
        self.sent: dict[str, str] = {}

    def push(self, text: str) -> list[tuple[str, str]]:
        """Pieces to send now: (field, text)."""
        return [piece for name, safe in self._safe(text) if (piece := self._new(name, safe))]

    def end(self, final: Mapping[str, str]) -> list[tuple[str, str]]:
        """What is still to be sent, of the whole text of each field."""
        if self._begun and final.get("reasoning_content"):
            final = {"content": f"{final['reasoning_content']}{self.GAP}{final['content']}"}
        return [piece for name, whole in final.items() if (piece := self._new(name, whole))]

    @property
    def _begun(self) -> bool:
        """Whether content was sent, and no chain before it."""
        return bool(self.sent.get("content")) and not self.sent.get("reasoning_content")

    def _new(self, name: str, text: str) -> tuple[str, str] | None:
        sent = self.sent.get(name, "")
        if len(text) <= len(sent) or not text.startswith(sent):
            return None
        self.sent[name] = text
        return name, text[len(sent) :]

    def _safe(self, text: str) -> list[tuple[str, str]]:
        chat = self.format
        if chat is None:
            return [("text", self._held(text, self.stops))]
        thought, closing, response = text.partition(chat.close)
        inside = thought.lstrip()
        if closing:
            thought = thought.replace(chat.open, "", 1).strip()
            response = self._held(response.lstrip(), self.stops).rstrip()
            if self._begun:
                return [("content", f"{thought}{self.GAP}{response}" if response else thought)]
            return [("reasoning_content", thought), ("content", response)]
        if chat.prefilled or inside.startswith(chat.open):
            held = self._held(thought.replace(chat.open, "", 1), [chat.close, chat.open, *self.stops])
            return [("reasoning_content", held.strip())]
        if chat.declared and chat.open.startswith(inside):
            return []
        return [("content", self._held(inside, [*self.stops, chat.close]).rstrip())]

    @staticmethod
    def _held(text: str, marks: Sequence[str]) -> str:
        """``text`` up to the first mark, or up to an end that may become one."""
        text, _ = cut(text, marks)
        for size in range(min(len(text), max(map(len, marks), default=1) - 1), 0, -1):
            if any(mark.startswith(text[-size:]) for mark in marks):
                return text[:-size]
        return text


class EventStream(Response):
    """Sends server-sent events; where the client goes, no more is sent and ``left`` is called.

    ``close`` ends what the events are made of. It is no affair of the generator's, which may never have begun.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        done: Callable[[], None],
        left: Callable[[], None],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
        status: int = 200,
    ) -> None:
        super().__init__(None, status, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self.events, self.done, self.left, self.close = events, done, left, close
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(gone_away(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.left()
        finally:
            for one in (work, gone):
                one.cancel()
            try:
                await asyncio.gather(work, gone, return_exceptions=True)
                await self.close()
            finally:
                self.done()
        fault = None if work.cancelled() else work.exception()
        if fault is not None and not isinstance(fault, OSError):  # a client that is gone is no fault
            raise fault

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events) as events:
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
