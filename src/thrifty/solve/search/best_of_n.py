"""Best-of-n: n sampled passes, the one rated highest wins.

Differs: without a verifier the rating is the model's own mean token log-probability, which every model carries.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from thrifty.contracts import Card, Problem, Sample, Talk, Verifier

CARD = Card(key="best-of-n", title="Best-of-n", needs=("logprobs",), baseline=True)


@dataclass(frozen=True)
class BestOfN:
    n: int = field(default=8, metadata={"help": "passes per problem"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})
    verifier: Verifier | None = field(default=None, metadata={"help": "rates finished traces; none: mean log-prob"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        want = frozenset({"logprobs"})
        traces = yield Sample(problem.prompt, n=self.n, temperature=self.temperature, top_p=self.top_p, want=want)
        finished = [t for t in traces if t.complete]
        if not finished:
            return traces[0]
        if self.verifier is None:
            ratings = [float(t.logprobs.mean()) for t in finished]
        else:
            ratings = yield from self.verifier.rate(problem, finished, rng)
        return finished[max(range(len(finished)), key=lambda i: (ratings[i], -i))]
