"""The mission: the papers of ``papers.yaml``, and ``papers.md`` made from them and ``results/``.

``python -m thrifty.papers`` prints it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from thrifty.registry import Entry

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Paper:
    """One entry of ``papers.yaml``. ``system`` is the key of the paper whose file also covers this one."""

    key: str
    title: str
    arxiv: str | None
    year: int
    family: str
    saves: tuple[str, ...]
    priority: int
    system: str | None = None
    headline: str | None = None
    """What the paper reports, of systems that have a method here."""


def papers() -> dict[str, Paper]:
    """All papers by key, in the file's order."""
    # A wheel carries the file inside the package; a checkout has it at the top.
    path = next(p for p in (PACKAGE / "papers.yaml", PACKAGE.parents[1] / "papers.yaml") if p.exists())
    rows = yaml.load(path.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {row["key"]: Paper(**{**row, "saves": tuple(row["saves"])}) for row in rows}


def markdown() -> str:
    """What the claims found, and the mission table: every paper, and the methods of the package itself, by family."""
    from thrifty.registry import STATUSES, entries

    rows = entries(plugins=False)
    counts = Counter(e.status for e in rows if e.priority is not None)
    verdicts = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
    out = [
        "# The mission\n",
        "Made from `papers.yaml` and the methods' cards by `make papers`; not edited by hand. Priority: 1 core of "
        "efficient reasoning, 2 efficient tuning and inference, 3 another modality or application, - no paper of the "
        "list.\n",
        f"{sum(e.priority is not None for e in rows)} papers: {verdicts}.",
        "\n## Evidence\n",
        "The runs of `results/` that count, at `tiny` on the shipped students: `thrifty reproduce KEY`; `thrifty "
        "board` shows them all. Method against comparator with 95 % intervals: a difference, or a ratio with ×. Where "
        "problems are the unit a ratio is their geometric mean, that of the totals beside it.\n",
        "| method | verdict | effect | asked for | its control | tuned to | why |",
        "|---|---|---|---|---|---|---|",
        *_evidence(rows),
    ]
    for family, group in groupby(rows, key=lambda e: e.family):
        out += [
            f"\n## {family}\n",
            "| method | status | paper | year | saves | priority |",
            "|---|---|---|---|---|---|",
        ]
        for e in group:
            name = f"[`{e.key}`]({e.where.relative_to(PACKAGE.parents[1]).as_posix()})" if e.where else f"`{e.key}`"
            title = e.title.replace("|", "\\|")
            title = f"[{title}](https://arxiv.org/abs/{e.arxiv})" if e.arxiv else title
            cells = (name, e.status, title, str(e.year or ""), ", ".join(e.saves), str(e.priority or "-"))
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def _evidence(rows: Sequence[Entry]) -> Iterator[str]:
    """A row per verdict."""
    from thrifty import evidence
    from thrifty.registry import standing

    for entry in (e for e in rows if e.where is not None):
        found = standing(entry)
        if (run := found.run) is None:
            continue
        assert entry.where is not None
        runs = evidence.read(evidence.results_folder(entry.where) / f"{entry.key}.jsonl")
        of_code = [r for r in runs if evidence.counts(r) and (r["code"], r["scale"]) == (run["code"], run["scale"])]
        controls = {r["control"]: r for r in reversed(of_code) if r["control"] in ("placebo", "oracle")}
        tuned = [f"{arm} {text.split(' (')[0]}" for arm, text in evidence.tuned(run).items()]
        told = [f"{name}: {_effects(r)}" for name, r in controls.items()]
        why = found.why if found.status in ("inconclusive", "not carried") else ""
        asked = "; ".join(_asked(part) for part in run["registered"]["parts"])
        cells = (f"`{entry.key}`", found.status, _effects(run), asked, "; ".join(told), "; ".join(tuned), why)
        yield f"| {' | '.join(cells)} |"


def _effects(run: Mapping[str, Any]) -> str:
    """The parts of a run, new over old or new minus old, whichever direction is the better one."""
    registered = {part["name"]: part for part in run["registered"]["parts"]}
    found = []
    for name, effect in ((part["name"], part["effect"]) for part in run["parts"]):
        part = registered[name]
        value, *ends = (_plain(part, effect[which]) for which in ("value", "low", "high"))
        interval = ", ".join(_written(part, end) for end in sorted(ends))
        totals = f", totals {_written(part, of_totals(run, name))}" if per_problem(run, part) else ""
        found.append(f"{name} {_written(part, value)} [{interval}]{totals}")
    return "; ".join(found)


def per_problem(run: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether a part's effect is the mean of the problems' own log ratios, which is not the ratio of their totals."""
    return part.get("on") == "log ratio" and run["registered"]["unit"] == "student"


def of_totals(run: Mapping[str, Any], name: str) -> float:
    """A part of all units together, the method's over the comparator's."""
    new, old = (sum(unit[arm][name]["mean"] for unit in run["units"]) for arm in ("method", "comparator"))
    return float(new / old)


def _asked(part: Mapping[str, Any]) -> str:
    """The smallest effect, or what may be lost."""
    bound = part["smallest"] if part["test"] == "superior" else -part["margin"]
    least = "at most" if part.get("better") == "lower" else "at least"
    return f"{part['name']} {least} {_written(part, _plain(part, bound))}"


def _plain(part: Mapping[str, Any], effect: float) -> float:
    """A difference or a ratio, from an effect, which is positive in the direction claimed."""
    signed = -effect if part.get("better") == "lower" else effect
    return math.exp(signed) if part.get("on") == "log ratio" else signed


def _written(part: Mapping[str, Any], value: float) -> str:
    return f"×{value:.2f}" if part.get("on") == "log ratio" else f"{value:+.3f}"


if __name__ == "__main__":
    print(markdown(), end="")
