"""Conformance: what every method of a family must keep to, checked on the method as it stands, never by its name.

``check_method`` makes the lines of ``thrifty check``. Checks work on embedded problems, a scripted engine and a tiny
random model, so one method takes seconds on one core. They ask whether a method *keeps its contract*, not whether it
is good.

A check is a function with the decorator ``check(families)`` that takes a ``Subject``. It raises ``Failed`` (or whatever
the method raises) where the method is wrong, and ``NotApplicable`` where the question does not arise.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty import registry
from thrifty.contracts import FAMILIES, ThriftyError

MODULES: dict[str, str] = {
    "solve.search": "search",
    "solve.verify": "solve",
    "solve.route": "solve",
    "solve.prompt": "solve",
    "traces.make": "traces",
    "traces.compress": "traces",
    "traces.select": "traces",
    "traces.perturb": "traces",
    "tune.reward": "reward",
    "tune.adapter": "adapter",
    "tune.sparse": "hook",
    "tune.objective": "objective",
    "weights.merge": "weights",
    "weights.codec": "weights",
    "weights.shrink": "weights",
    "decode.control": "decode",
    "decode.patch": "decode",
    "decode.accelerate": "decode",
    "measure.metric": "measure",
    "recipes": "measure",
}
"""Where the checks of a family stand; a family that is not here has the general ones only."""


SMALL = (("rank", 4), ("every", 2))
"""Settings, by the end of their name, that are lowered to this for a tiny model trained for a few steps."""


LIMIT = 120.0
"""Seconds for one check, of which the slowest takes a few on one core: a method that never returns is told."""


class Overtime(BaseException):
    """Above ``Exception``, so that a method that catches everything does not catch this."""


class Failed(Exception):  # noqa: N818 - a verdict about a method, not an error of ours
    """The method breaks its contract; the message says what was expected and what came."""


class NotApplicable(Exception):  # noqa: N818
    """The check says nothing about this method; the message says why."""


@dataclass(frozen=True)
class Result:
    """One line of the table. ``ok`` is None where the check does not apply."""

    check: str
    ok: bool | None
    why: str = ""


@dataclass(frozen=True)
class Subject:
    """What a check looks at: a class that can be made bare, its family, and what its card says it needs."""

    cls: type
    family: str
    needs: frozenset[str] = frozenset()
    method: registry.Method | None = None
    """The file it stands in; None for a bare class."""

    def make(self) -> Any:
        """A new instance with its default settings; in ``tune`` with sizes that fit a model of width 32."""
        made = self.cls()
        if not self.family.startswith("tune."):
            return made
        sizes = {spec.name: getattr(made, spec.name) for spec in dataclasses.fields(made)}
        return dataclasses.replace(
            made, **{n: min(v, most) for n, v in sizes.items() for end, most in SMALL if n.endswith(end) and v}
        )

    def has(self, verb: str) -> bool:
        return callable(getattr(self.cls, verb, None))


Check = Callable[[Subject], None]
CHECKS: dict[str, list[Check]] = {}
"""By family; "*" holds those of all families."""


@dataclass(frozen=True)
class Probe:
    """An ordinary call of a family's verb: ``inputs()`` are new but equal every time, ``run`` gives what came out."""

    inputs: Callable[[Subject], Any]
    run: Callable[[Subject, Any, Any], Any]
    """``run(subject, method, inputs)``"""


PROBES: dict[str, Probe] = {}


def check(*families: str) -> Callable[[Check], Check]:
    """Register a check; its name in the table is the function's, with blanks."""

    def register(function: Check) -> Check:
        for family in families:
            CHECKS.setdefault(family, []).append(function)
        return function

    return register


def checks(family: str) -> list[Check]:
    """The checks of a family, those that all families share first."""
    importlib.import_module("thrifty.conformance.verbs")  # first: see check_class
    importlib.import_module("thrifty.conformance.general")
    if family in MODULES:
        importlib.import_module(f"thrifty.conformance.{MODULES[family]}")
    return [*CHECKS["*"], *CHECKS.get(family, ())]


def name(function: Check) -> str:
    return function.__name__.replace("_", " ")


def check_method(method: registry.Method, begin: Callable[[str], None] = lambda check: None) -> Iterator[Result]:
    """Import a method and run every check of its family on it, one result at a time.

    ``begin`` is told the name of each before it is run: one that hangs outside Python cannot be stopped, but found.
    """
    begin("can be imported")
    try:
        with _limited():
            cls = registry.method_class(method)
    except (Exception, SystemExit, Overtime) as error:  # somebody's new file: they want to know whatever is wrong
        kind = "" if isinstance(error, ThriftyError) else f"{type(error).__name__}: "
        yield Result("can be imported", False, f"{kind}{error}")
        return
    yield Result("can be imported", True)
    needs = frozenset(map(str, method.card.needs))  # whether they are strings is asked by a check
    yield from check_class(Subject(cls, method.family, needs, method), begin)


def check_class(subject: Subject, begin: Callable[[str], None] = lambda check: None) -> Iterator[Result]:
    """Every check of the subject's family; without the family's verb, that one alone: all others would call it."""
    for at, function in enumerate(checks(subject.family)):
        begin(name(function))
        try:
            result = run_one(function, subject)
        except Overtime as error:  # it would cost every other check as long
            yield Result(name(function), False, f"{error}{_where(error, subject)}; no check after it was run")
            return
        yield result
        if at == 0 and result.ok is False:
            return


def run_one(function: Check, subject: Subject) -> Result:
    """A check that raises has failed, whatever it raised: a method must not break on what the checks give it.

    ``Overtime`` alone goes through.
    """
    try:
        with warnings.catch_warnings(), _limited():
            warnings.simplefilter("ignore")
            function(subject)
    except NotApplicable as reason:
        return Result(name(function), None, str(reason))
    except Failed as reason:
        return Result(name(function), False, str(reason))
    except (Exception, SystemExit) as error:
        return Result(name(function), False, f"{type(error).__name__}: {error}{_where(error, subject)}")
    return Result(name(function), True)


@contextmanager
def _limited() -> Iterator[None]:
    """End what runs in here after ``LIMIT`` seconds; only the main thread of a Unix process can."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise Overtime(f"did not end within {LIMIT:g} seconds")

    handler, timer = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _where(error: BaseException, subject: Subject) -> str:
    """The line of the method's own file that an error came through."""
    own = getattr(importlib.import_module(subject.cls.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f" (line {lines[-1]})" if lines else ""


def find(word: str) -> registry.Method:
    """The method with this key, or the one in this file.

    A file's family is the folder it stands in (``methods/solve.search/mine.py``, ``acme/solve/search/mine.py``).
    """
    path = Path(word)
    if not (path.suffix == ".py" or "/" in word):
        return registry.find(word)
    if not path.is_file():
        raise ThriftyError(f"There is no file {word}. Give a method's file or its key; `thrifty list` shows the keys.")
    path = path.resolve()
    for method in registry.methods().values():
        if method.path.resolve() == path:
            return method
    parents = path.parent.parts
    names = (".".join(parents[-depth:]) for depth in (1, 2))
    family = next((family for family in names if family in FAMILIES), None)
    if family is None:
        raise ThriftyError(
            f"{path} stands in no family's folder: put it into methods/FAMILY/, FAMILY one of: {', '.join(FAMILIES)}."
        )
    card = registry.read_card(path)
    if card is None:
        raise ThriftyError(f"{path} has no CARD: give it one, as in templates/{family}.py.")
    module = f"thrifty_methods.{family.replace('.', '_')}_{path.stem}"
    return registry.Method(card.key, family, card, path, module, package=False)


@functools.cache
def quiet() -> None:
    """One thread, and no progress bars of libraries: checks are small."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
