"""Controls: what takes a method's place keeps its contract and its cost, and nothing else."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from thrifty import controls, registry
from thrifty.contracts import Budget, Chain, Context, Grade, Group, Outcome, OutOfBudget, Problem, Sample, Trace, Usage
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine

torch.set_num_threads(1)


def test_every_family_has_a_placebo_or_a_reason():
    assert set(controls.PLACEBOS) == set(registry.FAMILIES)
    assert all(table for table in controls.PLACEBOS.values())


@dataclass(frozen=True)
class Length:
    def score(self, groups, step):
        return [[float(len(t.ids)) for t in g.traces] for g in groups]


def test_bonuses_stay_with_the_right_and_with_the_wrong():
    traces = [Trace(np.zeros(i, np.int32), "", "", True, "stop") for i in range(8)]
    grades = [Grade(float(i % 2), None) for i in range(8)]
    groups = [Group(Problem("p", "q", "1"), traces, grades)] * 5
    dealt = controls.ShuffledBonuses(Length(), 0).score(groups, 3)
    assert all(sorted(r[1::2]) == [1, 3, 5, 7] and sorted(r[::2]) == [0, 2, 4, 6] for r in dealt)
    assert len({tuple(r) for r in dealt}) > 1


@dataclass(frozen=True)
class Longest:
    def select(self, chains, ctx):
        return sorted(range(len(chains)), key=lambda i: -len(chains[i].thought))[:10]


def test_a_random_selection_reads_as_much():
    chains = [Chain(Problem(f"p{i}", "", ""), "x" * (20 + i), "1") for i in range(100)]
    total = [
        sum(len(chains[i].thought) for i in s.select(chains, Context()))
        for s in (Longest(), controls.RandomSelection(Longest(), 1))
    ]
    assert total[1] == pytest.approx(total[0], rel=0.1)
    chosen = controls.RandomSelection(Longest(), 1).select(chains, Context())
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) != set(Longest().select(chains, Context()))


@dataclass(frozen=True)
class Pissa:
    def attach(self, model, batches):
        return get_peft_model(model, LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]))


def test_random_directions_leave_the_model_as_it_is_and_keep_norms():
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = tiny.loaded().model(ids).logits
        own, random_ = (m.attach(tiny.loaded().model, ()) for m in (Pissa(), controls.RandomDirections(Pissa(), 0)))
        assert torch.allclose(random_(ids).logits, before, atol=1e-3)
    first, second = (next(layer for layer in m.modules() if hasattr(layer, "lora_A")) for m in (own, random_))
    down, dealt = (layer.lora_A["default"].weight for layer in (first, second))
    assert torch.allclose(down.norm(dim=1), dealt.norm(dim=1), atol=1e-4)
    assert not torch.allclose(down, dealt)
    gram = second.lora_B["default"].weight.T @ second.lora_B["default"].weight
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4)


def test_permuted_entries_keep_their_values():
    @dataclass(frozen=True)
    class Mean:
        def merge(self, states):
            return {k: sum(s[k] for s in states) / len(states) for k in states[0]}

    base, other = ({"w": torch.randn(6, 5, generator=torch.Generator().manual_seed(i))} for i in (0, 1))
    real, dealt = (m.merge([base, other])["w"] - base["w"] for m in (Mean(), controls.ShuffledEntries(Mean(), 0)))
    assert torch.allclose(real.flatten().sort().values, dealt.flatten().sort().values, atol=1e-5)
    assert not torch.allclose(real, dealt)


def test_stops_are_dealt_to_other_problems_of_the_level():
    @dataclass(frozen=True)
    class Whole:
        def solve(self, problem, rng):
            return (yield Sample(problem.prompt))[0]

    lengths = {f"p{i}": 3 * i + 2 for i in range(8)}
    problems = [Problem(name, name, "1", level=i % 2) for i, name in enumerate(lengths)]
    engine = ScriptedEngine(lambda prompt, key: " ".join(["x"] * lengths[key[1]]) + " </think> 1")
    runner = Runner(engine)
    dealt = controls.DealtStops(Whole(), 0).prepare(problems, lambda s: runner.solve(s, problems))
    assert dealt.stops is not None
    for level in (0, 1):
        names = [p.id for p in problems if p.level == level]
        assert sorted(dealt.stops[n] for n in names) == sorted(lengths[n] + 1 for n in names)
        assert all(dealt.stops[n] != lengths[n] + 1 for n in names)
    for outcome in runner.solve(dealt, problems):
        assert outcome.usage.thought <= max(dealt.stops[outcome.problem.id], 1)


def test_the_oracle_pays_for_the_right_chain_alone():
    @dataclass(frozen=True)
    class Task:
        name = "t"

        def grade(self, problem, response):
            return Grade(float(response == "right"), response)

    trace = Trace(np.zeros(9, np.int32), "a", "right", True, "stop", start=5, usage=Usage(answer=4))
    outcome = Outcome(Problem("p", "", ""), trace, Grade(1.0, "right"), [trace], Usage(thought=50, answer=4))
    settled = controls.RightChoice(None, Task()).settle(outcome)
    assert settled.usage.generated == 9


def test_a_strategy_under_a_control_is_told_that_its_budget_is_spent():
    told = []

    class Asks:
        def solve(self, problem, rng):
            try:
                while True:
                    yield Sample(problem.prompt)
            except OutOfBudget:
                told.append(problem.id)

    runner = Runner(ScriptedEngine(lambda prompt, key: "x </think> 1"), budget=Budget(calls=2))
    runner.solve(controls.RandomChoice(Asks(), 0), [Problem("p", "q", "1")])
    assert told == ["p"]
