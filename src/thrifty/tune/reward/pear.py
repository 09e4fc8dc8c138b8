"""Pays for confidence while thinking: a right answer earns less, the more uncertain its chain was token by token.

    r = min(1, s - P)              if the answer is right, else r_wrong
    P = max(0, H_think - a * H_answer)

H_think and H_answer are the mean entropies, in nats, of the sampled tokens before the closing tag and after it, the
tag left out; without a tag H_answer is 0. No length enters: chains get shorter because they explore less. The answer's
entropy is the baseline, so that lowering all entropy alike earns nothing.

>>> Pear().reward(thinking=[0.5, 1.0], answering=[0.25])  # 1 - (0.75 - 0.25)
0.5
>>> Pear(a=2.0).reward(thinking=[0.1], answering=[0.2])  # 0.1 - 0.4 is no penalty
1.0

Paper: PEAR: Phase Entropy Aware Reward for Efficient Reasoning (2510.08026).
Differs: the closing tag is the last token of the chain; of a tag of several tokens only that one is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.contracts import Card, Group, ThriftyError, Trace
from thrifty.files import write_json
from thrifty.tune.reward._trained import reinforced

CARD = Card(
    key="pear",
    title="PEAR: Phase Entropy Aware Reward for Efficient Reasoning",
    arxiv="2510.08026",
    year=2025,
    saves=("tokens",),
    needs=("entropies",),
)
CLAIM = {
    "says": "Paying for low entropy while thinking shortens chains at the accuracy of 0/1 rewards.",
    "parts": [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "comparator": {"key": "right"},
    "student": "long",
    "tasks": ["roll"],
    "n": 800,
    "seeds": 8,
    "unit": "training",
    "match": "steps, problems and samples per step, from the same start",
    "gates": {
        "accuracy after 0/1 rewards": [0.4, 0.995],
        "entropy goes with length": [0.1, None],
        "thinking is less certain than answering": [0.0, None],
    },
    "amendments": [
        "1: what the paper builds on, that thinking is less certain than answering and that uncertain chains are the "
        "long ones, was never asked of the student: now gates",
        "2: 5 seeds, where accuracy is a part and takes 8 by the rule of this project",
    ],
}


@dataclass(frozen=True)
class Pear:
    a: float = field(default=1.0, metadata={"help": "weight of the answer's entropy; -1 punishes both, 0 ignores it"})
    base: float = field(default=1.0, metadata={"help": "s: what a right answer earns before the penalty"})
    wrong: float = field(default=0.0, metadata={"help": "r_wrong: what any other answer earns, in [0, 1)"})

    def reward(self, thinking: Sequence[float] | np.ndarray, answering: Sequence[float] | np.ndarray) -> float:
        """Of a right answer, from the entropies of its tokens in each phase; either may be empty."""
        think, answer = (float(np.mean(phase)) if len(phase) else 0.0 for phase in (thinking, answering))
        return float(min(1.0, self.base - max(0.0, think - self.a * answer)))

    def score(self, groups: Sequence[Group], step: int) -> list[list[float]]:
        """One reward per trace per group; ThriftyError where a trace carries no entropies."""
        return [
            [
                self.reward(*phases(trace)) if grade.right else self.wrong
                for trace, grade in zip(group.traces, group.grades, strict=True)
            ]
            for group in groups
        ]


def phases(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Entropies of the sampled tokens of the chain, without the closing tag, and of the answer."""
    if trace.entropies is None:
        raise ThriftyError(
            f"{trace.problem or 'a trace'} carries no entropies: sample with want={{'entropies'}}, on an engine that "
            "tells them (local)"
        )
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    thought_end = max((span.end for span in trace.spans if span.kind != "answer"), default=trace.start)
    for span in trace.spans:
        end = span.end - (trace.closed and span.end == thought_end)
        if span.origin == "sampled" and span.start >= trace.start:
            parts[span.kind != "answer"].append(trace.entropies[span.start - trace.start : max(0, end - trace.start)])
    thinking, answering = (np.concatenate([np.zeros(0, np.float32), *parts[side]]) for side in (True, False))
    return thinking, answering


def premise(groups: Iterable[tuple[Sequence[float], Sequence[float], Sequence[int]]]) -> dict[str, float]:
    """What the paper builds on, of right answers: per problem their entropies thinking and answering, and lengths.

    The correlation (Pearson's) is of deviations from the problem's mean, since rewards compare answers to one problem;
    0 where nothing deviates. The difference of entropies is the mean over problems, in nats.

    >>> {k: round(v, 3) for k, v in premise([([0.5, 0.7], [0.1, 0.1], [10, 20]), ([0.9], [0.3], [99])]).items()}
    {'entropy goes with length': 1.0, 'thinking is less certain than answering': 0.55}
    """
    arrays = [tuple(np.asarray(side, float) for side in group) for group in groups if len(group[0])]
    unsure = np.concatenate([np.zeros(0), *(think - think.mean() for think, _, _ in arrays)])
    longer = np.concatenate([np.zeros(0), *(length - length.mean() for _, _, length in arrays)])
    scale = float(np.sqrt((unsure**2).sum() * (longer**2).sum()))
    return {
        "entropy goes with length": float(unsure @ longer) / scale if scale else 0.0,
        "thinking is less certain than answering": float(np.mean([np.mean(t - a) for t, a, _ in arrays] or [0.0])),
    }


def claim(trial: Any) -> dict[str, Any]:
    """GRPO with this reward, and with 0/1 rewards: new tokens and accuracy on fresh problems."""
    found = reinforced(trial, steps=40)
    if trial.arm == "comparator":
        asked = trial.problems("train", trial.scaled(100))

        def make(folder: Path) -> None:
            from thrifty.engines.runner import Runner
            from thrifty.tune.answers import Samples

            lab, groups = trial.lab(), []
            answers = Samples(8, want=frozenset({"entropies"}), top_p=1.0)
            for o in Runner(lab.engine(), lab.task).solve(answers, asked, trial.seed):
                right = [t for t in o.tried if t.complete and lab.task.grade(o.problem, t.response).right]
                means = [[float(np.mean(side)) if len(side) else 0.0 for side in phases(t)] for t in right]
                groups.append(([m[0] for m in means], [m[1] for m in means], [len(t.ids) - t.start for t in right]))
            write_json(folder / "premise.json", premise(groups))

        folder = trial.once("premise", make, asked)
        for name, value in json.loads((folder / "premise.json").read_text()).items():
            trial.gate(name, value)
    return found
