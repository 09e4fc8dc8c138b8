"""How long a task of a million rows takes to start, and what it adds to memory.

    python bench/million_rows.py [--rows 1000000] [--n 200]

Writes the file as JSONL, CSV and Parquet, then for each, in a fresh process: ``load`` and ``problems("test", n)``.
Prints seconds from the process's start to the problems, and the peak resident memory above a bare interpreter that
has imported ``thrifty.tasks``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CHILD = """
import sys
from thrifty import tasks
def peak():  # ru_maxrss would count the process that started this one
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
before = peak()
found = tasks.load("file:" + sys.argv[1]).problems("test", int(sys.argv[2]))
assert len(found) == int(sys.argv[2]), len(found)
print(peak() - before, peak())
"""


def rows(n: int) -> Iterator[tuple[str, str]]:
    """Word problems of GSM8K's shape and about its length."""
    rng = random.Random(0)
    for i in range(n):
        a, b = rng.randrange(1000), rng.randrange(1000)
        question = (
            f"Customer {i} buys {a} apples on Monday and {b} apples on Tuesday, eats none of them and gives none "
            "away. How many apples does the customer have on Wednesday morning?"
        )
        yield question, f"Monday and Tuesday together are {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"


def write(folder: Path, n: int) -> list[Path]:
    """The same rows as JSONL, CSV and Parquet."""
    import pyarrow
    from pyarrow import parquet

    paths = [folder / f"rows.{suffix}" for suffix in ("jsonl", "csv", "parquet")]
    with paths[0].open("w") as file:
        for question, answer in rows(n):
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(rows(n))
    questions, answers = zip(*rows(n))
    parquet.write_table(pyarrow.table({"question": questions, "answer": answers}), paths[2])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--n", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in write(Path(folder), args.rows):
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(path), str(args.n)], capture_output=True, text=True, check=True
            )
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            added, total = map(float, done.stdout.split())
            size = path.stat().st_size / 2**20
            print(
                f"{path.suffix[1:]:8} {args.rows:,} rows, {size:.0f} MB: {args.n} problems after {seconds:.1f} s "
                f"({cpu:.1f} s of a core), "
                f"{added:.0f} MB added, peak {total:.0f} MB"
            )


if __name__ == "__main__":
    main()
