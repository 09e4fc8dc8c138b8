"""Drop random steps until a chain is as short as a reference compressor made it.

The placebo of every compressor: same length, no judgement.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from thrifty.contracts import Card, Chain, Compressor, Context
from thrifty.traces.segment import segment

CARD = Card(key="random-steps", title="Random step dropping", saves=("tokens",), baseline=True)


@dataclass(frozen=True)
class RandomSteps:
    keep: float = field(default=0.5, metadata={"help": "share of the characters kept, where there is no reference"})
    like: Compressor | None = field(default=None, metadata={"help": "compressor whose lengths are matched"})

    def compress(self, chains: Sequence[Chain], ctx: Context) -> list[Chain | None]:
        rng = ctx.rng or random.Random(0)
        models = self.like.compress(chains, ctx) if self.like else [None] * len(chains)
        out: list[Chain | None] = []
        for chain, model in zip(chains, models, strict=True):
            if self.like is not None and model is None:
                out.append(None)
                continue
            size = len(model.thought) if model is not None else round(self.keep * len(chain.thought))
            out.append(replace(chain, thought=drop(chain.thought, size, rng), source="random-steps"))
        return out


def drop(thought: str, size: int, rng: random.Random) -> str:
    """Remove random steps until at most ``size`` characters are left, or a single step."""
    pieces = [thought[step.start : step.end] for step in segment(thought)]
    while len(pieces) > 1 and len("".join(pieces).strip()) > size:
        pieces.pop(rng.randrange(len(pieces)))
    return "".join(pieces).strip()
