"""Saves examples: fine-tunes on the tenth of a pool whose questions are hardest and whose chains are longest.

    s_i = weight * rank(difficulty_i) + (1 - weight) * rank(length_i);   keep the ``share`` with the largest s

Ranks are within the pool, from 1 for the smallest, ties share their mean, divided by the pool's size. Length is the
chain's tokens, a cheap sign of rethinking. Difficulty is, by name or as a function of problems and context:

- ``failures``: 1 - the share of right answers among ``k`` that the context's model samples;
- ``level``: the task's own levels, where it has some.

Paper: Yang, Lin et al. 2025, Select2Reason: Efficient Instruction-Tuning Data Selection for Long-CoT Reasoning,
arXiv 2505.17266.
Differs: failures of a model, or levels, in place of an LLM judge and of a reward model trained on failures. That two
ranks are joined by a weight is the paper's; its weight and its scale of ranks could not be read, 1/2 is ours.

>>> joint([0., .5, 1., .5], [30, 10, 20, 40], weight=.5)    # ranks 1 2.5 4 2.5 and 3 1 2 4, of 4
[0.5, 0.4375, 0.75, 0.8125]
>>> best(joint([0., .5, 1., .5], [30, 10, 20, 40], weight=.5), 2)
[2, 3]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thrifty.contracts import Card, Chain, Context, Problem, Sample, Talk, ThriftyError
from thrifty.tasks.spelling import respelled

CARD = Card(
    key="select2reason",
    title="Select2Reason: Efficient Instruction-Tuning Data Selection for Long-CoT Reasoning",
    arxiv="2505.17266",
    year=2025,
    saves=("examples", "latency"),
)
CLAIM = {
    "says": "Of a pool of long chains of a new skill, the tenth chosen by difficulty and length teaches more than a "
    "random choice of as many tokens.",
    "parts": [{"name": "accuracy", "test": "superior", "smallest": 0.05}],
    "settings": {"share": 0.1, "difficulty": "level"},
    "comparator": None,
    "match": "tokens of the chosen documents, passes over them, and so the tokens trained on",
    "student": "long",
    "tasks": ["roll"],
    "n": 250,
    "seeds": 8,
    "unit": "training",
    "grid": {"lr": [1e-3, 2e-3, 4e-3, 8e-3]},
    "gates": {"the skill is new": [None, 0.25], "a random choice teaches some of it": [0.25, 0.9]},
    "amendments": [
        "1: a random choice taught too little, in a spelling with tokens that the student does not know and a LoRA "
        "cannot learn; now in tokens that it knows; and both arms took an end of two rates; now four"
    ],
}


@dataclass(frozen=True)
class Select2Reason:
    share: float = field(default=0.1, metadata={"help": "share of the pool that is kept"})
    weight: float = field(default=0.5, metadata={"help": "of difficulty; the rest is that of length"})
    difficulty: str | Callable[[Sequence[Problem], Context], list[float]] = field(
        default="failures", metadata={"help": "failures or level; or a function of problems and context"}
    )
    k: int = field(default=4, metadata={"help": "samples per question, for failures"})
    temperature: float = field(default=0.7, metadata={"help": "at which they are sampled"})

    def select(self, chains: Sequence[Chain], ctx: Context) -> list[int]:
        """Indices of the chains to train on, ascending; none of an empty pool.

        Raises ThriftyError for settings out of range, and where the context cannot tell the difficulty.
        """
        if not 0 < self.share <= 1 or not 0 <= self.weight <= 1 or self.k < 1:
            raise ThriftyError(f"select2reason has {self}: give 0 < share <= 1, 0 <= weight <= 1 and k >= 1")
        if not chains:
            return []
        problems = {chain.problem.id: chain.problem for chain in chains}
        values = self._difficulty(list(problems.values()), ctx) if self.weight else [0.0] * len(problems)
        hard = dict(zip(problems, values, strict=True))
        lengths = [_length(chain, ctx.tokenizer) for chain in chains]
        scores = joint([hard[chain.problem.id] for chain in chains], lengths, self.weight)
        return best(scores, max(1, round(self.share * len(chains))))

    def _difficulty(self, problems: Sequence[Problem], ctx: Context) -> list[float]:
        if callable(self.difficulty):
            return self.difficulty(problems, ctx)
        if self.difficulty == "level":
            return [float(p.level) for p in problems]
        if self.difficulty != "failures":
            raise ThriftyError(f"select2reason has difficulty {self.difficulty!r}: give failures, level or a function")
        if ctx.solve is None or ctx.task is None:
            raise ThriftyError(
                "select2reason samples answers to tell which questions are hard: give a context with a task and a way "
                "to solve, or difficulty='level'"
            )
        failed = []
        for outcome in ctx.solve(_Samples(self.k, self.temperature), problems):
            responses = [t.response if t.complete else "" for t in outcome.tried]
            right = sum(ctx.task.grade(outcome.problem, response).right for response in responses)
            failed.append(1 - right / max(1, len(responses)))
        return failed


def joint(difficulty: Sequence[float], length: Sequence[float], weight: float) -> list[float]:
    """The score of each chain: the weighted mean of its two ranks within the pool, in (0, 1]."""
    return [weight * d + (1 - weight) * n for d, n in zip(ranks(difficulty), ranks(length), strict=True)]


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from the smallest, ties at their mean, divided by how many there are.

    >>> ranks([7, 3, 7, 9])
    [0.625, 0.25, 0.625, 1.0]
    """
    from scipy.stats import rankdata

    return [float(rank) / len(values) for rank in rankdata(values)]


def best(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the ``count`` largest scores, ascending; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def _length(chain: Chain, tokenizer: Any) -> int:
    """Tokens of the thought; words where there is no tokenizer."""
    if tokenizer is None:
        return len(chain.thought.split())
    return len(tokenizer(chain.thought, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class _Samples:
    k: int
    temperature: float

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        return (yield Sample(problem.prompt, n=self.k, temperature=self.temperature))[0]


def _new(problem: Problem) -> Problem:
    return replace(problem, prompt=respelled(problem.prompt), answer=respelled(problem.answer or ""))


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy in a spelling that the student has never seen, after ten passes over the chosen chains."""
    from thrifty import registry
    from thrifty.tasks import tracing

    task, lab, pool = trial.task(), trial.lab(), []
    for problem in trial.problems("train", trial.scaled(2500)):
        steps = task.trace(problem, tracing.style("long"), random.Random(f"{trial.seed}|{problem.id}"))
        pool.append(Chain(_new(problem), respelled(tracing.text_of(steps)), respelled(problem.answer)))
    ctx = Context(task=task, rng=trial.rng, tokenizer=lab.loaded().tokenizer)
    size = [_length(c, ctx.tokenizer) + _length(replace(c, thought=c.problem.prompt), ctx.tokenizer) for c in pool]
    if trial.arm == "method":
        chosen = trial.method.select(pool, ctx)
    else:  # at random, as many tokens as the method chooses
        left = sum(size[i] for i in Select2Reason(**trial.claim.settings).select(pool, ctx))
        chosen, order = [], trial.rng.sample(range(len(pool)), len(pool))
        for i in order:
            if left >= size[i] / 2:
                chosen.append(i)
                left -= size[i]
    steps = max(1, trial.scaled(10) * len(chosen) // 16)
    recipe = registry.load("sft")(rank=32, lr=trial.pick["lr"], train_batch_size=16, steps=steps)

    def make(folder: Path) -> None:
        fresh = trial.lab()
        fresh.folder = folder
        recipe.tuned(fresh, [pool[i] for i in chosen])

    folder = trial.once("sft", make, recipe, [[pool[i].problem, pool[i].thought] for i in chosen])
    passes, problems = registry.load("single-pass")(), [_new(p) for p in trial.problems()]
    found = trial.solve(passes, problems, adapter=folder / "stages" / "sft" / "adapter")
    right = [float(o.grade.right) for o in found]
    trial.note("chosen chains", len(chosen))
    trial.note("chosen tokens", sum(size[i] for i in chosen))
    if trial.arm == "comparator":
        before = trial.solve(passes, problems[:100])
        trial.gate("the skill is new", sum(o.grade.right for o in before) / len(before))
        trial.gate("a random choice teaches some of it", sum(right) / len(right))
    return {"accuracy": right}
