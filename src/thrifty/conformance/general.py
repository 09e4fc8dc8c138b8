"""Checks of every method: its card, its fields, its file, and that the same call gives the same result."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import random
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

import numpy as np

from thrifty.conformance import PROBES, Failed, NotApplicable, Subject, check
from thrifty.conformance.samples import plain
from thrifty.contracts import Card
from thrifty.evidence import fits

HEAVY = {"torch", "transformers", "peft", "accelerate", "trl", "datasets", "vllm"}
"""Libraries that take a second or more to import."""
ON_WEIGHTS = ("tune.adapter", "tune.sparse", "tune.objective", "tune.latent", "weights.", "decode.", "recipes")
"""Families whose methods work on weights and tensors."""


@check("*")
def is_a_frozen_dataclass(subject: Subject) -> None:
    if not dataclasses.is_dataclass(subject.cls):
        raise Failed(f"{subject.cls.__name__} is no dataclass: put @dataclass(frozen=True) above it")
    if not subject.cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise Failed(f"{subject.cls.__name__} is not frozen: write @dataclass(frozen=True)")


@check("*")
def fields_have_a_default_and_a_help_text(subject: Subject) -> None:
    for spec in dataclasses.fields(subject.cls):
        if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise Failed(f"field {spec.name} has no default: give it the paper's")
        if not spec.metadata.get("help"):
            raise Failed(f'field {spec.name} has no help text: field(default=..., metadata={{"help": ...}})')


@check("*")
def its_constructor_only_stores(subject: Subject) -> None:
    cls: Any = subject.cls
    own = ["__post_init__"] if hasattr(cls, "__post_init__") else []
    own += ["__new__"] if cls.__new__ is not object.__new__ else []
    code = getattr(cls.__init__, "__code__", None)
    if code is None or code.co_filename != "<string>":  # what dataclasses generate stands in no file
        own.append("__init__")
    if own:
        raise Failed(f"{', '.join(own)} does more than store: leave it to the dataclass, move the work into the verb")
    made = subject.cls()
    for spec in dataclasses.fields(made):
        if spec.default is not dataclasses.MISSING and getattr(made, spec.name) is not spec.default:
            raise Failed(f"field {spec.name} is {getattr(made, spec.name)!r} after the default {spec.default!r}")
    if dataclasses.replace(made) != made:
        raise Failed("a copy with the same settings is not equal to it")


@check("*")
def its_settings_survive_json(subject: Subject) -> None:
    made = subject.cls()
    settings = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if not _memory(f)}
    written = json.dumps({name: _jsonable(name, value) for name, value in settings.items()})
    again = subject.cls(**{name: _back(value, settings[name]) for name, value in json.loads(written).items()})
    for name, value in settings.items():
        if getattr(again, name) != value:
            raise Failed(f"{name} = {value!r} comes back from JSON as {getattr(again, name)!r}")


def _memory(spec: dataclasses.Field[Any]) -> bool:
    """Whether a field holds what a method has seen, made anew for every instance; that is no setting."""
    if not spec.compare or spec.default_factory is dataclasses.MISSING:
        return not spec.compare
    made = spec.default_factory()
    return not dataclasses.is_dataclass(made) and type(made).__module__ != "builtins"


def _jsonable(name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a method in a field
        return {f.name: _jsonable(f"{name}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)}
    if inspect.isfunction(value) or inspect.isbuiltin(value) or inspect.isclass(value):
        if "<" in value.__qualname__:
            raise Failed(f"field {name} is {value.__qualname__}, which has no name to write down: define it at the top")
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, tuple):
        return [_jsonable(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise Failed(f"field {name} is a {type(value).__name__}, which JSON cannot hold: use numbers, strings, tuples")


def _back(value: Any, like: Any) -> Any:
    if isinstance(like, tuple) and isinstance(value, list):
        return tuple(_back(item, old) for item, old in zip(value, like))
    return value if like is None or isinstance(like, bool | int | float | str) else like


# ---------------------------------------------------------------------------------------------------- the file


@check("*")
def its_card_matches_its_file(subject: Subject) -> None:
    method = _file(subject)
    if method.card.key != method.path.stem.replace("_", "-"):
        raise Failed(f"the card says {method.card.key!r}, the file's name {method.path.stem.replace('_', '-')!r}")
    found = getattr(sys.modules[subject.cls.__module__], "CARD", None)
    if found != method.card:
        raise Failed("CARD is changed after it was written down: it is read, not run")


@check("*")
def the_fields_of_its_card_have_their_types(subject: Subject) -> None:
    card, kinds = _file(subject).card, typing.get_type_hints(Card)
    for spec in dataclasses.fields(Card):
        value = getattr(card, spec.name)
        if not fits(value, kinds[spec.name]):
            raise Failed(f"CARD's {spec.name} is {value!r}: it must be {spec.type}")


@check("*")
def its_docstring_says_what_it_does_and_whose_it_is(subject: Subject) -> None:
    method = _file(subject)
    text = ast.get_docstring(ast.parse(method.path.read_text("utf-8"))) or ""
    if len(text.partition("\n")[0]) <= 20:
        raise Failed("the first line of the file's docstring says what the method saves, and how")
    missing = [part for part in ("Paper:", "Differs:") if not re.search(rf"^{part} *\S", text, re.MULTILINE)]
    if missing and not method.card.baseline:
        raise Failed(f"the file's docstring has no {' and no '.join(missing)} (say none, or nothing)")


@check("*")
def its_examples_are_right(subject: Subject) -> None:
    method = _file(subject)
    out: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(importlib.import_module(subject.cls.__module__)):
        runner.run(test, out=out.append)
    if runner.failures:
        raise Failed(" ".join("".join(out).split())[:400])
    if not runner.tries and not method.card.baseline and method.family != "recipes":
        raise Failed("the docstring has no example with a value worked out by hand")


@check("*")
def it_is_imported_without_torch(subject: Subject) -> None:
    method = _file(subject)
    if subject.family.startswith(ON_WEIGHTS):
        raise NotApplicable(f"{subject.family} works on tensors")
    for node in ast.parse(method.path.read_text("utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if heavy := HEAVY.intersection(name.split(".")[0] for name in names):
            raise Failed(f"line {node.lineno} imports {', '.join(heavy)}: import it inside the function that uses it")


def _file(subject: Subject) -> Any:
    if subject.method is None:
        raise NotApplicable("a bare class, no file")
    return subject.method


# ------------------------------------------------------------------------------------------------ an ordinary call


@check("*")
def gives_the_same_result_every_time(subject: Subject) -> None:
    probe, method = _probe(subject), subject.make()
    results = []
    for seed, one in enumerate((method, method, subject.make())):
        _disturb(seed)
        results.append(plain(probe.run(subject, one, probe.inputs(subject))))
    if results[0] != results[1]:
        raise Failed(
            "called twice with the same it gave two results, or asked two things: "
            "draw from the rng it is given, keep no state"
        )
    if results[0] != results[2]:
        raise Failed("two instances with the same settings gave two results, or asked two things")


@check("*")
def leaves_its_inputs_alone(subject: Subject) -> None:
    probe = _probe(subject)
    inputs = probe.inputs(subject)
    probe.run(subject, subject.make(), inputs)
    before, after = plain(probe.inputs(subject)), plain(inputs)
    if before != after:
        raise Failed("what it was given is not what it was before the call: copy before changing")


def _probe(subject: Subject) -> Any:
    if subject.family not in PROBES:
        raise NotApplicable(f"no ordinary call of {subject.family} is known")
    return PROBES[subject.family]


def _disturb(seed: int) -> None:
    """Set the global random streams, which a method must not draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch: Any = sys.modules.get("torch")
    seeds: Callable[[int], Any] | None = getattr(torch, "manual_seed", None)
    if seeds is not None:
        seeds(seed)
