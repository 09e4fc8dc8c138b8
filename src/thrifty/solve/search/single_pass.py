"""One sampled pass: what a user pays today, and what every saving is measured against."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from thrifty.contracts import Card, Problem, Sample, Talk

CARD = Card(key="single-pass", title="One sampled pass", baseline=True)


@dataclass(frozen=True)
class SinglePass:
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        [trace] = yield Sample(problem.prompt, temperature=self.temperature, top_p=self.top_p)
        return trace
