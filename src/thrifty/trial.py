"""What a claim is made of: one arm in one unit, with everything that it runs cached by content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import assets, evidence, tasks
from thrifty.contracts import Outcome, Problem, Split, Task, ThriftyError
from thrifty.engines.meter import active_parameters
from thrifty.evidence import Claim, digest
from thrifty.lab import ADAPTER, Lab
from thrifty.models.load import load
from thrifty.progress import Progress
from thrifty.tune import checkpoint
from thrifty.tune.answers import Samples

POOL = 2000
"""Problems of the shared bank per student, of which every claim takes its own."""
BLOCK = 50
"""Problems of the bank that are sampled together."""
DEV = 200
"""Development problems on which a grid is tuned."""


@dataclass
class Trial:
    """One arm in one unit. ``method`` is the object to use, whatever control is in force."""

    claim: Claim
    arm: str
    """"method" or "comparator": for what only one of them does."""
    unit: int
    """Which student, or which training seed."""
    scale: str
    cache: Path
    secret: str
    """What the test problems follow from: the hash of a registered claim and its code."""
    dev: bool = False
    """Development problems and seeds, not those of the confirm run."""
    tuning: bool = False
    stream: int = 0
    """Which sampling and training streams: an A/A run compares two of them on the same problems."""
    pick: Mapping[str, Any] = field(default_factory=dict)
    """The tuned point of the claim's grid."""
    other: Mapping[str, Any] | None = None
    """What the method arm returned in this unit, for a comparator that has to match it; None in the method arm."""
    progress: Progress = field(default_factory=Progress)
    method: Any = None
    gates: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    strata: list[str] = field(default_factory=list)
    """Task and level of the problems that the claim was last given as its own."""
    own: list[str] = field(default_factory=list)
    """The ids of these problems."""
    figures: dict[str, float] = field(default_factory=dict)
    """What the arm was like and cost, for the board: see ``figure``."""
    looks: list[tuple[list[float], dict[str, float]]] = field(default_factory=list)
    """What was right at each look at the claim's own problems, and the arm's figures by it."""

    @property
    def n(self) -> int:
        """Test problems of a unit at this scale."""
        n = max(min(16, self.claim.n), round(self.claim.n * self.claim.factor(self.scale, "n")))
        return min(n, DEV) if self.tuning else n

    def scaled(self, work: int) -> int:
        """Optimiser steps, training problems and the like: as registered, and a twentieth of it in a smoke run."""
        return max(2, round(work * self.claim.factor(self.scale, "work")))

    @property
    def seed(self) -> int:
        """Of training, training problems and sampling: the same for all claims, so that they share baselines.

        A claim that was amended has others, since it was amended by what the first ones gave.
        """
        return self._shared + 1_000_003 * self.stream

    @property
    def _shared(self) -> int:
        return _seed("dev" if self.dev else "unit", self.unit, *self._amended)

    @property
    def _amended(self) -> list[int]:
        return [len(self.claim.amendments)] if self.claim.amendments else []

    @property
    def fresh(self) -> int:
        """The seed of the test problems: this claim's own."""
        return _seed("dev" if self.dev else self.secret, self.unit)

    @property
    def rng(self) -> random.Random:
        return random.Random(self.seed)

    def asset(self, name: str | None = None) -> str:
        """Folder of the student called ``name`` (none: the claim's): this unit's own where there are several."""
        name = name or self.claim.student or ""
        if Path(name).is_dir():
            return name
        which = self.unit if self.claim.unit == "student" else self.unit % self.claim.students
        return str(assets.find(f"{name}-{which}" if which else name))

    def task(self, name: str | None = None) -> Task:
        return _task(name or "+".join(self.claim.tasks))

    def problems(self, split: Split | None = None, n: int | None = None, task: str | None = None) -> list[Problem]:
        """Without arguments the claim's own: fresh test problems, development ones where it is tried out.

        Of the splits ``train`` and ``calibration`` all claims get the same ones in a unit. ``n`` is used as it is: put
        ``scaled`` around what a smoke run should have less of.
        """
        seed = self._shared if split in ("train", "calibration") else self.fresh
        where: Split = split or ("dev" if self.dev else "test")
        found = self.task(task).problems(where, n or self.n, seed, None if task else self.claim.levels)
        if len(found) < (n or self.n):
            name = task or "+".join(self.claim.tasks)
            raise ThriftyError(f"{name} has only {len(found)} {where} problems of {n or self.n}: lower n")
        if split is None and n is None and task is None:
            self._measured_on(found)
        return found

    def lab(self, model: str | None = None, task: str | None = None) -> Lab:
        """A lab in the cache, for whatever a trial lacks. Its test problems are not the claim's: see ``problems``."""
        model = model or self.asset()
        folder = self.cache / digest(fingerprint(Path(model)), evidence.lab_hash())
        return Lab(folder, model, self.task(task), n=self.n, seed=self.seed, progress=self.progress)

    def solve(
        self,
        strategy: Any,
        problems: Sequence[Problem],
        model: str | None = None,
        adapter: Path | None = None,
        alpha: float = 1.0,
        budget: int | None = None,
        task: str | None = None,
    ) -> list[Outcome]:
        """Outcomes of a strategy on a student (none: the claim's), with a LoRA at strength ``alpha``; cached."""

        def run(strategy: Any) -> list[Outcome]:
            lab = self.lab(model, task)
            asked = fingerprint([strategy, problems, adapter, alpha, budget, lab.task.name])
            stage = f"{type(strategy).__name__}-{digest(asked, lab.seed)}"
            strengths = {ADAPTER: alpha} if adapter else None
            return lab.solve(stage, strategy, problems, lab.engine(adapter=adapter), strengths, budget=budget)

        if hasattr(strategy, "prepare"):
            strategy = strategy.prepare(problems, run)
        found = run(strategy)
        found = [strategy.settle(o) for o in found] if hasattr(strategy, "settle") else found
        if [p.id for p in problems] == self.own:
            self.answered(found)
        return found

    def bank(
        self, k: int, model: str | None = None, temperature: float = 0.7, top_p: float = 0.95
    ) -> tuple[list[Problem], list[list[Outcome]]]:
        """The claim's problems, and of each ``k`` graded samples by the student as it is.

        The pool of problems is the same for all claims on these tasks and levels, amended as often, and so are the
        samples; which blocks of it a claim takes follows from its hash.
        """
        task, seed = self.task(), _seed("bank", self.unit, *self._amended)
        pool = task.problems("dev" if self.dev else "test", POOL, seed, self.claim.levels)
        blocks = [pool[i : i + BLOCK] for i in range(0, len(pool), BLOCK)]
        random.Random(self.fresh).shuffle(blocks)
        problems: list[Problem] = []
        samples: list[list[Outcome]] = []
        while len(problems) < self.n and blocks:
            block = blocks.pop()
            for o in self.solve(Samples(k, temperature, top_p=top_p), block, model):
                graded = [(t, task.grade(o.problem, t.response if t.complete else "")) for t in o.tried]
                samples.append([Outcome(o.problem, t, grade, [t], t.usage) for t, grade in graded])
            problems += block
        if len(problems) < self.n:
            raise ThriftyError(f"the bank has {len(problems)} problems of {self.n} a student: lower n")
        self._measured_on(problems[: self.n])
        return problems[: self.n], samples[: self.n]

    def once(self, name: str, make: Callable[[Path], None], *inputs: Any, model: str | None = None) -> Path:
        """A folder that ``make`` fills, cached by student, task, levels, seed, ``inputs`` and the code of its file.

        Name everything else it depends on in ``inputs`` (methods, settings, chains, folders): the rest is not seen.
        """
        lab = self.lab(model)
        return lab.once(f"{name}-{digest(fingerprint([make, *inputs, lab.task, self.claim.levels]), lab.seed)}", make)

    def gate(self, name: str, value: float) -> None:
        """A measured precondition; the claim registers its bounds."""
        if name not in self.claim.gates:
            raise ThriftyError(f"gate '{name}' is not registered in CLAIM: {', '.join(self.claim.gates) or 'none is'}")
        self.gates[name] = float(value)

    def note(self, name: str, value: float) -> None:
        """A secondary figure: printed and kept, without a verdict."""
        self.notes[name] = float(value)

    def figure(self, name: str, value: float) -> None:
        """A figure of the arm that every method may have, so that the board can compare them: means per problem.

        Names that it knows: accuracy, thought_tokens, generated_tokens, flops, seconds; and of the arm's whole training
        trained_parameters, examples, training_tokens, training_flops, training_seconds.
        """
        self.figures[name] = float(value)

    def trained(self, folder: Path) -> None:
        """Figures of the training that ``tune.supervised`` or ``tune.rollout`` left in ``folder``."""
        for name, value in checkpoint.cost(folder).items():
            self.figure(name, value)

    def answered(self, outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
        """``tokens`` generated (at least 1, as a ratio needs) and ``accuracy``: per problem, as most claims return.

        They become the arm's figures. ``solve`` does that too where it is given the claim's own problems. FLOPs are 2
        per parameter of the claim's student and token read or generated, as the meter counts them.
        """
        usages = [o.usage for o in outcomes]
        right = [float(o.grade.right) for o in outcomes]
        figures = {
            "accuracy": float(np.mean(right)),
            "thought_tokens": float(np.mean([u.thought for u in usages])),
            "generated_tokens": float(np.mean([u.generated for u in usages])),
            "flops": 2.0 * _parameters(self.asset()) * float(np.mean([u.prompt + u.generated for u in usages])),
            "seconds": float(np.mean([u.seconds for u in usages])),
        }
        self.figures |= figures
        self.looks.append((right, figures))
        return {"tokens": [float(max(1, u.generated)) for u in usages], "accuracy": right}

    def settle(self, got: Mapping[str, Any]) -> None:
        """Figures by the answers that the claim returned, where it looked at others afterwards, for a gate say."""
        for right, figures in self.looks:
            if np.array_equal(right, got.get("accuracy", ())):
                self.figures |= figures

    def elsewhere(self, strategy: Any, task: str = "rg:string_splitting", **how: Any) -> None:
        """Notes what the arm comes to on a family whose chains are not ours, as every claim to save tokens reports."""
        outcomes = self.solve(strategy, self.problems(n=self.scaled(90), task=task), task=task, **how)
        self.note(f"{task}: accuracy", float(np.mean([o.grade.right for o in outcomes])))
        self.note(f"{task}: generated tokens", float(np.mean([o.usage.generated for o in outcomes])))

    def _measured_on(self, problems: Sequence[Problem]) -> None:
        self.strata = [f"{p.task}/{p.level}" for p in problems]
        self.own = [p.id for p in problems]


_task = functools.cache(tasks.load)
"""A file's task reads the whole file once; a run asks for its task a dozen times."""


@functools.cache
def _parameters(model: str) -> int:
    return active_parameters(load(model).model)


def _seed(*parts: Any) -> int:
    return int(digest(*parts), 16) % 2**31


def fingerprint(value: Any) -> Any:
    """JSON that says what ``value`` is by content: methods by source and settings, folders and arrays by bytes."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Problem):
        return [value.id, value.prompt, value.answer]
    if isinstance(value, Path):
        files = sorted(p for p in value.rglob("*") if p.suffix in (".json", ".jinja", ".safetensors", ".parquet"))
        return [[p.name, hashlib.sha256(p.read_bytes()).hexdigest()] for p in (files if value.is_dir() else [value])]
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(v) for v in value]
    if hasattr(value, "detach") or isinstance(value, np.ndarray):
        array = value if isinstance(value, np.ndarray) else value.detach().cpu().float().numpy()
        return [array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: fingerprint(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [type(value).__qualname__, _source(type(value)), fields]
    if hasattr(value, "grade") and hasattr(value, "problems"):
        return [value.name, _source(type(value))]
    if isinstance(value, functools.partial):
        return [fingerprint(part) for part in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):  # a function, a class, or a method and what it is bound to
        bound = [fingerprint(value.__self__)] if isinstance(value, types.MethodType) else []
        return [value.__qualname__, _source(value), *bound]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    raise ThriftyError(f"a {type(value).__qualname__} has no fingerprint: give trial.once what it was made from")


def _source(thing: Any) -> str:
    file = getattr(sys.modules.get(getattr(thing, "__module__", "")), "__file__", None)
    return evidence.code_hash(Path(file)) if file and file.endswith(".py") else ""
