"""The HTML report: one file, nothing fetched, made from a run folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
from markupsafe import Markup

from thrifty import __version__
from thrifty.contracts import ThriftyError
from thrifty.files import write_text
from thrifty.measure import stats
from thrifty.measure.profile import Profile, profile
from thrifty.report import table, theme, viewer
from thrifty.report.run import Run, label, load, percent, points
from thrifty.traces.segment import KINDS, segment

PROFILED = 1000
"""Chains per setting that the overthinking profile reads at most: segmenting more tells nothing new."""


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder from its result.json, traces.parquet, config.yaml and training logs.

    ``result.json`` may name, beyond what ``thrifty run --json`` prints: "baseline" (a setting), "best" (the setting to
    compare it with; else the cheapest non-inferior one), "calibration" (how that was chosen: ``lab.Report``), "line"
    {"long", "short"}, "margin" (0.03), "notes" [str] and "verdicts" [str, {"claim", "verdict", "detail"}, or what
    ``thrifty.lab.verdict`` returns].

    Raises ThriftyError where a file is broken or the report extra is not installed.
    """
    charts = _charts()
    run = load(folder)
    profiles = _profiles(run)
    kinds = _kinds(run)
    specs = {
        "frontier": charts.frontier(run),
        "accuracy-by-level": charts.by_level(run, "accuracy", "accuracy", ".0%"),
        "tokens-by-level": charts.by_level(run, "thought_tokens", "thinking tokens", ".0f"),
        "overthinking": charts.overthinking(profiles),
        "kinds": charts.stacked(
            kinds, list(run.cells), {k: f"var(--{k})" for k in KINDS}, "thinking tokens per problem"
        ),
        "training": charts.training(run),
    }
    specs |= charts.reinforcement(run)
    lengths = charts.lengths(run)
    specs |= {f"length-{i}": chart["spec"] for i, chart in enumerate(lengths)}
    specs = {name: spec for name, spec in specs.items() if spec}
    shown = viewer.embedded(run)
    page = _environment().get_template("template.html.jinja").render(
        run=run,
        best=run.setting(run.best) if run.best else None,
        base=run.setting(run.baseline),
        facts=_facts(run),
        tiles=_tiles(run),
        lengths=lengths,
        profiles=profiles,
        specs=specs,
        reinforced=dict(zip(run.rollouts, charts.stage_colours(len(run.rollouts)))),
        shown=shown,
        kinds=KINDS,
        settings=_settings(run),
        verdicts=[_verdict(v) for v in run.result.get("verdicts") or []],
        variables=theme.variables(run),
        version=__version__,
        style=Markup(_resource("report.css")),
        script=Markup(_script(_resource("viewer.js"))),
        bundle=Markup(_script(_bundle())),
        data=Markup(viewer.as_json({"charts": specs, "viewer": shown})),
    )  # fmt: skip
    return write_text(Path(folder) / "report.html", page)


def picture(folder: str | Path, path: str | Path, scheme: str = "light") -> Path:
    """Write the accuracy/tokens chart of a run folder as SVG, in the colours of "light" or "dark"."""
    charts = _charts()
    import vl_convert

    run = load(folder)
    spec = theme.coloured(charts.frontier(run), run, scheme)
    if not spec:
        raise ThriftyError(f"{folder}: nothing to draw; no setting has an accuracy and thinking tokens")
    spec |= {"width": 680, "height": 380, "background": theme.THEMES[scheme]["page"], "padding": 16}
    svg = vl_convert.vegalite_to_svg(spec, vl_version=charts.VEGA_LITE)
    return write_text(path, svg)


def _charts() -> ModuleType:
    """The part that needs the report extra, imported late because altair takes a second."""
    try:
        import vl_convert  # noqa: F401

        from thrifty.report import charts
    except ImportError as error:
        raise ThriftyError(
            f"the report needs altair and vl-convert-python ({error.name} is missing): pip install 'thrifty[report]'"
        ) from error
    return charts


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script; vl-convert takes seconds to put it together."""
    import vl_convert

    version = _charts().VEGA_LITE
    return str(vl_convert.javascript_bundle(vl_version=version))  # type: ignore[call-arg]  # its stub is wrong


def _facts(run: Run) -> list[tuple[str, str]]:
    result = run.result
    facts = [(key, result.get(key)) for key in ("recipe", "model", "task")]
    facts += [("problems", result.get("n")), ("seed", result.get("seed")), ("settings", len(run.settings))]
    return [(key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in facts if value is not None]


def _tiles(run: Run) -> list[dict[str, str]]:
    """The headline's figures, each with what it means."""
    if run.best is None:
        return []
    best, base = run.setting(run.best), run.setting(run.baseline)
    tiles = [
        {
            "value": table.change(best["thought_tokens"], base["thought_tokens"]),
            "name": "thinking tokens",
            "detail": " against ".join(table.number(s["thought_tokens"]) for s in (best, base)) + " per problem",
        }
    ]
    shared, arms, strata = run.paired(run.best, run.baseline)
    if shared:
        test = run.non_inferior(run.best)
        gap = stats.paired_difference(arms[0][0], arms[1][0], strata)
        verdict = "non-inferior" if test is not None and test.holds else "not shown non-inferior"
        low = "" if test is None else f"; at least {points(test.low)} with 95 % confidence"
        tiles.append(
            {
                "value": points(gap.value),
                "name": "accuracy, paired",
                "detail": f"{verdict} at {run.margin * 100:g} points on {len(shared):,} problems{low}",
            }
        )
    above = run.above_line(run.best)
    if above is not None and run.line is not None:
        ends = f"from {run.line[1]} to {run.line[0]}"
        tiles.append(
            {
                "value": points(above.value),
                "name": "above the straight line" if above.value >= 0 else "below the straight line",
                "detail": f"{ends}; 95 % interval {points(above.low)} to {points(above.high)}",
            }
        )
    per_right = best.get("tokens_per_right_answer"), base.get("tokens_per_right_answer")
    if None not in per_right:
        tiles.append(
            {
                "value": table.change(*per_right),
                "name": "tokens per right answer",
                "detail": f"{table.number(per_right[0])} against {table.number(per_right[1])}",
            }
        )
    return tiles


def _verdict(verdict: str | Mapping[str, Any]) -> dict[str, str]:
    """A verdict in words: {"verdict", "claim", "detail"}."""
    if isinstance(verdict, str):
        return {"verdict": "", "claim": verdict, "detail": ""}
    if "non_inferior" not in verdict:
        return {key: str(verdict.get(key, "")) for key in ("verdict", "claim", "detail")}
    detail = f"difference {points(verdict['difference'])}, at least {points(verdict['difference_low'])}"
    if "above_line" in verdict:
        low, high = (points(verdict[f"above_line_{end}"]) for end in ("low", "high"))
        detail += f"; {points(verdict['above_line'])} from the straight line ({low} to {high})"
    return {
        "verdict": "holds" if verdict["non_inferior"] else "not shown",
        "claim": f"{verdict['setting']}: {table.change(1 - verdict['saving'], 1)} thinking tokens at an accuracy "
        f"at most {verdict['margin'] * 100:g} points lower",
        "detail": detail,
    }


def _settings(run: Run) -> list[dict[str, Any]]:
    """The table's rows: each cell as shown and as sorted by."""
    base = run.setting(run.baseline)
    measure = run.measure
    measured = [s for s in run.settings if s.get(measure) is not None]
    front = {measured[i]["name"] for i in stats.pareto([(s["thought_tokens"], s[measure]) for s in measured])}
    rows = []
    for i, s in enumerate(run.settings):
        low, high = s.get(f"{measure}_low"), s.get(f"{measure}_high")
        interval = "" if low is None or high is None else f"{low * 100:.1f}–{high * 100:.1f}"
        test = None if s["name"] == run.baseline else run.non_inferior(s["name"])
        tokens = s["thought_tokens"]
        cells = [
            (s.get(measure), percent(s.get(measure)), interval),
            (tokens, table.number(tokens), ""),
            (tokens, "" if s is base else table.change(tokens, base["thought_tokens"]), ""),
            (test.low, points(test.low), "holds" if test.holds else "not shown") if test else (None, "", ""),
            (s.get("completion_rate"), percent(s.get("completion_rate")), ""),
            *((s.get(key), table.number(s.get(key)), "") for key in ("answer_tokens", "tokens_per_right_answer")),
            (s.get("seconds"), table.number(s.get("seconds"), 3), ""),
        ]
        rows.append({"name": s["name"], "label": label(s), "index": i, "pareto": s["name"] in front, "cells": cells})
    return rows


def _profiles(run: Run) -> dict[str, Profile]:
    made = {}
    for name, cells in run.cells.items():
        rows = [c.chosen for c in cells.values() if c.chosen is not None and c.chosen.gold is not None][:PROFILED]
        if rows:
            made[name] = profile(
                [r.thought for r in rows if r], [r.gold or "" for r in rows if r], [bool(r.right) for r in rows if r],
                [r.thought_tokens for r in rows if r],
            )  # fmt: skip
    return made


def _kinds(run: Run) -> list[dict[str, Any]]:
    """Thinking tokens per problem by kind of step; a step's share of the text stands for its share of the tokens."""
    rows = []
    for name, cells in run.cells.items():
        spent = dict.fromkeys(KINDS, 0.0)
        chains = [c.chosen for c in cells.values() if c.chosen is not None][:PROFILED]
        for row in chains:
            for step in segment(row.thought):
                spent[step.kind] += row.thought_tokens * (step.end - step.start) / len(row.thought)
        rows += [{"setting": name, "part": kind, "tokens": spent[kind] / len(chains)} for kind in KINDS if chains]
    return rows


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("thrifty.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": table.number, "label": label}
    return environment


def _resource(name: str) -> str:
    return (resources.files("thrifty.report") / name).read_text(encoding="utf-8")


def _script(code: str) -> str:
    """JavaScript that cannot end its script element: in code ``</script`` stands only in strings and patterns."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
