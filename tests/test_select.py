"""Selectors, plain fine-tuning on what they choose, and the arms that claims about shorter chains compare."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import tiny
from thrifty import evidence, registry, tasks
from thrifty.cli import app
from thrifty.contracts import Chain, Context, Problem, ThriftyError
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine
from thrifty.lab import Lab
from thrifty.progress import Progress
from thrifty.recipes.c3ot import C3oT
from thrifty.recipes.cot_valve import CotValve
from thrifty.tasks import tracing
from thrifty.traces.select.s3ft import S3FT
from thrifty.traces.select.select2reason import Select2Reason, best, joint

ROLL: Any = tasks.load("roll")
PROBLEMS = ROLL.problems("train", 8)


def words(text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
    return {"input_ids": [0] * len(text.split())}


def context(answer: Any, tokenizer: Any = words) -> Context:
    """A context whose model gives ``answer(prompt, key)``."""
    solve = lambda strategy, problems: Runner(ScriptedEngine(answer), ROLL).solve(strategy, problems)  # noqa: E731
    return Context(task=ROLL, solve=solve, rng=random.Random(0), tokenizer=tokenizer)


def chain(problem: Problem, tokens: int, source: str = "gold") -> Chain:
    return Chain(problem, " ".join(["a"] * tokens), str(problem.answer), source=source)


# ----------------------------------------------------------------------------------------------- select2reason


def test_joint_rank_by_hand() -> None:
    # ranks of difficulty 1 2.5 4 2.5, of length 3 1 2 4, each over 4
    scores = joint([0.0, 0.5, 1.0, 0.5], [30, 10, 20, 40], weight=0.25)
    assert scores == [0.625, 0.34375, 0.625, 0.90625]
    assert best(scores, 2) == [0, 3]  # of equal scores the first
    assert joint([0, 1], [9, 3], 1.0) == [0.5, 1.0]
    assert joint([0, 1], [9, 3], 0.0) == [1.0, 0.5]


def test_difficulty_is_the_share_of_failures_and_length_counts_tokens() -> None:
    def answer(prompt: str, key: tuple[Any, ...]) -> str:
        """Of four samples the i-th problem gets the first i right."""
        i = next(i for i, p in enumerate(PROBLEMS) if p.prompt == prompt)
        return f"so </think> {PROBLEMS[i].answer if key[-1] < i else 'none'}"

    pool = [chain(p, n) for p, n in zip(PROBLEMS[:4], (5, 5, 5, 9))]
    hardest = Select2Reason(share=0.25, weight=1.0, k=4)
    assert hardest.select(pool, context(answer)) == [0]
    assert replace(hardest, share=0.5).select(pool, context(answer)) == [0, 1]
    assert replace(hardest, weight=0.0).select(pool, context(answer)) == [3]
    # ranks of difficulty 4 3 2 1, of length 2 2 2 4: 3, 2.5, 2, 2.5
    assert replace(hardest, weight=0.5, share=0.75).select(pool, context(answer)) == [0, 1, 3]


def test_difficulty_may_be_the_level_or_a_function() -> None:
    pool = [chain(p, 3) for p in PROBLEMS]
    chosen = Select2Reason(share=0.25, difficulty="level").select(pool, Context())
    assert {pool[i].problem.level for i in chosen} == {4}
    by_hand = Select2Reason(share=0.125, difficulty=lambda problems, ctx: [float(p.id == "x") for p in problems])
    assert by_hand.select([*pool[:7], chain(replace(PROBLEMS[0], id="x"), 3)], Context()) == [7]


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"share": 0.0}, "0 < share"), ({"weight": 2.0}, "weight"), ({"difficulty": "hard"}, "failures, level"),
     ({}, "difficulty='level'")],
)  # fmt: skip
def test_select2reason_says_what_is_wrong(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ThriftyError, match=told):
        Select2Reason(**changes).select([chain(PROBLEMS[0], 3)], Context())


# ----------------------------------------------------------------------------------------------- s3ft


def test_s3ft_takes_own_then_rewritten_then_gold() -> None:
    asked: list[str] = []

    def answer(prompt: str, key: tuple[Any, ...]) -> str:
        """Own: right for the first alone. Rewritten: right for the second, wrong for the third, unclosed else."""
        asked.append(prompt)
        problem = next(p for p in PROBLEMS if p.prompt == prompt.split("\n\n")[0])
        i, right = PROBLEMS.index(problem), str(problem.answer)
        wrong = str((int(right) + 1) % 10)
        if "\n\n" not in prompt:
            return f"mine </think> {right if i == 0 else wrong}"
        return {1: f"hm </think> in other words {right}", 2: f"hm </think> {wrong}"}.get(i, "never closed")

    gold = [chain(p, 3) for p in PROBLEMS[:4]]
    ctx = context(answer)
    pool = S3FT().pool(gold, ctx)
    chosen = [pool[i] for i in S3FT().select(pool, ctx)]
    by_problem = {c.problem.id: c for c in chosen}
    assert [by_problem[p.id].source for p in PROBLEMS[:4]] == ["own", "rewritten", "gold", "gold"]
    assert by_problem[PROBLEMS[1].id].thought == f"in other words {PROBLEMS[1].answer}"
    assert all(c.problem in PROBLEMS for c in pool)  # a rewriting is trained on under the question alone
    rewriting = [prompt for prompt in asked if "\n\n" in prompt]
    assert len(rewriting) == 3  # the first needs none
    assert all("a a a" in prompt and S3FT().rewrite in prompt for prompt in rewriting)
    plain = S3FT(prefer=())
    assert plain.pool(gold, ctx) == gold
    assert plain.select(pool, ctx) == [0, 1, 2, 3]
    assert [pool[i].source for i in S3FT(prefer=("own",)).select(pool, ctx)] == ["gold", "gold", "gold", "own"]


def test_s3ft_needs_a_judge_and_a_model() -> None:
    with pytest.raises(ThriftyError, match="checker"):
        S3FT().select([chain(PROBLEMS[0], 3, "own")], Context())
    with pytest.raises(ThriftyError, match="way to solve"):
        S3FT().pool([chain(PROBLEMS[0], 3)], Context(task=ROLL))


# ----------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("selector", ["select2reason", "s3ft"])
def test_a_selector_is_used_from_the_command_line(selector: str, tmp_path: Path) -> None:
    model = str(tiny.save(tmp_path / "model"))
    command = ["run", "sft", "--model", model, "--task", "roll", "--selector", selector, "--n", "4", "--train-n", "20"]
    small = ["--steps", "2", "--train-batch-size", "4", "--max-tokens", "12", "--runs", str(tmp_path), "--name", "r"]
    result = CliRunner().invoke(app, [*command, *small])
    assert result.exit_code == 0, result.output
    chosen = {"select2reason": "chooses 2 of 20", "s3ft": "chooses 20 of 20"}[selector]
    assert chosen in result.output
    settings = json.loads((tmp_path / "r" / "result.json").read_text("utf-8"))["settings"]
    assert [s["name"] for s in settings] == ["before", "after"]
    assert (tmp_path / "r" / "adapter" / "adapter_config.json").exists()


def test_sft_refuses_what_is_no_selector(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "nowhere", ROLL)
    with pytest.raises(ThriftyError, match="give one of traces"):
        registry.load("sft")(selector="key-steps").check(lab)
    with pytest.raises(ThriftyError, match="gold or own"):
        registry.load("sft")(chains_from="both").check(lab)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab whose model answers every problem of roll rightly and at length."""
    known = {p.prompt: p for p in ROLL.problems("train", 40)}

    def long(prompt: str, key: tuple[Any, ...]) -> str:
        problem = known[prompt]
        steps = ROLL.trace(problem, tracing.style("long"), random.Random(problem.id))
        return f"{tracing.text_of(steps)} </think> {problem.answer}"

    monkeypatch.setattr(Lab, "engine", lambda self, model=None, adapter=None: ScriptedEngine(long))
    return Lab(tmp_path, str(tiny.save(tmp_path / "model")), ROLL, progress=Progress(quiet=True))


def test_the_valves_placebo_has_the_length_of_short_chains_and_not_their_steps(lab: Lab) -> None:
    train = lab.problems("train", 40)
    cut = CotValve(short_from="random")._short_chains(lab, train)
    gold = {p.id: str(p.meta["chain"]) for p in train}
    assert len(cut) == 40
    assert all(len(c.thought) <= len(gold[c.problem.id]) or c.thought.count(" . ") == 0 for c in cut)
    assert sum(len(c.thought) for c in cut) > 0.6 * sum(map(len, gold.values()))
    assert sum(c.thought == gold[c.problem.id] for c in cut) < 10
    assert all(c.response == c.problem.answer for c in cut)


def test_c3ots_arms_see_the_same_short_chains(lab: Lab) -> None:
    train = lab.problems("train", 40)
    method = C3oT(steps=1, train_batch_size=4)
    pairs = method.pairs(lab, lab.chains(lab.solve("own", method.sampler, train), "own"))
    assert len(pairs) == 40
    assert sum(len(s.thought) for _, s in pairs) < 0.7 * sum(len(long.thought) for long, _ in pairs)
    assert [arm.teach for arm in method.arms] == ["both", "short", "mixed"]
    assert replace(method, ablations=False).arms == [replace(method, ablations=False)]
    for arm in method.arms:
        assert (arm.tuned(lab, pairs) / "adapter_config.json").exists()
        prompts = [p.prompt for p in arm.asked(train)]
        assert prompts == [f"in brief : {p.prompt}" if arm.teach == "both" else p.prompt for p in train]
    assert {p.name for p in (lab.folder / "stages").iterdir()} >= {"c3ot", "short-only", "no-condition"}
    with pytest.raises(ThriftyError, match="--teach"):
        replace(method, teach="none").check(lab)


@pytest.mark.parametrize("key", ["cot-valve", "c3ot", "s3ft", "select2reason"])
def test_claims_are_registered_with_settings_that_the_method_has(key: str) -> None:
    claim = evidence.read_claim(registry.find(key).path)
    assert claim is not None
    method: Any = registry.load(key)
    for settings in (claim.settings, claim.comparator, claim.placebo):
        if isinstance(settings, Mapping):
            method(**settings)
    for name in claim.grid:
        assert key in ("s3ft", "select2reason") or name in method.__dataclass_fields__
