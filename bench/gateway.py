"""What the pass-through gateway adds: first token, every token, CPU; beside the same upstream asked directly.

    .venv/bin/python bench/gateway.py [--streams 32] [--rounds 4] [--requests 6]

``thrifty serve --upstream`` stands before a paced server (``_paced.py``), each in a process of its own; this one asks,
directly and through the gateway in turn (A B B A). Requests come one after the other on ``--streams`` connections whose
beginnings are spread over a request's length; and, apart, all at the same moment, where each waits for those before
it. Every token carries the moment at which the upstream wrote it: its delay is told without subtracting two runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter

import psutil

from _paced import MODEL, Client, Process, paced, percentile, serve

TARGET = 0.005
"""Seconds that the gateway may add to the median time to the first token."""


@dataclass
class Arm:
    """Seconds to first tokens, delays of tokens; CPU seconds of the gateway."""

    first: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    """The median time to the first token of each round."""
    cpu: float = 0.0


async def ask(client: Client, number: int, tokens: int, arm: Arm) -> None:
    body = {
        "model": MODEL, "stream": True, "max_tokens": tokens,
        "messages": [{"role": "user", "content": f"Bench id:b{number} asks for words. " * 8}],
    }  # fmt: skip
    seen = 0
    async with aclosing(client.chat(body)) as events:
        async for seconds, status, data in events:
            now = perf_counter()
            if status != 200:
                raise SystemExit(f"status {status}: {data[:300]}")
            if data.startswith("{") and (told := json.loads(data).get("paced")):
                if not seen:
                    arm.first.append(seconds)
                arm.delays.append(now - told["sent"])
                seen += 1
    assert seen == tokens, f"{seen} of {tokens} tokens came"


async def streams(port: int, number: int, requests: int, tokens: int, spread: float, arm: Arm) -> None:
    """``requests`` on each of ``number`` connections, which begin within ``spread`` seconds."""

    async def one(place: int, client: Client) -> None:
        for turn in range(requests):
            await asyncio.sleep(spread * place / number if turn == 0 else 0)
            await ask(client, turn * number + place, tokens, arm)

    clients = [Client(port) for _ in range(number)]
    for at in range(0, number, 8):  # connections stand before the clock runs
        await asyncio.gather(*(ask(client, 0, 2, Arm()) for client in clients[at : at + 8]))
    await asyncio.gather(*(one(place, client) for place, client in enumerate(clients)))
    for client in clients:
        client.close()


def measure(places: dict[str, int], gateway: Process, options: argparse.Namespace, at_once: bool) -> dict[str, Arm]:
    arms = {name: Arm() for name in places}
    cpu = psutil.Process(gateway.pid).cpu_times
    length = options.first + options.pace * options.tokens
    for turn in range(options.rounds):
        for name in list(places)[:: 1 if turn % 2 == 0 else -1]:
            arm, before, known = arms[name], cpu(), len(arms[name].first)
            spread = 0.0 if at_once else length
            requests = 1 if at_once else options.requests
            work = streams(places[name], options.streams, requests, options.tokens, spread, arm)
            asyncio.run(work)
            after = cpu()
            arm.cpu += after.user + after.system - before.user - before.system
            arm.rounds.append(statistics.median(arm.first[known:]))
    return arms


def show(title: str, arms: dict[str, Arm]) -> float:
    """Print both arms; the added median time to the first token."""
    print(f"\n{title}\narm       requests  first token: median     p95   token delay: median    mean     p95  (ms)")
    for name, arm in arms.items():
        figures = [statistics.median(arm.first), percentile(arm.first, 0.95), statistics.median(arm.delays),
                   statistics.mean(arm.delays), percentile(arm.delays, 0.95)]  # fmt: skip
        a, b, c, d, e = (1e3 * figure for figure in figures)
        print(f"{name:<9} {len(arm.first):8} {a:20.2f} {b:7.2f} {c:21.3f} {d:7.3f} {e:7.3f}")
    plain, ours = arms["direct"], arms["gateway"]
    added = statistics.median(ours.first) - statistics.median(plain.first)
    late = percentile(ours.first, 0.95) - percentile(plain.first, 0.95)
    each = statistics.mean(ours.delays) - statistics.mean(plain.delays)
    rounds = ", ".join(f"{1e3 * (b - a):.2f}" for a, b in zip(plain.rounds, ours.rounds))
    print(f"added to the first token: median {1e3 * added:.2f} ms (by round {rounds}), p95 {1e3 * late:.2f} ms")
    print(f"added to a token: {1e3 * each:.3f} ms in the mean")
    print(f"gateway: {1e6 * ours.cpu / len(ours.delays):.0f} us of CPU per token, "
          f"{1e3 * ours.cpu / len(ours.first):.1f} ms per request")  # fmt: skip
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32, help="at once")
    parser.add_argument("--requests", type=int, default=6, help="of each connection in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100, help="of a request")
    parser.add_argument("--pace", type=float, default=0.03, help="the upstream's seconds per token")
    parser.add_argument("--first", type=float, default=0.1, help="the upstream's seconds to the first token")
    options = parser.parse_args()
    chain = (options.tokens, options.tokens + 1)
    with paced(options.pace, options.first, tokens=chain) as upstream, \
            serve("--upstream", f"{upstream.url}/v1", "--max-concurrency", "256") as gateway:  # fmt: skip
        places = {"direct": upstream.port, "gateway": gateway.port}
        print(f"{options.streams} streams of {options.tokens} tokens, one per {1e3 * options.pace:g} ms, "
              f"the first after {1e3 * options.first:g} ms")  # fmt: skip
        added = show("beginnings spread", measure(places, gateway, options, False))
        show("all at once", measure(places, gateway, options, True))
    verdict = "reached" if added < TARGET else "missed"
    print(f"\nadded median time to the first token {1e3 * added:.2f} ms, target {1e3 * TARGET:g}: {verdict}")


if __name__ == "__main__":
    main()
