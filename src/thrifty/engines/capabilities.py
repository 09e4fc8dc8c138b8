"""What engines can do, and what a method or a request cannot do without. Imports no engine: the table is read first."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from thrifty.contracts import Card, Engine, Finish, Hidden, Sample, Score, ThriftyError

CAPABILITIES: dict[str, frozenset[str]] = {
    "local": frozenset(
        {"prefix", "logprobs", "entropies", "adapters", "controls", "patches", "decoder", "cancel", "score", "hidden"}
        | {"seed"}
    ),
    "scripted": frozenset({"prefix", "cancel", "score", "seed"}),
    "openai": frozenset({"prefix", "logprobs", "cancel", "score", "seed"}),
    "vllm": frozenset({"prefix", "logprobs", "adapters", "controls", "cancel", "score", "seed"}),
}
"""By engine, at most: an endpoint is probed, and its engine's ``missing`` says what the server lacks. A name means:
``prefix`` continue a response by its token ids, ``cancel`` really stop a row, ``seed`` the same tokens for one key;
the others are fields and requests of ``contracts``."""


def needs(method: Any) -> dict[str, tuple[str, ...]]:
    """``Card.needs`` by key, of ``method`` and of the methods in its fields."""
    return {card.key: card.needs for card in _cards(method) if card.needs}


def _cards(method: Any) -> Iterator[Card]:
    card = getattr(sys.modules.get(type(method).__module__), "CARD", None)
    if isinstance(card, Card):
        yield card
    if dataclasses.is_dataclass(method):
        for field in dataclasses.fields(method):
            yield from _cards(getattr(method, field.name))


def used(request: Any) -> set[str]:
    """What a request asks of an engine."""
    if isinstance(request, Score):
        found = {"score"}
    elif isinstance(request, Hidden):
        found = {"hidden"}
    elif isinstance(request, Sample):
        found = {name for name in ("controls", "patches") if getattr(request, name)} | set(request.want)
        found |= {"decoder"} if request.decoder is not None else set()
        found |= {"prefix"} if request.inject else set()
    else:
        return set()
    found |= {"prefix"} if len(request.prefix) else set()
    return found | ({"adapters"} if any(request.adapters.values()) else set())


def check(method: Any, engine: Engine) -> None:
    """Raise ThriftyError, before any work, where ``engine`` lacks what ``method`` needs by its card."""
    for key, names in needs(method).items():
        refuse(f"{key} needs", set(names), engine)


def check_request(request: Any, engine: Engine) -> None:
    """Raise ThriftyError where ``engine`` would ignore a part of ``request``: engines need not look."""
    refuse(f"a {type(request).__name__} asks for", used(request), engine)


def check_row(request: Sample, temperature: float, top_p: float) -> tuple[float, float]:
    """Temperature and top-p of a row, where it names none those given. ThriftyError for a row that no engine takes."""
    if request.n != 1 or request.first is not None:
        raise ThriftyError("an engine takes one row at a time: n and first are the runner's")
    if "" in request.until:
        raise ThriftyError("an empty stop string in until would end every row at once: leave it out")
    temperature = temperature if request.temperature is None else request.temperature
    top_p = top_p if request.top_p is None else request.top_p
    if temperature < 0 or not 0 < top_p <= 1:
        raise ThriftyError(f"temperature {temperature} and top_p {top_p}: need >= 0 and in (0, 1]")
    return temperature, top_p


def caps(request: Sample, limit: int | None, injected: int) -> list[tuple[int, Finish]]:
    """New tokens that a row may have, and how it ends there: by the request's own limit, and by the engine's.

    The engine's is of a whole response, however many requests it is written in. Where it ends a piece before the
    piece's own limit there is no more room: ``context``, so that nobody asks for the next one.
    """
    found: list[tuple[int, Finish]] = []
    if request.max_tokens is not None:
        found.append((max(0, request.max_tokens - injected), "length"))
    if limit is not None:
        end: Finish = "context" if len(request.prefix) and request.max_tokens is not None else "length"
        found.append((max(0, limit - len(request.prefix) - injected), end))
    return found


def refuse(who: str, wanted: set[str], engine: Engine) -> None:
    missing = sorted(wanted - engine.capabilities)
    if not missing:
        return
    able = [name for name, has in CAPABILITIES.items() if wanted <= has and name != engine.name] or ["none"]
    reasons: Mapping[str, str] = getattr(engine, "missing", {})
    why = "; ".join(f"{name}: {reasons[name]}" for name in missing if name in reasons)
    raise ThriftyError(
        f"{who} {', '.join(missing)}, which the engine {engine.name!r} has not{f' ({why})' if why else ''}; "
        f"engines that can: {', '.join(able)}"
    )
