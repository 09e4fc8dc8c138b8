"""short-m@k: start k chains, stop all others once m have finished thinking, vote among the m.

Saves tokens and time against majority@k; against a single pass it costs more, which every report says.
Cost per problem = sum of the m shortest chains + (k - m) * (length of the m-th shortest) + m answers.

>>> cost([30, 50, 80, 90], m=2)  # 30 + 50 + 2 * 50
180

Paper: Hassid et al., Don't Overthink it. Preferring Shorter Thinking Chains for Improved LLM Reasoning (2505.17813).
Differs: the m with the fewest tokens win (ties by index), even where a lack of slots makes rows start late.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thrifty.contracts import END_OF_THOUGHT, All, Card, Outcome, Problem, Sample, Talk
from thrifty.solve.search._vote import majority

CARD = Card(
    key="short-m-at-k",
    title="Don't Overthink it. Preferring Shorter Thinking Chains for Improved LLM Reasoning",
    arxiv="2505.17813",
    year=2025,
    saves=("tokens", "latency"),
    needs=("prefix", "cancel"),
)

CLAIM = {
    "says": "A vote among the 3 chains of 8 that end first costs less than one among all 8, and is no less accurate.",
    "parts": [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "comparator": {"key": "self-consistency", "k": 8},
    "match": "both start 8 chains with the same random streams",
    "tasks": ["search", "roll"],
    "levels": [1, 2, 3],
    "n": 400,
    "seeds": 3,
    "unit": "student",
    "gates": {"a vote helps": [0.02, None]},
    "amendments": [
        "1: on search alone a vote helps only two of the three students; now roll beside it, where it helps each",
    ],
}


@dataclass(frozen=True)
class ShortMAtK:
    m: int = field(default=3, metadata={"help": "finished chains that vote"})
    k: int = field(default=8, metadata={"help": "chains started"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        ask = Sample(problem.prompt, temperature=self.temperature, top_p=self.top_p)
        started = yield replace(ask, n=self.k, first=self.m, until=(END_OF_THOUGHT,))
        finished = [t for t in started if t.finish != "cancelled"]
        # A response without a chain has ended already: what comes after its end is none of it.
        thought = [t.closed and t.finish == "until" for t in finished]
        answers = yield All([replace(ask, prefix=t.ids) for t, more in zip(finished, thought) if more])
        traces = [t for [t] in answers] + [t for t, more in zip(finished, thought) if not more]
        return majority(traces) or traces[0]


def cost(lengths: Sequence[int], m: int) -> int:
    """Thinking tokens of short-m@k by the paper's formula (section 3), for chains of these ``lengths``."""
    ordered = sorted(lengths)
    return sum(ordered[:m]) + (len(ordered) - m) * ordered[m - 1]


def claim(trial: Any) -> dict[str, list[float]]:
    """Accuracy and generated tokens, problem by problem; beside them a vote at equal tokens, and another family."""
    outcomes = trial.solve(trial.method, trial.problems())
    found: dict[str, list[float]] = trial.answered(outcomes)
    if trial.arm == "comparator":
        votes = [_accuracy(trial, outcomes, k) for k in range(1, 9)]
        # where one sample is as good as eight, no choice among them can show anything
        trial.gate("a vote helps", votes[-1] - votes[0])
        spent = [sum(t.usage.generated for o in outcomes for t in o.tried[:k]) for k in range(1, 9)]
        same = sum(s <= sum(trial.other["tokens"]) for s in spent)
        trial.note(f"accuracy of a vote among {same}, for at most as many tokens", votes[max(same, 1) - 1])
    trial.elsewhere(trial.method)
    return found


def _accuracy(trial: Any, outcomes: Sequence[Outcome], k: int) -> float:
    """Of a vote among the first ``k`` samples."""
    votes = [(o.problem, majority(o.tried[:k])) for o in outcomes]
    return sum(v is not None and trial.task().grade(p, v.response).right for p, v in votes) / len(votes)
