"""Our controls inside vLLM: how a request names them, and the step that vLLM's two processor interfaces share.

A request says what steers it in one text, JSON, under the name ``thrifty`` (``SamplingParams.extra_args`` offline,
``vllm_xargs`` over HTTP): only methods of the family ``decode.control``, by key and fields, so no code travels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thrifty import registry
from thrifty.contracts import Card, Control, Tail, ThriftyError

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)
ARGUMENT = "thrifty"
"""The name in ``extra_args`` and ``vllm_xargs``."""


@dataclass(frozen=True)
class Steering:
    """What a request asks of the processor."""

    controls: tuple[Control, ...]
    prefix: int = 0
    """How many tokens at the prompt's end are the response so far."""
    injected: int = 0
    """How many of those, at their end, this request put in."""
    halt: int | None = None
    """The token that ends a row which a control stops; None: end of sequence."""


def write(steering: Steering) -> str:
    """``steering`` as a request carries it. Raises ThriftyError for a control that is no method, or whose fields are no
    plain values.
    """
    named = [{"control": _key(control), **_fields(control)} for control in steering.controls]
    numbers = {"prefix": steering.prefix, "injected": steering.injected, "halt": steering.halt}
    return json.dumps({"controls": named} | {k: v for k, v in numbers.items() if v is not None})


def read(text: Any) -> Steering:
    """The reverse; ThriftyError with what is wrong in a text that a client wrote."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (TypeError, ValueError) as error:
        raise ThriftyError(f"{ARGUMENT}: no JSON text ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("controls"), list) or not value["controls"]:
        raise ThriftyError(f'{ARGUMENT}: give {{"controls": [{{"control": KEY, ...its fields}}]}}')
    if odd := sorted(set(value) - {"controls", "prefix", "injected", "halt"}):
        raise ThriftyError(f"{ARGUMENT}: unknown {', '.join(odd)}; there are controls, prefix, injected and halt")
    numbers = {name: value[name] for name in ("prefix", "injected", "halt") if value.get(name) is not None}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ThriftyError(f"{ARGUMENT}: {name} is {number!r}, give a whole number from 0")
    if numbers.get("injected", 0) > numbers.get("prefix", 0):
        raise ThriftyError(f"{ARGUMENT}: injected tokens are part of the prefix, so no more than it")
    return Steering(_made(json.dumps(value["controls"])), **numbers)


@dataclass(frozen=True, eq=False)
class _Moment:
    """What is known of a row when it has a certain number of tokens, before the next one is decided."""

    states: tuple[Any, ...]
    forced: tuple[int, ...] = ()
    ending: bool = False


@dataclass(eq=False)
class ControlledRow:
    """One request's controls. ``moments`` are kept by the response's length, so that a step that is run again (a piece
    of a chunked prefill, drafts that were rejected) starts where it did before.
    """

    steering: Steering
    tokenizer: Any
    end: int
    """The token that ends a sequence."""
    moments: dict[int, _Moment] = field(default_factory=dict)

    def at(self, length: int) -> _Moment:
        if length not in self.moments:  # the beginning; or resumed after a preemption, with what was known gone
            try:
                states = tuple(control.start(self.tokenizer) for control in self.steering.controls)
                self.moments[length] = _Moment(states)
            except Exception as error:
                # What is raised in vLLM's worker ends the server for everybody, so this request is ended instead.
                _LOG.error("a request is ended: its control cannot start: %s", error)
                self.moments[length] = _Moment((), ending=True)
        return self.moments[length]

    @property
    def halt(self) -> int:
        return self.end if self.steering.halt is None else self.steering.halt

    def forget(self, length: int) -> None:
        """Drop what is known of fewer tokens than ``length``."""
        self.moments = {n: moment for n, moment in self.moments.items() if n >= length}


def steer(rows: Sequence[ControlledRow], tails: Sequence[list[int]], index: Sequence[int], logits: Tensor) -> Tensor:
    """Let the rows' controls decide: ``logits`` ``[N, V]`` changed in place at ``index``, one row each.

    ``tails`` are the rows' own responses so far, prefix first. No row may be there twice.
    """
    groups: dict[int, tuple[Control, list[tuple[int, int]]]] = {}
    now = [row.at(len(tail)) for row, tail in zip(rows, tails)]
    states = [list(moment.states) for moment in now]
    forced = [list(moment.forced) for moment in now]
    ending = [moment.ending for moment in now]
    for i, row in enumerate(rows):
        for k, control in enumerate(row.steering.controls if not forced[i] and not ending[i] else ()):
            groups.setdefault(id(control), (control, []))[1].append((i, k))
    for control, members in groups.values():
        at = [index[i] for i, _ in members]
        seen = [Tail(tails[i], len(tails[i]) - rows[i].steering.prefix + rows[i].steering.injected) for i, _ in members]
        try:
            changed, tokens, stop, after = control.step(seen, logits[at], [states[i][k] for i, k in members])
            logits[at] = changed.to(logits.dtype)
        except Exception as error:
            _LOG.error("requests are ended: %s failed: %s", type(control).__name__, error)
            for i, _ in members:
                ending[i] = True
            continue
        for (i, k), put, ends, state in zip(members, tokens, stop, after, strict=True):
            states[i][k] = state
            forced[i].extend(put)
            ending[i] = ending[i] or ends
    for i, row in enumerate(rows):
        if forced[i] or ending[i]:
            token = forced[i].pop(0) if forced[i] else row.halt
            token = token if token < logits.shape[1] else row.end
            logits[index[i]] = -float("inf")
            logits[index[i], token] = 0.0
        row.moments[len(tails[i]) + 1] = _Moment(tuple(states[i]), tuple(forced[i]), ending[i])
    return logits


@functools.lru_cache(maxsize=256)
def _made(text: str) -> tuple[Control, ...]:
    """The controls of a JSON list; the same objects for the same text, so that rows are stepped together."""
    return tuple(_one(entry) for entry in json.loads(text))


def _one(entry: Any) -> Control:
    key = entry.get("control") if isinstance(entry, Mapping) else None
    if not isinstance(key, str):
        raise ThriftyError(f"{ARGUMENT}: {str(entry)[:80]} names no control")
    known = {name: m for name, m in registry.methods().items() if m.family == "decode.control"}
    if key not in known:
        near = registry.did_you_mean(key[:80], known)
        raise ThriftyError(f"{ARGUMENT}: no control {key[:80]!r}.{near} There are: {', '.join(known) or 'none'}")
    cls = registry.method_class(known[key])
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {name: value for name, value in entry.items() if name != "control"}
    if odd := [name for name in values if name not in fields]:
        raise ThriftyError(f"{ARGUMENT}: {key} has no field {odd[0][:80]!r}; it has: {', '.join(fields)}")
    for name, value in values.items():
        default = fields[name].default
        if default is not dataclasses.MISSING and default is not None and not _alike(value, default):
            raise ThriftyError(f"{ARGUMENT}: {key} takes {name} such as {default!r}, not {str(value)[:80]!r}")
    made: Control = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return made


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _key(control: Control) -> str:
    card = getattr(sys.modules.get(type(control).__module__), "CARD", None)
    if not isinstance(card, Card) or not dataclasses.is_dataclass(control):
        raise ThriftyError(
            f"vLLM runs controls that are methods (a file in methods/decode.control), which {type(control).__name__} "
            "is not: make it one, or use the local engine"
        )
    return card.key


def _fields(control: Any) -> dict[str, Any]:
    values = {f.name: getattr(control, f.name) for f in dataclasses.fields(control)}
    for name, value in values.items():
        items = value if isinstance(value, tuple) else (value,)
        if not all(item is None or isinstance(item, int | float | str) for item in items):
            raise ThriftyError(
                f"{type(control).__name__}.{name} is no plain value, so vLLM's workers cannot be told it"
            )
    return values
