"""Next-token negative log-likelihood of the targets: plain supervised fine-tuning.

    loss = - sum over target tokens t of w_t * log p(x_t | x_<t) / sum of |w|    (both sums over the whole step)

The mean is over tokens, so long documents weigh more than short ones; give ``Example.weight = 1 / length`` for a mean
over documents. Logits are computed at positions with a loss only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrifty.contracts import Card
from thrifty.tune.batches import Batch

CARD = Card(key="nll", title="Next-token negative log-likelihood", baseline=True)


@dataclass(frozen=True)
class NLL:
    """Weighted negative log-likelihood in nats per target token."""

    def modules(self, model: Any) -> Mapping[str, Any]:
        """Nothing to train beside the model."""
        return {}

    def loss(self, model: Any, batch: Batch, step: int, modules: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """This batch's share of the step's mean loss."""
        logits, labels, weights = target_logits(model, batch)
        nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return (nats * weights).sum() / batch.total, {}


def target_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[N, V]``, labels ``[N]`` and weights ``[N]`` of the batch's N positions with a loss, in row order.

    The model's head sees these positions only, where its forward takes a boolean ``logits_to_keep`` ``[B, T]``
    (nearly all of transformers): the full ``[B, T, V]`` is what runs out of memory first.
    """
    keep = batch.weights != 0
    if _keeps_logits(model):
        logits = model(**batch.inputs, logits_to_keep=keep).logits
    else:
        logits = model(**batch.inputs).logits[keep]
    return logits, batch.labels[keep], batch.weights[keep]


def _keeps_logits(model: Any) -> bool:
    while hasattr(model, "module"):  # DistributedDataParallel
        model = model.module
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
