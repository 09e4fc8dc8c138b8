"""Colours and type, for the page, its charts and pictures.

A chart names its colours as CSS variables (``var(--ink)``): the page gives them values for light and dark, so one
specification serves both. ``coloured`` fills in one theme's values where a chart leaves the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from thrifty.report.run import Run

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#ffffff", "panel": "#f7f7f5", "ink": "#1d1f23", "soft": "#5d636d", "faint": "#8b919b",
        "rule": "#e3e4e1", "accent": "#0b6e99", "right": "#00795c", "wrong": "#b5410b",
        "check": "#e69f00", "branch": "#cc79a7", "tail": "#8b919b", "work": "#0072b2",
    },
    "dark": {
        "page": "#15171a", "panel": "#1d2024", "ink": "#e9eaec", "soft": "#a5abb5", "faint": "#7d848f",
        "rule": "#2f333a", "accent": "#5ab6e0", "right": "#3fc79a", "wrong": "#f28e4c",
        "check": "#f0b429", "branch": "#df9bc0", "tail": "#7d848f", "work": "#56a3d9",
    },
}  # fmt: skip
"""Named colours per theme; data colours are Okabe and Ito's, which colour-blind readers tell apart."""

_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_OKABE_ITO = ("#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#0072b2")


def series(run: Run) -> dict[str, dict[str, str]]:
    """Setting -> {"light", "dark"} colour: ink for the baseline, a ramp along α, Okabe-Ito for the rest."""
    dialled = sorted(
        (s for s in run.settings if s.get("alpha") is not None and s["name"] != run.baseline), key=lambda s: s["alpha"]
    )
    colours = {run.baseline: {theme: THEMES[theme]["ink"] for theme in THEMES}}
    for i, setting in enumerate(dialled):
        at = i / max(1, len(dialled) - 1)
        colours[setting["name"]] = {"light": _ramp(0.15 + 0.6 * at), "dark": _ramp(0.35 + 0.6 * at)}
    rest = [s["name"] for s in run.settings if s["name"] not in colours]
    for i, name in enumerate(rest):
        colours[name] = dict.fromkeys(THEMES, _OKABE_ITO[i % len(_OKABE_ITO)])
    return colours


def coloured(spec: Mapping[str, Any], run: Run, theme: str = "light") -> dict[str, Any]:
    """A specification with the theme's colours in place of CSS variables: for pictures outside the page."""
    text = json.dumps(spec)
    for name, value in variables(run)[theme].items():
        text = text.replace(f"var(--{name})", value)
    return dict(json.loads(text))


def variables(run: Run) -> dict[str, dict[str, str]]:
    """Theme -> CSS variable -> colour, the settings' colours included."""
    colours = series(run)
    return {
        theme: named | {f"series-{i}": colours[s["name"]][theme] for i, s in enumerate(run.settings)}
        for theme, named in THEMES.items()
    }


def _ramp(at: float) -> str:
    """Viridis at ``at`` in [0, 1], interpolated between five of its stops."""
    place = at * (len(_VIRIDIS) - 1)
    i = min(int(place), len(_VIRIDIS) - 2)
    low, high = np.array(_VIRIDIS[i]), np.array(_VIRIDIS[i + 1])
    return "#" + "".join(f"{round(c):02x}" for c in low + (place - i) * (high - low))
