"""Tighter budgets: what accuracy is left when chains are cut at fewer and fewer tokens.

One pass at full length, then truncation at every budget b; all on the same problems.

Paper: none.
Differs: nothing.

>>> MyMethod(budgets=(32, 64)).budgets
(32, 64)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thrifty.contracts import Card
from thrifty.lab import Lab, Report, Setting
from thrifty.solve.search.single_pass import SinglePass
from thrifty.solve.search.truncation import Truncation

CARD = Card(key="my-method", title="The paper's title", year=2026, saves=("tokens",))


@dataclass(frozen=True)
class MyMethod:
    budgets: tuple[int, ...] = field(default=(64, 32, 16), metadata={"help": "thinking tokens per problem"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})

    def run(self, lab: Lab) -> Report:
        test = lab.problems(lab.split, lab.n)
        # Every lab.solve is kept in the run's folder under the name of its stage: a run that was stopped goes on.
        settings = [Setting("full length", lab.solve("full", SinglePass(self.temperature), test))]
        for budget in self.budgets:
            strategy = Truncation(budget, self.temperature)
            settings.append(Setting(f"{budget} tokens", lab.solve(f"cut-{budget}", strategy, test)))
        return Report(settings, baseline="full length")
