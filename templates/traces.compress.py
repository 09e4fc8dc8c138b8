"""Deduplication: drop lines of a chain that repeat an earlier one; a chain that is still too long is dropped.

Keep line i unless line j = line i for some j < i.

Paper: none.
Differs: nothing.

>>> from thrifty.contracts import Chain, Context, Problem
>>> problem = Problem("1", "1 + 1?", "2")
>>> [short] = MyMethod().compress([Chain(problem, "1 + 1 = 2\\nwait\\n1 + 1 = 2", "2")], Context())
>>> short.thought
'1 + 1 = 2\\nwait'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from thrifty.contracts import Card, Chain, Context

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("tokens",))


@dataclass(frozen=True)
class MyMethod:
    most: int = field(default=4000, metadata={"help": "characters of a chain at most"})

    def compress(self, chains: Sequence[Chain], ctx: Context) -> list[Chain | None]:
        shorter = [replace(chain, thought="\n".join(dict.fromkeys(chain.thought.split("\n")))) for chain in chains]
        return [chain if len(chain.thought) <= self.most else None for chain in shorter]
