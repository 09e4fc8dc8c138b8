"""C3oT: teach one model long and short chains of the same questions under two condition words, then ask for short ones.

Saves thinking tokens: what long chains teach is kept, and the short ones are written. Loss, over both samples of every
question: L = - log P(x_long, a | p_long q) - log P(x_short, a | p_short q), all target tokens; inference asks with
p_short. Compression = 1 - mean length with p_short / mean length of the model as it was.

Parts: ``key-steps`` compresses (blind: it reads text only), this file tunes and measures. Arms beside the method's own:
``short-only`` and ``no-condition`` (both lengths mixed, no word), which the paper compares with.

Paper: Kang et al., C3oT: Generating Shorter Chain-of-Thought without Compromising Effectiveness (2412.11664).
Differs: the compressor is rules in place of GPT-4; long chains are the model's own right ones; a LoRA in place of full
fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from thrifty import registry
from thrifty.contracts import Card, Chain, Problem, ThriftyError
from thrifty.lab import ADAPTER, Lab, Report, Setting, unusable, verdict
from thrifty.solve.search.single_pass import SinglePass
from thrifty.tune.batches import Example, Shuffled, examples

CARD = Card(
    key="c3ot",
    title="C3oT: Generating Shorter Chain-of-Thought without Compromising Effectiveness",
    arxiv="2412.11664",
    year=2024,
    saves=("tokens", "latency"),
    needs=("adapters",),
)


@dataclass(frozen=True)
class C3oT:
    long_condition: str = field(
        default="in full :", metadata={"help": "words before a question that ask for a long chain"}
    )
    short_condition: str = field(default="in brief :", metadata={"help": "words that ask for a short chain"})
    compressor: str = field(default="key-steps", metadata={"help": "key of a traces.compress method"})
    train_n: int = field(default=1000, metadata={"help": "training problems"})
    steps: int = field(default=80, metadata={"help": "optimiser steps per LoRA"})
    batch_size: int = field(default=64, metadata={"help": "chains per step"})
    rank: int = field(default=8, metadata={"help": "LoRA rank"})
    lr: float | None = field(default=None, metadata={"help": "learning rate; none: 1e-4, 5e-4 below 10 M parameters"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})
    margin: float = field(default=0.03, metadata={"help": "accuracy that may be lost, for the verdicts"})
    ablations: bool = field(default=True, metadata={"help": "also train and measure the paper's two other arms"})

    def passes(self, n: int) -> dict[str, int]:
        """Chains sampled and trained on, for ``--plan``."""
        arms = 3 if self.ablations else 1
        return {"sampled": self.train_n + n * (2 + arms), "trained": arms * self.steps * self.batch_size}

    def run(self, lab: Lab) -> Report:
        test, train = lab.problems("test", lab.n), lab.problems("train", self.train_n)
        sampler = SinglePass(self.temperature, self.top_p)
        long = lab.chains(lab.solve("own-chains", sampler, train), "own")
        compressor = registry.load(self.compressor)()
        pairs = list(zip(long, compressor.compress(long, lab.context(random.Random(lab.seed))), strict=True))
        short = [chain for _, chain in pairs if chain is not None]
        if not short:
            raise ThriftyError(f"the model solved none of {len(train)} training problems: give an easier task")
        kept = sum(len(c.thought) for c in short) / max(1, sum(len(c.thought) for c, s in pairs if s is not None))
        lab.progress.say(f"{len(short)} pairs; the short chains have {kept:.0%} of the long ones' characters")

        both = _examples(lab, long, self.asking(self.long_condition)) + _examples(
            lab, short, self.asking(self.short_condition)
        )
        adapter = self._tune(lab, "c3ot", both)
        lab.publish("c3ot/adapter", "adapter")
        engine, on = lab.engine(adapter=adapter), {ADAPTER: 1.0}
        settings = [
            Setting("before", lab.solve("before", sampler, test, engine, {ADAPTER: 0.0})),
            Setting(
                "asked short", lab.solve("asked-short", sampler, self._asked(test, self.short_condition), engine, on)
            ),
            Setting("asked long", lab.solve("asked-long", sampler, self._asked(test, self.long_condition), engine, on)),
        ]
        if self.ablations:
            for name, data in (
                ("short only", _examples(lab, short)),
                ("no condition", _examples(lab, long) + _examples(lab, short)),
            ):
                stage = name.replace(" ", "-")
                arm = lab.engine(adapter=self._tune(lab, stage, data))
                settings.append(Setting(name, lab.solve(f"measure-{stage}", sampler, test, arm, on)))
        verdicts = [verdict(s, settings[0], None, self.margin) for s in settings[1:]]
        notes = [f"short chains by {self.compressor}: {kept:.0%} of the characters", *unusable(test)]
        return Report(settings, "before", notes=notes, verdicts=verdicts)

    def asking(self, condition: str) -> Callable[[Problem], str]:
        return lambda problem: f"{condition} {problem.prompt}"

    def _asked(self, problems: Sequence[Problem], condition: str) -> list[Problem]:
        ask = self.asking(condition)
        return [replace(p, prompt=ask(p)) for p in problems]

    def _tune(self, lab: Lab, stage: str, data: list[Example]) -> Path:
        source = Shuffled(data, self.batch_size, lab.seed)
        return lab.tune(stage, source, lab.training(self.steps, self.batch_size, self.lr), self.rank)


def _examples(lab: Lab, chains: Sequence[Chain], prompt: Callable[[Problem], str] | None = None) -> list[Example]:
    loaded = lab.loaded()
    return examples(chains, loaded.chat, prompt, max_length=loaded.context)
