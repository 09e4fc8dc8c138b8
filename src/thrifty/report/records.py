"""The record of runs read for the board: lines checked one by one, and the figures that an axis can show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.contracts import ThriftyError
from thrifty.evidence import ARMS, CONTROLS, REMEDY, SCALES, VERDICTS, breaks_off

AXES = {
    "thought_tokens": "thinking tokens",
    "generated_tokens": "generated tokens",
    "trained_parameters": "trained parameters",
    "examples": "training examples",
    "training_tokens": "tokens trained on",
    "flops": "FLOPs per problem",
    "seconds": "seconds per problem",
    "training_flops": "FLOPs of training",
    "training_seconds": "seconds of training",
}
"""What a method can spend, by the name it has in a record; a mean per problem, or the whole training's."""


@dataclass(frozen=True)
class Record:
    """One run, and where it stands."""

    row: Mapping[str, Any]
    path: Path
    line: int
    """From 1; 0 where the whole file is one record."""
    added: bool
    """Brought in from outside."""

    @property
    def where(self) -> str:
        return f"{self.path.as_posix()}:{self.line}" if self.line else self.path.as_posix()


def read(path: Path, added: bool = False) -> tuple[list[Record], list[str]]:
    """All runs of a file of lines, in its order, and what was passed over, each naming file and line.

    Passed over is only what a killed run leaves: a line that breaks off. A file of indented records (as ``thrifty
    reproduce --json`` prints) or a list of them is read too. Raises ThriftyError for any other line that is no run.
    """
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ThriftyError(f"{path}: cannot be read: {error.strerror or error}") from error
    records, torn = [], []
    whole = _whole(text, path)
    if whole is not None:
        return [Record(_checked(row, f"{path}, record {i}"), path, 0, added) for i, row in enumerate(whole, 1)], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            if breaks_off(line, error):
                torn.append(f"{where}: breaks off after {len(line)} characters, as a killed run leaves it; passed over")
                continue
            raise ThriftyError(f"{where}: not valid JSON ({error}); {REMEDY}") from error
        records.append(Record(_checked(row, where), path, number, added))
    return records, torn


def _whole(text: str, path: Path) -> list[Any] | None:
    """The records of a file that holds a list of them, or indented ones one after another; None where it has lines."""
    text = text.strip()
    if not re.match(r"\[|\{\s*\n\s+\"", text):
        return None
    found: list[Any] = []
    decoder = json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except ValueError as error:
            raise ThriftyError(
                f"{path}, record {len(found) + 1}: not valid JSON ({error}); write the file anew"
            ) from error
        found += value if isinstance(value, list) else [value]
        text = text[end:].lstrip()
    return found


# ------------------------------------------------------------------------------------------------ one record


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_numbers, value.values()))


def _figures(value: Any) -> bool:
    def arm(got: Any) -> bool:
        return isinstance(got, list) and all(isinstance(u, dict) and all(map(_number, u.values())) for u in got)

    return isinstance(value, dict) and all(map(arm, value.values()))


def _units(value: Any) -> bool:
    def summary(got: Any) -> bool:
        return isinstance(got, dict) and _number(got.get("mean")) and _number(got.get("n"))

    def arm(got: Any) -> bool:
        return isinstance(got, dict) and all(map(summary, got.values()))

    return isinstance(value, list) and all(
        isinstance(u, dict) and all(arm(u.get(name)) for name in ARMS) for u in value
    )


def _parts(value: Any) -> bool:
    def effect(got: Any) -> bool:
        return isinstance(got, dict) and all(_number(got.get(k)) for k in ("value", "low", "high", "p", "n"))

    return isinstance(value, list) and all(
        isinstance(p, dict) and _text(p.get("name")) and effect(p.get("effect")) and "held" in p for p in value
    )


def _picks(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(pick, dict) for pick in value.values())


def _registered(value: Any) -> bool:
    grid = value.get("grid", {}) if isinstance(value, dict) else {} if value is None else None
    return isinstance(grid, dict) and all(isinstance(values, list) for values in grid.values())


def _tuning(value: Any) -> bool:
    def point(got: Any) -> bool:
        return isinstance(got, list) and len(got) == 2 and _picks({"": got[0]}) and (got[1] is None or _number(got[1]))

    return isinstance(value, dict) and all(isinstance(t, list) and all(map(point, t)) for t in value.values())


Check = Callable[[Any], bool]
ALWAYS: dict[str, tuple[Check, str]] = {
    "key": (lambda v: _text(v) and re.fullmatch(r"[a-z0-9][a-z0-9-]*", v) is not None, "a method's key"),
    "scale": (lambda v: v in (*SCALES, "dev"), f"one of {', '.join(SCALES)}, dev"),
    "control": (lambda v: v in (None, *CONTROLS), f"null or one of {', '.join(CONTROLS)}"),
    "time": (_text, "text"),
    "code": (_text, "text"),
    "source": (_text, "text"),
    "seconds": (_number, "a number"),
}
MEASURED: dict[str, tuple[Check, str]] = {
    "verdict": (lambda v: v in (None, *VERDICTS), f"null or one of {', '.join(VERDICTS)}"),
    "controls": (lambda v: isinstance(v, list) and all(map(_text, v)), "a list of controls"),
    "units": (_units, 'a list of {"method": {part: {"mean", "n"}}, "comparator": ...}'),
    "gates": (_table, "a list of numbers per gate"),
    "notes": (_table, "a list of numbers per note"),
}
"""Of runs that came to their end."""


def _checked(row: Any, where: str) -> dict[str, Any]:
    """The record as it is; ThriftyError, naming line and key, where the board could not read it."""
    if not isinstance(row, dict):
        raise ThriftyError(f"{where}: a run is a JSON object, as `thrifty reproduce` writes it")
    needed = ALWAYS | ({} if row.get("error") else MEASURED)
    for name, (right, what) in needed.items():
        if name not in row or not right(row[name]):
            raise ThriftyError(f"{where}: '{name}' must be {what}; is this a file that `thrifty reproduce` wrote?")
    if not _parts(row.get("parts", [])) or (row.get("verdict") and not row.get("parts")):
        raise ThriftyError(f"{where}: 'parts' must be a list of parts, each with its effect and interval")
    if not _figures(row.get("figures", {})):
        raise ThriftyError(f"{where}: 'figures' must be a list of figures by name, one per unit, for each arm")
    if not _registered(row.get("registered")):
        raise ThriftyError(f"{where}: 'registered' must be the claim that was run, its grid a list of values by name")
    if not _picks(row.get("picks", {})) or not _tuning(row.get("tuning", {})):
        raise ThriftyError(f"{where}: 'picks' and 'tuning' must be settings, and settings with what they gave, by arm")
    return row


# ------------------------------------------------------------------------------------------------ figures


SOLVING = ("accuracy", "thought_tokens", "generated_tokens", "flops", "seconds")
"""What an arm's figures say of its answers; the rest is of its training."""


def figures(row: Mapping[str, Any], arm: str) -> dict[str, list[float]]:
    """Accuracy and axes -> one figure per unit, of one arm; what the record does not hold is not there.

    Figures of other answers than those that were judged (a claim may solve something else last) are left out.
    """
    units = (row.get("figures") or {}).get(arm) or ()
    columns = {name: [float(unit[name]) for unit in units if name in unit] for name in ("accuracy", *AXES)}
    judged = [unit[arm] for unit in row["units"]]
    if any(_contradicts(unit, parts) for unit, parts in zip(units, judged, strict=False)):
        said = [float(parts["accuracy"]["mean"]) for parts in judged if "accuracy" in parts]
        columns = {"accuracy": said} | {name: values for name, values in columns.items() if name not in SOLVING}
    return {name: values for name, values in columns.items() if values and all(map(math.isfinite, values))}


def _contradicts(unit: Mapping[str, float], parts: Mapping[str, Any]) -> bool:
    """Whether a unit's figures are not those of the answers that its parts were judged by."""

    def differs(part: str, *names: str) -> bool:
        # either kind of tokens may be a claim's; where the first is not on record, nothing can be said
        if part not in parts or names[0] not in unit or not math.isfinite(said := parts[part]["mean"]):
            return False
        return not any(math.isclose(unit[name], said, rel_tol=1e-3) for name in names if name in unit)

    return differs("accuracy", "accuracy") or differs("tokens", "generated_tokens", "thought_tokens")


def plain(value: Any) -> Any:
    """JSON without NaN and infinities, which are null: unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
