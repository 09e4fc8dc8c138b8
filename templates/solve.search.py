"""Agreement: sample one answer after the other and stop as soon as two agree (a line on what it saves, and how).

Answers a_1, a_2, ...: stop at the first i with a_i = a_j for some j < i, at the latest after ``most`` samples.

Paper: authors, title (arXiv number). Say "none" where there is none.
Differs: every departure from the paper, one by one; "nothing" if there is none.

>>> MyMethod(most=4)
MyMethod(most=4, temperature=0.7)
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from thrifty.contracts import Card, Problem, Sample, Talk

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("tokens",))


@dataclass(frozen=True)
class MyMethod:
    most: int = field(default=8, metadata={"help": "samples at most (section of the paper the default is from)"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        traces = []
        for _ in range(self.most):
            [trace] = yield Sample(problem.prompt, temperature=self.temperature)
            if trace.answer is not None and any(trace.answer == other.answer for other in traces):
                return trace
            traces.append(trace)
        return next((trace for trace in traces if trace.answer is not None), None)
