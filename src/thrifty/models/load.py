"""Load a causal language model with its tokenizer and chat format: a folder, an asset of thrifty, or a Hub id."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from thrifty import assets
from thrifty.contracts import ThriftyError
from thrifty.models.chat import ChatFormat

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to run, in evaluation mode. ``folder`` is None for a model of the Hub."""

    model: Any
    tokenizer: Any
    chat: ChatFormat
    name: str
    folder: Path | None = None
    eos: frozenset[int] = field(default_factory=frozenset)
    """Token ids that end a response."""
    context: int | None = None
    """How many tokens prompt and response may have together; None where the model names no limit."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load ``name``: a folder, an asset's name, or a Hub id, in this order.

    ``device`` "auto" is CUDA where there is one. ``dtype`` "auto" is float32 on a CPU (results then don't depend on the
    batch) and the stored type elsewhere; else a torch name such as "bfloat16". Raises ``ThriftyError`` with the remedy
    when anything is missing. Weights are read from safetensors only; code from the model's repository is never run.
    """
    folder = _folder(name)
    source = str(folder) if folder is not None else name
    if folder is not None:
        _check_folder(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        chosen: Any = torch.float32 if torch.device(device).type == "cpu" else "auto"
    else:
        chosen = getattr(torch, dtype, None)
        if not isinstance(chosen, torch.dtype):
            raise ThriftyError(f"no dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=chosen, use_safetensors=True)
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        near = difflib.get_close_matches(name, assets.available(), 1, 0.6)
        hint = f"; did you mean the student {near[0]!r}" if near else ""
        where = f"folder {folder}" if folder is not None else f"Hub id {name!r} (no such folder here{hint})"
        raise ThriftyError(f"cannot load a causal language model from {where}: {_first_line(error)}") from error
    return wrap(model, tokenizer, name, folder)


def wrap(model: Any, tokenizer: Any, name: str = "model", folder: Path | None = None) -> Loaded:
    """Make a ``Loaded`` of a model and tokenizer that are in memory already."""
    ends: set[int] = set()
    for found in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        ends.update([] if found is None else found if isinstance(found, list) else [found])
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Loaded(model, tokenizer, ChatFormat.detect(tokenizer), name, folder, frozenset(ends), context)


def _folder(name: str) -> Path | None:
    """The folder that ``name`` stands for, None for a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and (asset := _asset(name)) is not None:
        return asset
    if path.is_file():
        raise ThriftyError(f"{name} is a file: give the model's folder (the one with config.json)")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ThriftyError(f"no folder {name}: it looks like a path, and nothing stands there; check the spelling")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ThriftyError(f"{name!r} is neither a folder, nor an asset, nor a Hub id such as Qwen/Qwen3-0.6B")
    return None


def _asset(name: str) -> Path | None:
    return assets.find(name) if name.removesuffix("-0") in assets.NAMES else None


def _check_folder(folder: Path) -> None:
    have = {path.name for path in folder.iterdir()}
    if "config.json" not in have:
        if "adapter_config.json" in have:
            raise ThriftyError(f"{folder} holds a peft adapter, not a model: load its base model and add the adapter")
        raise ThriftyError(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    if not have.intersection(TOKENIZER_FILES):
        raise ThriftyError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the tokenizer's files there, "
            "tokenizer.save_pretrained(folder) writes them"
        )
    if not any(file.endswith((".safetensors", ".safetensors.index.json")) for file in have):
        if any(file.endswith((".bin", ".pt", ".pth")) for file in have):
            raise ThriftyError(f"{folder} has pickled weights only: save them as safetensors with save_pretrained")
        raise ThriftyError(f"{folder} has no weights (*.safetensors): the copy or download is incomplete")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
