"""A control in plain ``model.generate``, as a logits processor.

Order is that of our engine: model, controls, then temperature and top-p. A forced token gets all the probability; a row
that a control stops gets end-of-sequence forced, which ``generate`` ends rows at, where our engine writes nothing.

>>> processor = ControlProcessor([control], tokenizer)                                     # doctest: +SKIP
>>> model.generate(**inputs, logits_processor=[processor], max_new_tokens=512)             # doctest: +SKIP
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from thrifty.contracts import Control, Tail, ThriftyError


@dataclass(eq=False)
class _Row:
    states: list[Any]
    forced: deque[int] = field(default_factory=deque)
    ending: bool = False


class ControlProcessor(LogitsProcessor):
    """``controls`` over all rows of one call of ``generate``: any batch, padded on the left, greedy or sampling.

    Every row has states of its own; a control sees what was written since the prompt. ``eos`` are the token ids that
    end a row, the tokenizer's own where none are given: give those of the model's generation config where it has more.
    Raises ThriftyError where it is used for a second call, and with beams, which move rows about.
    """

    supports_continuous_batching = False

    def __init__(self, controls: Sequence[Control], tokenizer: Any, eos: Collection[int] = ()) -> None:
        self.controls, self.tokenizer = controls, tokenizer
        self.eos = list(eos) or ([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])
        if not self.eos:
            raise ThriftyError("the tokenizer has no end-of-sequence token, so a stopped row could not end: give eos")
        self._rows: list[_Row] = []
        self._prompt = 0
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` ``[B, T]`` with the prompt, ``scores`` ``[B, V]`` of the next token; the scores as steered."""
        self._follow(input_ids)
        responses = input_ids[:, self._prompt :].tolist()
        scores = scores.clone()
        live = []
        for i, (row, ids) in enumerate(zip(self._rows, responses)):
            row.ending = row.ending or bool(ids and ids[-1] in self.eos)
            if not row.ending and not row.forced:
                live.append(i)
        for k, control in enumerate(self.controls if live else ()):
            tails = [Tail(responses[i], len(responses[i])) for i in live]
            states = [self._rows[i].states[k] for i in live]
            changed, forced, stop, states = control.step(tails, scores[live], states)
            scores[live] = changed.to(scores.dtype)
            for i, tokens, ends, state in zip(live, forced, stop, states, strict=True):
                self._rows[i].states[k] = state
                self._rows[i].forced.extend(tokens)
                self._rows[i].ending = self._rows[i].ending or ends
        for i, row in enumerate(self._rows):
            if row.forced or row.ending:
                token = row.forced.popleft() if row.forced else self.eos[0]
                scores[i] = torch.full_like(scores[i], -torch.inf)
                scores[i, token] = 0.0
        return scores

    def _follow(self, input_ids: Tensor) -> None:
        """Open the rows at the first step; refuse whatever is not one more token to each of them."""
        if self._last is None:
            self._prompt = input_ids.shape[1]
            self._rows = [_Row([c.start(self.tokenizer) for c in self.controls]) for _ in range(len(input_ids))]
        elif input_ids[:, :-1].shape != self._last.shape or not torch.equal(input_ids[:, :-1], self._last):
            raise ThriftyError(
                "a ControlProcessor is for one call of generate, without beams: make a new one for every call"
            )
        self._last = input_ids
