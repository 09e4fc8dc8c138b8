"""CoT-Valve: one LoRA direction along which a model's chains get shorter; its strength is a dial per request.

Weights theta + alpha * dTheta, dTheta a LoRA trained by next-token loss on short correct chains of the same questions.
alpha = 0 is the model as it was, 1 the length trained on, between them interpolates, above 1 extrapolates.

- ``tuning="plain"``: short chains only, at strength 1.
- ``tuning="++"``: MixChain, chains of several lengths per question, each trained at its own strength
  beta = 1 - (m - m_min) / (m_max - m_min), m its length among those of the question (section 3.3).
- ``tuning="+p"``: MixChain from the longest to the shortest, one pass per length, same LoRA (section 3.4).
- ``mixchain="c"``: chains sampled along a first, plain LoRA trained on ``short_from``, which join as solution 0.
- ``mixchain="z"``: chains sampled along the weight difference to ``short_from``, a model of the same architecture.

>>> strengths([30, 10, 20])
[0.0, 1.0, 0.5]

Paper: Ma et al., CoT-Valve: Length-Compressible Chain-of-Thought Tuning (2502.09601).
Differs: rank and learning rate follow the model's size (the paper's rank 2 is too little for a student of a million
parameters); MixChain is sampled at ``mix_alphas``, whose values the paper does not name for every model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thrifty import registry
from thrifty.contracts import Card, Chain, Problem, ThriftyError
from thrifty.engines.local import LocalEngine
from thrifty.lab import ADAPTER, Lab, Report, Setting, choose, verdict
from thrifty.models.load import Loaded, wrap
from thrifty.recipes._lora import LoraRecipe, tokens
from thrifty.solve.search.single_pass import SinglePass
from thrifty.traces.compress.random_steps import drop
from thrifty.tune.batches import Example, Shuffled

CARD = Card(
    key="cot-valve",
    title="CoT-Valve: Length-Compressible Chain-of-Thought Tuning",
    arxiv="2502.09601",
    year=2025,
    saves=("tokens", "latency"),
    needs=("adapters",),
)
CLAIM = {
    "says": "A LoRA that learnt short right chains makes a long reasoner think less at the same accuracy, and half its "
    "strength lies between.",
    "parts": [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.36},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
        {"name": "from 0 to 1/2", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.05},
        {"name": "from 1/2 to 1", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.05},
    ],
    "comparator": None,
    "settings": {"train_n": 1000, "steps": 60, "train_batch_size": 64},
    "student": "long",
    "students": 3,
    "tasks": ["roll"],
    "n": 500,
    "seeds": 9,
    "unit": "training",
    "match": "the same student, sampler and problems; the comparator is the student as it is, training is extra",
    "gates": {"accuracy of the student": [0.4, 0.995]},
    "placebo": {"short_from": "random"},
    "amendments": [
        "1: the method is trained, but problems were taken as the unit, with one training per student, so that the "
        "intervals left out how trainings differ; now the training is, three on each student",
    ],
}
OWN = ("gold", "compress", "random")
"""Where short chains come from that no other model writes."""


@dataclass(frozen=True)
class CotValve(LoraRecipe):
    steps: int = field(
        default=50, metadata={"help": "optimiser steps per LoRA; more put strength 1 closer to the short chains"}
    )
    short_from: str = field(
        default="gold",
        metadata={
            "help": "short chains: gold (the task's), compress (the model's own, shortened) or a model; random (its "
            "own, cut at random to the task's lengths) is no valve, but what one is compared with"
        },
    )
    tuning: Literal["plain", "++", "+p"] = field(default="plain", metadata={"help": "plain, ++ or +p (progressive)"})
    mixchain: Literal["c", "z"] = field(default="c", metadata={"help": "where MixChain's chains come from"})
    alphas: tuple[float, ...] = field(default=(0, 0.25, 0.5, 0.75, 1, 1.25), metadata={"help": "strengths to measure"})
    mix_alphas: tuple[float, ...] = field(
        default=(0, 0.25, 0.5, 0.75, 1), metadata={"help": "strengths at which MixChain is sampled"}
    )
    calibration_n: int = field(
        default=300,
        metadata={"help": "calibration problems, at most --n, on which the best strength is chosen; 0: on none"},
    )
    reference: str | None = field(
        default=None,
        metadata={"help": "short model at the end of the straight line; none: short_from's, or a student's"},
    )

    def passes(self, n: int) -> dict[str, int]:
        """What a run will do: chains sampled, and chains trained on. For ``--plan``."""
        mixed = self.tuning != "plain"
        sampled = (self.train_n if self.short_from != "gold" else 0) + mixed * self.train_n * len(self.mix_alphas)
        stages = 1 + (mixed and self.mixchain == "c")
        dials = len({0.0, *self.alphas})
        measured = n * (dials + 1) + min(self.calibration_n, n) * dials
        return {"sampled": sampled + measured, "trained": stages * self.steps * self.train_batch_size}

    def run(self, lab: Lab) -> Report:
        self.check(lab)
        test = lab.problems(lab.split, lab.n)
        calibration = self._calibration(lab)
        adapter = self.tuned(lab)
        lab.publish("valve/adapter", "adapter")
        engine = lab.engine(adapter=adapter)

        best = chosen = None
        if calibration:
            turned = self._turn(lab, "calibrate", calibration, engine)
            if candidates := [s for s in turned if s.alpha]:
                best, verdicts = choose(candidates, _long(turned), self.margin)
                chosen = {"n": len(calibration), "verdicts": verdicts}
                lab.progress.say(f"{best} is chosen, on {len(calibration)} calibration problems")

        settings = self._turn(lab, "alpha", test, engine)
        long, short_model, line = _long(settings), None, None
        reference = self._reference(lab)
        if reference is not None:
            found = lab.solve("short-model", self.sampler, test, lab.engine(reference))
            short_model = Setting(f"short model ({reference})", found)
            line = (long.name, short_model.name)
        return Report(
            settings + ([short_model] if short_model else []),
            long.name,
            line,
            notes=[f"tuning {self.tuning}, short chains from {self.short_from}", *lab.notes(test)],
            verdicts=[verdict(s, long, short_model, self.margin) for s in settings if s.alpha],
            margin=self.margin,
            best=best,
            calibration=chosen,
        )

    def tuned(self, lab: Lab) -> Path:
        """Folder of the LoRA, stage "valve" of the lab. Resumes."""
        train = lab.problems("train", self.train_n)
        if self.tuning == "plain":
            short = self._short_chains(lab, train)
            return self.tune(lab, "valve", self.shuffled(lab, tokens(lab, short)))
        return self.tune(lab, "valve", self._mixed_source(lab, self._mixchain(lab, train)))

    def _turn(self, lab: Lab, stage: str, problems: Sequence[Problem], engine: LocalEngine) -> list[Setting]:
        """The problems at every strength, and at 0."""
        alphas = self.alphas if 0 in self.alphas else (0.0, *self.alphas)
        return [
            Setting(_name(a), lab.solve(f"{stage}-{a:g}", self.sampler, problems, engine, {ADAPTER: a}), a)
            for a in alphas
        ]

    def _calibration(self, lab: Lab) -> list[Problem]:
        """Problems to choose the strength on; none where they are not wanted, or the source is too small."""
        n = min(self.calibration_n, lab.n)
        if n <= 0:
            return []
        try:
            return lab.problems("calibration", n)
        except ThriftyError as error:
            lab.progress.say(f"no strength will be chosen: {error}")
            return []

    # ---- chains -------------------------------------------------------------------------------------

    def _short_chains(self, lab: Lab, train: Sequence[Problem]) -> list[Chain]:
        """Short correct chains of the training problems, from ``short_from``."""
        if self.short_from == "gold":
            chains = [
                Chain(p, str(p.meta["chain"]), p.answer, source="gold")
                for p in train
                if p.answer and p.meta.get("chain")
            ]
            remedy = "the task has no reference chains: use --short-from compress, or --short-from MODEL"
        elif self.short_from == "compress":
            own = lab.chains(lab.solve("own-chains", self.sampler, train), "own")
            compressor = registry.load("key-steps")()
            chains = [c for c in compressor.compress(own, lab.context(random.Random(lab.seed))) if c is not None]
            remedy = "the model solved none of the training problems: give an easier task or a longer --max-tokens"
        elif self.short_from == "random":
            own = lab.chains(lab.solve("own-chains", self.sampler, train), "own")
            rng, gold = random.Random(lab.seed), {p.id: p.meta.get("chain") for p in train}
            sizes = [len(str(gold[c.problem.id] or "")) for c in own]
            chains = [
                replace(c, thought=drop(c.thought, n, rng), source="random")
                for c, n in zip(own, sizes, strict=True)
                if n
            ]
            remedy = "the task has no reference chains, or the model solved none of its problems"
        else:
            chains = lab.chains(
                lab.solve("short-chains", self.sampler, train, lab.engine(self.short_from)), self.short_from
            )
            remedy = f"{self.short_from} solved none of the training problems"
        if not chains:
            raise ThriftyError(f"no short chains to train on ({self.short_from} over {len(train)} problems): {remedy}")
        lab.progress.say(f"{len(chains)} short chains from {self.short_from}")
        return chains

    def _mixchain(self, lab: Lab, train: Sequence[Problem]) -> list[list[Chain]]:
        """Per question its correct chains, longest first, at least two of different length."""
        short: list[Chain] = []
        if self.mixchain == "c":
            short = self._short_chains(lab, train)
            first = self.tune(lab, "valve-first", self.shuffled(lab, tokens(lab, short)))
            engine = lab.engine(adapter=first)
            sampled = [
                lab.solve(f"mixchain-{a:g}", self.sampler, train, engine, {ADAPTER: a}, seed=lab.seed + 1 + i)
                for i, a in enumerate(self.mix_alphas)
            ]
        else:
            sampled = []
            for i, alpha in enumerate(self.mix_alphas):
                between = _between(lab, self.short_from, alpha)
                run = lab.solve(f"mixchain-{alpha:g}", self.sampler, train, lab.engine(between), seed=lab.seed + 1 + i)
                sampled.append(run)
        made = [
            chain
            for outcomes, alpha in zip(sampled, self.mix_alphas, strict=True)
            for chain in lab.chains(outcomes, f"alpha {alpha:g}")
        ]
        by_problem: dict[str, list[tuple[int, Chain]]] = {}
        tokenizer = lab.loaded().tokenizer
        for chain in [*made, *short]:
            size = len(tokenizer(chain.thought, add_special_tokens=False)["input_ids"])
            by_problem.setdefault(chain.problem.id, []).append((size, chain))
        groups = []
        for pairs in by_problem.values():
            lengths = [length for length, _ in pairs]
            if min(lengths) < max(lengths):
                betas = strengths(lengths)
                group = [(length, replace(chain, strength=b)) for (length, chain), b in zip(pairs, betas, strict=True)]
                groups.append([chain for _, chain in sorted(group, key=lambda pair: -pair[0])])
        if not groups:
            raise ThriftyError("MixChain is empty: no training problem has correct chains of two lengths")
        lab.progress.say(f"MixChain: {sum(map(len, groups))} chains of {len(groups)} questions")
        return groups

    # ---- training -----------------------------------------------------------------------------------

    def _mixed_source(self, lab: Lab, groups: Sequence[Sequence[Chain]]) -> Any:
        if self.tuning == "++":
            chains = [chain for group in groups for chain in group]
            return self.shuffled(lab, tokens(lab, chains))
        # +P trains one LoRA at strength 1 throughout; only the targets get shorter.
        longest = max(map(len, groups))
        parts = []
        for rank in range(longest):
            share = [replace(g[min(rank * len(g) // longest, len(g) - 1)], strength=1.0) for g in groups]
            parts.append(self.shuffled(lab, tokens(lab, share)))
        return Progressive(parts, self.steps)

    # ---- around it ----------------------------------------------------------------------------------

    def check(self, lab: Lab) -> None:
        super().check(lab)
        if self.calibration_n < 0:
            raise ThriftyError(f"--calibration-n is {self.calibration_n}: give 0 or more")
        if self.tuning not in ("plain", "++", "+p"):
            raise ThriftyError(f"tuning is {self.tuning!r}; choose plain, ++ or +p")
        if self.mixchain not in ("c", "z"):
            raise ThriftyError(f"mixchain is {self.mixchain!r}; choose c or z")
        if self.mixchain == "z" and self.tuning != "plain" and self.short_from in OWN:
            raise ThriftyError("MixChain-Z samples along the difference of two models: give --short-from MODEL")
        if self.mixchain == "z" and self.tuning == "plain":
            raise ThriftyError(
                "--mixchain z is how MixChain is made, which plain tuning has none of: give --tuning ++ or +p"
            )
        for name in (self.short_from, self.reference):
            if name is not None and name not in OWN:
                lab.loaded(name)  # a wrong name is told before any work
        for alphas in (self.alphas, self.mix_alphas):
            if not alphas or any(not np.isfinite(a) for a in alphas):
                raise ThriftyError(f"alphas must be numbers, at least one, not {alphas}")
        if len({_name(a) for a in self.alphas}) < len(self.alphas):
            raise ThriftyError(f"alphas must differ: {', '.join(f'{a:g}' for a in self.alphas)}")

    def _reference(self, lab: Lab) -> str | None:
        if self.reference or self.short_from not in OWN:
            return self.reference or self.short_from
        student, _, seed = lab.model.partition("-")
        if student == "long":
            from thrifty.assets import NAMES

            twin = f"short-{seed}" if seed else "short"
            return twin if twin in NAMES else None
        return None


def strengths(lengths: Sequence[int]) -> list[float]:
    """beta = 1 - (m - m_min) / (m_max - m_min) for the chains of one question (CoT-Valve++)."""
    low, high = min(lengths), max(lengths)
    return [1.0 if high == low else 1 - (m - low) / (high - low) for m in lengths]


class Progressive:
    """A source that goes through other sources one after the other, an equal share of the steps each."""

    def __init__(self, parts: Sequence[Shuffled], steps: int) -> None:
        self.parts, self.steps = parts, steps

    def next(self, step: int, feedback: Mapping[str, float]) -> list[Example]:
        return self.parts[min(step * len(self.parts) // self.steps, len(self.parts) - 1)].next(step, feedback)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def _name(alpha: float) -> str:
    return "long (α = 0)" if alpha == 0 else f"α = {alpha:g}"


def _long(settings: Sequence[Setting]) -> Setting:
    """The model as it was."""
    return next(s for s in settings if s.alpha == 0)


def _between(lab: Lab, short: str, alpha: float) -> Loaded:
    """The model with weights theta + alpha (theta_short - theta)."""
    import copy

    here, there = lab.loaded(), lab.loaded(short)
    mine, theirs = here.model.state_dict(), there.model.state_dict()
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
        raise ThriftyError(f"MixChain-Z needs two models of one architecture: {lab.model} and {short} differ in shape")
    model = copy.deepcopy(here.model)
    model.load_state_dict({k: v + alpha * (theirs[k] - v) if v.is_floating_point() else v for k, v in mine.items()})
    return wrap(model, here.tokenizer, f"{lab.model} + {alpha:g} ({short} - {lab.model})")


def claim(trial: Any) -> dict[str, Any]:
    """New tokens and accuracy at strength 1 and new tokens at 1/2, against the student as it is."""
    problems, sampler = trial.problems(), SinglePass()
    if trial.arm == "comparator":
        tokens_long, right = _measured(trial.solve(sampler, problems))
        trial.gate("accuracy of the student", float(np.mean(right)))
        at_half = trial.other["from 0 to 1/2"]
        return {"tokens": tokens_long, "accuracy": right, "from 0 to 1/2": tokens_long, "from 1/2 to 1": at_half}
    given = trial.method
    method = replace(given, train_n=trial.scaled(given.train_n), steps=trial.scaled(given.steps))

    def make(folder: Path) -> None:
        lab = trial.lab()
        lab.folder = folder
        method.tuned(lab)

    valve = trial.once("valve", make, method) / "stages" / "valve"
    trial.trained(valve)
    adapter, found = valve / "adapter", {}
    for alpha in (0.25, 0.75, 1.25, 0.5, 1.0):  # the first three are secondary, on fewer problems
        few = problems if alpha in (0.5, 1.0) else problems[:150]
        found[alpha] = _measured(trial.solve(sampler, few, adapter=adapter, alpha=alpha))
        trial.note(f"tokens at {alpha:g}", float(np.mean(found[alpha][0])))
        trial.note(f"accuracy at {alpha:g}", float(np.mean(found[alpha][1])))
    (full, right), (half, _) = found[1.0], found[0.5]
    return {"tokens": full, "accuracy": right, "from 0 to 1/2": half, "from 1/2 to 1": full}


def _measured(outcomes: Sequence[Any]) -> tuple[list[int], list[float]]:
    return [o.usage.generated for o in outcomes], [float(o.grade.right) for o in outcomes]
