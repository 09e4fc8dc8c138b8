"""Plain fine-tuning: a LoRA on right chains of the training problems, all of them or those that a selector chooses.

What every way to make, compress or select chains is measured against, and how a way to train is used on a model of
yours: another adapter, another objective, or a hook that trains part of the model's own weights. Methods are given as
``KEY:NAME=VALUE,NAME=VALUE``:

    thrifty run sft --model DIR --task T --selector select2reason:share=0.2 --adapter pissa:rank=16
    thrifty run sft --model DIR --task T --objective aft-alignment --chains-from own --samples 4
    thrifty run sft --model DIR --task T --hook lift:rank=16
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from thrifty.contracts import Card, Chain, Engine, Outcome, Problem, Strategy, ThriftyError
from thrifty.fields import made, part, split
from thrifty.files import write_json
from thrifty.lab import ADAPTER, Lab, Report, Setting, verdict
from thrifty.recipes._lora import LoraRecipe, tokens
from thrifty.tune.adapter import load_adapter, lora
from thrifty.tune.answers import Samples
from thrifty.tune.batches import Example, bucketed, collate
from thrifty.tune.logprobs import referenced
from thrifty.tune.supervised import NoHook, State, Train, train

CARD = Card(key="sft", title="Plain fine-tuning on chains", saves=(), needs=("adapters",), baseline=True)

PARTS = {
    "selector": ("traces.select", "select"),
    "adapter": ("tune.adapter", "attach"),
    "objective": ("tune.objective", "loss"),
    "hook": ("tune.sparse", "before_step"),
}
"""The fields that name a method: its family and its verb."""
SEEN = 64
"""Documents that an adapter sees as it is attached."""


@dataclass(frozen=True)
class SFT(LoraRecipe):
    chains_from: Literal["gold", "own"] = field(
        default="gold", metadata={"help": "gold (the task's chains) or own (the model's own right ones)"}
    )
    samples: int = field(default=1, metadata={"help": "own chains sampled per training problem"})
    selector: str | None = field(default=None, metadata={"help": "traces.select method, KEY:NAME=VALUE; none: all"})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "tune.adapter method, KEY:NAME=VALUE; none: a plain LoRA. Its rank is its own; seed, lr and warmup "
            "are the run's where it has them and none is given"
        },
    )
    objective: str | None = field(default=None, metadata={"help": "tune.objective method, KEY:NAME=VALUE; none: nll"})
    hook: str | None = field(
        default=None,
        metadata={
            "help": "tune.sparse method, KEY:NAME=VALUE, that trains the model's own weights (--dtype float32 keeps "
            "small updates); none: an adapter"
        },
    )

    def passes(self, n: int) -> dict[str, int]:
        """Chains sampled and trained on, for ``--plan``; a selector's own samples are not foreseen."""
        own = self.train_n * self.samples * (self.chains_from == "own")
        each = self.samples if self._compares else 1
        trained = self.steps * self.train_batch_size * each
        # with a hook: the model, and two checkpoints with up to two moments of each weight
        return {"sampled": own + 2 * n, "trained": trained} | ({"whole": 7} if self.hook else {})

    def run(self, lab: Lab) -> Report:
        self.check(lab)
        test, chains = lab.problems(lab.split, lab.n), self.chains(lab)
        wrong = self._wrong(lab, chains) if self._compares else []
        before = Setting("before", lab.solve("measure-before", self.sampler, test))
        trained = self.tuned(lab, chains, wrong)
        lab.publish(f"sft/{trained.name}", trained.name)
        engine, strengths = self._engine(lab, trained)
        after = Setting("after", lab.solve("measure-after", self.sampler, test, engine, strengths))
        notes = [f"{len(chains)} chains from {self.chains_from}", *self._told(trained), *lab.notes(test)]
        if wrong:
            notes[0] += f", and {len(wrong)} wrong ones"
        return Report([before, after], "before", notes=notes, verdicts=[verdict(after, before, None, self.margin)],
                      margin=self.margin)  # fmt: skip

    # ---- what can be run ----------------------------------------------------------------------------

    def check(self, lab: Lab) -> None:
        super().check(lab)
        if self.chains_from not in ("gold", "own"):
            raise ThriftyError(f"--chains-from is {self.chains_from!r}: choose gold or own")
        if self.samples < 1:
            raise ThriftyError(f"--samples is {self.samples}: give at least 1")
        if self.samples > 1 and self.chains_from == "gold":
            raise ThriftyError(f"--samples is {self.samples}, of the model's own chains: give --chains-from own too")
        for name, (family, verb) in PARTS.items():
            if (text := getattr(self, name)) is not None:
                part(f"--{name}", text, family, verb)
        if self.adapter and self.hook:
            raise ThriftyError(
                f"--hook {self.hook} trains the model's own weights, --adapter {self.adapter} leaves them as they are: "
                "give one of the two"
            )
        rank = next(f.default for f in fields(self) if f.name == "rank")
        if (other := self.adapter or self.hook) and self.rank != rank:
            key = split(other)[0]
            raise ThriftyError(f"--rank is the plain LoRA's, and {key} takes its place: write {key}:rank={self.rank}")
        if self.objective:
            self._check_objective(lab)

    def _check_objective(self, lab: Lab) -> None:
        """Raise ThriftyError where the objective takes no single chains, or not these: it is tried on two."""
        objective, key = self._part("objective"), split(str(self.objective))[0]
        if getattr(objective, "pairs", False):
            raise ThriftyError(
                f"--objective {key} is trained on pairs of chains, and sft has single ones: choose another, such as "
                "masked-thought-mft, or make pairs of the model's own chains with `thrifty run kimi-long2short`"
            )
        if self._compares and self.samples < 2:
            raise ThriftyError(
                f"--objective {key} compares a question's right and wrong chains, which the model writes itself: give "
                "--chains-from own --samples 4 (at least 2)"
            )
        model = lab.loaded().model
        right, wrong = tokens(lab, [Chain(Problem("", "1 + 1", "2"), "1 + 1 = 2", text) for text in ("2", "3")])
        items: Sequence[Any] = self._items(objective, [right], [wrong]) if self._compares else [right]
        if getattr(objective, "needs_reference", False):
            items = referenced(model, items)
        batch = collate([[document] for item in items for document in item.documents]).to(model.device)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                objective.loss(model, batch, 0, objective.modules(model))
            except ThriftyError as error:
                raise ThriftyError(
                    f"--objective {self.objective} cannot train on chains as sft has them: {error}"
                ) from error

    @property
    def _compares(self) -> bool:
        """Whether the objective makes examples of its own of right and wrong chains."""
        return self.objective is not None and hasattr(self._part("objective"), "examples")

    def _part(self, name: str, **run: Any) -> Any:
        """The method of field ``name``; what ``run`` names is the run's where the method has it and none is given."""
        text = getattr(self, name)
        method, given = made(text, PARTS[name][1]), split(text)[1]
        own = {f.name for f in fields(method)} - set(given)
        return replace(method, **{key: value for key, value in run.items() if key in own})

    # ---- chains -------------------------------------------------------------------------------------

    def chains(self, lab: Lab) -> list[Chain]:
        """The chains to train on."""
        train = lab.problems("train", self.train_n)
        if self.chains_from == "own" and self.samples > 1:
            pool = self._sampled(lab, right=True)
        elif self.chains_from == "own":
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

        selector = self._part("selector")
        ctx = replace(lab.context(random.Random(lab.seed)), solve=solve)
        if hasattr(selector, "pool"):
            pool = selector.pool(pool, ctx)
        chosen = [pool[i] for i in selector.select(pool, ctx)]
        lab.progress.say(f"{self.selector} chooses {len(chosen)} of {len(pool)} chains")
        return chosen

    def _sampled(self, lab: Lab, right: bool) -> list[Chain]:
        """The model's own finished chains that are right, or those that are not; equal ones of a problem once."""
        train = lab.problems("train", self.train_n)
        strategy = Samples(self.samples, self.temperature, top_p=self.top_p)
        found: dict[tuple[str, str, str], Chain] = {}
        for outcome in lab.solve("own-samples", strategy, train):
            for trace in outcome.tried:
                if not (outcome.problem.gradable and trace.complete):
                    continue
                if lab.task.grade(outcome.problem, trace.response).right == right:
                    key = (outcome.problem.id, trace.thought, trace.response)
                    found[key] = Chain(outcome.problem, trace.thought, trace.response, source="own")
        return list(found.values())

    def _wrong(self, lab: Lab, chains: Sequence[Chain]) -> list[Chain]:
        """The model's own wrong chains of the problems that ``chains`` are of."""
        solved = {chain.problem.id for chain in chains}
        wrong = [chain for chain in self._sampled(lab, right=False) if chain.problem.id in solved]
        if not wrong:
            raise ThriftyError(
                f"no training problem has both right and wrong chains among {self.samples} of the model's own, so "
                f"{self.objective} has nothing to compare: raise --samples, --train-n or --temperature"
            )
        return wrong

    # ---- training -----------------------------------------------------------------------------------

    def tuned(self, lab: Lab, chains: Sequence[Chain], wrong: Sequence[Chain] = ()) -> Path:
        """Folder of what was trained on the chains, stage "sft" of the lab: an adapter, or with a hook a model.

        ``wrong`` are for an objective that compares. Resumes.
        """
        documents = tokens(lab, chains)
        if not (self.adapter or self.objective or self.hook):
            return self.tune(lab, "sft", self.shuffled(lab, documents))
        objective = self._part("objective") if self.objective else None
        data: Sequence[Any] = documents
        if self._compares:
            data = self._items(objective, documents, tokens(lab, wrong))
        settings = lab.training(self.steps, self.train_batch_size, self.lr)

        def make(folder: Path) -> None:
            loaded = lab.fresh()
            count = _Count(folder / "trained.json", sum(p.numel() for p in loaded.model.parameters()))
            model = loaded.model if self.hook else self._adapted(lab, loaded.model, documents, settings)
            hooks = [self._part("hook", seed=lab.seed), count] if self.hook else [count]
            with lab.progress.bar("sft", self.steps) as bar:
                train(model, self.shuffled(lab, data), settings, folder, objective, hooks, lab.meter,
                      lambda done, of, line: bar.advance(1))  # fmt: skip
            if self.hook:
                loaded.tokenizer.save_pretrained(folder / "model")

        return lab.once("sft", make) / ("model" if self.hook else "adapter")

    def _items(self, objective: Any, right: Sequence[Example], wrong: Sequence[Example]) -> list[Any]:
        """What an objective that compares is trained on: wrong chains are told by their weight, -1."""
        return list(objective.examples([*right, *(replace(document, weight=-1.0) for document in wrong)]))

    def _adapted(self, lab: Lab, model: Any, documents: Sequence[Example], settings: Train) -> Any:
        """``model`` with the adapter to train, which sees some of the ``documents``."""
        if self.adapter is None:
            return lora(model, rank=self.rank, name=ADAPTER, seed=lab.seed)
        warmup = max(1, round(settings.warmup * self.steps))
        adapter = self._part("adapter", seed=lab.seed, lr=settings.lr, warmup=warmup)
        seen = random.Random(lab.seed).sample(list(documents), min(SEEN, len(documents)))
        batches = [collate(rows).to(model.device) for rows in bucketed(seen, settings.tokens)]
        return adapter.attach(model, batches)

    # ---- afterwards ---------------------------------------------------------------------------------

    def _engine(self, lab: Lab, trained: Path) -> tuple[Engine, Mapping[str, float] | None]:
        """An engine with what was trained, and the strengths to solve with.

        An engine turns plain LoRAs; any other adapter is measured as it is served, folded into the model.
        """
        if self.hook:
            return lab.engine(model=str(trained)), None
        if _plain(trained):
            return lab.engine(adapter=trained), {ADAPTER: 1.0}
        loaded = lab.fresh()
        folded = self._part("adapter").fold(load_adapter(loaded.model, trained, name=ADAPTER))
        return lab.engine(model=replace(loaded, model=folded)), None

    def _told(self, trained: Path) -> list[str]:
        """What a report must say of a training that is not the plain one."""
        if not (self.adapter or self.objective or self.hook):
            return []
        count = json.loads((trained.parent / "trained.json").read_text("utf-8"))
        what = self.adapter or self.hook or "a plain LoRA"
        share = count["trained"] / count["of"]
        told = f"{what}: {count['trained']:,} values trained, {share:.2%} of the model's {count['of']:,}"
        if self.objective:
            told += f", with {self.objective}"
        notes = [told]
        if not self.hook and not _plain(trained):
            notes.append(
                f"{split(str(self.adapter))[0]} is no plain LoRA: measured folded into the model; its folder is read "
                "with thrifty.tune.adapter.load_adapter"
            )
        return notes


class _Count(NoHook):
    """Writes how many values were trained: those that the optimiser has moments of, which a hook may make few."""

    def __init__(self, path: Path, whole: int) -> None:
        self.path, self.whole = path, whole

    def after_step(self, state: State) -> None:
        if state.step + 1 < state.steps:
            return
        held = [
            [v.numel() for v in own.values() if isinstance(v, torch.Tensor)] for own in state.optimizer.state.values()
        ]
        write_json(self.path, {"trained": sum(max(sizes, default=0) for sizes in held), "of": self.whole})


def _plain(folder: Path) -> bool:
    """Whether a folder holds an adapter that takes a strength per row."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config["peft_type"] == "LORA" and not config.get("use_dora")
