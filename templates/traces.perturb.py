"""Shuffled steps: put the lines of a chain in random order.

lines -> a uniformly random permutation of them.

Paper: none.
Differs: nothing.

>>> import random
>>> from thrifty.contracts import Chain, Problem
>>> chain = Chain(Problem("1", "1 + 1?", "2"), "a\\nb\\nc", "2")
>>> sorted(MyMethod().perturb(chain, random.Random(0)).thought.split("\\n"))
['a', 'b', 'c']
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from thrifty.contracts import Card, Chain

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("nothing",))


@dataclass(frozen=True)
class MyMethod:
    def perturb(self, chain: Chain, rng: random.Random) -> Chain:
        lines = chain.thought.split("\n")
        rng.shuffle(lines)
        return replace(chain, thought="\n".join(lines))
