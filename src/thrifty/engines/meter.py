"""Counts what everything costs, below the methods: a forward pre-hook on every model counts its positions.

Engines add what only they know (which tokens were thought, what came from a cache). Rows are keyed by phase and role.
FLOPs are 2 * active parameters * positions forward and twice that again backward (Kaplan et al., arXiv 2001.08361,
section 2.1, attention over the context left out).

>>> meter = Meter()                                                       # doctest: +SKIP
>>> meter.watch(model)                                                    # doctest: +SKIP
>>> with scope(phase="train", padding=12): model(input_ids)               # doctest: +SKIP
"""

from __future__ import annotations

import contextvars
import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Phase = Literal["fit", "train", "solve"]


@dataclass
class Count:
    """Sums of one phase and role. Tokens, unless the name says otherwise."""

    prompt: int = 0
    """Prompt and prefix tokens read anew."""
    cached: int = 0
    """Prompt and prefix tokens taken from a cache."""
    thought: int = 0
    answer: int = 0
    injected: int = 0
    latent: int = 0
    drafted: int = 0
    accepted: int = 0
    discarded: int = 0
    """Sampled tokens of cancelled rows (a subset of thought + answer)."""
    calls: int = 0
    forwards: int = 0
    positions: int = 0
    """Positions that went through the model, padding included."""
    padding: int = 0
    prefill: int = 0
    """Positions that read given text (prompts, prefixes, scored text), padding left out."""
    backward: int = 0
    """Positions that also went backward, padding included."""
    tool_seconds: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)


@dataclass(frozen=True)
class Scope:
    """What the forwards run now are for. ``prefill`` is how many of their positions read given text (no padding)."""

    phase: Phase = "solve"
    role: str | None = None
    padding: int = 0
    prefill: int = 0


_SCOPE: contextvars.ContextVar[Scope] = contextvars.ContextVar("scope", default=Scope())  # noqa: B039 - it is frozen


@contextmanager
def scope(**changes: Any) -> Iterator[None]:
    """Say what the forwards inside are for: ``phase``, ``role``, ``padding`` and ``prefill`` positions of each forward.

    Inherits from the scope around it what it does not name.
    """
    token = _SCOPE.set(dataclasses.replace(_SCOPE.get(), **changes))
    try:
        yield
    finally:
        _SCOPE.reset(token)


class Meter:
    """Rows of ``Count`` keyed by ``(phase, role)``. Not thread-safe: one meter per engine or loop."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Count] = {}
        self._watched: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()

    def watch(self, model: torch.nn.Module, role: str = "main") -> None:
        """Count every forward of ``model`` (once, however often this is called).

        The scope's role, where it names one, stands before ``role``.
        """
        model = _unwrapped(model)
        if model in self._watched:
            return
        flops = 2.0 * active_parameters(model)

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            shape = (ids if ids is not None else kwargs["inputs_embeds"]).shape
            positions = int(shape[0] * shape[1])
            now = _SCOPE.get()
            backward = positions if now.phase == "train" and torch.is_grad_enabled() and module.training else 0
            self._row(now.role or role).add(
                forwards=1,
                positions=positions,
                padding=now.padding,
                prefill=now.prefill,
                backward=backward,
                flops=flops * (positions + 2 * backward),
            )

        self._watched[model] = model.register_forward_pre_hook(before, with_kwargs=True)

    def forget(self, model: torch.nn.Module) -> None:
        """Stop counting ``model``."""
        handle = self._watched.pop(_unwrapped(model), None)
        if handle is not None:
            handle.remove()

    def count(self, role: str = "main", **amounts: float) -> None:
        """Add to the row of the scope's phase and of ``role``: names of ``Count``'s fields and amounts."""
        self._row(_SCOPE.get().role or role).add(**amounts)

    def rows(self) -> dict[tuple[str, str], Count]:
        """A copy of all rows by ``(phase, role)``."""
        return {key: dataclasses.replace(row) for key, row in self._rows.items()}

    def total(self) -> Count:
        """All rows added up."""
        whole = Count()
        for row in self._rows.values():
            whole.add(**dataclasses.asdict(row))
        return whole

    def _row(self, role: str) -> Count:
        return self._rows.setdefault((_SCOPE.get().phase, role), Count())


def _unwrapped(model: Any) -> Any:
    # A peft wrapper calls the model inside: watching both would count twice.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_parameters(model: Any) -> int:
    """Parameters that multiply every position: experts by the share that a token is routed to, no bare look-up tables.

    Shared tensors count once. An input embedding counts only where it is the output layer too.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    experts = next(
        (n for k in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(text, k, 0))), 0
    )
    share = getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
    total = 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel() * (share if ".experts." in name else 1.0)
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(table, torch.nn.Embedding) and getattr(head, "weight", None) is not table.weight:
        total -= table.weight.numel()
    return int(total)
