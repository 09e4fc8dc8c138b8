"""Start-up: wall time of `import thrifty` (limit 0.2 s) and `thrifty list` (0.5 s), each in ten fresh processes.

    .venv/bin/python bench/startup.py [--methods N]

`--methods N` adds N copies of a method in ./methods of a temporary folder: the cost once all papers are built.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {"import thrifty": 0.2, "thrifty list": 0.5, "thrifty list --json": 0.5}
COMMANDS = {
    "import thrifty": [sys.executable, "-c", "import thrifty"],
    "thrifty list": [str(Path(sys.executable).with_name("thrifty")), "list"],
    "thrifty list --json": [str(Path(sys.executable).with_name("thrifty")), "list", "--json"],
}


def seconds(command: list[str], folder: str, repeats: int = 10) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return times


def add_methods(folder: str, n: int) -> None:
    import thrifty

    text = (Path(thrifty.__file__).parent / "solve" / "search" / "short_m_at_k.py").read_text("utf-8")
    target = Path(folder, "methods", "solve.search")
    target.mkdir(parents=True)
    for i in range(n):
        (target / f"copy_{i}.py").write_text(text.replace('key="short-m-at-k"', f'key="copy-{i}"'), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=int, default=0)
    arguments = parser.parse_args()
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        add_methods(folder, arguments.methods)
        for name, command in COMMANDS.items():
            times = seconds(command, folder)
            slow += statistics.median(times) > LIMITS[name]
            print(f"{name:20} best {min(times):.3f} s  median {statistics.median(times):.3f} s  limit {LIMITS[name]} s")
    return slow


if __name__ == "__main__":
    sys.exit(main())
