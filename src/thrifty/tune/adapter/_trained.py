"""What the claims of adapters share: a skill that the student has never seen, learnt with one."""

from __future__ import annotations

from typing import Any

from thrifty.tune import skill


def learnt(trial: Any) -> dict[str, Any]:
    """150 steps over 2,000 chains of the skill, with ``trial.method`` as adapter and the tuned ``lr``.

    ``early loss`` is the mean training loss of the first third of the steps; ``loss`` (nats per token) and ``accuracy``
    are per problem, held out. Measures the gate "the skill is new".
    """
    found = skill.learnt(trial, skill.adapted(trial), lr=trial.pick["lr"], steps=150, train_n=2000)
    trial.gate("the skill is new", found["naive"])
    trial.note("held-out loss", sum(found["loss"]) / len(found["loss"]))
    trial.note("held-out accuracy", sum(found["exact"]) / len(found["exact"]))
    return {"early loss": found["early"], "loss": found["loss"], "accuracy": found["exact"]}
