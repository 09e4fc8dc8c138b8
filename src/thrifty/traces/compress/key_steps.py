"""Keep the steps that carry the answer: drop idle re-checks, abandoned branches, repetitions and the tail.

A rule-based stand-in for the large model that rewrites chains in C3oT. It reads the surface only
(``traces/segment.py``): a re-check that ends in the value it checks is idle; one that ends in another value repairs.
The repaired value is written into the step that it corrects where that step ends in ``= value``, else the re-check
stays.

>>> from thrifty.contracts import Chain, Problem
>>> text = "a 7 + 3 * 4 = 9 . | 7 + 3 = 0 ; 0 * 4 = 0 ; no 0 . b 0 + 1 = 1 . | 0 + 1 = 1 ; ok . so 1 ."
>>> shorten(text)
'a 7 + 3 * 4 = 0 . b 0 + 1 = 1 .'

Differs: rules in place of a language model; steps are dropped or mended, never rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thrifty.contracts import Card, Chain, Context
from thrifty.traces.segment import numbers, segment

CARD = Card(key="key-steps", title="Keep the steps that carry the answer", saves=("tokens",), baseline=True)

_RESULT = re.compile(r"(=\s*)([-−]?\d[\d,./]*)(\W*)$")


@dataclass(frozen=True)
class KeySteps:
    def compress(self, chains: Sequence[Chain], ctx: Context) -> list[Chain | None]:
        return [replace(chain, thought=shorten(chain.thought), source="key-steps") for chain in chains]


def shorten(thought: str) -> str:
    """The chain without its idle parts; the whole chain where nothing else would be left."""
    kept: list[str] = []
    said: set[str] = set()
    check: list[str] = []

    def settle() -> None:
        """A run of check steps has ended: idle, a repair that can be written in, or one that must stay."""
        if not check:
            return
        values = numbers(check[-1]) or numbers(" ".join(check))
        last = numbers(kept[-1])[-1:] if kept else []
        if values and last and values[-1:] != last:
            result = _RESULT.search(kept[-1].rstrip())
            if result:
                kept[-1] = kept[-1].rstrip()[: result.start(2)] + values[-1] + result[3] + _space(kept[-1])
            else:
                kept.extend(check)
        check.clear()

    for step in segment(thought):
        piece = thought[step.start : step.end]
        if step.kind == "check":
            check.append(piece)
            continue
        settle()
        content = " ".join(piece.split())
        if step.kind == "work" and content not in said:
            kept.append(piece)
            said.add(content)
    settle()
    return "".join(kept).strip() or thought.strip()


def _space(piece: str) -> str:
    return piece[len(piece.rstrip()) :]
