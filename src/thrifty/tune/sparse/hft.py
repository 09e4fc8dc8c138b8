"""Saves optimiser memory and gradients, and forgets less: half of a model's matrices train, half stay as they are.

    theta_drawn <- theta_drawn - lr * grad,   theta_held stays,   redrawn for every stage of training

In each layer two of the four attention matrices are held, of the three feed-forward matrices two in a random half of
the layers and one in the others, and half of the norms; a bias goes with its matrix. Embeddings, output head and the
last norm train. In layers of other make, half of the matrices that share a module are held, and where their number is
odd, one more in a random half of the layers. Use it as a hook of a training loop, another seed for every stage:

    train(model, documents, settings, folder, hooks=[HFT()])
    train(model, others, settings, another_folder, hooks=[HFT(seed=1)])

Only what trains gets gradients and moments. Weights that you have frozen yourself stay frozen and are not drawn from.

Paper: Hui, Zhang et al. 2024, HFT: Half Fine-Tuning for Large Language Models, arXiv 2404.18466.
Differs: that the last norm trains, and what happens in layers of other make, is our choice; ``every`` draws anew within
a run, as the paper does not, and keeps the moments of what trained before, up to the memory of full fine-tuning.

>>> one = {f"layers.{i}.mlp.{name}.weight": (2, 2) for i in (0, 1) for name in ("up", "gate", "down")}
>>> sorted(sum(f"layers.{i}." in name for name in half(one, random.Random(0))) for i in (0, 1))
[1, 2]
>>> half({"embed.weight": (2, 2), "layers.0.q.weight": (2, 2), "norm.weight": (2,)}, random.Random(0))
set()
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrifty.contracts import Card, ThriftyError
from thrifty.models.load import load
from thrifty.tune import skill
from thrifty.tune.supervised import NoHook, State, Train, TrainResult, train

CARD = Card(
    key="hft",
    title="HFT: Half Fine-Tuning for Large Language Models",
    arxiv="2404.18466",
    year=2024,
    saves=("parameters", "memory", "flops"),
)

_IN_A_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+?)(?:[._](?:weight|bias))?$")
"""Stack, number of the layer, and what a weight and its bias share, e.g. model.layers, 0, self_attn.q_proj."""


def half(shapes: Mapping[str, Sequence[int]], rng: random.Random) -> set[str]:
    """The weights to hold: half of every category, by name. ``shapes`` are those of all weights that could train."""
    units: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in shapes:
        if found := _IN_A_LAYER.match(name):
            units[found.groups()].append(name)
    categories: defaultdict[tuple[str, str | None], defaultdict[str, list[list[str]]]]
    categories = defaultdict(lambda: defaultdict(list))
    for (stack, layer, unit), names in units.items():
        matrix = any(len(shapes[name]) > 1 for name in names)
        categories[stack, unit.rpartition(".")[0] if matrix else None][layer].append(names)  # None: the norms
    held: set[str] = set()
    for layers in categories.values():
        odd = [layer for layer, members in layers.items() if len(members) % 2]
        more = rng.sample(odd, len(odd) // 2)
        for layer, members in layers.items():
            for names in rng.sample(members, len(members) // 2 + (layer in more)):
                held.update(names)
    return held


@dataclass(frozen=True)
class HFT(NoHook):
    seed: int = field(default=0, metadata={"help": "of the draw: give every stage of training another"})
    every: int = field(default=0, metadata={"help": "steps until another half is drawn; 0 for one draw in all"})

    def start(self, state: State) -> None:
        """Refuse what cannot be half fine-tuned."""
        if self.every < 0:
            raise ThriftyError(f"hft has every={self.every}: steps between draws are at least 1, or 0 for one draw")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ThriftyError("hft freezes weights after the model is spread over processes: run it in one process")
        if hasattr(state.model, "peft_config"):
            raise ThriftyError(
                "hft trains a model's own weights, and this one carries an adapter: give the plain model"
            )
        if not self.held(_learning(state)):
            raise ThriftyError(
                "hft finds nothing to hold: no two weights of a kind that may be trained, in layers that are numbered; "
                "unfreeze the model, or train all of it"
            )

    def before_step(self, state: State) -> None:
        """Freeze the half that is held, for this step's gradients alone, so that a run leaves no weight frozen."""
        learning = _learning(state)
        for name in self.held(learning, state.step):
            learning[name].requires_grad_(False)

    def after_backward(self, state: State) -> None:
        """What was held has no gradient, and AdamW passes over it: no moments, no decay."""
        for weight in _learning(state).values():
            weight.requires_grad_(True)

    def held(self, weights: Mapping[str, Tensor], step: int = 0) -> set[str]:
        """Names of the ``weights`` that stay as they are in a step."""
        stage = step // self.every if self.every else 0
        return half({name: weight.shape for name, weight in weights.items()}, random.Random(f"{self.seed}|{stage}"))


def _learning(state: State) -> dict[str, Tensor]:
    """The model's weights that the optimiser has, by name."""
    mine = {id(weight) for group in state.optimizer.param_groups for weight in group["params"]}
    return {name: weight for name, weight in state.model.named_parameters() if id(weight) in mine}


CLAIM = {
    "says": "Training half of the matrices learns a new skill as well as training all, and forgets less.",
    "parts": [
        {"name": "accuracy", "test": "non-inferior", "margin": 0.05},
        {"name": "others", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
    ],
    "comparator": None,
    "placebo": {"every": 1},  # as many weights in every step, but none that stays where it was
    "match": "documents and their order, steps",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "grid": {"lr": [1e-3, 3e-3, 1e-2]},
    "gates": {
        "full fine-tuning learns": [0.3, None],  # else "as well" says nothing
        "full fine-tuning forgets": [0.15, None],
        "the skill is new": [None, 0.05],
    },
}


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy on a new spelling after 200 steps, and nats per token of two other tasks, against all weights."""
    hooks = [] if trial.method is None else [dataclasses.replace(trial.method, seed=trial.seed)]

    def learn(model: Any, documents: list[Any], settings: Train, folder: Path) -> tuple[Any, TrainResult]:
        return model, train(model, documents, settings, folder, hooks=hooks)

    found = skill.learnt(trial, learn, lr=trial.pick["lr"], steps=200, train_n=2000)
    trial.gate("the skill is new", found["naive"])
    if hooks:
        weights = dict(load(trial.asset()).model.named_parameters())
        held = hooks[0].held(weights)
        trial.figure("trained_parameters", sum(w.numel() for name, w in weights.items() if name not in held))
    before, after = (sum(found[name]) / len(found[name]) for name in ("before", "kept"))
    if trial.arm == "comparator":
        trial.gate("full fine-tuning learns", sum(found["exact"]) / len(found["exact"]))
        trial.gate("full fine-tuning forgets", before - after)
    return {"accuracy": found["exact"], "others": found["others"]}
