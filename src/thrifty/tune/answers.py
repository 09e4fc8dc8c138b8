"""The rollout loop's answers: where they come from, how they become documents to train on, what they were like."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thrifty.contracts import Group, Problem, Prompt, Reward, Sample, Talk, ThriftyError, Trace
from thrifty.tune.batches import Example, Sampled, collate
from thrifty.tune.credit import sampled


@dataclass(frozen=True)
class Samples:
    """A strategy: ``n`` answers to a problem, side by side; the first is the one chosen."""

    n: int = 8
    temperature: float = 1.0
    want: frozenset[str] = frozenset()
    prompt: Callable[[Problem], Prompt] | None = None
    top_p: float | None = None

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        asked = self.prompt(problem) if self.prompt is not None else problem.prompt
        traces = yield Sample(asked, n=self.n, temperature=self.temperature, top_p=self.top_p, want=self.want)
        return traces[0]


class Problems:
    """A source: problems in an order drawn anew every epoch, as a pure function of (seed, step), none twice in a step.

    What does not fill a step at the end of an epoch waits for the next one.
    """

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int = 0) -> None:
        if len(problems) < per_step:
            raise ThriftyError(f"{len(problems)} problems do not fill a step of {per_step}: give more, or set problems")
        if len({problem.id for problem in problems}) < len(problems):
            raise ThriftyError("two problems have the same id: their answers would be the same samples")
        self.problems, self.per_step, self.seed = problems, per_step, seed

    def next(self, step: int, feedback: Mapping[str, float]) -> list[Problem]:
        """The problems of step ``step`` (from 0)."""
        epoch, part = divmod(step, len(self.problems) // self.per_step)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.problems))
        return [self.problems[i] for i in order[part * self.per_step : (part + 1) * self.per_step]]

    def state_dict(self) -> dict[str, Any]:
        return {"problems": len(self.problems), "letters": sum(len(problem.prompt) for problem in self.problems)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.state_dict():
            raise ThriftyError(
                f"the checkpoint was trained on other problems ({state}, now {self.state_dict()}): give the same "
                "problems, or train into a new folder"
            )


def check_rewards(groups: Sequence[Group], rewards: Sequence[Sequence[float]], reward: Reward) -> None:
    """Refuse rewards that do not match the groups or are not finite."""
    name = type(reward).__name__
    if [len(given) for given in rewards] != [len(group.traces) for group in groups]:
        raise ThriftyError(f"reward {name} must return one number per trace of each of the {len(groups)} groups")
    for group, given in zip(groups, rewards):
        if not all(map(math.isfinite, given)):
            raise ThriftyError(f"reward {name} gave {list(given)} for problem {group.problem.id}: not finite")


def document(trace: Trace, advantages: np.ndarray, temperature: float) -> Sampled:
    """A trace as a document to train on; what it continued (a prefix) belongs to the prompt."""
    if trace.prompt_ids is None or (trace.ids < 0).any():
        raise ThriftyError("the engine does not tell token ids, so its answers cannot be trained on")
    if np.shape(advantages) != (len(trace.ids) - trace.start,):
        raise ThriftyError(
            f"credit gave {np.shape(advantages)} weights for the {len(trace.ids) - trace.start} new tokens of an answer"
        )
    mask = sampled(trace)
    return Sampled(
        prompt_ids=np.concatenate([trace.prompt_ids, trace.ids[: trace.start]]),
        target_ids=trace.ids[trace.start :],
        mask=mask,
        advantages=np.where(mask, advantages, 0.0).astype(np.float32),
        temperature=temperature,
    )


def minibatch(rows: Sequence[Sampled], live: set[int], settings: Any, step: int, at: int) -> list[Sampled]:
    """The answers of update ``at`` of a step that have something to teach, each with its share of the update's mean.

    Those without count in the mean all the same.
    """
    epoch, part = divmod(at, settings.minibatches)
    order = np.arange(len(rows))
    if settings.minibatches > 1:
        order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(rows))
    chosen = np.array_split(order, settings.minibatches)[part].tolist()
    shares = settings.aggregate([int(np.sum(rows[i].mask)) for i in chosen], settings.max_tokens)
    return [replace(rows[i], weight=share) for i, share in zip(chosen, shares) if i in live]


def figures(
    groups: Sequence[Group], rewards: Sequence[Sequence[float]], worth: Sequence[Sequence[np.ndarray]]
) -> dict[str, float]:
    """What a step's answers were like, the three that belong together first."""
    lengths = [[len(trace.ids) - trace.start for trace in group.traces] for group in groups]
    return {
        "accuracy": float(np.mean([grade.right for group in groups for grade in group.grades])),
        "completion": float(np.mean([trace.complete for group in groups for trace in group.traces])),
        "length": float(np.mean(np.concatenate(lengths))),
        "spread": float(np.mean([np.std(group) for group in lengths])),
        "reward": float(np.mean(np.concatenate(rewards))),
        "groups": float(np.mean([any(np.any(one) for one in given) for given in worth])),
        "tokens": int(np.sum(np.concatenate(lengths))),
    }


def takes_samples(objective: Any) -> bool:
    """Whether an objective is for sampled answers. Its mark: a plain document is refused, before the model is asked."""
    if getattr(objective, "pairs", False) or hasattr(objective, "examples"):
        return False
    try:
        objective.loss(None, collate([[Example([0], [0])]]), 0, {})
    except ThriftyError:
        return True
    except Exception:
        return False
    return False
