"""Saves optimiser memory: trains the few weights of each matrix that are largest after a rank reduction.

    W_f = U_f S_f V_f^T   (best copy of W of rank f);   mask: the k largest |W_f|,   k = min((m + n) * rank, m * n)

so a matrix trains as many values as a LoRA of that rank. Every ``every`` steps the masks are made anew from the weights
as they stand; moments move along with the entries that stay, new entries start at 0. The optimiser holds vectors [k]:

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    W[mask] -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

All linear layers but the output head are trained, everything else is frozen. Use it as a hook of
``tune.supervised.train`` on a plain model.

Paper: Liu, Pang et al. 2025, LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for
Reasoning-Focused Supervised Fine-Tuning, arXiv 2506.00772, and the authors' optimiser.
Differs: the gradient of every matrix stands dense until the step (it is masked before clipping); masks change after
``every`` steps, in the authors' code one step earlier; the SVD is randomised for matrices above 1,024 on both sides.

>>> import torch
>>> w = torch.diag(torch.tensor([5., 3., 4.]))          # of rank 1 only the 5 is left, of rank 2 the 5 and the 4
>>> principal(w, 2)
tensor([[5., 0., 0.],
        [0., 0., 0.],
        [0., 0., 4.]])
>>> largest(principal(w, 2), 2)
tensor([0, 8])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.contracts import Card, ThriftyError
from thrifty.models.load import load
from thrifty.tune import skill
from thrifty.tune.supervised import NoHook, State, Train, TrainResult, train

CARD = Card(
    key="lift",
    title="LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused Supervised "
    "Fine-Tuning",
    arxiv="2506.00772",
    year=2025,
    saves=("memory", "parameters"),
)


@torch.no_grad()
def principal(weight: Tensor, rank: int) -> Tensor:
    """The best copy of rank ``rank`` of a matrix, float32 of the same shape."""
    matrix = weight.float()
    if min(matrix.shape) <= 1024:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape))
        vt = v.T
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def magnitude(weight: Tensor, rank: int) -> Tensor:
    """The weights themselves: the paper's ablation without rank reduction."""
    return weight.detach().float()


def chance(weight: Tensor, rank: int) -> Tensor:
    """Random importance: the paper's ablation, and what a mask has to beat."""
    return torch.rand_like(weight, dtype=torch.float32)


MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {"principal": principal, "magnitude": magnitude, "random": chance}


@dataclass(frozen=True)
class LIFT(NoHook):
    rank: int = field(default=128, metadata={"help": "trained values per matrix, as those of a LoRA of this rank"})
    filter_rank: int = field(
        default=128, metadata={"help": "rank to which weights are reduced before they are compared"}
    )
    every: int = field(default=400, metadata={"help": "steps between new masks"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW's first moment"})
    beta2: float = field(default=0.95, metadata={"help": "AdamW's second moment"})
    eps: float = field(default=1e-6, metadata={"help": "AdamW's epsilon"})
    mask: str | Callable[[Tensor, int], Tensor] = field(
        default="principal",
        metadata={"help": "principal, magnitude or random; or a function of weight and filter_rank to importance"},
    )

    def start(self, state: State) -> None:
        """Freeze what is not trained and put the sparse optimiser in place."""
        if self.rank < 1 or self.filter_rank < 1 or self.every < 1:
            raise ThriftyError(f"lift has {self}: rank, filter_rank and every are at least 1")
        if isinstance(self.mask, str) and self.mask not in MASKS:
            raise ThriftyError(f"lift has the mask {self.mask!r}: choose one of {', '.join(MASKS)}, or give a function")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ThriftyError("lift freezes weights after the model is spread over processes: run it in one process")
        if hasattr(state.model, "peft_config"):
            raise ThriftyError(
                "lift trains a model's own weights, and this one carries an adapter: give the plain model"
            )
        trained = [w for w in _matrices(state.model) if w.requires_grad]
        if not trained:
            raise ThriftyError("lift finds no linear layer that may be trained: unfreeze the model")
        state.model.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(True)
        decay = max(group["weight_decay"] for group in state.optimizer.param_groups)
        state.optimizer = MaskedAdamW(trained, (self.beta1, self.beta2), self.eps, decay)
        state.optimizer.remask(self._indices)

    def before_step(self, state: State) -> None:
        """New masks every ``every`` steps, before the gradients are made."""
        if state.step and state.step % self.every == 0:
            state.optimizer.remask(self._indices)  # type: ignore[attr-defined]

    def after_backward(self, state: State) -> None:
        """Leave the gradient of the mask alone, so that clipping goes by what is trained."""
        for group in state.optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    index, gradient = state.optimizer.state[weight]["index"], weight.grad.view(-1)
                    kept = gradient[index]
                    gradient.zero_()
                    gradient[index] = kept

    def trained(self, weight: Tensor) -> int:
        """k: how many values of a matrix are trained."""
        rows, columns = weight.shape
        return min((rows + columns) * self.rank, rows * columns)

    def _indices(self, weight: Tensor) -> Tensor:
        importance = MASKS[self.mask] if isinstance(self.mask, str) else self.mask
        return largest(importance(weight, self.filter_rank), self.trained(weight))


def _matrices(model: Any) -> list[Tensor]:
    """The weights of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def largest(importance: Tensor, count: int) -> Tensor:
    """Flat indices ``[count]``, ascending, of the entries of largest absolute value."""
    return importance.abs().flatten().topk(count, sorted=False).indices.sort().values


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW on part of each weight: indices ``[k]`` and two moments ``[k]`` per weight, and nothing else."""

    def __init__(
        self, weights: Iterable[Tensor], betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(weights, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def remask(self, indices: Callable[[Tensor], Tensor]) -> None:
        """Train the entries ``indices(weight)`` from now on; those that were trained before keep their moments."""
        for group in self.param_groups:
            for weight in group["params"]:
                state, new = self.state[weight], indices(weight)
                if not state:
                    zeros = torch.zeros(len(new), dtype=torch.float32, device=weight.device)
                    state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
                else:
                    for moment in ("exp_avg", "exp_avg_sq"):
                        dense = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
                        dense[state["index"].long()] = state[moment]
                        state[moment] = dense[new]
                state["index"] = new.to(torch.int32) if weight.numel() < 2**31 else new

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, flat = self.state[weight], weight.view(-1)
                index, first, second = state["index"], state["exp_avg"], state["exp_avg_sq"]
                gradient = weight.grad.view(-1)[index].float()
                state["step"] += 1
                first.mul_(beta1).add_(gradient, alpha=1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                kept = flat[index].float() * (1 - group["lr"] * group["weight_decay"])
                flat[index] = (kept - size * first / (second.sqrt() + group["eps"])).to(weight.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would turn indices and moments into the weight's own type."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for i, saved in state_dict["state"].items():
            weight = weights[i]
            self.state[weight] = {
                name: value.to(weight.device) if isinstance(value, Tensor) else value for name, value in saved.items()
            }


CLAIM = {
    "says": "Training the principal 5 % of the weights learns a new skill as well as training all, and forgets less.",
    "parts": [
        {"name": "accuracy", "test": "non-inferior", "margin": 0.05},
        {"name": "others", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
    ],
    "settings": {"rank": 3, "filter_rank": 16, "every": 50},
    "comparator": None,
    "placebo": {"mask": "random", "every": 1000000},
    "match": "documents and their order, steps",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "grid": {"lr": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
    "gates": {
        "full fine-tuning learns": [0.3, None],  # else "as well" says nothing
        "full fine-tuning forgets": [0.15, None],
        "the skill is new": [None, 0.05],
    },
    "amendments": [
        "1: the rates went up to 3e-3, the comparator's best, where 5 % of the weights learn nothing: now up to 3e-1; "
        "the skill was spelt in tokens that only the comparator, which trains the embeddings, could learn to write; "
        "what is kept was right answers in the old spelling, of which nothing keeps any: now nats on two other tasks"
    ],
}


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy on a new spelling after 200 steps, and nats per token of two other tasks, against all weights."""

    def learn(model: Any, documents: list[Any], settings: Train, folder: Path) -> tuple[Any, TrainResult]:
        hooks = [] if trial.method is None else [trial.method]
        return model, train(model, documents, settings, folder, hooks=hooks)

    found = skill.learnt(trial, learn, lr=trial.pick["lr"], steps=200, train_n=2000)
    trial.gate("the skill is new", found["naive"])
    if trial.method is not None:
        matrices = _matrices(load(trial.asset()).model)
        trial.figure("trained_parameters", sum(trial.method.trained(matrix) for matrix in matrices))
    before, after = (sum(found[name]) / len(found[name]) for name in ("before", "kept"))
    if trial.arm == "comparator":
        trial.gate("full fine-tuning learns", sum(found["exact"]) / len(found["exact"]))
        trial.gate("full fine-tuning forgets", before - after)
    return {"accuracy": found["exact"], "others": found["others"]}
