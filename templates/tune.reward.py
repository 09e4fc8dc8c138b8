"""Right and short: a right answer earns 1, less a price for being longer than the group's other right answers.

r = 1[right] * (1 - price * (length - shortest) / (longest - shortest)), over the right answers of a group.

Paper: none.
Differs: nothing.

>>> MyMethod(price=0.5).rewards([True, True, False, True], [10, 30, 5, 20])
[1.0, 0.5, 0.0, 0.75]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thrifty.contracts import Card, Group

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("tokens",))


@dataclass(frozen=True)
class MyMethod:
    price: float = field(default=0.3, metadata={"help": "what the longest right answer loses"})

    def rewards(self, right: Sequence[bool], lengths: Sequence[int]) -> list[float]:
        """One reward per trace of a group, from whether it is right and its generated tokens."""
        among = [length for length, ok in zip(lengths, right) if ok]
        spread = max(among) - min(among) if among else 0
        return [
            float(ok) * (1 - (self.price * (length - min(among)) / spread if ok and spread else 0))
            for length, ok in zip(lengths, right)
        ]

    def score(self, groups: Sequence[Group], step: int) -> list[list[float]]:
        return [
            self.rewards(
                [grade.right for grade in group.grades],
                [len(t.ids) - t.start for t in group.traces],
            )
            for group in groups
        ]
