"""Strategies by name: ``short-m-at-k``, ``self-consistency@5``, ``short-3@8``, ``truncation:budget=64``.

A strategy that votes needs answers that can be compared. Whether it reads answers is seen in its own code (an attribute
``answer`` of a trace, there or in a helper of its family); whether a request's answers can be compared is known where
its ``task`` names a parser, and else taken from the question: it asks for a marked answer, or it does not.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from thrifty import fields, registry, tasks
from thrifty.contracts import Prompt, ThriftyError
from thrifty.tasks import answers

PLAIN = ("none", "plain")
PARSERS: Mapping[str, bool | None] = {"auto": None, "math": None, "number": True, "gsm8k": True, "text": False}
"""Names of answer parsers, and whether answers are numbers (``answers.parse``)."""
MARKED = re.compile(
    r"\\f?boxed|<answer>|####|\bfinal answer\b|\banswer (?:is|with|only)\b|\banswer:|\bmultiple choice\b"
    r"|(?:^|\n)\s*\(?A[).:].*(?:\n|\s)\(?B[).:]",
    re.IGNORECASE,
)
"""A question that asks for an answer in a form that can be found and compared."""
Parser = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Choice:
    """A method as a request names it; ``method`` is its instance, None for the plain model."""

    key: str
    method: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    compares: bool = False

    @property
    def samples(self) -> int:
        """How many samples it says that it takes."""
        return max((v for name in fields.COUNTS if isinstance(v := getattr(self.method, name, None), int)), default=1)


@functools.cache
def found() -> Mapping[str, registry.Method]:
    """Every method that can answer a request: strategies, controls and decoders."""
    families = ("solve.search", "decode.control", "decode.accelerate")
    return {key: method for key, method in registry.methods().items() if method.family in families}


def names_one(text: str) -> bool:
    """Whether ``text`` begins with the name of a method, as ``choose`` reads it."""
    name = re.split("[:@]", text)[0]
    return name in found() or name in fields.ALIASES or name in PLAIN or re.match(fields.SHORT, text) is not None


def choose(text: str, settings: Mapping[str, Any] | None = None) -> Choice:
    """The method that ``text`` names, with fields of its own and of ``settings``; ThriftyError with what is wrong."""
    name, inside = fields.split(text)
    values: dict[str, Any] = {**inside, **(settings or {})}
    if name in PLAIN:
        return Choice("none")
    if name not in found():
        near = registry.did_you_mean(name[:80], [*found(), *fields.ALIASES])
        raise ThriftyError(f"no strategy {name[:80]!r}.{near} There are: {', '.join(found())}.")
    method = found()[name]
    cls = registry.method_class(method)
    typed = fields.typed(cls, values, name)
    for key, value in typed.items():
        if type(value) is int and value < 0:
            raise ThriftyError(f"{name}: {key} is {value}, which is negative: give 0 or more")
    return Choice(name, cls(**typed), typed, reads_answers(method.path))


@functools.cache
def reads_answers(path: Path) -> bool:
    """Whether a strategy's file, or a helper of its family that it imports, looks at the answers of traces."""
    tree = ast.parse(path.read_text("utf-8"))
    helpers = [
        node.module.rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.rpartition(".")[2].startswith("_")
    ]
    trees = [tree, *(ast.parse(p.read_text("utf-8")) for h in helpers if (p := path.with_name(f"{h}.py")).is_file())]
    parts = [part for one in trees for part in one.body if getattr(part, "name", "") != "claim"]
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "answer"
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "problem"))
        for part in parts
        for node in ast.walk(part)
    )


@functools.cache
def named(task: str) -> Parser:
    """The parser that ``task`` names: one of ``PARSERS``, or a task family of thrifty."""
    if task in PARSERS:
        return partial(answers.parse, numeric=PARSERS[task])
    if task in tasks.names():
        return tasks.load(task).parse
    known = [*PARSERS, *tasks.names()]
    raise ThriftyError(f"no task {task[:80]!r}.{registry.did_you_mean(task[:80], known)} There are: {', '.join(known)}")


def parser_for(task: str | None, default: Parser | None, prompt: Prompt) -> Parser | None:
    """How answers to ``prompt`` are read; None where it is prose, as far as one can tell."""
    if task is not None:
        return named(task)
    if default is not None:
        return default
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    return named("auto") if MARKED.search(text) else None
