"""Self-consistency (majority@k): k sampled passes, the commonest answer wins.

Paper: Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models (2203.11171).
Differs: ties go to the answer with the shortest chain, the same rule as short-m@k, so that the two can be compared.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from thrifty.contracts import Card, Problem, Sample, Talk
from thrifty.solve.search._vote import majority

CARD = Card(
    key="self-consistency",
    title="Self-consistency (majority@k)",
    arxiv="2203.11171",
    year=2022,
    saves=(),
    baseline=True,
)


@dataclass(frozen=True)
class SelfConsistency:
    k: int = field(default=8, metadata={"help": "passes per problem"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        traces = yield Sample(problem.prompt, n=self.k, temperature=self.temperature, top_p=self.top_p)
        return majority(traces) or traces[0]
