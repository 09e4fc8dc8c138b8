"""Long2short, four ways from a model with long chains to one with short ones, on the same problems.

- ``merge``: the plain average of its weights and a short model's (``average``);
- ``rejection``: fine-tuning on the shortest right one of ``samples`` chains per question;
- ``dpo``: that chain preferred to longer wrong ones, and to right ones at least ``ratio`` times as long;
- ``rl``: reinforcement with the length reward lam = 1/2 - (length - shortest) / (longest - shortest) within a group
  (``relative-length``), online mirror descent (``mirror-descent``), and a smaller limit for rollouts.

>>> choose([True, True, False, False, True], [20, 12, 30, 9, 15], ratio=1.5)  # 12; against 20 (>= 18), 30 (wrong)
(1, [0, 2])

Paper: Kimi Team, Kimi k1.5: Scaling Reinforcement Learning with LLMs (2501.12599), sections 2.3 and 2.4.
Differs: LoRAs in place of full training; in ``rl`` problems are drawn evenly (no curriculum, no priority by success)
and rollouts that reach the limit are cut, not taken up again. The paper names no learning rates, DPO strength or tau.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from thrifty.contracts import Card, Chain, Outcome, Problem, ThriftyError, Trace
from thrifty.lab import ADAPTER, Lab, Report, Setting, verdict
from thrifty.models.load import Loaded, wrap
from thrifty.recipes._lora import LoraRecipe, tokens
from thrifty.solve.search.single_pass import SinglePass
from thrifty.tune.adapter import lora
from thrifty.tune.answers import Samples
from thrifty.tune.batches import Example, Pair, Shuffled
from thrifty.tune.credit import GroupRelative, centred, constant_length
from thrifty.tune.objective.dpo import DPO
from thrifty.tune.objective.mirror_descent import MirrorDescent
from thrifty.tune.reward.relative_length import RelativeLength
from thrifty.tune.rollout import Rollout, rollout
from thrifty.tune.supervised import train
from thrifty.weights.merge.average import Average

CARD = Card(
    key="kimi-long2short",
    title="Kimi k1.5: Scaling Reinforcement Learning with LLMs",
    arxiv="2501.12599",
    year=2025,
    saves=("tokens",),
    needs=("adapters",),
)
CLAIM = {
    "says": "DPO on the shortest right chain against longer ones shortens a long reasoner at the same accuracy.",
    "parts": [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "comparator": None,
    "settings": {"ways": ("dpo",), "train_n": 400, "steps": 60, "train_batch_size": 64},
    "student": "long",
    "tasks": ["roll"],
    "n": 600,
    "seeds": 8,
    "unit": "training",
    "match": "the same student and problems; the comparator is the student as it is, training is extra",
    "gates": {"accuracy of the student": [0.4, 0.995]},
    "placebo": {"prefer": "random"},
    "amendments": [
        "1: the rate was the recipe's for fine-tuning, 5e-4, never tuned for DPO: -38 points; on development problems "
        "a fifth of it loses 1.5 points and saves 15 % of the tokens, and is the default now"
    ],
}

WAYS = ("merge", "rejection", "dpo", "rl")
QUESTIONS = 16
"""Questions per step of rl."""


@dataclass(frozen=True)
class KimiLong2short(LoraRecipe):
    ways: tuple[str, ...] = field(default=WAYS, metadata={"help": "which of merge, rejection, dpo and rl to go"})
    short: str | None = field(default=None, metadata={"help": "short model of the same architecture, for merge"})
    samples: int = field(default=8, metadata={"help": "chains per training question"})
    ratio: float = field(default=1.5, metadata={"help": "how much longer a right chain is that DPO avoids"})
    prefer: Literal["shortest", "random"] = field(
        default="shortest", metadata={"help": "what is learnt and avoided; random chains for comparison"}
    )
    steps: int = field(
        default=80, metadata={"help": "optimiser steps of rejection and of dpo, each of half as many pairs"}
    )
    lr: float | None = field(
        default=None, metadata={"help": "learning rate; none: 1e-4, 5e-4 below 10 M parameters, for dpo a fifth of it"}
    )
    beta: float = field(default=0.1, metadata={"help": "DPO's pull towards the model as it was"})
    rl_steps: int = field(default=60, metadata={"help": f"steps of rl, each with {QUESTIONS} questions"})
    rl_max_tokens: int | None = field(
        default=None, metadata={"help": "limit of a rollout; none: what nine of ten right chains need"}
    )
    tau: float = field(default=0.1, metadata={"help": "mirror descent's pull towards each step's policy"})
    weight: float = field(default=1.0, metadata={"help": "of the length reward"})

    def passes(self, n: int) -> dict[str, int]:
        """Chains sampled and trained on, for ``--plan``."""
        tuned = len({"rejection", "dpo"} & set(self.ways)) * self.steps * self.train_batch_size
        rollouts = ("rl" in self.ways) * self.rl_steps * QUESTIONS * self.samples
        return {
            "sampled": self.train_n * self.samples + rollouts + n * (1 + len(self.ways)),
            "trained": tuned + 2 * rollouts,
        }

    def check(self, lab: Lab) -> None:
        super().check(lab)
        wrong = set(self.ways) - set(WAYS)
        if wrong or not self.ways:
            raise ThriftyError(f"ways are {', '.join(WAYS)}, not {', '.join(sorted(wrong)) or 'none'}")
        if len(set(self.ways)) < len(self.ways):
            raise ThriftyError(f"--ways is {','.join(self.ways)}: name each once")
        if self.ways == ("merge",) and self.short is None:
            raise ThriftyError("merge is of two models: give --short, a short model of the same architecture")
        if self.samples < 2:
            raise ThriftyError(f"--samples is {self.samples}: give at least 2, chains are compared")
        if "rl" in self.ways and self.train_n < QUESTIONS:
            raise ThriftyError(f"--train-n is {self.train_n}, which fills no step of rl: give at least {QUESTIONS}")
        for name in ("rl_steps", "rl_max_tokens"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ThriftyError(f"--{name.replace('_', '-')} is {number}: give at least 1")
        for name in ("beta", "tau"):
            if not getattr(self, name) > 0:
                raise ThriftyError(f"--{name} is {getattr(self, name):g}: give a number above 0")
        if self.ratio < 1:
            raise ThriftyError(f"--ratio is {self.ratio:g}: give at least 1, how much longer a right chain is")
        if self.short is not None:
            lab.loaded(self.short)  # a wrong name is told before any work

    def run(self, lab: Lab) -> Report:
        self.check(lab)
        test, sampler = lab.problems(lab.split, lab.n), self.sampler
        settings = [Setting("before", lab.solve("before", sampler, test))]
        notes = lab.notes(test)
        for way in self.ways:
            if way == "merge":
                if self.short is None:
                    notes.append("merge is left out: it needs --short, a short model of the same architecture")
                    continue
                outcomes = lab.solve("measure-merge", sampler, test, lab.engine(self.merged(lab)))
            else:
                adapter = self.tuned(lab, way)
                outcomes = lab.solve(f"measure-{way}", sampler, test, lab.engine(adapter=adapter), {ADAPTER: 1.0})
                lab.publish(f"{way}/adapter", f"adapter-{way}")
            settings.append(Setting(way, outcomes))
        verdicts = [verdict(s, settings[0], None, self.margin) for s in settings[1:]]
        return Report(settings, "before", notes=notes, verdicts=verdicts, margin=self.margin)

    # ---- the ways -----------------------------------------------------------------------------------

    def merged(self, lab: Lab) -> Loaded:
        """The model halfway to ``short``."""
        # The lab's own may carry LoRAs by now, which the short one has not.
        here, there = lab.fresh(), lab.loaded(self.short)
        here.model.load_state_dict(Average().merge([here.model.state_dict(), there.model.state_dict()]))
        return wrap(here.model, here.tokenizer, f"{lab.model} + {self.short}")

    def tuned(self, lab: Lab, way: str) -> Path:
        """Folder of the LoRA that rejection, dpo or rl trains."""
        if way == "rl":
            return self._reinforced(lab)
        chosen = self._chosen(lab)
        if not chosen:
            raise ThriftyError(
                f"the model answered none of {self.train_n} training questions: give an easier task or a longer "
                "--max-tokens"
            )
        settings = lab.training(self.steps, self.train_batch_size, self.lr)
        if way == "rejection":
            chains = [Chain(o.problem, best.thought, best.response, source="own") for o, best, _ in chosen]
            return self.tune(lab, "rejection", self.shuffled(lab, tokens(lab, chains)))
        chat = lab.loaded().chat
        pairs = [
            Pair(_example(chat, o.problem, best), _example(chat, o.problem, worse))
            for o, best, others in chosen
            for worse in others
        ]
        if not pairs:
            raise ThriftyError(
                f"no chain is wrong and longer, or right and {self.ratio:g} times as long: lower --ratio"
            )
        lab.progress.say(f"{len(pairs)} pairs from {len(chosen)} questions")
        # at the full rate the students lose 38 points (results/); a fifth was chosen on development problems
        rate = settings.lr / 5 if self.lr is None else self.lr
        settings = replace(settings, lr=rate, batch_size=max(1, self.train_batch_size // 2))

        def make(folder: Path) -> None:
            data = Shuffled(pairs, settings.batch_size, lab.seed)
            with lab.progress.bar("dpo", self.steps) as bar:
                train(self._with_lora(lab).model, data, settings, folder, DPO(self.beta), meter=lab.meter,
                      progress=lambda done, of, line: bar.advance(1))  # fmt: skip

        return lab.once("dpo", make) / "adapter"

    def _reinforced(self, lab: Lab) -> Path:
        limit = self.rl_max_tokens
        if limit is None:
            lengths = sorted(len(t.ids) for o in self._own(lab) for t in o.tried if t.complete and _right(lab, o, t))
            if not lengths:
                raise ThriftyError("the model answered no training question, so there is no limit to read off: "
                                   "give --rl-max-tokens")  # fmt: skip
            limit = lengths[int(0.9 * (len(lengths) - 1))]
        rate = lab.training(1, 1, self.lr).lr
        settings = Rollout(
            steps=self.rl_steps, problems=QUESTIONS, samples=self.samples, minibatches=2, max_tokens=limit, lr=rate,
            seed=lab.seed, save_every=20, aggregate=constant_length, batch=lab.batch_size,
        )  # fmt: skip

        def make(folder: Path) -> None:
            loaded = self._with_lora(lab)
            with lab.progress.bar("rl", self.rl_steps) as bar:
                rollout(
                    loaded, lab.task, lab.problems("train", self.train_n), settings, folder,
                    RelativeLength(self.weight), GroupRelative(centred), MirrorDescent(self.tau), meter=lab.meter,
                    progress=lambda done, of, line: bar.advance(1),
                )  # fmt: skip

        return lab.once("rl", make) / "adapter"

    # ---- chains -------------------------------------------------------------------------------------

    def _own(self, lab: Lab) -> list[Outcome]:
        sampler = Samples(self.samples, self.temperature, top_p=self.top_p)
        return lab.solve("own-samples", sampler, lab.problems("train", self.train_n))

    def _chosen(self, lab: Lab) -> list[tuple[Outcome, Trace, list[Trace]]]:
        """Per question with a right chain: the one to learn, and those to avoid."""
        rng, found = random.Random(lab.seed), []
        for outcome in self._own(lab):
            right = [t.complete and _right(lab, outcome, t) for t in outcome.tried]
            if not any(right):
                continue
            best, others = choose(right, [len(t.ids) for t in outcome.tried], self.ratio)
            if self.prefer == "random":
                best = rng.choice([i for i, ok in enumerate(right) if ok])
                others = rng.sample([i for i in range(len(right)) if i != best], len(others))
            found.append((outcome, outcome.tried[best], [outcome.tried[i] for i in others]))
        return found

    def _with_lora(self, lab: Lab) -> Loaded:
        fresh = lab.fresh()
        return replace(fresh, model=lora(fresh.model, rank=self.rank, name=ADAPTER, seed=lab.seed))


def choose(right: Sequence[bool], lengths: Sequence[int], ratio: float) -> tuple[int, list[int]]:
    """Index of the shortest right chain, and of those to avoid: longer wrong ones, much longer right ones."""
    best = min((i for i, ok in enumerate(right) if ok), key=lambda i: (lengths[i], i))
    shortest = lengths[best]
    return best, [
        i for i, n in enumerate(lengths) if i != best and (n >= ratio * shortest if right[i] else n > shortest)
    ]


def _right(lab: Lab, outcome: Outcome, trace: Trace) -> bool:
    return lab.task.grade(outcome.problem, trace.response).right


def _example(chat: Any, problem: Problem, trace: Trace) -> Example:
    return Example(chat.prompt_ids(problem.prompt), trace.ids)


def claim(trial: Any) -> dict[str, Any]:
    """The student after DPO, and as it is: new tokens and accuracy on fresh problems."""
    adapter = None
    if trial.arm == "method":
        method = trial.method
        method = replace(method, train_n=trial.scaled(method.train_n), steps=trial.scaled(method.steps))

        def make(folder: Path) -> None:
            lab = trial.lab()
            lab.folder = folder
            method.tuned(lab, "dpo")

        adapter = trial.once("dpo", make, method) / "stages" / "dpo" / "adapter"
        trial.trained(adapter.parent)
        trial.figure("examples", method.train_n)
    found: dict[str, Any] = trial.answered(trial.solve(SinglePass(), trial.problems(), adapter=adapter))
    trial.elsewhere(SinglePass(), adapter=adapter)
    if trial.arm == "comparator":
        trial.gate("accuracy of the student", sum(found["accuracy"]) / len(found["accuracy"]))
    return found
