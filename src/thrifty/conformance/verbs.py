"""The first check of every method: does it have its family's verb, with the arguments that callers give it?"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Generator
from typing import Any

from thrifty import contracts, registry
from thrifty.conformance import Failed, NotApplicable, Subject, check, samples

CONTRACTS: dict[str, tuple[type, ...]] = {
    "solve.search": (contracts.Strategy,),
    "solve.verify": (contracts.Verifier,),
    "solve.route": (contracts.Router,),
    "solve.prompt": (contracts.Prompter,),
    "traces.make": (contracts.Maker,),
    "traces.compress": (contracts.Compressor,),
    "traces.select": (contracts.Selector,),
    "traces.perturb": (contracts.Perturber,),
    "tune.reward": (contracts.Reward, contracts.Credit),
    "tune.adapter": (contracts.Adapter,),
    "tune.sparse": (contracts.Hook,),
    "tune.objective": (contracts.Objective,),
    "weights.merge": (contracts.Merger,),
    "weights.codec": (contracts.Codec,),
    "weights.shrink": (contracts.Shrinker,),
    "decode.control": (contracts.Control,),
    "decode.patch": (contracts.Patch,),
    "decode.accelerate": (contracts.Decoder,),
    "measure.metric": (contracts.Metric,),
    "recipes": (contracts.Recipe,),
}
"""A family's contracts; a method keeps one of them at least."""

TALKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "solve": lambda: (samples.problems(1)[0], random.Random(0)),
    "rate": lambda: (samples.problems(1)[0], samples.traces(samples.problems(1)[0]), random.Random(0)),
    "route": lambda: (samples.problems(1)[0], ("long", "short"), random.Random(0)),
}
"""Verbs that are generators, and what they are called with."""


@check("*")
def has_the_verb_of_its_family(subject: Subject) -> None:
    if subject.family not in CONTRACTS:
        raise NotApplicable(f"{subject.family} has no contract yet")
    kept = CONTRACTS[subject.family]
    begun = [contract for contract in kept if any(subject.has(verb) for verb in verbs(contract))]
    faults = [fault for contract in begun or kept if (fault := lacks(subject.cls, contract))]
    if faults:
        others = [family for family, them in CONTRACTS.items() if any(not lacks(subject.cls, one) for one in them)]
        remedy = (
            f"what it has is the verb of {others[0]}: put the file into a folder of that name"
            if others and others[0] != subject.family
            else f"templates/{subject.family}.py shows how it is written"
        )
        raise Failed(f"{_place(subject)}: {faults[0]}; {remedy}")
    for verb in TALKS.keys() & {verb for contract in kept for verb in verbs(contract)}:
        _gives_a_talk(subject, verb)


def _place(subject: Subject) -> str:
    return f"{subject.method.path if subject.method else subject.cls.__module__} stands in {subject.family}"


def verbs(contract: type) -> dict[str, inspect.Signature]:
    """What a contract asks for, without ``self``."""
    found = {name: value for name, value in vars(contract).items() if inspect.isfunction(value) and name[0] != "_"}
    return {name: inspect.signature(value.__get__(object())) for name, value in found.items()}


def lacks(cls: type, contract: type) -> str:
    """What a class lacks of a contract; "" where nothing."""
    for name, wanted in verbs(contract).items():
        expected = f"expected {_shown(name, wanted)}, but {cls.__name__} has"
        if not callable(getattr(cls, name, None)):
            has = ", ".join(verb for verb in registry.VERBS if callable(getattr(cls, verb, None)))
            return f"{expected} no {name} (it has {has})"
        try:
            found = inspect.signature(getattr(object.__new__(cls), name))  # no constructor: that is another check's
        except ValueError:
            continue  # written in C, which does not say what it takes
        try:
            given = list(found.bind(*wanted.parameters).arguments)
        except TypeError as error:
            return f"{expected} {_shown(name, found)} ({error})"
        shared = [parameter for parameter in given if parameter in wanted.parameters]
        if shared != [parameter for parameter in wanted.parameters if parameter in shared]:
            return f"{expected} {_shown(name, found)}: arguments are given by their place"
    return ""


def _shown(name: str, signature: inspect.Signature) -> str:
    return f"{name}{signature}".replace("'", "")


def _gives_a_talk(subject: Subject, verb: str) -> None:
    """A verb need not be written as a generator, where it hands on another's: then it is called."""
    function = getattr(subject.cls, verb)
    if inspect.isgeneratorfunction(function):
        return
    method = subject.make()
    try:
        made = getattr(method, verb)(*TALKS[verb]())
    except Exception as error:
        made = error
    if isinstance(made, Generator):
        return
    what = f"raises {type(made).__name__}: {made}" if isinstance(made, Exception) else f"gives a {type(made).__name__}"
    del made  # what is awaited by nobody complains as it goes: here warnings are off
    raise Failed(
        f"{_place(subject)}: expected {verb} to be a generator, but {subject.cls.__name__}'s {what}; ask with "
        "[trace] = yield Sample(...), and begin with yield from () where there is nothing to ask"
    )
