"""``thrifty run`` and ``thrifty measure`` from the outside: what they leave, how they resume, what they refuse."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import tiny
from thrifty import registry, tasks
from thrifty.cli import app
from thrifty.commands import _plan
from thrifty.contracts import Grade, Outcome, Problem, Trace, Usage
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine
from thrifty.lab import Lab, Setting, choose, verdict
from thrifty.measure import summarise
from thrifty.models.load import load
from thrifty.progress import Progress
from thrifty.recipes.kimi_long2short import KimiLong2short
from thrifty.solve.search.single_pass import SinglePass
from thrifty.traces import store
from thrifty.tune.adapter import lora, save_adapter

FIELDS = {
    "name", "alpha", "accuracy", "accuracy_low", "accuracy_high", "completion_rate", "thought_tokens",
    "answer_tokens", "prompt_tokens", "tokens_per_right_answer", "seconds",
}  # fmt: skip
SMALL = ("--n", "6", "--max-tokens", "20", "--batch-size", "16")
TRAIN = ("--train-n", "16", "--steps", "4", "--train-batch-size", "8", "--alphas", "0,0.5,1")


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


def test_the_strength_is_chosen_on_problems_that_are_not_measured(run: Path) -> None:
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert result["calibration"]["n"] == 6
    verdicts = {v["setting"]: v for v in result["calibration"]["verdicts"]}
    assert result["best"] in verdicts
    assert set(verdicts) == {s["name"] for s in result["settings"] if s["alpha"]}
    measured = {row.problem for row in store.read(run / "traces.parquet")}
    chosen_on = {row.problem for path in run.glob("stages/calibrate-*/*.parquet") for row in store.read(path)}
    assert len(chosen_on) == 6
    assert not measured & chosen_on
    assert "was chosen on 6 calibration problems" in (run / "report.html").read_text("utf-8")


def test_the_effective_configuration_runs_again_to_the_same_figures(run: Path, tmp_path: Path) -> None:
    result = thrifty("run", run / "config.yaml", "--runs", tmp_path, "--name", "again")
    assert result.exit_code == 0, result.output
    assert figures(tmp_path / "again") == figures(run)


def test_a_measurements_configuration_runs_again_too(model: str, tmp_path: Path) -> None:
    words = ("--strategy", "greedy", "--strategy", "self-consistency:k=2", "--budget", "30")
    first = thrifty("measure", "--model", model, "--runs", tmp_path, "--name", "one", *SMALL, *words)
    assert first.exit_code == 0, first.output
    config = tmp_path / "one" / "config.yaml"
    again = thrifty("run", config, "--runs", tmp_path, "--name", "two")
    assert again.exit_code == 0, again.output
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    assert "seed was 0, is 1" in refused("run", config, "--runs", tmp_path, "--seed", "1")
    assert "--plan is for recipes" in refused("run", config, "--runs", tmp_path, "--plan")


def test_a_finished_run_is_shown_without_its_stages(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lean"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("stages"))
    result = thrifty("run", folder / "config.yaml", "--runs", tmp_path)
    assert result.exit_code == 0, result.output
    assert "has run already" in result.output
    assert not (folder / "stages").exists()


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


def test_another_split_has_other_problems(run: Path, tmp_path: Path) -> None:
    few = ("--n", "3", "--alphas", "0", "--calibration-n", "0", "--split", "dev")
    result = thrifty("run", run / "config.yaml", "--runs", tmp_path, "--name", "dev", *few)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "dev" / "result.json").read_text("utf-8"))
    assert "best" not in found
    ids = [{row.problem for row in store.read(folder / "traces.parquet")} for folder in (run, tmp_path / "dev")]
    assert not ids[0] & ids[1]
    assert "train" in refused("run", run / "config.yaml", "--split", "train")


def test_two_processes_never_write_one_folder(run: Path) -> None:
    code = f"""
from pathlib import Path
from thrifty.commands._runs import _locked
with _locked(Path({str(run)!r})):
    print("held", flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        told = refused("run", run / "config.yaml", "--runs", run.parent, "--name", run.name)
        assert f"(process {process.pid}) is writing {run}" in told
        process.kill()
    assert thrifty("run", run / "config.yaml", "--runs", run.parent, "--name", run.name).exit_code == 0


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


def test_a_plan_takes_no_more_memory_than_training(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(model)
    forward, shapes = loaded.model.forward, []

    @functools.wraps(forward)
    def seen(*given: Any, **more: Any) -> Any:
        made = forward(*given, **more)
        shapes.append((more["input_ids"].numel(), made.logits.shape[1]))
        return made

    monkeypatch.setattr(loaded.model, "forward", seen)
    for length in (10, 300):
        assert _plan._per_position(loaded, length) > 0
    assert len(shapes) == 4
    assert all(positions <= _plan.POSITIONS and kept == 1 for positions, kept in shapes)


def test_a_plan_counts_the_weights_of_a_model_that_is_trained_as_a_whole(tmp_path: Path) -> None:
    def megabytes(*words: str) -> int:
        result = thrifty("run", "sft", "--model", "long", "--runs", tmp_path, *SMALL, "--plan", *words)
        return int(result.output.split("disk about ")[1].split()[0])

    assert megabytes("--hook", "hft") > megabytes() + 5


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
    assert settings[0]["accuracy"] > 0.2  # of 8 problems; about 0.7 are right
    assert len({s["thought_tokens"] for s in settings}) > 2  # the trained weights do something
    log = [json.loads(line)["loss"] for line in next(tmp_path.glob("s/stages/*/train.jsonl")).open()]
    assert len(log) == 3


def settings(*rows: tuple[float, int]) -> list[Setting]:
    """Settings of 400 problems each: the share that is right and the thinking tokens."""
    made = []
    for share, tokens in rows:
        outcomes = []
        for i in range(400):
            usage = Usage(thought=tokens)
            outcomes.append(Outcome(Problem(str(i), "?", "1"), None, Grade(float(i < share * 400), "1"), [], usage))
        made.append(Setting(f"{tokens}", outcomes, 1.0))
    return made


def test_the_shortest_that_holds_is_chosen_else_the_most_accurate() -> None:
    long, *others = settings((0.9, 100), (0.9, 60), (0.895, 40), (0.8, 10))
    best, verdicts = choose(others, long, 0.03)
    assert [v["non_inferior"] for v in verdicts] == [True, True, False]
    assert best == "40"
    long, *others = settings((0.9, 100), (0.6, 60), (0.7, 40), (0.7, 30))
    assert choose(others, long, 0.03)[0] == "30"


def test_an_outcome_read_back_costs_what_it_cost(tmp_path: Path) -> None:
    from thrifty.lab import Lab

    usage = Usage(prompt=7, cached=3, thought=4, answer=2, injected=1, calls=1, seconds=0.25, latent=5, partial=1)

    problems = tasks.load("roll").problems("test", 3)
    lab = Lab(tmp_path, "long", tasks.load("roll"))
    trace = Trace(np.arange(6), "1 + 4 = 5 .", "5", True, "stop", usage=usage)
    made = [Outcome(p, trace, Grade(1.0, "5"), [trace], usage) for p in problems]
    store.write(lab.stage("s") / "0000000.parquet", store.rows_from(made, "s", ids=True))
    assert [o.usage for o in lab.solve("s", SinglePass(), problems)] == [usage] * 3


def test_a_plan_counts_the_calibration() -> None:
    recipe = registry.load("cot-valve")
    assert recipe(calibration_n=50).passes(100)["sampled"] - recipe(calibration_n=0).passes(100)["sampled"] == 6 * 50
    assert recipe(calibration_n=500).passes(100) == recipe(calibration_n=100).passes(100)


def test_no_field_of_a_recipe_hides_behind_an_option_of_the_command() -> None:
    from thrifty.commands.run import main

    options = {parameter.name for parameter in main.params}
    for method in registry.methods(plugins=False).values():
        if method.family == "recipes":
            assert not options & set(registry.load(method.key).__dataclass_fields__), method.key


# ------------------------------------------------------------------------------------------- what is graded


def test_a_task_without_gold_answers_is_graded_by_its_checker(tmp_path: Path) -> None:
    task = tasks.load("rg:graph_color?min_num_vertices=3&max_num_vertices=4")
    problems = task.problems("test", 2)
    assert [p.answer for p in problems] == [None, None]

    def colours(prompt: str, key: object) -> str:
        """The first problem is coloured vertex by vertex, the second in one colour."""
        lists = [
            json.loads(line.split(":", 1)[1].replace("(", "[").replace(")", "]")) for line in prompt.splitlines()[2:5]
        ]
        found: dict[str, int] = {}
        for vertex in lists[0]:
            near = {found.get(str(a if b == vertex else b)) for a, b in lists[1] if vertex in (a, b)}
            free = [c for c in lists[2] if c not in near] if prompt == problems[0].prompt else lists[2]
            found[str(vertex)] = free[0]
        return "think </think> The answer is " + json.dumps(found)

    outcomes = Runner(ScriptedEngine(colours), task).solve(SinglePass(), problems)
    assert [o.grade.right for o in outcomes] == [True, False]
    figures = summarise(outcomes, "x")
    assert (figures["accuracy"], figures["ungraded"]) == (0.5, 0)
    store.write(tmp_path / "t.parquet", store.rows_from(outcomes, "x"))
    assert [row.right for row in store.read(tmp_path / "t.parquet")] == [True, False]


def test_rows_without_a_usable_answer_are_shown_and_never_right(model: str, tmp_path: Path) -> None:
    path = tmp_path / "golds.jsonl"
    rows = [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(5)] + [{"question": "6?", "answer": "lost"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = thrifty(
        "measure", "--model", model, "--task", f"file:{path}?split=test", "--runs", tmp_path, "--name", "g", *SMALL
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "g" / "result.json").read_text("utf-8"))
    assert found["settings"][0]["ungraded"] == 1
    assert any("row 6" in note and "cannot be parsed" in note for note in found["notes"])
    assert any(note.startswith("1 of 6 problems cannot be graded") for note in found["notes"])
    assert [r.right for r in store.read(tmp_path / "g" / "traces.parquet") if r.prompt == "6?"] == [None]


def test_what_cannot_be_graded_stands_in_no_verdict() -> None:
    long, brief = settings((0.5, 100), (0.5, 50))
    lost = [Outcome(Problem(f"no {i}", "?", None), None, Grade(0.0, None), [], Usage(thought=100)) for i in range(400)]
    with_lost = [Setting(s.name, [*s.outcomes, *lost]) for s in (brief, long)]
    found, plain = verdict(*with_lost, None, 0.03), verdict(brief, long, None, 0.03)
    assert found["difference_low"] == plain["difference_low"]
    assert (found["saving"], plain["saving"]) == (0.25, 0.5)


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
        (("--alphas", "nan"), "--alphas needs a number, not 'nan'"),
        (("--mix-alphas", "inf"), "--mix-alphas needs a number, not 'inf'"),
        (("--top-p", "1.5"), "--top-p is 1.5: give more than 0 and at most 1"),
        (("--temperature", "-1"), "--temperature is -1: give 0 or more"),
        (("--mixchain", "z"), "give --tuning ++ or +p"),
        (("--reference", "./nowhere"), "no folder ./nowhere"),
        (("--rankk", "4"), "Did you mean"),
        (("--tuning", "plan"), "--tuning is 'plan'; choose plain"),
        (("--short-from",), "needs a value"),
        (("--task", "rol"), "Did you mean"),
        (("--short-from", "./nowhere"), "no folder ./nowhere"),
        (("--price", "cheap"), "--price takes"),
        (("--steps", "0"), "--steps is 0: give at least 1"),
        (("--margin", "3"), "--margin is 3: give a share"),
        (("--alphas", "0,1,1"), "alphas must differ: 0, 1, 1"),
        (("--calibration-n", "-5"), "--calibration-n is -5"),
        (("--device", "gpu"), "--device is 'gpu'; choose auto, cpu"),
        (("--device", "cuda:77"), "use --device auto"),
    ],
)
def test_wrong_words_are_told_before_any_work(words: tuple[str, ...], told: str, model: str, tmp_path: Path) -> None:
    output = refused("run", "cot-valve", "--model", model, "--runs", tmp_path, "--name", "x", *SMALL, *words)
    assert told.lower() in output.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ways", "dpo,dpo"), "--ways is dpo,dpo: name each once"),
        (("--ways", "rl", "--train-n", "15"), "fills no step of rl: give at least 16"),
        (("--rl-steps", "0"), "--rl-steps is 0"),
        (("--rl-max-tokens", "0"), "--rl-max-tokens is 0"),
        (("--beta", "0"), "--beta is 0: give a number above 0"),
        (("--tau", "nan"), "--tau needs a number"),
        (("--short", "./nowhere"), "no folder ./nowhere"),
    ],
)
def test_what_no_way_to_shorter_chains_can_use_is_told_first(
    words: tuple[str, ...], told: str, model: str, tmp_path: Path
) -> None:
    output = refused("run", "kimi-long2short", "--model", model, "--runs", tmp_path, "--name", "x", *SMALL, *words)
    assert told in output
    assert not list(tmp_path.iterdir())


def test_ways_may_be_gone_in_any_order(tmp_path: Path) -> None:
    """The LoRA of the first is still on the lab's model when the second begins, which merges plain ones."""
    lab = Lab(tmp_path, "long", tasks.load("roll"), n=4, progress=Progress(quiet=True))
    engine = lab.engine()
    engine.add_adapter("valve", save_adapter(lora(load("long").model, rank=2), tmp_path / "adapter"))
    merged = KimiLong2short(short="short").merged(lab)
    plain = {name: load(name).model.state_dict() for name in ("long", "short")}
    for name, value in merged.model.state_dict().items():
        assert torch.allclose(value, (plain["long"][name] + plain["short"][name]) / 2, atol=1e-6)


def test_one_setting_is_measured_once(model: str, tmp_path: Path) -> None:
    words = ("measure", "--model", model, "--runs", tmp_path, *SMALL)
    assert "--strategy is given twice" in refused(*words, "--strategy", "greedy", "--strategy", "greedy")
    assert "--alpha needs a number, not 'nan'" in refused(*words, "--alpha", "nan")


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
    words = ("--task", f"file:{path}?split=test", "--runs", tmp_path, "--name", "m", *SMALL)
    told = thrifty("measure", "--model", model, *words)
    assert told.exit_code == 0, told.output
    [setting] = json.loads((tmp_path / "m" / "result.json").read_text("utf-8"))["settings"]
    assert (setting["n"], setting["failed"]) == (5, 1)
    assert "1 of 5 problems failed" in told.output
    assert "512" in told.output
    assert "context" in told.output


def test_measure_compares_strategies_and_counts_money(model: str, tmp_path: Path) -> None:
    words = ("--strategy", "single-pass", "--strategy", "self-consistency:k=3", "--price", "1,10")
    result = thrifty("measure", "--model", model, "--runs", tmp_path, "--name", "m", *SMALL, *words)
    assert result.exit_code == 0, result.output
    one, three = json.loads((tmp_path / "m" / "result.json").read_text("utf-8"))["settings"]
    assert three["calls"] == 3 * one["calls"]
    assert three["answer_tokens"] > 2 * one["answer_tokens"]
    assert 0 < one["money"] < three["money"]


def test_strategies_that_differ_in_marks_alone_are_measured_each_by_itself(model: str, tmp_path: Path) -> None:
    names = [f"trimr:markers= ,answer={pattern},agreements=1,interval=5" for pattern in (r"(\w)", r"!(\w)")]
    words = [word for name in names for word in ("--strategy", name)]
    result = thrifty("measure", "--model", model, "--runs", tmp_path, "--name", "m", *SMALL, *words)
    assert result.exit_code == 0, result.output
    stages = [path.name for path in (tmp_path / "m" / "stages").iterdir()]
    assert len(stages) == 2
    assert len({name.rpartition("-")[0] for name in stages}) == 1, "their words are the same"


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
    for recipe in ("cot-valve", "measure"):
        path.write_text(yaml.safe_dump({"recipe": recipe, "modell": "long"}))
        assert "has 'modell', which is no setting. Did you mean 'model'?" in refused("run", path)
    for name, value in (("n", "abc"), ("n", 1.5), ("max_tokens", -5), ("seed", -1), ("dtype", "int4")):
        path.write_text(yaml.safe_dump({"recipe": "cot-valve", name: value}))
        assert f"config.yaml: {name}: " in refused("run", path)


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
