"""Reinforcement: a LoRA trained on the model's own answers, which the task grades and a reward pays for.

How every reward is used on a model of yours, and what a length reward is compared with (``--reward right``):
``thrifty run grpo --model DIR --task T --reward pear:a=.5 --objective clipped:kl=.02``. Of the answers to one problem,

    A = (r - mean(r)) / std(r)         what each token of an answer with reward r is worth to the objective

A reward that asks for levels of length (``level-length``) is trained and measured on every level.

Paper: Shao et al. 2024, DeepSeekMath (GRPO), arXiv 2402.03300, section 4.1.
Differs: a LoRA in place of full training, and no KL unless the objective is given one. Each step's answers are used
``epochs`` times; with one, neither the clipping nor a pull towards the step's policy has anything to act on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thrifty.contracts import Card, Objective, Problem, Reward, ThriftyError
from thrifty.engines import capabilities
from thrifty.fields import part, split
from thrifty.lab import ADAPTER, Lab, Report, Setting, verdict
from thrifty.solve.search.single_pass import SinglePass
from thrifty.tune.adapter import lora
from thrifty.tune.answers import takes_samples
from thrifty.tune.guard import collapsed
from thrifty.tune.rollout import Rollout, rollout

CARD = Card(
    key="grpo",
    title="Reinforcement with verifiable rewards (GRPO)",
    arxiv="2402.03300",
    year=2024,
    needs=("adapters",),
    baseline=True,
)
STAGE = "grpo"
SAVE_EVERY = 5
"""Steps between checkpoints: what a killed run does again at most."""


@dataclass(frozen=True)
class GRPO:
    reward: str = field(default="right", metadata={"help": "KEY or KEY:NAME=VALUE,... of family tune.reward"})
    objective: str = field(default="clipped", metadata={"help": "KEY or KEY:NAME=VALUE,... of family tune.objective"})
    train_n: int = field(default=1000, metadata={"help": "training problems"})
    steps: int = field(default=100, metadata={"help": "times that answers are sampled"})
    problems: int = field(default=16, metadata={"help": "problems per step"})
    samples: int = field(default=8, metadata={"help": "answers per problem: the group"})
    epochs: int = field(default=1, metadata={"help": "updates per step, each on all of its answers"})
    rank: int = field(default=8, metadata={"help": "LoRA rank"})
    lr: float | None = field(default=None, metadata={"help": "learning rate; none: 1e-4, 5e-4 below 10 M parameters"})
    rollout_max_tokens: int | None = field(
        default=None, metadata={"help": "new tokens per answer in training; none: as in measuring (--max-tokens)"}
    )
    rollout_temperature: float = field(default=1.0, metadata={"help": "sampling temperature in training"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature in measuring"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass in measuring"})
    window: int = field(default=20, metadata={"help": "steps that the guard against collapse looks over; 0: no guard"})
    margin: float = field(default=0.03, metadata={"help": "accuracy that may be lost, for the verdicts"})

    def passes(self, n: int) -> dict[str, int]:
        """Chains sampled and trained on, for ``--plan``."""
        answers = self.steps * self.problems * self.samples
        return {"sampled": answers + n * (1 + len(_levels(self._reward()))), "trained": answers * self.epochs}

    def check(self, lab: Lab) -> None:
        """Raise ThriftyError for a value that no run can use, before any work."""
        least = {"train_n": 1, "steps": 1, "problems": 1, "samples": 2, "epochs": 1, "rank": 1, "window": 0}
        for name, smallest in {**least, "rollout_max_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ThriftyError(f"--{name.replace('_', '-')} is {value}: give at least {smallest}")
        for name in ("lr", "rollout_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ThriftyError(f"--{name.replace('_', '-')} is {value:g}: give a number above 0")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ThriftyError(
                f"--temperature is {self.temperature:g}, --top-p {self.top_p:g}: need >= 0 and in (0, 1]"
            )
        if not 0 < self.margin < 1:
            raise ThriftyError(
                f"--margin is {self.margin:g}: give a share of the problems between 0 and 1, such as 0.03"
            )
        if self.train_n < self.problems:
            raise ThriftyError(
                f"--train-n is {self.train_n}, which does not fill a step: give at least --problems, {self.problems}"
            )
        self._reward()
        self._objective()

    def run(self, lab: Lab) -> Report:
        self.check(lab)
        practice = self._practice(lab)
        test, sampler = lab.problems(lab.split, lab.n), SinglePass(self.temperature, self.top_p)
        before = Setting("before", lab.solve("measure-before", sampler, test))
        folder = self.reinforced(lab, practice)
        lab.publish(f"{STAGE}/adapter", "adapter")
        engine, reward = lab.engine(adapter=folder / "adapter"), self._reward()
        after = []
        for i, level in enumerate(_levels(reward)):
            stage, asked, name = "measure-after", test, "after"
            if level is not None:
                stage, asked, name = f"measure-level-{i}", _asked(reward, test, level), f"asked {level}"
            after.append(Setting(name, lab.solve(stage, sampler, asked, engine, {ADAPTER: 1.0})))
        return Report(
            [before, *after], "before", notes=[*self._told(lab, folder), *lab.notes(test)], margin=self.margin,
            verdicts=[verdict(setting, before, None, self.margin) for setting in after],
        )  # fmt: skip

    def reinforced(self, lab: Lab, problems: Sequence[Problem]) -> Path:
        """Folder of the LoRA reinforced on ``problems``, stage "grpo" of the lab. Resumes."""

        def make(folder: Path) -> None:
            loaded = lab.loaded()
            model = lora(loaded.model, rank=self.rank, name=ADAPTER, seed=lab.seed)
            with lab.progress.bar(STAGE, self.steps) as bar:
                done = 0

                def told(step: int, of: int, line: dict[str, float]) -> None:
                    nonlocal done
                    bar.advance(step - done)  # the first of a resumed run is beyond 1
                    done = step

                rollout(
                    replace(loaded, model=model), lab.task, problems, self._settings(lab), folder, self._reward(),
                    objective=self._objective(), meter=lab.meter, progress=told,
                )  # fmt: skip
            model.unload()  # the lab's model is measured next, with the adapter as it was saved

        return lab.once(STAGE, make)

    def _settings(self, lab: Lab) -> Rollout:
        return Rollout(
            steps=self.steps, problems=self.problems, samples=self.samples, epochs=self.epochs,
            temperature=self.rollout_temperature, max_tokens=self.rollout_max_tokens or lab.max_tokens,
            batch=lab.batch_size, lr=lab.training(1, 1, self.lr).lr, seed=lab.seed, save_every=SAVE_EVERY,
            window=self.window,
        )  # fmt: skip

    def _practice(self, lab: Lab) -> list[Problem]:
        """The training problems that can be graded, once per level of length that the reward asks for."""
        found = [problem for problem in lab.problems("train", self.train_n) if problem.gradable]
        if len(found) < self.problems:
            raise ThriftyError(
                f"{lab.task.name} has {len(found)} training problems that can be graded, which do not fill a step: "
                f"give --problems {len(found)} or fewer"
            )
        reward: Any = self._reward()
        return [p if level is None else reward.asked(p, level) for level in _levels(reward) for p in found]

    def _told(self, lab: Lab, folder: Path) -> list[str]:
        """Notes: what training was, and why the guard ended it where it did."""
        lines = [json.loads(line) for line in (folder / "rollout.jsonl").read_text("utf-8").splitlines()]
        notes = [
            f"Reinforced with the reward {self.reward} and the objective {self.objective}: {len(lines)} steps of "
            f"{self.problems} problems with {self.samples} answers each."
        ]
        # Asked of the log, as the loop did: where a resumed run finds the stage done, nobody else can tell.
        stopped = collapsed(lines, self.window, self._settings(lab).keep)
        if stopped is not None:
            notes.append(f"The guard stopped training after step {len(lines)} of {self.steps}: {stopped}.")
        return notes

    # ---- parts --------------------------------------------------------------------------------------

    def _reward(self) -> Reward:
        reward: Reward = part("--reward", self.reward, "tune.reward", "score")
        for key, names in capabilities.needs(reward).items():
            if missing := sorted(set(names) - {"logprobs", "entropies"}):
                raise ThriftyError(
                    f"--reward {key} needs {', '.join(missing)}, which sampled answers do not carry; they can carry "
                    "logprobs and entropies"
                )
        return reward

    def _objective(self) -> Objective:
        objective: Objective = part("--objective", self.objective, "tune.objective", "loss")
        if not takes_samples(objective):
            raise ThriftyError(
                f"--objective {split(self.objective)[0]} is trained on given documents or pairs, not on answers and "
                "what they are worth: give clipped, mirror-descent or another one of that kind"
            )
        return objective


def _levels(reward: Any) -> tuple[str | None, ...]:
    """The levels of length that a reward has asked for; (None,) where it looks at answers alone."""
    return tuple(reward.levels) if hasattr(reward, "asked") else (None,)


def _asked(reward: Any, problems: Sequence[Problem], level: str) -> list[Problem]:
    """The problems with a prompt that asks for a level, under their own ids: they are paired with those before."""
    return [replace(reward.asked(problem, level), id=problem.id) for problem in problems]
