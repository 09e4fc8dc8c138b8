"""How much of a chain came after it already had the answer (overthinking), or passed it by (underthinking).

A chain is cut into steps (``traces/segment.py``); a step is right where its last value equals the gold answer.
Values on the way can equal the answer by chance (a running value mod 10 does one time in ten), so every profile
also says what it finds when each chain is given another problem's answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from thrifty.contracts import ThriftyError
from thrifty.traces.segment import cuts, numbers

_TOKEN = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?|[^\W\d_]+|[^\w\s.,;:!?\"'`*)}\]$]")


def first_right(thought: str, answer: str, parse: Callable[[str], str | None] | None = None) -> float | None:
    """Where the chain first has the answer, as a share of its text in (0, 1]; None where it never has.

    ``parse`` reads a step's value, to be compared with ``answer``; by default a number is compared with the step's
    last number, anything else with the step's last words.

    >>> round(first_right("7 + 3 = 10 . 10 - 1 = 9 . check 9 + 1 = 10 . so 9 .", "9"), 2)
    0.49
    """
    return _first_right(thought, cuts(thought), answer, parse)


def _first_right(
    thought: str, ranges: Sequence[tuple[int, int]], answer: str, parse: Callable[[str], str | None] | None
) -> float | None:
    if not answer.strip():
        return None
    for start, end in ranges:
        step = thought[start:end]
        if (parse(step) == answer) if parse else _ends_with(step, answer):
            return (start + len(step.rstrip())) / len(thought)
    return None


@dataclass(frozen=True)
class Profile:
    """Means over chains; shares of a chain's thinking tokens in [0, 1], None where no chain qualifies."""

    after_first_right: float | None
    """Right chains: share of thinking after the first right intermediate value (0 where there was none)."""
    after_by_chance: float | None
    """The same with every chain held against another problem's answer: what coincidence alone gives."""
    outcome_efficiency: float | None
    """mean σ·T(first right)/T over all chains (arXiv 2412.21187)."""
    underthinking: float | None
    """Wrong chains: mean 1 - T(first right)/T, 0 where never right (arXiv 2501.18585): had the answer and left it."""
    tokens_until: float
    """Thinking tokens per chain up to the first right value."""
    tokens_after: float
    """Thinking tokens per chain after it."""
    tokens_never: float
    """Thinking tokens per chain in chains that never had it."""


def profile(
    thoughts: Sequence[str],
    answers: Sequence[str],
    right: Sequence[bool],
    tokens: Sequence[int],
    parse: Callable[[str], str | None] | None = None,
) -> Profile:
    """The overthinking profile of chains with known answers; positions in text stand for positions in tokens."""
    if not len(thoughts) == len(answers) == len(right) == len(tokens):
        raise ThriftyError("profile: thoughts, answers, right and tokens must be of one length")
    if not thoughts:
        return Profile(None, None, None, None, 0.0, 0.0, 0.0)
    ranges = [cuts(thought) for thought in thoughts]
    found = [_first_right(t, r, a, parse) for t, r, a in zip(thoughts, ranges, answers, strict=True)]
    dealt = [_first_right(t, r, a, parse) for t, r, a in zip(thoughts, ranges, _other(answers), strict=True)]
    until = np.array([1.0 if f is None else f for f in found])
    chance = np.array([1.0 if f is None else f for f in dealt])
    had = np.array([f is not None for f in found])
    sigma, spent = np.asarray(right, dtype=bool), np.asarray(tokens, dtype=float)
    return Profile(
        after_first_right=_mean(1 - until[sigma]),
        after_by_chance=_mean(1 - chance[sigma]),
        outcome_efficiency=_mean(sigma * until),
        underthinking=_mean(1 - until[~sigma]),
        tokens_until=float((spent * until * had).mean()),
        tokens_after=float((spent * (1 - until)).mean()),
        tokens_never=float((spent * ~had).mean()),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _other(answers: Sequence[str]) -> list[str]:
    """For each problem the next problem's answer that differs from its own (an impossible one where all agree)."""
    n = len(answers)
    return [
        next((answers[(i + k) % n] for k in range(1, n) if answers[(i + k) % n] != answers[i]), "") for i in range(n)
    ]


def _ends_with(step: str, answer: str) -> bool:
    """Whether a step's last value is the answer: numbers by value, other answers by their last tokens."""
    wanted = _TOKEN.findall(answer.lower())
    if len(wanted) == 1 and (gold := numbers(answer)):
        found = numbers(step)
        return bool(found) and (found[-1] == gold[-1] or _number(found[-1]) == _number(gold[-1]))
    return bool(wanted) and _TOKEN.findall(step.lower())[-len(wanted) :] == wanted


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return float("nan")
