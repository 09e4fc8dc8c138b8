"""The board: one page of every method on the same work, built from the record of runs and from what is registered."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from thrifty import __version__, evidence, registry
from thrifty.contracts import ThriftyError
from thrifty.evidence import Claim, Standing
from thrifty.files import write_text
from thrifty.papers import papers
from thrifty.registry import CATEGORIES, SAVES, STATUSES, Entry
from thrifty.report import records, theme, viewer
from thrifty.report.html import _environment, _resource, _script
from thrifty.report.records import AXES, Record

ELSEWHERE = "elsewhere"
"""The family of a method whose records do not say it."""


def write_board(out: str | Path, results: Path | None = None, added: Sequence[Path] = ()) -> tuple[Path, list[str]]:
    """Write the page; returns its path and what was passed over in the record (lines that a killed run left torn).

    ``results`` is a folder of ``KEY.jsonl``; None: where ``thrifty reproduce`` writes, the package's and ``./results``.
    ``added`` are files or folders of somebody else's results. Raises ThriftyError for a broken line or a missing file.
    """
    found, torn = collect(results, added)
    data = payload(found) | {"torn": torn}
    page = _environment().get_template("board.html.jinja").render(
        headline=_headline(data["methods"]),
        runs=len(found),
        newest=max((str(r.row["time"]) for r in found), default=""),
        torn=torn,
        files=sorted({r.path.as_posix() for r in found if r.added}),
        themes=theme.THEMES,
        version=__version__,
        style=Markup(_resource("report.css") + _resource("board.css")),
        script=Markup(_script("".join(_resource(f"board{part}.js") for part in ("", "_chart", "_method", "_table")))),
        data=Markup(viewer.as_json(data)),
    )  # fmt: skip
    return write_text(out, page), torn


def collect(results: Path | None = None, added: Sequence[Path] = ()) -> tuple[list[Record], list[str]]:
    """Every run on record, the project's own first, and the torn lines that were passed over."""
    own = [results] if results is not None else [evidence.results_folder(registry.PACKAGE), Path("results")]
    files = [(path, False) for folder in own for path in _files(folder, required=folder is results)]
    files += [(path, True) for given in added for path in _files(given, required=True)]
    if results is not None and not files:
        raise ThriftyError(f"{results} has no KEY.jsonl: give the folder in which `thrifty reproduce` writes")
    found: dict[Path, tuple[list[Record], list[str]]] = {}
    for path, outside in files:
        found.setdefault(path.resolve(), records.read(path, outside))
    return [r for rows, _ in found.values() for r in rows], [line for _, torn in found.values() for line in torn]


def _files(path: Path, required: bool) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.jsonl"))
    if required and not path.is_file():
        raise ThriftyError(f"{path}: no such file or folder; `thrifty reproduce KEY` writes results/KEY.jsonl")
    return [path] if path.is_file() else []


def _headline(methods: Sequence[Mapping[str, Any]]) -> str:
    """The board in one sentence."""
    counts = Counter(m["status"] for m in methods)
    verdicts = [f"{counts[v]} {v}" for v in evidence.VERDICTS if counts[v]]
    decided = sum(counts[v] for v in evidence.VERDICTS)
    told = f"{decided} of {len(methods)} methods have a verdict: {', '.join(verdicts)}" if verdicts else (
        f"None of {len(methods)} methods has a verdict yet"
    )  # fmt: skip
    return f"{told}; {counts['missing']} are not built yet." if counts["missing"] else f"{told}."


# ------------------------------------------------------------------------------------------------ the data


def payload(found: Sequence[Record]) -> dict[str, Any]:
    """Everything that the page shows, as JSON: methods in the order of ``thrifty list``, each with its runs."""
    runs: dict[str, list[Record]] = {}
    for record in found:
        runs.setdefault(record.row["key"], []).append(record)
    entries = registry.entries()
    known = {entry.key for entry in entries}
    headlines = {key: paper.headline for key, paper in papers().items()}
    methods = [_method(entry, headlines.get(entry.key), runs.get(entry.key, [])) for entry in entries]
    methods += [_stranger(key, rows) for key, rows in runs.items() if key not in known]
    return {
        "axes": AXES,
        "families": [f for f in (*CATEGORIES, ELSEWHERE) if any(m["family"] == f for m in methods)],
        "saves": list(SAVES),
        "statuses": [*STATUSES, *({m["status"] for m in methods} - set(STATUSES))],
        "methods": methods,
    }


def _method(entry: Entry, headline: str | None, rows: Sequence[Record]) -> dict[str, Any]:
    """A paper or a method of this project, with what its file registers and what its runs said."""
    own = entry.where is not None and entry.where.stem.replace("_", "-") == entry.key
    claim = evidence.read_claim(entry.where) if entry.where is not None and own else None
    if entry.where is None:
        standing: Standing | None = None
    else:
        standing = _standing(entry.where, rows) if own else Standing("built")
    return {
        "key": entry.key,
        "title": entry.title,
        "arxiv": entry.arxiv,
        "year": entry.year,
        "family": entry.family,
        "saves": list(entry.saves),
        "priority": entry.priority,
        "file": _file(entry.where),
        "within": entry.where.stem.replace("_", "-") if entry.where is not None and not own else None,
        "headline": headline or None,
        **_evidence(standing, claim, rows),
    }


def _stranger(key: str, rows: Sequence[Record]) -> dict[str, Any]:
    """A method that only somebody else's results know. Its code is not here, so nothing says whether it is current."""
    told = {name: r.row[name] for r in rows for name in ("family", "title") if r.row.get(name)}
    counted = [r.row for r in rows if evidence.counts(r.row)]
    of_code = [r for r in counted if r["code"] == counted[-1]["code"]] if counted else []
    return {
        "key": key,
        "title": str(told.get("title", key)),
        "arxiv": None,
        "year": None,
        "family": told["family"] if told.get("family") in CATEGORIES else ELSEWHERE,
        "saves": [],
        "priority": None,
        "file": None,
        "within": None,
        "headline": None,
        **_evidence(evidence.judged(of_code), None, rows),
    }


def _standing(path: Path, rows: Sequence[Record]) -> Standing:
    """By the project's own runs; by those brought in where it has none of this code."""
    own, brought = ([r.row for r in rows if r.added == added] for added in (False, True))
    standing, theirs = evidence.standing(path, own), evidence.standing(path, brought)
    return theirs if standing.run is None and theirs.run is not None else standing


def _evidence(standing: Standing | None, claim: Claim | None, rows: Sequence[Record]) -> dict[str, Any]:
    """Status, claim, every run, the run that is drawn, its controls and its figures."""
    place = {id(r.row): i for i, r in enumerate(rows)}
    counts = standing.run if standing is not None else None
    drawn = counts or _latest(r.row for r in rows)
    at = None if drawn is None else place[id(drawn)]
    return {
        "status": standing.status if standing is not None else "missing",
        "why": standing.why if standing is not None else "",
        "claim": _claim(claim),
        "runs": [_run(record) for record in rows],
        "counts": place[id(counts)] if counts is not None else None,
        "drawn": at,
        "controls": _controls(rows[at], rows) if at is not None else {},
        "figures": {arm: records.figures(drawn, arm) for arm in evidence.ARMS} if drawn is not None else {},
        "work": _work(drawn) if drawn is not None else None,
    }


def _latest(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The run to draw where none counts: of the largest scale, the last one. The page marks it."""
    done = [r for r in rows if not r.get("error") and not r["control"]]
    order = ("smoke", "dev", "tiny", "gpu")
    return max(enumerate(done), key=lambda pair: (order.index(pair[1]["scale"]), pair[0]), default=(0, None))[1]


def _controls(drawn: Record, rows: Sequence[Record]) -> dict[str, Any]:
    """Control -> the first run of it that goes with the drawn one (A/A: all), and whether it is called for."""

    def kind(r: Record) -> tuple[Any, ...]:
        return r.row["code"], r.row["scale"], r.added, evidence.counts(r.row)

    found: dict[str, Any] = {}
    for name in evidence.CONTROLS:
        same = [
            i
            for i, r in enumerate(rows)
            if r.row["control"] == name and not r.row.get("error") and kind(r) == kind(drawn)
        ]
        needed = {"placebo": "shown", "oracle": "refuted"}.get(name)
        called = name in drawn.row["controls"] and needed == drawn.row["verdict"]
        found[name] = {"runs": same if name == "aa" else same[:1], "called for": called}
    return found


def _run(record: Record) -> dict[str, Any]:
    """A run as the page shows it: the record less what nobody looks at, and where it stands."""
    row = record.row
    names = (
        *("scale", "control", "time", "verdict", "why", "error", "seconds", "code", "source", "claim", "lab", "commit"),
        *("settings", "parts", "units", "gates", "notes", "seeds", "problems", "controls"),
    )
    shown = {name: row[name] for name in names if row.get(name) not in (None, {}, [], "")}
    more = {"where": record.where, "added": record.added, "registered": _registered(row)}
    more |= {"tuned": tuned} if (tuned := evidence.tuned(row)) else {}
    return dict(records.plain(shown | more))


def _registered(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The claim that the run was of, as the record keeps it."""
    found = row.get("registered")
    return dict(found) if isinstance(found, Mapping) else None


def _claim(claim: Claim | None) -> dict[str, Any] | None:
    if claim is None:
        return None
    told = {f.name: getattr(claim, f.name) for f in dataclasses.fields(claim) if f.name not in ("text", "parts")}
    told["parts"] = [dataclasses.asdict(part) for part in claim.parts]
    return dict(records.plain(told))


def _work(row: Mapping[str, Any]) -> dict[str, str] | None:
    """What a run was measured on: tasks, levels and student. Figures on the same work can be compared."""
    literal = _registered(row) or {}
    strata = {
        s
        for unit in row["units"]
        for arm in evidence.ARMS
        for part in unit[arm].values()
        for s in part.get("levels", ())
    }
    levels: dict[str, set[str]] = {}
    for stratum in strata:
        task, slash, level = stratum.rpartition("/")
        if slash:
            levels.setdefault(task, set()).add(level)
    if not levels:
        levels = {task: set(map(str, literal.get("levels") or ())) for task in literal.get("tasks", ())}
    if not levels:
        return None
    tasks = ", ".join(f"{task} {_span(found)}".strip() for task, found in sorted(levels.items()))
    if evidence.NEW_SKILL in literal.get("gates", ()):
        tasks += ", respelled"
    student = str(literal.get("student") or (Claim.student if literal else "unknown student"))
    return {"id": f"{student} · {tasks}", "student": student, "tasks": tasks}


def _span(levels: Iterable[str]) -> str:
    """ "2–5" or "1, 3"."""
    numbers = sorted({int(level) for level in levels if level.lstrip("-").isdigit()})
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _file(path: Path | None) -> str | None:
    """The method's file as a reader would name it: from the checkout or from the current folder."""
    if path is None:
        return None
    for root in (registry.PACKAGE.parents[1], Path.cwd()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name
