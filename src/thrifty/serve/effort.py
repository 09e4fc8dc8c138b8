"""Calibration files: what ``reasoning_effort`` turns, and the accuracy and tokens that were measured there.

    {"format": "thrifty-effort/1", "model": "long", "task": "roll", "n": 400,
     "dial": "strength",
     "levels": {"none":   {"setting": 0.0, "accuracy": 0.41, "tokens": 60.2},
                "medium": {"setting": 0.5, "accuracy": 0.66, "tokens": 98.0, "accuracy_interval": [0.61, 0.71]},
                "high":   {"setting": 1.0, "accuracy": 0.71, "tokens": 121.7}}}

``dial`` says what a level's ``setting`` is: ``strength`` of the gateway's adapter (a number; for models of CoT-Valve 1
is usually the shortest), ``thinking_token_budget`` (a whole number, null for none), or ``strategy`` (a text as behind
``MODEL:``, such as ``truncation:budget=64``; null for the plain model). ``accuracy`` is the share of right answers on
``n`` problems of ``task``, ``tokens`` the mean generated tokens per problem. A number as effort lies between the names,
which are equally far apart: none 0, minimal 0.25, low 0.5, medium 0.75, high 1. Between two measured levels numbers are
interpolated linearly, unless ``"between": "nearest"`` says that what lies there is worse, and a strategy is the nearer
level's; beyond the measured ones there is no promise, so it is refused. ``thrifty calibrate`` writes such files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from thrifty.contracts import ThriftyError
from thrifty.files import write_json

FORMAT = "thrifty-effort/1"
EFFORTS: Mapping[str, float] = {"none": 0.0, "minimal": 0.25, "low": 0.5, "medium": 0.75, "high": 1.0}
Dial = Literal["strength", "thinking_token_budget", "strategy"]
DIALS: tuple[str, ...] = get_args(Dial)
Between = Literal["interpolate", "nearest"]


@dataclass(frozen=True)
class Level:
    """One setting of the dial and what was measured there."""

    setting: float | int | str | None
    accuracy: float
    tokens: float
    accuracy_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Calibration:
    """What a calibration file says. ``levels`` is by name of effort."""

    model: str
    task: str
    n: int
    dial: Dial
    levels: Mapping[str, Level]
    format: str = field(default=FORMAT)
    between: Between = "interpolate"
    """What a number means that lies between two levels: a setting between theirs, or the nearer one's."""

    def at(self, effort: str | float) -> Level:
        """The level of a name or of a number in [0, 1]; measured figures between two levels are interpolated.

        Raises ThriftyError for what is no effort, and for one beyond the measured levels.
        """
        place = position(effort)
        known = sorted((EFFORTS[name], level) for name, level in self.levels.items())
        exact = next((level for at, level in known if at == place), None)
        if exact is not None:
            return exact
        below, above = [one for one in known if one[0] < place], [one for one in known if one[0] > place]
        if not below or not above:
            raise ThriftyError(
                f"reasoning_effort {effort} was not calibrated: measured are {', '.join(self.levels)}; ask for one "
                "of them, or for a number between"
            )
        (low, one), (high, other) = below[-1], above[0]
        share = (place - low) / (high - low)
        setting: float | int | str | None
        turned = self.between == "interpolate"
        if turned and isinstance(one.setting, int | float) and isinstance(other.setting, int | float):
            setting = _between(one.setting, other.setting, share)
            setting = round(setting) if self.dial == "thinking_token_budget" else setting
        else:
            return one if share < 0.5 else other
        return Level(setting, _between(one.accuracy, other.accuracy, share), _between(one.tokens, other.tokens, share))


def position(effort: str | float) -> float:
    """Where an effort stands between 0 and 1; ThriftyError for what is none."""
    if isinstance(effort, str) and effort in EFFORTS:
        return EFFORTS[effort]
    try:
        place = float(effort) if not isinstance(effort, bool) else math.nan
    except (TypeError, ValueError):
        place = math.nan
    if not 0 <= place <= 1:
        raise ThriftyError(f"reasoning_effort is {effort!r}: give {', '.join(EFFORTS)}, or a number from 0 to 1")
    return place


def load(path: Path) -> Calibration:
    """Read and check a calibration file; ThriftyError names file and key."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ThriftyError(f"cannot read the calibration {path}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ThriftyError(f"{path} is no calibration of efforts: its format must be {FORMAT!r}")
    wanted = {"model": str, "task": str, "n": int, "dial": str, "levels": dict}
    for key, what in wanted.items():
        if not isinstance(data.get(key), what) or isinstance(data.get(key), bool):
            raise ThriftyError(f"{path}: {key!r} must be a {what.__name__}")
    if data["dial"] not in DIALS:
        raise ThriftyError(f"{path}: dial is {data['dial']!r}; choose {', '.join(DIALS)}")
    if len(data["levels"]) < 2:
        raise ThriftyError(f"{path}: a calibration needs two levels or more, it has {len(data['levels'])}")
    between = data.get("between", "interpolate")
    if between not in get_args(Between):
        raise ThriftyError(f"{path}: between is {between!r}; choose {', '.join(get_args(Between))}")
    levels = {name: _level(path, name, data["dial"], level) for name, level in data["levels"].items()}
    return Calibration(data["model"], data["task"], data["n"], data["dial"], levels, between=between)


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration file as ``load`` reads it."""
    levels = {}
    for name, level in calibration.levels.items():
        told: dict[str, Any] = {"setting": level.setting, "accuracy": level.accuracy, "tokens": level.tokens}
        if level.accuracy_interval is not None:
            told["accuracy_interval"] = list(level.accuracy_interval)
        levels[name] = told
    data = {
        "format": FORMAT, "model": calibration.model, "task": calibration.task, "n": calibration.n,
        "dial": calibration.dial, "between": calibration.between, "levels": levels,
    }  # fmt: skip
    write_json(path, data)


def _level(path: Path, name: str, dial: str, data: Any) -> Level:
    where = f"{path}, level {name!r}"
    if name not in EFFORTS:
        raise ThriftyError(f"{where}: no such effort; there are {', '.join(EFFORTS)}")
    if not isinstance(data, dict) or "setting" not in data:
        raise ThriftyError(f"{where} needs setting, accuracy and tokens")
    setting = data["setting"]
    right = {
        "strength": _number(setting),
        "thinking_token_budget": setting is None or (type(setting) is int and setting >= 0),
        "strategy": setting is None or isinstance(setting, str),
    }[dial]
    if not right:
        raise ThriftyError(f"{where}: {setting!r} is no setting of the dial {dial!r}")
    accuracy, tokens, interval = data.get("accuracy"), data.get("tokens"), data.get("accuracy_interval")
    if not _number(accuracy) or not 0 <= accuracy <= 1:
        raise ThriftyError(f"{where}: accuracy is {accuracy!r}, not a share from 0 to 1")
    if not _number(tokens) or tokens < 0:
        raise ThriftyError(f"{where}: tokens is {tokens!r}, not a mean of 0 or more")
    if interval is not None and not (
        isinstance(interval, list) and len(interval) == 2 and all(_number(x) and 0 <= x <= 1 for x in interval)
    ):
        raise ThriftyError(f"{where}: accuracy_interval must be two shares")
    return Level(setting, float(accuracy), float(tokens), None if interval is None else (interval[0], interval[1]))


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _between(a: float, b: float, share: float) -> float:
    return a + (b - a) * share
