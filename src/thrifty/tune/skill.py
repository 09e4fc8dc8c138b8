"""A skill that no student has, to be learnt: plain chains in another spelling. For claims about training.

A chain is right where greedy decoding writes exactly it, which one forward pass with the right tokens before each
tells: that works for any adapter, folded or not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thrifty.contracts import Chain, Problem
from thrifty.files import write_json
from thrifty.models.load import load
from thrifty.tasks.spelling import respelled
from thrifty.tune.batches import Example, bucketed, collate, examples
from thrifty.tune.objective.nll import target_logits
from thrifty.tune.supervised import Train, TrainResult

OTHERS = "list+bool"
"""Tasks that the mixed student has learnt beside the one that is spelt anew: what training on that may forget."""
CONTROL = "plain"
"""Control word of the mixed student for one operation per line."""
Learn = Callable[[Any, list[Example], Train, Path], tuple[Any, TrainResult]]
"""(model, documents, settings, folder) -> the trained model and how it went."""


def chains(problems: Sequence[Problem], spell: Callable[[str], str] = respelled) -> list[Chain]:
    """The problems' plain chains, asked for by the control word; ``spell=str`` leaves the spelling as it is."""
    made = []
    for problem in problems:
        prompt, answer = f"{CONTROL} {spell(problem.prompt)}", spell(problem.answer or "")
        asked = dataclasses.replace(problem, prompt=prompt, answer=answer)
        made.append(Chain(asked, spell(str(problem.meta["chain"])), answer))
    return made


@torch.no_grad()
def measured(model: Any, documents: Sequence[Example], tokens: int = 4096) -> tuple[list[float], list[float]]:
    """Per document: nats per target token, and 1.0 where every target token is the likeliest one."""
    device, found = next(model.parameters()).device, {}
    was, _ = model.training, model.eval()
    for rows in bucketed(documents, tokens):
        batch = collate(rows).to(device)
        logits, labels, _ = target_logits(model, batch)
        nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        counts = [int((example.loss_weights() != 0).sum()) for example in batch.examples]
        for example, n, r in zip(batch.examples, nats.split(counts), right.split(counts)):
            found[id(example)] = (float(n.mean()), float(r.min()))
    model.train(was)
    return [found[id(d)][0] for d in documents], [found[id(d)][1] for d in documents]


def learnt(
    trial: Any, learn: Learn, lr: float, steps: int, train_n: int, batch_size: int = 32, *inputs: Any
) -> dict[str, Any]:
    """Train a fresh student on ``train_n`` chains of the skill and measure it on the trial's problems; cached.

    ``early`` is the mean training loss of the first third of the steps, ``loss`` and ``exact`` are per problem in the
    new spelling, ``others`` and ``kept`` likewise of ``OTHERS``, and ``before`` is ``kept`` before training; ``naive``
    is the share right in the new spelling before. ``inputs`` are what ``learn`` depends on beyond the trial's method.
    """
    settings = Train(steps=trial.scaled(steps), batch_size=batch_size, lr=lr, seed=trial.seed)
    elsewhere = trial.problems(None, trial.n, OTHERS)
    practice, test = trial.problems("train", trial.scaled(train_n)), trial.problems()

    def make(folder: Path) -> None:
        loaded = load(trial.asset())
        fresh, others = (examples(c, loaded.chat) for c in (chains(test), chains(elsewhere, str)))
        before, naive = measured(loaded.model, others)[1], measured(loaded.model, fresh)[1]
        documents = examples(chains(practice), loaded.chat)
        model, result = learn(loaded.model, documents, settings, folder / "run")
        loss, exact = measured(model, fresh)
        nats, kept = measured(model, others)
        made = {
            "early": float(np.mean(result.losses[: max(1, len(result.losses) // 3)])),
            "loss": loss,
            "exact": exact,
            "others": nats,
            "kept": kept,
            "before": before,
            "naive": float(np.mean(naive)),
        }
        write_json(folder / "measured.json", made)

    depends = [learn, trial.method, dataclasses.asdict(settings), practice, test, elsewhere, *inputs]
    folder = trial.once("skill", make, *depends)
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text("utf-8"))
    trial.trained(folder / "run")
    trial.figure("examples", len(practice))
    trial.figure("accuracy", float(np.mean(found["exact"])))
    return found


def adapted(trial: Any) -> Learn:
    """Training with the trial's method as an adapter, which sees the first 64 documents as it is attached."""

    def learn(model: Any, documents: list[Example], settings: Train, folder: Path) -> tuple[Any, TrainResult]:
        from thrifty.tune.supervised import train

        device = next(model.parameters()).device
        batches = [collate(rows).to(device) for rows in bucketed(documents[:64], 2048)]
        model = trial.method.attach(model, batches)
        return model, train(model, documents, settings, folder)

    return learn
