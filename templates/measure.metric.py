"""Price of being right: generated tokens per right answer.

sum of generated tokens / number of right answers; None where nothing is right.

Paper: none.
Differs: nothing.

>>> MyMethod().measure([]) is None
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from thrifty.contracts import Card, Outcome

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("nothing",))


@dataclass(frozen=True)
class MyMethod:
    better: ClassVar[Literal["higher", "lower"]] = "lower"

    def measure(self, outcomes: Sequence[Outcome]) -> float | None:
        right = sum(outcome.grade.right for outcome in outcomes)
        return sum(outcome.usage.generated for outcome in outcomes) / right if right else None
