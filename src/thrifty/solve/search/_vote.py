"""Majority vote over traces, shared by the strategies that vote."""

from __future__ import annotations

from collections.abc import Sequence

from thrifty.contracts import Trace


def thinking_length(trace: Trace) -> int:
    """Tokens of the chain, its closing tag included.

    Spans are of new tokens alone: where a closed chain is gone on with, the chain is what was given.
    """
    return max((span.end for span in trace.spans if span.kind == "thought"), default=trace.start)


def majority(traces: Sequence[Trace]) -> Trace | None:
    """The shortest trace of the commonest answer; ties between answers go to the shortest chain among them.

    Traces without an answer have no vote; None when nobody has one.
    """
    votes: dict[str, list[tuple[int, int]]] = {}
    for index, trace in enumerate(traces):
        if trace.answer is not None:
            votes.setdefault(trace.answer, []).append((thinking_length(trace), index))
    if not votes:
        return None
    _, shortest = min((-len(who), min(who)) for who in votes.values())
    return traces[shortest[1]]
