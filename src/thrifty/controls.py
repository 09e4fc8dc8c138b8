"""Controls by family: what takes a method's place to see whether its claim could fail, or could hold.

A *placebo* keeps contract, cost and touched amount and destroys the information; an *oracle* cheats with the answers.
Both are made from any method of the family. Where that cannot be done in general, the table says why; a claim may then
name settings of its method that take the information away (``"placebo": {...}``).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thrifty import registry
from thrifty.contracts import (
    END_OF_THOUGHT,
    Chain,
    Context,
    Grade,
    Group,
    Outcome,
    Problem,
    Sample,
    Talk,
    Task,
    ThriftyError,
    Trace,
)
from thrifty.engines.relay import relayed

Factory = Callable[[Any, Task, int], Any]
"""(method, task, seed) -> what takes its place."""


@dataclass(frozen=True)
class _Control:
    """Stands in for ``inner``, whose hyperparameters and further verbs it has."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


# ---------------------------------------------------------------------------------------- solve


def _overhear(talk: Talk, heard: list[Trace]) -> Talk:
    """Run a talk as it is; traces that it is answered are kept in ``heard``, those of talks inside it too."""

    def ask(request: Any) -> Talk:
        items = getattr(request, "items", None)
        if items is not None:
            inside = [_overhear(item, heard) if hasattr(item, "send") else item for item in items]
            request = replace(request, items=inside)
        answer = yield request
        _keep(answer, heard)
        return answer

    return relayed(talk, ask)


def _keep(answer: Any, heard: list[Trace]) -> None:
    if isinstance(answer, Trace):
        if not any(answer is t for t in heard):
            heard.append(answer)
    elif isinstance(answer, list | tuple):
        for item in answer:
            _keep(item, heard)


@dataclass(frozen=True)
class RandomChoice(_Control):
    """A strategy that ends with a random one of the finished traces that ``inner`` has seen."""

    seed: int

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        heard: list[Trace] = []
        chosen = yield from _overhear(self.inner.solve(problem, rng), heard)
        finished = [t for t in heard if t.complete]
        return random.Random(f"{self.seed}|{problem.id}").choice(finished) if finished else chosen


@dataclass(frozen=True)
class RightChoice(_Control):
    """A strategy that ends with the shortest right trace that ``inner`` has seen, and pays for that one alone."""

    task: Task

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        heard: list[Trace] = []
        chosen = yield from _overhear(self.inner.solve(problem, rng), heard)
        right = [t for t in heard if t.complete and self.task.grade(problem, t.response).right]
        return min(right, key=lambda t: len(t.ids), default=chosen)

    def settle(self, outcome: Outcome) -> Outcome:
        chosen = outcome.chosen
        if chosen is None:
            return outcome
        usage = replace(chosen.usage, thought=len(chosen.ids) - chosen.usage.answer, injected=0)  # its prefix too
        return replace(outcome, tried=[chosen], usage=usage)


@dataclass(frozen=True)
class DealtStops(_Control):
    """Chains cut where ``inner`` ends them, but on other problems of the level: same lengths, dealt at random."""

    seed: int
    stops: Mapping[str, int] | None = None

    def prepare(self, problems: Sequence[Problem], solve: Callable[[Any], Sequence[Outcome]]) -> DealtStops:
        spent = {o.problem.id: o.usage.thought + o.usage.injected for o in solve(self.inner)}
        stops: dict[str, int] = {}
        for level in {p.level for p in problems}:
            names = [p.id for p in problems if p.level == level]
            random.Random(self.seed).shuffle(names)
            stops |= {name: spent[other] for name, other in zip(names, names[1:] + names[:1])}
        return replace(self, stops=stops)

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        assert self.stops is not None, "prepared by the trial"
        temperature, top_p = (getattr(self.inner, name, None) for name in ("temperature", "top_p"))
        ask = Sample(problem.prompt, temperature=temperature, top_p=top_p)
        limit = max(1, self.stops[problem.id])
        [thought] = yield replace(ask, until=(END_OF_THOUGHT,), max_tokens=limit)
        if thought.finish == "stop":
            return thought
        [trace] = yield replace(ask, prefix=thought.ids, inject="" if thought.closed else END_OF_THOUGHT)
        return trace


@dataclass(frozen=True)
class ShuffledRatings(_Control):
    """A verifier's ratings, permuted among the traces of a problem."""

    seed: int

    def rate(self, problem: Problem, traces: Sequence[Trace], rng: random.Random) -> Talk:
        ratings = list((yield from self.inner.rate(problem, traces, rng)))
        random.Random(f"{self.seed}|{problem.id}").shuffle(ratings)
        return ratings


@dataclass(frozen=True)
class RightRatings(_Control):
    task: Task

    def rate(self, problem: Problem, traces: Sequence[Trace], rng: random.Random) -> Talk:
        yield from self.inner.rate(problem, traces, rng)
        return [self.task.grade(problem, t.response).score if t.complete else 0.0 for t in traces]


@dataclass(frozen=True)
class ShuffledAnswers(_Control):
    """Demonstrations whose answers are those of other demonstrations."""

    seed: int

    def prompt(self, problem: Problem, ctx: Context) -> Any:
        messages = self.inner.prompt(problem, ctx)
        turns = [] if isinstance(messages, str) else [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(turns) < 2:
            raise ThriftyError("the placebo of prompts permutes the answers of demonstrations: give them as messages")
        dealt = turns[1:] + turns[:1]
        out = [dict(m) for m in messages]
        for to, source in zip(turns, dealt):
            out[to]["content"] = messages[source]["content"]
        return out


# ---------------------------------------------------------------------------------------- traces, tune, weights


@dataclass(frozen=True)
class RandomSelection(_Control):
    """Random chains with as many characters as ``inner`` selects."""

    seed: int

    def select(self, chains: Sequence[Chain], ctx: Context) -> list[int]:
        chosen = self.inner.select(chains, ctx)
        size = [len(c.thought) + len(c.response) for c in chains]
        left, order, out = sum(size[i] for i in chosen), list(range(len(chains))), []
        random.Random(self.seed).shuffle(order)
        for i in order:
            if left >= size[i] / 2:
                out.append(i)
                left -= size[i]
        return out


@dataclass(frozen=True)
class ReferenceChains(_Control):
    """Every chain becomes the task's own reference chain: what a compressor can at best leave."""

    def compress(self, chains: Sequence[Chain], ctx: Context) -> list[Chain | None]:
        if without := [c.problem.id for c in chains if "chain" not in c.problem.meta]:
            raise ThriftyError(f"problem {without[0]} has no reference chain: only embedded tasks have this oracle")
        return [replace(c, thought=str(c.problem.meta["chain"]), source="oracle") for c in chains]


@dataclass(frozen=True)
class ShuffledBonuses(_Control):
    """Rewards permuted among the right traces of a group, and among its wrong ones."""

    seed: int

    def score(self, groups: Sequence[Group], step: int) -> list[list[float]]:
        out = []
        for number, (group, rewards) in enumerate(zip(groups, self.inner.score(groups, step), strict=True)):
            dealt, rng = list(rewards), random.Random(f"{self.seed}|{step}|{number}")
            for right in (True, False):
                who = [i for i, grade in enumerate(group.grades) if grade.right is right]
                values = [rewards[i] for i in who]
                rng.shuffle(values)
                for i, value in zip(who, values):
                    dealt[i] = value
            out.append(dealt)
        return out


@dataclass(frozen=True)
class RandomDirections(_Control):
    """A low-rank adapter that starts in random orthogonal directions of the same norms, the model's function kept."""

    seed: int

    def attach(self, model: Any, batches: Any) -> Any:
        import torch
        from peft import get_peft_model_state_dict

        model, found = self.inner.attach(model, batches), 0
        generator = torch.Generator().manual_seed(self.seed)

        def turned(columns: Any) -> Any:  # [d, r]: orthogonal columns of the same norms
            q = torch.linalg.qr(torch.randn(*columns.shape, generator=generator)).Q
            return q.to(columns) * columns.norm(dim=0)

        for layer in [m for m in model.modules() if len(getattr(m, "lora_A", ()))]:
            for name in layer.lora_A:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                with torch.no_grad():
                    before = up @ down
                    down.copy_(turned(down.T).T)
                    up.copy_(turned(up))
                    layer.get_base_layer().weight += layer.scaling[name] * (before - up @ down)
                found += 1
        if hasattr(model, "starts"):  # what ``save_adapter`` takes away from a pair that began in the base's weights
            states = {name: get_peft_model_state_dict(model, adapter_name=name) for name in model.starts}
            model.starts = {n: {k: v.detach().clone() for k, v in state.items()} for n, state in states.items()}
        if not found:
            raise ThriftyError("the placebo of adapters turns lora_A and lora_B; this adapter has none")
        return model


@dataclass(frozen=True)
class ShuffledEntries(_Control):
    """What a merger or codec changes, or a patch adds, with the entries of every tensor permuted."""

    seed: int

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        merged, first = self.inner.merge(states), states[0]
        return {name: first[name] + self._permuted(name, value - first[name]) for name, value in merged.items()}

    def encode(self, state: Mapping[str, Any]) -> bytes:
        return bytes(self.inner.encode(state))

    def decode(self, data: bytes) -> dict[str, Any]:
        return {name: self._permuted(name, value) for name, value in self.inner.decode(data).items()}

    def apply(self, model: Any, strength: Any) -> Any:
        fields = {f.name: getattr(self.inner, f.name) for f in dataclasses.fields(self.inner)}
        tensors = {k: self._permuted(k, v) for k, v in fields.items() if hasattr(v, "numel")}
        if not tensors:
            raise ThriftyError("the placebo of patches permutes the tensors in its fields; this patch has none")
        return replace(self.inner, **tensors).apply(model, strength)

    def _permuted(self, name: str, value: Any) -> Any:
        order = np.random.default_rng([self.seed, *name.encode()]).permutation(value.numel())
        return value.flatten()[order.tolist()].reshape(value.shape)


# ---------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class ShuffledLabels(_Control):
    """A metric that hears right and wrong permuted among the samples of a problem."""

    seed: int

    @property
    def better(self) -> Any:
        return self.inner.better

    def measure(self, outcomes: Sequence[Outcome]) -> float | None:
        dealt = list(outcomes)
        by_problem: dict[str, list[int]] = {}
        for i, o in enumerate(outcomes):
            by_problem.setdefault(o.problem.id, []).append(i)
        for name, members in by_problem.items():
            grades: list[Grade] = [outcomes[i].grade for i in members]
            random.Random(f"{self.seed}|{name}").shuffle(grades)
            for i, grade in zip(members, grades):
                dealt[i] = replace(outcomes[i], grade=grade)
        value = self.inner.measure(dealt)
        return None if value is None else float(value)


def _random_steps(method: Any, task: Task, seed: int) -> Any:
    return registry.load("random-steps")(like=method)


# "choice" for strategies that choose among chains; "stops" for those that end the one chain they write
STRATEGY: dict[str, Factory] = {
    "choice": lambda method, task, seed: RandomChoice(method, seed),
    "stops": lambda method, task, seed: DealtStops(method, seed),
}
ENTRIES: dict[str, Factory] = {"entries": lambda method, task, seed: ShuffledEntries(method, seed)}
LABELS: dict[str, Factory] = {"labels": lambda method, task, seed: ShuffledLabels(method, seed)}

PLACEBOS: dict[str, dict[str, Factory] | str] = {
    "traces.make": "what it makes is text of its own; its claim compares with chains made at equal cost",
    "traces.compress": {"steps": _random_steps},
    "traces.select": {"selection": lambda method, task, seed: RandomSelection(method, seed)},
    "traces.perturb": "a perturbation has no information to take away",
    "tune.adapter": {"directions": lambda method, task, seed: RandomDirections(method, seed)},
    "tune.sparse": "a hook keeps masks and moments of its own, which no wrapper can exchange",
    "tune.objective": "its information is the formula itself",
    "tune.reward": {"bonuses": lambda method, task, seed: ShuffledBonuses(method, seed)},
    "tune.latent": "latent steps carry nothing that could be permuted from outside",
    "weights.merge": ENTRIES,
    "weights.shrink": "it writes an artifact of its own kind",
    "weights.codec": ENTRIES,
    "decode.control": "a control sees one row at a time, so stops cannot be dealt to other problems",
    "decode.patch": ENTRIES,
    "decode.accelerate": "drafts never change the output; a useless draft is the baseline without drafts",
    "solve.prompt": {"answers": lambda method, task, seed: ShuffledAnswers(method, seed)},
    "solve.search": STRATEGY,
    "solve.verify": {"ratings": lambda method, task, seed: ShuffledRatings(method, seed)},
    "solve.route": "a router sees one problem at a time, so its choices cannot be dealt to others",
    "solve.tools": STRATEGY,
    "measure.metric": LABELS,
    "measure.diagnose": LABELS,
    "measure.bench": "a benchmark states facts about models",
    "recipes": "a recipe is made of parts: exchange the one that the claim is about by settings",
}
"""Family -> its placebos by name, the first taken where a claim names none; or why there is none in general."""

RIGHT: dict[str, Factory] = {"right": lambda method, task, seed: RightChoice(method, task)}
ORACLES: dict[str, dict[str, Factory]] = {
    "traces.compress": {"reference": lambda method, task, seed: ReferenceChains(method)},
    "solve.search": RIGHT,
    "solve.tools": RIGHT,
    "solve.verify": {"right": lambda method, task, seed: RightRatings(method, task)},
}
"""Family -> its oracles by name, where it has any."""
