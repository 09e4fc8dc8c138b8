"""Saves trained weights and steps: a LoRA that starts from the principal part of each weight instead of from nothing.

    W = U S V^T,   B = U_r (S_r / s)^(1/2),   A = (S_r / s)^(1/2) V_r^T,   W_res = W - s B A,   s = alpha / r

W_res is frozen, A and B are trained; at first the model is unchanged. The SVD is exact, or randomised with
``iterations`` power iterations, which takes seconds on a large model. A trained pair is saved as an ordinary LoRA of
rank 2r on the original weights, s (B'A' - BA) = s [B' B] [A'; -A], so any server of LoRAs takes it.

Paper: Meng, Wang, Zhang 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models, arXiv 2404.02948. The start is peft's own (``init_lora_weights="pissa"``).
Differs: no QPiSSA (W_res in NF4). peft's own ``save_pretrained`` keeps the pair as it is and decomposes the base anew
when it is loaded, which is exact for ``iterations = 0`` only; ``save_adapter`` and training write the ordinary LoRA.

>>> import torch
>>> layer = torch.nn.Linear(2, 2, bias=False)
>>> _ = layer.weight.data.copy_(torch.tensor([[0., 4.], [1., 0.]]))   # singular values 4 and 1
>>> a, b = start(layer, rank=1)
>>> (b @ a).abs(), a.abs()                                            # 4 stays in the pair, and A = sqrt(4) v
(tensor([[0., 4.],
        [0., 0.]]), tensor([[0., 2.]]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from thrifty.contracts import Card, ThriftyError
from thrifty.tune.adapter._peft import NAME, target_names
from thrifty.tune.adapter._peft import attach as attached
from thrifty.tune.adapter._peft import fold as merged
from thrifty.tune.adapter._trained import learnt
from thrifty.tune.batches import Batch

CARD = Card(
    key="pissa",
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    arxiv="2404.02948",
    year=2024,
    saves=("parameters", "memory"),
)


@dataclass(frozen=True)
class PiSSA:
    rank: int = field(default=128, metadata={"help": "singular values that are trained, of each weight"})
    alpha: float | None = field(default=None, metadata={"help": "LoRA's alpha; default: the rank, so that s is 1"})
    iterations: int = field(default=0, metadata={"help": "power iterations of a randomised SVD (4 to 16); 0: exact"})
    targets: str = field(default="all-linear", metadata={"help": "linear layers: names with commas, or all-linear"})
    seed: int = field(default=0, metadata={"help": "of the randomised SVD"})

    def attach(self, model: Any, batches: Sequence[Batch] = ()) -> Any:
        """``model`` with its principal parts moved into a LoRA; ``batches`` are not looked at."""
        if self.rank < 1:
            raise ThriftyError(f"pissa has rank {self.rank}: give at least 1")
        made = attached(model, self._config(), self.seed)
        state = get_peft_model_state_dict(made, adapter_name=NAME, save_embedding_layers=False)
        starts: Any = {NAME: {name: value.detach().cpu().clone() for name, value in state.items()}}
        made.starts = starts  # for ``save_adapter``
        return made

    def fold(self, model: Any) -> Any:
        """The plain model with what was learnt merged in."""
        return merged(model)

    def _config(self) -> LoraConfig:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules=target_names(self.targets),
            init_lora_weights=f"pissa_niter_{self.iterations}" if self.iterations else "pissa",  # type: ignore[arg-type]
        )


def start(layer: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` of one linear layer, which is left with the rest."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights="pissa")
    made: Any = get_peft_model(nn.Sequential(layer), config)
    lora = made.base_model.model[0]
    return lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data


CLAIM = {
    "says": "A LoRA that starts from the principal part of each weight learns a new skill faster, and as well.",
    "parts": [
        {"name": "early loss", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.05},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "settings": {"rank": 4},
    "comparator": {"key": "plain-lora", "rank": 4, "alpha": 4.0},
    "match": "documents and their order, steps, mean rank and alpha / rank",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "grid": {"lr": [3e-3, 1e-2, 3e-2, 1e-1]},
    "gates": {"the skill is new": [None, 0.05]},
    "amendments": [
        "1: both arms took the largest rate, 1e-2, and the skill was spelt in tokens that the student does not know, "
        "so the comparator learnt nothing; now up to 1e-1 and in tokens that it knows"
    ],
}


def claim(trial: Any) -> dict[str, Any]:
    """Mean training loss of the first 50 of 150 steps on a spelling that the student has never seen, and accuracy."""
    return learnt(trial)
