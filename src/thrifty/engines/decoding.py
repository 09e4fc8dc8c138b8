"""Rows whose request brings its own decoding loop (``contracts.Decoder``): drafts, trees, latent steps.

A decoder has no part in the slots: it keeps its own transformers caches and runs its rows to their end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from thrifty.contracts import ThriftyError
from thrifty.engines import sampling
from thrifty.engines.batch import Ended, Row
from thrifty.engines.meter import scope
from thrifty.engines.reader import Reader


@dataclass(frozen=True, eq=False)
class DecoderRow:
    """What a decoder is told of one row."""

    context: np.ndarray
    """Prompt and response so far, int32."""
    max_tokens: int
    temperature: float
    top_p: float
    eos: frozenset[int]
    start: int
    """Position of the first new token in the response: index into the row's random stream."""
    _stream: int

    def uniform(self, position: int) -> float:
        """The row's random number in [0, 1) for response position ``position``, the one plain decoding would use."""
        return float(sampling.uniforms(self._stream, position // sampling.BLOCK)[position % sampling.BLOCK])


def decode_rows(rows: Sequence[Row], readers: Mapping[str, Reader]) -> list[Ended]:
    """Run rows of one decoder; it yields ``(index, new token ids)`` once for every row."""
    decoder = rows[0].request.decoder
    assert decoder is not None
    started = time.perf_counter()
    rest = {i: row for i, row in enumerate(rows) if row.cap > 0 and (row.limit is None or row.limit > 0)}
    ended = [_end(row, np.zeros(0, np.int32), frozenset()) for i, row in enumerate(rows) if i not in rest]
    told = [
        DecoderRow(
            row.context, row.cap if row.limit is None else min(row.cap, row.limit), row.temperature, row.top_p,
            readers[row.request.role].loaded.eos, len(row.context) - row.prompt, row.stream,
        )
        for row in rest.values()
    ]  # fmt: skip
    waiting = list(rest.values())
    spent_on = set()

    def forward(
        role: str,
        rows: Sequence[int],
        ids: Tensor | None = None,
        embeds: Tensor | None = None,
        cache: Any = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        padding: int = 0,
        prefill: int = 0,
        hidden: bool = False,
    ) -> Any:
        """The model's output for ``rows``: indices, by which adapters and patches are found."""
        if role not in readers:
            raise ThriftyError(f"the decoder asks for role {role!r}; this engine has: {', '.join(readers)}")
        reader = readers[role]
        steering = reader.steering([waiting[i].request for i in rows])
        with contextlib.ExitStack() as stack:
            stack.enter_context(scope(role=role, padding=padding, prefill=prefill))
            if steering["adapters"]:
                stack.enter_context(reader.dial(steering["adapters"]))
            for patch, strength in steering["patches"]:
                stack.enter_context(patch.apply(reader.model, strength))
            return reader.model(
                input_ids=ids, inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, output_hidden_states=hidden,
            )  # fmt: skip

    for index, new in decoder.decode(told, forward):
        row = waiting[index]
        if index in spent_on:
            raise ThriftyError(f"{type(decoder).__name__} yielded row {index} twice: yield every row once")
        spent_on.add(index)
        row.read, row.seconds = len(row.context), (time.perf_counter() - started) / len(rows)
        ended.append(_end(row, np.asarray(new, np.int32)[: told[index].max_tokens], told[index].eos))
    if len(spent_on) < len(waiting):
        raise ThriftyError(f"{type(decoder).__name__} left {len(waiting) - len(spent_on)} rows without an answer")
    return ended


def _end(row: Row, new: np.ndarray, eos: frozenset[int]) -> Ended:
    unknown = np.full(len(new), np.nan, np.float32)
    if len(new) and int(new[-1]) in eos:
        return Ended(row, "stop", new, unknown, unknown)
    cancelled = row.limit is not None and row.limit < row.cap and len(new) >= row.limit
    return Ended(row, "cancelled" if cancelled else row.full, new, unknown, unknown)
