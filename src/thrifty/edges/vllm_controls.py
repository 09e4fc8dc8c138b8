"""Our controls as vLLM's logits processors, for both of its interfaces.

vLLM 0.33 has two, which refuse each other's classes: V1 (``vllm.v1.sample.logits_processor``) and V2, of the model
runner that it uses wherever it can. Installed beside vLLM, ``Controls`` is found by the entry point
``vllm.logits_processors`` and stands for the one that is running:

    vllm serve MODEL --logits-processors thrifty.edges.vllm_controls:Controls
    "vllm_xargs": {"thrifty": "{\\"controls\\": [{\\"control\\": \\"my-method\\", \\"patience\\": 64}]}"}

With V2 the entry point is enough. V1 schedules ahead and shows plug-ins placeholders in place of tokens, unless the
class is given with ``--logits-processors`` as well; and with V1 there are no processors under speculation. Order is
that of our engine: model, controls, then temperature and top-p; vLLM's ``thinking_token_budget`` comes after and wins.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.sample.logits_processor import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from thrifty.contracts import ThriftyError
from thrifty.engines._vllm_controls import ARGUMENT, ControlledRow, Steering, read, steer

_SERVED: list[weakref.ref[Any]] = []
"""Configurations of engines that have a processor of ours."""


class _Requests:
    """What both interfaces share: which requests are steered."""

    def _open(self, vllm_config: Any) -> None:
        self.config = vllm_config
        self.rows: dict[int, ControlledRow] = {}
        self.tokenizer: Any = None
        _SERVED[:] = [served for served in _SERVED if served() is not None]
        # Found by entry point and by name it is built twice; only the first may act.
        self.idle = any(served() is vllm_config for served in _SERVED)
        _SERVED.append(weakref.ref(vllm_config))

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which a client gets as a 400, where a request names its controls wrongly."""
        try:
            _steering(sampling_params)
        except ThriftyError as error:
            raise ValueError(str(error)) from error

    def _row(self, params: Any) -> ControlledRow | None:
        steering = None if self.idle else _steering(params)
        if steering is None:
            return None
        if self.tokenizer is None:
            self.tokenizer = cached_tokenizer_from_config(self.config.model_config)
        ends = (params.eos_token_id, self.tokenizer.eos_token_id, steering.halt, 0)
        return ControlledRow(steering, self.tokenizer, next(token for token in ends if token is not None))


class ControlsV1(_Requests, V1Processor):
    """For vLLM's first model runner: requests move about in the batch, and bring their running token lists."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._open(vllm_config)
        self.tokens: dict[int, tuple[list[int], list[int]]] = {}
        """By place in the batch: the response's part of the prompt, and vLLM's own list of what came after."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._put(index, None)
        for index, params, prompt, output in batch_update.added:
            row = self._row(params)
            self._put(index, None if row is None else (row, (_end(prompt or [], row.steering.prefix), output)))
        for a, b, direction in batch_update.moved:
            first, second = self._take(a), self._take(b)
            self._put(b, first)
            if direction == MoveDirectionality.SWAP:
                self._put(a, second)

    def apply(self, logits: Tensor) -> Tensor:
        if not self.rows:
            return logits
        index = list(self.rows)
        tails = [[*self.tokens[i][0], *self.tokens[i][1]] for i in index]
        if any(tail and tail[-1] < 0 for tail in tails):
            raise RuntimeError(
                "vLLM shows its plug-ins no tokens here: start it with --logits-processors "
                "thrifty.edges.vllm_controls:Controls, or with --no-async-scheduling"
            )
        for i, tail in zip(index, tails):
            self.rows[i].forget(len(tail))
        return steer([self.rows[i] for i in index], tails, index, logits)

    def _take(self, index: int) -> Any:
        row, tokens = self.rows.pop(index, None), self.tokens.pop(index, None)
        return None if row is None else (row, tokens)

    def _put(self, index: int, entry: Any) -> None:
        self._take(index)
        if entry is not None:
            self.rows[index], self.tokens[index] = entry


class ControlsV2(_Requests, V2Processor):
    """For vLLM's second model runner: requests keep a slot, tokens are read off the device.

    Under speculation a request has a row per draft token, each steered as if the drafts before it had been taken.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._open(vllm_config)
        self.states = req_states

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        row = self._row(sampling_params)
        self.rows.pop(req_idx, None)  # slots are used again
        if row is not None:
            self.rows[req_idx] = row
        return row is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        if not any(int(slot) in self.rows for slot in ctx.idx_mapping_np):
            return logits
        slots, places = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
        fed, drafts = ctx.input_ids.tolist(), ctx.expanded_local_pos.tolist()
        waves: dict[int, list[tuple[int, int, list[int]]]] = {}
        for i, slot in enumerate(slots):
            prompt = int(self.states.prompt_len.np[slot])
            if slot not in self.rows or places[i] + 1 < prompt:  # a piece of a prompt: its token is thrown away
                continue
            begin, known = max(0, prompt - self.rows[slot].steering.prefix), places[i] - drafts[i]
            new = fed[i - drafts[i] : i + 1][max(0, begin - known) :]
            old = self.states.all_token_ids.gpu[slot, begin : max(begin, known)].tolist()
            waves.setdefault(drafts[i], []).append((i, slot, [*old, *new]))
        for draft, wave in sorted(waves.items()):
            for _, slot, tail in wave if draft == 0 else ():
                self.rows[slot].forget(len(tail))
            steer([self.rows[slot] for _, slot, _ in wave], [t for *_, t in wave], [i for i, *_ in wave], logits)
        return logits


class Controls(V1Processor, V2Processor):
    """Whichever of the two the running vLLM builds, which shows in the arguments it gives."""

    def __new__(cls, vllm_config: Any, *rest: Any) -> Any:
        return ControlsV1(vllm_config, *rest) if len(rest) == 2 else ControlsV2(vllm_config, *rest)

    validate_params = _Requests.validate_params


def _steering(params: Any) -> Steering | None:
    text = (params.extra_args or {}).get(ARGUMENT)
    return None if text is None else read(text)


def _end(prompt: list[int], count: int) -> list[int]:
    return list(prompt[max(0, len(prompt) - count) :])
