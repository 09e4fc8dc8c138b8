"""``thrifty check KEY|FILE``: does a method keep its family's contract? Also for methods that are not thrifty's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from thrifty.conformance import Result

MARKS = {True: ("ok", "green"), False: ("failed", "red"), None: ("-", None)}


@click.command()
@click.argument("method")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def main(method: str, as_json: bool) -> None:
    """Run every check of a method's family on METHOD: its key, or its file.

    Checks run on embedded problems, a scripted engine and a tiny random model; they take seconds. Exit code: 0 when all
    hold, 1 when one fails, 2 when there is no such method.
    """
    from thrifty import conformance

    found = conformance.find(method)
    results = []
    live = not as_json and sys.stdout.isatty()
    if not as_json:
        click.secho(f"{found.key}  {found.family}", bold=True)
    for result in conformance.check_method(found, *[_begin] * live):
        results.append(result)
        if not as_json:
            click.echo("\r" * live, nl=False)
            _line(result)
    failed = [result for result in results if result.ok is False]
    if as_json:
        whole = {"method": found.key, "family": found.family, "file": str(found.path), "ok": not failed}
        click.echo(json.dumps({**whole, "checks": [dataclasses.asdict(r) for r in results]}, indent=1))
    else:
        held = sum(result.ok is True for result in results)
        beside = len(results) - held - len(failed)
        click.echo(f"{held} held, {len(failed)} failed" + (f", {beside} do not apply" if beside else ""))
    click.get_current_context().exit(1 if failed else 0)


def _begin(check: str) -> None:
    """Show which check is being run; its result is written over it."""
    click.echo(f"  {'...':6} {check}", nl=False)


def _line(result: Result) -> None:
    mark, colour = MARKS[result.ok]
    click.echo(f"  {click.style(f'{mark:6}', fg=colour)} {result.check}")
    if result.why:
        width = max(40, shutil.get_terminal_size().columns) - 12
        for line in textwrap.wrap(result.why, width):
            click.secho(f"           {line}", dim=result.ok is None)
