"""How claims are judged: parts, levels, students, training seeds, and what it would take."""

from typing import Any

import numpy as np
import pytest

from thrifty.claims import decide, judge
from thrifty.evidence import Claim, Part
from thrifty.measure import stats

UP = Part("accuracy", "superior", smallest=0.05)
SAME = Part("accuracy", "non-inferior", margin=0.03)


def units(mean: float, n: int = 400, sd: float = 0.4, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Three students whose paired differences have exactly this mean and spread."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=n) for _ in range(3)]
    return [(x - x.mean()) / x.std() * sd + mean for x in drawn], [np.zeros(n)] * 3


@pytest.mark.parametrize(
    ("part", "mean", "held", "refuted"),
    [
        (UP, 0.06, True, False),
        (UP, 0.03, False, False),
        (UP, 0.0, False, True),
        (UP, -0.2, False, True),
        (SAME, 0.0, True, False),
        (SAME, -0.02, False, False),
        (SAME, -0.08, False, True),
    ],
)
def test_parts_are_held_refuted_or_left_open(part, mean, held, refuted):
    result = judge(part, "student", *units(mean))
    assert (result.held, result.refuted) == (held, refuted)


def test_an_effect_that_is_there_but_smaller_than_registered_is_refuted():
    pairs = np.repeat([1.0, -1.0, 0.0], [280, 200, 3520])
    result = judge(UP, "student", [pairs] * 3, [np.zeros(4000)] * 3)
    assert result.effect.p < 1e-6
    assert result.refuted
    assert not result.held


def test_one_student_that_says_no_keeps_a_claim_open():
    effects, strata = units(0.2)
    effects[1] = effects[1] - 0.21
    result = judge(UP, "student", effects, strata)
    assert result.effect.p < 0.001
    assert not result.held
    assert result.needed is None, "more problems would not settle it"
    assert "not on every student" in decide(claim_of(UP), [result], {})[1]


def test_training_seeds_are_the_unit_where_arms_are_trained():
    result = judge(UP, "training", [0.10, 0.12, 0.08, 0.11, 0.09], [])
    assert result.held
    assert result.effect.low == pytest.approx(0.1 - 2.776 * np.std([10, 12, 8, 11, 9], ddof=1) / 100 / 5**0.5, abs=1e-4)
    assert not judge(UP, "training", [0.30, -0.1, 0.4, -0.2, 0.2], []).held


@pytest.mark.parametrize("mean", [0.01, 0.04])
def test_the_problems_that_it_would_take_do_decide(mean):
    """Four in five new samples of that size decide, at the effect as measured; here a fifth of the pairs differ."""
    rng, decided = np.random.default_rng(1), 0

    def drawn(n: int) -> list[Any]:
        return [rng.choice([1.0, -1.0, 0.0], n, p=[0.1 + mean / 2, 0.1 - mean / 2, 0.8]) for _ in range(3)]

    pairs = np.repeat([1.0, -1.0, 0.0], [20 + round(100 * mean), 20 - round(100 * mean), 160])
    needed = judge(UP, "student", [pairs] * 3, [np.zeros(200)] * 3).needed
    for _ in range(100):
        result = judge(UP, "student", drawn(needed // 3), [np.zeros(needed // 3)] * 3)
        decided += result.refuted or result.effect.p < 0.0025
    assert 70 <= decided <= 95


def claim_of(*parts: Part, **fields: Any) -> Claim:
    return Claim("says", parts, ("roll",), 100, "student", None, **fields)


def test_every_part_and_every_gate_must_hold():
    good, bad = judge(UP, "student", *units(0.2)), judge(SAME, "student", *units(-0.02))
    worst = judge(UP, "student", *units(-0.1))
    claim = claim_of(UP, SAME, gates={"repairs": (0.1, 0.25)})
    assert decide(claim, [good, good], {"repairs": [0.2, 0.1]})[0] == "shown"
    verdict, why = decide(claim, [good, bad], {"repairs": [0.2]})
    assert verdict == "inconclusive"
    assert f"{bad.needed:,}" in why
    assert decide(claim, [good, worst], {"repairs": [0.2]})[0] == "refuted"
    for value in (0.3, 0.0, float("nan")):
        verdict, why = decide(claim, [good, worst], {"repairs": [0.2, value]})
        assert verdict == "not carried"
        assert "repairs" in why


def test_few_differing_problems_still_give_an_interval():
    same = stats.problem_effect([np.zeros(40)] * 3, [np.zeros(40)] * 3)
    assert same.low < -0.02 < 0.02 < same.high
    assert same.p == 1.0
    lost = stats.problem_effect([np.array([0.0] * 38 + [-1, -1])], [np.zeros(40)], null=-0.03)
    assert lost.lower < -0.1 < lost.value == -0.05


def test_levels_weigh_the_same_whatever_their_size():
    gaps, levels = np.array([1.0] * 10 + [0.0] * 30), np.array([1] * 10 + [2] * 30)
    assert stats.problem_effect([gaps], [levels]).value == pytest.approx(0.5)


def test_a_superior_part_needs_p_of_five_in_a_thousand_both_ways():
    """Student's t with 4 degrees of freedom leaves 0.0025 above 5.598 and 0.005 above 4.604."""
    spread = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / np.sqrt(0.5)  # standard error 1
    for t, held in ((5.7, True), (5.5, False), (4.7, False)):
        assert judge(UP, "training", list(0.02 * (spread + t)), []).held == held


def test_a_student_that_loses_more_than_the_margin_keeps_non_inferiority_open():
    effects, strata = units(0.05, n=4000)
    effects[2] = effects[2] - 0.09
    result = judge(SAME, "student", effects, strata)
    assert result.effect.lower > -0.03
    assert not result.held


def test_seeds_have_students_t_and_what_it_would_take_does_too():
    effect = stats.seed_effect([1.0, 2.0, 3.0])
    assert effect.p == pytest.approx(0.0371, abs=1e-4)  # t = 3.464 with 2 degrees of freedom; the normal's is 0.0003
    rng, decided = np.random.default_rng(2), 0
    shape = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    needed = judge(UP, "training", list(0.06 + 0.08 * shape / shape.std(ddof=1)), []).needed
    for _ in range(400):
        result = judge(UP, "training", list(rng.normal(0.06, 0.08, needed)), [])
        decided += result.refuted or result.effect.p <= 0.0025
    assert 0.75 <= decided / 400 <= 0.95


def test_a_levels_spread_counts_by_its_weight_not_its_size():
    rng = np.random.default_rng(3)
    gaps, levels = np.concatenate([rng.normal(size=16), np.zeros(1600)]), np.repeat([1, 2], [16, 1600])
    effect = stats.problem_effect([gaps], [levels])
    assert (effect.high - effect.low) / 2 == pytest.approx(1.96 * gaps[:16].std() / 4 / 2, rel=0.1)
