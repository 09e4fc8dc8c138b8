"""The terminal table of a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def table(result: Mapping[str, Any]) -> Table:
    """``result.json`` as a rich table: settings down; accuracy, tokens, completion and cost across.

    ``settings[i]`` needs the keys of ``summarise``; the baseline is ``result["baseline"]`` or the first setting.
    """
    settings = result["settings"]
    base = next((s for s in settings if s["name"] == result.get("baseline")), settings[0])
    measure = "accuracy" if any(s["accuracy"] is not None for s in settings) else "agreement"
    title = f"{result.get('recipe', '')} · {result.get('task', '')} · {result.get('n', '?')} problems"
    caption = f"Means per problem. Change: of thinking tokens, against {base['name']}."
    failed = any(s.get("failed") for s in settings)
    if failed:
        caption += " Failed: given up by the engine, and counted as not answered."
    made = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    made.add_column("setting", no_wrap=True)
    made.add_column(f"{measure} (95 %)", justify="right", no_wrap=True)
    for heading in ("thinking\ntokens", "change", "com-\nplete", "tokens/\nright", "sec-\nonds"):
        made.add_column(heading, justify="right", no_wrap=True)
    priced = any(s.get("money") is not None for s in settings)
    if priced:
        made.add_column("money", justify="right", no_wrap=True)
    if failed:
        made.add_column("failed", justify="right", no_wrap=True)
    for s in settings:
        low, high = s.get(f"{measure}_low"), s.get(f"{measure}_high")
        cells: list[Text | str] = [
            Text(str(s["name"]), style="bold" if s is base else ""),
            share(s.get(measure)) + ("" if low is None or high is None else f" ({low * 100:.1f}–{high * 100:.1f})"),
            number(s["thought_tokens"]),
            change(s["thought_tokens"], base["thought_tokens"]) if s is not base else "",
            share(s.get("completion_rate"), 0),
            number(s.get("tokens_per_right_answer")),
            number(s.get("seconds"), 3),
        ]
        cells += [number(s.get("money"), 6)] if priced else []
        made.add_row(*cells, *([number(s.get("failed"), 0)] if failed else []))
    return made


def share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value * 100:.{digits}f} %"


def number(value: float | None, digits: int = 1) -> str:
    """A figure, rounded; unknown is a dash, never 0."""
    return "–" if value is None else f"{value:,.{digits}f}"


def change(value: float | None, base: float | None) -> str:
    """Relative change in per cent with its sign, a true minus.

    >>> change(38, 100)
    '−62 %'
    """
    if value is None or not base:
        return "–"
    points = round((value / base - 1) * 100)
    return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points)} %"
