"""Run folders: an effective configuration, stages, and what is published at the end."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from thrifty.contracts import Outcome, ThriftyError
from thrifty.evidence import digest
from thrifty.files import write_json, write_text

if TYPE_CHECKING:
    from thrifty.lab import Lab, Report

LOCK = ".lock"
"""Held by the process that writes a run's folder; it names that process."""


def name_of(*parts: str) -> str:
    """A folder name from what a run is about.

    >>> name_of("cot-valve", "my/Model", "rg:chain_sum", "0")
    'cot-valve-my-Model-rg-chain_sum-0'
    """
    return re.sub(r"[^\w.=-]+", "-", "-".join(part for part in parts if part)).strip("-.")[:120]


def stage_of(label: str) -> str:
    """The folder name of a setting, one of its own where two labels differ in marks alone or late.

    >>> stage_of("single-pass"), stage_of("short-m-at-k:m=3,k=8")
    ('single-pass', 'short-m-at-k-m=3-k=8-6c7c8d62')
    """
    name = name_of(label)
    return name if name == label else f"{name}-{digest(label)[:8]}"


@contextmanager
def opened(ctx: click.Context, folder: Path, config: Mapping[str, Any]) -> Iterator[bool]:
    """Hold a run's folder, made or gone on in; says whether its run has finished already.

    Ctrl-C says how to go on and leaves with 130. Raises ThriftyError where the folder holds something else, a run with
    another configuration, or a run that another process is writing.
    """
    _check(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ThriftyError(f"cannot make the folder {folder}: {error.strerror}; choose another --runs") from error
    with _locked(folder):
        if not _begun(folder):
            write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        try:
            yield _finished(folder)
        except KeyboardInterrupt:
            told = f"thrifty: interrupted; what is done stands in {folder}. Run the same command to go on"
            click.echo(f"\n{told}", err=True)
            ctx.exit(130)


def _begun(folder: Path) -> bool:
    """Whether a run has left something here; who has its result may delete the stages."""
    return (folder / "stages").exists() or (folder / "result.json").exists()


def _finished(folder: Path) -> bool:
    """Whether nothing is left to do; problems that an engine failed are tried again."""
    path = folder / "result.json"
    if not path.exists():
        return False
    return not any(setting.get("failed") for setting in json.loads(path.read_text("utf-8"))["settings"])


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    path = folder / "config.yaml"
    if not (path.exists() and _begun(folder)):
        if folder.exists() and (
            not folder.is_dir() or any(entry.name not in ("config.yaml", LOCK) for entry in folder.iterdir())
        ):
            raise ThriftyError(f"{folder} exists and is no run of thrifty: choose another --name or --runs")
        return
    before, now = _flat(read_config(path)), _flat(config)
    changed = [
        f"{k} was {before.get(k, 'not there')}, is {now.get(k, 'not there')}"
        for k in {**before, **now}
        if before.get(k) != now.get(k)
    ]
    if changed:
        raise ThriftyError(
            f"{folder} holds a run with another configuration ({'; '.join(changed)}). "
            "Choose another --name, or remove the folder"
        )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with a recipe's fields beside the other options, as one gives them."""
    return {k: v for k, v in config.items() if k != "fields"} | config.get("fields", {})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing ``folder``: an advisory lock, which ends with this process however it ends."""
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise ThriftyError(
                f"another thrifty (process {who}) is writing {folder}: wait for it, stop it, or choose another --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def lab(folder: Path, config: Mapping[str, Any], quiet: bool, gold: bool = True) -> Lab:
    """The lab of a configuration, its model loaded (unless a server has it): a wrong name is told before any work."""
    from thrifty import tasks
    from thrifty.lab import Lab
    from thrifty.progress import Progress

    _check_device(config["device"])
    _hush()
    task = tasks.load(config["task"], question=config["question"], answer=config["answer"], gold=gold)
    keys = ("model", "n", "split", "seed", "batch_size", "max_tokens", "device", "dtype")
    made = Lab(folder=folder, task=task, progress=Progress(quiet), **{key: config[key] for key in keys})
    if not config.get("base_url"):
        made.loaded()
    return made


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        raise ThriftyError(f"--device is {name!r}; choose auto, cpu, cuda, or one GPU such as cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ThriftyError(
            f"--device is {name}, but torch {torch.__version__} finds {found} GPUs here: use --device auto"
        )


def _hush() -> None:
    """Keep back what libraries print that nobody can do anything about."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights", again for every model
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an earlier run, to run it again."""
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ThriftyError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ThriftyError(f"{path} is no YAML file: {error}") from error
    if not isinstance(config, dict) or "recipe" not in config:
        raise ThriftyError(f"{path} is no configuration of a run: it has no `recipe`")
    return config


def publish(lab: Lab, config: Mapping[str, Any], report: Report, price: tuple[float, float] | None, gold: bool) -> None:
    """Write traces.parquet and result.json from what a recipe or a measurement handed back."""
    from thrifty.measure import summarise
    from thrifty.traces import store

    grade = lab.task.grade if gold else None
    (lab.folder / "report.html").unlink(missing_ok=True)  # of other results
    rows = (r for s in report.settings for r in store.rows_from(s.outcomes, s.name, s.alpha, grade=grade, ids=True))
    store.write(lab.folder / "traces.parquet", rows)
    baseline = next(s for s in report.settings if s.name == report.baseline)
    result = {
        "recipe": config["recipe"],
        "model": config["model"],
        "task": config["task"],
        "n": len(baseline.outcomes),
        "seed": config["seed"],
        "settings": [
            summarise(s.outcomes, s.name, s.alpha, price, reference=None if gold else baseline.outcomes)
            | ({"profile": _profile(s.outcomes)} if gold else {})
            for s in report.settings
        ],
        "baseline": report.baseline,
        "notes": list(report.notes),
        "verdicts": [dict(v) for v in report.verdicts],
        "meter": _metered(lab),
    }
    if report.line:
        result["line"] = {"long": report.line[0], "short": report.line[1]}
    for key in ("margin", "best", "calibration"):
        if (value := getattr(report, key)) is not None:
            result[key] = value
    write_json(lab.folder / "result.json", result)


def _metered(lab: Lab) -> list[dict[str, Any]]:
    """The meter's rows; where nothing was left to do, those of the run that did it."""
    path = lab.folder / "result.json"
    if not lab.meter.rows() and path.exists():
        return list(json.loads(path.read_text("utf-8")).get("meter", []))
    return [
        {"phase": phase, "role": role, **dataclasses.asdict(count)} for (phase, role), count in lab.meter.rows().items()
    ]


def _profile(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """The overthinking profile of the chosen chains whose problems have an answer."""
    from thrifty.measure.profile import profile

    told = [(o.chosen, o) for o in outcomes if o.chosen is not None and o.problem.answer is not None]
    found = profile(
        [trace.thought for trace, _ in told],
        [str(o.problem.answer) for _, o in told],
        [o.grade.right for _, o in told],
        [trace.usage.thought for trace, _ in told],
    )
    return dataclasses.asdict(found)


def show(folder: Path, as_json: bool) -> None:
    """Print what a finished run found, and where its report is; write the report where it is missing."""
    from thrifty.report.run import load

    if not (folder / "report.html").exists():
        from thrifty.report.html import write_report

        try:
            write_report(folder)
        except ThriftyError as error:  # a light install draws no charts; the results stand all the same
            click.echo(f"no report.html: {error}", err=True)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from thrifty.report.table import table

    Console().print(table(result))
    run = load(folder)
    for sentence in (run.headline(), run.choice()):
        if sentence:
            click.echo(sentence)
    page = folder / "report.html"
    click.echo(f"report: {page}" if page.exists() else f"results: {folder / 'result.json'}")


def prices(text: str | None) -> tuple[float, float] | None:
    """``in,out``: money per million input and output tokens."""
    if text is None:
        return None
    try:
        given, made = (float(part) for part in text.split(","))
    except ValueError:
        remedy = "two numbers, money per million tokens in and out, such as 0.5,2"
        raise ThriftyError(f"--price takes {remedy}: not {text!r}") from None
    return given, made
