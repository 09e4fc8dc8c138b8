"""Saves examples: fine-tunes on the model's own answers where they are right, and on the gold chain only elsewhere.

For every question x with its gold chain y, and a judge J that compares answers:

    1. y' = M(x), greedy;            if J(y', y) is true take (x, y')
    2. y" = M(x, y, "rewrite it");   if J(y", y) is true take (x, y")
    3. otherwise                     take (x, y)

then ordinary fine-tuning. What a model would have written itself moves its weights less, so that it forgets less.
``pool`` has the model write the candidates, ``select`` chooses one chain per question.

Paper: Gupta, Nandwani et al. 2025, Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language
Models, arXiv 2502.08130.
Differs: the judge is the task's checker, not a language model; the words that ask for a rewriting are ours.

>>> from thrifty.contracts import Chain, Problem
>>> p, q, r = (Problem(str(i), f"1 + {i}?", str(1 + i)) for i in range(3))
>>> pool = [Chain(p, "gold", "1"), Chain(q, "gold", "2"), Chain(r, "gold", "3"),
...         Chain(p, "own", "1", source="own"), Chain(q, "own", "5", source="own"), Chain(r, "own", "7", source="own"),
...         Chain(q, "again", "2", source="rewritten"), Chain(r, "again", "8", source="rewritten")]
>>> S3FT().choose(pool, lambda chain: chain.response == chain.problem.answer)     # gold of r, own of p, rewritten of q
[2, 3, 6]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thrifty.contracts import Card, Chain, Context, Problem, Sample, Talk, ThriftyError

CARD = Card(
    key="s3ft",
    title="Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
    arxiv="2502.08130",
    year=2025,
    saves=("examples",),
)
CLAIM = {
    "says": "Tuned on its own right answers, and on gold chains of another style only where it has none, a model is as "
    "good at the task as one tuned on gold alone, and forgets less of others.",
    "parts": [
        {"name": "target", "test": "non-inferior", "margin": 0.03},
        {"name": "others", "test": "superior", "smallest": 0.03},
    ],
    "settings": {"prefer": ("own",)},
    "comparator": {"prefer": ()},
    "match": "questions, optimiser steps, examples per step and learning rate",
    "student": "long",
    "tasks": ["roll"],
    "levels": [2, 3],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "gates": {"own answers taken": [0.2, 0.95], "gold alone forgets": [0.06, None]},
    "amendments": [
        "1: gold forgot less than the gate asks, and each arm had a rate of its own, tuned on the task alone, while "
        "forgetting goes by the rate; now one rate for both, and 120 steps where there were 80",
    ],
}
OTHERS = "list+bool+rg:string_splitting"


@dataclass(frozen=True)
class S3FT:
    prefer: tuple[str, ...] = field(
        default=("own", "rewritten"),
        metadata={"help": "sources taken where the judge accepts them, the first first; none is plain fine-tuning"},
    )
    rewrite: str = field(
        default="Rewrite this solution in your own words. Keep every step that is needed, and the final answer.",
        metadata={"help": "what asks the model for a rewriting of the gold chain above it"},
    )

    def select(self, chains: Sequence[Chain], ctx: Context) -> list[int]:
        """One index per question, ascending: by source as ``prefer`` says, any other source is taken for gold.

        Of several chains of a source the first that counts; a question without any is left out.
        """

        def right(chain: Chain) -> bool:
            if ctx.task is None:
                raise ThriftyError("s3ft asks a task's checker which answers are right: give a context with a task")
            return ctx.task.grade(chain.problem, chain.response).right

        return self.choose(chains, right)

    def choose(self, chains: Sequence[Chain], right: Callable[[Chain], bool]) -> list[int]:
        """As ``select``, with a judge of one's own."""
        by_problem: dict[str, list[int]] = {}
        for i, chain in enumerate(chains):
            by_problem.setdefault(chain.problem.id, []).append(i)
        chosen = []
        for members in by_problem.values():
            sources = [[i for i in members if chains[i].source == source] for source in self.prefer]
            accepted = (i for group in sources for i in group if right(chains[i]))
            gold = (i for i in members if chains[i].source not in ("own", "rewritten"))
            found = next(accepted, next(gold, None))
            if found is not None:
                chosen.append(found)
        return sorted(chosen)

    def pool(self, gold: Sequence[Chain], ctx: Context) -> list[Chain]:
        """The gold chains, what the context's model answers itself, and rewritings where that is not right."""
        if ctx.solve is None or ctx.task is None:
            raise ThriftyError("s3ft has the model answer: give a context with a task and a way to solve")
        pool, open_ = list(gold), list(gold)
        if "own" in self.prefer:
            own = []
            for chain, reply in zip(gold, self._ask([c.problem for c in gold], ctx), strict=True):
                if reply is not None and reply.complete:
                    own.append(Chain(chain.problem, reply.thought, reply.response, source="own"))
            solved = {c.problem.id for c in own if ctx.task.grade(c.problem, c.response).right}
            pool, open_ = pool + own, [c for c in gold if c.problem.id not in solved]
        if "rewritten" in self.prefer and open_:
            asked = [replace(c.problem, prompt="\n\n".join((c.problem.prompt, _text(c), self.rewrite))) for c in open_]
            for chain, reply in zip(open_, self._ask(asked, ctx), strict=True):
                answer = None if reply is None or not reply.complete else ctx.task.parse(reply.response)
                if reply is None or answer is None:
                    continue
                # the rewriting is what it says, not what it thought about it
                thought, response = (reply.response, answer) if chain.thought else ("", reply.response)
                pool.append(Chain(chain.problem, thought, response, source="rewritten"))
        return pool

    def _ask(self, problems: Sequence[Problem], ctx: Context) -> list[Any]:
        assert ctx.solve is not None
        return [outcome.chosen for outcome in ctx.solve(_Greedy(), problems)]


def _text(chain: Chain) -> str:
    return " ".join(part for part in (chain.thought, chain.response) if part)


@dataclass(frozen=True)
class _Greedy:
    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        [trace] = yield Sample(problem.prompt, temperature=0.0)
        return trace


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy on the task and on three others after tuning; the gold chains are in the second wording.

    Rewriting is left out: the student cannot be asked for it.
    """
    from thrifty import registry
    from thrifty.tasks import tracing

    task, style, gold = trial.task(), tracing.style("long", "B"), []
    for problem in trial.problems("train", trial.scaled(300)):
        steps = task.trace(problem, style, random.Random(f"{trial.seed}|{problem.id}"))
        gold.append(Chain(problem, tracing.text_of(steps), str(problem.answer), source="gold"))
    ctx = Context(task=task, solve=trial.solve, rng=trial.rng)
    pool = trial.method.pool(gold, ctx)
    chains = [pool[i] for i in trial.method.select(pool, ctx)]
    recipe = registry.load("sft")(rank=16, lr=3e-3, train_batch_size=32, steps=trial.scaled(120))

    def make(folder: Path) -> None:
        lab = trial.lab()
        lab.folder = folder
        recipe.tuned(lab, chains)

    folder = trial.once("sft", make, recipe, [[c.problem, c.thought, c.response] for c in chains])
    adapter, passes = folder / "stages" / "sft" / "adapter", registry.load("single-pass")()
    elsewhere = trial.problems(None, max(6, trial.n * 3 // 4), OTHERS)
    target = [float(o.grade.right) for o in trial.solve(passes, trial.problems(), adapter=adapter)]
    others = [float(o.grade.right) for o in trial.solve(passes, elsewhere, adapter=adapter, task=OTHERS)]
    if trial.arm == "method":
        trial.gate("own answers taken", sum(c.source == "own" for c in chains) / len(gold))
    else:
        before = trial.solve(passes, elsewhere, task=OTHERS)
        trial.gate("gold alone forgets", (sum(o.grade.right for o in before) - sum(others)) / len(before))
    return {"target": target, "others": others}
