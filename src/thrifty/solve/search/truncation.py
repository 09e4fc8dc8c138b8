"""Truncation to a budget: cut the chain after ``budget`` tokens, close it, take the answer that comes.

Paper: Muennighoff et al., s1: Simple test-time scaling (2501.19393), budget forcing's upper bound.
Differs: no "Final Answer:" phrase is put in, only the model's own closing tag.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from thrifty.contracts import END_OF_THOUGHT, Card, Problem, Sample, Talk

CARD = Card(
    key="truncation", title="Truncation to a thinking budget", arxiv="2501.19393", year=2025, saves=("tokens",),
    needs=("prefix",), baseline=True,
)  # fmt: skip


@dataclass(frozen=True)
class Truncation:
    budget: int = field(default=64, metadata={"help": "thinking tokens per pass"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        ask = Sample(problem.prompt, temperature=self.temperature, top_p=self.top_p)
        [thought] = yield replace(ask, until=(END_OF_THOUGHT,), max_tokens=self.budget)
        if thought.finish == "stop":
            return thought
        close = "" if thought.closed else END_OF_THOUGHT
        [trace] = yield replace(ask, prefix=thought.ids, inject=close)
        return trace
