"""CoT-Valve at full size: every student seed, roll and a reasoning-gym task whose chains are not ours.

    .venv/bin/python bench/valve.py [--n 1500] [--tuning plain] [--tuning ++] ...

Prints, per student and task, every strength with its saving, the one-sided 95 % bound of the accuracy difference to the
long student, and its height above the straight line; then the setting that saves most and holds on all students.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--models", default="long,long-1,long-2")
    parser.add_argument("--tasks", default="roll,rg:string_splitting")
    parser.add_argument("--tuning", action="append", choices=["plain", "++", "+p"])
    parser.add_argument("--runs", default="runs/valve")
    arguments = parser.parse_args()
    held: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    models = arguments.models.split(",")
    for tuning in arguments.tuning or ["plain"]:
        for task in arguments.tasks.split(","):
            for model in models:
                verdicts = run(model, task, tuning, arguments.n, Path(arguments.runs))
                print(f"\n{model} · {task} · {tuning}")
                print(
                    f"{'setting':>12} {'saved':>7} {'difference':>11} {'at least':>9} {'holds':>6} {'above line':>11}"
                )
                for v in verdicts:
                    above = f"{100 * v['above_line']:+.1f}" if "above_line" in v else "-"
                    print(
                        f"{v['setting']:>12} {v['saving']:7.1%} {100 * v['difference']:+11.1f} "
                        f"{100 * v['difference_low']:+9.1f} {v['non_inferior']!s:>6} {above:>11}",
                        flush=True,
                    )
                    if v["non_inferior"] and v.get("above_line", 0) > 0:
                        held[tuning, task, v["setting"]].append(v["saving"])
    print("\nnon-inferior at 3 points and above the line on every student, by what they save at least:")
    for (tuning, task, setting), savings in sorted(held.items(), key=lambda item: -min(item[1])):
        if len(savings) == len(models):
            print(f"  {task} · {tuning} · {setting}: {min(savings):.1%}")


def run(model: str, task: str, tuning: str, n: int, runs: Path) -> list[dict[str, float]]:
    """One run of the recipe, resumed where it was cut off; its verdicts."""
    name = f"{model}-{task}-{tuning}-{n}".replace(":", "-").replace("+", "p")
    command = [sys.executable, "-m", "thrifty.cli", "run", "cot-valve", "--model", model, "--task", task]
    command += ["--tuning", tuning, "--n", str(n), "--runs", str(runs), "--name", name, "--json"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    verdicts: list[dict[str, float]] = json.loads(result.stdout)["verdicts"]
    return verdicts


if __name__ == "__main__":
    main()
