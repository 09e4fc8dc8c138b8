"""CoT-Valve at full size: every student seed, roll and a reasoning-gym task whose chains are not ours.

    .venv/bin/python bench/valve.py [--n 1500] [--tuning plain] [--tuning ++] ...
    .venv/bin/python bench/valve.py --tasks rg:string_splitting --alphas 1 --seeds 1,2,3,4,5,6

Prints, per student and task, every strength with its saving, the one-sided 95 % bound of the accuracy difference to the
long student, and its height above the straight line; then the setting that saves most and holds on all students.
With several seeds (of training, sampling and, where the task has enough of them, problems) the runs are pooled: a
problem counts once, with its mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.measure import stats
from thrifty.traces import store

OPTIONS = {"roll": [], "rg:string_splitting": ["--steps", "200", "--rank", "16", "--lr", "1e-3"]}
"""Of a task: what was found on development problems (of roll: the defaults); any other task has the defaults too."""

MARGIN = 0.03
"""Accuracy that may be lost; the recipe's default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--models", default="long,long-1,long-2")
    parser.add_argument("--tasks", default=",".join(OPTIONS))
    parser.add_argument("--tuning", action="append", choices=["plain", "++", "+p"])
    parser.add_argument("--runs", default="runs/valve")
    parser.add_argument("--alphas", help="strengths, with commas (default: the recipe's)")
    parser.add_argument("--seeds", default="0", help="of the runs to pool, with commas")
    arguments = parser.parse_args()
    held: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    models = arguments.models.split(",")
    for tuning in arguments.tuning or ["plain"]:
        for task in arguments.tasks.split(","):
            for model in models:
                seeds = arguments.seeds.split(",")
                folders = [
                    run(model, task, tuning, arguments.n, Path(arguments.runs), seed, arguments.alphas)
                    for seed in seeds
                ]
                verdicts = pooled(folders) if len(folders) > 1 else result(folders[0])["verdicts"]
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


def run(model: str, task: str, tuning: str, n: int, runs: Path, seed: str, alphas: str | None) -> Path:
    """One run of the recipe, resumed where it was cut off; its folder."""
    name = f"{model}-{task}-{tuning}-{n}{f'-{alphas}' * bool(alphas)}-{seed}".replace(":", "-").replace("+", "p")
    command = [sys.executable, "-m", "thrifty.cli", "run", "cot-valve", "--model", model, "--task", task]
    command += ["--tuning", tuning, "--n", str(n), "--runs", str(runs), "--name", name, "--seed", seed, "--json"]
    command += ["--alphas", alphas, "--calibration-n", "0"] if alphas else []
    subprocess.run([*command, *OPTIONS.get(task, [])], check=True, stdout=subprocess.DEVNULL)
    return runs / name


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return found


def pooled(folders: list[Path]) -> list[dict[str, Any]]:
    """Verdicts over several runs: right and thinking tokens of every problem and setting, averaged over the runs."""
    cells: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    strata: dict[str, str] = {}
    for folder in folders:
        for row in store.read(folder / "traces.parquet"):
            cells[row.setting][row.problem].append((float(bool(row.right)), row.thought_tokens))
            strata[row.problem] = f"{row.task} {row.level}"
    problems, levels = list(strata), list(strata.values())
    arms = {name: np.array([np.mean(of[p], axis=0) for p in problems]).T for name, of in cells.items()}
    (long_name, long), *dialled, (_, short) = arms.items()
    found = []
    for name, (right, tokens) in dialled:
        test = stats.non_inferior(right, long[0], MARGIN, levels)
        above = stats.above_line((right, tokens), tuple(long), tuple(short), levels)
        found.append(
            {
                "setting": name,
                "saving": 1 - tokens.sum() / long[1].sum(),
                "difference": test.difference,
                "difference_low": test.low,
                "non_inferior": test.holds,
                "above_line": above.value,
            }
        )
    print(f"{long_name}: {len(problems)} problems, {len(folders)} runs")
    return found


if __name__ == "__main__":
    main()
