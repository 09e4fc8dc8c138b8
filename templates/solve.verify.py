"""Second reading: rate a trace by how likely the model finds "yes" when asked whether its answer is right.

rating = log p("yes" | question, answer) - log p("no" | question, answer). Prefill only: no token is generated.

Paper: none.
Differs: nothing.

>>> MyMethod().question
'Is this answer right?'
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from thrifty.contracts import All, Card, Problem, Score, Talk, Trace

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("tokens",), needs=("score",))


@dataclass(frozen=True)
class MyMethod:
    question: str = field(default="Is this answer right?", metadata={"help": "what the model is asked"})

    def rate(self, problem: Problem, traces: Sequence[Trace], rng: random.Random) -> Talk:
        prompts = [f"{problem.prompt}\n{trace.response}\n{self.question}" for trace in traces]
        scores = yield All([Score(prompt, ("yes", "no")) for prompt in prompts])
        return [yes - no for yes, no in scores]
