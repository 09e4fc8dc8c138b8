"""Options that every command takes which asks a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click


def ray(what: str, gpu: bool = True) -> Callable[[Any], Any]:
    """Decorate a command with ``--ray``, under which ``spread.executor()`` is a cluster.

    It is no part of a run's configuration: what was begun without it goes on with it, and the other way round.
    """

    def connect(ctx: click.Context, parameter: click.Parameter, address: str | None) -> None:
        if address is not None and not ctx.resilient_parsing:
            from thrifty.edges.ray import over

            ctx.with_resource(over(address, gpu))

    told = f"Spread {what} over a Ray cluster that is running; the results are the same."
    return click.option("--ray", metavar="ADDRESS|auto", expose_value=False, callback=connect, help=told)


def asking(splits: Sequence[str]) -> Callable[[Any], Any]:
    """Decorate a command with the options of model, task, sampling and run folder."""
    options = (
        click.option("--model", default="long", help="Folder, Hub id, or a student that ships with the package."),
        click.option(
            "--task", default="roll", help="roll, search, list, bool, rg:NAME, hf:DATASET[:CONFIG] or file:PATH."
        ),
        click.option("--n", default=500, type=click.IntRange(1), help="Problems to measure on."),
        click.option("--split", type=click.Choice(splits), default="test", help="Whose problems to measure on."),
        click.option("--seed", default=0, type=click.IntRange(0), help="Of problems, sampling and training."),
        click.option("--batch-size", default=128, type=click.IntRange(1), help="Rows generated at once."),
        click.option("--max-tokens", type=click.IntRange(1), help="New tokens per response.  [default: what fits]"),
        click.option("--device", default="auto", help="cpu, cuda, cuda:1 or auto."),
        click.option(
            "--dtype",
            default="auto",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Of the weights.",
        ),
        click.option("--question", help="Column of the questions, for files and data sets."),
        click.option("--answer", help="Column of the answers."),
        click.option("--price", help="Money per million tokens in and out, as 0.5,2."),
        click.option("--name", help="Name of the run's folder.  [default: from what is run]"),
        click.option("--runs", default="runs", help="Where run folders stand."),
        click.option("--json", "as_json", is_flag=True, help="Print result.json instead of a table."),
    )

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
