"""Rewards that pay for short or sure answers, and the objective of Kimi k1.5: against values worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from thrifty import tasks
from thrifty.contracts import Grade, Group, Problem, Sample, Span, ThriftyError, Trace
from thrifty.engines.local import LocalEngine
from thrifty.lab import Lab
from thrifty.models.load import wrap
from thrifty.recipes.kimi_long2short import KimiLong2short, choose
from thrifty.tune.adapter import lora
from thrifty.tune.batches import Sampled, collate
from thrifty.tune.credit import GroupRelative, centred, constant_length, normalised
from thrifty.tune.objective.clipped import Clipped
from thrifty.tune.objective.mirror_descent import MirrorDescent
from thrifty.tune.reward.grpo_lambda import GrpoLambda
from thrifty.tune.reward.pear import Pear, phases, premise
from thrifty.tune.reward.relative_length import RelativeLength
from thrifty.tune.reward.right import Right
from thrifty.tune.rollout import Rollout, rollout
from thrifty.tune.supervised import NoHook
from thrifty.weights.merge.average import Average

torch.set_num_threads(1)


def group(name, answers):
    """``answers`` are (right, new tokens); every trace also has a prefix of two."""
    traces = [Trace(np.arange(n + 2), "", "", True, "stop", start=2) for _, n in answers]
    return Group(Problem(name, name, "1"), traces, [Grade(float(right), "1") for right, _ in answers])


STEP = [
    group("easy", [(True, 10), (True, 20), (True, 30), (True, 40)]),
    group("middle", [(True, 10), (True, 30), (False, 5), (False, 50)]),
    group("hard", [(True, 10), (False, 10), (False, 10), (False, 10)]),
    group("none", [(False, 10), (False, 99)]),
]


# ------------------------------------------------------------------------------------------- grpo-lambda


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_only_the_groups_solved_best_pay_for_length():
    easy, middle, hard, none = GrpoLambda(share=0.25, alpha=0.4).score(STEP, 0)
    # 10, 20, 30, 40: mean 25, deviation sqrt(125)
    assert easy == pytest.approx([1 - 0.4 * sigmoid(z / math.sqrt(125)) for z in (-15, -5, 5, 15)])
    assert (middle, hard, none) == ([1, 1, 0, 0], [1, 0, 0, 0], [0, 0])


def test_a_wrong_answer_earns_nothing_in_a_group_that_pays():
    scores = GrpoLambda(share=1.0, alpha=0.4).score(STEP, 0)
    # 10, 30: mean 20, deviation 10; the wrong ones neither earn nor count
    assert scores[1] == pytest.approx([1 - 0.4 * sigmoid(-1), 1 - 0.4 * sigmoid(1), 0, 0])
    assert scores[2] == pytest.approx([1 - 0.2, 0, 0, 0])
    assert scores[3] == [0, 0]


def test_lambda_zero_is_grpo_and_one_is_the_penalty_everywhere():
    assert GrpoLambda(share=0.0).score(STEP, 0) == Right().score(STEP, 0)
    method = GrpoLambda(share=1.0)
    alone = [method.score([one], 0)[0] for one in STEP]
    assert method.score(STEP, 0) == alone


def test_the_choice_follows_the_groups_wherever_they_stand():
    more = [*STEP, group("easy too", [(True, 90), (True, 70)]), group("easy three", [(True, 90), (True, 70)])]
    for step in range(9):
        method = GrpoLambda(share=0.25)  # two of six, where three are solved
        forth, back = method.score(more, step), method.score(more[::-1], step)
        assert forth == back[::-1]


def test_among_groups_solved_alike_length_does_not_decide_who_pays():
    method = GrpoLambda(share=0.25)

    def paying(lengths, step):
        given = [group(f"p{i}", [(True, n), (True, n + 10)]) for i, n in enumerate(lengths)]
        return [i for i, rewards in enumerate(method.score(given, step)) if rewards != [1.0, 1.0]]

    lengths = [10, 20, 30, 40, 50, 60, 70, 80]
    pay = [paying(lengths, step) for step in range(100)]
    assert pay == [paying(lengths[::-1], step) for step in range(100)]
    assert all(len(two) == 2 for two in pay)
    # 200 draws of 0 to 7: mean 3.5, deviation of the mean at most 0.17
    assert np.mean(pay) == pytest.approx(3.5, abs=0.5)
    assert len({tuple(two) for two in pay}) > 20, "of 28 pairs: every step draws anew"


def test_alpha_cancels_in_a_solved_group_and_not_in_another():
    low, high = (
        [normalised(np.array(one)) for one in GrpoLambda(share=1.0, alpha=alpha).score(STEP[:2], 0)]
        for alpha in (0.2, 0.6)
    )
    np.testing.assert_allclose(low[0], high[0], rtol=0.01)
    assert abs(low[1][0] - high[1][0]) > 0.1


# -------------------------------------------------------------------------------------------------- pear


def test_the_penalty_is_the_chains_entropy_above_the_answers():
    entropies = np.array([9.0, 0.5, 1.1, 7.0, 0.2, 0.4], np.float32)
    spans = (Span(2, 3, "thought", "injected"), Span(3, 6, "thought"), Span(6, 8, "answer"))
    trace = Trace(np.arange(8), "", "", True, "stop", start=2, spans=spans, entropies=entropies)
    think, answer = phases(trace)
    assert think.tolist() == pytest.approx([0.5, 1.1]), "neither what was put in nor the closing tag"
    assert answer.tolist() == pytest.approx([0.2, 0.4])
    both = Group(Problem("p", "", "1"), [trace, trace], [Grade(1.0, "1"), Grade(0.0, "2")])
    for a, earned in ((1.0, 1 - 0.5), (0.0, 1 - 0.8), (-1.0, 1 - 1.1), (2.0, 1 - 0.2)):
        assert Pear(a=a, wrong=0.1).score([both], 0)[0] == pytest.approx([earned, 0.1], abs=1e-6)


def test_an_unclosed_chain_is_all_thought():
    entropies = np.array([0.5, 1.5], np.float32)
    trace = Trace(np.arange(2), "", "", False, "length", spans=(Span(0, 2, "thought"),), entropies=entropies)
    think, answer = phases(trace)
    assert (think.tolist(), answer.tolist()) == ([0.5, 1.5], [])


def test_the_premise_compares_answers_to_one_problem():
    # over all five answers the uncertain ones are the long ones; within each problem it is the other way round
    one, other = ([0.1, 0.2], [0.0, 0.0], [12, 10]), ([0.8, 0.9, 0.7], [0.3, 0.3, 0.3], [90, 80, 100])
    found = premise([one, ([], [], []), other])
    assert found["entropy goes with length"] == pytest.approx(-(0.1 + 2.0) / (0.025 * 202) ** 0.5)
    assert found["thinking is less certain than answering"] == pytest.approx((0.15 + 0.5) / 2)
    assert premise([([0.5], [0.1], [7])])["entropy goes with length"] == 0.0
    assert set(premise([]).values()) == {0.0}


def test_traces_without_entropies_are_refused():
    with pytest.raises(ThriftyError, match="carries no entropies"):
        Pear().score([group("p", [(True, 3), (False, 3)])], 0)


def test_entropies_are_those_of_the_model():
    loaded = tiny.loaded()
    engine = LocalEngine(loaded)
    engine.submit(0, Sample("2 + 2", temperature=1.0, max_tokens=6, want=frozenset({"entropies"})), (0,))
    replies = []
    while not replies:
        replies = engine.poll()
    trace = replies[0][1]
    with torch.no_grad():
        ids = torch.tensor([[*trace.prompt_ids, *trace.ids]])
        logp = loaded.model(ids).logits[0, len(trace.prompt_ids) - 1 : -1].log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)
    together = np.concatenate(phases(trace))
    assert together == pytest.approx(expected.numpy()[: len(together)], abs=1e-4)


# -------------------------------------------------------------------------------------------------- kimi


def test_length_within_the_group_is_clamped_for_wrong_answers():
    # 5 to 50: lam = 1/2 - (length - 5) / 45
    lam = [0.5 - (n - 5) / 45 for n in (10, 30, 5, 50)]
    found = RelativeLength(weight=0.5).score(STEP, 0)[1]
    assert found == pytest.approx([1 + lam[0] / 2, 1 + lam[1] / 2, 0.0, -0.25])
    assert RelativeLength().score(STEP, 0)[2] == [1, 0, 0, 0], "all of one length"
    assert RelativeLength(start=5).score(STEP, 4) == Right().score(STEP, 4)


def sampled(prompt, target, advantage, old=None):
    worth = np.full(len(target), advantage, np.float32)
    return Sampled(prompt, target, weight=0.5, mask=[True] * len(target), advantages=worth, old=old)


def test_mirror_descent_is_the_papers_gradient():
    model = tiny.model(64)
    old = [np.array([-4.0, -4.5, -3.0], np.float32), np.array([-5.0, -4.0], np.float32)]
    rows = [sampled([1, 2], [3, 4, 5], 0.5, old[0]), sampled([1, 2], [6, 7], -0.5, old[1])]

    def logps():
        return [
            model(torch.tensor([[*row.prompt_ids, *row.target_ids]])).logits[0, 1:-1].log_softmax(-1)
            .gather(1, torch.tensor(row.target_ids)[:, None]).sum()
            for row in rows
        ]  # fmt: skip

    loss, logs = MirrorDescent(tau=0.3).loss(model, collate([[row] for row in rows]), 0, {})
    [first] = torch.autograd.grad(loss, [model.lm_head.weight])
    # grad of (1/k) sum_j [grad log pi * (r - mean) - tau/2 grad (log pi / pi_i)^2], written out
    ratios = [lp - float(o.sum()) for lp, o in zip(logps(), old)]
    terms = [0.5 * lp - 0.15 * r**2 for lp, r in zip([logps()[0], -logps()[1]], ratios)]
    expected = -0.5 * sum(terms)
    [second] = torch.autograd.grad(expected, [model.lm_head.weight])
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert logs["moved"] == pytest.approx(sum(0.5 * float(r.detach()) ** 2 for r in ratios), rel=1e-4)


def test_rewards_and_objective_run_in_the_loop(tmp_path: Path):
    task = tasks.load("roll")
    settings = Rollout(steps=2, problems=2, samples=4, minibatches=2, max_tokens=10, lr=1e-3, aggregate=constant_length)
    for name, reward in (("lambda", GrpoLambda(share=1.0)), ("pear", Pear()), ("kimi", RelativeLength())):
        base = tiny.loaded()
        loaded = wrap(lora(base.model, rank=2, seed=0), base.tokenizer, "tiny")
        run = rollout(
            loaded, task, task.problems("train", 4), settings, tmp_path / name, reward=reward,
            credit=GroupRelative(centred), objective=MirrorDescent(),
        )  # fmt: skip
        assert len(run.lines) == 2
        assert all(np.isfinite(line["loss"]) for line in run.lines)


class Counts(NoHook):
    """Answers that went through the model, over all updates."""

    answers = 0

    def before_step(self, state):
        self.answers += sum(len(batch.examples) for batch in state.batches)


@pytest.mark.parametrize(("objective", "answers"), [(Clipped(), 0), (MirrorDescent(), 16)])
def test_answers_without_credit_still_hold_mirror_descent_back_and_cost_a_clipped_objective_nothing(
    objective, answers, tmp_path
):
    counts = Counts()
    settings = Rollout(steps=1, problems=2, samples=4, epochs=2, max_tokens=10, lr=1e-3)
    loaded = tiny.loaded()  # answers nothing right, so that every group is of one reward
    rollout(loaded, tasks.load("roll"), tasks.load("roll").problems("train", 4, 0), settings, tmp_path,
            Right(), objective=objective, hooks=[counts])  # fmt: skip
    assert counts.answers == answers


# ---------------------------------------------------------------------------------- the other three ways


def test_the_shortest_right_chain_is_learnt_and_longer_ones_avoided():
    right = [True, True, False, False, True, True]
    lengths = [20, 12, 30, 9, 15, 18]
    assert choose(right, lengths, ratio=1.5) == (1, [0, 2, 5]), "a short wrong one and 15 < 18 are no example"
    assert choose([True, True], [7, 7], ratio=1.5) == (0, []), "ties go to the first"
    assert choose([True, False], [7, 7], ratio=1.5) == (0, []), "a wrong one of the same length is not longer"


def test_merging_is_the_plain_average():
    a, b = tiny.model(64, seed=1).state_dict(), tiny.model(64, seed=2).state_dict()
    merged = Average().merge([a, b])
    assert set(merged) == set(a)
    for name, value in merged.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)
    with pytest.raises(ThriftyError, match="give one each"):
        Average(weights=(1.0,)).merge([a, b])
    with pytest.raises(ThriftyError, match=r"number 2 differ in lm_head\.weight"):
        Average().merge([a, tiny.model(65).state_dict()])


def test_long2short_says_what_it_lacks(tmp_path: Path):
    lab = Lab(tmp_path, str(tiny.save(tmp_path / "model")), tasks.load("roll"), n=2, max_tokens=4)
    with pytest.raises(ThriftyError, match="not prune"):
        KimiLong2short(ways=("dpo", "prune")).run(lab)
    with pytest.raises(ThriftyError, match="answered none of 2 training questions"):
        KimiLong2short(ways=("dpo",), train_n=2, samples=2).run(lab)
    wrong = {"give --short": {"ways": ("merge",)}, "--samples is 1": {"samples": 1}, "--ratio is 0.5": {"ratio": 0.5}}
    for why, values in (wrong | {"--margin is 3": {"margin": 3.0}}).items():
        with pytest.raises(ThriftyError, match=why):
            KimiLong2short(**values).run(lab)


def test_long2short_measures_on_the_split_that_is_asked_for(tmp_path: Path):
    model, short = (str(tiny.save(tmp_path / name, seed=seed)) for name, seed in (("model", 1), ("short", 2)))
    lab = Lab(tmp_path, model, tasks.load("roll"), n=2, max_tokens=4, split="dev")
    report = KimiLong2short(ways=("merge",), short=short).run(lab)
    assert [s.name for s in report.settings] == ["before", "merge"]
    dev = [p.id for p in tasks.load("roll").problems("dev", 2, lab.seed)]
    assert [o.problem.id for o in report.settings[1].outcomes] == dev


@pytest.mark.slow
def test_all_four_ways_run_on_a_student(tmp_path: Path):
    lab = Lab(tmp_path, "long", tasks.load("roll"), n=4, max_tokens=200)
    method = KimiLong2short(short="short", samples=4, train_n=16, steps=2, train_batch_size=4, rl_steps=1)
    report = method.run(lab)
    assert [s.name for s in report.settings] == ["before", "merge", "rejection", "dpo", "rl"]
    for way in ("rejection", "dpo", "rl"):
        assert (tmp_path / f"adapter-{way}" / "adapter_model.safetensors").is_file()
    rates = [
        [json.loads(line)["lr"] for line in (tmp_path / "stages" / way / "train.jsonl").read_text().splitlines()]
        for way in ("rejection", "dpo")
    ]
    assert rates[1] == pytest.approx([rate / 5 for rate in rates[0]])
