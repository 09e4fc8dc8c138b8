"""``thrifty run`` and ``thrifty measure`` from the outside: what they leave, how they resume, what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import tiny
from thrifty.cli import app
from thrifty.traces import store

FIELDS = {
    "name", "alpha", "accuracy", "accuracy_low", "accuracy_high", "completion_rate", "thought_tokens",
    "answer_tokens", "prompt_tokens", "tokens_per_right_answer", "seconds",
}  # fmt: skip
SMALL = ("--n", "6", "--max-tokens", "20", "--batch-size", "16")
TRAIN = ("--train-n", "16", "--steps", "4", "--batch-size", "8", "--alphas", "0,0.5,1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


def thrifty(*words: str) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: str) -> str:
    result = thrifty(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def figures(folder: Path) -> list[dict[str, object]]:
    """What must be the same in every run of one configuration: everything but seconds."""
    settings = json.loads((folder / "result.json").read_text("utf-8"))["settings"]
    return [{k: v for k, v in s.items() if "second" not in k} for s in settings]


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    result = thrifty("run", "cot-valve", "--model", model, "--runs", runs, "--name", "one", *SMALL, *TRAIN)
    assert result.exit_code == 0, result.output
    return runs / "one"


def test_a_run_leaves_result_traces_adapter_and_report(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = json.loads((run / "result.json").read_text("utf-8"))
    assert {"recipe", "model", "task", "n", "seed", "settings"} <= set(result)
    assert [s["alpha"] for s in result["settings"]] == [0, 0.5, 1]
    assert all(set(s) >= FIELDS for s in result["settings"])
    rows = list(store.read(run / "traces.parquet"))
    assert len(rows) == 3 * 6
    for setting in result["settings"]:
        thought = [row.thought_tokens for row in rows if row.setting == setting["name"]]
        assert setting["thought_tokens"] == pytest.approx(sum(thought) / 6)
    assert (run / "report.html").stat().st_size > 10_000
    base = AutoModelForCausalLM.from_pretrained(result["model"])
    PeftModel.from_pretrained(base, str(run / "adapter"))


def test_the_effective_configuration_runs_again_to_the_same_figures(run: Path, tmp_path: Path) -> None:
    result = thrifty("run", run / "config.yaml", "--runs", tmp_path, "--name", "again")
    assert result.exit_code == 0, result.output
    assert figures(tmp_path / "again") == figures(run)


def test_a_finished_run_is_shown_not_run_again(run: Path) -> None:
    before = (run / "result.json").stat().st_mtime_ns
    model = json.loads((run / "result.json").read_text("utf-8"))["model"]
    result = thrifty(
        "run", "cot-valve", "--model", model, "--runs", run.parent, "--name", "one", *SMALL, *TRAIN, "--json"
    )
    assert json.loads(result.stdout)["settings"][0]["name"].startswith("long")
    assert (run / "result.json").stat().st_mtime_ns == before


def test_a_folder_with_another_run_or_other_things_is_left_alone(run: Path, model: str, tmp_path: Path) -> None:
    told = refused("run", "cot-valve", "--model", model, "--runs", run.parent, "--name", "one", *SMALL, "--seed", "7")
    assert "seed was 0, is 7" in told
    assert "--name" in told
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "is no run of thrifty" in refused(
        "run", "cot-valve", "--model", model, "--runs", tmp_path, "--name", "mine", *SMALL, *TRAIN
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_figures(number: int, run: Path, model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thrifty.cli", "run", "cot-valve", "--model", model, "--runs", str(tmp_path)]
    command += ["--name", "cut", *SMALL, *TRAIN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "stages" / "valve.working" / "train.jsonl"
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if number == signal.SIGINT and process.returncode != 0:
        assert process.returncode == 130
        assert "Run the same command to go on" in errors
    assert not (tmp_path / "cut" / "report.html").exists() or process.returncode == 0
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=280)
    assert figures(tmp_path / "cut") == figures(run)


def test_a_plan_says_tokens_time_and_disk_and_writes_nothing(model: str, tmp_path: Path) -> None:
    result = thrifty("run", "cot-valve", "--model", model, "--runs", tmp_path, *SMALL, *TRAIN, "--plan")
    assert result.exit_code == 0, result.output
    for word in ("tokens", "min", "MB"):
        assert word in result.output
    assert not list(tmp_path.iterdir())


STUDENT = ("--model", "long", "--n", "8", "--train-n", "24", "--steps", "3", "--batch-size", "16")


@pytest.mark.parametrize(
    "words",
    [
        ("cot-valve", "--short-from", "compress"),
        pytest.param(("cot-valve", "--short-from", "short"), marks=pytest.mark.slow),
        ("cot-valve", "--tuning", "++"),
        pytest.param(("cot-valve", "--tuning", "+p"), marks=pytest.mark.slow),
        pytest.param(
            ("cot-valve", "--tuning", "++", "--mixchain", "z", "--short-from", "short"), marks=pytest.mark.slow
        ),
        ("c3ot",),
    ],
    ids=" ".join,
)
def test_every_way_to_shorten_runs_on_a_student(words: tuple[str, ...], tmp_path: Path) -> None:
    result = thrifty("run", *words, *STUDENT, "--runs", tmp_path, "--name", "s")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "s" / "result.json").read_text("utf-8"))["settings"]
    assert settings[0]["accuracy"] > 0.5
    assert len({s["thought_tokens"] for s in settings}) > 2  # the trained weights do something
    log = [json.loads(line)["loss"] for line in next(tmp_path.glob("s/stages/*/train.jsonl")).open()]
    assert len(log) == 3


def test_chains_that_nobody_got_right_are_no_lesson(model: str, tmp_path: Path) -> None:
    path = tmp_path / "hard.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": "never"}) for i in range(99)))
    words = ("--model", model, "--task", f"file:{path}", "--runs", tmp_path, *SMALL, "--train-n", "8")
    mixed = ("--tuning", "++", "--mixchain", "z", "--short-from", model)
    assert "MixChain is empty" in refused("run", "cot-valve", *words, "--name", "a", *mixed)
    told = refused("run", "cot-valve", *words, "--name", "b", "--short-from", "compress")
    assert "solved none of the training problems" in told
    assert "no reference chains" in refused("run", "cot-valve", *words, "--name", "c")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--alphas", "0,much"), "--alphas needs a number, not 'much'"),
        (("--alphas", "nan"), "alphas must be numbers"),
        (("--rankk", "4"), "Did you mean"),
        (("--tuning", "plan"), "--tuning is 'plan'; choose plain"),
        (("--short-from",), "needs a value"),
        (("--task", "rol"), "Did you mean"),
        (("--short-from", "./nowhere"), "no folder ./nowhere"),
        (("--price", "cheap"), "--price takes"),
    ],
)
def test_wrong_words_are_told_before_any_work(words: tuple[str, ...], told: str, model: str, tmp_path: Path) -> None:
    output = refused("run", "cot-valve", "--model", model, "--runs", tmp_path, "--name", "x", *SMALL, *words)
    assert told.lower() in output.lower()
    assert not list(tmp_path.glob("x/stages"))


@pytest.mark.parametrize(("name", "told"), [("./missing", "no folder ./missing"), ("EMPTY", "has no config.json")])
def test_a_missing_model_is_named(name: str, told: str, tmp_path: Path) -> None:
    if name == "EMPTY":
        name = str(tmp_path / "empty")
        Path(name).mkdir()
    assert told in refused("run", "cot-valve", "--model", name, "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_template_that_eats_chains_does_no_harm(tmp_path: Path) -> None:
    eats = tiny.save(tmp_path / "eats", template="eats")
    result = thrifty("run", "cot-valve", "--model", eats, "--runs", tmp_path, "--name", "e", *SMALL, *TRAIN)
    assert result.exit_code == 0, result.output


def test_a_prompt_longer_than_the_context_is_named(model: str, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": f"{i} " + "word " * (2000 if i == 3 else 2), "answer": "1"} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    told = refused("measure", "--model", model, "--task", f"file:{path}?split=test", "--runs", tmp_path, *SMALL)
    assert "512" in told
    assert "context" in told


def test_measure_compares_strategies_and_counts_money(model: str, tmp_path: Path) -> None:
    words = ("--strategy", "single-pass", "--strategy", "self-consistency:k=3", "--price", "1,10")
    result = thrifty("measure", "--model", model, "--runs", tmp_path, "--name", "m", *SMALL, *words)
    assert result.exit_code == 0, result.output
    one, three = json.loads((tmp_path / "m" / "result.json").read_text("utf-8"))["settings"]
    assert three["calls"] == 3 * one["calls"]
    assert three["answer_tokens"] > 2 * one["answer_tokens"]
    assert 0 < one["money"] < three["money"]


def test_logs_without_answers_are_measured_by_agreement(model: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"what is {i} + {i}?"}) for i in range(5)))
    words = ("--task", f"file:{path}?split=test", "--strategy", "greedy", "--strategy", "single-pass")
    told = refused("measure", "--model", model, "--runs", tmp_path, *SMALL, *words)
    assert "answer" in told
    result = thrifty("measure", "--model", model, "--runs", tmp_path, "--name", "n", *SMALL, *words, "--no-gold")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "n" / "result.json").read_text("utf-8"))["settings"]
    assert [s["accuracy"] for s in settings] == [None, None]
    assert all("agreement" in s for s in settings)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert "cannot read" in refused("run", path)
    path.write_text("a: [1")
    assert "is no YAML file" in refused("run", path)
    path.write_text(yaml.safe_dump({"model": "long"}))
    assert "no `recipe`" in refused("run", path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_told_and_leaves_no_half_file(model: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        told = refused("run", "cot-valve", "--model", model, "--runs", disk, "--name", "full", *SMALL, *TRAIN)
        assert "space" in told.lower() or "full" in told.lower()
        assert not list(disk.glob("full/**/*.parquet"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
