"""Keys and values of the rows under way, in slots, and of rows that have ended, by token prefix.

``SlotCache`` holds all layers in two tensors, so that a row moves with one copy. It stands behind transformers'
``Cache``: a layer's ``update`` writes at each row's own positions and returns the slots of the rows in the forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from thrifty.contracts import ThriftyError


@dataclass(frozen=True)
class Layout:
    """What a model's cache looks like; read off a forward of one token by ``Layout.probe``."""

    layers: int
    keys: tuple[int, int]
    """(heads, head dimension) of the keys."""
    values: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    windows: tuple[int | None, ...]
    """Sliding window of every layer, None where it attends to everything."""

    @classmethod
    def probe(cls, model: Any) -> Layout:
        """Run one token through ``model``; ThriftyError unless every layer keeps plain keys and values."""
        cache = model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True
        ).past_key_values
        kind = type(model).__name__
        layers = getattr(cache, "layers", None) or []
        odd = next((type(x).__name__ for x in layers if type(x) not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
        if odd is not None or not layers or not all(layer.is_initialized for layer in layers):
            raise ThriftyError(
                f"{kind} keeps a cache of {odd or type(cache).__name__} layers; the local engine needs a key and a "
                "value per token in every layer (no state space, linear attention, shared layers): use another engine"
            )
        shapes = {(x.keys.shape[1], x.keys.shape[3], x.values.shape[1], x.values.shape[3]) for x in layers}
        if len(shapes) > 1:
            raise ThriftyError(
                f"{kind} has layers with caches of different shapes {sorted(shapes)}: use another engine"
            )
        kh, kd, vh, vd = shapes.pop()
        windows = tuple(getattr(layer, "sliding_window", None) for layer in layers)
        return cls(len(layers), (kh, kd), (vh, vd), layers[0].keys.dtype, layers[0].keys.device, windows)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        per_layer = self.keys[0] * self.keys[1] + self.values[0] * self.values[1]
        return self.layers * per_layer * self.dtype.itemsize


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: SlotCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Slots are allocated by ``SlotCache.reserve``."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.write(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Keys ``[layers, slots, heads, length, dim]`` and values alike; zeros where nothing was written.

    ``select`` says which slots the next forward runs; they are always neighbours, so that no copy is made.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.slots = self.capacity = self.length = 0
        self.keys = self._allocate(layout.keys, 0, 0)
        self.values = self._allocate(layout.values, 0, 0)
        super().__init__(layers=[_SlotLayer(self, i) for i in range(layout.layers)])

    def _allocate(self, heads: tuple[int, int], slots: int, capacity: int) -> Tensor:
        # Zeros, not garbage: a masked NaN would still spoil the attention's sum.
        shape = (self.layout.layers, slots, heads[0], capacity, heads[1])
        return torch.zeros(shape, dtype=self.layout.dtype, device=self.layout.device)

    def reserve(self, slots: int, length: int, used: int) -> None:
        """Make room for ``slots`` rows of ``length`` tokens; the first ``used`` slots are kept. Grows by doubling."""
        if slots <= self.slots and length <= self.capacity:
            return
        more = max(slots, self.slots) if slots <= self.slots else max(slots, min(2 * self.slots, slots + 64))
        wide = self.capacity if length <= self.capacity else max(64, 2 * self.capacity, -(-length // 64) * 64)
        for name, heads in (("keys", self.layout.keys), ("values", self.layout.values)):
            old, new = getattr(self, name), self._allocate(heads, more, wide)
            new[:, :used, :, : self.capacity] = old[:, :used]
            setattr(self, name, new)
        self.slots, self.capacity = more, wide

    def select(self, first: int, positions: Tensor, length: int) -> None:
        """The next forward runs slots ``first, first + 1, ...`` at ``positions [B, T]``; it reads ``length`` tokens."""
        self.first, self.positions, self.length = first, positions, length
        rows = positions.shape[0]
        self.rows = torch.arange(first, first + rows, device=positions.device)[:, None]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, heads, T, dim]`` and return ``[B, heads, length, dim]`` of the selected slots."""
        out = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store.transpose(1, 2)[self.rows, self.positions] = new.transpose(1, 2)
            out.append(store[self.first : self.first + new.shape[0], :, : self.length])
        return out[0], out[1]

    def mask(self, additive: bool) -> Tensor | dict[str, Tensor]:
        """What the selected rows may see, ``[B, 1, T, length]``: bool, or 0 and the dtype's minimum where ``additive``.

        A dict by layer type for models that mix sliding and full attention.
        """
        seen = torch.arange(self.length, device=self.positions.device)
        last = self.positions[:, None, :, None]
        masks: dict[int | None, Tensor] = {}
        for window in set(self.layout.windows):
            allowed = seen <= last
            if window is not None:
                allowed = allowed & (seen > last - window)
            if additive:
                lowest = torch.finfo(self.layout.dtype).min
                allowed = torch.zeros_like(allowed, dtype=self.layout.dtype).masked_fill_(~allowed, lowest)
            masks[window] = allowed
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {"full_attention" if window is None else "sliding_attention": mask for window, mask in masks.items()}

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` tokens of slots ``sources`` to ``targets`` (no slot in both)."""
        if not len(sources):
            return
        pairs = [torch.as_tensor(slots, device=self.layout.device) for slots in (sources, targets)]
        for store in (self.keys, self.values):
            store[:, pairs[1], :, :length] = store[:, pairs[0], :, :length]

    def read(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """A copy of one row's keys and values, ``[layers, heads, length, dim]``."""
        return self.keys[:, slot, :, :length].clone(), self.values[:, slot, :, :length].clone()

    def load(self, slot: int, keys: Tensor, values: Tensor, length: int) -> None:
        """Put the first ``length`` tokens of a kept row into a slot."""
        self.keys[:, slot, :, :length] = keys[:, :, :length]
        self.values[:, slot, :, :length] = values[:, :, :length]


@dataclass(eq=False)
class _Kept:
    space: Hashable
    tokens: np.ndarray
    keys: Tensor
    values: Tensor
    marks: list[int]
    pin: Any

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class PrefixCache:
    """Keys and values of rows that have ended, found by the longest common token prefix; the least used go first.

    ``space`` keeps apart what was computed by different weights (adapters and their strengths, patches). Looked up by a
    chained hash of blocks of ``BLOCK`` tokens, then compared token by token.
    """

    BLOCK = 8

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._marks: dict[int, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()
        self._marks.clear()
        self.bytes = 0

    def find(self, space: Hashable, tokens: np.ndarray) -> tuple[int, Tensor | None, Tensor | None]:
        """``(n, keys, values)``: how many leading ``tokens`` (int32) are kept, and the row that has them."""
        best = None
        for mark in self._chain(space, tokens):
            best = self._marks.get(mark, best)
        if best is None or best.space != space:
            return 0, None, None
        both = min(len(tokens), len(best.tokens))
        same = tokens[:both] == best.tokens[:both]
        length = both if same.all() else int(same.argmin())
        if length == 0:
            return 0, None, None
        self._kept.move_to_end(id(best))
        return length, best.keys, best.values

    def add(self, space: Hashable, tokens: np.ndarray, cache: SlotCache, slot: int, pin: Any = None) -> None:
        """Keep a copy of a slot whose ``tokens`` have all been read. ``pin`` is kept alive with it."""
        size = len(tokens) * cache.layout.token_bytes
        if len(tokens) < self.BLOCK or size > self.limit or self.find(space, tokens)[0] == len(tokens):
            return
        while self.bytes + size > self.limit:
            _, old = self._kept.popitem(last=False)
            self.bytes -= old.bytes
            for mark in old.marks:
                if self._marks.get(mark) is old:
                    del self._marks[mark]
        kept = _Kept(space, tokens, *cache.read(slot, len(tokens)), self._chain(space, tokens), pin)
        self._kept[id(kept)] = kept
        self.bytes += kept.bytes
        for mark in kept.marks:
            self._marks[mark] = kept

    def _chain(self, space: Hashable, tokens: np.ndarray) -> list[int]:
        mark, marks = hash(space), []
        for end in range(self.BLOCK, len(tokens) + 1, self.BLOCK):
            mark = hash((mark, tokens[end - self.BLOCK : end].tobytes()))
            marks.append(mark)
        return marks
