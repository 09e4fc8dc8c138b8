"""``thrifty show KEY``: everything known about one method or paper."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

import click

from thrifty import registry
from thrifty.papers import papers

_LAB = (
    "from pathlib import Path",
    "from thrifty import registry, tasks",
    "from thrifty.lab import Lab",
)
_FIELDS = "# fields go behind a colon: KEY:NAME=VALUE,NAME=VALUE"
_MODEL = "--model DIR --task TASK"
PYTHON = ("from thrifty import registry", 'method = registry.load("KEY")()')
USAGE: dict[str, tuple[str, ...]] = {
    "recipes": (
        f"thrifty run KEY {_MODEL}",
        "# --plan first: what it will cost; every field is an option: --NAME VALUE",
    ),
    "solve.search": (f"thrifty measure {_MODEL} --strategy KEY", _FIELDS),
    "solve.verify": (f"thrifty measure {_MODEL} --strategy best-of-n:verifier=KEY",),
    "decode.accelerate": (f"thrifty measure {_MODEL} --decoder KEY", _FIELDS),
    "tune.reward": (f"thrifty run grpo {_MODEL} --reward KEY", _FIELDS),
    "tune.adapter": (f"thrifty run sft {_MODEL} --adapter KEY", _FIELDS),
    "tune.sparse": (f"thrifty run sft {_MODEL} --hook KEY", _FIELDS),
    "tune.objective, chains": (f"thrifty run sft {_MODEL} --objective KEY", _FIELDS),
    "tune.objective, right and wrong chains": (
        f"thrifty run sft {_MODEL} --objective KEY --chains-from own --samples 4",
        _FIELDS,
    ),
    "tune.objective, sampled answers": (f"thrifty run grpo {_MODEL} --objective KEY", _FIELDS),
    "tune.objective, pairs": (
        *_LAB,
        "from thrifty.contracts import Chain",
        "from thrifty.tune.adapter import lora",
        "from thrifty.tune.batches import pairs",
        "from thrifty.tune.supervised import Train, train",
        'lab = Lab(Path("runs/KEY"), "DIR", tasks.load("TASK"))',
        "# of a task whose problems come with chains:",
        'rejected = [Chain(p, p.meta["chain"], p.answer) for p in lab.problems("train", 1000)]',
        'chosen = registry.load("key-steps")().compress(rejected, lab.context())',
        "model, chat = lora(lab.loaded().model), lab.loaded().chat",
        'train(model, pairs(chosen, rejected, chat), Train(steps=100, lr=1e-5), lab.folder, registry.load("KEY")())',
        "# then: thrifty measure --model DIR --task TASK --adapter runs/KEY/adapter",
    ),
    "traces.select": (f"thrifty run sft {_MODEL} --selector KEY",),
    "traces.compress": (f"thrifty run c3ot {_MODEL} --compressor KEY",),
    "weights.codec": (
        "thrifty adapter compress ADAPTER --codec KEY --out FILE",
        "thrifty adapter expand FILE --out FOLDER",
        "# ADAPTER is the folder of a LoRA; --seed or --initial say what it began as, and make FILE smaller",
    ),
    "weights.merge": (
        "from thrifty import registry",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'models = [AutoModelForCausalLM.from_pretrained(name) for name in ("DIR", "OTHER")]',
        'models[0].load_state_dict(registry.load("KEY")().merge([model.state_dict() for model in models]))',
        'for part in (models[0], AutoTokenizer.from_pretrained("DIR")):',
        '    part.save_pretrained("merged")',
        "# then: thrifty measure --model merged --task TASK",
    ),
    "measure.metric": (
        *_LAB,
        "from thrifty.solve.search.single_pass import SinglePass",
        'lab = Lab(Path("runs/KEY"), "DIR", tasks.load("TASK"))',
        'outcomes = lab.solve("single-pass", SinglePass(), lab.problems("test", 100))',
        'print(registry.load("KEY")().measure(outcomes))',
    ),
}
"""By family: commands, or a script. DIR is the user's model, TASK their task, KEY the method's key."""


@click.command()
@click.argument("key")
def main(key: str) -> None:
    """Show a method: its paper, what it does, where its code stands, its fields, how to run it."""
    entry = registry.get(key)
    paper = f"arXiv {entry.arxiv}" if entry.arxiv else "no arXiv number"
    facts = {
        "title": entry.title,
        "paper": f"{paper}, {entry.year}" if entry.year else "none",
        "family": entry.family,
        "saves": ", ".join(entry.saves) or "-",
        "priority": str(entry.priority or "-"),
        "status": entry.status,
    }
    if (found_paper := papers().get(key)) and found_paper.headline:
        facts["reports"] = found_paper.headline
    method = None if entry.where is None else registry.find(key)
    if method is not None:
        facts["code"] = _short(method.path)
        if method.family != entry.family:
            facts["code"] += f" (family {method.family})"
        facts["needs"] = ", ".join(method.card.needs) or "-"
        found = registry.standing(entry)
        facts["status"] += f" ({', '.join(word for word in (found.scale, found.why) if word)})" if found.why else ""
    click.secho(key, bold=True)
    for name, value in facts.items():
        click.echo(f"  {name:9} {value}")
    if method is None:
        click.echo("\nNobody has built it yet. CONTRIBUTING.md says how to add it: one file, no registration.")
        return
    if docstring := ast.get_docstring(ast.parse(method.path.read_text("utf-8"))):
        click.echo(f"\n{docstring}")
    _fields(method)
    click.secho("\nrun it", bold=True)
    for line in _usage(method):
        click.echo(f"  {line}")


def _fields(method: registry.Method) -> None:
    """Name, type, default and help of the method's hyperparameters. This imports the method, torch and all."""
    click.secho("\nfields", bold=True)
    try:
        cls = registry.method_class(method)
    except Exception as error:  # somebody's new file: whatever is wrong with it, the card can still be shown
        click.echo(f"  unknown, since the code cannot be used: {type(error).__name__}: {error}")
        return
    for spec in dataclasses.fields(cls):
        kind = spec.type if isinstance(spec.type, str) else inspect.formatannotation(spec.type)
        click.echo(f"  {spec.name}: {kind}{_default(spec)}")
        if spec.metadata.get("help"):
            click.echo(f"      {spec.metadata['help']}")
    if not dataclasses.fields(cls):
        click.echo("  none")


def _default(spec: dataclasses.Field[Any]) -> str:
    if spec.default is not dataclasses.MISSING:
        return f" = {_plain(spec.default)}"
    if spec.default_factory is not dataclasses.MISSING:
        return f" = {_plain(spec.default_factory())}"
    return " (required)"


def _plain(value: Any) -> str:
    """Its representation, without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _usage(method: registry.Method) -> list[str]:
    """How to use a method on one's own model (DIR) and task (TASK): commands, or Python where no command takes it."""
    family = method.family
    try:
        cls: Any = registry.method_class(method)
    except Exception:  # told under "fields"
        cls = None
    if family == "tune.objective" and cls is not None:
        family = f"{family}, {_trained_on(cls)}"
    lines = list(USAGE.get(family, PYTHON))
    if callable(getattr(cls, "rate", None)) and family != "solve.verify":
        lines = [*USAGE["solve.verify"], *lines]
    return [line.replace("KEY", method.key) for line in lines]


def _trained_on(cls: Any) -> str:
    """What an objective takes, by what it declares."""
    from thrifty.tune.answers import takes_samples

    if getattr(cls, "pairs", False):
        return "pairs"
    if hasattr(cls, "examples"):
        return "right and wrong chains"
    return "sampled answers" if takes_samples(cls()) else "chains"


def _short(path: Path) -> str:
    """Relative to the current directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
