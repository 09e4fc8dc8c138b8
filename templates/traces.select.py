"""Shortest first: keep the share of the chains that are shortest.

Sort by length of the thought; keep the first ``share`` of them, at least one.

Paper: none.
Differs: nothing.

>>> from thrifty.contracts import Chain, Context, Problem
>>> problem = Problem("1", "1 + 1?", "2")
>>> MyMethod(share=0.5).select([Chain(problem, "1 + 1 is 2", "2"), Chain(problem, "2", "2")], Context())
[1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thrifty.contracts import Card, Chain, Context

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("examples",))


@dataclass(frozen=True)
class MyMethod:
    share: float = field(default=0.25, metadata={"help": "share of the chains that is kept"})

    def select(self, chains: Sequence[Chain], ctx: Context) -> list[int]:
        order = sorted(range(len(chains)), key=lambda i: len(chains[i].thought))
        return sorted(order[: max(1, round(self.share * len(chains)))])
