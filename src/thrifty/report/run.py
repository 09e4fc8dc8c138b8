"""A run folder read back: its result, its traces per problem, and what follows from both."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.contracts import ThriftyError
from thrifty.measure import stats
from thrifty.report.table import change
from thrifty.traces.store import TraceRow, read

SHOWN = ("accuracy", "completion", "length")
"""What is shown of every step of reinforcement: the figures that a length reward must not trade for each other."""
MARGIN = 0.03
"""Non-inferiority margin: three points of accuracy (the evidence rules' overall margin)."""


@dataclass(frozen=True)
class Cell:
    """One problem under one setting: its rows, and what one run of it cost on average."""

    rows: list[TraceRow]

    @property
    def chosen(self) -> TraceRow | None:
        return next((row for row in self.rows if row.chosen), None)

    @property
    def runs(self) -> int:
        """How often the problem was run: every run has one first sample."""
        return max(1, sum(row.sample == 0 for row in self.rows))

    @property
    def right(self) -> float:
        return sum(row.chosen and bool(row.right) for row in self.rows) / self.runs

    @property
    def thought_tokens(self) -> float:
        return sum(row.thought_tokens for row in self.rows) / self.runs


@dataclass(frozen=True)
class Run:
    """Everything a report shows, from the files of one run folder."""

    folder: Path
    result: dict[str, Any]
    cells: dict[str, dict[str, Cell]]
    """Setting -> problem id -> cell; settings in the order of the result."""
    config: str
    training: dict[str, list[dict[str, float]]]
    """Stage -> logged steps of supervised training."""
    rollouts: dict[str, list[dict[str, float]]]
    """Stage -> logged steps of reinforcement."""

    @property
    def settings(self) -> list[dict[str, Any]]:
        return list(self.result["settings"])

    def setting(self, name: str) -> dict[str, Any]:
        return next(s for s in self.settings if s["name"] == name)

    @property
    def baseline(self) -> str:
        return str(self.result.get("baseline") or self.settings[0]["name"])

    @property
    def measure(self) -> str:
        """ "accuracy", or "agreement" (with the baseline) where nothing has a gold answer."""
        return "accuracy" if any(s["accuracy"] is not None for s in self.settings) else "agreement"

    @property
    def margin(self) -> float:
        return float(self.result.get("margin", MARGIN))

    @property
    def line(self) -> tuple[str, str] | None:
        """Names of the long and the short setting that the straight line joins."""
        line = self.result.get("line")
        return (str(line["long"]), str(line["short"])) if line else None

    @cached_property
    def best(self) -> str | None:
        """The setting to look at: named by the result, else the cheapest non-inferior, else the least bad."""
        if self.result.get("best"):
            return str(self.result["best"])
        ends = {self.baseline, *(self.line or ())}
        cheaper = [
            s["name"]
            for s in self.settings
            if s["name"] not in ends and _less(s["thought_tokens"], self.setting(self.baseline)["thought_tokens"])
        ]
        if self.measure == "agreement":
            return max(cheaper, key=lambda name: self.setting(name).get("agreement") or 0.0, default=None)
        tests = {name: test for name in cheaper if (test := self.non_inferior(name)) is not None}
        held = [name for name, test in tests.items() if test.holds]
        if held:
            return str(min(held, key=lambda name: self.setting(name)["thought_tokens"]))
        return max(tests, key=lambda name: tests[name].low, default=cheaper[0] if cheaper else None)

    @cached_property
    def graded(self) -> frozenset[str]:
        """Problems that can be graded: with a gold answer, or with a checker that has judged one of their traces."""
        return frozenset(
            problem
            for cells in self.cells.values()
            for problem, cell in cells.items()
            if cell.rows[0].gold is not None or any(row.right is not None for row in cell.rows)
        )

    def paired(self, *names: str) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """Graded problems that all the settings tried; (right, tokens) per setting; the problems' strata."""
        shared = [
            problem
            for problem in self.cells.get(names[0], {})
            if problem in self.graded and all(problem in self.cells.get(name, {}) for name in names)
        ]
        arms = []
        for name in names:
            cells = [self.cells[name][problem] for problem in shared]
            arms.append((np.array([c.right for c in cells]), np.array([c.thought_tokens for c in cells])))
        first = [self.cells[names[0]][problem].rows[0] for problem in shared]
        return shared, arms, np.array([f"{row.task} {row.level}" for row in first])

    def non_inferior(self, name: str) -> stats.NonInferiority | None:
        """Is a setting's accuracy within the margin of the baseline's, paired by problem?"""
        shared, arms, strata = self.paired(name, self.baseline)
        return stats.non_inferior(arms[0][0], arms[1][0], self.margin, strata) if shared else None

    def above_line(self, name: str) -> stats.Interval | None:
        """How far a setting stands above the straight line from short to long; None without a line."""
        if self.line is None:
            return None
        shared, (point, long, short), strata = self.paired(name, *self.line)
        if not shared or np.isclose(long[1].mean(), short[1].mean()):
            return None
        return stats.above_line(point, long, short, strata)

    def headline(self) -> str:
        """The run in one sentence of plain words."""
        base = self.setting(self.baseline)
        if len(self.settings) == 1:
            thinking = f"with {base['thought_tokens'] or 0:,.0f} thinking tokens a problem"
            if base["accuracy"] is None:
                return f"{label(base)} answers {thinking}; nothing here says whether it is right."
            return f"{label(base)} is right on {percent(base['accuracy'])} of the problems {thinking}."
        if self.best is None:
            return f"No setting spends fewer thinking tokens than {label(base)}."
        best = self.setting(self.best)
        saved = 1 - best["thought_tokens"] / base["thought_tokens"] if base["thought_tokens"] else 0.0
        spends = f"{label(best)} spends {saved:.0%} fewer thinking tokens".replace("%", " %")
        if saved < 0:
            spends = f"{label(best)} spends {-saved:.0%} more thinking tokens".replace("%", " %")
        if self.measure == "agreement":
            if best.get("agreement") is None:
                return f"{spends} than {label(base)}."
            return (
                f"{spends} and gives the same answer as {label(base)} on {percent(best['agreement'])} of the problems."
            )
        sentence = f"{spends} at {percent(best['accuracy'])} accuracy against {percent(base['accuracy'])}"
        test = self.non_inferior(self.best)
        if test is not None and not test.holds:
            return f"{sentence}: not shown to stay within {test.margin * 100:g} points of {label(base)}."
        return f"{sentence}."

    def choice(self) -> str:
        """In a sentence or two, how the best setting was chosen, and what it was where it was; "" where it was not."""
        chosen = self.result.get("calibration")
        if not chosen or self.best is None:
            return ""
        there = next((v for v in chosen["verdicts"] if v["setting"] == self.best), None)
        if there is None:
            return ""
        within = f"within {there['margin'] * 100:g} points of {label(self.setting(self.baseline))}"
        held = f"the shortest that stayed {within}"
        why = held if there["non_inferior"] else f"the most accurate, since none was shown to stay {within}"
        return (
            f"{label(self.setting(self.best))} was chosen on {chosen['n']:,} calibration problems as {why}: there it "
            f"came to {change(1 - there['saving'], 1)} thinking tokens and {points(there['difference'])} of accuracy "
            f"(at least {points(there['difference_low'])}). The {self.result.get('n', 0):,} problems measured here had "
            "no say in it."
        )


def load(folder: str | Path) -> Run:
    """Read a run folder: result.json, traces.parquet, config.yaml, and the train.jsonl and rollout.jsonl of the run and
    its stages.

    Raises ThriftyError that names the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ThriftyError(f"{folder}: no such run folder; `thrifty run` makes one under runs/")
    result = _result(folder / "result.json")
    cells: dict[str, dict[str, list[TraceRow]]] = {s["name"]: defaultdict(list) for s in result["settings"]}
    for row in read(folder / "traces.parquet"):
        if row.setting in cells:
            cells[row.setting][row.problem].append(row)
    config = folder / "config.yaml"
    return Run(
        folder,
        result,
        {name: {problem: Cell(rows) for problem, rows in found.items()} for name, found in cells.items()},
        config.read_text(encoding="utf-8") if config.is_file() else "",
        _logs(folder, "train.jsonl", "training", ("loss",)),
        _logs(folder, "rollout.jsonl", "reinforcement", SHOWN),
    )


def label(setting: dict[str, Any]) -> str:
    """How a setting is called in a sentence: by its name, with α where the name does not say it."""
    name, alpha = str(setting["name"]), setting.get("alpha")
    return name if alpha is None or f"{alpha:g}" in name else f"{name} (α = {alpha:g})"


def level_name(task: str, level: int, levels: set[tuple[str, int]]) -> str:
    """A level's name among all levels shown: without what goes without saying."""
    if len({other for other, _ in levels}) == 1:
        return f"level {level}"
    return f"{task} {level}" if sum(other == task for other, _ in levels) > 1 else task


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    value = round(share * 100, 1)
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{abs(value):.1f} points"


def _less(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and a < b


def _result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if not (path.parent / "config.yaml").is_file():
            raise ThriftyError(f"{path.parent}: no run folder, it has no config.yaml; `thrifty run` makes one")
        raise ThriftyError(f"{path}: missing; the run did not finish. Run it again: it goes on where it stopped")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ThriftyError(f"{path}: not valid JSON ({error}); run again to make it anew") from error
    if not isinstance(result, dict) or not isinstance(result.get("settings"), list) or not result["settings"]:
        raise ThriftyError(
            f'{path}: no "settings"; expected {{"recipe", "model", "task", "n", "seed", "settings": [...]}}'
        )
    names = [str(s.get("name")) for s in result["settings"]]
    for number, setting in enumerate(result["settings"]):
        for key in ("name", "accuracy", "accuracy_low", "accuracy_high", "thought_tokens"):
            if key not in setting:
                raise ThriftyError(f'{path}: settings[{number}] has no "{key}"; make it with thrifty.measure.summarise')
    if len(set(names)) != len(names):
        raise ThriftyError(f"{path}: two settings of one name among {', '.join(names)}; names must differ")
    line = result.get("line") or {}
    for what, name in (("baseline", result.get("baseline")), ("best", result.get("best")), *line.items()):
        if name is not None and name not in names:
            raise ThriftyError(f'{path}: "{what}" is {name!r}, which is none of the settings {", ".join(names)}')
    if line and set(line) != {"long", "short"}:
        raise ThriftyError(f'{path}: "line" needs "long" and "short", it has {", ".join(line)}')
    return result


def _logs(folder: Path, name: str, own: str, keys: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """The logs of this name: the run's own, called ``own``, and one per stage."""
    paths = {own: folder / name}
    paths |= {path.parent.name: path for path in sorted(folder.glob(f"stages/*/{name}"))}
    logs = {stage: _log(path, keys) for stage, path in paths.items() if path.is_file()}
    return {stage: rows for stage, rows in logs.items() if len(rows) > 1}


def _log(path: Path, keys: Sequence[str]) -> list[dict[str, float]]:
    """The rows that have a step and a number under each of ``keys``; others are passed over."""
    rows = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ThriftyError(f"{path}, row {number}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            continue
        if isinstance(row.get("step"), int) and all(isinstance(row.get(key), int | float) for key in keys):
            rows.append(row)
    return rows
