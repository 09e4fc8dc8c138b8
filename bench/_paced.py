"""A server of ours for benches: it speaks as vLLM does and writes one token every ``--pace`` seconds.

    python bench/_paced.py --port 8000 --pace 0.02 --first 0.05 --slots 64

Run in a process of its own (``Paced``), with nothing but the standard library, so that what is measured is what stands
before it. At most ``--slots`` streams run at once, the others wait, as on a server whose batch is full. Answers are
drawn from the prompt and from how often it was asked before (``POST /reset`` forgets that), so whoever asks a prompt k
times gets the same k answers. A prompt may name an id ("id:abc"), which comes back in every event and as the answer.
``GET /stats`` is the server's own count, ``/asked`` how often each prompt was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLOSE = "</think>"
MODEL = "paced"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Loopback is never reached through a proxy."""
ANSWER = (" So", " the", " answer", " is")


def draw(prompt: str, k: int, least: int, most: int) -> tuple[int, str]:
    """(words of the chain, answer) of the ``k``-th time that ``prompt`` is asked; lengths are log-uniform."""
    rng = random.Random(f"{prompt}|{k}")
    length = round(math.exp(rng.uniform(math.log(least), math.log(most))))
    if named := re.search(r"\bid:(\S+)", prompt):
        return length, named[1]
    return length, gold(prompt) if rng.random() < 0.6 else str(rng.randrange(1000, 1005))


def gold(prompt: str) -> str:
    """The right answer to a prompt without an id; six in ten are."""
    return str(random.Random(prompt).randrange(1000))


class Server:
    """Counts are of tokens written, closing tags too."""

    def __init__(self, pace: float, first: float, slots: int, least: int, most: int) -> None:
        self.pace, self.first, self.least, self.most = pace, first, least, most
        self.slots = asyncio.Semaphore(slots)
        self.asked: Counter[str] = Counter()
        self.counts = dict.fromkeys(("requests", "open", "prompt_tokens", "tokens", "whole", "left"), 0)

    async def client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
                head = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
                body = await reader.readexactly(int(head.get("content-length", 0)))
                path = lines[0].split()[1]
                if path.endswith("/completions"):
                    await self.complete(json.loads(body), reader, writer)
                elif path.endswith("/models"):
                    _reply(writer, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
                elif path == "/asked":
                    _reply(writer, self.asked)
                else:
                    if path == "/reset":
                        self.asked.clear()
                    _reply(writer, self.counts)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def complete(self, ask: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["requests"] += 1
        self.counts["open"] += 1
        try:
            async with self.slots:
                whole = await self.write(ask, reader, writer)
            self.counts["whole" if whole else "left"] += 1
        except ConnectionError:
            self.counts["left"] += 1
            raise
        finally:
            self.counts["open"] -= 1

    async def write(self, ask: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Write the answer at its pace; False where the client went before its end."""
        messages = ask.get("messages") or [{"role": "user", "content": ask["prompt"]}]
        prompt = next(turn["content"] for turn in messages if turn["role"] == "user")
        tokens, stop = self.tokens(ask, messages, prompt)
        name, stream = named[1] if (named := re.search(r"\bid:(\S+)", prompt)) else "none", bool(ask.get("stream"))
        read = sum(len(turn["content"].split()) for turn in messages)
        self.counts["prompt_tokens"] += read
        base = {"id": name, "model": ask["model"], "created": 0}
        if stream:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            base["object"] = "chat.completion.chunk"
        due = time.perf_counter() + self.first
        shown = 0
        for field, text in tokens:
            await asyncio.sleep(due - time.perf_counter())
            due += self.pace
            if reader.at_eof() or writer.is_closing():
                return False
            self.counts["tokens"] += 1
            if stream and text:
                choice = {"index": 0, "delta": {field: text}, "finish_reason": None, "stop_reason": None}
                told = {"at": shown, "sent": time.perf_counter()}
                shown += 1
                _event(writer, base | {"choices": [choice], "paced": told})
                await writer.drain()
        limited = len(tokens) == _most(ask)
        last = {"index": 0, "finish_reason": "length" if limited else "stop", "stop_reason": stop}
        usage = {"prompt_tokens": read, "completion_tokens": len(tokens), "total_tokens": read + len(tokens)}
        if not stream:
            message = {
                field: "".join(text for key, text in tokens if key == field)
                for field in ("reasoning_content", "content")
            }
            message["role"] = "assistant"
            _reply(writer, base | {"choices": [last | {"message": message}], "usage": usage})
            return True
        _event(writer, base | {"choices": [last | {"delta": {}}]})
        if (ask.get("stream_options") or {}).get("include_usage"):
            _event(writer, base | {"choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
        _chunk(writer, b"")
        return True

    def tokens(
        self, ask: dict[str, Any], messages: list[dict[str, Any]], prompt: str
    ) -> tuple[list[tuple[str, str]], str | None]:
        """(field, text) of every token, and the stop string that ended them: the closing tag is the only one known.

        A last turn of the assistant's is continued: its chain says which answer it was, and how far that had come.
        """
        before = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        if before:
            known = re.search(r"\bc(\d+)\b", before)
            k = int(known[1]) if known else 0
        else:
            k = self.asked[prompt]
            self.asked[prompt] += 1
        length, answer = draw(prompt, k, self.least, self.most)
        words = [f" c{k}", *(f" w{i % 97}" for i in range(length - 1))]
        done = len(words) if CLOSE in before else len(before.removeprefix("<think>").split())
        chain = [("reasoning_content", word) for word in words[done:]]
        if CLOSE not in before:
            chain.append(("reasoning_content", ""))  # the tag is a token too, which a reasoning parser takes out
        stops = ask.get("stop") or ()
        stop = CLOSE if CLOSE in ([stops] if isinstance(stops, str) else stops) and CLOSE not in before else None
        ends = [] if stop else [("content", word) for word in (*ANSWER, f" \\boxed{{{answer}}}")]
        every = [*chain, *ends]
        most = _most(ask)
        return every[:most], stop if most is None or len(every) <= most else None


def _most(ask: dict[str, Any]) -> int | None:
    return ask.get("max_completion_tokens") or ask.get("max_tokens")


def _reply(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode())
    writer.write(body)


def _event(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


# Its users ------------------------------------------------------------------------------------------------


def get(url: str) -> Any:
    """JSON, or text, of a GET; OSError where nobody answers."""
    with DIRECT.open(url, timeout=30) as reply:
        content = reply.read().decode()
    return json.loads(content) if content[:1] in "{[" else content


class Process:
    """A server on loopback in a process of its own. ``url`` has no path."""

    def __init__(self, command: list[str], port: int, health: str) -> None:
        self.url, self.port = f"http://127.0.0.1:{port}", port
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.errors)
        self.pid = self.process.pid
        until = time.monotonic() + 600
        while True:
            try:
                get(self.url + health)
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.end()
                    raise SystemExit(f"{' '.join(command)} did not start ({error})\n{self.said()[-2000:]}") from None
                time.sleep(0.1)

    def said(self) -> str:
        """What it wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read()

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def paced(pace: float, first: float, slots: int = 1 << 20, tokens: tuple[int, int] = (20, 200)) -> Iterator[Process]:
    """The paced server; ``get(url + "/stats")`` are its counts."""
    port = free_port()
    options = {"pace": pace, "first": first, "slots": slots, "least": tokens[0], "most": tokens[1], "port": port}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
    server = Process(command, port, "/stats")
    try:
        yield server
    finally:
        server.end()


@contextmanager
def serve(*options: str) -> Iterator[Process]:
    """``thrifty serve`` with these options, on a free port."""
    port = free_port()
    thrifty = str(Path(sys.executable).with_name("thrifty"))
    server = Process([thrifty, "serve", *options, f"--port={port}"], port, "/healthz")
    try:
        yield server
    finally:
        server.end()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Client:
    """One connection that is kept alive, as a client's pool does, at as little cost as can be."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def chat(self, body: dict[str, Any]) -> AsyncGenerator[tuple[float, int, str]]:
        """(seconds since the request, status, data) of each event; an answer that is no stream comes as one.

        ConnectionError or EOFError where the answer breaks off. Closing the generator early closes the connection.
        """
        content, whole = json.dumps(body).encode(), False
        try:
            if self.open is None:
                self.open = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.open
            began = time.perf_counter()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(content), content)
            )
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
            status = int(lines[0].split()[1])
            head = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
            if "content-length" in head:
                data = await reader.readexactly(int(head["content-length"]))
                whole = True
                yield time.perf_counter() - began, status, data.decode()
                return
            rest = b""
            while size := int(await reader.readline(), 16):
                rest += await reader.readexactly(size)
                await reader.readline()
                *events, rest = rest.split(b"\n\n")
                for event in events:
                    if event.startswith(b"data:"):
                        yield time.perf_counter() - began, status, event[5:].decode().strip()
            await reader.readline()
            whole = True
        finally:
            if not whole:
                self.close()

    def close(self) -> None:
        if self.open is not None:
            self.open[1].transport.abort()
            self.open = None


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _main(port: int, **options: Any) -> None:
    server = await asyncio.start_server(Server(**options).client, "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pace", type=float, default=0.02, help="seconds per token")
    parser.add_argument("--first", type=float, default=0.05, help="seconds to the first token")
    parser.add_argument("--slots", type=int, default=1 << 20, help="streams at once")
    parser.add_argument("--least", type=int, default=20, help="tokens of the shortest chain")
    parser.add_argument("--most", type=int, default=200, help="tokens of the longest chain")
    parser.add_argument("--port", type=int, help="without it nothing is served: this is no bench")
    options = parser.parse_args()
    if options.port is not None:
        asyncio.run(_main(**vars(options)))
