"""C3oT: teach one model long and short chains of the same questions under two condition words, then ask for short ones.

Saves thinking tokens: what long chains teach is kept, and the short ones are written. Loss, over both samples of every
question: L = - log P(x_long, a | p_long q) - log P(x_short, a | p_short q), all target tokens; inference asks with
p_short. Compression = 1 - mean length with p_short / mean length of the model as it was.

Parts: ``key-steps`` compresses (blind: it reads text only), this file tunes and measures. ``teach`` "short" (the short
chains alone) and "mixed" (both lengths, no word) are what the paper compares with.

Paper: Kang et al., C3oT: Generating Shorter Chain-of-Thought without Compromising Effectiveness (2412.11664).
Differs: the compressor is rules in place of GPT-4; long chains are the model's own right ones; a LoRA in place of full
fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from thrifty import registry
from thrifty.contracts import Card, Chain, Problem, ThriftyError
from thrifty.lab import ADAPTER, Lab, Report, Setting, verdict
from thrifty.recipes._lora import LoraRecipe, tokens
from thrifty.solve.search.single_pass import SinglePass

CARD = Card(
    key="c3ot",
    title="C3oT: Generating Shorter Chain-of-Thought without Compromising Effectiveness",
    arxiv="2412.11664",
    year=2024,
    saves=("tokens", "latency"),
    needs=("adapters",),
)
CLAIM = {
    "says": "Taught long and short chains under two condition words and asked for short ones, a model is right more "
    "often than one taught the short chains alone, at the same length.",
    "parts": [
        {"name": "accuracy", "test": "superior", "smallest": 0.05},
        {"name": "tokens", "test": "non-inferior", "better": "lower", "on": "log ratio", "margin": 0.1},
    ],
    "comparator": {"teach": "short"},
    "settings": {"train_n": 400, "steps": 60, "train_batch_size": 64},
    "student": "long",
    "tasks": ["roll"],
    "n": 300,
    "seeds": 8,
    "unit": "training",
    "match": "questions and short chains; tokens processed in training, so that short-only takes more steps",
    "grid": {"lr": [5e-4, 2e-3, 8e-3]},
    "gates": {"accuracy of the student": [0.4, 0.995], "short chains alone lose": [0.05, 0.25]},
    "placebo": {"teach": "mixed"},
    "amendments": [
        "1: both arms took the larger of two rates, 2e-3, and short chains alone lost 30 to 43 points, more than any "
        "way of training on them can make up; now up to 8e-3, and a gate of 25 points"
    ],
}
STAGES = {"both": "c3ot", "short": "short-only", "mixed": "no-condition"}


@dataclass(frozen=True)
class C3oT(LoraRecipe):
    long_condition: str = field(
        default="in full :", metadata={"help": "words before a question that ask for a long chain"}
    )
    short_condition: str = field(default="in brief :", metadata={"help": "words that ask for a short chain"})
    compressor: str = field(default="key-steps", metadata={"help": "key of a traces.compress method"})
    teach: Literal["both", "short", "mixed"] = field(
        default="both", metadata={"help": "both lengths under their words; short chains alone; or mixed, without words"}
    )
    steps: int = field(default=80, metadata={"help": "optimiser steps per LoRA"})
    ablations: bool = field(default=True, metadata={"help": "also train and measure the paper's two other arms"})

    @property
    def arms(self) -> list[C3oT]:
        """This one, and those that it is compared with."""
        others: tuple[Literal["short", "mixed"], ...] = ("short", "mixed") if self.ablations else ()
        return [self, *(replace(self, teach=teach) for teach in others if teach != self.teach)]

    def passes(self, n: int) -> dict[str, int]:
        """Chains sampled and trained on, for ``--plan``."""
        measured = 1 + sum(2 if arm.teach == "both" else 1 for arm in self.arms)
        trained = len(self.arms) * self.steps * self.train_batch_size
        return {"sampled": self.train_n + n * measured, "trained": trained}

    def run(self, lab: Lab) -> Report:
        self.check(lab)
        test, train = lab.problems(lab.split, lab.n), lab.problems("train", self.train_n)
        pairs = self.pairs(lab, lab.chains(lab.solve("own-chains", self.sampler, train), "own"))
        settings: list[Setting] = []

        def measure(name: str, problems: Sequence[Problem], alpha: float = 1.0) -> None:
            stage = f"measure-{name.replace(' ', '-')}"
            settings.append(Setting(name, lab.solve(stage, self.sampler, problems, engine, {ADAPTER: alpha})))

        for arm in self.arms:
            engine = lab.engine(adapter=arm.tuned(lab, pairs))
            if arm is self:
                measure("before", test, 0.0)
                lab.publish(f"{STAGES[arm.teach]}/adapter", "adapter")
            if arm.teach == "both":
                measure("asked short", arm.asked(test))
                measure("asked long", _asked(test, arm.asking(arm.long_condition)))
            else:
                measure(STAGES[arm.teach].replace("-", " "), test)
        verdicts = [verdict(s, settings[0], None, self.margin) for s in settings[1:]]
        kept = sum(len(short.thought) for _, short in pairs) / max(1, sum(len(long.thought) for long, _ in pairs))
        notes = [f"short chains by {self.compressor}: {kept:.0%} of the characters", *lab.notes(test)]
        return Report(settings, "before", notes=notes, verdicts=verdicts, margin=self.margin)

    def pairs(self, lab: Lab, long: Sequence[Chain]) -> list[tuple[Chain, Chain]]:
        """Each right chain of the model with its short form; those that the compressor drops are left out."""
        made = registry.load(self.compressor)().compress(long, lab.context(random.Random(lab.seed)))
        pairs = [(chain, short) for chain, short in zip(long, made, strict=True) if short is not None]
        if not pairs:
            raise ThriftyError(
                f"no pairs to train on: the model solved {len(long)} of the training problems. Give an easier task"
            )
        lab.progress.say(f"{len(pairs)} pairs of a long and a short chain")
        return pairs

    def tuned(self, lab: Lab, pairs: Sequence[tuple[Chain, Chain]]) -> Path:
        """Folder of the LoRA that learns from the pairs what ``teach`` says. Resumes."""
        long, short = [p[0] for p in pairs], [p[1] for p in pairs]
        if self.teach == "both":
            data = tokens(lab, long, self.asking(self.long_condition))
            data += tokens(lab, short, self.asking(self.short_condition))
        else:
            data = (tokens(lab, long) if self.teach == "mixed" else []) + tokens(lab, short)
        return self.tune(lab, STAGES[self.teach], self.shuffled(lab, data))

    def asked(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems as this arm is asked for a short chain."""
        return _asked(problems, self.asking(self.short_condition)) if self.teach == "both" else list(problems)

    def check(self, lab: Lab) -> None:
        super().check(lab)
        found = registry.find(self.compressor)
        if found.family != "traces.compress":
            raise ThriftyError(
                f"--compressor is {self.compressor}, of family {found.family}: give one of traces.compress"
            )
        if self.teach not in STAGES:
            raise ThriftyError(f"--teach is {self.teach!r}: choose one of {', '.join(STAGES)}")

    def asking(self, condition: str) -> Callable[[Problem], str]:
        return lambda problem: f"{condition} {problem.prompt}"


def _asked(problems: Sequence[Problem], ask: Callable[[Problem], str]) -> list[Problem]:
    return [replace(p, prompt=ask(p)) for p in problems]


def claim(trial: Any) -> dict[str, Any]:
    """New tokens and accuracy of one arm asked for short chains; both arms train on as many tokens."""
    problems, sampler, given = trial.problems(), SinglePass(), trial.method
    method = replace(given, lr=trial.pick["lr"], train_n=trial.scaled(given.train_n), steps=trial.scaled(given.steps))
    own = trial.lab().chains(trial.solve(method.sampler, trial.problems("train", method.train_n)), "own")

    def make(folder: Path) -> None:
        lab, arm = trial.lab(), method
        lab.folder = folder
        pairs = method.pairs(lab, own)
        if method.teach == "short":
            both, short = (
                sum(map(len, tokens(lab, c))) for c in ([x for p in pairs for x in p], [p[1] for p in pairs])
            )
            arm = replace(method, steps=round(method.steps * both / (2 * short)))
        arm.tuned(lab, pairs)

    folder = trial.once("c3ot", make, method, [[c.problem, c.thought] for c in own])
    adapter = folder / "stages" / STAGES[method.teach] / "adapter"
    outcomes = trial.solve(sampler, method.asked(problems), adapter=adapter)
    right = [float(o.grade.right) for o in outcomes]
    if trial.arm == "comparator":
        before = [o.grade.right for o in trial.solve(sampler, problems)]
        trial.gate("accuracy of the student", sum(before) / len(before))
        trial.gate("short chains alone lose", (sum(before) - sum(right)) / len(before))
    return {"accuracy": right, "tokens": [o.usage.generated for o in outcomes]}
