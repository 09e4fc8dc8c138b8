"""Greedy decoding: one pass, always the likeliest token.

Differs: nothing to differ from; the baseline of every comparison.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from thrifty.contracts import Card, Problem, Sample, Talk

CARD = Card(key="greedy", title="Greedy decoding", baseline=True)


@dataclass(frozen=True)
class Greedy:
    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        [trace] = yield Sample(problem.prompt, temperature=0.0)
        return trace
