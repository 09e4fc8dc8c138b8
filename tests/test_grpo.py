"""``thrifty run grpo``: any reward on a model of the user's, what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tiny
from thrifty import registry, tasks
from thrifty.cli import app
from thrifty.contracts import Card, ThriftyError
from thrifty.fields import from_arguments
from thrifty.lab import Lab
from thrifty.progress import Progress
from thrifty.traces import store

SMALL = ("--task", "roll", "--n", "4", "--max-tokens", "8", "--batch-size", "16")
TRAIN = ("--train-n", "6", "--steps", "2", "--problems", "2", "--samples", "2", "--lr", "1e-2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


def grpo(model: str, runs: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["run", "grpo", "--model", model, "--runs", str(runs), "--name", "r", *words])


def result_of(runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "r" / "result.json").read_text("utf-8"))
    return found


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "rollout.jsonl").read_text("utf-8").splitlines()]


def test_a_reward_that_needs_entropies_runs_on_a_users_model(model: str, tmp_path: Path) -> None:
    from peft import PeftModel

    words = ("--reward", "pear:a=.5,wrong=.1", "--objective", "clipped:kl=.02,high=.28", "--epochs", "2")
    done = grpo(model, tmp_path, *SMALL, *TRAIN, *words)
    assert done.exit_code == 0, done.output
    result = result_of(tmp_path)
    assert [s["name"] for s in result["settings"]] == ["before", "after"]
    assert [v["setting"] for v in result["verdicts"]] == ["after"]
    assert "reward pear:a=.5,wrong=.1 and the objective clipped:kl=.02,high=.28: 2 steps of 2" in result["notes"][0]
    lines = lines_of(tmp_path / "r" / "stages" / "grpo")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["reward"] == pytest.approx(0.1) for line in lines), "nothing is right, so all earn wrong=.1"
    assert all("kl" in line for line in lines) or not any(line["groups"] for line in lines)
    assert 'data-chart="rollout-accuracy"' in (tmp_path / "r" / "report.html").read_text("utf-8")
    adapter = PeftModel.from_pretrained(tiny.loaded().model, str(tmp_path / "r" / "adapter"))
    assert adapter.peft_config["default"].r == 8


def test_levels_of_length_are_asked_for_in_training_and_measured_one_by_one(model: str, tmp_path: Path) -> None:
    words = ("--reward", "level-length:levels=brief,full,targets=4,40,prices=.8,0", "--window", "1")
    done = grpo(model, tmp_path, *SMALL, *TRAIN, *words)
    assert done.exit_code == 0, done.output
    result = result_of(tmp_path)
    assert [s["name"] for s in result["settings"]] == ["before", "asked brief", "asked full"]
    prompts: dict[str, set[str]] = {}
    for row in store.read(tmp_path / "r" / "traces.parquet"):
        prompts.setdefault(row.setting, set()).add(row.prompt.rpartition("\n")[2])
    assert prompts["asked brief"] == {"Think brief."}
    assert prompts["asked full"] == {"Think full."}
    assert not any(prompt.startswith("Think") for prompt in prompts["before"])
    # A random model is never right, so the guard sees at once that there is nothing to learn.
    assert "The guard stopped training after step 1 of 2: nothing to learn" in result["notes"][1]


MINE = '''"""Pays for even token ids: a reward of the user's own, which a random model can earn."""
import os, signal
from dataclasses import dataclass
import numpy as np
from thrifty.contracts import Card

CARD = Card(key="mine", title="Even tokens", baseline=True)


@dataclass(frozen=True)
class Mine:
    def score(self, groups, step):
        if step == 5 and "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return [[float(np.mean(t.ids[t.start :] % 2 == 0)) for t in g.traces] for g in groups]
'''


def test_a_killed_training_goes_on_to_the_same_adapter(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its sixth step, after the first checkpoint, and taken up again; beside one that was left alone."""
    (tmp_path / "methods" / "tune.reward").mkdir(parents=True)
    (tmp_path / "methods" / "tune.reward" / "mine.py").write_text(MINE)
    settings = {"reward": "mine", "train_n": 8, "steps": 6, "problems": 2, "samples": 2, "lr": 1e-2, "window": 0}
    recipe = registry.load("grpo")(**settings, rollout_max_tokens=6)
    code = f"""
from pathlib import Path
from thrifty import tasks
from thrifty.lab import Lab
from thrifty.recipes.grpo import GRPO
lab = Lab(Path("cut"), {model!r}, tasks.load("roll"), batch_size=16)
{recipe!r}.reinforced(lab, lab.problems("train", 8))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILLED": "yes"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=280)
    assert done.returncode == -signal.SIGKILL
    working = tmp_path / "cut" / "stages" / "grpo.working"
    assert [path.name for path in working.glob("checkpoints/step-*")] == ["step-00000005"]

    monkeypatch.chdir(tmp_path)
    adapters, logs = [], []
    for name in ("cut", "whole"):
        lab = Lab(tmp_path / name, model, tasks.load("roll"), batch_size=16, progress=Progress(quiet=True))
        before = {key: value.clone() for key, value in lab.loaded().model.state_dict().items()}
        folder = recipe.reinforced(lab, lab.problems("train", 8))
        after = lab.loaded().model.state_dict()
        assert before.keys() == after.keys(), "no part of the LoRA is left on the lab's model"
        assert all((before[key] == after[key]).all() for key in before)
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        logs.append([{k: v for k, v in line.items() if k not in ("seconds", "sampling")} for line in lines_of(folder)])
    assert len(logs[0]) == 6
    assert logs[0] == logs[1]
    assert any(line["groups"] for line in logs[0]), "something was learnt"
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--reward", "clipped"), "--reward is clipped, of family tune.objective: give one of tune.reward"),
        (("--reward", "pear:b=1"), "pear has no field 'b'"),
        (("--objective", "right"), "--objective is right, of family tune.reward: give one of tune.objective"),
        (("--objective", "nll"), "nll is trained on given documents"),
        (("--objective", "dpo:beta=.2"), "dpo is trained on given documents"),
        (("--steps", "0"), "--steps is 0: give at least 1"),
        (("--samples", "1"), "--samples is 1: give at least 2"),
        (("--window", "-1"), "--window is -1: give at least 0"),
        (("--rollout-max-tokens", "0"), "--rollout-max-tokens is 0"),
        (("--rollout-temperature", "0"), "--rollout-temperature is 0: give a number above 0"),
        (("--lr", "-1"), "--lr is -1"),
        (("--temperature", "-1"), "--temperature is -1"),
        (("--margin", "3"), "--margin is 3"),
        (("--train-n", "9"), "--train-n is 9, which does not fill a step"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_wrong_values_are_told_before_any_work(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    cls = registry.load("grpo")
    with pytest.raises(ThriftyError, match=re.escape(told)):  # a lab without a model: none is asked for
        cls(**from_arguments(cls, words)).check(Lab(tmp_path, "no-such-model", tasks.load("roll")))


def test_a_reward_that_nobody_knows_is_told_on_the_command_line(model: str, tmp_path: Path) -> None:
    done = grpo(model, tmp_path, *SMALL, "--reward", "paer")
    assert done.exit_code == 2, done.output
    assert "paer" in done.output
    assert "pear" in done.output
    assert not (tmp_path / "r").exists()


def test_a_reward_that_needs_what_answers_do_not_carry_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pear = sys.modules[registry.load("pear").__module__]
    monkeypatch.setattr(pear, "CARD", Card(key="pear", title="x", needs=("entropies", "hidden")))
    with pytest.raises(ThriftyError, match="pear needs hidden, which sampled answers do not carry"):
        registry.load("grpo")(reward="pear").check(Lab(tmp_path, "no-such-model", tasks.load("roll")))


def test_too_few_gradable_training_problems_are_told_before_any_sampling(model: str, tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1) if i % 2 else None} for i in range(400)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = grpo(model, tmp_path, "--task", f"file:{tmp_path / 'log.jsonl'}", "--n", "4", "--problems", "300")
    assert done.exit_code == 2, done.output
    assert "training problems that can be graded, which do not fill a step" in " ".join(done.output.split())
    assert not list(tmp_path.glob("r/stages/*/*.parquet"))


def test_a_plan_counts_rollouts_updates_and_every_level(tmp_path: Path) -> None:
    cls = registry.load("grpo")
    one = cls(steps=10, problems=4, samples=8, epochs=3)
    assert one.passes(100) == {"sampled": 320 + 200, "trained": 960}
    assert cls(steps=10, problems=4, samples=8, reward="level-length").passes(100)["sampled"] == 320 + 400
