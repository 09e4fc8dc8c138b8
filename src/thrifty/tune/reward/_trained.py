"""What the claims of rewards share: a student reinforced with one, what its answers to fresh problems are like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from thrifty import registry


def reinforced(
    trial: Any, steps: int, problems: int = 16, samples: int = 6, lr: float = 1e-3
) -> dict[str, list[float]]:
    """Train a LoRA of the trial's student by GRPO with ``trial.method`` as reward: ``tokens`` and ``accuracy`` then.

    Of single passes at temperature 1. Measures the gate "accuracy after 0/1 rewards".
    """

    def make(folder: Path) -> None:
        from thrifty.models.load import load
        from thrifty.tune.adapter import lora
        from thrifty.tune.rollout import Rollout, rollout

        lab = trial.lab()
        loaded = load(lab.model)
        loaded = replace(loaded, model=lora(loaded.model, rank=8, seed=lab.seed))
        settings = Rollout(
            steps=trial.scaled(steps), problems=problems, samples=samples, lr=lr, seed=lab.seed, max_tokens=256,
            save_every=10, window=0,
        )  # fmt: skip
        drawn = lab.task.problems("train", 1000, lab.seed)
        rollout(loaded, lab.task, drawn, settings, folder, reward=trial.method)

    folder = trial.once("rollout", make, trial.method, trial.scaled(steps), problems, samples, lr)
    trial.trained(folder)
    passes = registry.load("single-pass")(temperature=1.0, top_p=1.0)
    found: dict[str, list[float]] = trial.answered(trial.solve(passes, trial.problems(), adapter=folder / "adapter"))
    trial.elsewhere(passes, adapter=folder / "adapter")
    if trial.arm == "comparator":
        trial.gate("accuracy after 0/1 rewards", sum(found["accuracy"]) / len(found["accuracy"]))
    return found
