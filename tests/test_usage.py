"""What ``thrifty show`` says of using a method on one's own model, run on one: every command and every script of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import tiny
from thrifty import registry
from thrifty.cli import app
from thrifty.tune.adapter import lora, save_adapter

torch.set_num_threads(1)
METHODS = registry.methods(plugins=False)
SMALL = ("--n", "2", "--max-tokens", "8", "--batch-size", "64")
SIZES = {"train_n": 16, "steps": 1, "train_batch_size": 4, "problems": 2}


def thrifty(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = thrifty(*words)
    assert result.exit_code == 0, f"{words}: {result.output} {result.exception!r}"
    return result.output


def refused(*words: object) -> str:
    result = thrifty(*words)
    assert result.exit_code == 2, f"{words}: {result.output} {result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose every weight was trained a little, as one finds it."""
    made = lora(tiny.loaded().model, rank=4, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "lora_" in name:
                value.add_(0.01 * torch.randn_like(value))
    return save_adapter(made, tmp_path_factory.mktemp("adapters") / "tuned")


@functools.cache
def shown(key: str) -> list[str]:
    """What stands under "run it", comments left out."""
    lines = [line[2:] for line in done("show", key).partition("\nrun it\n")[2].splitlines()]
    return [line for line in lines if not line.startswith("#")]


def of(*families: str) -> list[str]:
    return [key for key, method in METHODS.items() if method.family in families]


def commands(lines: list[str], model: Path, *begin: str) -> list[list[str]]:
    """The words of those commands that begin so, without ``thrifty``, on a model and a task."""
    words = [shlex.split(line) for line in lines if line.startswith("thrifty ")]
    named = {"DIR": str(model), "TASK": "roll"}
    return [[named.get(w, w) for w in line[1:]] for line in words if tuple(line[1 : 1 + len(begin)]) == begin]


def script(lines: list[str], model: Path) -> str:
    """The Python of it, small."""
    text = "\n".join(line for line in lines if not line.startswith("thrifty "))
    for large, small in (("DIR", model), ("OTHER", model), ("TASK", "roll"), ("1000", 4), ("100)", "2)")):
        text = text.replace(str(large), str(small))
    return text.replace("steps=100", "steps=1")


def test_every_method_is_used_by_a_command_or_by_a_script_that_does_something():
    found = {key: shown(key) for key in METHODS}
    assert not [key for key, lines in found.items() if not lines or lines[-1].startswith("method = registry.load")]
    scripts = {key for key, lines in found.items() if not any(line.startswith("thrifty ") for line in lines)}
    assert scripts == {*of("weights.merge"), *(key for key in of("tune.objective") if pairs(key))}

    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text("utf-8")
    told = set(re.findall(r"`(thrifty (?:run|measure|adapter) [^`]*)`", text))
    assert len(told) > 10
    assert told <= {line for lines in found.values() for line in lines}
    assert {method.family for method in METHODS.values()} <= set(re.findall(r"`([a-z.]+)`", text))


def pairs(key: str) -> bool:
    return getattr(registry.load(key), "pairs", False) is True


TRAINED = (
    "recipes",
    "tune.adapter",
    "tune.objective",
    "tune.reward",
    "tune.sparse",
    "traces.select",
    "traces.compress",
)


@pytest.mark.parametrize("key", of(*TRAINED))
def test_a_recipe_takes_the_method_up_to_its_plan(key, model, tmp_path):
    found = commands(shown(key), model, "run")
    assert len(found) == (not pairs(key))
    for words in found:
        names = {spec.name for spec in dataclasses.fields(registry.load(words[1]))}
        small = [w for name, n in SIZES.items() if name in names for w in (f"--{name.replace('_', '-')}", str(n))]
        told = done(*words, *small, "--n", "2", "--max-tokens", "2", "--runs", tmp_path, "--plan")
        assert "time about" in told


def test_strategies_and_verifiers_are_measured(model, tmp_path):
    keys = of("solve.search", "solve.verify", "measure.metric")
    found = [words for key in keys for words in commands(shown(key), model, "measure")]
    strategies = [words[words.index("--strategy") + 1] for words in found]
    assert len(strategies) == len(keys)
    asked = [word for text in strategies for word in ("--strategy", text)]
    result = json.loads(done("measure", *found[0][1:5], *asked, *SMALL, "--runs", tmp_path, "--name", "all", "--json"))
    assert [setting["name"] for setting in result["settings"]] == strategies


@pytest.mark.parametrize("key", of("tune.objective", "weights.merge", "measure.metric"))
def test_scripts_run(key, model, tmp_path, monkeypatch, capsys):
    if text := script(shown(key), model):
        monkeypatch.chdir(tmp_path)
        exec(compile(text, key, "exec"), {})
        left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".parquet")]
        family = METHODS[key].family
        assert {
            "tune.objective": "adapter_model.safetensors", "weights.merge": "model.safetensors",
            "measure.metric": "0000000.parquet",
        }[family] in left  # fmt: skip


# ---------------------------------------------------------------------------------------------- --decoder


def test_a_decoder_gives_the_same_answers_in_fewer_forwards(model, tmp_path):
    [[_, *words]] = [w for key in of("decode.accelerate") for w in commands(shown(key), model, "measure")]
    words += ["--strategy", "greedy", "--strategy", "short-m-at-k:m=1,k=2", "--n", "3", "--max-tokens", "30"]
    words += ["--runs", str(tmp_path), "--json"]
    drafted = json.loads(done("measure", *words))
    at = words.index("--decoder")
    plain = json.loads(done("measure", *words[:at], *words[at + 2 :]))
    for with_it, without in zip(drafted["settings"], plain["settings"], strict=True):
        for name in ("name", "thought_tokens", "answer_tokens", "completion_rate", "accuracy"):
            assert with_it[name] == without[name]
    [row], [before] = drafted["meter"], plain["meter"]
    assert row["accepted"] > 0
    assert before["drafted"] == 0
    alone, tokens = row["positions"] - row["prefill"] - row["padding"] - row["drafted"], row["thought"] + row["answer"]
    assert tokens - row["accepted"] == alone < before["positions"] - before["prefill"] - before["padding"]
    assert drafted["notes"][0].startswith(f"{words[at + 1]}: {tokens / alone:.2f} tokens per")
    assert float(drafted["notes"][0].split()[1]) > 1
    assert not plain["notes"]
    again = json.loads(done("measure", *words, "--price", "1,2"))
    assert again["notes"] == drafted["notes"], "nothing was decoded, and what was found still stands"


def test_what_cannot_be_decoded_is_refused_with_a_remedy(model, tmp_path):
    measure = ("measure", "--model", model, "--task", "roll", "--runs", tmp_path, "--decoder", "lookahead-trie")
    assert "without --decoder" in refused(*measure, "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1")
    output = refused(*measure, "--strategy", "single-pass", "--strategy", "best-of-n:n=2")
    assert "best-of-n:n=2 asks for logprobs" in output
    assert "without --decoder" in output
    assert "give one of decode.accelerate (lookahead-trie)" in refused(*measure[:-1], "compeft")
    assert "no field 'node'" in refused(*measure[:-1], "lookahead-trie:node=4")
    assert not list(tmp_path.iterdir()), "refused before any work"


# ----------------------------------------------------------------------------------------- adapter compress


def test_an_adapter_goes_through_a_file_and_is_measured(model, adapter, tmp_path):
    [words, back] = [w for key in of("weights.codec") for w in commands(shown(key), model, "adapter")]
    named = {"ADAPTER": adapter, "FILE": tmp_path / "file", "FOLDER": tmp_path / "back"}
    told = done(*(named.get(word, word) for word in words))
    assert "times smaller" in told
    done(*(named.get(word, word) for word in back))
    assert (
        load_file(tmp_path / "back" / "adapter_model.safetensors").keys()
        == load_file(adapter / "adapter_model.safetensors").keys()
    )
    done("measure", "--model", model, "--adapter", tmp_path / "back", *SMALL, "--runs", tmp_path / "runs")
