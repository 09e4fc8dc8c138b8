"""250,000 traces, made here: check, drop repeats, keep a tenth and write; beside ``datasets`` doing the same.

    .venv/bin/python bench/traces.py [--n 250000]

Each way runs in a process of its own; printed are its seconds and the most memory that it held.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thrifty.traces.store import TraceRow, write


def make(path: Path, n: int) -> None:
    """Traces of about 60 words; one in ten repeats another one's chain."""
    rng = random.Random(0)

    def rows() -> Iterator[TraceRow]:
        for i in range(n):
            at = i if rng.random() > 0.1 else rng.randrange(max(1, i))
            words = random.Random(at).choices("abcdefghij0123456789+-*=.|", k=60)
            yield TraceRow(
                "made", None, f"made/{i}", "made", 1, f"made {at}", "4", 0, True, " ".join(words), " 4", "4", True,
                True, "stop", 9, 0, 60, 2, 0, 0.1,
            )  # fmt: skip

    write(path, rows())


def ours(path: Path, out: Path) -> int:
    from thrifty.traces import shards

    check = shards.Check()
    kept = shards.sampled(0.1, 0)(shards.unique(check(shards.stream([path]))))
    written = shards.write(out, kept)
    assert not check.faults
    return written


def theirs(path: Path, out: Path) -> int:
    import hashlib

    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(out.parent / "cache"))
    seen: set[bytes] = set()

    def key(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = zip(batch["prompt"], batch["thought"], batch["response"])
        found = [hashlib.blake2b(repr(t).encode(), digest_size=8).digest() for t in texts]
        valid = [
            min(counts) >= 0 and end in ("stop", "until", "length", "cancelled", "context")
            for *counts, end in zip(batch["prompt_tokens"], batch["thought_tokens"], batch["finish"])
        ]
        return {"key": found, "valid": valid}

    def new(keys: list[bytes]) -> list[bool]:
        kept = []
        for k in keys:
            kept.append(k not in seen and int.from_bytes(k, "big") < 0.1 * 2**64)
            seen.add(k)
        return kept

    rows = rows.map(key, batched=True)
    assert all(rows["valid"])
    rows = rows.filter(new, batched=True, input_columns="key")
    rows.remove_columns(["key", "valid"]).to_parquet(str(out))
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=250_000)
    parser.add_argument("--way", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            written = {"ours": ours, "theirs": theirs}[arguments.way](arguments.path, Path(folder) / "out.parquet")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{arguments.way:7} {time.perf_counter() - began:6.1f} s  {memory:6.0f} MB  {written:,} written")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.parquet"
        make(path, arguments.n)
        print(f"{arguments.n:,} traces, {path.stat().st_size / 2**20:.0f} MB")
        for way in ("ours", "theirs"):
            subprocess.run([sys.executable, __file__, "--way", way, "--path", str(path)], check=True)


if __name__ == "__main__":
    main()
