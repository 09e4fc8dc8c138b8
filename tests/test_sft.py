"""``thrifty run sft``: every way to train on a model of one's own, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import tiny
from thrifty import assets, registry, tasks
from thrifty.cli import app
from thrifty.contracts import Chain, ThriftyError
from thrifty.lab import Lab
from thrifty.traces import store
from thrifty.tune.adapter import lora_sb

SMALL = ("--n", "4", "--train-n", "12", "--steps", "2", "--train-batch-size", "4", "--max-tokens", "12")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


def sft(folder: Path, model: str, *words: str) -> dict[str, Any]:
    """The result of a run named "r" in ``folder``."""
    command = ["run", "sft", "--model", model, "--task", "roll", *SMALL, *words, "--runs", str(folder), "--name", "r"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads((folder / "r" / "result.json").read_text("utf-8"))
    assert [s["name"] for s in result["settings"]] == ["before", "after"]
    return result


def logged(folder: Path) -> list[dict[str, float]]:
    path = folder / "r" / "stages" / "sft" / "train.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def written(folder: Path, setting: str) -> list[list[int]]:
    """The token ids of every answer of a setting, in the order of problems."""
    rows = [row for row in store.read(folder / "traces.parquet") if row.setting == setting]
    return [list(row.ids or []) for row in sorted(rows, key=lambda row: row.problem)]


def test_without_a_new_field_it_is_the_plain_lora_of_the_lab(model: str, tmp_path: Path) -> None:
    notes = sft(tmp_path, model)["notes"]
    assert notes == ["12 chains from gold"]
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    lab = Lab(tmp_path / "lab", model, tasks.load("roll"))
    recipe = registry.load("sft")(train_n=12, steps=2, train_batch_size=4)
    folder = recipe.tuned(lab, recipe.chains(lab))
    assert folder == tmp_path / "lab" / "stages" / "sft" / "adapter"
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "r" / "adapter"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_an_adapter_that_is_no_lora_is_trained_and_measured(model: str, tmp_path: Path) -> None:
    # Scales so far from 1 that the adapted model cannot write what the bare one does.
    result = sft(tmp_path, model, "--adapter", "ssf:spread=1,norms=false")
    assert written(tmp_path / "r", "before") != written(tmp_path / "r", "after")
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["spread"]) == ("SSF", 1.0)
    state = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    size = sum(value.numel() for value in state.values())
    assert any(f"ssf:spread=1,norms=false: {size:,} values trained" in note for note in result["notes"])
    assert any("measured folded into the model" in note for note in result["notes"])


def test_an_adapter_that_becomes_a_lora_sees_the_chains(model: str, tmp_path: Path) -> None:
    """EVA looks at batches of the training documents: without any it refuses to be attached."""
    result = sft(tmp_path, model, "--adapter", "eva:rank=2")
    config = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    assert not any("folded" in note for note in result["notes"])


def test_masked_thought_is_the_loss_of_the_run(model: str, tmp_path: Path) -> None:
    result = sft(tmp_path, model, "--objective", "masked-thought-mft:rate=0.5")
    assert all(0.3 < line["masked"] < 0.7 for line in logged(tmp_path))
    assert any("a plain LoRA" in note and "with masked-thought-mft:rate=0.5" in note for note in result["notes"])


def test_alignment_learns_from_own_right_and_wrong_chains(tmp_path: Path) -> None:
    words = ("--objective", "aft-alignment", "--chains-from", "own", "--samples", "4", "--max-tokens", "200")
    result = sft(tmp_path, str(assets.find("long")), *words, "--train-n", "8")
    lines = logged(tmp_path)
    assert len(lines) == 2
    assert any(line["right"] != line["wrong"] for line in lines)  # equal where no question has a wrong chain
    assert "chains from own, and" in result["notes"][0]
    shard = next((tmp_path / "r" / "stages" / "own-samples").glob("*.parquet"))
    assert len(list(store.read(shard))) == 8 * 4


def test_lift_trains_the_models_own_weights_and_leaves_a_model(model: str, tmp_path: Path) -> None:
    result = sft(tmp_path, model, "--hook", "lift:rank=1,filter_rank=4", "--lr", "0.01")
    assert not (tmp_path / "r" / "adapter").exists()
    before, after = (load_file(Path(f) / "model.safetensors") for f in (model, tmp_path / "r" / "model"))
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    masked = sum(sum(w.shape) for name, w in before.items() if w.ndim > 1 and "proj" in name)  # (m + n) * rank
    assert 0.5 * masked < moved <= masked
    assert any(f"{masked:,} values trained" in note for note in result["notes"])
    words = ("measure", "--model", str(tmp_path / "r" / "model"), "--task", "roll", "--n", "4", "--max-tokens", "12")
    again = CliRunner().invoke(app, [*words, "--strategy", "single-pass", "--runs", str(tmp_path), "--name", "m"])
    assert again.exit_code == 0, again.output
    assert written(tmp_path / "m", "single-pass") == written(tmp_path / "r", "after")


class _Stopped(Exception):  # noqa: N818 - as Ctrl-C is
    pass


def test_a_stopped_training_goes_on_in_the_adapter_it_began_with(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA-SB's frozen sides stand in no checkpoint: here they come out with another sign the second time."""
    recipe = registry.load("sft")(steps=27, train_batch_size=2, adapter="lora-sb:rank=2,samples=4")
    problems = tasks.load("roll").problems("train", 4)
    chains = [Chain(p, str(p.meta["chain"]), str(p.answer)) for p in problems]

    def tuned(name: str) -> dict[str, torch.Tensor]:
        lab = Lab(tmp_path / name, model, tasks.load("roll"))
        return load_file(recipe.tuned(lab, chains) / "adapter_model.safetensors")

    whole = tuned("whole")
    after_step = registry.load("sft").tuned.__globals__["_Count"].after_step

    def stop(self: Any, state: Any) -> None:
        if state.step == 25:  # one step after the checkpoint
            raise _Stopped
        after_step(self, state)

    with monkeypatch.context() as patch:
        patch.setattr("thrifty.recipes.sft._Count.after_step", stop)
        with pytest.raises(_Stopped):
            tuned("cut")
    factors = lora_sb.factors
    monkeypatch.setattr(lora_sb, "factors", lambda *given: tuple(s * f for s, f in zip((-1, 1, 1), factors(*given))))
    cut = tuned("cut")
    assert all(torch.equal(cut[name], whole[name]) for name in whole | cut)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--adapter lift", "--adapter is lift, of family tune.sparse: give one of tune.adapter (eva, "),
        ("--objective ssf", "`thrifty show ssf` tells what it is for"),
        ("--selector key-steps:x=1", "give one of traces.select"),
        ("--hook lift:rnk=1", "did you mean"),
        ("--adapter pissaa", "did you mean"),
        ("--hook lift --adapter ssf", "give one of the two"),
        ("--adapter pissa --rank 4", "write pissa:rank=4"),
        ("--objective dpo", "is trained on pairs of chains"),
        ("--objective simpo", "is trained on pairs of chains"),
        ("--objective clipped", "cannot train on chains as sft has them"),
        ("--objective masked-thought-mft:rate=2", "0 <= rate <= 1"),
        ("--objective aft-alignment", "give --chains-from own --samples 4"),
        ("--objective aft-alignment --chains-from own", "give --chains-from own --samples 4"),
        ("--objective aft-alignment:limit=no --chains-from own --samples 2", "choose one of detached"),
        ("--samples 3", "give --chains-from own too"),
        ("--samples 0", "give at least 1"),
    ],
)
def test_what_cannot_be_trained_is_told_before_any_work(words: str, told: str, model: str, tmp_path: Path) -> None:
    command = ["run", "sft", "--model", model, "--task", "roll", *SMALL, *words.split(), "--runs", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert told.lower() in " ".join(done.output.lower().split())
    assert not list(tmp_path.iterdir())


def test_chains_without_a_right_and_a_wrong_one_have_nothing_to_compare(model: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path, model, tasks.load("roll"), max_tokens=4)
    recipe = registry.load("sft")(objective="aft-alignment", chains_from="own", samples=2, train_n=2)
    [chain] = [Chain(p, str(p.meta["chain"]), str(p.answer)) for p in lab.problems("train", 1)]
    with pytest.raises(ThriftyError, match="raise --samples"):
        recipe._wrong(lab, [chain])


def test_a_plan_counts_all_samples() -> None:
    recipe = registry.load("sft")
    own = recipe(train_n=10, steps=3, train_batch_size=4, chains_from="own", samples=5)
    assert own.passes(7) == {"sampled": 10 * 5 + 14, "trained": 12}
    assert recipe(**vars(own) | {"objective": "aft-alignment"}).passes(7)["trained"] == 12 * 5
    assert recipe(train_n=10, steps=3, train_batch_size=4).passes(7) == {"sampled": 14, "trained": 12}
