"""``thrifty list``: every paper of the mission and every method found."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence

import click

from thrifty import registry
from thrifty.contracts import ThriftyError

COLOURS = {"built": "blue", "shown": "green", "refuted": "red", "inconclusive": "yellow", "stale": "magenta"}


@click.command()
@click.option("--family", "-f", help="Only this family (solve.search) or group of families (solve).")
@click.option("--status", "-s", help=f"Only this status: {', '.join(registry.STATUSES)}.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option("--plain", is_flag=True, help="Print tab-separated lines, the default where the output is no terminal.")
def main(family: str | None, status: str | None, as_json: bool, plain: bool) -> None:
    """List every paper and method: its family, what it saves, and whether it is built."""
    groups = {category.split(".")[0] for category in registry.CATEGORIES}
    _check("family", family, [*registry.CATEGORIES, *sorted(groups - set(registry.CATEGORIES))])
    _check("status", status, registry.STATUSES)
    rows = [
        entry
        for entry in registry.entries()
        if (family is None or entry.family == family or entry.family.startswith(f"{family}."))
        and (status is None or entry.status == status)
    ]
    if not rows:
        told = "nothing: methods stand under their paper's family, which may not be their file's (docs/methods.md)"
        click.echo(f"thrifty: {told}", err=True)
    if as_json:
        names = ("key", "family", "title", "arxiv", "year", "saves", "priority", "status")
        click.echo(json.dumps([{name: getattr(e, name) for name in names} for e in rows], indent=1, ensure_ascii=False))
    elif plain or not sys.stdout.isatty():
        for e in rows:
            facts = (e.key, e.family, e.status, e.priority, e.year, e.arxiv, ",".join(e.saves), e.title)
            click.echo("\t".join("" if fact is None else str(fact) for fact in facts))
    else:
        _table(rows, width=shutil.get_terminal_size().columns)


def _check(what: str, word: str | None, known: Sequence[str]) -> None:
    if word is not None and word not in known:
        near = registry.did_you_mean(word, known)
        raise ThriftyError(f"There is no {what} '{word}'.{near} Known: {', '.join(known)}.")


def _table(rows: list[registry.Entry], width: int) -> None:
    """One line per entry, never wider than the terminal: what is saved gives way first, then the title."""
    key = max((len(e.key) for e in rows), default=0)
    group = ""
    for e in rows:
        if e.family != group:
            group = e.family
            click.secho(group, bold=True)
        mark = click.style(f"{e.status:12}", fg=COLOURS.get(e.status), dim=e.status == "missing")
        saves = f"{', '.join(e.saves):28}  " if width >= 110 else ""
        line = f"{e.priority or '-'}  {saves}{e.title}"
        room = width - key - 17
        line = line if len(line) <= room else line[: max(room - 1, 0)].rstrip() + "…"
        click.echo(f"  {e.key:{key}} {mark} {line if room > 8 else ''}".rstrip())
    counts = Counter(e.status for e in rows)
    papers = sum(e.priority is not None for e in rows)
    found = ", ".join(f"{n} {status}" for status, n in counts.items())
    click.echo(textwrap.fill(f"{papers} papers, {len(rows) - papers} other methods: {found}", max(width, 40)))
