"""The rollout loop: a step equals trl's GRPOTrainer, it learns, goes on after every end, and stops at a collapse."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import tiny
from launched import two_processes
from thrifty.contracts import Grade, Group, Problem, Sample, Span, ThriftyError, Trace
from thrifty.engines.meter import Meter
from thrifty.models.load import load
from thrifty.tune import checkpoint
from thrifty.tune.adapter import lora
from thrifty.tune.answers import Problems, Samples, document, minibatch
from thrifty.tune.batches import Example, bucketed, collate, packed
from thrifty.tune.credit import (
    GroupRelative,
    RunningBaseline,
    centred,
    constant_length,
    leave_one_out,
    normalised,
    sequence_mean,
    token_mean,
)
from thrifty.tune.guard import collapsed
from thrifty.tune.logprobs import document_logprobs
from thrifty.tune.objective.clipped import Clipped, k3
from thrifty.tune.objective.nll import NLL
from thrifty.tune.reward.right import Right
from thrifty.tune.rollout import Rollout, rollout
from thrifty.tune.supervised import NoHook

SETTINGS = Rollout(
    steps=6, problems=3, samples=4, max_tokens=8, lr=1e-2, tokens=200, row=40, save_every=2, window=0,
    epochs=2, minibatches=2,
)  # fmt: skip


class Short:
    """A task whose right answers have an even number of letters."""

    name, levels = "short", (0,)

    def problems(self, split, n, seed=0, levels=None):
        return [Problem(f"p{i}", "?" * (1 + i % 5) + str(i), "even", self.name) for i in range(n)]

    def parse(self, response):
        return str(len(response))

    def grade(self, problem, response):
        return Grade(float(len(response) % 2 == 0), self.parse(response))


class Even:
    """Rewards even token ids, so that even a random model can learn something."""

    def __init__(self):
        self.groups, self.seen = [], 0.0

    def score(self, groups, step):
        self.groups = groups
        self.seen += 1
        return [[float(np.mean(t.ids[t.start :] % 2 == 0)) for t in g.traces] for g in groups]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def loaded(adapter=True):
    """A tiny random model one of whose four tokens ends the answer."""
    made = tiny.loaded(template="none")
    made = dataclasses.replace(made, eos=frozenset(range(65)))
    return dataclasses.replace(made, model=lora(made.model, rank=4, seed=1)) if adapter else made


def run(folder, end=None, model=None, **parts):
    parts = {"credit": RunningBaseline(), "objective": Clipped(kl=0.1), "hooks": [Stop(end)], **parts}
    return rollout(model or loaded(), Short(), Short().problems("train", 7), SETTINGS, folder, Even(), **parts)


class Stop(NoHook):
    """Calls ``end`` in the middle of a step."""

    def __init__(self, end=None, at=18):
        self.end, self.at = end, at

    def after_backward(self, state):
        if self.end and state.step == self.at:
            self.end()


def run_elsewhere(call, folder, *prefix):
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import conftest, test_rollout as t; t.{call}"
    command = [*prefix, sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=290)


def adapter_weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


FIGURES = ("loss", "reward", "accuracy", "completion", "length", "clipped", "kl", "grad_norm")


def assert_same(result, expected):
    for mine, theirs in zip(result.lines, expected.lines, strict=True):
        assert [mine[k] for k in FIGURES] == pytest.approx([theirs[k] for k in FIGURES], rel=1e-5, abs=1e-7)
    theirs = adapter_weights(expected.folder)
    for name, weight in adapter_weights(result.folder).items():
        torch.testing.assert_close(weight, theirs[name])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def a_trace(ids=(5, 6, 7, 8), start=0, spans=None, prompt=(1, 2, 3)):
    ids = np.array(ids, np.int32)
    spans = (Span(start, len(ids), "answer"),) if spans is None else spans
    return Trace(ids, "", "", True, "stop", start, spans=spans, prompt_ids=np.array(prompt, np.int32))


# ------------------------------------------------------------------------------------------------ against trl


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A GRPOTrainer that is handed the groups to train on."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    given = {}
    model, tokenizer = loaded(adapter=False).model, tiny.tokenizer("none")

    def answers(prompts, trainer):
        traces = [trace for group in given["groups"] for trace in group.traces]
        assert len(prompts) == len(traces)
        return {
            "prompt_ids": [trace.prompt_ids.tolist() for trace in traces],
            "completion_ids": [trace.ids.tolist() for trace in traces],
            "logprobs": None,
        }

    args = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=12, num_generations=4,
        max_completion_length=8, temperature=0.8, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        num_iterations=2, shuffle_dataset=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda **_: [r for one in given["rewards"] for r in one], args=args,
        train_dataset=Dataset.from_list([{"prompt": p.prompt} for p in Short().problems("train", 3)]),
        processing_class=tokenizer, rollout_func=answers,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def prepared(groups, rewards, **settings):
        """What trl makes of these answers, with the model as it was at first."""
        given.update(groups=groups, rewards=rewards)
        trainer._step, trainer.beta = 0, 0.0
        for name, value in settings.items():
            setattr(trainer, name, value)
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                p.copy_(start[name])
        trainer.model.train().zero_grad()
        return trainer, trainer._prepare_inputs([{"prompt": g.problem.prompt} for g in groups for _ in g.traces])

    return prepared


VARIANTS = [
    (token_mean, normalised, {"loss_type": "dapo", "scale_rewards": "group"}),  # trl's defaults
    (token_mean, centred, {"loss_type": "bnpo", "scale_rewards": "none"}),
    (sequence_mean, normalised, {"loss_type": "grpo", "scale_rewards": "group"}),
    (constant_length, centred, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
]


@pytest.mark.parametrize(("aggregate", "advantage", "variant"), VARIANTS, ids=[v[2]["loss_type"] for v in VARIANTS])
def test_a_first_step_equals_trl_in_loss_and_gradient(tmp_path, theirs, aggregate, advantage, variant):
    class Gradients(NoHook):
        def after_backward(self, state):
            self.kept = {name: p.grad.clone() for name, p in state.model.named_parameters()}

    settings = dataclasses.replace(
        SETTINGS, steps=1, epochs=1, minibatches=1, temperature=0.8, aggregate=aggregate, clip=0
    )
    reward, hook = Even(), Gradients()
    result = rollout(
        loaded(adapter=False), Short(), Short().problems("train", 3), settings, tmp_path, reward,
        GroupRelative(advantage), hooks=[hook],
    )  # fmt: skip
    assert len({len(t.ids) for g in reward.groups for t in g.traces}) > 2  # else the means would be one
    trainer, inputs = theirs(reward.groups, reward.score(reward.groups, 0), **variant)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert result.lines[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(hook.kept[name], p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("aggregate", "advantage", "variant"), VARIANTS[:3], ids=["dapo", "bnpo", "grpo"])
@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_a_later_update_with_clipping_and_kl_equals_trl(theirs, aggregate, advantage, variant, layout):
    policy = loaded(adapter=False)
    groups, rng = [], np.random.default_rng(0)
    for i, problem in enumerate(Short().problems("train", 3)):
        traces = [a_trace(rng.integers(65, 250, n), prompt=[70 + i] * (i + 1)) for n in (1, 3, 8, 5)]
        groups.append(Group(problem, traces, [Grade(0.0, None)] * 4))
    rewards = [[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]  # the second teaches nothing but KL
    trainer, inputs = theirs(groups, rewards, **variant)

    def moved(model):
        torch.manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        return model

    before = policy.model
    rows = [
        document(trace, given, 0.8)
        for group, weights in zip(groups, GroupRelative(advantage).weights(groups, rewards, 0))
        for trace, given in zip(group.traces, weights)
    ]
    old = document_logprobs(before, rows, 64, 0.8)
    rows = [dataclasses.replace(row, old=x, reference=x - 0.1) for row, x in zip(rows, old)]
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] - 0.1
    trainer.beta = 0.04
    expected = trainer.compute_loss(moved(trainer.model), inputs)
    settings = dataclasses.replace(SETTINGS, aggregate=aggregate, epochs=1, minibatches=1)
    items = minibatch(rows, set(range(len(rows))), settings, 0, 0)
    batches = [collate(part) for part in (packed(items, 40, 30) if layout == "packed" else bucketed(items, 40))]
    after = moved(loaded(adapter=False).model)
    losses, logs = zip(*(Clipped(kl=0.04).loss(after, batch, 0, {}) for batch in batches))
    assert len(batches) > 1
    expected.backward()
    sum(losses).backward()
    for mine, their in zip(after.parameters(), trainer.model.parameters()):
        torch.testing.assert_close(mine.grad, their.grad, atol=1e-4, rtol=1e-3)
    assert sum(losses).item() == pytest.approx(expected.item(), abs=1e-4)
    assert 0 < sum(one["clipped"] for one in logs) < 1
    assert sum(one["kl"] for one in logs) > 1e-4


# ------------------------------------------------------------------------------------------- values by hand


def test_the_clipped_objective_by_hand():
    old, logp = torch.tensor([0.5] * 4).log(), torch.tensor([0.75, 0.75, 0.25, 0.25]).log()  # ratios 1.5 and 0.5
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    # min(3, 2.4); min(-3, -2.4); min(1, 1.6); min(-1, -1.6)
    assert Clipped().per_token(logp, old, advantages).tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6])
    assert Clipped(high=0.28).per_token(logp, old, advantages)[0].item() == pytest.approx(-2.56)
    # GRPO, equation 4: q / p - log(q / p) - 1 at p = 0.2, q = 0.6
    assert k3(torch.tensor(0.2).log(), torch.tensor(0.6).log(), torch.tensor(1.0)).item() == pytest.approx(
        3 - math.log(3) - 1, abs=1e-6
    )


def test_credit_by_hand():
    # rewards 1, 0, 0: mean 1/3, sample standard deviation sqrt(((2/3)^2 + 2 (1/3)^2) / 2) = 0.57735
    assert normalised(np.array([1.0, 0, 0])).tolist() == pytest.approx([1.1545, -0.57725, -0.57725], abs=1e-4)
    assert leave_one_out(np.array([1.0, 0, 0])).tolist() == pytest.approx([1.0, -0.5, -0.5])
    groups = [Group(Problem("a", "", None), [a_trace(), a_trace()], []) for _ in range(2)]
    first, second = GroupRelative(centred).weights(groups, [[1.0, 0.0], [0.1, 0.1]], 0)
    assert [w.tolist() for w in first] == [[0.5] * 4, [-0.5] * 4]
    assert not any(w.any() for w in second)
    running = RunningBaseline(decay=0.5)
    one = [Group(Problem("a", "", None), [a_trace()], [])]
    # baselines: 1 (its own), then (1 + 1) / 2 = 1, then (1 + 0) / 2 = 0.5
    assert [running.weights(one, [[r]], 0)[0][0][0] for r in (1.0, 0.0, 0.0)] == pytest.approx([0.0, -1.0, -0.5])


def test_injected_tokens_and_prefixes_get_no_credit():
    spans = (Span(2, 4, "thought", "injected"), Span(4, 6, "thought"), Span(6, 7, "tool", "tool"), Span(7, 8, "answer"))
    trace = a_trace(range(10, 18), start=2, spans=spans)
    pair = Group(Problem("a", "", None), [trace, trace], [])
    weights = GroupRelative(lambda rewards: 2 * rewards).weights([pair], [[1.0, 0.0]], 0)[0][0]
    assert weights.tolist() == [0, 0, 2, 2, 0, 2]
    made = document(trace, np.ones(6, np.float32), 1.0)  # a credit that forgets about origins
    assert made.advantages.tolist() == [0, 0, 1, 1, 0, 1]
    assert list(made.prompt_ids) == [1, 2, 3, 10, 11]
    assert made.loss_weights().tolist() == [0] * 5 + [0, 0, 1, 1, 0, 1]


# ------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "all"])
def test_it_learns_what_is_rewarded(tmp_path, adapter):
    settings = Rollout(steps=12, problems=6, samples=6, max_tokens=8, lr=2e-2 if adapter else 3e-3, window=0)
    model, meter = loaded(adapter), Meter()
    was = model.model.training
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    result = rollout(model, Short(), Short().problems("train", 12), settings, tmp_path, Even(), meter=meter)
    rewards = [line["reward"] for line in result.lines]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15
    assert model.model.training is was
    lines = [json.loads(line) for line in (tmp_path / "rollout.jsonl").read_text().splitlines()]
    assert lines == result.lines
    for line in lines:
        assert {"accuracy", "completion", "length", "reward", "loss", "groups", "seconds"} <= set(line)
        assert 0 <= line["accuracy"] <= line["completion"] <= 1
        assert 1 <= line["length"] <= 8
    assert any(line["accuracy"] > 0 for line in lines)
    row = meter.rows()[("train", "main")]
    assert row.thought + row.answer == result.tokens == sum(line["tokens"] for line in lines)
    assert row.backward > 0
    if adapter:
        frozen = [n for n, p in model.model.named_parameters() if not p.requires_grad]
        assert all(torch.equal(dict(model.model.named_parameters())[n], before[n]) for n in frozen)
        again = PeftModel.from_pretrained(loaded(False).model, result.trained)
        ids = torch.arange(70, 90)[None]
        torch.testing.assert_close(again(ids).logits, model.model(ids).logits)
    else:
        ids = torch.arange(70, 90)[None]
        torch.testing.assert_close(load(str(result.trained)).model(ids).logits, model.model(ids).logits)


def test_every_step_samples_with_the_weights_of_that_step(tmp_path):
    """The log-probabilities on record are the trainer's own, before the update."""
    found = []

    class Compare(Even):
        def score(self, groups, step):
            rows = [document(t, np.ones(len(t.ids), np.float32), 1.0) for g in groups for t in g.traces]
            mine = document_logprobs(model.model, rows, 200)
            found.append(max(np.abs(a - t.logprobs).max() for a, t in zip(mine, (t for g in groups for t in g.traces))))
            return super().score(groups, step)

    model = loaded()
    settings = dataclasses.replace(SETTINGS, steps=3, epochs=1, minibatches=1, lr=5e-2)
    strategy = Samples(4, 1.0, frozenset({"logprobs"}))
    rollout(model, Short(), Short().problems("train", 6), settings, tmp_path, Compare(), strategy=strategy)
    assert len(found) == 3
    assert max(found) < 1e-4


def test_the_kl_is_zero_at_first_and_the_reference_is_where_it_began(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=4, epochs=1, minibatches=1)
    lines = run_with(settings, tmp_path, Clipped(kl=0.2)).lines
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["kl"] > 1e-3


def run_with(settings, folder, objective=None, **parts):
    return rollout(loaded(), Short(), Short().problems("train", 7), settings, folder, Even(), None, objective, **parts)


def test_extra_objectives_are_added(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=1, epochs=1, minibatches=1)
    alone = run_with(settings, tmp_path / "a").lines[0]["loss"]
    both = run_with(settings, tmp_path / "b", extra=[NLL()]).lines[0]["loss"]
    assert both - alone > 1  # some nats per token


def test_answers_without_credit_count_in_the_mean_but_are_not_computed(tmp_path):
    class First(Even):
        def score(self, groups, step):
            return [[float(i) for i in range(4)] if g is groups[0] else [1.0] * 4 for g in groups]

    seen = []

    class See(NoHook):
        def before_step(self, state):
            seen.append(sum(len(b.examples) for b in state.batches))
            seen.append(float(sum(b.weights.sum() for b in state.batches)))

    settings = dataclasses.replace(SETTINGS, steps=1, epochs=1, minibatches=1, aggregate=sequence_mean)
    rollout(loaded(), Short(), Short().problems("train", 3), settings, tmp_path, First(), hooks=[See()])
    assert seen == [4, pytest.approx(1 / 3)]


# ------------------------------------------------------------------------------------------------- going on


def test_kill_9_and_again_gives_the_same_curve(tmp_path, uninterrupted):
    ended = run_elsewhere("run(sys.argv[1], end=lambda: t.os.kill(t.os.getpid(), t.signal.SIGKILL))", tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len((tmp_path / "rollout.jsonl").read_text().splitlines()) == 4
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000004"
    assert_same(run(tmp_path), uninterrupted)


def test_a_finished_run_is_not_trained_again(uninterrupted):
    again = run(uninterrupted.folder, end=lambda: pytest.fail("trained again"))
    assert again == uninterrupted


def test_ctrl_c_finishes_the_step_and_goes_on(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 6; run the same command again"):
        run(tmp_path, end=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert_same(run(tmp_path), uninterrupted)


def test_a_changed_set_up_is_refused(tmp_path, uninterrupted):
    changed = dataclasses.replace(SETTINGS, temperature=0.5, aggregate=sequence_mean, tokens=999, window=7)
    problems = Short().problems("train", 7)
    with pytest.raises(
        ThriftyError, match=r"temperature was 1.0, is 0.5; aggregate was token_mean, is sequence_mean; "
    ):
        rollout(loaded(), Short(), problems, changed, uninterrupted.folder, Even())
    with pytest.raises(ThriftyError, match="another source, reward or credit"):
        run(uninterrupted.folder, credit=GroupRelative())
    with pytest.raises(ThriftyError, match="other problems"):
        rollout(
            loaded(), Short(), problems[:5], SETTINGS, uninterrupted.folder, Even(), RunningBaseline(), Clipped(kl=0.1),
            hooks=[Stop()],
        )  # fmt: skip
    other = loaded()
    with torch.no_grad():
        next(p for p in other.model.parameters() if p.requires_grad).add_(1.0)
    with pytest.raises(
        ThriftyError, match="sum of the starting weights was"
    ):  # the reference model would be another one
        run(uninterrupted.folder, model=other)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Spoil(NoHook):
        def before_step(self, state):
            if state.step == 13:
                next(p for p in state.model.parameters() if p.requires_grad).data.fill_(torch.nan)

    with pytest.raises(ThriftyError, match=r"loss is nan at step 4 .*step-00000002 is as it was.*Lower lr"):
        run(tmp_path, hooks=[Spoil()])
    assert checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))["step"] == 2
    assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------------------------------------ the guard


def lines_of(accuracy, completion, length, groups=1.0, spread=1.0):
    rows = zip(*np.broadcast_arrays(accuracy, completion, length, groups, spread))
    return [dict(zip(("accuracy", "completion", "length", "groups", "spread"), map(float, row))) for row in rows]


def test_the_guard_knows_a_collapse():
    falling, steady, shrinking, growing = [0.8] * 5 + [0.3] * 5, [0.8] * 10, [90] * 5 + [9] * 5, [9] * 5 + [90] * 5
    assert "accuracy fell from 0.80 to 0.30 while answers shrank from 90 to 9" in collapsed(
        lines_of(falling, steady, shrinking), 5, 0.5
    )
    assert "completion fell" in collapsed(lines_of(steady, falling, shrinking), 5, 0.5)
    for fine in (lines_of(falling, steady, growing), lines_of(steady, steady, shrinking), lines_of(falling, 1, 20)):
        assert collapsed(fine, 5, 0.5) is None
    assert collapsed(lines_of(falling, steady, shrinking), 5, 0.3) is None  # a third is kept
    assert collapsed(lines_of(falling, steady, shrinking), 0, 0.5) is None
    assert collapsed(lines_of(falling, steady, shrinking)[:9], 5, 0.5) is None
    nothing = lines_of([0.0] * 5, 1.0, 20.0, groups=0.0)
    assert "nothing to learn: for 5 steps all answers to a problem earned the same;" in collapsed(nothing, 5, 0.5)
    assert "(and all lengths equal)" in collapsed(lines_of([0.0] * 5, 1.0, 20.0, 0.0, 0.0), 5, 0.5)
    assert collapsed(lines_of([0.0] * 5, 1.0, 20.0, groups=[0, 0, 1, 0, 0]), 5, 0.5) is None


def test_a_run_with_nothing_to_learn_stops_says_so_and_stays_stopped(tmp_path):
    class Same(Right):
        def score(self, groups, step):
            return [[1.0 for _ in g.traces] for g in groups]

    steps = []

    def go(window):
        settings = dataclasses.replace(SETTINGS, window=window)
        problems = Short().problems("train", 7)
        tell = lambda at, of, line: steps.append(at)  # noqa: E731
        return rollout(loaded(), Short(), problems, settings, tmp_path, Same(), progress=tell)

    with pytest.warns(UserWarning, match="stopped after step 3 of 6: nothing to learn"):
        result = go(3)
    assert steps == [1, 2, 3]
    assert result.stopped.startswith("nothing to learn")
    assert result.lines[-1]["loss"] == 0 == result.lines[-1]["grad_norm"]
    with pytest.warns(UserWarning, match="stopped after step 3"):
        assert go(3) == result  # again, the same end
    assert steps == [1, 2, 3]
    assert len(go(0).lines) == 6  # with the guard off it goes on
    assert steps == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------------------- refusals


def test_a_group_of_one_needs_a_baseline(tmp_path):
    settings = dataclasses.replace(SETTINGS, samples=1)
    with pytest.raises(ThriftyError, match=r"samples=1 with credit GroupRelative: .*RunningBaseline\(\)"):
        run_with(settings, tmp_path)
    once = dataclasses.replace(settings, steps=2)
    result = rollout(loaded(), Short(), Short().problems("train", 7), once, tmp_path, Even(), RunningBaseline())
    assert result.lines[1]["groups"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"problems": 8}, "7 problems do not fill a step of 8"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ThriftyError, match=message):
        run_with(dataclasses.replace(SETTINGS, **changes), tmp_path)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda groups: [[1.0] for _ in groups], "Bad must return one number per trace"),
        (lambda groups: [[math.nan] * 4 for _ in groups], r"Bad gave \[nan, .* for problem p\d: not finite"),
    ],
)
def test_bad_rewards(tmp_path, scores, message):
    class Bad:
        def score(self, groups, step):
            return scores(groups)

    with pytest.raises(ThriftyError, match=message):
        rollout(loaded(), Short(), Short().problems("train", 7), SETTINGS, tmp_path, Bad())


def test_bad_parts(tmp_path):
    with pytest.raises(ThriftyError, match="divides by max_tokens"):
        constant_length([3], None)
    frozen = loaded(adapter=False)
    frozen.model.requires_grad_(False)
    with pytest.raises(ThriftyError, match="nothing to train"):
        rollout(frozen, Short(), Short().problems("train", 7), SETTINGS, tmp_path)
    with pytest.raises(ThriftyError, match="same id"):
        Problems([Problem("a", "x", None)] * 4, 2)
    with pytest.raises(ThriftyError, match="Clipped is trained on what the model sampled itself"):
        Clipped().loss(frozen.model, collate([[Example([70], [71, 72])]]), 0, {})
    with pytest.raises(ThriftyError, match="does not tell token ids"):
        document(dataclasses.replace(a_trace(), prompt_ids=None), np.zeros(4), 1.0)


def test_an_epoch_of_problems_has_each_once_and_no_step_twice():
    problems = Short().problems("train", 7)
    source = Problems(problems, 3, seed=1)
    steps = [[p.id for p in source.next(step, {})] for step in range(40)]
    assert all(len(set(step)) == 3 for step in steps)
    assert all(not set(steps[i]) & set(steps[i + 1]) for i in range(0, 40, 2))
    assert len({tuple(step) for step in steps}) > 15
    assert {p for step in steps for p in step} == {p.id for p in problems}


def test_a_strategy_and_a_prompt_of_ones_own(tmp_path):
    class Twice:
        """Continues its own first try: the part that went before is context, not to be trained."""

        def solve(self, problem, rng):
            [first] = yield Sample(problem.prompt, temperature=1.0, max_tokens=3)
            again = yield Sample(problem.prompt, n=2, prefix=first.ids, inject="!", temperature=1.0, max_tokens=5)
            return again[0]

    reward, seen = Even(), []

    class See(NoHook):
        def before_step(self, state):
            seen.extend(example for batch in state.batches for example in batch.examples)

    settings = dataclasses.replace(SETTINGS, steps=1, epochs=1, minibatches=1, aggregate=sequence_mean)
    rollout(
        loaded(), Short(), Short().problems("train", 7), settings, tmp_path, reward, strategy=Twice(), hooks=[See()]
    )
    assert [len(group.traces) for group in reward.groups] == [3, 3, 3]
    later = [e for e in seen if e.mask[0] == 0]
    assert later
    assert all(e.advantages[0] == 0 and e.target_ids[0] == ord("!") - 33 for e in later)


# ------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    two_processes("test_rollout", "t.run(sys.argv[1])", tmp_path / "two")
    two = [json.loads(line) for line in (tmp_path / "two" / "rollout.jsonl").read_text().splitlines()]
    one = run(tmp_path / "one").lines
    for mine, theirs in zip(two, one, strict=True):
        assert [mine[k] for k in FIGURES] == pytest.approx([theirs[k] for k in FIGURES], rel=1e-3, abs=1e-5)
