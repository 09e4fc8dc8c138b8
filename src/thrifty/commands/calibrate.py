"""``thrifty calibrate``: what every ``reasoning_effort`` costs and gets right, as a file for ``thrifty serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from thrifty.commands import _endpoint, _options, _runs
from thrifty.contracts import ThriftyError


@click.command()
@_options.asking(("test", "dev"))
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of a LoRA whose strength is the dial.")
@click.option("--alpha", "alphas", multiple=True, help="A strength to try, such as 0, 0.5 and 1. Repeat it.")
@click.option("--thinking-budget", "budgets", multiple=True, help="A budget to try, or none for no limit. Repeat it.")
@click.option(
    "--strategy", "strategies", multiple=True, help="A strategy to try, as behind MODEL:, or none. Repeat it."
)
@click.option("--calibration-n", default=500, type=click.IntRange(1), help="Problems on which settings are chosen.")
@click.option("--answer-tokens", default=256, type=click.IntRange(1), help="Kept for the answer, as the gateway does.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the file here too.")
@_endpoint.options
@click.pass_context
def main(
    ctx: click.Context,
    as_json: bool,
    price: str | None,
    name: str | None,
    runs: str,
    out: Path | None,
    **options: Any,
) -> None:
    """Choose a setting of one dial for every reasoning_effort, measure it, and write the calibration file.

    Give the settings to try with --alpha, --thinking-budget or --strategy. They are compared on the calibration split:
    those that another beats in both tokens and accuracy are dropped, and efforts are spread evenly in tokens over the
    rest. What was chosen is then measured on other problems (--split), and these figures are written. Every answer is
    made as the gateway makes it. Run the same command again to go on after an interruption.
    """
    from thrifty.serve import calibrate, effort

    money = _runs.prices(price)
    served = _endpoint.taken(options, options["adapter"])
    dial, texts = _dial(options)
    tried = calibrate.settings(dial, texts)
    config: dict[str, Any] = {"recipe": "calibrate", **options, **served}
    config |= {"adapter": str(options["adapter"]) if options["adapter"] else None, "dial": dial}
    config |= {key: list(options[key]) for key in ("alphas", "budgets", "strategies")}
    name = name or _runs.name_of("calibrate", config["model"], config["task"], dial, str(config["seed"]))
    folder = Path(runs) / name
    lab = _runs.lab(folder, config, as_json)
    with _runs.opened(ctx, folder, config) as finished:
        report, found, thought = _calibrated(lab, config, dial, tried)
        if money or not finished:
            _runs.publish(lab, config, report, money, gold=True)
        file = folder / "effort.json"
        for path in (file, out):
            if path is not None:
                effort.save(found, path)
        if as_json:
            click.echo(json.dumps(json.loads(file.read_text("utf-8")), indent=1, ensure_ascii=False))
            return
        from rich.console import Console

        title = f"{config['model']} · {config['task']} · {found.n} problems"
        Console().print(calibrate.table(found.levels, thought, dial, title))
        for note in report.notes:
            click.echo(note)
        click.echo(f"thrifty serve --calibration {out or file}")


# What answers here holds the model and its gateway, which do not travel to a cluster's workers.
main.params = [option for option in main.params if option.name != "ray"]


def _dial(options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The one dial that the options turn, and the settings to try; ThriftyError where they turn none, or two."""
    given = {
        "strength": ("--alpha", options["alphas"]),
        "thinking_token_budget": ("--thinking-budget", options["budgets"]),
        "strategy": ("--strategy", options["strategies"]),
    }
    turned = [dial for dial, (_, texts) in given.items() if texts]
    if len(turned) != 1:
        what = "no dial is turned" if not turned else f"{' and '.join(given[dial][0] for dial in turned)} are two dials"
        raise ThriftyError(
            f"{what}: give the settings to try of one, as --adapter FOLDER --alpha 0 --alpha 0.5 --alpha 1, "
            "--thinking-budget 16 --thinking-budget none, or --strategy none --strategy short-1@4"
        )
    if (turned[0] == "strength") != (options["adapter"] is not None):
        raise ThriftyError("--alpha and --adapter FOLDER belong together: it is the strength of that adapter")
    return turned[0], list(given[turned[0]][1])


def _calibrated(lab: Any, config: dict[str, Any], dial: Any, tried: list[Any]) -> tuple[Any, Any, dict[str, float]]:
    """A report on the settings measured, the calibration, and thinking tokens by name of effort."""
    from thrifty.lab import Report, Setting
    from thrifty.serve import calibrate
    from thrifty.serve.effort import Calibration

    backend = _backend(lab, config)
    made = [calibrate.AsServed(backend, dial, setting, lab.task.parse) for setting in tried]
    for one in made:
        one.check()
    names = [calibrate.name_of(dial, setting) for setting in tried]

    def solved(stage: str, index: int, problems: Any) -> Any:
        return lab.solve(_runs.name_of(stage, str(index), names[index]), made[index], problems, backend.engine)

    problems = lab.problems("calibration", config["calibration_n"])
    tell = lab.progress.say
    tell(f"{len(tried)} settings on {len(problems)} calibration problems, those chosen on {lab.n} of {lab.split}")
    compared = [calibrate.level(tried[i], solved("choose", i, problems)) for i in range(len(tried))]
    given = calibrate.spread(compared)
    notes = [
        f"dropped: {names[i]} ({one.accuracy * 100:.1f} %, {one.tokens:.1f} tokens on {len(problems)} calibration "
        "problems; another setting is at least as accurate for no more tokens)"
        for i, one in enumerate(compared)
        if i not in calibrate.kept(compared)
    ]
    notes += [
        f"not used: {names[i]} (no effort is nearest to its {compared[i].tokens:.1f} tokens)"
        for i in calibrate.kept(compared)
        if i not in given.values()
    ]
    others = lab.problems(lab.split, lab.n)
    outcomes = {i: solved("measure", i, others) for i in dict.fromkeys(given.values())}
    levels = {effort: calibrate.level(tried[i], outcomes[i]) for effort, i in given.items()}
    notes += calibrate.doubts(levels)
    n = sum(o.problem.gradable for o in outcomes[given["high"]])
    found = Calibration(config["model"], config["task"], n, dial, levels, between=calibrate.between(compared))
    settings = [Setting(names[i], run, tried[i] if dial == "strength" else None) for i, run in outcomes.items()]
    report = Report(settings, names[given["high"]], notes=[*lab.notes(others), *notes])
    thought = {effort: sum(o.usage.thought for o in outcomes[i]) / len(others) for effort, i in given.items()}
    return report, found, thought


def _backend(lab: Any, config: dict[str, Any]) -> Any:
    """What the gateway would answer with."""
    from thrifty.serve.backend import ADAPTER, Backend
    from thrifty.serve.keys import Limits

    limits = Limits(tokens=config["max_tokens"] or Limits.tokens)
    if config.get("base_url"):
        engine = _endpoint.engine(lab, config)
        chat = engine.text.chat if engine.text.tokenizer is not None else None
        return Backend(engine, limits, chat, None, config["answer_tokens"])
    engine = lab.engine()
    if config["adapter"]:
        engine.add_adapter(ADAPTER, config["adapter"])
    loaded = lab.loaded()
    return Backend(engine, limits, loaded.chat, loaded.context or limits.tokens, config["answer_tokens"])
