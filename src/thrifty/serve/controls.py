"""Two controls of the gateway's own: one ends thinking at a budget, the other overhears tokens as they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from thrifty.contracts import Tail

if TYPE_CHECKING:
    from torch import Tensor

    from thrifty.models.chat import ChatFormat

WINDOW = 8
"""Tokens looked back over for a closing tag that is several tokens."""
State = tuple[int, bool, bool]
"""Tokens looked at, whether the chain was opened, whether it was closed."""


@dataclass(frozen=True, eq=False)
class ThinkingBudget:
    """Once a chain has ``limit`` tokens its closing tag is put in and the answer follows.

    ``limit`` counts the response from its beginning, an opening tag included. ``opened``: the prompt opens the chain.
    """

    chat: ChatFormat
    limit: int
    opened: bool

    @cached_property
    def closing(self) -> tuple[int, ...]:
        """Token ids of the closing tag and the line breaks that stand around it in this model's chains.

        Blanks are left out: in most vocabularies they belong to the word behind them.
        """
        text = self.chat.after.strip(" ") + self.chat.close + self.chat.gap.strip(" ")
        return tuple(self.chat.tokenizer.encode(text, add_special_tokens=False))

    def start(self, tokenizer: Any) -> State:
        return 0, self.opened, False

    def step(
        self, tails: Sequence[Tail], logits: Tensor, states: Sequence[State]
    ) -> tuple[Tensor, list[tuple[int, ...]], list[bool], list[State]]:
        forced: list[tuple[int, ...]] = []
        after: list[State] = []
        for tail, (read, opened, closed) in zip(tails, states):
            if not closed and len(tail.ids) > read:
                text = self.chat.decode(tail.ids[max(0, read - WINDOW) :])
                opened, closed = opened or self.chat.open in text, self.chat.close in text
            due = opened and not closed and len(tail.ids) >= self.limit
            forced.append(self.closing if due else ())
            after.append((len(tail.ids), opened, closed or due))
        return logits, forced, [False] * len(tails), after


@dataclass(frozen=True, eq=False)
class Tap:
    """Tells ``heard`` the token ids of its one row as they come, all but the last; changes nothing."""

    heard: Callable[[list[int]], None]

    def start(self, tokenizer: Any) -> int:
        return 0

    def step(
        self, tails: Sequence[Tail], logits: Tensor, states: Sequence[int]
    ) -> tuple[Tensor, list[tuple[int, ...]], list[bool], list[int]]:
        for tail, read in zip(tails, states):
            if len(tail.ids) > read:
                self.heard(list(tail.ids[read:]))
        return logits, [()] * len(tails), [False] * len(tails), [len(tail.ids) for tail in tails]
