"""A talk under somebody else's hand: what stands between a strategy and whoever answers it is written with this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thrifty.contracts import OutOfBudget, RowFailed, Talk


def relayed(talk: Talk, ask: Callable[[Any], Talk]) -> Talk:
    """``talk`` with each request given to ``ask``, whose result is its answer; what the talk returns.

    ``OutOfBudget``, ``RowFailed`` and being closed reach the talk as they would without anything between.
    """
    answer: Any = None
    signal: OutOfBudget | RowFailed | None = None
    while True:
        try:
            request = talk.throw(signal) if signal is not None else talk.send(answer)
        except StopIteration as stop:
            return stop.value
        answer, signal = None, None
        try:
            answer = yield from ask(request)
        except (OutOfBudget, RowFailed) as error:
            signal = error
        except GeneratorExit:
            talk.close()
            raise
