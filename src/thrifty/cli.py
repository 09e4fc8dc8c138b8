"""The ``thrifty`` command. Each file of ``thrifty/commands/`` is one command; adding one edits no existing file.

Built on click: typer imports pydantic, which alone takes longer than ``thrifty list`` may (``bench/startup.py``).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from thrifty import __version__
from thrifty.contracts import ThriftyError

FOLDER = Path(__file__).parent / "commands"


class Commands(click.Group):
    """The files of ``commands/``, imported when called: ``thrifty list`` pays for nothing that it doesn't use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(path.stem.replace("_", "-") for path in FOLDER.glob("[!_]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        names = self.list_commands(ctx)
        if cmd_name not in names:
            from thrifty.registry import did_you_mean

            near = did_you_mean(cmd_name, names)
            raise ThriftyError(f"There is no command '{cmd_name}'.{near} Commands: {', '.join(names)}.")
        command: click.Command = importlib.import_module(f"thrifty.commands.{cmd_name.replace('-', '_')}").main
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ThriftyError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"thrifty: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("thrifty: interrupted", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--debug", is_flag=True, show_default=False, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="thrifty", message="%(prog)s %(version)s")
def app(debug: bool) -> None:
    """Make a language model reason for less: fewer tokens, fewer parameters, fewer examples, at the same accuracy."""


def main() -> None:
    """The console script. Exit codes: 0, 2 for a mistake the user can mend, 130 for Ctrl-C, 1 for a defect."""
    try:
        app(prog_name="thrifty")
    except KeyboardInterrupt:  # before the command has begun
        sys.exit(130)


if __name__ == "__main__":
    main()
