"""Focal loss: tokens that the model already predicts count for less, so that fewer examples do.

loss = - sum_t w_t * (1 - p_t)^gamma * log p_t / sum |w|, over the target tokens t of the step; gamma = 0 is plain NLL.

Paper: none.
Differs: nothing.

>>> import torch
>>> MyMethod(gamma=1).per_token(torch.tensor([0.5]).log())  # 0.5 * ln 2
tensor([0.3466])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thrifty.contracts import Card
from thrifty.tune.batches import Batch

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("examples",))


@dataclass(frozen=True)
class MyMethod:
    gamma: float = field(default=1.0, metadata={"help": "how fast the weight of a sure token falls"})

    def modules(self, model: Any) -> Mapping[str, Any]:
        return {}

    def per_token(self, logp: Tensor) -> Tensor:
        """Loss ``[N]`` of target tokens with these log-probabilities ``[N]``."""
        return -((1 - logp.exp()) ** self.gamma) * logp

    def loss(self, model: Any, batch: Batch, step: int, modules: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        keep = batch.weights != 0
        logits = model(**batch.inputs).logits[keep].float()
        logp = -torch.nn.functional.cross_entropy(logits, batch.labels[keep], reduction="none")
        return (self.per_token(logp) * batch.weights[keep]).sum() / batch.total, {}
