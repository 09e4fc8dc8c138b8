"""A proxy on loopback that spoils what passes through it: between a real client and a real server, on request.

``with FaultyProxy("http://127.0.0.1:8000") as proxy: proxy.spoil(Cut(after=2))`` spoils the next request, and the one
after that passes. It runs on an event loop in a thread of its own and speaks just enough HTTP/1.1 for JSON in and JSON
or server-sent events out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Lets ``after`` events pass and then does nothing: the request passes unspoilt."""

    after: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer(Fault):
    """Answers in the server's place."""

    status: int = 503
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b'{"error": {"message": "spoilt"}}'
    kind: str = "application/json"


@dataclass(frozen=True, kw_only=True)
class Cut(Fault):
    """Ends the body: by a closed connection, or ``clean``, as if that was all."""

    clean: bool = False


@dataclass(frozen=True, kw_only=True)
class Stall(Fault):
    """Sends nothing more, until the client goes."""


@dataclass(frozen=True, kw_only=True)
class HalfJSON(Fault):
    """Sends the first half of an event, and ends as if that was all."""


@dataclass(frozen=True, kw_only=True)
class Endless(Fault):
    """Repeats the last event that passed, for ever."""


@dataclass(frozen=True, kw_only=True)
class Bytewise(Fault):
    """Sends ``size`` bytes at a time: characters come in parts."""

    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Rewrite(Fault):
    """Changes each event's JSON, and the request's."""

    event: Callable[[dict[str, Any]], dict[str, Any]] = lambda event: event
    request: Callable[[dict[str, Any]], dict[str, Any]] = lambda request: request


@dataclass
class Exchange:
    """One request as the proxy saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    events: list[str] = field(default_factory=list)
    """Data of the server's events, as it sent them."""
    left: bool = False
    """The client went before the end."""
    done: bool = False

    @property
    def usage(self) -> dict[str, Any] | None:
        found = [json.loads(e).get("usage") for e in self.events if e.startswith("{")]
        return next((usage for usage in found if usage), None)


class FaultyProxy:
    """``url`` is the base URL. ``always`` spoils what no ``spoil`` does; ``exchanges`` are all requests so far.

    ``open`` and ``upstream_open`` count the connections of clients, and to the server, that stand now.
    """

    def __init__(self, upstream: str, always: Fault | None = None) -> None:
        host, _, port = upstream.removeprefix("http://").partition("/")[0].partition(":")
        self.upstream, self.always = (host, int(port)), always
        self.exchanges: list[Exchange] = []
        self.most = 0
        self._queue: deque[Fault] = deque()
        self.open = self.upstream_open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        start = asyncio.start_server(self._client, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def spoil(self, *faults: Fault) -> None:
        """Spoil the next requests, one after the other."""
        self._queue.extend(faults)

    def forgive(self) -> None:
        """Drop what was to be spoilt and was not."""
        self._queue.clear()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        finally:
            self.open -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, headers = await _read_head(reader)
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        exchange = Exchange(first.split()[1], headers, json.loads(content or b"{}"))
        self.exchanges.append(exchange)
        fault = self._queue.popleft() if self._queue else self.always or Fault()
        if isinstance(fault, Answer):
            lines = [f"HTTP/1.1 {fault.status} Spoilt", f"content-type: {fault.kind}", "connection: close"]
            lines += [f"{name}: {value}" for name, value in fault.headers] + [f"content-length: {len(fault.body)}"]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + fault.body)
            await writer.drain()
            return
        if isinstance(fault, Rewrite):
            content = json.dumps(fault.request(exchange.body)).encode()
        gone = asyncio.ensure_future(reader.read(1))
        relay = asyncio.ensure_future(self._relay(fault, exchange, first, content, writer))
        await asyncio.wait({gone, relay}, return_when=asyncio.FIRST_COMPLETED)
        exchange.left = not relay.done()
        for task in (gone, relay):
            task.cancel()
        await asyncio.gather(gone, relay, return_exceptions=True)

    async def _relay(
        self, fault: Fault, exchange: Exchange, first: str, content: bytes, writer: asyncio.StreamWriter
    ) -> None:
        reader, up = await asyncio.open_connection(*self.upstream)
        self.upstream_open += 1
        try:
            head = f"{first}\r\nhost: {self.upstream[0]}\r\ncontent-type: application/json\r\n"
            up.write(f"{head}connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
            status, headers = await _read_head(reader)
            kind = headers.get("content-type", "")
            writer.write(f"{status}\r\ncontent-type: {kind}\r\nconnection: close\r\n".encode())
            writer.write(b"transfer-encoding: chunked\r\n\r\n")
            passed, last = 0, b""
            async for event in _events(_body(reader, headers)):
                data = event.removeprefix(b"data:").strip()
                exchange.events.append(data.decode())
                if isinstance(fault, Rewrite) and data.startswith(b"{") and event.startswith(b"data:"):
                    event = b"data: " + json.dumps(fault.event(json.loads(data)), ensure_ascii=False).encode() + b"\n\n"
                if passed >= fault.after and type(fault) in (Cut, Stall, HalfJSON, Endless):
                    return await self._break(fault, event, last, writer)
                size = fault.size if isinstance(fault, Bytewise) else len(event)
                for at in range(0, len(event), size):
                    await _chunk(writer, event[at : at + size])
                passed, last = passed + 1, event
            await _chunk(writer, b"")
            exchange.done = True
        finally:
            self.upstream_open -= 1
            up.close()
        return None

    async def _break(self, fault: Fault, event: bytes, last: bytes, writer: asyncio.StreamWriter) -> None:
        if isinstance(fault, Stall):
            await asyncio.Event().wait()
        elif isinstance(fault, Endless):
            while True:
                await _chunk(writer, last)
                await asyncio.sleep(0.002)
        elif isinstance(fault, HalfJSON):
            await _chunk(writer, event[: len(event) // 2])
            await _chunk(writer, b"")
        elif isinstance(fault, Cut) and fault.clean:
            await _chunk(writer, b"")
        else:
            writer.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines[1:] if line]
    return lines[0], {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> Any:
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _events(chunks: Any) -> Any:
    """Whole events; a body without any comes as one."""
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
    if rest:
        yield rest


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()
