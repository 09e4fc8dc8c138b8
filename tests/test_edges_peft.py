"""Adapters through peft: out and in again, merged, as plain LoRAs, and in a process that knows peft alone."""

import json
import random
import subprocess
import sys

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model

import tiny
from thrifty.contracts import ThriftyError
from thrifty.edges.peft import register, save_lora
from thrifty.tune.adapter import save_adapter
from thrifty.tune.adapter.eva import EVA
from thrifty.tune.adapter.lora_sb import LoraSB
from thrifty.tune.adapter.pissa import PiSSA
from thrifty.tune.adapter.plain_lora import PlainLora
from thrifty.tune.adapter.ssf import SSF
from thrifty.tune.batches import Example, bucketed, collate

torch.set_num_threads(1)
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
METHODS = {
    "plain-lora": PlainLora(rank=4),
    "pissa": PiSSA(rank=4),
    "pissa-fast": PiSSA(rank=4, alpha=8, iterations=4),
    "eva": EVA(rank=4),
    "lora-sb": LoraSB(rank=4, lr=0.1, warmup=10),
    "ssf": SSF(),
    "ssf-scale": SSF(shift=False),
}
LORAS = [key for key in METHODS if not key.startswith("ssf")]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(key):
    """The tiny model with an adapter that was trained somewhere, and its logits."""
    rng = random.Random(0)
    documents = [Example([rng.randrange(60)] * 4, [rng.randrange(60) for _ in range(12)]) for _ in range(16)]
    model = METHODS[key].attach(tiny.model(64), [collate(rows) for rows in bucketed(documents, 128)])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model, logits(model)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("key", METHODS)
def test_an_adapter_goes_out_and_in_and_is_merged_by_peft(key, tmp_path):
    model, expected = adapted(key)
    folder = save_adapter(model, tmp_path / "adapter")
    back = PeftModel.from_pretrained(tiny.model(64), str(folder))
    close(logits(back), expected)
    back.save_pretrained(str(tmp_path / "again"), save_embedding_layers=False)
    close(logits(PeftModel.from_pretrained(tiny.model(64), str(tmp_path / "again"))), expected)
    merged = back.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not [name for name, _ in merged.named_modules() if "lora" in name or "ssf" in name]
    close(logits(merged), expected)


@pytest.mark.parametrize("key", LORAS)
def test_what_can_be_a_plain_lora_becomes_one_of_the_same_function(key, tmp_path):
    model, expected = adapted(key)
    folder = save_lora(model, tmp_path / "served")
    close(logits(model), expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"], config["task_type"]) == ("LORA", True, "CAUSAL_LM")
    assert config["r"] == (8 if key.startswith("pissa") else 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served"]
    back = PeftModel.from_pretrained(tiny.model(64), str(folder))
    close(logits(back), expected)
    with back.disable_adapter():
        assert torch.equal(logits(back), logits(tiny.model(64)))


def test_a_process_without_thrifty_reads_plain_loras_and_one_that_registers_reads_all(tmp_path):
    tiny.model(64).save_pretrained(tmp_path / "base")
    expected = {}
    for key in LORAS:
        model, expected[f"alone/{key}"] = adapted(key)
        save_lora(model, tmp_path / "alone" / key)
    for key in ("lora-sb", "ssf"):
        model, expected[f"known/{key}"] = adapted(key)
        save_adapter(model, tmp_path / "known" / key)
    code = f"""
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {{}}
for name in {list(expected)!r}:
    if name.startswith("known") and "thrifty" not in sys.modules:
        from thrifty.edges.peft import register
        register()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name).eval()
    with torch.no_grad():
        found[name] = model(torch.tensor({IDS.tolist()})).logits
        found[name + "/merged"] = model.merge_and_unload()(torch.tensor({IDS.tolist()})).logits
save_file(found, "found.safetensors")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stderr
    from safetensors.torch import load_file

    found = load_file(tmp_path / "found.safetensors")
    for name, value in expected.items():
        close(found[name], value)
        close(found[name + "/merged"], value)


def test_another_kind_of_pefts_is_converted_as_far_as_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        tiny.model(64), LoHaConfig(r=2, alpha=2, target_modules=["q_proj", "v_proj"], init_weights=False), "mine"
    )
    with pytest.raises(
        ThriftyError, match=r"a LoRA of rank 2 loses .* of the update of base_model.*give a higher rank"
    ):
        save_lora(model, tmp_path / "served", "mine")
    assert not (tmp_path / "served").exists()
    # a product of two matrices of rank 2, entry by entry, has rank 4
    close(logits(PeftModel.from_pretrained(tiny.model(64), str(save_lora(model, tmp_path / "four", "mine", 4)))),
          logits(model))  # fmt: skip
    lossy = save_lora(model, tmp_path / "three", "mine", rank=3, tolerance=1.0)
    apart = (logits(PeftModel.from_pretrained(tiny.model(64), str(lossy))) - logits(model)).abs().max()
    assert apart > 1e-2


@pytest.mark.parametrize("key", ["ssf", "ssf-scale"])
def test_what_is_no_lora_says_so_and_what_to_do(key, tmp_path):
    model, _ = adapted(key)
    with pytest.raises(ThriftyError, match=r"no LoRA equals a ssf adapter: .*register.*merge_and_unload"):
        save_lora(model, tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ThriftyError, match="carries no adapter"):
        save_lora(tiny.model(64), tmp_path / "x")
    model, _ = adapted("lora-sb")
    with pytest.raises(ThriftyError, match="no adapter 'default', it has: valve"):
        save_lora(model, tmp_path / "x", "default")
    with pytest.raises(ThriftyError, match="is 32 wide: give rank 1 to 32"):
        save_lora(model, tmp_path / "x", rank=33)
    model, _ = adapted("plain-lora")
    with pytest.raises(ThriftyError, match="of rank 4 and is saved as it is"):
        save_lora(model, tmp_path / "x", rank=2)
    for more in ({"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}):
        model = get_peft_model(tiny.model(64), LoraConfig(target_modules=["q_proj"], **more), "valve")
        with pytest.raises(ThriftyError, match=rf"more than a plain LoRA \({next(iter(more))}\), which servers refuse"):
            save_lora(model, tmp_path / "x")
    two = get_peft_model(tiny.model(64), LoHaConfig(r=2, target_modules=["q_proj"]), "valve")
    two.add_adapter("other", LoHaConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ThriftyError, match=r"v_proj carries other and not 'valve'.*delete_adapter\('other'\) first"):
        save_lora(two, tmp_path / "x")
    olora = get_peft_model(tiny.model(64), LoraConfig(init_lora_weights="olora", target_modules=["q_proj"]), "valve")
    with pytest.raises(ThriftyError, match="began as olora, which moved the base"):
        save_lora(olora, tmp_path / "x")
    register()
    register()
