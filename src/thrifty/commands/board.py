"""``thrifty board``: every method on the same work, on one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Folder of KEY.jsonl.  [default: the package's, and ./results]",
)
@click.option(
    "--add", "added", multiple=True, type=click.Path(path_type=Path), help="Somebody else's results; may be repeated."
)
@click.option("--out", default="board.html", type=click.Path(path_type=Path), help="The page.")
def main(results: Path | None, added: tuple[Path, ...], out: Path) -> None:
    """Write one page from the record of runs: accuracy against cost, verdicts with their controls, every run.

    The page needs nothing but itself: no network, no other file. Methods that nobody has built yet stand on it too.
    """
    from thrifty.report.board import write_board

    path, torn = write_board(out, results, added)
    for line in torn:
        click.echo(f"thrifty: {line}", err=True)
    click.echo(path)
