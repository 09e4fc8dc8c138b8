"""Length costs only where the model is right already: the groups of a step that are solved best pay a length penalty.

Of the Q groups of a step, the top lambda * Q by their share of right answers are rewarded for being short,

    r = 1 - alpha * sigmoid((L - mean) / std)    if right, else 0,      mean and std over the group's right answers,

all others by 1 for a right answer and 0 for a wrong one. The choice is made anew in every step, so a group whose
accuracy falls gets 0/1 rewards again, before the penalty can ruin it.

>>> [round(r, 3) for r in GrpoLambda(alpha=0.2).penalised([True, True, False], [10, 30, 5])]  # 20 - 10, 20 + 10
[0.946, 0.854, 0.0]
>>> GrpoLambda(share=0.5).chosen([0.25, 0.75, 0.5, 1.0])
{1, 3}

Paper: Dai et al., Stable Reinforcement Learning for Efficient Reasoning (2505.18086).
Differs: the paper's alpha is not known to us; 0.2 is usual for this reward. Where advantages are divided by the group's
deviation, as GRPO does, it cancels in a group that is all right: it sets only how the penalty weighs against a wrong
answer where such a group is chosen with errors in it. lambda * Q is rounded to the nearest; among groups solved alike
a hash of the step and the problem decides, whatever they hold and wherever they stand. The deviation is that of the
population, at least 1e-4, so a single right answer pays half of alpha. Lengths are new tokens, the answer's included.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thrifty.contracts import Card, Group
from thrifty.tune.reward._trained import reinforced

CARD = Card(
    key="grpo-lambda",
    title="Stable Reinforcement Learning for Efficient Reasoning",
    arxiv="2505.18086",
    year=2025,
    saves=("tokens",),
)
CLAIM = {
    "says": "A length penalty in the best-solved fifth of the groups shortens chains at the accuracy of 0/1 rewards.",
    "parts": [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "comparator": {"key": "right"},
    "settings": {"share": 0.2, "alpha": 0.2},
    "student": "long",
    "tasks": ["roll"],
    "n": 800,
    "seeds": 8,
    "unit": "training",
    "match": "steps, problems and samples per step, from the same start",
    "gates": {"accuracy after 0/1 rewards": [0.4, 0.995]},
    "amendments": [
        "1: a tie-break of ours let the longest of the groups solved alike pay, where the paper only sorts by "
        "accuracy: now a hash of step and problem; alpha, which cancels in fully solved groups, is the usual 0.2",
        "2: 5 seeds, where accuracy is a part and takes 8 by the rule of this project",
    ],
}


@dataclass(frozen=True)
class GrpoLambda:
    share: float = field(default=0.2, metadata={"help": "lambda: groups that pay; 0 is GRPO, 1 penalises all"})
    alpha: float = field(default=0.2, metadata={"help": "what length can cost, in (0, 1)"})

    def chosen(self, solved: Sequence[float], ties: Sequence[Any] = ()) -> set[int]:
        """Which groups pay, from their shares of right answers; ties by ``ties``, smallest first."""
        order = sorted(range(len(solved)), key=lambda i: (-solved[i], ties[i] if ties else 0))
        return set(order[: math.floor(self.share * len(solved) + 0.5)])

    def penalised(self, right: Sequence[bool], lengths: Sequence[int]) -> list[float]:
        """Rewards of one group that pays, from who is right and the lengths."""
        among = np.array([length for length, ok in zip(lengths, right) if ok], float)
        if not len(among):
            return [0.0] * len(right)
        z = (np.asarray(lengths, float) - among.mean()) / max(float(among.std()), 1e-4)
        return [float(1 - self.alpha / (1 + math.exp(-x))) if ok else 0.0 for x, ok in zip(z, right)]

    def score(self, groups: Sequence[Group], step: int) -> list[list[float]]:
        """One reward per trace per group."""
        right = [[grade.right for grade in group.grades] for group in groups]
        lengths = [[len(t.ids) - t.start for t in group.traces] for group in groups]
        solved = [sum(one) / max(1, len(one)) for one in right]
        # Groups of few samples often tie. What breaks the tie must say nothing of length or of difficulty.
        lots = [hashlib.sha256(f"{step}|{group.problem.id}".encode()).hexdigest() for group in groups]
        pay = self.chosen(solved, lots)
        return [
            self.penalised(oks, ns) if i in pay else [float(ok) for ok in oks]
            for i, (oks, ns) in enumerate(zip(right, lengths))
        ]


def claim(trial: Any) -> dict[str, Any]:
    """GRPO with this reward, and with 0/1 rewards: new tokens and accuracy on fresh problems."""
    return reinforced(trial, steps=40)
