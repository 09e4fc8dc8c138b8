"""Brevity: ask for a short chain in plain words.

prompt = question + blank line + instruction.

Paper: none.
Differs: nothing.

>>> from thrifty.contracts import Context, Problem
>>> MyMethod().prompt(Problem("1", "2 + 2?", "4"), Context())
'2 + 2?\\n\\nThink briefly.'
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thrifty.contracts import Card, Context, Problem, Prompt

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("tokens",))


@dataclass(frozen=True)
class MyMethod:
    instruction: str = field(default="Think briefly.", metadata={"help": "put behind the question"})

    def prompt(self, problem: Problem, ctx: Context) -> Prompt:
        return f"{problem.prompt}\n\n{self.instruction}"
