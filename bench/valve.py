"""CoT-Valve at full size: every student seed, roll and a reasoning-gym task whose chains are not ours.

    .venv/bin/python bench/valve.py [--n 1500] [--tuning plain] [--tuning ++] ...
    .venv/bin/python bench/valve.py --tasks rg:string_splitting --samples 7
    .venv/bin/python bench/valve.py --tasks "rg:string_splitting?max_initial_machines=12"

Prints, per student and task, every strength with its saving, the one-sided 95 % bound of the accuracy difference to the
long student, and its height above the straight line; then all students together, by the rule of claims: non-inferior
where the bound of the mean lies above -3 points and every student's difference does.
With several samples per problem (for tasks with few problems) the trained valve answers each problem again by
``thrifty measure``; a problem counts once, with its mean.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.measure import stats
from thrifty.traces import store

WIDER = "rg:string_splitting?max_initial_machines=12"
LEARNT_ON = {"rg:string_splitting": WIDER}
"""Of a task: another, from whose training problems the valve learns. Equal problems are of the same split in both."""
OPTIONS = {"roll": ["--steps", "60"], WIDER: ["--train-n", "1300", "--steps", "600", "--rank", "16", "--lr", "1e-3"]}
"""Of what is learnt on: what was found on development problems; any other task has the defaults."""

MARGIN = 0.03
"""Accuracy that may be lost; the recipe's default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--models", default="long,long-1,long-2")
    parser.add_argument("--tasks", default="roll,rg:string_splitting")
    parser.add_argument("--tuning", action="append", choices=["plain", "++", "+p"])
    parser.add_argument("--runs", default="runs/valve")
    parser.add_argument("--samples", type=int, default=1, help="answers per problem")
    arguments = parser.parse_args()
    every: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    models = arguments.models.split(",")
    for tuning in arguments.tuning or ["plain"]:
        for task in arguments.tasks.split(","):
            for model in models:
                learnt_on = LEARNT_ON.get(task, task)
                folder = run(model, learnt_on, tuning, arguments.n, Path(arguments.runs))
                own = [folder] if learnt_on == task else []
                more = again(folder, model, task, arguments.n, arguments.samples - len(own))
                verdicts = pooled([*own, *more])
                print(f"\n{model} · {task} · {tuning}")
                print(
                    f"{'setting':>12} {'saved':>7} {'difference':>11} {'at least':>9} {'holds':>6} {'above line':>11}"
                )
                for v in verdicts:
                    above = v["above_line"]
                    print(f"{v['setting']:>12} {told(v)} {100 * above:+11.1f}", flush=True)
                    every[tuning, task, v["setting"]].append(v)
    print(f"\nall {len(models)} students, the least that one saves and stands above the line:")
    for (tuning, task, setting), found in every.items():
        if len(found) == len(models):
            effect = stats.problem_effect([v["gaps"] for v in found], [v["levels"] for v in found], -MARGIN)
            holds = effect.lower > -MARGIN and min(effect.units) > -MARGIN
            saving, above = (min(v[k] for v in found) for k in ("saving", "above_line"))
            v = {"saving": saving, "difference": effect.value, "difference_low": effect.lower, "non_inferior": holds}
            print(f"{task} · {tuning} · {setting:>9} {told(v)} {100 * above:+11.1f}")


def told(v: Mapping[str, Any]) -> str:
    return (
        f"{v['saving']:7.1%} {100 * v['difference']:+11.1f} {100 * v['difference_low']:+9.1f} {v['non_inferior']!s:>6}"
    )


def thrifty(command: str, name: str, runs: Path, *options: str) -> Path:
    """A command of thrifty that leaves a run folder, resumed where it was cut off; the folder."""
    name = re.sub("[:?=]", "-", name).replace("+", "p")
    words = [sys.executable, "-m", "thrifty.cli", *command.split(), "--runs", str(runs), "--name", name, "--json"]
    subprocess.run([*words, *options], check=True, stdout=subprocess.DEVNULL)
    return runs / name


def run(model: str, task: str, tuning: str, n: int, runs: Path) -> Path:
    """One run of the recipe."""
    options = ["--model", model, "--task", task, "--tuning", tuning, "--n", str(n)]
    return thrifty("run cot-valve", f"{model}-{task}-{tuning}-{n}", runs, *options, *OPTIONS.get(task, []))


def again(folder: Path, model: str, task: str, n: int, samples: int) -> Iterator[Path]:
    """Problems of the task answered ``samples`` times more: by the student as it is, where the valve saves the goal of
    60 %, and by the short student."""
    spent: Counter[float | None] = Counter()
    for row in store.read(folder / "traces.parquet"):
        spent[row.alpha] += row.thought_tokens
        if row.alpha is None:
            short = row.setting.partition("(")[2].rstrip(")")
    valve = ["--model", model, "--adapter", str(folder / "adapter")]
    for alpha, tokens in spent.items():
        if alpha == 0 or (alpha and tokens < 0.4 * spent[0.0]):
            valve += ["--alpha", str(alpha)]
    options = ["--task", task, "--n", str(n), "--seed"]
    for seed in map(str, range(1, samples + 1)):
        name = f"{folder.name}-{task}-{seed}"
        yield thrifty("measure", name, folder.parent, *options, seed, *valve)
        yield thrifty("measure", f"{name}-short", folder.parent, *options, seed, "--model", short)


def pooled(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Verdicts on several samples: right and thinking tokens per strength and problem, averaged over the samples."""
    cells: dict[float | None, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    strata: dict[str, str] = {}
    for folder in folders:
        for row in store.read(folder / "traces.parquet"):
            cells[row.alpha][row.problem].append((float(bool(row.right)), row.thought_tokens))
            strata[row.problem] = f"{row.task} {row.level}"
    problems, levels = list(strata), list(strata.values())
    most = max(len(of[problems[0]]) for of in cells.values())
    arms = {
        alpha: np.array([np.mean(of[p], axis=0) for p in problems]).T
        for alpha, of in cells.items()
        if len(of[problems[0]]) == most
    }
    long, short = arms.pop(0.0), arms.pop(None)
    found = []
    for alpha, (right, tokens) in sorted(arms.items(), key=lambda item: item[0] or 0):
        test = stats.non_inferior(right, long[0], MARGIN, levels)
        above = stats.above_line((right, tokens), tuple(long), tuple(short), levels)
        found.append(
            {
                "setting": f"α = {alpha:g}",
                "saving": 1 - tokens.sum() / long[1].sum(),
                "difference": test.difference,
                "difference_low": test.low,
                "non_inferior": test.holds,
                "above_line": above.value,
                "gaps": right - long[0],
                "levels": levels,
            }
        )
    print(f"\n{len(problems)} problems, {most} samples each")
    return found


if __name__ == "__main__":
    main()
