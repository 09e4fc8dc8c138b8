"""Votes among 8 samples over an endpoint: our runner beside its_hub, each at its best concurrency, on one paced server.

    .venv/bin/python bench/endpoint.py --peer-python /path/of/a/venv/bin/python [--problems 256] [--slots 256]

The server (``_paced.py``) writes a token per ``--pace`` seconds on ``--slots`` streams at most (vLLM's default for
``max_num_seqs`` is 256) and gives everybody the same samples of a problem. First both sides answer a part of the
problems at several concurrencies (rows at once); then all of them at the best one, in turn. ``tokens`` is the server's
own count, ``usage`` what each side reports. The peer runs in its own environment, where ``pip install 'its_hub[lm]'``
was said; its pool opens 100 connections at most, whatever it is asked for. short-3@8 has no counterpart there: it
stands beside their vote among 8.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from _paced import MODEL, Process, get, gold, paced

K = 8
TARGET = 1.5


def questions(n: int, seed: int) -> list[str]:
    return [f"Question {i} of set {seed}: which number is it? Put it into \\boxed{{}}." for i in range(n)]


def boxed(text: str) -> str:
    found = re.findall(r"\\boxed\{([^}]*)\}", text)
    return found[-1] if found else ""


@dataclass
class Told:
    """Of one run: seconds, what was reported, and the server's own count."""

    seconds: float
    right: float
    completion_tokens: int
    prompt_tokens: int
    partial: int = 0
    """Rows whose reported count is a lower bound."""
    server_tokens: int = 0
    server_prompt_tokens: int = 0


def ours(url: str, prompts: list[str], strategy: str, rows: int) -> Told:
    from thrifty.contracts import Grade, Problem
    from thrifty.engines.openai import OpenAIEngine
    from thrifty.engines.runner import Runner
    from thrifty.solve.search.self_consistency import SelfConsistency
    from thrifty.solve.search.short_m_at_k import ShortMAtK

    class Boxed:
        name, levels = MODEL, (1,)

        def problems(self, split: str, n: int, seed: int = 0, levels: Any = None) -> list[Problem]:
            return [Problem(str(i), p, gold(p)) for i, p in enumerate(prompts)]

        def parse(self, response: str) -> str | None:
            return boxed(response) or None

        def grade(self, problem: Problem, response: str) -> Grade:
            return Grade(float(boxed(response) == problem.answer), boxed(response))

    task = Boxed()
    engine = OpenAIEngine(f"{url}/v1", MODEL, concurrency=rows)  # probes the server: once per process
    get_reset(url)
    before = get(f"{url}/stats")
    began = time.perf_counter()
    method: Any = ShortMAtK(m=3, k=K) if strategy.startswith("short") else SelfConsistency(k=K)
    outcomes = Runner(engine, task).solve(method, task.problems("test", len(prompts)))
    seconds = time.perf_counter() - began
    engine.close()
    usage = [o.usage for o in outcomes]
    told = Told(
        seconds, statistics.mean(o.grade.right for o in outcomes), sum(u.generated for u in usage),
        sum(u.prompt + u.cached for u in usage), sum(u.partial for u in usage),
    )  # fmt: skip
    return counted(told, url, before)


def theirs(url: str, prompts: list[str], rows: int, python: str) -> Told:
    get_reset(url)
    before = get(f"{url}/stats")
    ask = json.dumps({"url": url, "prompts": prompts, "rows": rows})
    done = subprocess.run([python, __file__, "--as-peer"], input=ask, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"its_hub failed:\n{done.stderr[-3000:]}")
    return counted(Told(**json.loads(done.stdout.splitlines()[-1])), url, before)


def counted(told: Told, url: str, before: dict[str, int]) -> Told:
    """With the server's own count, once all its streams are closed."""
    until = time.monotonic() + 10
    while (now := get(f"{url}/stats"))["open"] and time.monotonic() < until:
        time.sleep(0.05)
    told.server_tokens = now["tokens"] - before["tokens"]
    told.server_prompt_tokens = now["prompt_tokens"] - before["prompt_tokens"]
    return told


def get_reset(url: str) -> None:
    get(f"{url}/reset")


async def peer(url: str, prompts: list[str], rows: int) -> Told:
    """its_hub's own vote, in its own environment; ``rows / K`` problems at once."""
    from its_hub import LMOrchestrator, OpenAICompatibleLanguageModel, SelfConsistency  # type: ignore[import-not-found]

    model = OpenAICompatibleLanguageModel(f"{url}/v1", "none", MODEL, temperature=0.7)
    algorithm = SelfConsistency(boxed, orchestrator=LMOrchestrator(max_concurrency=-1))
    places = asyncio.Semaphore(max(1, rows // K))

    async def solve(prompt: str) -> Any:
        async with places:
            return await algorithm.ainfer(model, prompt, budget=K, return_response_only=False)

    began = time.perf_counter()
    found = await asyncio.gather(*map(solve, prompts))
    seconds = time.perf_counter() - began
    await model.close()
    right = statistics.mean(boxed(r.the_one["content"]) == gold(p) for r, p in zip(found, prompts))
    usage = [r.usage for r in found]
    return Told(
        seconds, right, sum(u.completion_tokens for u in usage), sum(u.prompt_tokens for u in usage)
    )  # fmt: skip


def installed(python: str | None) -> str:
    """The peer's version; "" where it is not there."""
    if python is None:
        return ""
    ask = "import importlib.metadata as m, its_hub; its_hub.OpenAICompatibleLanguageModel; print(m.version('its_hub'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip()


def row(name: str, rows: int, problems: int, told: Told, streams: int) -> str:
    off = told.completion_tokens / told.server_tokens - 1
    partial = f", {told.partial} of {streams} rows partial" if told.partial else ""
    return (
        f"{name:<18} {rows:5} rows  {told.seconds:7.1f} s  {problems / told.seconds:6.2f} problems/s  right "
        f"{told.right:.3f}  tokens {told.server_tokens:,}  usage {told.completion_tokens:,} ({off:+.2%}{partial})"
    )


def bench(server: Process, options: argparse.Namespace, version: str) -> None:
    python, url = options.peer_python, server.url
    sides = {"ours majority@8": lambda prompts, rows: ours(url, prompts, "majority", rows)}
    if version:
        sides["its_hub majority@8"] = lambda prompts, rows: theirs(url, prompts, rows, python)
    few = questions(max(1, options.problems // 4), 0)
    best: dict[str, int] = {}
    print(f"{len(few)} problems, to find the best concurrency")
    for name, run in sides.items():
        speed = {}
        for rows in options.rows:
            told = run(few, rows)
            speed[rows] = len(few) / told.seconds
            print("  " + row(name, rows, len(few), told, K * len(few)), flush=True)
        best[name] = max(speed, key=lambda rows: speed[rows])
    best["ours short-3@8"] = best["ours majority@8"]
    sides["ours short-3@8"] = lambda prompts, rows: ours(url, prompts, "short-3@8", rows)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    print(f"\nall {options.problems} problems x {K} samples")
    for turn in range(options.rounds):
        prompts = questions(options.problems, 1 + turn)
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            told = sides[name](prompts, best[name])
            seconds[name].append(told.seconds)
            print("  " + row(name, best[name], len(prompts), told, K * len(prompts)), flush=True)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    if not version:
        print("\nno peer was measured")
        return
    for name in ("ours majority@8", "ours short-3@8"):
        ratio = middle["its_hub majority@8"] / middle[name]
        verdict = "reached" if ratio >= TARGET else "missed"
        print(f"\n{name}: {ratio:.2f}x the throughput of its_hub {version}, target {TARGET}: {verdict}", end="")
    print()


def main() -> None:
    if sys.argv[1:] == ["--as-peer"]:
        told = asyncio.run(peer(**json.load(sys.stdin)))
        print(json.dumps(vars(told)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="of an environment with its_hub[lm]; without it the peer is skipped")
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 256, 512], help="concurrencies to try")
    parser.add_argument("--slots", type=int, default=256, help="the server's streams at once")
    parser.add_argument("--pace", type=float, default=0.05, help="the server's seconds per token")
    parser.add_argument("--first", type=float, default=0.1, help="the server's seconds to the first token")
    options = parser.parse_args()
    version = installed(options.peer_python)
    if version:
        print(f"beside its_hub {version}")
    else:
        print("PEER SKIPPED: its_hub is not installed there. python -m venv V; V/bin/pip install 'its_hub[lm]'; then "
              "--peer-python V/bin/python")  # fmt: skip
    with paced(options.pace, options.first, options.slots) as server:
        bench(server, options, version)


if __name__ == "__main__":
    main()
