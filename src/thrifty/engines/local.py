"""The transformers engine: continuous batching over any causal language model with a plain key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thrifty.contracts import (
    END_OF_THOUGHT,
    Hidden,
    Prompt,
    RowFailed,
    Sample,
    Score,
    Scores,
    Span,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines import sampling
from thrifty.engines.adapters import Adapters
from thrifty.engines.batch import Batch, Ended, Row
from thrifty.engines.capabilities import CAPABILITIES, caps, check_row
from thrifty.engines.decoding import Decoders
from thrifty.engines.meter import Meter
from thrifty.engines.reader import ScoreRow
from thrifty.models.load import Loaded

SLICE = 16
"""Decoding steps per poll."""


class LocalEngine:
    """Runs ``loaded`` (one model, or several by role) on its own device. Implements ``contracts.Engine``.

    ``batch_size`` rows run at once per role. ``temperature`` and ``top_p`` hold where a request names none;
    ``max_tokens`` limits every response, which without any may fill the context. ``prefix_bytes`` bounds the memory in
    which ended rows stay, so that continuing them costs nothing. The meter counts every forward of the models.
    """

    name = "local"
    capabilities = CAPABILITIES["local"]

    def __init__(
        self,
        loaded: Loaded | Mapping[str, Loaded],
        batch_size: int = 64,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        prefix_bytes: int = 256 << 20,
        meter: Meter | None = None,
    ) -> None:
        roles = loaded if isinstance(loaded, Mapping) else {"main": loaded}
        if not roles or batch_size < 1:
            raise ThriftyError(f"a local engine needs a model and a batch size of 1 or more, not {batch_size}")
        self.seed, self.temperature, self.top_p, self.max_tokens = seed, temperature, top_p, max_tokens
        self.meter = meter if meter is not None else Meter()
        self.batches = {role: Batch(one, role, self.meter, batch_size, prefix_bytes) for role, one in roles.items()}
        self._first = next(iter(self.batches))
        self._rows: dict[int, Row] = {}
        self._decoders = Decoders(self.batches)
        self._ended: list[Ended] = []
        self._adapters = {role: Adapters(batch.reader, batch.loaded) for role, batch in self.batches.items()}

    # What the runner calls -------------------------------------------------------------------------------

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        """Queue one row; ThriftyError where it cannot run (unknown role or adapter).

        Where prompt and response so far are longer than the model's context, the row alone fails: ``RowFailed``.
        """
        batch = self._batch(request.role)
        request = replace(request, adapters=self._adapters[request.role].resolve(request.adapters))
        chat = batch.loaded.chat
        prompt = chat.prompt_ids(request.prompt)
        # Rows share keys and values only where the same weights made them.
        strengths = tuple(sorted(request.adapters.items()))
        patches = tuple((id(patch), float(s)) for patch, s in getattr(request, "patches", ()) if s)
        space = (strengths, patches)
        if isinstance(request, Score):
            texts = [np.array(self._ids(batch, text), np.int32) for text in request.continuations]
            context = self._context(batch, key, prompt, request.prefix, (), max(map(len, texts), default=0))
            batch.scores.append(ScoreRow(ticket, request, context, texts, space))
            return
        if isinstance(request, Hidden):
            layers = batch.loaded.model.config.get_text_config(decoder=True).num_hidden_layers
            if not 0 <= request.layer < layers:
                raise ThriftyError(f"{batch.loaded.name} has layers 0 to {layers - 1}, no layer {request.layer}")
            # Scoring reads a text up to its last token; one more behind it, never read, has that one read too.
            texts = [np.array([*self._ids(batch, text), 0], np.int32) for text in request.texts]
            context = self._context(batch, key, prompt, request.prefix, (), max(map(len, texts), default=1) - 1)
            batch.scores.append(ScoreRow(ticket, request, context, texts, space))
            return
        temperature, top_p = check_row(request, self.temperature, self.top_p)
        if request.decoder is not None and (request.controls or request.want):
            raise ThriftyError("a decoder takes no controls and hands back no log-probabilities: drop them")
        injected = self._ids(batch, request.inject.replace(END_OF_THOUGHT, chat.close))
        context = self._context(batch, key, prompt, request.prefix, injected, 0)
        room = None if batch.loaded.context is None else batch.loaded.context - len(context)
        limits = caps(request, self.max_tokens, len(injected))
        if room is not None:
            limits.append((room, "context"))
        if not limits:
            raise ThriftyError(f"model {batch.loaded.name} names no context length: give max_tokens")
        cap, full = min(limits, key=lambda pair: pair[0])
        row = Row(
            ticket, request, context, len(prompt), len(injected), cap, full,
            tuple(stop.replace(END_OF_THOUGHT, chat.close) for stop in request.until),
            sampling.stream(self.seed, key), space,
            temperature=temperature, top_p=top_p,
        )  # fmt: skip
        self._rows[ticket] = row
        if request.decoder is None:
            batch.queue.append(row)
        else:
            self._decoders.add(row)

    def poll(self) -> list[tuple[int, Trace | Scores]]:
        """At most ``SLICE`` steps, fewer where a row ends: limits and cancellations get through between slices.

        What is raised here comes from a control, a patch, a decoder or the model. All rows are dropped then: the engine
        can be used again.
        """
        try:
            return self._polled()
        except Exception:
            self._drop()
            raise

    def _polled(self) -> list[tuple[int, Trace | Scores]]:
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            for adapters in self._adapters.values():
                stack.enter_context(adapters.on())
            done = [reply for batch in self.batches.values() for reply in self._scored(batch)]
            for _ in range(SLICE):
                for batch in self.batches.values():
                    self._ended += batch.ended
                    batch.ended = []
                if self._ended or done or not self.busy:
                    break
                self._ended += self._decoders.advance()
                for batch in self.batches.values():
                    batch.admit()
                    batch.step()
        ended, self._ended = self._ended, []
        return [*done, *((one.row.ticket, self._trace(one)) for one in ended)]

    def limit(self, ticket: int, tokens: int) -> None:
        """End the row as "cancelled" once it has ``tokens`` new tokens, injected ones included."""
        row = self._rows.get(ticket)
        if row is not None:
            with torch.inference_mode():
                self._batch(row.request.role).cap(row, max(0, tokens - row.injected))

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        """The opening and closing tag of a chain; ("", "") for a model whose tokenizer and template name none."""
        chat = self.batches[self._first].loaded.chat
        return (chat.open, chat.close) if chat.declared else ("", "")

    def encode(self, text: str) -> list[int]:
        """Token ids of text that continues a response."""
        return self._ids(self.batches[self._first], text)

    # Weights ---------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, source: str | Path, role: str = "main") -> None:
        """Load the LoRA saved in folder ``source``; ``Sample.adapters`` sets its strength by ``name``.

        Raises ThriftyError where the folder holds no LoRA that takes a strength per row.
        """
        self._batch(role)
        self._adapters[role].add(name, Path(source))

    def reset(self) -> None:
        """Forget what ended rows left: call it when weights or adapters were changed from outside."""
        if self.busy:
            raise ThriftyError("rows are under way: poll until they have ended before the weights change")
        for batch in self.batches.values():
            batch.reader.reset()
        for adapters in self._adapters.values():
            adapters.forget()

    # Inside ----------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a row is under way, or has ended and was not handed out yet."""
        rows = any(batch.busy or batch.ended for batch in self.batches.values())
        return bool(rows or self._ended or self._decoders.busy)

    def _batch(self, role: str) -> Batch:
        if role not in self.batches:
            raise ThriftyError(f"no model for role {role!r}; this engine has: {', '.join(self.batches)}")
        return self.batches[role]

    @staticmethod
    def _ids(batch: Batch, text: str) -> list[int]:
        return list(batch.loaded.tokenizer.encode(text, add_special_tokens=False)) if text else []

    @staticmethod
    def _context(
        batch: Batch, key: tuple[Hashable, ...], prompt: Sequence[int], prefix: Any, injected: Sequence[int], more: int
    ) -> np.ndarray:
        context = np.concatenate([np.asarray(part, np.int32) for part in (prompt, prefix, injected)])
        limit = batch.loaded.context
        if not len(context):
            raise ThriftyError(f"empty prompt for {key}: there is no token to start from")
        if limit is not None and len(context) + more > limit:
            raise RowFailed(
                f"{key}: the prompt has {len(prompt)} tokens, the response so far {len(context) - len(prompt) + more}; "
                f"together they exceed the {limit} tokens of {batch.loaded.name}'s context: shorten the prompt"
            )
        return context

    def _drop(self) -> None:
        """Forget all rows: after a fault in the middle of a step nobody knows what state they are in."""
        self._rows.clear()
        self._ended = []
        self._decoders = Decoders(self.batches)
        for batch in self.batches.values():
            batch.queue.clear()
            batch.scores.clear()
            batch.rows.clear()
            batch.ended.clear()

    def _scored(self, batch: Batch) -> list[tuple[int, Scores]]:
        replies = []
        for row in batch.score():
            usage = Usage(prompt=row.read, cached=row.cached, calls=1, seconds=row.seconds)
            self._count(batch.role, usage)
            replies.append((row.ticket, Scores(row.values, usage)))
        return replies

    def _trace(self, ended: Ended) -> Trace:
        row, request = ended.row, ended.row.request
        del self._rows[row.ticket]
        chat = self._batch(request.role).loaded.chat
        ids = np.concatenate([row.context[row.prompt :], ended.ids])
        start = len(row.context) - row.prompt - row.injected
        text = chat.decode(ids.tolist())
        thought, response, closed = chat.split(text)
        # Everything up to the closing tag, tag included, is thought.
        cut = len(ids) if not closed else chat.cut(ids) if chat.close in text else 0
        forced = np.zeros(len(ids), bool)
        forced[start : start + row.injected] = True
        forced[[start + row.injected + at for at in row.forced_at]] = True
        sampled = np.flatnonzero(~forced[start:]) + start
        inside = int((sampled < cut).sum())
        ran = len(ended.ids) > 0 or row.read > 0 or row.cached > 0
        usage = Usage(
            prompt=row.read,
            cached=row.cached,
            thought=inside,
            answer=len(sampled) - inside,
            injected=int(forced.sum()) if ran else 0,
            discarded=len(sampled) if ended.finish == "cancelled" else 0,
            calls=int(ran),
            seconds=row.seconds,
            latent=row.latent,
        )
        self._count(request.role, usage)
        unknown = np.full(row.injected, np.nan, np.float32)
        return Trace(
            ids=ids, thought=thought, response=response, closed=closed, finish=ended.finish, start=start,
            spans=_spans(start, cut, forced),
            logprobs=np.concatenate([unknown, ended.logprobs]) if "logprobs" in request.want else None,
            entropies=np.concatenate([unknown, ended.entropies]) if "entropies" in request.want else None,
            usage=usage, prompt_ids=row.context[: row.prompt],
        )  # fmt: skip

    def _count(self, role: str, usage: Usage) -> None:
        self.meter.count(
            role, prompt=usage.prompt, cached=usage.cached, thought=usage.thought, answer=usage.answer,
            injected=usage.injected, discarded=usage.discarded, calls=usage.calls, seconds=usage.seconds,
        )  # fmt: skip


def _spans(start: int, cut: int, forced: np.ndarray) -> tuple[Span, ...]:
    """Runs of tokens of one kind and origin among the new ones."""
    kinds = [("thought" if i < cut else "answer", bool(forced[i])) for i in range(start, len(forced))]
    edges = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    spans = []
    for begin, end in zip([0, *edges], [*edges, len(kinds)]):
        if end > begin:
            kind, put_in = kinds[begin]
            spans.append(Span(start + begin, start + end, kind, "injected" if put_in else "sampled"))  # type: ignore[arg-type]
    return tuple(spans)
