"""Saves examples: fine-tunes on chains whose own tokens are partly masked in the input, so that copying does not do.

    loss = - sum_t w_t log p(y_t | q, mask(y_<t)) / sum |w|

Every token of the target, read as an input, is replaced with probability p, drawn anew every step; the labels and the
question stay. p grows from 0 to ``rate`` over ``warmup`` steps: p = rate * min(1, step / (warmup + 1)).

Paper: Chen, Wang et al. 2024, Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical
Reasoning Learning of Language Models, arXiv 2403.02178, and the authors' trainer.
Differs: ``warmup`` is in steps, for an objective does not know how many there are: the paper takes two thirds of all.

>>> import torch
>>> mask = MaskedThought(rate=1.0, replacement=Token(9))
>>> ids, weights = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[0., 1., 1., 1., 0.]])
>>> mask.masked(ids, weights, 1.0, 10)                      # the question is 1 2, the target 3 4 5
tensor([[1, 2, 9, 9, 9]])
>>> MaskedThought(warmup=9).probability(5)                  # .4 * 5 / 10
0.2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrifty.contracts import Card, ThriftyError
from thrifty.tune import skill
from thrifty.tune.batches import Batch
from thrifty.tune.logprobs import target_logprobs
from thrifty.tune.supervised import Train, TrainResult, train

CARD = Card(
    key="masked-thought-mft",
    title="Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of "
    "Language Models",
    arxiv="2403.02178",
    year=2024,
    saves=("examples",),
)


@dataclass(frozen=True)
class Token:
    """Replaces by one token: a mask token added to the vocabulary, or the padding token."""

    id: int

    def __call__(self, ids: Tensor, vocabulary: int) -> Tensor:
        return torch.full_like(ids, self.id)


def random_token(ids: Tensor, vocabulary: int) -> Tensor:
    """Any token of the vocabulary, uniformly: what the released script for GSM8K does."""
    return torch.randint_like(ids, vocabulary)


@dataclass(frozen=True)
class MaskedThought:
    rate: float = field(default=0.4, metadata={"help": "share of target tokens that are masked; .2 for large sets"})
    warmup: int = field(default=0, metadata={"help": "steps over which the share grows; the paper: 2/3 of all steps"})
    where: str = field(
        default="input",
        metadata={"help": "input; or loss: the tokens drawn carry no loss and inputs stay, which is no masked thought"},
    )
    replacement: Callable[[Tensor, int], Tensor] = field(
        default=random_token, metadata={"help": "what to put in: function of token ids and the size of the vocabulary"}
    )

    def modules(self, model: Any) -> Mapping[str, Any]:
        return {}

    def probability(self, step: int) -> float:
        """p at ``step`` (from 0)."""
        return self.rate * min(1.0, step / (self.warmup + 1)) if self.warmup else self.rate

    def masked(self, ids: Tensor, weights: Tensor, probability: float, vocabulary: int) -> Tensor:
        """Input ids ``[B, T]`` with target tokens replaced; ``weights[b, t]`` is that of the token after t."""
        target = torch.zeros_like(ids, dtype=torch.bool)
        target[:, 1:] = weights[:, :-1] != 0
        drawn = torch.rand(ids.shape, device=ids.device) < probability
        return torch.where(target & drawn, self.replacement(ids, vocabulary), ids)

    def loss(self, model: Any, batch: Batch, step: int, modules: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The batch's share of the step's mean over target tokens; logs the share of tokens that were changed."""
        if not 0 <= self.rate <= 1 or self.warmup < 0:
            raise ThriftyError(
                f"masked-thought-mft has rate {self.rate}, warmup {self.warmup}: give 0 <= rate <= 1, warmup >= 0"
            )
        if self.where not in ("input", "loss"):
            raise ThriftyError(f"masked-thought-mft masks {self.where!r}: choose input or loss")
        if self.where == "loss":
            logp, weights = target_logprobs(model, batch), batch.weights[batch.weights != 0]
            weights = weights * (torch.rand(weights.shape, device=weights.device) >= self.probability(step))
            return -(logp * weights).sum() / batch.total, {"masked": float((weights == 0).sum()) / batch.total}
        vocabulary = _vocabulary(model)
        ids = self.masked(batch.input_ids, batch.weights, self.probability(step), vocabulary)
        logp = target_logprobs(model, dataclasses.replace(batch, input_ids=ids))
        changed = float((ids != batch.input_ids).sum()) / batch.total
        return -(logp * batch.weights[batch.weights != 0]).sum() / batch.total, {"masked": changed}


def _vocabulary(model: Any) -> int:
    while hasattr(model, "module"):  # DistributedDataParallel
        model = model.module
    return int(model.config.get_text_config(decoder=True).vocab_size)


CLAIM = {
    "says": "With 300 examples of a new skill, masking part of the chains in the input raises accuracy over plain SFT.",
    "parts": [{"name": "accuracy", "test": "superior", "smallest": 0.05}],
    "comparator": {"key": "nll"},
    "placebo": {"where": "loss"},
    "match": "documents and their order, steps",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "grid": {"lr": [1e-3, 3e-3, 1e-2], "rate": [0.1, 0.4]},
    "gates": {"room above SFT": [0.02, 0.9], "the skill is new": [None, 0.05]},
    "amendments": [
        "1: both arms took the largest rate, 3e-3, and the share of masked tokens was not tuned; now up to 1e-2, a "
        "tenth or 0.4 of them, and the skill is spelt in tokens that the student knows"
    ],
}


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy after 200 steps over 300 chains (21 passes) of a spelling that the student has never seen."""
    steps = 200
    if hasattr(trial.method, "rate"):
        trial.method = dataclasses.replace(trial.method, rate=trial.pick["rate"])

    def learn(model: Any, documents: list[Any], settings: Train, folder: Path) -> tuple[Any, TrainResult]:
        objective = trial.method
        if hasattr(objective, "warmup"):
            objective = dataclasses.replace(objective, warmup=2 * trial.scaled(steps) // 3)
        return model, train(model, documents, settings, folder, objective=objective)

    found = skill.learnt(trial, learn, lr=trial.pick["lr"], steps=steps, train_n=300)
    trial.gate("the skill is new", found["naive"])
    if trial.arm == "comparator":
        trial.gate("room above SFT", sum(found["exact"]) / len(found["exact"]))
    return {"accuracy": found["exact"]}
