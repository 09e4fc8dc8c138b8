"""The report's charts as Vega-Lite specifications, made with altair. Colours are CSS variables (see ``theme.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np

from thrifty.measure import stats
from thrifty.measure.profile import Profile
from thrifty.report.run import Run, level_name
from thrifty.report.theme import FONT

VEGA_LITE = alt.SCHEMA_VERSION.lstrip("v").rsplit(".", 1)[0]
"""The Vega-Lite version that altair writes, as vl-convert names it."""


def frontier(run: Run) -> dict[str, Any]:
    """Accuracy against thinking tokens: intervals, Pareto set, and the straight line from short to long."""
    measure = run.measure
    shown = [s for s in run.settings if s.get(measure) is not None and s["thought_tokens"] is not None]
    if not shown:
        return {}
    front = stats.pareto([(s["thought_tokens"], s[measure]) for s in shown])
    rows = []
    for i, s in enumerate(shown):
        low, high = s.get(f"{measure}_low"), s.get(f"{measure}_high")
        rows.append(
            {
                "setting": s["name"],
                "tokens": s["thought_tokens"],
                "tokens_low": s.get("thought_tokens_low", s["thought_tokens"]),
                "tokens_high": s.get("thought_tokens_high", s["thought_tokens"]),
                "value": s[measure],
                "low": s[measure] if low is None else low,
                "high": s[measure] if high is None else high,
                "pareto": "Pareto set" if i in front else "dominated",
            }
        )
    bottom, top = min(r["low"] for r in rows), max(r["high"] for r in rows)
    pad = 0.12 * max(top - bottom, 0.02)
    right = max(1.0, *(r["tokens_high"] for r in rows)) * 1.08
    x = alt.X(
        "tokens:Q",
        title="mean thinking tokens per problem",
        scale=alt.Scale(domain=[0, right], nice=False),
        axis=alt.Axis(tickCount=8),
    )
    domain = [max(0.0, bottom - pad), min(1.0 + pad / 2, top + pad)]
    y_scale = alt.Scale(domain=domain, nice=False)
    y = alt.Y("value:Q", title=measure, scale=y_scale, axis=alt.Axis(format=".0%"))
    colour = _colour(run)
    base = alt.Chart(alt.Data(values=rows))
    tooltip = [
        "setting:N", alt.Tooltip("value:Q", title=measure, format=".1%"),
        alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%"),
        alt.Tooltip("tokens:Q", title="thinking tokens", format=".1f"), "pareto:N",
    ]  # fmt: skip
    layers = []
    points = [(rows[i]["tokens"], rows[i]["value"]) for i in front]
    lines = [[p for (ta, a), (tb, b) in pairwise(points) for p in ((ta, a), (tb, a), (tb, b))]]
    ends = [i for i, s in enumerate(shown) if s["name"] in (run.line or ())]
    if len(ends) == 2:
        lines.append([(rows[i]["tokens"], rows[i]["value"]) for i in ends])
        chord = alt.Chart(alt.Data(values=[rows[i] for i in ends]))
        layers.append(chord.mark_line(stroke="var(--faint)", strokeDash=[5, 4], strokeWidth=1.5).encode(x=x, y=y))
    steps = [rows[i] for i in front]
    layers += [
        alt.Chart(alt.Data(values=steps))
        .mark_line(interpolate="step-after", stroke="var(--accent)", strokeWidth=1.5, opacity=0.55)
        .encode(x=x, y=y),
        base.mark_rule(strokeWidth=1.5).encode(
            x=x, y=alt.Y("low:Q", scale=y_scale, title=measure), y2="high:Q", color=colour
        ),
        base.mark_rule(strokeWidth=1.5).encode(
            x=alt.X("tokens_low:Q", title=""), x2="tokens_high:Q", y=y, color=colour
        ),
        base.mark_point(size=90, filled=True, opacity=1, stroke="var(--page)", strokeWidth=1.5).encode(
            x=x, y=y, color=colour, tooltip=tooltip
        ),
    ]
    for place, row in zip(_places(rows, lines, right, domain), rows, strict=True):
        layers.append(
            alt.Chart(alt.Data(values=[row]))
            .mark_text(**place, fontSize=12, fill="var(--ink)")
            .encode(x=x, y=y, text="setting:N")
        )
    return _spec(alt.layer(*layers), height=360)


def _places(
    rows: Sequence[Mapping[str, Any]],
    lines: Sequence[Sequence[tuple[float, float]]],
    right: float,
    span: Sequence[float],
) -> list[dict[str, Any]]:
    """Where each point's label goes: the corner that meets the fewest points, intervals, lines and earlier labels.

    ``lines`` are the drawn lines as (tokens, value) points. Reckoned on 1000 x 330 pixels; narrow pages hide labels.
    """

    def pixels(tokens: float, value: float) -> tuple[float, float]:
        return tokens / right * 1000, (span[1] - value) / (span[1] - span[0]) * 330

    taken: list[tuple[float, float, float, float]] = []
    for r in rows:
        (x, y), (_, low), (_, high) = (pixels(r["tokens"], r[key]) for key in ("value", "low", "high"))
        taken += [(x - 7, y - 7, x + 7, y + 7), (x - 2, high, x + 2, low)]
    for line in lines:
        for (xa, ya), (xb, yb) in pairwise(pixels(*point) for point in line):
            dots = ((xa + k / 60 * (xb - xa), ya + k / 60 * (yb - ya)) for k in range(61))
            taken += [(x, y, x + 1, y + 1) for x, y in dots]
    places = []
    for r in rows:
        x, y = pixels(r["tokens"], r["value"])
        long = 7.0 * len(r["setting"])
        corners: list[tuple[float, int, tuple[float, float, float, float], dict[str, Any]]] = []
        for align, dx in (("left", 9), ("right", -9)):
            for baseline, dy in (("bottom", -7), ("top", 7)):
                x0 = x + dx - (long if align == "right" else 0)
                y0 = y + dy - (14 if baseline == "bottom" else 0)
                hits = sum(x0 < t[2] and t[0] < x0 + long and y0 < t[3] and t[1] < y0 + 14 for t in taken)
                outside = x0 < 0 or x0 + long > 1020 or y0 < -14 or y0 + 14 > 330
                place = {"align": align, "dx": dx, "baseline": baseline, "dy": dy}
                corners.append((hits + 100 * outside, len(corners), (x0, y0, x0 + long, y0 + 14), place))
        best = min(corners, key=lambda corner: corner[:2])
        taken.append(best[2])
        places.append(best[3])
    return places


def lengths(run: Run) -> list[dict[str, Any]]:
    """Per setting {"name", "median", "spec"}: its lengths as a histogram, the baseline's outline behind it."""
    tokens = {name: [c.thought_tokens for c in cells.values()] for name, cells in run.cells.items() if cells}
    if not tokens:
        return []
    limit = float(np.quantile(np.concatenate([np.asarray(t) for t in tokens.values()]), 0.995)) or 1.0
    edges = np.linspace(0, limit * 1.001 + 1e-9, 33)
    shares = {name: np.histogram(np.minimum(t, limit), edges)[0] / len(t) for name, t in tokens.items()}
    top = max(float(s.max()) for s in shares.values())
    charts = []
    for name, share in shares.items():
        x = alt.X(
            "from:Q", title=None, scale=alt.Scale(domain=[0, float(edges[-1])], nice=False), axis=alt.Axis(tickCount=4)
        )
        y = alt.Y("share:Q", title=None, scale=alt.Scale(domain=[0, top]), axis=None)
        layers = [
            alt.Chart(alt.Data(values=_bins(edges, share)))
            .mark_rect(color=f"var(--series-{_index(run, name)})", opacity=0.85, stroke="var(--page)", strokeWidth=0.5)
            .encode(
                x=x, x2="to:Q", y2=alt.Y2Datum(0), y=y,
                tooltip=["from:Q", "to:Q", alt.Tooltip("share:Q", format=".1%")],
            )
        ]  # fmt: skip
        if name != run.baseline and run.baseline in shares:
            layers.append(
                alt.Chart(alt.Data(values=_bins(edges, shares[run.baseline])))
                .mark_line(interpolate="step-after", stroke="var(--soft)", strokeWidth=1)
                .encode(x=x, y=y)
            )
        charts.append(
            {"name": name, "median": float(np.median(tokens[name])), "spec": _spec(alt.layer(*layers), height=84)}
        )
    return charts


def by_level(run: Run, measure: str, title: str, form: str) -> dict[str, Any]:
    """One figure by level (and task, where there are several), a line per setting."""
    levels = {(level["task"], level["level"]) for s in run.settings for level in s.get("by_level", [])}
    tasks = {task for task, _ in levels}
    rows = [
        {
            "setting": s["name"],
            "task": level["task"],
            "level": level_name(level["task"], level["level"], levels),
            "value": level[measure],
            "low": level.get(f"{measure}_low"),
            "high": level.get(f"{measure}_high"),
            "n": level["n"],
        }
        for s in run.settings
        for level in s.get("by_level", [])
        if level.get(measure) is not None
    ]
    if len({r["level"] for r in rows}) < 2:
        return {}
    order = list(dict.fromkeys(r["level"] for r in rows))
    x = alt.X(
        "level:O",
        sort=order,
        title=None,
        axis=alt.Axis(labelAngle=-30 if len(tasks) > 1 else 0),
    )
    y = alt.Y("value:Q", title=title, axis=alt.Axis(format=form), scale=alt.Scale(zero=measure != "accuracy"))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=_colour(run), detail="task:N")
    tooltip = ["setting:N", "level:N", alt.Tooltip("value:Q", title=title, format=form), "n:Q"]
    layers = [
        base.mark_line(strokeWidth=1.6).encode(y=y),
        base.mark_point(filled=True, size=36, opacity=1).encode(y=y, tooltip=tooltip),
    ]
    if any(r["low"] is not None for r in rows):
        layers.insert(0, base.mark_rule(opacity=0.35).encode(y=alt.Y("low:Q", title=title), y2="high:Q"))
    return _spec(alt.layer(*layers), height=260)


def stacked(
    rows: Sequence[Mapping[str, Any]], order: Sequence[str], colours: Mapping[str, str], title: str
) -> dict[str, Any]:
    """Horizontal bars of {"setting", "part", "tokens"}, parts stacked in the order of ``colours``."""
    if not rows:
        return {}
    parts = list(colours)
    values = [{**row, "rank": parts.index(row["part"])} for row in rows]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(height={"band": 0.68})
        .encode(
            y=alt.Y(
                "setting:N", sort=list(order), title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=130)
            ),
            x=alt.X("tokens:Q", title=title),
            color=alt.Color("part:N", scale=alt.Scale(domain=parts, range=list(colours.values())), legend=None),
            order=alt.Order("rank:Q"),
            tooltip=["setting:N", "part:N", alt.Tooltip("tokens:Q", format=".1f")],
        )
    )
    return _spec(chart, height=24 * len(order) + 16)


def overthinking(profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """Tokens until the first right value, after it, and in chains that never had it."""
    parts = {
        "until first right value": ("tokens_until", "var(--work)"),
        "after it": ("tokens_after", "var(--check)"),
        "never had it": ("tokens_never", "var(--tail)"),
    }
    rows = [
        {"setting": name, "part": part, "tokens": getattr(p, field)}
        for name, p in profiles.items()
        for part, (field, _) in parts.items()
    ]
    return stacked(
        rows, list(profiles), {part: colour for part, (_, colour) in parts.items()}, "thinking tokens per problem"
    )


def training(run: Run) -> dict[str, Any]:
    """Loss by step, a line per stage."""
    if not run.training:
        return {}
    legend = alt.Legend(orient="bottom", title=None, columns=3) if len(run.training) > 1 else None
    axis = alt.Axis(format=".4~f")
    return _spec(_by_step(run.training, "loss", "training loss", alt.Scale(zero=False), axis, 8, legend), height=200)


def reinforcement(run: Run) -> dict[str, dict[str, Any]]:
    """Accuracy, completion and length by step on one axis of steps, a line per stage; shares on one scale."""
    if not run.rollouts:
        return {}
    panels = (
        ("accuracy", "accuracy", alt.Scale(domain=[0, 1]), ".0%"),
        ("completion", "completion", alt.Scale(domain=[0, 1]), ".0%"),
        ("length", "tokens per answer", alt.Scale(zero=True), ",.0f"),
    )
    wide = 38  # labels of one width: the steps of panels below each other stand below each other
    return {
        f"rollout-{key}": _spec(
            _by_step(run.rollouts, key, title, scale, alt.Axis(format=form, minExtent=wide), 5), height=180
        )
        for key, title, scale, form in panels
    }


def _by_step(
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    key: str,
    title: str,
    scale: alt.Scale,
    axis: alt.Axis,
    ticks: int,
    legend: alt.Legend | None = None,
) -> alt.Chart:
    """One figure of the logs by step, a line per stage, each thinned to at most 400 points."""
    rows = [
        {"stage": name, "step": row["step"], key: row[key]}
        for name, log in logs.items()
        for row in log[:: max(1, len(log) // 400)]
    ]
    last = max(row["step"] for log in logs.values() for row in log)  # what was stopped early is seen to end early
    colours = alt.Scale(domain=list(logs), range=stage_colours(len(logs)))
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(strokeWidth=1.4)
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=ticks), scale=alt.Scale(domain=[0, last])),
            y=alt.Y(f"{key}:Q", title=title, scale=scale, axis=axis),
            color=alt.Color("stage:N", scale=colours, legend=legend),
            tooltip=["stage:N", "step:Q", alt.Tooltip(f"{key}:Q", title=title, format=axis.format)],
        )
    )


def stage_colours(stages: int) -> list[str]:
    return [("var(--accent)", "var(--check)", "var(--branch)", "var(--soft)")[i % 4] for i in range(stages)]


def _spec(chart: Any, height: int) -> dict[str, Any]:
    axis = {
        "labelColor": "var(--soft)", "titleColor": "var(--soft)",
        "gridColor": "var(--rule)", "domainColor": "var(--rule)", "tickColor": "var(--rule)",
        "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
    }  # fmt: skip
    spec = chart.properties(width="container", height=height).configure(font=FONT, background="transparent")
    spec = spec.configure_legend(labelColor="var(--soft)", labelFontSize=12)
    spec = spec.configure_view(stroke=None).configure_axis(**axis).configure_axisX(grid=False)
    made = dict(spec.to_dict(validate=False))  # validation costs a second; a test draws every chart
    made.pop("$schema", None)  # an address, though nobody fetches it
    return made


def _colour(run: Run) -> Any:
    names = [s["name"] for s in run.settings]
    return alt.Color(
        "setting:N", legend=None, scale=alt.Scale(domain=names, range=[f"var(--series-{i})" for i in range(len(names))])
    )


def _index(run: Run, name: str) -> int:
    return [s["name"] for s in run.settings].index(name)


def _bins(edges: np.ndarray, share: np.ndarray) -> list[dict[str, float]]:
    return [
        {"from": round(float(a), 2), "to": round(float(b), 2), "share": round(float(s), 5)}
        for a, b, s in zip(edges[:-1], edges[1:], share, strict=True)
    ]
