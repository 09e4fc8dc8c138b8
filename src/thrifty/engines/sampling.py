"""Drawing tokens: a random stream per row that depends on nothing but its key, and stop strings.

A row's stream is counter-based (Philox 4x64, Salmon et al. 2011, doi 10.1145/2063384.2063405): the uniform for
position t of the response is a function of (seed, key, t) alone. So results depend neither on the batch nor on where
a continuation was cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Uniforms are drawn for this many positions at once."""


def stream(seed: int, key: tuple[Hashable, ...]) -> int:
    """The 128-bit key of a row's stream. ``key`` holds what prints the same in every process: numbers and strings."""
    return int.from_bytes(hashlib.blake2b(repr((seed, key)).encode(), digest_size=16).digest(), "little")


def uniforms(key: int, block: int) -> np.ndarray:
    """Uniforms in [0, 1) for positions ``block * BLOCK`` and on, float64 ``[BLOCK]``."""
    # One step of the counter gives four 64-bit words.
    return np.random.Generator(np.random.Philox(key=key, counter=block * BLOCK // 4)).random(BLOCK)


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, nucleus: Tensor) -> Tensor:
    """One token per row by inverse-CDF sampling. ``logits [B, V]``, the rest ``[B]``; int64 ``[B]``.

    Temperature 0 is greedy. ``nucleus`` holds the indices of the rows with ``top_p`` < 1: these keep the fewest
    likeliest tokens that hold that mass (nucleus sampling, Holtzman et al., arXiv 1904.09751).
    """
    greedy = temperature <= 0
    chances = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).softmax(-1)
    drawn = _invert(chances, uniform)
    if len(nucleus):
        # Only these rows: the order in which chances are added up must not depend on who else is in the batch.
        sorted_, order = chances[nucleus].sort(dim=-1, descending=True, stable=True)
        before = sorted_.cumsum(-1) - sorted_
        among = _invert(sorted_.masked_fill(before >= top_p[nucleus, None], 0.0), uniform[nucleus])
        drawn[nucleus] = order.gather(1, among[:, None])[:, 0]
    return torch.where(greedy, logits.argmax(-1), drawn)


def _invert(chances: Tensor, uniform: Tensor) -> Tensor:
    """Index of the first entry whose cumulated chance exceeds ``uniform`` times the total."""
    cumulated = chances.double().cumsum(-1)
    wanted = uniform[:, None] * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, wanted, right=True)[:, 0]
    # Rounding may put ``wanted`` on the total: then the last token that has any chance.
    last = (cumulated < cumulated[:, -1:]).sum(-1)
    return torch.minimum(found, last)


class Stops:
    """Stop strings of one tokenizer, checked as tokens come."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._pieces: list[str] | None = None
        self._tables: dict[str, np.ndarray] = {}

    def table(self, stops: tuple[str, ...]) -> np.ndarray:
        """Which tokens can complete one of ``stops``, bool ``[V]``: those that hold the last letter of one."""
        if self._pieces is None:
            self._pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        whole = np.zeros(self.size, bool)
        for letter in {stop[-1] for stop in stops}:
            if letter not in self._tables:
                # Part of a letter decodes to U+FFFD; blanks are lost when some tokenizers decode a token alone.
                can = [letter in piece or "\ufffd" in piece or letter.isspace() for piece in self._pieces]
                table = np.ones(self.size, bool)  # a tokenizer may have more tokens than the model, or fewer
                table[: len(can)] = can[: self.size]
                self._tables[letter] = table
            whole |= self._tables[letter]
        return whole

    def hit(self, stops: tuple[str, ...], ids: np.ndarray) -> bool:
        """Whether the last of ``ids`` completes one of ``stops``."""
        # Every token has at least a byte, special ones aside.
        tail = ids[-(max(len(stop.encode()) for stop in stops) + 8) :].tolist()
        text = self.tokenizer.decode(tail, clean_up_tokenization_spaces=False)
        before = len(self.tokenizer.decode(tail[:-1], clean_up_tokenization_spaces=False).rstrip("\ufffd"))
        return any((at := text.rfind(stop)) >= 0 and at + len(stop) > before for stop in stops)
