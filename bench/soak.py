"""64 clients ask the gateway for ten minutes while one request in twenty is spoilt: nothing lost, twice, or left open.

    .venv/bin/python bench/soak.py [--minutes 10] [--clients 64] [--faults 0.05]

A paced server (``_paced.py``), before it a proxy that spoils (``tests/faulty_proxy.py``), before that ``thrifty serve
--upstream``: server and gateway in processes of their own. Each request carries an id that comes back in every event;
three in four are streams, and one in eight is a vote among 3, whose rows the gateway asks again by itself. A request
that fails in a way that its client can tell is asked again. Exit code 1 unless all of this holds:

- every request is answered; no answer is short, repeats a token or has another's, but for what the proxy repeats;
- a plain request reaches the upstream once per attempt, and no more attempts fail than the proxy has spoilt;
- the gateway's memory at the end is at most 5 % more than after the warm-up minute;
- no stream is open at the end: at the upstream, at the proxy, in the gateway; and its log tells of no fault of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil

from _paced import ANSWER, MODEL, Client, Process, draw, get, paced, percentile, serve

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faulty_proxy import Answer, Bytewise, Cut, Endless, Fault, FaultyProxy, HalfJSON, Stall

TOKENS = (20, 60)
"""Of the shortest and the longest chain."""
FAULTS: tuple[Fault, ...] = (
    Answer(status=503), Answer(status=429, headers=(("Retry-After", "1"),)), Answer(status=200, kind="text/html"),
    Cut(), Cut(after=5), Cut(after=5, clean=True), HalfJSON(after=5), HalfJSON(), Stall(after=5), Endless(after=5),
    Bytewise(size=7),
)  # fmt: skip
SILENCE, WHOLE = 10.0, 120.0
"""Seconds after which a client leaves: without an event, and without the whole of a vote."""
GROWTH = 0.05


class Soak:
    def __init__(self, options: argparse.Namespace, gateway: Process, proxy: FaultyProxy) -> None:
        self.options, self.gateway, self.proxy = options, gateway, proxy
        self.rng = random.Random(0)
        self.spoilt: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        """By prompt, of plain requests."""
        self.ends: Counter[tuple[str, str]] = Counter()
        """How attempts ended, by kind of request."""
        self.asked = self.answered = 0
        self.seconds: list[float] = []
        self.memory: list[tuple[float, int]] = []

    async def run(self) -> None:
        began = time.monotonic()
        until = began + 60 * self.options.minutes
        watch = asyncio.create_task(self.watch(began))
        await asyncio.gather(*(self.client(number, until) for number in range(self.options.clients)))
        self.proxy.forgive()
        await asyncio.sleep(1)
        watch.cancel()
        self.memory.append((time.monotonic() - began, self.rss()))

    async def watch(self, began: float) -> None:
        while True:
            self.memory.append((time.monotonic() - began, self.rss()))
            self.proxy.exchanges.clear()  # it keeps every event, for tests
            await asyncio.sleep(2)

    def rss(self) -> int:
        return int(psutil.Process(self.gateway.pid).memory_info().rss)

    async def client(self, number: int, until: float) -> None:
        client, turn = Client(self.gateway.port), 0
        await asyncio.sleep(2 * number / self.options.clients)
        while time.monotonic() < until:
            kind = "vote" if (turn + number) % 8 == 0 else "whole" if (turn + number) % 4 == 1 else "stream"
            await self.request(client, f"s{number}-{turn}", kind)
            turn += 1
        client.close()

    async def request(self, client: Client, name: str, kind: str) -> None:
        prompt = f"Soak id:{name} asks for itself. Put it into \\boxed{{}}."
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
        if kind == "vote":
            body |= {"model": f"{MODEL}:majority@3", "max_tokens": 600}
        elif kind == "stream":
            body["stream"] = True
        self.asked += 1
        began = time.monotonic()
        for attempt in range(20):
            for _ in range(3 if kind == "vote" else 1):
                if self.rng.random() < self.options.faults:
                    fault = self.rng.choice(FAULTS)
                    self.spoilt[type(fault).__name__] += 1
                    self.proxy.spoil(fault)
            if kind != "vote":
                self.attempts[prompt] += 1
            try:
                end = await self.attempt(client, name, prompt, kind, body)
            except TimeoutError:
                end = "silence"
            except (OSError, EOFError, ValueError):  # of a status line or a chunk, too
                end = "broken off"
            if end != "answered":
                client.close()
            self.ends[kind, end] += 1
            if end == "answered":
                self.answered += 1
                self.seconds.append(time.monotonic() - began)
                return
            await asyncio.sleep(min(2.0, 0.1 * 2**attempt))

    async def attempt(self, client: Client, name: str, prompt: str, kind: str, body: dict[str, Any]) -> str:
        """How it ended. "short" is an answer that says that it is whole and is not."""
        words: list[str] = []
        done = False
        patience = SILENCE if kind == "stream" else WHOLE if kind == "vote" else SILENCE + 10
        async with asyncio.timeout(patience) as timer, aclosing(client.chat(body)) as events:
            async for _, status, data in events:
                timer.reschedule(asyncio.get_running_loop().time() + patience)
                if status != 200:
                    return f"status {status}"
                if kind != "stream":
                    try:
                        return self.whole(json.loads(data), name, prompt, kind)
                    except (ValueError, LookupError):
                        return "no JSON of the API"
                if data == "[DONE]":
                    done = True
                    continue
                told = json.loads(data)
                if "error" in told:
                    return "error event"
                if told["id"] != name:
                    return "another's"
                if at := told.get("paced"):
                    if at["at"] != len(words):
                        return "repeated" if at["at"] < len(words) else "token lost"
                    words += told["choices"][0]["delta"].values()
        if not done:
            return "broken off"
        return "answered" if "".join(words) == self.expected("".join(words), name, prompt) else "short"

    def whole(self, data: dict[str, Any], name: str, prompt: str, kind: str) -> str:
        """How an answer in one piece ended; LookupError where it has not the API's shape."""
        said = data["choices"][0]["message"]
        if kind == "vote":
            return "answered" if f"\\boxed{{{name}}}" in said["content"] else "short"
        if data["id"] != name:
            return "another's"
        text = (said["reasoning_content"] or "") + said["content"]
        return "answered" if text == self.expected(text, name, prompt) else "short"

    @staticmethod
    def expected(text: str, name: str, prompt: str) -> str:
        """The whole answer of which ``text`` shows the first word."""
        known = re.match(r" c(\d+)\b", text)
        if known is None:
            return ""
        length, _ = draw(prompt, int(known[1]), *TOKENS)
        chain = [f" c{known[1]}", *(f" w{i % 97}" for i in range(length - 1))]
        return "".join([*chain, *ANSWER, f" \\boxed{{{name}}}"])

    # Verdict ---------------------------------------------------------------------------------------------

    def growth(self) -> tuple[float, float, float]:
        """Megabytes after the warm-up and at the end, and what came to it; medians over a tenth of the time."""
        length = self.memory[-1][0]
        warm = min(60.0, length / 4)
        first = [rss for at, rss in self.memory if warm <= at <= warm + length / 10]
        last = [rss for at, rss in self.memory if at >= 0.9 * length]
        before, after = statistics.median(first) / 2**20, statistics.median(last) / 2**20
        return before, after, after / before - 1

    def report(self, upstream: Process) -> bool:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            server, inside = get(f"{upstream.url}/stats"), get(f"{self.gateway.url}/healthz")["running"]
            if not (server["open"] or self.proxy.upstream_open or inside):
                break
            time.sleep(0.2)
        asked = get(f"{upstream.url}/asked")
        print(f"{self.asked:,} requests; half of them took under {statistics.median(self.seconds):.1f} s, 95 % under "
              f"{percentile(self.seconds, 0.95):.1f} s; {server['requests']:,} at the upstream, "
              f"{server['tokens']:,} tokens")  # fmt: skip
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.spoilt.items()))
        print(f"spoilt: {sum(self.spoilt.values()):,} ({kinds})")
        for kind in ("stream", "whole", "vote"):
            ends = ", ".join(f"{end} {n:,}" for (k, end), n in sorted(self.ends.items()) if k == kind)
            print(f"  {kind:<7} {ends}")
        bad = Counter[str]()
        for (kind, end), n in self.ends.items():
            bad[end] += n
            bad["failed"] += n if end != "answered" and kind != "vote" else 0
        twice = sum(asked.get(prompt, 0) > n for prompt, n in self.attempts.items())
        before, after, growth = self.growth()
        faults = self.gateway.said().count("Traceback")
        wrong = bad["short"] + bad["another's"] + bad["token lost"]
        checks = {
            f"lost: {self.asked - self.answered}": self.answered == self.asked,
            f"short or another's: {wrong}": not wrong,
            f"answers that repeat a token: {bad['repeated']}, {self.spoilt['Endless']} by the proxy":
                bad["repeated"] <= self.spoilt["Endless"],
            f"plain requests that the upstream got more often than they were sent: {twice}": not twice,
            f"attempts that failed, votes apart: {bad['failed']}": bad["failed"] <= sum(self.spoilt.values()),
            f"memory of the gateway: {before:.1f} MB, then {after:.1f} MB ({growth:+.1%})": growth <= GROWTH,
            f"open streams at the end: {server['open']} at the upstream, {self.proxy.upstream_open} at the proxy, "
            f"{inside} in the gateway": not (server["open"] or self.proxy.upstream_open or inside),
            f"faults of its own in the gateway's log: {faults}": not faults,
        }  # fmt: skip
        for text, holds in checks.items():
            print(f"{'holds ' if holds else 'FAILS '} {text}")
        return all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--faults", type=float, default=0.05, help="share of requests to spoil")
    parser.add_argument("--pace", type=float, default=0.05, help="the upstream's seconds per token")
    options = parser.parse_args()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # the proxy writes to clients that have left
    with paced(options.pace, 0.1, tokens=TOKENS) as upstream, FaultyProxy(upstream.url) as proxy, \
            serve("--upstream", proxy.url, "--max-concurrency", "256") as gateway:  # fmt: skip
        soak = Soak(options, gateway, proxy)
        asyncio.run(soak.run())
        well = soak.report(upstream)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
