"""``thrifty measure``: what strategies get right on a task, and what it costs."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from thrifty import fields
from thrifty.commands import _endpoint, _options, _runs
from thrifty.contracts import All, First, Problem, Sample, Talk, ThriftyError
from thrifty.engines import capabilities, spread
from thrifty.engines.relay import relayed
from thrifty.tasks import SPLITS


@click.command()
@_options.asking(SPLITS)
@click.option(
    "--strategy", "strategies", multiple=True, default=("single-pass",),
    help="Key of a solve.search method, with fields after a colon (short-m-at-k:m=1,k=5), or short-3@8, majority@8. "
    "May be repeated.",
)  # fmt: skip
@click.option(
    "--decoder",
    help="Key of a decode.accelerate method, with fields after a colon: every sample of every strategy is decoded "
    "with it. The same answers (in fp32, up to near-ties), and a note says in how many fewer forwards.",
)
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
    if options["decoder"] is not None:
        chosen = _drafted(options["decoder"], chosen, options["engine"])
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
    about = (config["model"], config["task"], *config["strategies"], config["decoder"] or "", str(config["seed"]))
    name = name or _runs.name_of("measure", *about)
    folder = Path(runs) / name
    lab = _runs.lab(folder, config, as_json, gold=not config["no_gold"])
    with _runs.opened(ctx, folder, config) as finished:
        if money or not finished:
            _runs.publish(lab, config, _measure(lab, config, chosen), money, gold=not config["no_gold"])
        _runs.show(folder, as_json)
        if not as_json:
            for note in _saved(lab, config["decoder"]):
                click.echo(note)


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
            run = lab.solve(_runs.stage_of(label), strategy, problems, engine, strengths, budget=config["budget"])
            settings.append(Setting(label, run, alpha))
    notes = [*_saved(lab, config["decoder"]), *lab.notes([] if config["no_gold"] else problems)]
    return Report(settings, settings[0].name, notes=notes)


@dataclass(frozen=True)
class Drafted:
    """``strategy`` with every sample decoded by ``decoder``; what it asks for is the same, path by path."""

    strategy: Any
    decoder: Any

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        return relayed(self.strategy.solve(problem, rng), self._ask)

    def _ask(self, request: Any) -> Talk:
        return (yield self._request(request))

    def _request(self, request: Any) -> Any:
        if isinstance(request, All | First):
            return replace(request, items=[self._request(item) for item in request.items])
        if not isinstance(request, Sample):
            return relayed(request, self._ask) if hasattr(request, "send") else request
        if asked := _refused(capabilities.used(request)):
            raise ThriftyError(_no_decoder(type(self.strategy).__name__, asked))
        return request if request.decoder is not None else replace(request, decoder=self.decoder)


def _drafted(text: str, chosen: list[tuple[str, Any]], engine: str) -> list[tuple[str, Any]]:
    """The strategies with the decoder that ``text`` names; ThriftyError where that cannot be, before any work."""
    key = fields.split(text)[0]
    decoder = fields.part("--decoder", text, "decode.accelerate", "decode")
    if engine != "local":
        raise ThriftyError(
            f"--decoder {key} runs the model's own forwards, and behind an endpoint there are none to run: leave out "
            "--engine, or measure the endpoint without --decoder (its server may draft by itself)"
        )
    for name, strategy in chosen:
        if asked := _refused({word for words in capabilities.needs(strategy).values() for word in words}):
            raise ThriftyError(_no_decoder(name, asked))
    return [(name, Drafted(strategy, decoder)) for name, strategy in chosen]


def _refused(asked: set[str]) -> str:
    """What of it a local engine does not give rows that bring a decoder."""
    return ", ".join(sorted(asked & {"controls", "logprobs", "entropies"}))


def _no_decoder(strategy: str, asked: str) -> str:
    return (
        f"--strategy {strategy} asks for {asked}, and a decoder takes no controls and hands back no log-probabilities: "
        "measure it without --decoder"
    )


def _saved(lab: Any, decoder: str | None) -> list[str]:
    """What the decoder saved, by the meter; where nothing was left to do, what the run that did it said."""
    if decoder is None:
        return []
    count, path = lab.meter.total(), lab.folder / "result.json"
    alone = count.positions - count.prefill - count.padding - count.drafted
    if alone > 0:
        share = f"{count.accepted / max(1, count.drafted):.0%} of {count.drafted:,} drafted tokens kept"
        rate = (count.thought + count.answer) / alone
        return [f"{decoder}: {rate:.2f} tokens per forward of a row (1 without it), {share}"]
    notes = json.loads(path.read_text("utf-8"))["notes"] if path.exists() else []
    return [note for note in notes if note.startswith(f"{decoder}: ")]


def _number(text: str) -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise ThriftyError(f"--alpha needs a number, not {text!r}")
