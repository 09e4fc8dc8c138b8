"""A/A: how often does a comparison of a student with itself hold? On real samples, where ``coverage.py`` simulates.

    .venv/bin/python bench/aa.py [--n 150] [--samples 12] [--runs 400]

Every problem is answered ``--samples`` times by each of three students; a run draws two different answers of every
problem by chance and tests one arm against the other, as a claim does. "at 5 %": one-sided tests of accuracy and of
tokens that hold at that level (nominal 5 %; the bound is 8 %); "as registered": by the rule of claims.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from thrifty import assets
from thrifty.assets.evaluate import Pass, outcomes
from thrifty.claims import judge
from thrifty.evidence import Part
from thrifty.models.load import load
from thrifty.tasks import embedded

PARTS = (
    Part("accuracy", "superior", smallest=0.05),
    Part("tokens", "superior", better="lower", on="log ratio", smallest=0.05),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=150, help="problems per student")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--runs", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = embedded.task("roll")
    problems = task.problems("dev", arguments.n)
    strata = [np.array([p.level for p in problems])] * 3
    values = {part.name: np.zeros((3, arguments.n, arguments.samples)) for part in PARTS}
    for s, name in enumerate(("long", "long-1", "long-2")):
        loaded = load(str(assets.find(name)))
        for i in range(arguments.samples):
            found = outcomes(loaded, task, problems, Pass(), seed=i)
            values["accuracy"][s, :, i] = [o.grade.right for o in found]
            values["tokens"][s, :, i] = [-np.log(max(1, o.usage.generated)) for o in found]
        print(f"{name}: {values['accuracy'][s].mean():.1%} right, {arguments.samples} answers each", flush=True)
    rng = np.random.default_rng(0)
    held = {part.name: [0, 0] for part in PARTS}
    for _ in range(arguments.runs):
        order = rng.random((3, arguments.n, arguments.samples)).argsort(axis=-1)[..., :2]
        for part in PARTS:
            new, old = np.moveaxis(np.take_along_axis(values[part.name], order, axis=-1), -1, 0)
            result = judge(part, "student", list(new - old), strata)
            held[part.name][0] += result.effect.p <= 0.05
            held[part.name][1] += result.held
    for name, (nominal, registered) in held.items():
        shares = f"{nominal / arguments.runs:.1%} hold at 5 %, {registered / arguments.runs:.1%} as registered"
        print(f"{name}: of {arguments.runs} runs {shares}")


if __name__ == "__main__":
    main()
