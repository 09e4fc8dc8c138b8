"""Problems with exact checkers: ``load("roll")``, ``load("rg:chain_sum")``, ``load("hf:openai/gsm8k")``, a file.

Importing this package is cheap: torch, datasets and reasoning-gym are imported when a task needs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.contracts import Task, ThriftyError
from thrifty.tasks.spec import EMBEDDED, SPLITS, Spec, as_dataset, did_you_mean, parse_spec

if TYPE_CHECKING:
    from thrifty.contracts import Split

__all__ = ["SPLITS", "as_dataset", "load", "names"]

_SEPARATOR = re.compile(rf"\s*[,+]\s*(?=(?:rg|hf|file):|(?:{'|'.join(EMBEDDED)})(?:-b)?(?:\s*[,+]|\s*$))")


def names() -> list[str]:
    """The task families that ship with the package."""
    return list(EMBEDDED)


def load(
    spec: str,
    *,
    n: int | None = None,
    question: str | None = None,
    answer: str | None = None,
    split: str | None = None,
    config: Mapping[str, Any] | None = None,
    gold: bool = True,
) -> Task:
    """The task that ``spec`` names.

    ``roll`` (an embedded family) · ``rg:NAME?key=value&...`` (a reasoning-gym data set with settings) ·
    ``hf:DATASET[:CONFIG]`` (a Hugging Face data set, or ``hf:./FOLDER``) · ``file:PATH`` (JSONL, JSON, CSV, Parquet);
    several joined by ``+`` or ``,`` are a mixture. For files and data sets ``question`` and ``answer`` name the
    columns and ``split`` puts every row into one split; all three can stand in the spec too
    (``file:log.jsonl?question=q&split=test``). ``config`` adds settings to ``rg:``. ``gold=False`` needs no
    answers: problems then have ``answer=None``. ``n`` is the most problems a call of ``problems`` returns.

    Raises ``ThriftyError`` that names the file, row, column or key, and the remedy.
    """
    parts = _SEPARATOR.split(spec.strip())
    if len(parts) > 1:
        from thrifty.tasks.mixture import Mixture

        tasks = [load(p, question=question, answer=answer, split=split, config=config, gold=gold) for p in parts]
        task: Task = Mixture("+".join(t.name for t in tasks), tasks)
    else:
        task = _load_one(parse_spec(spec), question, answer, split, dict(config or {}), gold)
    if n is not None:
        if n < 1:
            raise ThriftyError(f"{n} problems were asked for; ask for 1 or more.")
        from thrifty.tasks.mixture import Limited

        task = Limited(task, n)
    return task


def _load_one(
    spec: Spec, question: str | None, answer: str | None, split: str | None, config: dict[str, Any], gold: bool
) -> Task:
    if spec.kind == "embedded":
        if spec.name.removesuffix("-b") not in EMBEDDED:
            raise ThriftyError(_unknown(spec.name))
        from thrifty.tasks import embedded

        return embedded.task(spec.name)
    if spec.kind == "rg":
        from thrifty.tasks.gym import GymTask, typed

        return GymTask(spec.text, spec.name, {**{key: typed(value) for key, value in spec.options.items()}, **config})
    literal = spec.text.partition(":")[2]
    options = dict(spec.options)
    if "?" in literal and Path(literal).exists():
        spec, options = Spec(spec.text, spec.kind, literal), {}
    for key in options:
        if key not in ("question", "answer", "split"):
            raise ThriftyError(
                f"{spec.text} has no option {key!r}. {did_you_mean(key, ('question', 'answer', 'split'))}"
                "Options are question=COLUMN, answer=COLUMN and split=NAME."
            )
    question, answer = options.get("question", question), options.get("answer", answer)
    split = options.get("split", split)
    if spec.kind == "hf":
        from thrifty.tasks.hub import hub_task

        return hub_task(spec.text, spec.name, question=question, answer=answer, split=split, gold=gold)
    from thrifty.tasks.files import file_task
    from thrifty.tasks.spec import check_split

    declared: Split | None = None if split is None else SPLITS[check_split(split)]
    path = Path(spec.name).expanduser()
    return file_task(spec.text, path, question=question, answer=answer, split=declared, gold=gold)


def _unknown(name: str) -> str:
    if Path(name).exists():
        return f"unknown task {name!r}: to read a file write file:{name}"
    if name.count("/") == 1:
        return f"unknown task {name!r}: for a data set of the hub write hf:{name}"
    return (
        f"unknown task {name!r}. {did_you_mean(name, EMBEDDED)}There are {', '.join(EMBEDDED)}, and "
        f"rg:NAME (reasoning-gym, for example rg:chain_sum), hf:DATASET[:CONFIG], file:PATH."
    )
