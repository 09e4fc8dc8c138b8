"""``thrifty run``: a recipe on a model and a task, from problems to report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thrifty import fields, registry
from thrifty.commands import _options, _runs
from thrifty.contracts import ThriftyError


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("recipe")
@_options.asking(("test", "dev"))
@click.option("--plan", is_flag=True, help="Say what it will cost (tokens, time, disk) and do nothing.")
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
        config = _again(ctx, Path(recipe), options)
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


def _again(ctx: click.Context, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an earlier run, changed by what the command line names."""
    config = _runs.read_config(path)
    for key, value in options.items():
        if ctx.get_parameter_source(key) is not click.core.ParameterSource.DEFAULT:
            config[key] = value
    return {**options, "fields": {}, **config}


def _recipe(key: str) -> type:
    method = registry.find(key)
    if method.family != "recipes":
        remedy = "use `thrifty measure --strategy`" if method.family == "solve.search" else "use it from Python"
        raise ThriftyError(f"{key} is of family {method.family}, not a recipe: {remedy}")
    return registry.load(key)
