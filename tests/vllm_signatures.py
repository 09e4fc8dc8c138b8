"""What thrifty relies on in vLLM, read off its source: names, parameters, fields, methods. Imports nothing of vLLM.

    python tests/vllm_signatures.py vllm-0.33.0-*.whl > tests/data/vllm.json

An unpacked wheel's folder does as well.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

RELIED_ON = {
    "vllm:EngineArgs": "vllm/engine/arg_utils.py",
    "vllm:LLMEngine": "vllm/v1/engine/llm_engine.py",
    "vllm:SamplingParams": "vllm/sampling_params.py",
    "vllm:RequestOutput": "vllm/outputs.py",
    "vllm:CompletionOutput": "vllm/outputs.py",
    "vllm.logprobs:Logprob": "vllm/logprobs.py",
    "vllm.lora.request:LoRARequest": "vllm/lora/request.py",
    "vllm.lora.peft_helper:PEFTHelper": "vllm/lora/peft_helper.py",
    "vllm.tokenizers:cached_tokenizer_from_config": "vllm/tokenizers/registry.py",
    "vllm.v1.sample.logits_processor:LogitsProcessor": "vllm/v1/sample/logits_processor/interface.py",
    "vllm.v1.sample.logits_processor:MoveDirectionality": "vllm/v1/sample/logits_processor/interface.py",
    "vllm.v1.sample.logits_processor:BatchUpdate": "vllm/v1/sample/logits_processor/interface.py",
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor": (
        "vllm/v1/worker/gpu/sample/logits_processor/interface.py"
    ),
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsContext": (
        "vllm/v1/worker/gpu/sample/logits_processor/interface.py"
    ),
    "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcRequestState": (
        "vllm/v1/worker/gpu/sample/logits_processor/interface.py"
    ),
}
"""Where thrifty imports a name from, and the file that defines it."""
GROUPS = ("vllm/v1/sample/logits_processor/__init__.py", "vllm/v1/worker/gpu/sample/logits_processor/loader.py")


def signatures(source: Path) -> dict[str, Any]:
    """The record of the wheel or folder ``source``."""
    if source.is_dir():
        version = next(source.glob("vllm-*.dist-info")).name.split("-")[1].removesuffix(".dist")
        texts = {name: (source / name).read_text("utf-8") for name in _files()}
    else:
        version = source.name.split("-")[1]
        with zipfile.ZipFile(source) as wheel:
            texts = {name: wheel.read(name).decode() for name in _files()}
    names = {name: _described(_defined(texts[file], name.split(":")[1])) for name, file in RELIED_ON.items()}
    exported = {
        name: name.split(":")[1] in _names(texts[_init(name)]) for name in RELIED_ON if _init(name) != RELIED_ON[name]
    }
    ranks = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", texts["vllm/config/lora.py"])
    groups = {re.search(r'LOGITSPROCS_GROUP = "([^"]+)"', texts[file])[1] for file in GROUPS}  # type: ignore[index]
    return {
        "version": version,
        "names": names,
        "not exported": sorted(name for name, there in exported.items() if not there),
        "max_lora_ranks": [int(part) for part in ranks[1].split(",")] if ranks else [],
        "entry point groups": sorted(groups),
    }


def _init(name: str) -> str:
    module = name.split(":")[0].replace(".", "/")
    defined = RELIED_ON[name]
    return defined if defined == f"{module}.py" else f"{module}/__init__.py"


def _files() -> set[str]:
    return {*RELIED_ON.values(), *map(_init, RELIED_ON), *GROUPS, "vllm/config/lora.py"}


def _names(text: str) -> set[str]:
    """What an ``__init__`` makes available: imports, and the strings of a table of lazy ones."""
    tree = ast.parse(text)
    found = {alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
    return found | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _defined(text: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"vLLM no longer defines {name} there")


def _described(node: ast.ClassDef | ast.FunctionDef) -> dict[str, Any]:
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    made = _parameters(methods["__init__"]) if "__init__" in methods else _fields(fields)
    own = {
        t.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Assign | ast.AnnAssign)
        for t in (n.targets if isinstance(n, ast.Assign) else [n.target])
        if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
    }
    members = {t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    marks = {name: {ast.unparse(d) for d in method.decorator_list} for name, method in methods.items()}
    return made | {
        "attributes": sorted(
            own | members | {f.target.id for f in fields} | {n for n in marks if "property" in marks[n]}
        ),  # type: ignore[attr-defined]
        "methods": {
            n: _parameters(m) for n, m in methods.items() if not n.startswith("_") and "property" not in marks[n]
        },
        "abstract": sorted(n for n in marks if "abstractmethod" in marks[n]),
    }


def _parameters(node: ast.FunctionDef) -> dict[str, Any]:
    given = node.args
    bound = bool(given.args) and given.args[0].arg in ("self", "cls")
    plain = [a.arg for a in (*given.posonlyargs, *given.args)][bound:]
    required = plain[: len(plain) - len(given.defaults)]
    named = [a.arg for a in given.kwonlyargs]
    needed = [a.arg for a, default in zip(given.kwonlyargs, given.kw_defaults) if default is None]
    return {"parameters": plain, "required": [*required, *needed], "keyword": named, "open": given.kwarg is not None}


def _fields(nodes: list[ast.AnnAssign]) -> dict[str, Any]:
    """Those of a dataclass or msgspec struct as parameters of its constructor."""
    kept = [n for n in nodes if "init=False" not in ast.unparse(n) and "ClassVar" not in ast.unparse(n.annotation)]
    names = [n.target.id for n in kept]  # type: ignore[attr-defined]
    required = [n.target.id for n in kept if n.value is None]  # type: ignore[attr-defined]
    return {"parameters": names, "required": required, "keyword": [], "open": False}


def told(record: dict[str, Any]) -> str:
    """The record as JSON, a line per name."""
    names = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in record["names"].items())
    rest = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items() if k != "names")
    return f'{{{rest},\n "names": {{\n  {names}\n }}}}\n'


if __name__ == "__main__":
    sys.stdout.write(told(signatures(Path(sys.argv[1]))))
