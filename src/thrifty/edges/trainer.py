"""An objective in transformers' ``Trainer``, or in a trainer derived from it, as a mixin that computes the loss.

>>> class ObjectiveTrainer(ObjectiveMixin, Trainer): ...                                   # doctest: +SKIP
>>> documents = examples(chains, loaded.chat)                                              # doctest: +SKIP
>>> ObjectiveTrainer(loaded.model, args, train_dataset=documents, objective=MaskedThought()).train()   # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thrifty.contracts import Objective, ThriftyError
from thrifty.tune.batches import Batch, Example, Pair, collate
from thrifty.tune.objective.nll import NLL
from thrifty.tune.supervised import check_kind

IGNORED = -100
"""transformers' label of a token without a loss."""


def _checked(objective: Objective, items: Sequence[Example | Pair]) -> dict[str, Any]:
    made = collator(items)
    check_kind(items, objective)
    return made


def collator(items: Sequence[Example | Pair]) -> dict[str, Any]:
    """A ``data_collator`` for examples, pairs and the like: one document per row, padded on the right.

    ``batch`` is the ``Batch`` for the objective; ``input_ids`` and ``labels`` are what transformers looks at.
    """
    if strange := [item for item in items if not isinstance(item, Example | Pair)]:
        raise ThriftyError(
            f"this collator takes examples of thrifty.tune.batches, not {type(strange[0]).__name__}: make some, or "
            "give a data_collator of your own that returns input_ids and labels"
        )
    batch = collate([[document] for item in items for document in item.documents])
    batch = dataclasses.replace(batch, total=float(sum(item.total for item in items)))
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[:, 1:] = torch.where(batch.weights != 0, batch.labels, IGNORED)[:, :-1]
    return {"input_ids": batch.input_ids, "labels": labels, "batch": batch}


class ObjectiveMixin:
    """Stand it before ``Trainer`` (or trl's ``SFTTrainer``) and give ``objective``; default: ``NLL``.

    The data set is a list of examples or pairs, or whatever another ``data_collator`` (trl's own, too) makes
    ``input_ids`` and ``labels`` of, one document per row. The loss is the mean over the whole step: all batches that
    are accumulated and all processes. What the objective logs is logged beside the loss. Raises ThriftyError for
    objectives that train parts of their own and for examples with a strength: ``thrifty.tune.supervised.train`` has
    both.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self.objective: Objective = objective or NLL()
        self._logged: dict[str, float] = {}
        self._logged_steps = 0
        data = kwargs.get("train_dataset") or kwargs.get("eval_dataset")
        ours = isinstance(data, Sequence) and isinstance(data[0], Example | Pair)
        if kwargs.get("data_collator") is collator or (ours and kwargs.get("data_collator") is None):
            kwargs["data_collator"] = functools.partial(_checked, self.objective)
        super().__init__(*args, **kwargs)
        parts = self.objective.modules(self.model)  # type: ignore[attr-defined]
        if parts:
            raise ThriftyError(
                f"objective {type(self.objective).__name__} trains parts of its own ({', '.join(parts)}), which a "
                "Trainer neither saves nor resumes: use thrifty.tune.supervised.train"
            )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and the loss weight of all of them over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self._logged_steps += 1
        for sample in samples:
            sample["batch"] = self._batch(sample)
        total = torch.tensor(sum(sample["batch"].total for sample in samples), device=device)
        return samples, self.accelerator.reduce(total, "sum")  # type: ignore[attr-defined]

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        if "batch" not in inputs and getattr(self.objective, "pairs", False):
            raise ThriftyError(
                f"objective {type(self.objective).__name__} is trained on pairs, and this data_collator's rows have no "
                "partners: give a list of Pairs and no data_collator"
            )
        return to_batch(inputs)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the step's loss; in evaluation the batch's own mean."""
        batch = self._batch(inputs)
        training = model.training and num_items_in_batch is not None
        if training:
            batch = dataclasses.replace(batch, total=float(num_items_in_batch))
        state: Any = self.state  # type: ignore[attr-defined]
        loss, logs = self.objective.loss(model, batch, state.global_step, {})
        if training:
            for name, value in logs.items():
                self._logged[name] = self._logged.get(name, 0.0) + float(value)
            # DistributedDataParallel takes the mean over processes, the loss is their sum.
            loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the objective logged, as means over the steps since the last time."""
        if "loss" in logs and self._logged:
            names = sorted(self._logged)
            sums = torch.tensor([self._logged[name] for name in names], device=self.args.device)  # type: ignore[attr-defined]
            means = self.accelerator.reduce(sums, "sum") / self._logged_steps  # type: ignore[attr-defined]
            logs = {**logs, **dict(zip(names, means.tolist()))}
            self._logged, self._logged_steps = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def to_batch(inputs: Mapping[str, Any]) -> Batch:
    """What an objective takes, from ``input_ids`` and ``labels`` ``[B, T]`` (-100: no loss), on their device.

    Padding, on either side, is where ``attention_mask`` is 0, or else behind a row's last label.
    """
    device = inputs["input_ids"].device
    made: Batch | None = inputs.get("batch")
    if made is None:
        made = collator([_example(*row) for row in _rows(inputs)])["batch"]
    if made.strengths is not None:
        raise ThriftyError("examples with an adapter strength of their own: train with thrifty.tune.supervised.train")
    return made.to(device)


def _rows(inputs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Token ids and labels of each row, without its padding."""
    if "labels" not in inputs:
        raise ThriftyError(
            f"the batch has no labels (it has: {', '.join(inputs)}): give a data_collator that makes them"
        )
    positions = inputs.get("position_ids")
    if positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any()):
        raise ThriftyError("rows hold several packed documents: turn packing and padding_free off")
    ids, labels = inputs["input_ids"].cpu().numpy(), inputs["labels"].cpu().numpy()
    mask = inputs.get("attention_mask")
    if mask is not None:
        return [(row[keep], label[keep]) for row, label, keep in zip(ids, labels, mask.bool().cpu().numpy())]
    ends = [max((label != IGNORED).nonzero()[0], default=len(label) - 1) + 1 for label in labels]
    return [(row[:end], label[:end]) for row, label, end in zip(ids, labels, ends)]


def _example(ids: Any, labels: Any) -> Example:
    learnt = labels != IGNORED
    start = int(learnt.argmax()) if learnt.any() else len(ids) - 1
    return Example(ids[:start], ids[start:], mask=learnt[start:])
