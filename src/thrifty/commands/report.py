"""``thrifty report``: draw a run's page again, or its main chart as a picture."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--picture", type=click.Path(path_type=Path), help="Write accuracy against thinking tokens here, as SVG.")
@click.option("--scheme", type=click.Choice(["light", "dark"]), default="light", help="Colours of the picture.")
def main(folder: Path, picture: Path | None, scheme: str) -> None:
    """Write FOLDER/report.html anew from the run's results, or a picture of its main chart."""
    from thrifty import report

    click.echo(report.write_report(folder) if picture is None else report.picture(folder, picture, scheme))
