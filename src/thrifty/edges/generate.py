"""A decoder (drafts, trees) in plain ``model.generate``, for any batch: transformers' own drafts take one row.

>>> decoder = LookaheadTrie()                                  # keeps what it has seen  # doctest: +SKIP
>>> inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")   # doctest: +SKIP
>>> model.generate(**inputs, custom_generate=custom_generate(decoder), max_new_tokens=256)     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation import GenerateDecoderOnlyOutput

from thrifty.contracts import Decoder, Sample, ThriftyError
from thrifty.engines.batch import Batch, Row
from thrifty.engines.decoding import Decoding
from thrifty.engines.meter import Meter
from thrifty.models.chat import ChatFormat
from thrifty.models.load import Loaded
from thrifty.models.strength import Dial

SLICE = 64
"""Forwards between two looks at what has ended."""


def custom_generate(decoder: Decoder, meter: Meter | None = None) -> Callable[..., Any]:
    """A function for ``generate(custom_generate=...)``: greedy decoding, or sampling with temperature and top-p.

    Greedy tokens are those of plain ``generate`` (in fp32, up to near-ties); sampled ones are drawn by torch's random
    state. Adapters run as they stand. ``meter`` watches the model from then on and counts every position, drafted and
    accepted ones apart. Raises ThriftyError for what a decoder cannot follow: beams, top-k (sampling has ``top_k=50``
    unless told ``top_k=0``), other logits processors and stopping criteria, a cache that holds text already, scores to
    be returned, a row that may outgrow a layer's sliding window. transformers hands a function neither ``streamer``
    (which would wait for ever) nor the tokenizer that ``stop_strings`` need: leave both out.
    """

    @torch.no_grad()
    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        config = generation_config
        _check(config, logits_processor, stopping_criteria, model_kwargs)
        loaded = Loaded(model, None, ChatFormat(None), type(model).__name__, eos=frozenset(_ends(config)))
        mask = model_kwargs.get("attention_mask")
        held = np.ones(input_ids.shape, bool) if mask is None else mask.bool().cpu().numpy()
        room = config.max_length - input_ids.shape[1]
        texts = input_ids.cpu().numpy().astype(np.int32)
        asked = Sample("", decoder=decoder)
        streams = torch.randint(2**62, (len(texts),)).tolist() if config.do_sample else [0] * len(texts)
        rows = [
            Row(
                i, asked, text[at], int(at.sum()), 0, room, "length", (), stream, (),
                temperature=config.temperature if config.do_sample else 0.0,
                top_p=config.top_p if config.do_sample else 1.0,
            )
            for i, (text, at, stream) in enumerate(zip(texts, held, streams))
        ]  # fmt: skip
        counts = meter if meter is not None else Meter()
        batch = Batch(loaded, "main", counts, len(rows), prefix_bytes=0)
        batch.reader.dial = Dial(torch.nn.Identity())  # the rows name no adapters: leave the model's on
        made: list[list[int]] = [[] for _ in rows]
        try:
            decoding = Decoding(rows, {"main": batch})
            while decoding.busy:
                for ended in decoding.advance(SLICE):
                    made[ended.row.ticket] = ended.ids.tolist()
        finally:
            if meter is None:
                counts.forget(model)
        sequences = torch.cat([input_ids, _padded(made, config, input_ids)], 1)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    return decode


def _ends(config: Any) -> list[int]:
    """Token ids that end a row."""
    given = config.eos_token_id
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def _check(config: Any, processors: Any, criteria: Any, model_kwargs: dict[str, Any]) -> None:
    others = [
        type(one).__name__ for one in processors if not isinstance(one, TemperatureLogitsWarper | TopPLogitsWarper)
    ]
    others += [type(one).__name__ for one in criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    if others:
        raise ThriftyError(
            f"a decoder follows temperature, top_p, max_new_tokens and end-of-sequence only, not {', '.join(others)}: "
            "leave them out (top_k=0 turns off the top-k that sampling has by default)"
        )
    if config.num_beams != 1:
        raise ThriftyError(f"a decoder has no beams, and num_beams is {config.num_beams}: set it to 1")
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise ThriftyError("a decoder hands back no scores: leave out output_scores and output_logits")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ThriftyError("a decoder reads token ids, not inputs_embeds: give input_ids")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ThriftyError("a decoder keeps a cache of its own, and this one holds text: give the whole text instead")


def _padded(made: list[list[int]], config: Any, like: Tensor) -> Tensor:
    """The new tokens ``[B, T]``, shorter rows filled up with padding behind them, as ``generate`` does."""
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(_ends(config)), 0)
    width = max(map(len, made))
    rows = [ids + [pad] * (width - len(ids)) for ids in made]
    return torch.tensor(rows, dtype=like.dtype, device=like.device).view(len(made), width)
