"""Plain fine-tuning: a LoRA on right chains of the training problems, all of them or those that a selector chooses.

What every way to make, compress or select chains is measured against, and how one is used on a model of yours:
``thrifty run sft --model DIR --task T --selector select2reason``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from thrifty import registry
from thrifty.contracts import Card, Chain, Outcome, Problem, Strategy, ThriftyError
from thrifty.lab import ADAPTER, Lab, Report, Setting, verdict
from thrifty.recipes._lora import LoraRecipe, tokens

CARD = Card(key="sft", title="Plain fine-tuning on chains", saves=(), needs=("adapters",), baseline=True)


@dataclass(frozen=True)
class SFT(LoraRecipe):
    chains_from: Literal["gold", "own"] = field(
        default="gold", metadata={"help": "gold (the task's chains) or own (the model's own right ones)"}
    )
    selector: str | None = field(default=None, metadata={"help": "key of a traces.select method; none: all chains"})

    def passes(self, n: int) -> dict[str, int]:
        """Chains sampled and trained on, for ``--plan``; a selector's own samples are not foreseen."""
        own = self.train_n * (self.chains_from == "own")
        return {"sampled": own + 2 * n, "trained": self.steps * self.train_batch_size}

    def run(self, lab: Lab) -> Report:
        self.check(lab)
        test, chains = lab.problems(lab.split, lab.n), self.chains(lab)
        before = Setting("before", lab.solve("measure-before", self.sampler, test))
        adapter = self.tuned(lab, chains)
        lab.publish("sft/adapter", "adapter")
        after = Setting("after", lab.solve("measure-after", self.sampler, test, lab.engine(adapter=adapter),
                                           {ADAPTER: 1.0}))  # fmt: skip
        notes = [f"{len(chains)} chains from {self.chains_from}", *lab.notes(test)]
        return Report([before, after], "before", notes=notes, verdicts=[verdict(after, before, None, self.margin)],
                      margin=self.margin)  # fmt: skip

    def check(self, lab: Lab) -> None:
        super().check(lab)
        if self.chains_from not in ("gold", "own"):
            raise ThriftyError(f"--chains-from is {self.chains_from!r}: choose gold or own")
        if self.selector is not None and (found := registry.find(self.selector)).family != "traces.select":
            raise ThriftyError(f"--selector is {self.selector}, of family {found.family}: give one of traces.select")

    def chains(self, lab: Lab) -> list[Chain]:
        """The chains to train on."""
        train = lab.problems("train", self.train_n)
        if self.chains_from == "own":
            pool = lab.chains(lab.solve("own-chains", self.sampler, train), "own")
        else:
            pool = [
                Chain(p, str(p.meta["chain"]), p.answer, source="gold")
                for p in train
                if p.answer and p.meta.get("chain")
            ]
        if not pool:
            remedy = "give --chains-from own" if self.chains_from == "gold" else "give an easier task"
            raise ThriftyError(f"no chains of {len(train)} training problems from {self.chains_from}: {remedy}")
        if self.selector is None:
            return pool
        asked = 0

        def solve(strategy: Strategy, problems: Sequence[Problem]) -> list[Outcome]:
            nonlocal asked
            asked += 1
            return lab.solve(f"select-{asked}", strategy, problems)

        selector = registry.load(self.selector)()
        ctx = replace(lab.context(random.Random(lab.seed)), solve=solve)
        if hasattr(selector, "pool"):
            pool = selector.pool(pool, ctx)
        chosen = [pool[i] for i in selector.select(pool, ctx)]
        lab.progress.say(f"{self.selector} chooses {len(chosen)} of {len(pool)} chains")
        return chosen

    def tuned(self, lab: Lab, chains: Sequence[Chain]) -> Path:
        """Folder of the LoRA trained on the chains, stage "sft" of the lab. Resumes."""
        return self.tune(lab, "sft", self.shuffled(lab, tokens(lab, chains)))
