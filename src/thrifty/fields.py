"""Methods from words: fields as options (``--train-n 200 --alphas 0,.5,1``), or ``KEY:train_n=200,margin=.05``.

How many samples a strategy takes may stand behind ``@``: ``self-consistency@5``, ``majority@5``, ``short-3@8``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thrifty import registry
from thrifty.contracts import ThriftyError

SHORT = r"short-(\d{1,4})@(\d{1,4})"
"""The paper's way to write m and k of short-m@k."""
ALIASES = {"majority": "self-consistency"}
RANGES = {
    "temperature": (0.0, math.inf, "0 or more"),
    "top_p": (1e-9, 1.0, "more than 0 and at most 1"),
}
"""What fields of these names, which mean the same everywhere, may be: least, most, and in words."""
COUNTS = ("k", "n", "samples", "width")
"""Fields that say how many samples a strategy takes."""


def from_arguments(cls: type, arguments: Sequence[str]) -> dict[str, Any]:
    """Values for the fields of ``cls`` from leftover command-line words; a clear error for any other word."""
    pairs: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ThriftyError(f"what is {word!r}? Options are --NAME VALUE; `thrifty show` lists a method's fields")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ThriftyError(f"{word} needs a value")
            value = words.pop(0)
        pairs[name.replace("-", "_")] = value
    return typed(cls, pairs)


def split(text: str) -> tuple[str, dict[str, str]]:
    """Key and fields of ``KEY:NAME=VALUE,NAME=VALUE`` or ``KEY@N``, where a value may have commas of its own.

    >>> split("trimr:markers=wait,so,most=200")
    ('trimr', {'markers': 'wait,so', 'most': '200'})
    >>> split("short-3@8:temperature=1")
    ('short-m-at-k', {'m': '3', 'k': '8', 'temperature': '1'})
    """
    key, _, inside = text.partition(":")
    pairs: dict[str, str] = {}
    for part in inside.split(",") if inside else ():
        name, equals, value = part.partition("=")
        if equals:
            pairs[name.strip().replace("-", "_")] = value
        elif pairs:
            pairs[next(reversed(pairs))] += f",{part}"
        else:
            raise ThriftyError(f"{key}: {part[:80]!r} is no setting; write {key}:field=value,field=value")
    if match := re.fullmatch(SHORT, key):
        return "short-m-at-k", {"m": match[1], "k": match[2], **pairs}
    name, at, count = key.partition("@")
    name = ALIASES.get(name, name)
    if at and name in registry.methods():
        pairs = {_samples(name, count): count, **pairs}
    return name, pairs


def _samples(key: str, count: str) -> str:
    """The field of a strategy that says how many samples it takes."""
    names = [f.name for f in dataclasses.fields(registry.method_class(registry.find(key)))]
    name = next((name for name in COUNTS if name in names), None)
    if name is None or not count.isdigit() or len(count) > 9:
        raise ThriftyError(f"{key}@{count[:20]}: the number of samples goes behind @, where a strategy has one")
    return name


def made(text: str, verb: str) -> Any:
    """The method of ``KEY:NAME=VALUE,NAME=VALUE``; ThriftyError unless it has this verb of the contracts."""
    key, pairs = split(text)
    method = registry.find(key)
    cls = registry.load(key)
    if not hasattr(cls, verb):
        raise ThriftyError(
            f"{key} is of family {method.family} and has no {verb}(): `thrifty show {key}` tells what it is for"
        )
    return cls(**typed(cls, pairs, key))


def part(option: str, text: str, family: str, verb: str) -> Any:
    """As ``made``, the method of ``family`` that ``option`` is given; ThriftyError for one of another family."""
    if split(text)[0] not in registry.methods() and Path(text).is_dir():
        raise ThriftyError(f"{option} {text} is a folder: give the key of a method of family {family}")
    found = registry.find(split(text)[0])
    if found.family != family:
        keys = ", ".join(sorted(m.key for m in registry.methods().values() if m.family == family))
        raise ThriftyError(
            f"{option} is {found.key}, of family {found.family}: give one of {family} ({keys}); `thrifty show "
            f"{found.key}` tells what it is for"
        )
    return made(text, verb)


def typed(cls: type, values: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """``values`` converted to the types of the fields of ``cls``; raises ThriftyError with what it takes.

    ``key`` is the method's where the fields stand behind it; else they are options.
    """

    def told(name: str) -> str:
        return f"{key}:{name}" if key else "--" + name.replace("_", "-")

    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    out = {}
    for name, value in values.items():
        if name not in names:
            near = registry.did_you_mean(name, names)
            takes = ", ".join(map(told, names)) or "none"
            raise ThriftyError(f"{key or cls.__name__} has no field {name!r}.{near} It takes: {takes}")
        out[name] = _convert(hints[name], told(name), value)
        least, most, what = RANGES.get(name, (-math.inf, math.inf, ""))
        if isinstance(out[name], float) and not least <= out[name] <= most:
            raise ThriftyError(f"{told(name)} is {out[name]:g}: give {what}")
    return out


def _convert(kind: Any, option: str, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        return _convert(next(a for a in arguments if a is not type(None)), option, value)
    if origin is typing.Literal:
        if value not in arguments:
            raise ThriftyError(f"{option} is {value!r}; choose {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_convert(arguments[0], option, item) for item in items)
    if kind is bool:
        if str(value).lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ThriftyError(f"{option} is {value!r}; give true or false")
        return str(value).lower() in ("true", "yes", "1")
    if getattr(kind, "_is_protocol", False):  # another method, as a part of this one
        return made(value, next(name for name in registry.VERBS if hasattr(kind, name)))
    if kind in (int, float, str):
        what = {int: "a whole number", float: "a number"}.get(kind, "text")
        try:
            found = kind(value)
        except (TypeError, ValueError):
            raise ThriftyError(f"{option} needs {what}, not {value!r}") from None
        if kind is float and not math.isfinite(found):
            raise ThriftyError(f"{option} needs {what}, not {value!r}")
        return found
    raise ThriftyError(f"{option} cannot be given on the command line ({kind}); use Python")
