"""Rows whose request brings its own decoding loop (``contracts.Decoder``): drafts, trees, latent steps.

A decoder has no part in the slots: it keeps its own transformers caches. What ends a row (end-of-sequence, stop
strings, limits) is the engine's affair here as everywhere, so a decoder only says which tokens come next.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thrifty.contracts import Finish, ThriftyError
from thrifty.engines import sampling
from thrifty.engines.batch import Batch, Ended, Row
from thrifty.engines.meter import scope


@dataclass(frozen=True, eq=False)
class DecoderRow:
    """What a decoder is told of one row."""

    role: str
    """The model it runs on, the same for all rows of a ``decode``."""
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


class Decoding:
    """Rows of one decoder and one role under way; ``batches`` are the models by role."""

    def __init__(self, rows: Sequence[Row], batches: dict[str, Batch]) -> None:
        self.batches, self.role = batches, rows[0].request.role
        decoder = rows[0].request.decoder
        assert decoder is not None
        self.name = type(decoder).__name__
        loaded = batches[self.role].loaded
        self.meter = batches[self.role].meter
        _check_windows(self.name, batches[self.role], rows)
        self.rows = dict(enumerate(rows))
        """Those that have not ended, by the index that the decoder knows them by."""
        self.all = list(rows)
        self.new: list[list[int]] = [[] for _ in rows]
        self.drafting: set[int] = set()
        self.stops = sampling.Stops(loaded.tokenizer, batches[self.role].reader.vocabulary)
        self.forwards = 0
        self.answer: bool | None = None  # what the generator waits for
        told = [
            DecoderRow(
                self.role, row.context, row.cap, row.temperature, row.top_p, loaded.eos,
                len(row.context) - row.prompt, row.stream,
            )
            for row in rows
        ]  # fmt: skip
        self.talk: Generator[tuple[int, Sequence[int]], bool | None, None] = decoder.decode(told, self.forward)

    @property
    def busy(self) -> bool:
        return bool(self.rows)

    def advance(self, forwards: int) -> list[Ended]:
        """Work for so many forwards, less when a row ends; the rows that have ended."""
        started, until = time.perf_counter(), self.forwards + forwards
        working = list(self.rows.values())
        full = [i for i, row in self.rows.items() if len(self.new[i]) >= self._room(row)]
        ended = [self._end(i, self._why_full(self.rows[i])) for i in full]
        while self.rows and not ended and self.forwards < until:
            try:
                index, ids = self.talk.send(self.answer)
            except StopIteration:
                raise ThriftyError(
                    f"{self.name} left {len(self.rows)} rows without an end: it must go on until all have ended"
                ) from None
            if index not in range(len(self.all)):
                raise ThriftyError(f"{self.name} yielded row {index} of {len(self.all)}")
            if index not in self.rows:  # stopped from outside while this forward ran: nobody uses its position
                self.meter.count(self.role, padding=min(1, len(ids)))
            elif (finish := self._take(index, [int(i) for i in ids])) is not None:
                ended.append(self._end(index, finish))
            self.answer = index not in self.rows
        for row in working:
            row.seconds += (time.perf_counter() - started) / len(working)
        if not self.rows:
            self.talk.close()
        return ended

    def _take(self, index: int, ids: Sequence[int]) -> Finish | None:
        """Append what a row may have of ``ids``; why it ends, None where it does not."""
        row, new = self.rows[index], self.new[index]
        before = len(new)
        finish: Finish | None = None
        for token in ids:
            new.append(token)
            if token in self.batches[self.role].loaded.eos:
                finish = "stop"
            elif row.stops and self.stops.hit(row.stops, np.array([*row.context[row.prompt :], *new], np.int32)):
                finish = "until"
            elif len(new) >= self._room(row):
                finish = self._why_full(row)
            if finish is not None:
                break
        if index in self.drafting:
            # A forward yields one token of its own; whatever else is kept of it was drafted.
            self.drafting.discard(index)
            self.meter.count(self.role, accepted=max(0, len(new) - before - 1))
        return finish

    @staticmethod
    def _room(row: Row) -> int:
        return row.cap if row.limit is None else min(row.cap, row.limit)

    @staticmethod
    def _why_full(row: Row) -> Finish:
        return row.full if row.limit is None or row.limit >= row.cap else "cancelled"

    def _end(self, index: int, finish: Finish) -> Ended:
        unknown = np.full(len(self.new[index]), np.nan, np.float32)
        return Ended(self.rows.pop(index), finish, np.array(self.new[index], np.int32), unknown, unknown)

    def forward(
        self,
        role: str,
        rows: Sequence[int],
        ids: Tensor | None = None,
        embeds: Tensor | None = None,
        cache: Any = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        padding: int = 0,
        prefill: int = 0,
        drafted: int = 0,
        latent: bool = False,
        hidden: bool = False,
        keep: int = 0,
    ) -> Any:
        """The model's output for ``rows``: indices, by which adapters and patches are found.

        ``ids`` ``[B, T]`` or ``embeds`` ``[B, T, d]``; ``mask`` is bool ``[B, 1, T, length]`` or as the model takes it.
        Of the ``B * T`` positions so many are ``padding``, ``prefill`` (a context read up to its last token) and
        ``drafted``; ``latent`` says that all are latent steps. ``hidden`` asks for all layers' hidden states, ``keep``
        for logits of the last so many positions only (0: all). Tensors are moved to the model's device.
        """
        if role not in self.batches:
            raise ThriftyError(f"the decoder asks for role {role!r}; this engine has: {', '.join(self.batches)}")
        reader = self.batches[role].reader
        given = ids if ids is not None else embeds
        assert given is not None, "a forward needs ids or embeds"
        self.forwards += 1
        for i in rows:
            row = self.all[i]
            row.read = len(row.context)
            row.latent += given.shape[1] if latent else 0
        device = reader.device
        ids, embeds, positions, mask = (None if x is None else x.to(device) for x in (ids, embeds, positions, mask))
        more = {"logits_to_keep": keep} if keep and reader.few_logits else {}
        if drafted:
            self.drafting |= set(rows)
        self.meter.count(role, drafted=drafted, latent=given.shape[0] * given.shape[1] if latent else 0)
        if mask is not None and mask.dtype == torch.bool and mask.ndim == 4 and reader.additive:
            lowest = torch.finfo(reader.model.dtype).min
            mask = torch.zeros_like(mask, dtype=reader.model.dtype).masked_fill_(~mask, lowest)
        with contextlib.ExitStack() as stack:
            stack.enter_context(scope(role=role, padding=padding, prefill=prefill))
            reader.steer(stack, reader.steering([self.all[i].request for i in rows]))
            return reader.model(
                input_ids=ids, inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, output_hidden_states=hidden, **more,
            )  # fmt: skip


class Decoders:
    """All decoders of an engine: their rows wait, and at most ``Batch.size`` of one decoder and role run at once."""

    def __init__(self, batches: dict[str, Batch]) -> None:
        self.batches = batches
        self.waiting: dict[tuple[int, str], list[Row]] = {}
        self.running: dict[tuple[int, str], Decoding] = {}

    def add(self, row: Row) -> None:
        self.waiting.setdefault((id(row.request.decoder), row.request.role), []).append(row)

    def advance(self) -> list[Ended]:
        """One more forward for every decoder; the rows that have ended."""
        for key in [key for key in self.waiting if key not in self.running]:
            size = self.batches[key[1]].size
            rows, rest = self.waiting[key][:size], self.waiting.pop(key)[size:]
            self.running[key] = Decoding(rows, self.batches)
            if rest:
                self.waiting[key] = rest
        ended = [one for decoding in self.running.values() for one in decoding.advance(1)]
        self.running = {key: decoding for key, decoding in self.running.items() if decoding.busy}
        return ended

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


def _check_windows(name: str, batch: Batch, rows: Sequence[Row]) -> None:
    """Raise ThriftyError where a row may outgrow a layer's window: a decoder's mask is the same in all layers."""
    window = min((size for size in batch.reader.layout.windows if size is not None), default=None)
    longest = max(len(row.context) + row.cap for row in rows)
    if window is not None and longest > window:
        raise ThriftyError(
            f"{batch.loaded.name} has layers that look back {window} tokens at most, which decoder {name} does not "
            f"follow, and a row may grow to {longest} tokens: lower max_tokens, or leave the decoder out"
        )
