"""Run a registered claim: the same pipeline once per arm and unit, a control in the method's place, a verdict.

``claim(trial)`` of a method's file measures *one arm* in *one unit* and returns a value per problem for each part. It
is called for the method, then for the comparator, so that both get the same treatment; a control takes the method's
place without the claim knowing. docs/claims.md says how to write one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import controls, evidence, registry
from thrifty.contracts import ThriftyError
from thrifty.engines import spread
from thrifty.evidence import ARMS, Claim, Part, digest
from thrifty.measure import stats
from thrifty.progress import Progress
from thrifty.trial import Trial, fingerprint
from thrifty.tune.supervised import Diverged

ALPHA = 0.005
"""Two-sided level of a superior part; a non-inferior part is tested at 5 %, one-sided."""


# ------------------------------------------------------------------------------------------------ verdicts


@dataclass(frozen=True)
class Result:
    """One part, measured. ``effect`` is positive in the direction claimed."""

    name: str
    effect: stats.Effect
    held: bool
    refuted: bool
    needed: int | None
    """Observations (problems of all students, or training seeds) that it would take if the effect is as measured.

    None where it holds on average and fails on a student, which more observations would not settle.
    """


def judge(part: Part, unit: str, effects: Sequence[Any], strata: Sequence[Any]) -> Result:
    """Test one part. ``effects``: per student the problems' paired differences, or one number per training seed.

    Superior holds where p <= 0.005 (two-sided) with the same sign on all students, and is refuted where the 95 %
    interval lies below the smallest effect. Non-inferior holds where the one-sided 95 % bound lies above -margin on
    average and every student's effect does, and is refuted where the 95 % interval lies below it.
    """
    superior = part.test == "superior"
    edge = float((part.smallest if superior else part.margin) or 0) * (1 if superior else -1)
    null, alpha = (0.0, ALPHA / 2) if superior else (edge, 0.05)
    e = stats.seed_effect(effects, null) if unit == "training" else stats.problem_effect(effects, strata, null)
    refuted = e.high < edge
    one_sign = unit == "training" or all(u > null for u in e.units)
    observations = stats.seeds_needed if unit == "training" else stats.observations_needed
    to_hold, to_refute = (
        observations(e.sd, max(0.0, distance), level)
        for distance, level in ((e.value - null, alpha), (edge - e.value, 0.025))
    )
    enough = e.p <= alpha and not refuted
    needed = None if enough and not one_sign else max(min(to_hold, to_refute), e.n + 1)
    return Result(part.name, e, enough and one_sign, refuted, needed)


def decide(
    claim: Claim, results: Sequence[Result], gates: Mapping[str, Sequence[float]]
) -> tuple[evidence.Verdict, str]:
    """The verdict of all parts and gates, and why."""
    for name, (low, high) in claim.gates.items():
        for value in gates[name]:
            if not (float("-inf") if low is None else low) <= value <= (float("inf") if high is None else high):
                return "not carried", f"gate '{name}' is {value:.3g}, not within {low} and {high}"
    told = {r.name: f"{r.name} {r.effect.value:+.3f} [{r.effect.low:+.3f}, {r.effect.high:+.3f}]" for r in results}
    if refuted := [told[r.name] for r in results if r.refuted]:
        return "refuted", "; ".join(refuted)
    if undecided := [f"{told[r.name]} {_open(claim, r)}" for r in results if not r.held]:
        return "inconclusive", "; ".join(undecided)
    return "shown", "; ".join(told.values())


def _open(claim: Claim, result: Result) -> str:
    """What it would take."""
    if result.needed is None:
        return f"holds on average, not on every student ({', '.join(f'{u:+.3f}' for u in result.effect.units)})"
    return f"would take about {result.needed:,} {'training seeds' if claim.unit == 'training' else 'problems in all'}"


def _gap(part: Part, new: Any, old: Any) -> Any:
    """The effect, positive in the direction claimed; a log ratio counts values below 1e-9 as 1e-9."""
    a, b = np.asarray(new, float), np.asarray(old, float)
    if a.shape != b.shape:
        raise ThriftyError(f"part '{part.name}': the arms returned {a.shape} and {b.shape} values; pair by problem")
    if part.on == "log ratio":
        a, b = np.log(np.maximum(a, 1e-9)), np.log(np.maximum(b, 1e-9))
    return (a - b) * (1 if part.better == "higher" else -1)


# ------------------------------------------------------------------------------------------------ a run


def reproduce(
    method: registry.Method,
    scale: str = "tiny",
    control: str | None = None,
    dev: bool = False,
    cache: Path = Path("runs/claims"),
    results: Path | None = None,
    progress: Progress | None = None,
    stream: int = 1,
    pool: Executor | None = None,
) -> dict[str, Any]:
    """Run a method's claim and append what came of it to ``results/KEY.jsonl``, a crash too; the record comes back.

    ``dev`` tries it out on development problems, as smoke runs always do; only runs of a committed file count.
    ``stream`` tells A/A runs apart: it compares streams ``stream`` and ``stream - 1``. ``pool`` takes the points of the
    grid side by side, then the units; they share the cache.
    """
    claim = evidence.read_claim(method.path)
    if claim is None:
        raise ThriftyError(f"{method.path} registers no CLAIM; docs/claims.md says how to write one")
    if isinstance(reason := controls.PLACEBOS[method.family], str) and not claim.placebo:
        raise ThriftyError(
            f"{method.path}: a placebo of {method.family} cannot be made in general, since {reason}. Register in CLAIM "
            "the settings that take the information away ('placebo': {...}), or 'placebo': 'none: why'"
        )
    path = (results or evidence.results_folder(method.path)) / f"{method.key}.jsonl"
    _check(method, claim, control)
    commit, code = _commit(evidence.files(method.path)), evidence.code_hash(method.path)
    record: dict[str, Any] = {
        "key": method.key,
        "family": method.family,
        "title": method.card.title,
        "scale": "dev" if dev and scale != "smoke" else scale,
        "control": control,
        "stream": stream,
        "controls": [c for c in ("placebo", "oracle") if why_not(method, claim, c) is None],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "claim": digest(claim.text),
        "registered": json.loads(claim.text),
        "code": code,
        "source": evidence.source_hash(method.path),
        "beside": _beside(claim),
        "lab": evidence.lab_hash(),
        "commit": commit,
        "settings": {"method": claim.settings, "comparator": claim.comparator},
    }
    # Test problems follow from what is registered: a look before that, at a file not yet committed, is at others.
    secret = f"{claim.text}/{code}" + ("" if commit else "/not registered")
    dev, progress = dev or scale == "smoke", progress or Progress()
    started = time.monotonic()
    try:
        run = _Run(method, claim, scale, control, dev, cache, secret, progress, stream, pool)
        record |= run.everything()
    except BaseException as error:
        record["error"] = "".join(traceback.format_exception_only(error)).strip()
        raise
    finally:
        record["seconds"] = round(time.monotonic() - started, 1)
        evidence.append(path, record)
    return record


@dataclass(frozen=True)
class _Run:
    method: registry.Method
    claim: Claim
    scale: str
    control: str | None
    dev: bool
    cache: Path
    secret: str
    progress: Progress
    stream: int
    pool: Executor | None

    def everything(self) -> dict[str, Any]:
        """What goes into the record: units, gates, notes, parts and the verdict."""
        claim = self.claim
        tuning = self._tuning() if claim.grid else {}
        picks = {arm: self._best(tried) for arm, tried in tuning.items()}
        more = claim.factor(self.scale, "seeds") if claim.unit == "training" else 1
        count = 1 if self.scale == "smoke" else round(claim.seeds * more)
        runs = self._each(_Run._unit, [(unit, picks) for unit in range(count)])
        gates: dict[str, list[float]] = {}
        notes: dict[str, list[float]] = {}
        for arm in itertools.chain(*runs):
            for name, value in arm["gates"].items():
                gates.setdefault(name, []).append(value)
            for name, value in arm["notes"].items():
                notes.setdefault(f"{arm['arm']}: {name}", []).append(value)
        effects: dict[str, list[Any]] = {p.name: [] for p in claim.parts}
        strata, units = [], []
        arms = [run[-2:] for run in runs]
        for new, old in arms:
            for part in claim.parts:
                pair = [np.asarray(x[part.name], float) for x in (new, old)]
                effects[part.name].append(_gap(part, *(p.mean() for p in pair) if claim.unit == "training" else pair))
            strata.append(old["strata"] or ["all"] * len(old[claim.parts[0].name]) if claim.unit == "student" else [])
            units.append(
                {"method": _summary(claim, new), "comparator": _summary(claim, old), "student": old["student"]}
            )
        found = {
            "units": units,
            "figures": {name: [pair[i]["figures"] for pair in arms] for i, name in enumerate(ARMS)},
            "seeds": [old["seed"] for _, old in arms],
            "problems": [old["problems"] for _, old in arms],
            "gates": gates,
            "notes": notes,
            "picks": picks,
            "tuning": tuning,
            "verdict": None,
        }
        if missing := set(claim.gates) - set(gates):
            raise ThriftyError(f"{self.method.path}: claim(trial) measured no gate {', '.join(sorted(missing))}")
        if self.scale == "smoke":
            return found
        parts = [judge(p, claim.unit, effects[p.name], strata) for p in claim.parts]
        verdict, why = decide(claim, parts, gates)
        return found | {"verdict": verdict, "why": why, "parts": [dataclasses.asdict(p) for p in parts]}

    def _unit(self, unit: int, picks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Every arm that is run in a unit; the last two are compared, the second with the first."""
        pick = picks.get("comparator", {})
        new = self._arm("method", unit, pick=picks.get("method", {}))
        old = self._arm("comparator", unit, pick=pick, other=new)
        if self.control != "aa":
            return [new, old]
        # the comparator against itself, in two sampling and training streams
        again = [self._arm("comparator", unit, pick=pick, other=new, stream=self.stream - i) for i in (0, 1)]
        return [new, old, *again]

    def _arm(self, arm: str, unit: int, tuning: bool = False, **changes: Any) -> dict[str, Any]:
        """Run ``claim(trial)`` for one arm in one unit."""
        control = self.control if arm == "method" and not tuning and self.control != "aa" else None
        trial = Trial(
            self.claim, arm, unit, self.scale, self.cache, self.secret, self.dev or tuning, tuning,
            progress=self.progress, **changes,
        )  # fmt: skip
        trial.method = _method(self.method, self.claim, arm, control, trial)
        measure = getattr(sys.modules[registry.method_class(self.method).__module__], "claim", None)
        if measure is None:
            raise ThriftyError(f"{self.method.path} registers a CLAIM but has no claim(trial)")
        self.progress.say(f"{self.method.key}, {control or arm}, unit {unit}{f' at {trial.pick}' if tuning else ''}")
        got = dict(measure(trial))
        if missing := {p.name for p in self.claim.parts} - set(got):
            raise ThriftyError(f"{self.method.path}: claim(trial) returned nothing for {', '.join(sorted(missing))}")
        for part in self.claim.parts:
            if not np.isfinite(np.asarray(got[part.name], float)).all():
                raise Diverged(f"{self.method.path}: what claim(trial) returned for {part.name} is not finite")
            if self.claim.unit == "student" and np.ndim(got[part.name]) != 1:
                raise ThriftyError(
                    f"{self.method.path}: claim(trial) returned {got[part.name]!r:.60} for {part.name}: where the unit "
                    "is the student, give a value per problem"
                )
        trial.settle(got)
        return {
            **got,
            "arm": arm,
            "gates": trial.gates,
            "notes": trial.notes,
            "strata": trial.strata,
            "student": digest(fingerprint(Path(trial.asset()))) if self.claim.student else "",
            "seed": trial.seed,
            "problems": digest(trial.own),
            "figures": trial.figures,
        }

    def _tuning(self) -> dict[str, list[tuple[dict[str, Any], float | None]]]:
        """Per arm every point of the grid, and what it gave; both arms try as many."""
        points = [dict(zip(self.claim.grid, point)) for point in itertools.product(*self.claim.grid.values())]
        values = self._each(_Run._point, list(itertools.product(ARMS, points)))
        return {arm: list(zip(points, values[i * len(points) :])) for i, arm in enumerate(ARMS)}

    def _point(self, arm: str, pick: dict[str, Any]) -> float | None:
        """The first part's mean on development problems at a point of the grid; None where training diverged."""
        try:
            return float(np.mean(self._arm(arm, 0, tuning=True, pick=pick)[self.claim.parts[0].name]))
        except Diverged as error:
            self.progress.say(str(error))
            return None

    def _each(self, work: Callable[..., Any], asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """``work(run, *words)`` of all words in order, here or side by side."""
        if self.pool is None:
            return [work(self, *words) for words in asked]
        own = dataclasses.replace(self, progress=Progress(self.progress.quiet, bars=False), pool=None)
        futures = [self.pool.submit(_elsewhere, Path.cwd(), work, own, words) for words in asked]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _best(self, tried: Sequence[tuple[dict[str, Any], float | None]]) -> dict[str, Any]:
        sign = 1 if self.claim.parts[0].better == "higher" else -1
        measured = [(sign * value, pick) for pick, value in tried if value is not None]
        if not measured:
            raise ThriftyError(f"{self.method.path}: training diverged at every point of the grid; give smaller rates")
        return max(measured, key=lambda one: one[0])[1]


def _elsewhere(folder: Path, work: Callable[..., Any], run: _Run, words: Sequence[Any]) -> Any:
    """In a worker."""
    with spread.inside(folder):
        return work(run, *words)


def why_not(method: registry.Method, claim: Claim, control: str) -> str | None:
    """None where there is this control for the claim, else the reason."""
    own = claim.placebo if control == "placebo" else claim.oracle
    if control == "aa" or isinstance(own, Mapping):
        return None
    if own.startswith("none"):
        return own
    table = (controls.PLACEBOS if control == "placebo" else controls.ORACLES).get(method.family, "the family has none")
    return table if isinstance(table, str) else None


def _check(method: registry.Method, claim: Claim, control: str | None) -> None:
    """Raise ThriftyError, before any work, for a control that there is not and for settings that nothing takes."""
    if control and (reason := why_not(method, claim, control)):
        raise ThriftyError(f"{method.key} ({method.family}) has no {control}: {reason}")
    _made(method, claim.settings, "settings")
    if claim.comparator is not None:
        _made(method, claim.comparator, "comparator")
    for name, own, tables in (
        ("placebo", claim.placebo, controls.PLACEBOS),
        ("oracle", claim.oracle, controls.ORACLES),
    ):
        table = tables.get(method.family, ())
        if isinstance(own, Mapping):
            _made(method, _whole(claim, own), name)
        elif own and not own.startswith("none") and (isinstance(table, str) or own not in table):
            known = "none" if isinstance(table, str) else ", ".join(table) or "none"
            raise ThriftyError(f"{method.path}: no {name} '{own}'; {method.family} has {known}")


def _whole(claim: Claim, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A control's settings: another method's, or those of the method under test with some changed."""
    return own if "key" in own else {**claim.settings, **own}


def _made(method: registry.Method, settings: Mapping[str, Any], what: str) -> Any:
    """The method with other settings, or the one that they name by ``key``."""
    cls = registry.load(settings["key"]) if "key" in settings else registry.method_class(method)
    try:
        return cls(**{name: value for name, value in settings.items() if name != "key"})
    except TypeError as error:
        names = ", ".join(f.name for f in dataclasses.fields(cls))
        raise ThriftyError(f"{method.path}: CLAIM's {what}: {error}; {cls.__name__} has {names or 'none'}") from error


def _method(method: registry.Method, claim: Claim, arm: str, control: str | None, trial: Trial) -> Any:
    """The object that a claim uses: the comparator, the method, or the control that takes its place."""
    if arm == "comparator":
        return None if claim.comparator is None else _made(method, claim.comparator, "comparator")
    if control is None:
        return _made(method, claim.settings, "settings")
    own = claim.placebo if control == "placebo" else claim.oracle
    if isinstance(own, Mapping):
        return _made(method, _whole(claim, own), control)
    table = (controls.PLACEBOS if control == "placebo" else controls.ORACLES)[method.family]
    assert not isinstance(table, str)
    return table[own or next(iter(table))](_made(method, claim.settings, "settings"), trial.task(), trial.fresh)


def _summary(claim: Claim, got: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, count and hash of each part's values, and the mean of each task and level."""
    found = {}
    for part in claim.parts:
        values, strata = np.atleast_1d(np.asarray(got[part.name], float)), np.asarray(got["strata"])
        levels = {s: float(values[strata == s].mean()) for s in np.unique(strata)} if len(strata) == len(values) else {}
        name = digest(hashlib.sha256(values.round(9).tobytes()).hexdigest())
        found[part.name] = {"mean": float(values.mean()), "n": values.size, "levels": levels, "hash": name}
    return found


def _beside(claim: Claim) -> dict[str, str]:
    """Hashes of what the claim names by key: another method may be its comparator or a control."""
    named = [s for s in (claim.comparator, claim.placebo, claim.oracle) if isinstance(s, Mapping) and "key" in s]
    paths = [registry.find(settings["key"]).path for settings in named]
    return evidence.beside(
        str(path.relative_to(registry.PACKAGE) if path.is_relative_to(registry.PACKAGE) else path) for path in paths
    )


def _commit(files: Sequence[Path]) -> str | None:
    """The commit that registered the first file; None where one has changed since, or the first is in no repository."""

    def git(path: Path, *words: str) -> str:
        command = ["git", "-C", str(path.parent), *words, "--", path.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    commit = None
    for number, path in enumerate(files):
        try:
            if git(path, "status", "--porcelain"):
                return None
            commit = commit or git(path, "log", "-1", "--format=%H")[:12]
        except (OSError, subprocess.CalledProcessError):  # an installed package is in no repository
            if number == 0:
                return None
    return commit or None
