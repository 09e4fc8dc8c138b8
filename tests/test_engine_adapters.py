"""LoRAs on the local engine: rows at strengths of their own, several on one model, folders that it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny
from asked import plain, run
from thrifty.contracts import Sample, Score, ThriftyError
from thrifty.engines.local import LocalEngine
from thrifty.models.load import Loaded, wrap

torch.set_num_threads(1)  # two cores are shared by everything that runs


def lora(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(tiny.loaded().model, config).save_pretrained(str(folder))
    return folder


def scaled(folder: Path, strength: float) -> Loaded:
    """The tiny model with the adapter merged in at ``strength``."""
    one = tiny.loaded()
    model = peft.PeftModel.from_pretrained(one.model, str(folder))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(strength)
    return wrap(model.merge_and_unload().eval(), one.tokenizer)


def test_rows_run_at_their_own_adapter_strength(tmp_path: Path) -> None:
    folder = lora(tmp_path, 1)
    engine = LocalEngine(tiny.loaded())
    engine.add_adapter("valve", folder)
    strengths = [0.0, 0.25, 0.5, 1.0, 1.25]
    asks = [Sample("2 + 2 + 2 + 2", temperature=0.0, max_tokens=20, adapters={"valve": s}) for s in strengths]
    bare = Sample("2 + 2 + 2 + 2", temperature=0.0, max_tokens=20)
    # Twice: the second time everything comes from the prefix cache, which must keep the strengths apart.
    for _ in range(2):
        traces = run(engine, [*asks, bare])
        for strength, trace in zip([*strengths, 0.0], traces):
            [alone] = run(LocalEngine(scaled(folder, strength)), [bare])
            assert trace.ids.tolist() == alone.ids.tolist()
    assert len({tuple(t.ids) for t in traces}) > 3
    assert all(trace.usage.cached > 0 for trace in traces)
    values = run(engine, [Score("2 + 2", ("yes",), adapters={"valve": s}) for s in strengths])
    for strength, value in zip(strengths, values):
        [alone] = run(LocalEngine(scaled(folder, strength)), [Score("2 + 2", ("yes",))])
        assert value.values == pytest.approx(alone.values, rel=1e-3)


def test_two_adapters_share_a_batch(tmp_path: Path) -> None:
    folders = {"a": lora(tmp_path / "a", 1), "b": lora(tmp_path / "b", 2)}
    engine = LocalEngine(tiny.loaded())
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    bare = Sample("2 + 2", temperature=0.0, max_tokens=20)
    traces = run(engine, [replace(bare, adapters={"a": 1.0}), replace(bare, adapters={"b": 0.5}), bare])
    for trace, alone in zip(traces, [scaled(folders["a"], 1.0), scaled(folders["b"], 0.5), tiny.loaded()]):
        assert trace.ids.tolist() == run(LocalEngine(alone), [bare])[0].ids.tolist()


def test_a_model_with_an_adapter_attached_runs_bare_unless_asked(tmp_path: Path) -> None:
    one = tiny.loaded()
    torch.manual_seed(3)
    model = peft.get_peft_model(one.model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    engine = LocalEngine(wrap(model, one.tokenizer))
    bare = Sample("2 + 2", temperature=0.0, max_tokens=20)
    off, on = run(engine, [bare, replace(bare, adapters={"default": 1.0})])
    assert off.ids.tolist() == plain(tiny.loaded(), "2 + 2", 20)
    assert on.ids.tolist() != off.ids.tolist()
    assert all(layer.scaling["default"] == 2.0 for layer in engine.batches["main"].reader.dial.layers["default"])


def test_engines_on_one_model_keep_their_adapters_apart(tmp_path: Path) -> None:
    folders = {"a": lora(tmp_path / "a", 1), "b": lora(tmp_path / "b", 2)}
    one = tiny.loaded()
    bare = Sample("2 + 2", temperature=0.0, max_tokens=20)
    on = replace(bare, adapters={"valve": 1.0})
    engines = {"none": LocalEngine(one)}
    for name, folder in folders.items():
        engines[name] = LocalEngine(one)
        engines[name].add_adapter("valve", folder)
    for _ in range(2):
        for name in ("a", "b"):
            [trace] = run(engines[name], [on])
            assert trace.ids.tolist() == run(LocalEngine(scaled(folders[name], 1.0)), [bare])[0].ids.tolist()
        assert run(engines["none"], [bare])[0].ids.tolist() == plain(tiny.loaded(), "2 + 2", 20)
    assert plain(one, "2 + 2", 20) == plain(tiny.loaded(), "2 + 2", 20)
    with pytest.raises(ThriftyError, match="has an adapter 'valve' already"):
        engines["a"].add_adapter("valve", folders["b"])
    with pytest.raises(ThriftyError, match=r"no adapter 'other' .*it has: valve"):
        engines["a"].submit(0, replace(bare, adapters={"other": 1.0}), ())


def test_a_model_in_training_is_left_as_it_was() -> None:
    one = tiny.loaded()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(one.model, config).train()
    learning = [p.requires_grad for p in model.parameters()]
    engine = LocalEngine(wrap(model, one.tokenizer))
    ask = Sample("2 + 2", temperature=0.0, max_tokens=12, adapters={"default": 1.0})
    first, second = run(engine, [ask, ask])
    assert first.ids.tolist() == second.ids.tolist()  # no dropout
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == learning
    assert model.active_adapters == ["default"]
    model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained more than a LoRA (modules_to_save)"),
        ({"trainable_token_indices": [1, 2]}, "trained more than a LoRA (trainable_token_indices)"),
        ({"bias": "all"}, "trained more than a LoRA (bias)"),
        ({"init_lora_weights": "pissa"}, "began as pissa, which changes the model's own weights"),
        ({"init_lora_weights": "olora"}, "began as olora"),
    ],
)
def test_a_lora_that_changes_the_model_at_strength_0_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    made = peft.get_peft_model(tiny.loaded().model, peft.LoraConfig(r=2, target_modules=["q_proj"], **change))
    made.save_pretrained(str(tmp_path))
    with pytest.raises(ThriftyError, match=re.escape(said)):
        LocalEngine(tiny.loaded()).add_adapter("valve", tmp_path)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors"),
        ("adapter_model.safetensors", b"garbage", "or is damaged"),
        ("adapter_config.json", b"{", "none that peft wrote"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}', "does not fit tiny"),
        ("adapter_config.json", b'{"peft_type": "LORA", "target_modules": ["nowhere"]}', "does not fit tiny"),
    ],
)
def test_a_damaged_lora_is_told_by_its_folder(tmp_path: Path, name: str, spoil: bytes | None, said: str) -> None:
    folder = lora(tmp_path / "adapter", 1)
    (folder / name).unlink()
    if spoil is not None:
        (folder / name).write_bytes(spoil)
    one, ask = tiny.loaded(), Sample("2 + 2", temperature=0.0, max_tokens=12)
    engine = LocalEngine(one)
    before = run(engine, [ask])[0].ids.tolist()
    with pytest.raises(ThriftyError, match=said) as error:
        engine.add_adapter("valve", folder)
    assert str(folder) in str(error.value)
    assert all(parameter.requires_grad for name, parameter in one.model.named_parameters() if "lora_" not in name)
    assert run(LocalEngine(one), [ask])[0].ids.tolist() == before
