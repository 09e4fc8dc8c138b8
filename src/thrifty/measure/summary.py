"""One setting's figures: the element of ``result.json``'s "settings"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from thrifty.contracts import Outcome
from thrifty.measure import stats


def summarise(
    outcomes: Sequence[Outcome],
    name: str,
    alpha: float | None = None,
    price: tuple[float, float] | None = None,
    reference: Sequence[Outcome] | None = None,
) -> dict[str, Any]:
    """Accuracy, completion and cost of one setting. Means are per problem, over all traces that it tried.

    Accuracy is the share of gradable problems (``Problem.gradable``) answered right, with a 95 % interval; null where
    there are none. The others are counted in "ungraded"; their tokens stand in the means, but buy no right answer.
    Problems that the engine failed ("failed") were not answered right: they stand in accuracy and means.
    ``price`` is money per million input and output tokens (cached input is charged as input: an upper bound).
    ``reference`` are the outcomes of another setting on the same problems: "agreement" is then the share of problems on
    which both gave the same parsed answer, for logs without gold.
    """
    figures: dict[str, Any] = {"name": name, "alpha": alpha, **_figures(outcomes)}
    usage = [o.usage for o in outcomes]
    figures |= {
        "answer_tokens": _mean([u.answer for u in usage]),
        "prompt_tokens": _mean([u.prompt for u in usage]),
        "cached_tokens": _mean([u.cached for u in usage]),
        "injected_tokens": _mean([u.injected for u in usage]),
        "discarded_tokens": _mean([u.discarded for u in usage]),
        "tokens_per_right_answer": _per_right([u.generated for u in usage], outcomes),
        "seconds": _mean([u.seconds for u in usage]),
        "calls": _mean([u.calls for u in usage]),
        "tried": _mean([len(o.tried) for o in outcomes]),
        "unparsed": sum(o.grade.parsed is None for o in outcomes),
        "ungraded": sum(not o.problem.gradable for o in outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
    }
    if outcomes:
        thought = [u.thought for u in usage]
        spread = stats.mean(thought, [o.problem.level for o in outcomes])
        figures |= {"thought_tokens_low": spread.low, "thought_tokens_high": spread.high}
        figures["median_thought_tokens"] = float(np.median(thought))
    if price is not None:
        money = [((u.prompt + u.cached) * price[0] + u.generated * price[1]) / 1e6 for u in usage]
        figures |= {"money": _mean(money), "money_per_right_answer": _per_right(money, outcomes)}
    if reference is not None:
        figures |= _agreement(outcomes, reference)
    figures["by_level"] = _by_level(outcomes)
    return figures


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What is told for all problems and again for each level."""
    graded = [o for o in outcomes if o.problem.gradable]
    complete = [o for o in graded if o.chosen is not None and o.chosen.complete]
    share = (
        stats.accuracy(
            [o.grade.right for o in graded], [o.problem.id for o in graded], [o.problem.level for o in graded]
        )
        if graded
        else None
    )
    return {
        "n": len(outcomes),
        "accuracy": share.value if share else None,
        "accuracy_low": share.low if share else None,
        "accuracy_high": share.high if share else None,
        "completion_rate": _mean([o.chosen is not None and o.chosen.complete for o in outcomes]),
        "accuracy_given_completion": _mean([o.grade.right for o in complete]),
        "thought_tokens": _mean([o.usage.thought for o in outcomes]),
    }


def _by_level(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    keys = sorted({(o.problem.task, o.problem.level) for o in outcomes})
    return [
        {"task": task, "level": level}
        | _figures([o for o in outcomes if (o.problem.task, o.problem.level) == (task, level)])
        for task, level in keys
    ]


def _agreement(outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> dict[str, Any]:
    """Same parsed answer as the reference; a missing answer agrees with nothing."""
    theirs = {o.problem.id: o.grade.parsed for o in reference}
    shared = [o for o in outcomes if o.problem.id in theirs]
    if not shared:
        return {"agreement": None, "agreement_low": None, "agreement_high": None}
    same = [o.grade.parsed is not None and o.grade.parsed == theirs[o.problem.id] for o in shared]
    share = stats.accuracy(same, [o.problem.id for o in shared], [o.problem.level for o in shared])
    return {"agreement": share.value, "agreement_low": share.low, "agreement_high": share.high}


def _per_right(costs: Sequence[float], outcomes: Sequence[Outcome]) -> float | None:
    """What all gradable problems cost, per right answer; None without one."""
    graded = [(cost, o.grade.right) for cost, o in zip(costs, outcomes, strict=True) if o.problem.gradable]
    right = sum(right for _, right in graded)
    return sum(cost for cost, _ in graded) / right if right else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
