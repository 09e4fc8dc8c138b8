"""Registered claims and the record of their runs; the status of a method is derived from both. Imports no method.

A method's file registers ``CLAIM = {...}``, a literal that is read like its card. ``results/KEY.jsonl`` holds one line
per run, crashes too; nothing in it is ever rewritten. docs/claims.md says how to write a claim.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from thrifty.contracts import ThriftyError

Verdict = Literal["shown", "refuted", "inconclusive", "not carried"]
VERDICTS: tuple[Verdict, ...] = ("shown", "refuted", "inconclusive", "not carried")
SCALES = ("smoke", "tiny", "gpu")
CONTROLS = ("aa", "placebo", "oracle")
ARMS = ("method", "comparator")
PACKAGE = Path(__file__).parent
NEW_SKILL = "the skill is new"
"""The gate of claims on a skill that no student has (``tune/skill.py``), which is other work than the task as it is."""
LAB = [PACKAGE / name for name in ("engines", "models", "tasks", "tune")]


@dataclass(frozen=True)
class Part:
    """One test of a claim. Effects are positive in the direction claimed: ``better`` says which way that is."""

    name: str
    test: Literal["superior", "non-inferior"]
    better: Literal["higher", "lower"] = "higher"
    on: Literal["difference", "log ratio"] = "difference"
    smallest: float | None = None
    """Superior: the smallest effect worth having, positive. Of a log ratio: 0.22 is 20 % fewer, 0.69 half."""
    margin: float | None = None
    """Non-inferior: how much worse is still the same, positive."""


@dataclass(frozen=True)
class Claim:
    """The literal ``CLAIM`` of a method's file, checked."""

    says: str
    """One sentence."""
    parts: tuple[Part, ...]
    """All of them must hold."""
    tasks: tuple[str, ...]
    n: int
    """Test problems per unit, all tasks and levels together."""
    unit: Literal["student", "training"]
    """Whose chance decides: the problems' (frozen models), or the training seed's."""
    comparator: Mapping[str, Any] | None
    """Settings of the method that it is compared with, its ``key`` among them (none: this one); None: no method."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the method under test, where they are not its defaults."""
    seeds: int = 3
    """Units: students (at most three ship), or training seeds."""
    student: str | None = "long"
    students: int = 1
    """Where the unit is the training: over how many students of that kind the trainings are dealt."""
    levels: tuple[int, ...] | None = None
    match: str = ""
    """What is made equal, in words; the claim's code does it."""
    gates: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Name -> (lowest, highest) value without which nothing is said about the paper; None is no bound."""
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Settings tuned on development problems, the same trials for both arms, by the first part's value."""
    placebo: str | Mapping[str, Any] = ""
    """Which of the family's placebos, or settings (``key`` too) that take the method's information away."""
    oracle: str | Mapping[str, Any] = ""
    """Likewise of oracles; "none: why" where the family's cannot exceed this method."""
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scale -> factors of ``n``, ``seeds`` and ``work`` (see ``Trial.scaled``), where they are not the usual ones."""
    amendments: tuple[str, ...] = ()
    """Number and reason of every change of the claim after a confirm run."""
    text: str = ""
    """The literal in canonical JSON."""

    def factor(self, scale: str, what: str) -> float:
        usual = {"smoke": {"n": 0.05, "seeds": 0.0, "work": 0.05}, "tiny": {}, "gpu": {"n": 4.0, "seeds": 2.0}}
        return float({**usual[scale], **self.scales.get(scale, {})}.get(what, 1.0))


_CLAIM = re.compile(r"^CLAIM\b[^\n]*=\s*\{.*?^\}", re.MULTILINE | re.DOTALL)


def read_claim(path: Path) -> Claim | None:
    """The literal ``CLAIM = {...}`` of a method's file, None if there is none; ThriftyError where it is wrong."""
    text = path.read_text("utf-8")
    if not re.search(r"^CLAIM\b", text, re.MULTILINE):
        return None
    match = _CLAIM.search(text)
    try:
        literal = ast.literal_eval(match.group().partition("=")[2].strip()) if match else None
    except (SyntaxError, ValueError) as error:
        raise ThriftyError(f"{path}: CLAIM must be a literal: it is read, not run ({error}).") from error
    if not isinstance(literal, dict):
        raise ThriftyError(f"{path}: CLAIM must be a literal dict over several lines, closed by a brace of its own.")
    _check(path, "CLAIM", literal, Claim)
    for part in literal["parts"]:
        _check(path, "a part of CLAIM", part, Part)
    parts = tuple(Part(**part) for part in literal["parts"])
    claim = Claim(**{**literal, "parts": parts, "text": json.dumps(literal, sort_keys=True, ensure_ascii=False)})
    _judge(path, claim)
    return claim


def _check(path: Path, what: str, given: Mapping[str, Any], record: type) -> None:
    known = {f.name: f for f in fields(record) if f.name != "text"}
    if not isinstance(given, dict):
        raise ThriftyError(f"{path}: {what} is {given!r:.60}, and should be a dict with {', '.join(known)}.")
    hints = get_type_hints(record)
    for name, value in given.items():
        if name not in known:
            raise ThriftyError(f"{path}: {what} has no field '{name}'; it has {', '.join(known)}.")
        if not fits(value, hints[name]):
            wanted = str(known[name].type).replace("Mapping", "dict").replace("Sequence", "list")
            raise ThriftyError(f"{path}: {what}: '{name}' is {value!r:.60}, and should be {wanted}.")
    for name, spec in known.items():
        if name not in given and spec.default is MISSING and spec.default_factory is MISSING:
            raise ThriftyError(f"{path}: {what} lacks '{name}'.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a literal is of a field's type: a whole number is a float too, a list a tuple, a dict a record."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is Any or is_dataclass(kind):
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (Sequence, tuple):
        return isinstance(value, list | tuple) and all(fits(one, parts[0]) for one in value)
    if kind is Mapping:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _judge(path: Path, claim: Claim) -> None:
    wrong = []
    for part in claim.parts:
        needed = "smallest" if part.test == "superior" else "margin"
        if not (getattr(part, needed) or 0) > 0:
            wrong.append(f"part '{part.name}' ({part.test}) needs {needed} > 0")
        if part.test not in ("superior", "non-inferior") or part.on not in ("difference", "log ratio"):
            wrong.append(f"part '{part.name}': test is superior or non-inferior, on difference or log ratio")
        if part.better not in ("higher", "lower"):
            wrong.append(f"part '{part.name}': better is higher or lower")
    wrong += [f"gate '{name}' is [lowest, highest]" for name, bounds in claim.gates.items() if len(bounds) != 2]
    wrong += [f"grid '{name}' has no values" for name, values in claim.grid.items() if not values]
    if not claim.parts or claim.n < 1 or claim.seeds < 1 or claim.unit not in ("student", "training"):
        wrong.append("it needs parts, n and seeds of at least 1, and unit student or training")
    if claim.unit == "student" and claim.seeds > 3:
        wrong.append("three students of each kind ship: seeds is at most 3 where the unit is the student")
    if not 1 <= claim.students <= (3 if claim.unit == "training" else 1):
        wrong.append("students is 1 to 3 where the unit is the training, else left out: seeds says how many")
    if claim.unit == "training" and claim.seeds < 3:
        wrong.append("a t interval needs at least 3 training seeds (5, and 8 for accuracy)")
    if wrong:
        raise ThriftyError(f"{path}: CLAIM cannot be registered: {'; '.join(wrong)}.")


# ------------------------------------------------------------------------------------------------ hashes


def digest(*parts: Any) -> str:
    """Sixteen hex digits of what the parts say: strings, numbers, and JSON of them."""
    text = "\x00".join(p if isinstance(p, str) else json.dumps(p, sort_keys=True, default=repr) for p in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code_hash(path: Path) -> str:
    """Of a method's code and what it imports beyond the lab (its family's helpers, other methods).

    Comments and docstrings do not count.
    """
    return digest(*(_code(file) for file in files(path)))


def source_hash(path: Path) -> str:
    """As ``code_hash``, but of the text as it stands: fast, and equal only where nothing at all has changed."""
    return digest(*(file.read_text("utf-8") for file in files(path)))


def beside(files: Iterable[str]) -> dict[str, str]:
    """Code hashes, now, of files that a claim names by key and that are not gone. Relative ones are the package's."""
    return {file: code_hash(PACKAGE / file) for file in files if (PACKAGE / file).is_file()}


def files(path: Path) -> list[Path]:
    """The file of a method, and those that ``code_hash`` counts beside it."""
    return [path, *(p for p in sorted(_imported(path) - {path}) if p.parent not in LAB and p.parent != PACKAGE)]


_IMPORT = re.compile(r"^\s*(?:from (thrifty[\w.]*) import (\([^)]*\)|[^\n]*)|import (thrifty\.[\w.]+))", re.MULTILINE)


def _imported(path: Path) -> set[Path]:
    """Files of the package that ``path`` imports, also within its functions. Parsing would slow ``thrifty list``."""
    names: set[str] = set()
    for package, taken, module in _IMPORT.findall(path.read_text("utf-8")):
        names |= {package or module, *(f"{package}.{name}" for name in re.findall(r"\w+", taken))}
    places = [PACKAGE.parent / name.replace(".", "/") for name in names]
    return {p for p in (p / "__init__.py" if p.is_dir() else p.with_suffix(".py") for p in places) if p.is_file()}


@cache
def lab_hash() -> str:
    """Of everything beside methods that verdicts rest on: claims, controls, engines, models, tasks, loops, traces."""
    folders = [*LAB, PACKAGE / "traces"]
    found = new = {PACKAGE / "claims.py", *(p for folder in folders for p in folder.glob("*.py"))}
    while new:
        new = {file for path in new for file in _imported(path)} - found
        found = found | new
    return digest(*map(_code, sorted(found)))


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)] or body[:1]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


# ------------------------------------------------------------------------------------------------ results


def results_folder(path: Path) -> Path:
    """Where a method's results stand: the package's own in the checkout or the wheel, others in ``./results``."""
    if not path.is_relative_to(PACKAGE):
        return Path("results")
    shipped = PACKAGE / "results"
    return shipped if shipped.is_dir() else PACKAGE.parents[1] / "results"


ALWAYS = ("scale", "control", "seconds", "code", "source", "claim", "registered", "commit")
"""What every run on record has, a crashed one too."""
REMEDY = "restore the line from the history, or remove it if it is no run's"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, in one write, on disk when this returns. A torn last line of a killed run is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def breaks_off(line: str, error: ValueError) -> bool:
    """Whether the line is the beginning of an object: its reader ran into the end."""
    if not line.startswith("{") or not isinstance(error, json.JSONDecodeError):
        return False
    near_end = error.pos >= len(line) - len("-Infinity")
    word = re.fullmatch(r"-?[A-Za-z0-9+.\\]*\s*", line[error.pos :])
    return error.msg.startswith("Unterminated string") or (near_end and word is not None)


def read(path: Path) -> list[dict[str, Any]]:
    """All runs in the order in which they ended; a line that a killed run left torn is passed over.

    Raises ThriftyError for any other line that is no run.
    """
    found = []
    lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else ()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if line.strip() and not breaks_off(line, error):
                raise ThriftyError(f"{path}, line {number}: not valid JSON ({error}); {REMEDY}") from error
            continue
        if missing := [name for name in ALWAYS if not isinstance(record, dict) or name not in record]:
            raise ThriftyError(f"{path}, line {number}: a run that has no '{missing[0]}'; {REMEDY}")
        found.append(record)
    return found


def writable(path: Path) -> None:
    """Raise ThriftyError where no run could be appended to ``path``; told before a run, which would be lost."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK) or place.is_dir() == (place == path):
        raise ThriftyError(f"{path}: runs cannot be kept there, since {place} is in the way or may not be written to")


@dataclass(frozen=True)
class Standing:
    """What the record says of a method as its code is now."""

    status: Literal[Verdict, "built", "stale"]
    scale: str = ""
    why: str = ""
    run: Mapping[str, Any] | None = None
    """The confirm run that counts."""


def tuned(run: Mapping[str, Any]) -> dict[str, str]:
    """Per arm of a run: what it was tuned to, whether that is an end of the grid, and what each point gave."""
    grid, found = (run.get("registered") or {}).get("grid") or {}, {}
    for arm, pick in run.get("picks", {}).items():
        points = run.get("tuning", {}).get(arm, ())
        if len(points) > 1 and len({mean for _, mean in points}) == 1:
            found[arm] = "nothing: all points are alike"
            continue
        settings = [f"{name} {value}{_end(value, grid.get(name, ()))}" for name, value in pick.items()]
        tried = [
            f"{' '.join(map(str, point.values()))}: {'diverged' if mean is None else f'{mean:.4g}'}"
            for point, mean in points
        ]
        found[arm] = ", ".join(settings) + (f" ({', '.join(tried)})" if tried else "")
    return found


def _end(value: Any, tried: Sequence[Any]) -> str:
    """At an end of the grid a better value may lie beyond it."""
    numbers = all(isinstance(v, int | float) for v in (value, *tried))
    if len(tried) < 2 or not numbers or min(tried) < value < max(tried):
        return ""
    return f", the {'largest' if value == max(tried) else 'smallest'} tried"


def counts(run: Mapping[str, Any]) -> bool:
    """Whether a run is registered: of a committed file, at scale tiny or gpu, and brought to its end."""
    return bool(run.get("commit")) and run.get("scale") in ("tiny", "gpu") and not run.get("error")


def standing(path: Path, runs: Sequence[Mapping[str, Any]]) -> Standing:
    """Built, stale, or the verdict of the first registered confirm run of this code, if its controls bear it out.

    *Shown* needs the family's placebo run to have failed, *refuted* its oracle run to have held.
    """
    ended = [r for r in runs if counts(r)]
    if not ended:
        return Standing("built")
    counted = [r for r in ended if _beside_stands(r)]
    source = source_hash(path)  # parsing two hundred files would take longer than `thrifty list` may
    code = next((r["code"] for r in counted if r["source"] == source), None) or code_hash(path)
    found = judged([r for r in counted if r["code"] == code])
    return found if found.run is not None else Standing("stale", why="its code or its comparator's has changed since")


def current(run: Mapping[str, Any], path: Path) -> bool:
    """Whether a run was of the method's code, and of that of what its claim names by key, as they are now."""
    return run["code"] == code_hash(path) and _beside_stands(run)


def _beside_stands(run: Mapping[str, Any]) -> bool:
    return beside(run.get("beside", ())) == run.get("beside", {})


def unamended(path: Path, claim: Claim, runs: Iterable[Mapping[str, Any]]) -> None:
    """Raise ThriftyError where a run that counts had another claim, and no new amendment says why it was changed."""
    for run in filter(counts, runs):
        before = len(run["registered"].get("amendments", ()))
        if run["claim"] != digest(claim.text) and before >= len(claim.amendments):
            raise ThriftyError(
                f"{path}: CLAIM is not what ran on {run['time'][:10]}, and no amendment says why: add "
                f'"{before + 1}: what was changed, and why" to its "amendments"'
            )


def judged(runs: Sequence[Mapping[str, Any]]) -> Standing:
    """By runs that count, all of one code: the first of the largest scale has the verdict, if its controls allow it."""
    scale = max((r["scale"] for r in runs if not r["control"]), key=SCALES.index, default="")
    first: dict[str | None, Mapping[str, Any]] = {}
    for r in runs:
        if r["scale"] == scale:
            first.setdefault(r["control"], r)
    if None not in first:
        return Standing("built")
    run, told = first[None], {control: r["verdict"] for control, r in first.items()}
    needed, verdict = run["controls"], run["verdict"]
    if told.get("placebo") == "shown":
        return Standing("not carried", scale, "its placebo holds as well", run)
    if verdict == "shown" and "placebo" in needed and told.get("placebo") not in ("refuted", "inconclusive"):
        return Standing("inconclusive", scale, "its placebo has not been run, or a gate of it failed", run)
    if verdict == "refuted" and "oracle" in needed and told.get("oracle") != "shown":
        return Standing("inconclusive", scale, "its oracle does not hold, or has not been run", run)
    return Standing(verdict, scale, run.get("why", ""), run)
