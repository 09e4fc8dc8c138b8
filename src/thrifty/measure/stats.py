"""Intervals, tests and indices behind every comparison. Arrays in, plain numbers out.

The unit is the problem: arrays are ``[n]``, one value per problem, in the same order in both arms. Accuracy is in
[0, 1]. ``strata`` ``[n]`` (usually the level) are kept at their size in every bootstrap draw. Draws are seeded, so a
report made twice is the same report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import nct, norm
from scipy.stats import t as student_t

from thrifty.contracts import ThriftyError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its two-sided confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class NonInferiority:
    """Whether ``new`` is at most ``margin`` worse than ``old``: it is where ``low > -margin``."""

    difference: float
    low: float
    """One-sided lower confidence bound of the difference new - old."""
    margin: float
    p: float
    """One-sided p-value of the null hypothesis ``difference <= -margin``."""
    method: Literal["tango", "bootstrap"]

    @property
    def holds(self) -> bool:
        return self.low > -self.margin


@dataclass(frozen=True)
class Effect:
    """A paired effect, positive in the direction claimed."""

    value: float
    low: float
    high: float
    """Two-sided 95 % interval."""
    lower: float
    """One-sided 95 % lower bound."""
    p: float
    """One-sided p-value of the hypothesis ``effect <= null``."""
    sd: float
    """Of one observation: a problem's difference, or a training seed's."""
    n: int
    """Observations."""
    units: tuple[float, ...]
    """The effect in each unit: a student, or a training seed."""


def wilson(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share ``right / n`` (E. B. Wilson, JASA 22, 1927).

    centre ± half, centre = (p + z²/2n) / (1 + z²/n), half = z √(p(1-p)/n + z²/4n²) / (1 + z²/n).

    >>> i = wilson(95, 100)
    >>> round(i.low, 3), round(i.high, 3)
    (0.888, 0.978)
    """
    if not 0 <= right <= n or n == 0:
        raise ThriftyError(f"wilson: {right} right of {n} is no share; give 0 <= right <= n and n > 0")
    z = float(norm.ppf(0.5 + confidence / 2))
    p, shrink = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def accuracy(right: ArrayLike, problems: Sequence[Any], strata: ArrayLike | None = None, seed: int = 0) -> Interval:
    """Accuracy with a 95 % interval: Wilson's for one sample per problem, else a bootstrap over problems.

    ``right`` ``[m]`` is 0/1 per sample, ``problems`` ``[m]`` names each sample's problem, ``strata`` ``[m]`` its level.
    Samples of one problem are correlated, so problems are resampled, not samples; every problem weighs the same.
    """
    values = _floats(right)
    names, index = np.unique(np.asarray(problems), return_inverse=True)
    if len(names) == len(values):
        return wilson(int(values.sum()), len(values))
    means = np.bincount(index, weights=values) / np.bincount(index)
    groups = None if strata is None else np.asarray(strata)[np.unique(index, return_index=True)[1]]
    return mean(means, groups, seed=seed)


def mean(
    values: ArrayLike, strata: ArrayLike | None = None, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """Mean over problems with a percentile bootstrap interval."""
    return ratio(values, np.ones(len(_floats(values))), strata, confidence, draws, seed)


def ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Σ numerator / Σ denominator with a percentile bootstrap interval over problems.

    For tokens per right answer, or one arm's tokens over another's. Infinite where a draw's denominator is 0.
    """
    top, bottom = _paired(numerator, denominator)

    def statistic(weights: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((weights @ top) / (weights @ bottom))

    return _bootstrap(statistic, len(top), strata, confidence, draws, seed)


def paired_difference(
    new: ArrayLike, old: ArrayLike, strata: ArrayLike | None = None, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of new - old over problems with a percentile bootstrap interval, problems kept in pairs."""
    a, b = _paired(new, old)
    return mean(a - b, strata, confidence, seed=seed)


def non_inferior(
    new: ArrayLike,
    old: ArrayLike,
    margin: float = 0.03,
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    draws: int = 4000,
    seed: int = 0,
) -> NonInferiority:
    """Is ``new`` at most ``margin`` less accurate than ``old``? One-sided, paired.

    For one 0/1 sample per problem Tango's score test on the discordant pairs (T. Tango, Statistics in Medicine 17,
    1998), which stays valid with few or no discordant pairs; where values are means of several samples a bootstrap.
    """
    a, b = _paired(new, old)
    if not 0 < margin < 1:
        raise ThriftyError(
            f"non_inferior: margin is a share of problems between 0 and 1, not {margin} (3 points: 0.03)"
        )
    if set(np.unique(a)) | set(np.unique(b)) <= {0.0, 1.0}:
        n, gained, lost = len(a), int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        difference = (gained - lost) / n
        low = _tango_limit(gained, lost, n, float(norm.ppf(confidence)))
        return NonInferiority(difference, low, margin, float(norm.sf(_tango(gained, lost, n, -margin))), "tango")
    gap = a - b
    weights = _weights(len(gap), strata, draws, seed)
    means = weights @ gap / len(gap)
    p = float((1 + (means <= -margin).sum()) / (1 + draws))
    return NonInferiority(float(gap.mean()), float(np.quantile(means, 1 - confidence)), margin, p, "bootstrap")


def problem_effect(
    gaps: Sequence[ArrayLike],
    strata: Sequence[ArrayLike],
    null: float = 0.0,
    draws: int = 20_000,
    seed: int = 0,
) -> Effect:
    """Mean paired difference over problems, on each of several frozen models: averaged within level, then model.

    ``gaps`` and ``strata`` hold one array ``[n]`` per model. Problems are resampled within level and model (percentile
    bootstrap). Where every difference is -1, 0 or 1 and all weigh the same, Tango's score interval (see
    ``non_inferior``) takes its place, which stays valid with few discordant pairs.
    """
    values = [_floats(g) for g in gaps]
    cells: list[tuple[Floats, float]] = []
    for gap, groups in zip(values, map(np.asarray, strata), strict=True):
        if len(groups) != len(gap):
            raise ThriftyError(f"statistics: {len(groups)} strata for {len(gap)} problems; give one per problem")
        levels = np.unique(groups)
        cells += [(gap[groups == level], 1 / len(levels) / len(values)) for level in levels]
    value = float(sum(weight * cell.mean() for cell, weight in cells))
    units = tuple(
        float(np.mean([g[s == v].mean() for v in np.unique(s)])) for g, s in zip(values, map(np.asarray, strata))
    )
    every = np.concatenate(values)
    spread = float(np.sqrt(np.mean(np.concatenate([(cell - cell.mean()) ** 2 for cell, _ in cells]))))
    even = np.allclose([weight / len(cell) for cell, weight in cells], 1 / len(every))
    if even and set(np.unique(every)) <= {-1.0, 0.0, 1.0}:
        gained, lost = int((every == 1).sum()), int((every == -1).sum())
        low, high = (_tango_limit(gained, lost, len(every), side * float(norm.ppf(0.975))) for side in (1, -1))
        lower, z = _tango_limit(gained, lost, len(every), float(norm.ppf(0.95))), _tango(gained, lost, len(every), null)
        p = 1.0 if np.isnan(z) else float(norm.sf(z))  # nothing gained, nothing lost: no evidence
        return Effect(value, low, high, lower, p, spread, len(every), units)
    rng, means = np.random.default_rng(seed), np.zeros(draws)
    for cell, weight in cells:
        for start in range(0, draws, 1000):  # a block at a time: [1000, len(cell)] indices
            drawn = cell[rng.integers(len(cell), size=(min(1000, draws - start), len(cell)))]
            means[start : start + 1000] += weight * drawn.mean(axis=1)
    p = float((1 + (means <= null).sum()) / (1 + draws))
    low, lower, high = (float(q) for q in np.quantile(means, (0.025, 0.05, 0.975)))
    return Effect(value, low, high, lower, p, spread, len(every), units)


def seed_effect(effects: ArrayLike, null: float = 0.0) -> Effect:
    """Mean of one paired effect per training seed, with Student's t interval. Needs two seeds."""
    x = _floats(effects)
    if len(x) < 2:
        raise ThriftyError(f"seed_effect: a t interval needs at least 2 training seeds, not {len(x)}")
    sd, error, t = float(x.std(ddof=1)), float(x.std(ddof=1) / np.sqrt(len(x))), student_t(len(x) - 1)
    value = float(x.mean())
    gap = value - null
    p = float(t.sf(gap / error)) if error > 0 else float(gap <= 0)
    half = float(t.ppf(0.975)) * error
    return Effect(
        value, value - half, value + half, value - float(t.ppf(0.95)) * error, p, sd, len(x), tuple(map(float, x))
    )


def observations_needed(sd: float, distance: float, alpha: float, power: float = 0.8) -> int:
    """Paired observations to tell an effect from one that lies ``distance`` away: ((z_{1-alpha} + z_power) sd / d)^2.

    ``alpha`` is one-sided.

    >>> observations_needed(sd=0.2**0.5, distance=0.05, alpha=0.0025)
    1066
    """
    z = float(norm.isf(alpha) + norm.ppf(power))
    return int(np.ceil(min(1e9, (z * sd / max(abs(distance), 1e-9)) ** 2)))


def seeds_needed(sd: float, distance: float, alpha: float, power: float = 0.8) -> int:
    """As ``observations_needed``, for Student's t over training seeds: the noncentral t has the power from there on.

    >>> seeds_needed(sd=1.0, distance=1.0, alpha=0.025), observations_needed(sd=1.0, distance=1.0, alpha=0.025)
    (10, 8)
    """
    n = max(2, observations_needed(sd, distance, alpha, power))
    while sd > 0 and n < 1000 and nct.sf(student_t.isf(alpha, n - 1), n - 1, distance * np.sqrt(n) / sd) < power:
        n += 1
    return n


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) points that no other point beats in both, cheapest first.

    >>> pareto([(10, 0.9), (5, 0.8), (7, 0.7), (10, 0.85)])
    [1, 0]
    """
    best, kept = -np.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            kept.append(index)
            best = points[index][1]
    return kept


def above_line(
    point: tuple[ArrayLike, ArrayLike],
    long: tuple[ArrayLike, ArrayLike],
    short: tuple[ArrayLike, ArrayLike],
    strata: ArrayLike | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """How far a setting stands above the straight line from the short to the long one, in accuracy.

    Each argument is (right ``[n]``, tokens ``[n]``) on the same problems.
    d = A_p - [A_s + (A_l - A_s)(T_p - T_s)/(T_l - T_s)], A mean accuracy, T mean tokens. The line is what tossing a
    coin between the two students gives, so d > 0 is what a dial earns over mixing. All three are resampled together.
    """
    (rp, tp), (rl, tl), (rs, ts) = (_paired(*arm) for arm in (point, long, short))
    if len({len(rp), len(rl), len(rs)}) != 1:
        raise ThriftyError("above_line: the three settings must be measured on the same problems, in the same order")
    if np.isclose(tl.mean(), ts.mean()):
        raise ThriftyError("above_line: long and short spend the same tokens, so no line joins them")

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        a_p, t_p, a_l, t_l, a_s, t_s = (weights @ x / total for x in (rp, tp, rl, tl, rs, ts))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(a_p - (a_s + (a_l - a_s) * (t_p - t_s) / (t_l - t_s)))

    return _bootstrap(statistic, len(rp), strata, confidence, draws, seed)


def auc_oaa(right: ArrayLike, thought_tokens: ArrayLike, t_max: float) -> float:
    """Area under overthinking-adjusted accuracy over the token budget (OptimalThinkingBench, arXiv 2508.13141).

    OAA_t = (1/n) Σ σᵢ·1[thinkᵢ < t]; AUC = (1/t_max) ∫₀^t_max OAA_t dt, which is exactly
    (1/n) Σ σᵢ·max(0, 1 - thinkᵢ/t_max).

    >>> auc_oaa([1, 1, 0], [0, 50, 10], t_max=100)
    0.5
    """
    sigma, tokens = _paired(right, thought_tokens)
    if t_max <= 0:
        raise ThriftyError(f"auc_oaa: t_max is a number of tokens above 0, not {t_max}")
    return float(np.mean(sigma * np.maximum(0.0, 1 - tokens / t_max)))


def aes(accuracy: float, tokens: float, base_accuracy: float, base_tokens: float) -> float | None:
    """Accuracy-efficiency score (O1-Pruner, arXiv 2501.12570; constants 1, 3, 5 as the field quotes them).

    ΔLen = (T_base - T)/T_base, ΔAcc = (A - A_base)/A_base; ΔLen + 3|ΔAcc| if accuracy rises,
    ΔLen - 5|ΔAcc| if it falls.
    None where the baseline has no tokens or no right answer.

    >>> round(aes(0.9, 50, 1.0, 100), 3)
    0.0
    """
    if base_tokens <= 0 or base_accuracy <= 0:
        return None
    saved, gained = (base_tokens - tokens) / base_tokens, (accuracy - base_accuracy) / base_accuracy
    return saved + (3 if gained >= 0 else 5) * gained


def _floats(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ThriftyError(f"statistics: expected one value per problem, got an array of shape {array.shape}")
    return array


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _floats(a), _floats(b)
    if len(x) != len(y):
        raise ThriftyError(f"statistics: {len(x)} against {len(y)} values; pair both arms by problem first")
    return x, y


def _weights(n: int, strata: ArrayLike | None, draws: int, seed: int) -> Floats:
    """``[draws, n]``: how often each problem was drawn, with replacement within its stratum."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((draws, n))
    groups = np.zeros(n, dtype=int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    if len(groups) != n:
        raise ThriftyError(f"statistics: {len(groups)} strata for {n} problems; give one per problem")
    for group in range(int(groups.max()) + 1):
        members = np.flatnonzero(groups == group)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
    return weights


def _bootstrap(
    statistic: Callable[[Floats], Floats], n: int, strata: ArrayLike | None, confidence: float, draws: int, seed: int
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a statistic of problem weights ``[draws, n] -> [draws]``."""
    value = float(statistic(np.ones((1, n)))[0])
    sample = statistic(_weights(n, strata, draws, seed))
    sample = sample[~np.isnan(sample)]
    if not len(sample):
        return Interval(value, float("nan"), float("nan"))
    # "lower" and "higher" stay defined where some draws are infinite
    low = np.quantile(sample, (1 - confidence) / 2, method="lower")
    high = np.quantile(sample, (1 + confidence) / 2, method="higher")
    return Interval(value, float(low), float(high))


def _tango(gained: int, lost: int, n: int, delta: float) -> float:
    """Tango's z of the hypothesis p(gained) - p(lost) = delta (1998, eqs. 12-14)."""
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share = (np.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * share + delta * (1 - delta))
    gap = gained - lost - n * delta
    return float(gap / np.sqrt(variance)) if variance > 0 else float(np.sign(gap)) * np.inf


def _tango_limit(gained: int, lost: int, n: int, z: float) -> float:
    """The difference at which Tango's z is ``z``: the lower limit for a positive one, the upper for a negative."""
    difference, edge = (gained - lost) / n, -np.sign(z) * (1 - 1e-9)

    def excess(delta: float) -> float:
        return _tango(gained, lost, n, delta) - z

    if np.sign(excess(edge)) != np.sign(z):
        return float(-np.sign(z))
    inner = difference - np.sign(z) * 1e-12
    return float(brentq(excess, min(edge, inner), max(edge, inner)))
