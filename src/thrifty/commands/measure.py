"""``thrifty measure``: what strategies get right on a task, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from thrifty import fields
from thrifty.commands import _endpoint, _options, _runs
from thrifty.contracts import ThriftyError
from thrifty.engines import spread
from thrifty.tasks import SPLITS


@click.command()
@_options.asking(SPLITS)
@click.option(
    "--strategy", "strategies", multiple=True, default=("single-pass",),
    help="Key of a solve.search method, with fields after a colon (short-m-at-k:m=1,k=5). May be repeated.",
)  # fmt: skip
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of a LoRA to turn.")
@click.option("--alpha", "alphas", multiple=True, help="Strength of the adapter. May be repeated.")
@click.option("--no-gold", is_flag=True, help="There are no answers: measure agreement with the first setting.")
@click.option("--budget", type=click.IntRange(1), help="Generated tokens per problem.")
@_endpoint.options
@_options.ray("problems")
@click.pass_context
def main(ctx: click.Context, as_json: bool, price: str | None, name: str | None, runs: str, **options: Any) -> None:
    """Measure strategies on a task: accuracy with interval, completion, tokens, seconds, by level; overthinking.

    Leaves a folder with traces and report. The first setting is what the others are compared with.
    """
    money = _runs.prices(price)
    chosen = [(text, fields.made(text, "solve")) for text in options["strategies"]]
    alphas = [_number(a) for a in options["alphas"]]
    served = _endpoint.taken(options, options["adapter"])
    if served and spread.executor() is not None:
        raise ThriftyError(
            "--ray spreads models that are loaded: an endpoint is asked by one process, --batch-size requests at once"
        )
    for what, given in (("--strategy", options["strategies"]), ("--alpha", alphas)):
        if len(set(given)) < len(given):
            raise ThriftyError(f"{what} is given twice with one value: each is a setting of its own, so give it once")
    if alphas and options["adapter"] is None:
        raise ThriftyError("--alpha turns an adapter: give --adapter FOLDER (a run leaves one in runs/NAME/adapter)")
    config: dict[str, Any] = {"recipe": "measure", **options, **served}
    config["strategies"], config["alphas"] = list(options["strategies"]), alphas
    config["adapter"] = str(options["adapter"]) if options["adapter"] else None
    name = name or _runs.name_of("measure", config["model"], config["task"], *config["strategies"], str(config["seed"]))
    folder = Path(runs) / name
    lab = _runs.lab(folder, config, as_json, gold=not config["no_gold"])
    with _runs.opened(ctx, folder, config) as finished:
        if money or not finished:
            _runs.publish(lab, config, _measure(lab, config, chosen), money, gold=not config["no_gold"])
        _runs.show(folder, as_json)


def _measure(lab: Any, config: dict[str, Any], chosen: list[tuple[str, Any]]) -> Any:
    from thrifty.lab import ADAPTER, Report, Setting

    problems = lab.problems(lab.split, lab.n, gold=not config["no_gold"])
    adapter = Path(config["adapter"]) if config["adapter"] else None
    engine = _endpoint.engine(lab, config) if config.get("base_url") else lab.engine(adapter=adapter)
    settings = []
    for text, strategy in chosen:
        for alpha in config["alphas"] or [None]:
            label = text if alpha is None else f"{text}, α = {alpha:g}"
            strengths = None if adapter is None else {ADAPTER: 1.0 if alpha is None else alpha}
            run = lab.solve(_runs.name_of(label), strategy, problems, engine, strengths, budget=config["budget"])
            settings.append(Setting(label, run, alpha))
    return Report(settings, settings[0].name, notes=lab.notes([] if config["no_gold"] else problems))


def _number(text: str) -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise ThriftyError(f"--alpha needs a number, not {text!r}")
