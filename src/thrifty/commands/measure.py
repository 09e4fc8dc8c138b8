"""``thrifty measure``: what strategies get right on a task, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thrifty import registry
from thrifty.commands import _fields, _runs
from thrifty.contracts import ThriftyError
from thrifty.tasks import SPLITS


@click.command()
@click.option("--model", default="long", help="Folder, Hub id, or a student that ships with the package.")
@click.option("--task", default="roll", help="roll, search, list, bool, rg:NAME, hf:DATASET[:CONFIG] or file:PATH.")
@click.option(
    "--strategy", "strategies", multiple=True, default=("single-pass",),
    help="Key of a solve.search method, with fields after a colon (short-m-at-k:m=1,k=5). May be repeated.",
)  # fmt: skip
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of a LoRA to turn.")
@click.option("--alpha", "alphas", multiple=True, help="Strength of the adapter. May be repeated.")
@click.option("--n", default=500, type=click.IntRange(1), help="Problems.")
@click.option("--split", type=click.Choice(SPLITS), default="test", help="Of the task.")
@click.option("--seed", default=0, help="Of problems and sampling.")
@click.option("--no-gold", is_flag=True, help="There are no answers: measure agreement with the first setting.")
@click.option("--price", help="Money per million tokens in and out, as 0.5,2.")
@click.option("--budget", type=click.IntRange(1), help="Generated tokens per problem.")
@click.option("--name", help="Name of the run's folder.  [default: from model, task, strategies and seed]")
@click.option("--runs", default="runs", help="Where run folders stand.")
@click.option("--batch-size", default=128, type=click.IntRange(1), help="Rows generated at once.")
@click.option("--max-tokens", type=click.IntRange(1), help="New tokens per response.  [default: what fits]")
@click.option("--device", default="auto", help="cpu, cuda or auto.")
@click.option("--dtype", default="auto", help="float32, bfloat16 or auto.")
@click.option("--question", help="Column of the questions, for files and data sets.")
@click.option("--answer", help="Column of the answers.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of a table.")
@click.pass_context
def main(ctx: click.Context, as_json: bool, price: str | None, name: str | None, runs: str, **options: Any) -> None:
    """Measure strategies on a task: accuracy with interval, completion, tokens, seconds, by level; overthinking.

    Leaves a folder with traces and report. The first setting is what the others are compared with.
    """
    money = _runs.prices(price)
    chosen = [_strategy(text) for text in options["strategies"]]
    alphas = [_number(a) for a in options["alphas"]]
    if alphas and options["adapter"] is None:
        raise ThriftyError("--alpha turns an adapter: give --adapter FOLDER (a run leaves one in runs/NAME/adapter)")
    config: dict[str, Any] = {"recipe": "measure", **options}
    config["strategies"], config["alphas"] = list(options["strategies"]), alphas
    config["adapter"] = str(options["adapter"]) if options["adapter"] else None
    name = name or _runs.name_of("measure", config["model"], config["task"], *config["strategies"], str(config["seed"]))
    folder = Path(runs) / name
    lab = _runs.lab(folder, config, as_json, gold=not config["no_gold"])
    _runs.open_folder(folder, config)
    try:
        report = _measure(lab, config, chosen)
    except KeyboardInterrupt:
        _runs.interrupted(ctx, folder)
    _runs.publish(lab, config, report, money, gold=not config["no_gold"])
    _runs.show(folder, as_json)


def _measure(lab: Any, config: dict[str, Any], chosen: list[tuple[str, Any]]) -> Any:
    from thrifty.lab import ADAPTER, Report, Setting, unusable

    problems = lab.problems(config["split"], lab.n)
    if not config["no_gold"] and all(p.answer is None for p in problems):
        raise ThriftyError(f"{config['task']} has no gold answers: use --no-gold to measure agreement instead")
    adapter = Path(config["adapter"]) if config["adapter"] else None
    engine = lab.engine(adapter=adapter)
    settings = []
    for text, strategy in chosen:
        for alpha in config["alphas"] or [None]:
            label = text if alpha is None else f"{text}, α = {alpha:g}"
            strengths = None if adapter is None else {ADAPTER: 1.0 if alpha is None else alpha}
            run = lab.solve(_runs.name_of(label), strategy, problems, engine, strengths, budget=config["budget"])
            settings.append(Setting(label, run, alpha))
    return Report(settings, settings[0].name, notes=[] if config["no_gold"] else unusable(problems))


def _strategy(text: str) -> tuple[str, Any]:
    key, _, fields = text.partition(":")
    method = registry.find(key)
    cls = registry.load(key)
    if not hasattr(cls, "solve"):
        raise ThriftyError(f"{key} is of family {method.family}, not a strategy: `thrifty list --family solve.search`")
    pairs = dict(part.partition("=")[::2] for part in fields.split(",") if part)
    return text, cls(**_fields.typed(cls, pairs))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ThriftyError(f"--alpha needs a number, not {text!r}") from None
