"""``thrifty run``: a recipe on a model and a task, from problems to report."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from thrifty import fields, registry
from thrifty.commands import _options, _runs
from thrifty.contracts import ThriftyError

MEASURED = ("measure", "calibrate")
"""Commands that leave a run folder, and run no recipe."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("recipe")
@_options.asking(("test", "dev"))
@click.option("--plan", is_flag=True, help="Say what it will cost (tokens, time, disk), by a probe; write nothing.")
@_options.ray("problems")
@click.pass_context
def main(
    ctx: click.Context,
    recipe: str,
    name: str | None,
    runs: str,
    price: str | None,
    plan: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run RECIPE (or an earlier run's config.yaml) and leave a folder with traces, result, adapter and report.

    A recipe's own fields are options too (`thrifty show RECIPE` lists them): --short-from gold, --steps 200.
    Run the same command again to go on after an interruption.
    """
    money = _runs.prices(price)
    if recipe.endswith((".yaml", ".yml")):
        config = _runs.read_config(Path(recipe))
        if config["recipe"] in MEASURED:
            _measured(ctx, Path(recipe), config)
            return
        config = _again(ctx, Path(recipe), config, options)
        name = name or Path(recipe).parent.name
    else:
        config = {"recipe": recipe, **options, "fields": {}}
    cls = _recipe(config["recipe"])
    given = {**config["fields"], **fields.from_arguments(cls, ctx.args)}
    method = cls(**fields.typed(cls, given))
    config["fields"] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(method).items()}

    name = name or _runs.name_of(config["recipe"], config["model"], config["task"], str(config["seed"]))
    folder = Path(runs) / name
    lab = _runs.lab(folder, config, as_json)
    if hasattr(method, "check"):
        method.check(lab)
    if plan:
        from thrifty.commands._plan import estimate

        click.echo(estimate(lab, method))
        return
    with _runs.opened(ctx, folder, config) as finished:
        if finished:
            click.echo(f"{folder} has run already and found this (choose another --name to run again):", err=True)
        else:
            lab.progress.say(f"{config['recipe']} on model {config['model']}, task {config['task']}, in {folder}")
        if money or not finished:  # prices are no part of a configuration: they are put on what stands
            _runs.publish(lab, config, method.run(lab), money, gold=True)
        _runs.show(folder, as_json)


def _again(ctx: click.Context, path: Path, config: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an earlier run, changed by what the command line names."""
    _known(path, config, [*options, "recipe", "fields"])
    read = dict(config)
    for option in ctx.command.params:
        if (value := config.get(str(option.name))) is not None:
            try:  # as words, which click checks: 1.5 would pass for a whole number
                read[str(option.name)] = option.type_cast_value(ctx, value if isinstance(value, bool) else str(value))
            except click.BadParameter as error:
                raise ThriftyError(f"{path}: {option.name}: {error.message}") from error
    return {**options, "fields": {}, **read, **{k: v for k, v in options.items() if _named(ctx, k)}}


def _measured(ctx: click.Context, path: Path, config: Mapping[str, Any]) -> None:
    """Give the command that left a configuration once more, changed by what the command line names."""
    command: click.Command = importlib.import_module(f"thrifty.commands.{config['recipe']}").main
    options = {option.name: option for option in command.params}
    _known(path, config, [*map(str, options), "recipe", "dial"])
    if ctx.params["plan"]:
        raise ThriftyError(f"{path} was left by `thrifty {config['recipe']}`, and --plan is for recipes: leave it out")
    words: list[str] = []
    given = {**config, "name": path.parent.name, **{k: v for k, v in ctx.params.items() if _named(ctx, k)}}
    for key, value in given.items():
        if key in options and value is not None and value is not False:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [options[key].opts[0], *([] if one is True else [str(one)])]
    with command.make_context(config["recipe"], [*words, *ctx.args], parent=ctx) as inner:
        command.invoke(inner)


def _named(ctx: click.Context, option: str) -> bool:
    return ctx.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT


def _known(path: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ThriftyError for a key that a run would not look at: it may be a slip in one that matters."""
    for key in config:
        if key not in names:
            raise ThriftyError(f"{path} has {key!r}, which is no setting.{registry.did_you_mean(key, list(names))}")


def _recipe(key: str) -> type:
    method = registry.find(key)
    if method.family != "recipes":
        raise ThriftyError(f"{key} is of family {method.family}, no recipe: `thrifty show {key}` tells how it is run")
    return registry.load(key)
