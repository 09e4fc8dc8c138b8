"""Every name, parameter and attribute of vLLM that thrifty uses, against the recorded signatures of one version."""

import ast
import os
from pathlib import Path

import pytest

from thrifty.engines import _vllm_lora
from vllm_signatures import RELIED_ON, signatures
from vllm_stub import NAMES, RECORD

SOURCE = Path(__file__).parents[1] / "src" / "thrifty"
FILES = [SOURCE / "engines" / "vllm.py", SOURCE / "edges" / "vllm_controls.py"]
HELD = {
    "self.engine": "vllm:LLMEngine", "LLMEngine": "vllm:LLMEngine", "output": "vllm:RequestOutput",
    "made": "vllm:CompletionOutput", "params": "vllm:SamplingParams", "chances[token]": "vllm.logprobs:Logprob",
    "batch_update": "vllm.v1.sample.logits_processor:BatchUpdate",
    "MoveDirectionality": "vllm.v1.sample.logits_processor:MoveDirectionality",
    "ctx": "vllm.v1.worker.gpu.sample.logits_processor:LogitsContext",
    "self.states": "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcRequestState",
}  # fmt: skip
"""What an expression in these files holds."""


def trees():
    return [ast.parse(path.read_text("utf-8")) for path in FILES]


def imported(tree):
    """Local name -> the name in the record."""
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


def fits(call, known):
    """What is wrong with a call of something with these parameters, "" if nothing."""
    named = {k.arg for k in call.keywords if k.arg is not None}
    spread = any(k.arg is None for k in call.keywords) or any(isinstance(a, ast.Starred) for a in call.args)
    odd = named - {*known["parameters"], *known["keyword"]} if not known["open"] else set()
    given = {*known["parameters"][: len(call.args)], *named}
    lacking = set() if spread else set(known["required"]) - given
    return f"{ast.unparse(call)}: unknown {odd}, missing {lacking}" if odd or lacking else ""


def test_every_import_is_on_record():
    found = [name for tree in trees() for name in imported(tree).values()]
    assert len(found) >= 8
    assert not [name for name in found if name not in NAMES]
    assert not RECORD["not exported"]


def test_every_call_fits_what_vllm_takes():
    checked, wrong = set(), []
    for tree in trees():
        names = imported(tree)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in names:
                checked.add(call.func.id)
                wrong.append(fits(call, NAMES[names[call.func.id]]))
            elif isinstance(call.func, ast.Attribute) and (owner := HELD.get(ast.unparse(call.func.value))):
                checked.add(call.func.attr)
                methods = NAMES[owner]["methods"]
                wrong.append(
                    fits(call, methods[call.func.attr]) if call.func.attr in methods else f"no {call.func.attr}"
                )
    assert [text for text in wrong if text] == []
    assert checked >= {"EngineArgs", "SamplingParams", "LoRARequest", "add_request", "step", "abort_request"}


def test_every_attribute_is_there():
    missing, seen = [], set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (owner := HELD.get(ast.unparse(node.value))):
                known = NAMES[owner]
                seen.add(node.attr)
                if node.attr not in {*known["attributes"], *known["methods"], *known["parameters"]}:
                    missing.append(f"{owner} has no {node.attr}")
    assert missing == []
    assert seen >= {"model_config", "num_cached_tokens", "stop_reason", "expanded_local_pos", "eos_token_id"}


def test_our_processors_have_the_methods_that_vllm_calls():
    classes = {node.name: node for node in ast.walk(trees()[1]) if isinstance(node, ast.ClassDef)}
    for ours, base in (("ControlsV1", "vllm.v1.sample"), ("ControlsV2", "vllm.v1.worker.gpu.sample")):
        known = NAMES[f"{base}.logits_processor:LogitsProcessor"]
        methods = {n.name: n for n in classes[ours].body if isinstance(n, ast.FunctionDef)}
        assert set(known["abstract"]) <= set(methods)
        for name, method in methods.items():
            expected = known["parameters"] if name == "__init__" else known["methods"].get(name, {}).get("parameters")
            if expected is not None:
                assert [a.arg for a in method.args.args][1:] == expected, f"{ours}.{name}"


def test_the_rules_of_loras_are_of_the_recorded_version():
    assert RECORD["version"] == _vllm_lora.VERSION
    assert tuple(RECORD["max_lora_ranks"]) == _vllm_lora.RANKS
    read = set(NAMES["vllm.lora.peft_helper:PEFTHelper"]["parameters"])
    ruled = {name for name, *_ in _vllm_lora._REFUSED}
    ruled |= {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias"}
    ruled |= {"modules_to_save", "init_lora_weights"}
    assert {name for name in read if not name.startswith("vllm_")} == ruled, "what vLLM looks at, we do"
    assert not read & {name for name, _ in _vllm_lora._UNREAD}


def test_the_record_is_that_of_the_wheel():
    """THRIFTY_VLLM_WHEEL names the wheel, or the folder it was unpacked to."""
    wheel = os.environ.get("THRIFTY_VLLM_WHEEL")
    if not wheel:
        pytest.skip("THRIFTY_VLLM_WHEEL is not set")
    assert signatures(Path(wheel)) == RECORD
    assert set(RELIED_ON) == set(NAMES)
