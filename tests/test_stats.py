"""The statistics against simulated nulls, textbook values and each other."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from thrifty.contracts import Grade, Outcome, Problem, ThriftyError, Trace, Usage
from thrifty.measure import stats, summarise
from thrifty.measure.profile import first_right, profile
from thrifty.tasks import load, tracing
from thrifty.traces.segment import segment


def outcome(
    id: str,
    right: bool,
    thought: int,
    level: int = 1,
    tried: int = 1,
    gold: str | None = "5",
    parsed: str | None = None,
) -> Outcome:
    """A real outcome: the first trace chosen, every trace costs ``thought`` + 2 tokens."""
    usage = Usage(prompt=10, thought=thought, answer=2, calls=1, seconds=0.5)
    traces = [Trace(np.arange(thought + 2, dtype=np.int32), "1 + 4 = 5 .", "5", True, "stop", usage=usage)] * tried
    total = usage
    for _ in range(tried - 1):
        total = total + usage
    said = parsed or ("5" if right else "6")
    return Outcome(Problem(id, "1 + 4", gold, "sum", level), traces[0], Grade(float(right), said), traces, total)


# ------------------------------------------------------------------------------------------------ intervals


def test_wilson_is_the_textbook_interval_and_never_leaves_the_unit() -> None:
    interval = stats.wilson(8, 10)  # worked by hand: z = 1.96, centre .7168, half .2266
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.490, 0.943)
    assert stats.wilson(0, 20).low == 0
    assert stats.wilson(20, 20).high == 1
    assert stats.wilson(20, 20).low < 1, "all right of twenty is not certainty"
    with pytest.raises(ThriftyError, match="no share"):
        stats.wilson(3, 0)


def test_several_samples_of_a_problem_are_one_cluster() -> None:
    """Eight identical samples per problem tell no more than one: the interval must not shrink by √8."""
    rng = np.random.default_rng(1)
    once = (rng.random(150) < 0.7).astype(float)
    one = stats.accuracy(once, range(150))
    eight = stats.accuracy(np.repeat(once, 8), np.repeat(np.arange(150), 8))
    assert eight.value == pytest.approx(one.value)
    assert (eight.high - eight.low) == pytest.approx(one.high - one.low, rel=0.15)


def test_bootstrap_over_problems_covers() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(120):
        p = rng.beta(4, 2, size=120)  # problems differ in difficulty, three samples each
        right = rng.random((120, 3)) < p[:, None]
        interval = stats.accuracy(right.ravel(), np.repeat(np.arange(120), 3), seed=trial)
        hits += interval.low <= 4 / 6 <= interval.high
    assert 0.90 <= hits / 120 <= 0.99


def test_strata_take_the_variance_between_levels_out() -> None:
    levels = np.repeat([1, 2], 100)
    right = (levels == 1).astype(float)
    assert stats.mean(right, levels).low == stats.mean(right, levels).high == 0.5
    assert stats.mean(right).low < 0.45


def test_paired_difference_uses_the_pairs() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(100, 40, 200)
    interval = stats.paired_difference(hard - 5 + rng.normal(0, 1, 200), hard)
    assert interval.high < -4, "unpaired the noise between problems would hide 5 tokens"


# ------------------------------------------------------------------------------------------ non-inferiority


def test_tango_matches_a_numerical_likelihood() -> None:
    gained, lost, n, delta = 4, 9, 120, -0.03

    def negative(q: float) -> float:
        return -(gained * np.log(q + delta) + lost * np.log(q) + (n - gained - lost) * np.log(1 - 2 * q - delta))

    q = minimize_scalar(negative, bounds=(0.0301, 0.5), method="bounded", options={"xatol": 1e-10}).x
    z = (gained - lost - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
    assert stats._tango(gained, lost, n, delta) == pytest.approx(z, abs=1e-4)


def test_non_inferiority_errs_one_time_in_twenty_at_the_margin() -> None:
    rng = np.random.default_rng(4)
    held = {"tango": 0, "bootstrap": 0}
    for trial in range(200):
        cell = rng.choice(4, size=400, p=[0.78, 0.06, 0.09, 0.07])  # both, gained, lost, neither: truly 3 points worse
        new, old = np.isin(cell, [0, 1]).astype(float), np.isin(cell, [0, 2]).astype(float)
        held["tango"] += stats.non_inferior(new, old, 0.03).holds
        held["bootstrap"] += stats.non_inferior(new * 0.999, old * 0.999, 0.03, draws=200, seed=trial).holds
    assert held["tango"] / 200 <= 0.09
    assert held["bootstrap"] / 200 <= 0.10


def test_non_inferiority_needs_enough_problems_even_without_a_single_loss() -> None:
    few, many = np.ones(40), np.ones(200)
    assert not stats.non_inferior(few, few, 0.03).holds, "a bootstrap would call forty identical answers proof"
    assert stats.non_inferior(many, many, 0.03).holds
    result = stats.non_inferior(many, many, 0.03)
    assert result.p < 0.05
    assert -0.03 < result.low < 0
    with pytest.raises(ThriftyError, match="3 points"):
        stats.non_inferior(many, many, 3)


def test_non_inferiority_bound_and_p_agree() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        new, old = (rng.random((2, 300)) < 0.8).astype(float)
        result = stats.non_inferior(new, old, 0.05)
        assert result.holds == (result.p < 0.05)


# ------------------------------------------------------------------------------------------ tokens and lines


def test_a_ratio_weighs_tokens() -> None:
    old = np.array([10.0, 10.0, 10.0, 1000.0])
    new = np.array([5.0, 5.0, 5.0, 1000.0])
    assert stats.ratio(new, old).value == pytest.approx(1015 / 1030)
    with pytest.raises(ThriftyError, match="pair both arms"):
        stats.ratio([1, 2], [1])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12))
def test_pareto_keeps_exactly_the_undominated(points: list[tuple[int, int]]) -> None:
    kept = stats.pareto([(float(c), float(a)) for c, a in points])
    for i, (cost, accuracy) in enumerate(points):
        dominated = any((c <= cost and a >= accuracy) and (c, a) != (cost, accuracy) for c, a in points)
        assert (points[i] in [points[k] for k in kept]) != dominated


def test_mixing_two_students_lies_on_the_line() -> None:
    rng = np.random.default_rng(6)
    n = 600
    long = (rng.random(n) < 0.9, rng.normal(100, 10, n))
    short = (rng.random(n) < 0.5, rng.normal(20, 3, n))
    coin = rng.random(n) < 0.4
    mixed = (np.where(coin, long[0], short[0]), np.where(coin, long[1], short[1]))
    distance = stats.above_line(mixed, long, short)
    assert distance.low < 0 < distance.high
    better = (rng.random(n) < 0.88, rng.normal(40, 5, n))
    distance = stats.above_line(better, long, short)
    assert distance.value == pytest.approx(0.28, abs=0.08)
    assert distance.low > 0.1
    assert stats.above_line(long, long, short).value == pytest.approx(0)
    with pytest.raises(ThriftyError, match="same tokens"):
        stats.above_line(better, long, long)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 200)), min_size=1, max_size=30))
def test_auc_oaa_is_the_area_of_the_definition(rows: list[tuple[bool, float]]) -> None:
    right, think = np.array([r for r, _ in rows], dtype=float), np.array([t for _, t in rows])
    budgets = (np.arange(20000) + 0.5) / 20000 * 100
    curve = [(right * (think < t)).mean() for t in budgets[::40]]
    assert stats.auc_oaa(right, think, 100) == pytest.approx(np.mean(curve), abs=0.01)


def test_aes_punishes_losses_more_than_it_rewards_gains() -> None:
    assert stats.aes(1.0, 50, 1.0, 100) == pytest.approx(0.5)
    assert stats.aes(0.9, 50, 1.0, 100) == pytest.approx(0.0)
    assert stats.aes(0.88, 100, 0.8, 100) == pytest.approx(0.3)
    assert stats.aes(0.5, 10, 0.0, 100) is None


# ------------------------------------------------------------------------------------------ chains and profile


@given(st.text(alphabet="ab 12.;|\nW?!", max_size=80))
def test_steps_join_up_to_the_chain(text: str) -> None:
    steps = segment(text)
    assert "".join(text[s.start : s.end] for s in steps) == text


def kinds(text: str) -> list[str]:
    return [s.kind for s in segment(text)]


def test_kinds_in_the_students_text() -> None:
    text = "a 7 + 3 = 0 . | 7 + 3 = 0 ; ok . b 0 * 4 = 2 . | 0 * 4 = 0 ; no 0 . c 0 + 5 = 5 . so 5 . ans 5 ."
    assert kinds(text) == ["work", "check", "check", "work", "check", "check", "work", "tail", "tail"]
    assert kinds("? 7 - 7 = 0 no back 7 . b 7 + 8 = 5 . now 5 .") == ["branch", "work", "tail"]
    unseen = (
        "maybe 7 - 7 gives 0 wrong undo 7 , b 7 + 8 gives 5 , check 7 + 8 gives 5 good 5 , c 5 - 6 gives 9 , thus 9 ,"
    )
    assert kinds(unseen) == ["branch", "work", "check", "work", "tail"]
    assert kinds("sort 3 , 1 , 2 . so 1 , 2 , 3 .") == ["work", "work"], "commas part a list between full stops"
    assert kinds("3 1 2 -> 1 3 2 . 1 3 2 -> 1 2 3 . so 1 2 3 .") == ["work", "work", "tail"]


@pytest.mark.parametrize("wording", ["A", "B"])
def test_blind_kinds_agree_with_what_the_tracers_meant(wording: str) -> None:
    """Measured: 0.997 or more of the characters. Not search: its dead ends look like work till they die."""
    agreed = total = 0
    for name in ("roll", "list", "bool"):
        task = load(name)
        for problem in task.problems("train", 30, 0):
            steps = task.trace(problem, tracing.style("long", wording), random.Random(problem.id))  # type: ignore[attr-defined,arg-type]
            text = " ".join(step.text for step in steps)
            meant = "".join(step.kind[0] * (len(step.text) + 1) for step in steps)[: len(text)]
            found = "".join(step.kind[0] * (step.end - step.start) for step in segment(text))
            agreed += sum(a == b for a, b in zip(meant, found, strict=True))
            total += len(text)
    assert agreed / total > 0.98


def test_kinds_in_english() -> None:
    text = (
        "Okay, so I need 3 + 4 * 2. First, 4 * 2 = 8. Then 3 + 8 = 11.\n\nWait, let me double-check. 4 * 2 is 8, "
        "and 3 + 8 is 11.\n\nAlternatively, add 4 twice: 3 + 4 + 4 = 11.\n\nSo the answer is 11.\n\n**11**"
    )
    assert kinds(text) == ["work", "work", "work", "check", "check", "branch", "tail", "tail"]
    assert kinds("2 | 12 holds. So 24 is even.") == ["work", "work"], "there a bar is divisibility"
    assert kinds("1. Add 3 and 4 to get 7.\n2. Double it to get 14.") == ["work", "work"]


def test_first_right_finds_the_step_whose_value_is_the_answer() -> None:
    chain = "7 + 3 = 10 . 10 - 1 = 9 . | 10 - 1 = 9 ; ok . so 9 ."
    assert first_right(chain, "9") == pytest.approx(len("7 + 3 = 10 . 10 - 1 = 9 .") / len(chain))
    assert first_right(chain, "7") is None, "7 is read, never a step's value"
    assert first_right("It costs $1,200. Half is 600.", "1200") == pytest.approx(17 / 29, abs=0.04)
    assert first_right("Half of 5 is 2.50.", "2.5") == 1.0
    assert first_right("3 1 2 -> 1 3 2 . 1 3 2 -> 1 2 3 .", "1 2 3") == 1.0
    assert first_right("T and F is F . not F is T .", "T") == 1.0
    assert first_right("so (B) . then (A) .", "A", parse=lambda s: s[s.find("(") + 1]) == 1.0
    assert first_right("", "3") is None


def test_profile_counts_what_came_after_and_what_chance_gives() -> None:
    lean, fat = "1 + 4 = 5 .", "1 + 4 = 5 . | 1 + 4 = 5 ; ok . so 5 ."
    p = profile([lean, fat], ["5", "5"], [True, True], [10, 30])
    share = 1 - len(lean) / len(fat)
    assert p.after_first_right == pytest.approx(share / 2)
    assert p.after_by_chance == 0, "both answers agree, so there is no other answer to deal"
    assert p.tokens_until + p.tokens_after + p.tokens_never == pytest.approx(20)
    wrong = profile(["1 + 4 = 5 . no 6 .", "2 + 2 = 3 ."], ["5", "4"], [False, False], [10, 10])
    assert wrong.underthinking == pytest.approx((1 - 11 / 18) / 2)
    assert wrong.after_first_right is None
    assert wrong.tokens_never == pytest.approx(5)
    passing = profile(["0 + 2 = 2 . 2 + 2 = 4 .", "0 + 4 = 4 . 4 - 2 = 2 ."], ["4", "2"], [True, True], [8, 8])
    assert passing.after_first_right == 0
    assert passing.after_by_chance == pytest.approx(1 - 11 / 23)


# ------------------------------------------------------------------------------------------------ summaries


def test_summary_charges_every_tried_trace() -> None:
    outcomes = [outcome("a", True, 20, tried=3), outcome("b", False, 10, tried=3)]
    s = summarise(outcomes, "best-of-3", price=(1.0, 10.0))
    assert (s["thought_tokens"], s["answer_tokens"], s["prompt_tokens"]) == (45, 6, 30)
    assert s["tokens_per_right_answer"] == 3 * (22 + 12), "the wrong answer's tokens are paid for too"
    assert s["money"] == pytest.approx((60 * 1 + 102 * 10) / 1e6 / 2)
    assert s["accuracy"] == 0.5
    assert s["accuracy_low"] < 0.5 < s["accuracy_high"]


def test_summary_by_level_and_nothing_right() -> None:
    s = summarise([outcome("a", True, 20, 1), outcome("b", False, 40, 2), outcome("c", False, 60, 2)], "x")
    assert [(r["level"], r["n"], r["accuracy"], r["thought_tokens"]) for r in s["by_level"]] == [
        (1, 1, 1.0, 20.0),
        (2, 2, 0.0, 50.0),
    ]
    assert summarise([outcome("b", False, 40)], "x")["tokens_per_right_answer"] is None


def test_summary_without_gold_reports_agreement_and_no_accuracy() -> None:
    full = [outcome(str(i), False, 40, gold=None, parsed="7") for i in range(4)]
    brief = [outcome(str(i), False, 10, gold=None, parsed="7" if i else "8") for i in range(4)]
    s = summarise(brief, "brief", reference=full)
    assert s["accuracy"] is None
    assert s["tokens_per_right_answer"] is None
    assert s["ungraded"] == 4
    assert s["agreement"] == 0.75
    assert s["by_level"][0]["accuracy"] is None


def test_summary_counts_incomplete_and_unparsed() -> None:
    good, bad = outcome("a", True, 20), outcome("b", False, 20)
    cut = Trace(np.arange(3, dtype=np.int32), "1 +", "", False, "length", usage=Usage(thought=3))
    lost = Outcome(bad.problem, cut, Grade(0.0, None), [cut], cut.usage)
    s = summarise([good, lost, Outcome(bad.problem, None, Grade(0.0, None), [], Usage())], "x")
    assert s["completion_rate"] == pytest.approx(1 / 3)
    assert s["unparsed"] == 2
    assert s["accuracy_given_completion"] == 1.0
