"""A run folder with seeded synthetic outcomes, made through the real records, summaries and store.

``python tests/example_run.py FOLDER [N]`` writes one and its report: what the report is looked at with. The figures
mean nothing; their shape (longer chains on harder levels, a dial, re-checks that sometimes repair) is a real run's.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thrifty.contracts import Grade, Outcome, Problem, Trace, Usage
from thrifty.measure import summarise
from thrifty.traces.store import rows_from, write

STEPS = {1: 3, 2: 5, 3: 8, 4: 12}
SETTINGS: tuple[tuple[str, float | None, float, int, float], ...] = (
    # name, alpha, share of steps re-checked, operations per line, slips per line
    ("long", 0.0, 1.0, 1, 0.012),
    ("valve 0.25", 0.25, 0.8, 1, 0.011),
    ("valve 0.5", 0.5, 0.45, 1, 0.009),
    ("valve 0.75", 0.75, 0.2, 2, 0.003),
    ("valve 1", 1.0, 0.06, 2, 0.02),
    ("valve 1.25", 1.25, 0.0, 3, 0.045),
    ("short", None, 0.0, 4, 0.13),
)
NOISE = (0.04, 0.02, 2.5)


def problems(n: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    made = []
    for i in range(n):
        if i % 5 == 4:
            terms = [rng.randint(10, 99) for _ in range(3 + i % 3)]
            made.append(
                Problem(f"chain_sum-{i}", f"What is {' + '.join(map(str, terms))}?", str(sum(terms)), "rg:chain_sum")
            )
            continue
        level = 1 + i % 4
        operations = [(rng.choice("+-*"), rng.randint(1, 9)) for _ in range(STEPS[level])]
        value = start = rng.randint(0, 9)
        for operator, operand in operations:
            value = apply(value, operator, operand)
        prompt = (
            f"start {start} " + " ".join(f"{chr(97 + k)} {o} {x}" for k, (o, x) in enumerate(operations)) + " mod 10 ?"
        )
        made.append(Problem(f"roll-{i}", prompt, str(value), "roll", level, {"start": start, "operations": operations}))
    return made


def apply(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10


def roll_chain(problem: Problem, checks: float, merge: int, slip: float, rng: random.Random) -> tuple[str, str]:
    operations, value, lines = problem.meta["operations"], problem.meta["start"], []
    for k in range(0, len(operations), merge):
        part = operations[k : k + merge]
        true = value
        for operator, operand in part:
            true = apply(true, operator, operand)
        said = rng.choice([d for d in range(10) if d != true]) if rng.random() < slip else true
        work = " ".join(f"{operator} {operand}" for operator, operand in part)
        lines.append(f"{chr(97 + k)} {value} {work} = {said} .")
        if rng.random() < checks:
            steps, at = [], value
            for operator, operand in part:
                steps.append(f"{at} {operator} {operand} = {apply(at, operator, operand)} ;")
                at = apply(at, operator, operand)
            lines.append(f"| {' '.join(steps)} {'ok' if said == true else f'no {true}'} .")
            said = true if rng.random() < 0.9 else said
        value = said
    lines += [f"so {value} ."] * rng.choice([0, 1, 1, 2] if checks > 0.3 else [0, 1])
    return " ".join(lines), str(value)


def sum_chain(problem: Problem, checks: float, merge: int, slip: float, rng: random.Random) -> tuple[str, str]:
    terms = [int(w.rstrip("?")) for w in problem.prompt.split() if w.rstrip("?").isdigit()]
    total, lines = terms[0], ["Okay, I need to add these up one by one." if checks > 0.3 else "Add in order."]
    for term in terms[1:]:
        said = total + term + (rng.choice([-10, 10, 1]) if rng.random() < slip * merge else 0)
        lines.append(f"{total} + {term} = {said}.")
        if rng.random() < checks:
            lines.append(f"\n\nWait, let me double-check: {total} + {term} is {total + term}.\n\n")
            said = total + term
        total = said
    if rng.random() < checks * 0.7:
        lines.append(
            f"\n\nAlternatively, add the tens first: {sum(t // 10 * 10 for t in terms)} and then the ones.\n\n"
        )
    lines.append(f"So the answer is {total}.")
    return " ".join(lines).replace(" \n\n", "\n\n").replace("\n\n ", "\n\n"), str(total)


def outcomes(chosen: Sequence[Problem], checks: float, merge: int, slip: float, seed: int) -> list[Outcome]:
    made = []
    for problem in chosen:
        rng = random.Random(f"{seed} {problem.id} {checks}")
        thought, answer = (roll_chain if problem.task == "roll" else sum_chain)(problem, checks, merge, slip, rng)
        cut = rng.random() < 0.01
        tokens = len(thought.replace("\n", " ").split(" "))
        if cut:
            thought, answer = thought[: len(thought) // 2], ""
        usage = Usage(
            prompt=len(problem.prompt.split()), thought=tokens, answer=0 if cut else 2, calls=1, seconds=tokens / 900
        )
        trace = Trace(
            np.arange(tokens, dtype=np.int32),
            thought,
            answer,
            not cut,
            "length" if cut else "stop",
            usage=usage,
            problem=problem.id,
        )
        grade = Grade(float(answer == problem.answer), answer or None)
        made.append(Outcome(problem, trace, grade, [trace], usage))
    return made


def example_run(folder: Path, n: int = 500, seed: int = 0, extra: Sequence[Outcome] = ()) -> Path:
    """Write ``folder`` as a finished run leaves it; ``extra`` outcomes are added to every setting."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = problems(n, seed)
    runs = [
        (name, alpha, [*outcomes(chosen, checks, merge, slip, seed), *extra])
        for name, alpha, checks, merge, slip in SETTINGS
    ]
    result = {
        "recipe": "cot-valve",
        "model": "student-long-0",
        "task": "mixture",
        "n": len(runs[0][2]),
        "seed": seed,
        "settings": [summarise(done, name, alpha) for name, alpha, done in runs],
        "baseline": "long",
        "line": {"long": "long", "short": "short"},
        "verdicts": [
            {
                "setting": "valve 0.75",
                "saving": 0.61,
                "difference": -0.006,
                "difference_low": -0.022,
                "margin": 0.03,
                "non_inferior": True,
                "above_line": 0.264,
                "above_line_low": 0.231,
                "above_line_high": 0.296,
            },
            {
                "claim": "thinking tokens fall monotonically with α",
                "verdict": "shown",
                "detail": "six of six steps down",
            },
        ],
        "notes": ["Synthetic outcomes: only the shape is real."],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    write(folder / "traces.parquet", (row for name, alpha, done in runs for row in rows_from(done, name, alpha)))
    (folder / "config.yaml").write_text(
        f"recipe: cot-valve\nmodel: student-long-0\ntask: mixture\nn: {n}\nseed: {seed}\nrank: 8\n"
    )
    rng = np.random.default_rng(seed)
    for stage, floor in (("tune-direct", 0.35), ("tune-mixed", 0.28)):
        (folder / "stages" / stage).mkdir(parents=True, exist_ok=True)
        with (folder / "stages" / stage / "train.jsonl").open("w") as file:
            for step in range(1, 121):
                loss = floor + 1.4 * np.exp(-step / 25) + rng.normal(0, 0.03)
                file.write(json.dumps({"step": step, "loss": float(loss), "lr": 1e-3}) + "\n")
    for stage, shape in (("grpo", (0.9, 1.0, 70)), ("grpo-greedy", (0.15, 0.6, 12))):  # the second reward ruins it
        (folder / "stages" / stage).mkdir(parents=True, exist_ok=True)
        with (folder / "stages" / stage / "rollout.jsonl").open("w") as file:
            for step in range(1, 101 if stage == "grpo" else 61):
                moved = 1 - np.exp(-step / 25)
                figures = (a + (b - a) * moved + rng.normal(0, c) for a, b, c in zip((0.75, 0.95, 110), shape, NOISE))
                accuracy, completion, length = map(float, figures)
                line = {"step": step, "loss": 0.01, "accuracy": min(1, max(0, accuracy)), "length": length}
                file.write(json.dumps({**line, "completion": min(1, max(0, completion))}) + "\n")
    return folder


if __name__ == "__main__":
    from thrifty.report import write_report

    print(write_report(example_run(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500)))
