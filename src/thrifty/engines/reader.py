"""One model with its cache: forwards of given text, with the adapters and patches of every row.

A context is read up to its last token; that one is fed in the first decode step, so decode positions are the generated
tokens exactly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thrifty.contracts import Hidden, Score, ThriftyError
from thrifty.engines.cache import Layout, PrefixCache, SlotCache
from thrifty.engines.meter import Meter, scope
from thrifty.models.load import Loaded
from thrifty.models.strength import Dial

READ_POSITIONS = 8192
"""At most so many positions are read in one forward."""
SCORE_LOGITS = 1 << 26
"""At most so many logits are kept at once when text is scored."""


@dataclass(eq=False)
class ScoreRow:
    """One ``Score`` or ``Hidden`` under way; ``context`` (prompt and prefix) and ``texts`` are int32 token ids."""

    ticket: int
    request: Score | Hidden
    context: np.ndarray
    texts: list[np.ndarray]
    space: Hashable
    values: list[Any] = field(default_factory=list)
    read: int = 0
    cached: int = 0
    seconds: float = 0.0

    @property
    def layer(self) -> int | None:
        """Whose hidden states are asked for; None for log-probabilities."""
        return self.request.layer if isinstance(self.request, Hidden) else None


class Reader:
    """The model of one role. ``prefix_bytes`` is what ended rows may keep in memory."""

    def __init__(self, loaded: Loaded, role: str, meter: Meter, prefix_bytes: int) -> None:
        model = loaded.model
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.loaded, self.role = loaded, role
        self.device = loaded.device
        kind = type(self.model).__name__
        accepted = inspect.signature(self.model.forward).parameters
        if "position_ids" not in accepted:
            raise ThriftyError(f"{kind} takes no position_ids, so rows of unlike length cannot share its forward")
        attention = self.model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ThriftyError(f"attention {attention!r} takes no mask: load {kind} with attn_implementation='sdpa'")
        self.additive = attention == "eager"
        self.few_logits = "logits_to_keep" in accepted
        meter.forget(self.model)  # the probe costs a position that nobody asked for
        with torch.inference_mode():
            self.layout = Layout.probe(self.model)
        meter.watch(self.model, role)
        self.prefixes = PrefixCache(prefix_bytes)
        self.reset()

    def reset(self) -> None:
        """Forget all keys and values, and look for adapters anew: call it when the weights have changed."""
        self.cache = SlotCache(self.layout)
        self.prefixes.clear()
        self.dial = Dial(self.model)

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def steering(self, requests: Sequence[Any]) -> dict[str, Any]:
        """Adapter strengths and patches of the rows of a forward, as tensors ``[B]``."""

        def rows(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        adapters = {name: rows([r.adapters.get(name, 0.0) for r in requests]) for name in self.dial.names}
        patches: dict[int, tuple[Any, list[float]]] = {}
        for i, request in enumerate(requests):
            for patch, strength in getattr(request, "patches", ()):
                patches.setdefault(id(patch), (patch, [0.0] * len(requests)))[1][i] += strength
        return {"adapters": adapters, "patches": [(patch, rows(s)) for patch, s in patches.values()]}

    def forward(
        self, ids: Tensor, positions: Tensor, first: int, length: int, steering: dict[str, Any], keep: int = 1,
        padding: int = 0, prefill: int = 0, layer: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Run slots ``first`` and on; logits ``[B, keep, V]`` of the last ``keep`` positions (0: of all).

        Given ``layer``, the hidden states ``[B, T, d]`` after it instead.
        """
        self.cache.select(first, positions, length)
        more = {"logits_to_keep": keep} if keep and self.few_logits else {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(scope(role=self.role, padding=padding, prefill=prefill))
            self.steer(stack, steering)
            output = self.model(
                input_ids=ids,
                attention_mask=self.cache.mask(self.additive),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=layer is not None,
                **more,
            )
        result: Tensor = output.logits if layer is None else output.hidden_states[layer + 1]
        return result[:, -keep:] if keep and layer is None else result

    def steer(self, stack: contextlib.ExitStack, steering: dict[str, Any]) -> None:
        """Turn on what ``steering`` found, until ``stack`` is left."""
        if steering["adapters"]:
            stack.enter_context(self.dial(steering["adapters"]))
        for patch, strength in steering["patches"]:
            stack.enter_context(patch.apply(self.model, strength))

    def fill(self, first: int, items: Sequence[Any]) -> list[Any]:
        """Read each item's context but its last token into slots ``first`` and on; return the items in slot order.

        Sets ``cached`` and ``read`` (tokens of the context from the cache, and anew). The slots must be reserved.
        """
        found = [self.prefixes.find(item.space, item.context[:-1]) for item in items]
        order = sorted(range(len(items)), key=lambda i: len(items[i].context) - found[i][0])
        for slot, i in enumerate(order, first):
            length, keys, values = found[i]
            if keys is not None and values is not None:
                self.cache.load(slot, keys, values, length)
            items[i].cached, items[i].read = length, len(items[i].context) - length
        placed = [items[i] for i in order]
        begin = next((i for i, item in enumerate(placed) if item.read > 1), len(placed))
        while begin < len(placed):
            # Rows of like length together: at most half of a forward is padding.
            end = begin + 1
            while (
                end < len(placed)
                and (placed[end].read - 1) <= 2 * (placed[begin].read - 1)
                and (end + 1 - begin) * (placed[end].read - 1) <= READ_POSITIONS
            ):
                end += 1
            part = placed[begin:end]
            self._read(first + begin, part)
            for slot, item in enumerate(part, first + begin):
                pin = getattr(item.request, "patches", ())
                self.prefixes.add(item.space, item.context[:-1], self.cache, slot, pin)
            begin = end
        return placed

    def _read(self, first: int, items: Sequence[Any]) -> None:
        news = [item.context[item.cached : -1] for item in items]
        width = max(map(len, news))
        ids = np.zeros((len(items), width), np.int64)
        for i, new in enumerate(news):
            ids[i, : len(new)] = new
        positions = np.array([item.cached for item in items])[:, None] + np.arange(width)
        count = sum(map(len, news))
        self.forward(
            torch.from_numpy(ids).to(self.device), torch.from_numpy(positions).to(self.device), first,
            int(positions.max()) + 1, self.steering([item.request for item in items]),
            padding=ids.size - count, prefill=count,
        )  # fmt: skip

    def score(self, rows: Sequence[ScoreRow], first: int) -> None:
        """Set the ``values`` of ``rows``, using slots ``first`` and on.

        A value is the sum of log p(token | what stands before it) over a continuation's tokens, or for ``Hidden`` the
        hidden state ``[d]`` at the last position that was read.
        """
        heads: dict[tuple[Hashable, bytes], ScoreRow] = {}
        for row in rows:
            heads.setdefault((row.space, row.context.tobytes()), row)
        jobs = sorted(
            ((row, k) for row in rows for k in range(len(row.texts))),
            key=lambda job: (-1 if job[0].layer is None else job[0].layer, len(job[0].texts[job[1]])),
        )
        longest = max(len(row.context) + max(map(len, row.texts), default=0) for row in rows)
        base = first + len(heads)
        self.cache.reserve(base + len(jobs), 2 * longest, first)
        placed = self.fill(first, list(heads.values()))
        slot_of = {(head.space, head.context.tobytes()): slot for slot, head in enumerate(placed, first)}
        for row in rows:
            row.values = [0.0] * len(row.texts)
            if heads[row.space, row.context.tobytes()] is not row:
                row.cached, row.read = len(row.context) - 1, 1
            row.read += sum(map(len, row.texts)) - 1
        begin = next((i for i, (row, k) in enumerate(jobs) if len(row.texts[k])), len(jobs))  # none to read: 0.0
        while begin < len(jobs):
            end = begin + 1
            while end < len(jobs) and self._fits(jobs[begin], jobs[end], end + 1 - begin):
                end += 1
            self._score(jobs[begin:end], slot_of, base)
            begin = end

    def _fits(self, shortest: tuple[ScoreRow, int], job: tuple[ScoreRow, int], count: int) -> bool:
        width = len(job[0].texts[job[1]])
        return (
            job[0].layer == shortest[0].layer
            and width <= 2 * len(shortest[0].texts[shortest[1]])
            and count * width <= min(READ_POSITIONS, SCORE_LOGITS // self.vocabulary)
        )

    def _score(
        self, jobs: Sequence[tuple[ScoreRow, int]], slot_of: dict[tuple[Hashable, bytes], int], base: int
    ) -> None:
        texts = [row.texts[k] for row, k in jobs]
        width = max(map(len, texts))
        ids = np.zeros((len(jobs), width), np.int64)
        targets = np.zeros((len(jobs), width), np.int64)
        for i, (row, _) in enumerate(jobs):
            ids[i, : len(texts[i])] = np.concatenate([row.context[-1:], texts[i][:-1]])
            targets[i, : len(texts[i])] = texts[i]
        starts = np.array([len(row.context) - 1 for row, _ in jobs])
        sources = [slot_of[row.space, row.context.tobytes()] for row, _ in jobs]
        self.cache.copy(sources, range(base, base + len(jobs)), int(starts.max()))
        positions = starts[:, None] + np.arange(width)
        count = sum(map(len, texts))
        layer = jobs[0][0].layer
        out = self.forward(
            torch.from_numpy(ids).to(self.device), torch.from_numpy(positions).to(self.device), base,
            int(positions.max()) + 1, self.steering([row.request for row, _ in jobs]), keep=0 if layer is None else 1,
            padding=ids.size - count, prefill=count, layer=layer,
        )  # fmt: skip
        if layer is not None:
            for i, (row, k) in enumerate(jobs):
                row.values[k] = out[i, len(texts[i]) - 1].float().cpu().numpy()
            return
        wanted = torch.from_numpy(targets).to(self.device)[:, :, None]
        chances = out.float().log_softmax(-1).gather(2, wanted)[:, :, 0].double().cpu().numpy()
        for i, (row, k) in enumerate(jobs):
            row.values[k] = float(chances[i, : len(texts[i])].sum())
