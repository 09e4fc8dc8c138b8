"""Saves trained weights: a LoRA whose A spans the directions that the new data's activations vary in most.

For every target layer, an incremental SVD of its inputs X at positions with a loss, batch by batch until the right
singular vectors stand still (cosine at least ``tau``). With singular values sigma, component j of a layer explains

    sigma_j^2 / sum over all components of sigma^2        of its variance.

All layers' shares are sorted together and the best (number of layers * rank) kept, so layers get ranks from 0 to
rho * rank; A = the layer's kept vectors as rows, B = 0. Alpha grows with a layer's rank, so alpha / r is the same for
all.

Paper: Paischer, Hauzenberger et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation, arXiv 2410.07170. The SVD and the ranks are peft's own (``initialize_lora_eva_weights``).
Differs: positions are those whose next token has a loss, in peft those whose own label is not masked. Saved, it is a
plain LoRA with a rank per layer.

>>> import torch
>>> x = torch.tensor([[3., 0.], [-3., 0.], [0., 1.], [0., -1.]])      # varies most along the first axis
>>> components(x, 1).abs()
tensor([[1., 0.]])
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, TaskType, initialize_lora_eva_weights
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor

from thrifty.contracts import Card, ThriftyError
from thrifty.tune.adapter._peft import NAME, linears, plain, target_names
from thrifty.tune.adapter._peft import attach as attached
from thrifty.tune.adapter._peft import fold as merged
from thrifty.tune.adapter._trained import learnt
from thrifty.tune.batches import Batch

CARD = Card(
    key="eva",
    title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    arxiv="2410.07170",
    year=2024,
    saves=("parameters", "flops"),
)

PASSES = 400
"""Over the batches before the SVD is given up: with data that vary in too few directions it never stands still."""


@dataclass(frozen=True)
class EVA:
    rank: int = field(default=16, metadata={"help": "mean rank of a layer"})
    alpha: float = field(default=1.0, metadata={"help": "LoRA's alpha at that rank"})
    rho: float = field(default=2.0, metadata={"help": "largest rank of a layer, in mean ranks; 1 gives all the same"})
    tau: float = field(default=0.99, metadata={"help": "cosine between successive singular vectors that ends the SVD"})
    whiten: bool = field(default=False, metadata={"help": "divide vectors by the square root of their singular value"})
    targets: str = field(default="all-linear", metadata={"help": "linear layers: names with commas, or all-linear"})
    seed: int = field(default=0, metadata={"help": "of the randomised SVD"})

    def attach(self, model: Any, batches: Sequence[Batch] = ()) -> Any:
        """``model`` with a LoRA fitted to the activations on ``batches``, a few of those it will be trained on."""
        plain(model)
        self._check(model, batches)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lora with eva initialization")  # on saving memory
            made = attached(model, self._config(), self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            initialize_lora_eva_weights(
                made,
                dataloader=_Passes(batches),
                adapter_name=NAME,
                forward_fn=lambda m, given: m(**{k: v for k, v in given.items() if k != "weights"}, use_cache=False),
                prepare_model_inputs_fn=lambda given, config: (given["weights"] != 0).nonzero(),
                show_progress_bar=False,
            )
        config: Any = made.peft_config[NAME]
        config.init_lora_weights, config.eva_config = True, None  # from here on a plain LoRA
        return made

    def fold(self, model: Any) -> Any:
        """The plain model with what was learnt merged in."""
        return merged(model)

    def _config(self) -> LoraConfig:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=target_names(self.targets),
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=self.rho, tau=self.tau, whiten=self.whiten),
        )

    def _check(self, model: Any, batches: Sequence[Batch]) -> None:
        needed = round(self.rank * self.rho)
        most = max((int((batch.weights != 0).sum()) for batch in batches), default=0)
        if most < needed:
            raise ThriftyError(
                f"eva looks for {needed} directions (rank * rho) in batches of at most {most} target tokens: "
                "give it larger batches of the training data, or lower rank or rho"
            )
        narrow = min((m.in_features for m in linears(model, target_names(self.targets)).values()), default=needed)
        if narrow < needed:
            raise ThriftyError(f"eva looks for {needed} directions (rank * rho) in {narrow} inputs: lower rank or rho")


class _Passes:
    """Batches again and again, as peft's loop wants them; an error after ``PASSES``."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches) * PASSES

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(PASSES):
            for batch in self.batches:
                given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "weights": batch.weights}
                yield {name: value for name, value in given.items() if value is not None}
        raise ThriftyError(
            f"eva's singular vectors still move after {PASSES} passes over {len(self.batches)} batches: "
            "give it more varied batches, or lower tau or rank"
        )


def components(x: Tensor, count: int) -> Tensor:
    """The first ``count`` right singular vectors ``[count, d]`` of centred inputs ``[N, d]``, as peft finds them."""
    found: Tensor = IncrementalPCA(n_components=count, lowrank=True, lowrank_seed=42).fit(x).components_
    return found


CLAIM = {
    "says": "A LoRA that starts from the main directions of activations learns a new skill faster, and as well.",
    "parts": [
        {"name": "early loss", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.05},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "settings": {"rank": 4, "alpha": 4.0},
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
