"""Which LoRA folders vLLM takes, on folders that peft wrote, and the same adapter at several strengths."""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from thrifty.cli import app
from thrifty.contracts import ThriftyError
from thrifty.edges.vllm import check_lora, export_strength
from thrifty.models.strength import strengths
from thrifty.tune.adapter import lora, save_adapter

BASE = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def made(folder, config=LoraConfig, **changes):
    model = get_peft_model(tiny.loaded().model, config(**{**BASE, **changes}))
    model.save_pretrained(folder)
    return folder


def changed(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
    ],
)
def test_plain_loras_are_taken(tmp_path, changes):
    report = check_lora(made(tmp_path / "a", **changes))
    assert report.faults == ()
    assert (report.rank, report.needed) == (4, 8)
    assert any(module.endswith("layers.0.self_attn.q_proj") for module in report.modules)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "no LoRA's"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    ],
)
def test_what_peft_writes_and_vllm_refuses_is_named_with_a_remedy(tmp_path, changes, words):
    report = check_lora(made(tmp_path / "a", **changes))
    assert any(words in fault.what for fault in report.faults)
    assert all(fault.remedy for fault in report.faults)
    with pytest.raises(ThriftyError, match="vLLM does not take"):
        export_strength(tmp_path / "a", 0.5, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_ranks_are_held_against_what_vllm_was_started_with(tmp_path):
    folder = made(tmp_path / "a", r=4, rank_pattern={"v_proj": 20})
    assert check_lora(folder).needed == 32
    [fault] = check_lora(folder, 16).faults
    assert fault.remedy == "start vLLM with --max-lora-rank 32"
    assert not check_lora(folder, 32).faults
    [fault] = check_lora(made(tmp_path / "big", r=513, target_modules=["q_proj"])).faults
    assert "513" in fault.what


def test_another_kind_of_adapter_is_no_lora(tmp_path):
    model = get_peft_model(
        tiny.loaded().model, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    model.save_pretrained(tmp_path / "a")
    assert "IA3" in check_lora(tmp_path / "a").faults[0].what


def test_damaged_folders_are_found(tmp_path):
    with pytest.raises(ThriftyError, match="no adapter"):
        check_lora(tmp_path)
    folder = changed(made(tmp_path / "a"), r=8)
    assert "should have rank 8" in check_lora(folder).faults[0].what
    folder = made(tmp_path / "b")
    weights = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in weights if "lora_B" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "adapter_model.safetensors")
    assert "only one of" in check_lora(folder).faults[0].what
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    assert "cannot be read" in check_lora(folder).faults[0].what
    (folder / "adapter_model.safetensors").unlink()
    assert "no weights" in check_lora(folder).faults[0].what
    assert "rank of r" in check_lora(changed(made(tmp_path / "c"), r=0)).faults[0].what
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ThriftyError, match="no JSON"):
        check_lora(folder)


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q": 2}}]
)
def test_an_exported_strength_is_the_dial_at_that_strength(tmp_path, changes):
    torch.manual_seed(0)
    model = get_peft_model(tiny.loaded().model, LoraConfig(**{**BASE, **changes}), adapter_name="valve")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = save_adapter(model, tmp_path / "adapter")
    ids = torch.arange(20)[None]
    for strength in (0.3, 1.0, -0.5, 1.7):
        out = export_strength(folder, strength, tmp_path / f"at{strength}")
        assert check_lora(out).accepted
        alone = PeftModel.from_pretrained(tiny.loaded().model, str(out))
        with torch.inference_mode(), strengths(model, {"valve": strength}):
            wanted = model(ids).logits
        with torch.inference_mode():
            torch.testing.assert_close(alone(ids).logits, wanted, atol=1e-5, rtol=1e-5)
            assert (alone(ids).logits - tiny.loaded().model(ids).logits).abs().max() > 1e-2


def test_exports_overwrite_adapters_alone(tmp_path):
    folder = made(tmp_path / "a")
    export_strength(folder, 0.5, tmp_path / "b")
    export_strength(folder, 0.25, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_alpha"] == 1.5
    (tmp_path / "mine").mkdir()
    for out, words in ((tmp_path / "mine", "is no adapter"), (folder, "is the adapter itself")):
        with pytest.raises(ThriftyError, match=words):
            export_strength(folder, 0.5, out)
    with pytest.raises(ThriftyError, match="finite"):
        export_strength(folder, float("nan"), tmp_path / "c")


def test_the_command_checks_and_exports(tmp_path):
    folder = save_adapter(lora(tiny.loaded().model, rank=4, seed=1), tmp_path / "valve")
    run = CliRunner().invoke
    told = run(app, ["adapter", "check", str(folder)])
    assert told.exit_code == 0
    assert "--max-lora-rank 8" in told.output
    told = run(app, ["adapter", "check", str(folder), "--max-lora-rank", "1", "--json"])
    assert told.exit_code == 1
    assert json.loads(told.output)["faults"][0]["remedy"] == "start vLLM with --max-lora-rank 8"
    told = run(app, ["adapter", "export", str(folder), "--strength", "0.5,1", "--out", str(tmp_path / "served")])
    assert told.exit_code == 0
    assert f"--lora-modules valve-0.5={tmp_path}/served/valve-0.5 valve-1={tmp_path}/served/valve-1" in told.output
    told = run(app, ["adapter", "export", str(folder), "--strength", "half", "--out", str(tmp_path / "served")])
    assert told.exit_code == 2


def test_vllms_own_helper_agrees(tmp_path):
    """Runs where vLLM can be imported."""
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    limit = type("Config", (), {"max_lora_rank": 16})
    cases = [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 20}}, {"use_dora": True}, {"bias": "lora_only"},
             {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"},
             {"init_lora_weights": "gaussian"}, {"layer_replication": [[0, 2], [0, 2]]},
             {"alora_invocation_tokens": [1]}]  # fmt: skip
    for number, changes in enumerate(cases):
        folder = made(tmp_path / str(number), **changes)
        try:
            helper.from_local_dir(str(folder), None).validate_legal(limit)
            theirs = True
        except ValueError:
            theirs = False
        assert check_lora(folder, 16).accepted is theirs, changes
    folder = made(tmp_path / "p", rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3})
    out = export_strength(folder, 0.3, tmp_path / "q")
    model = PeftModel.from_pretrained(tiny.loaded().model, str(out))
    assert isinstance(model.base_model, LoraModel)
    ours = helper.from_local_dir(str(out), None)
    for name, module in model.base_model.model.named_modules():
        if "default" in getattr(module, "scaling", {}):
            assert ours.get_rank_and_scaling(name)[1] == pytest.approx(module.scaling["default"])
