"""A LoRA folder as one small file: ``thrifty adapter compress`` and ``expand``.

The file is ``MAGIC``, the length of a header (4 bytes, little-endian), the header as JSON, tensors that are kept as
they are (safetensors), and the bytes of the codec. The header holds ``adapter_config.json``, the codec, and what its
bytes are relative to: ``seed`` (values that ``thrifty.tune.adapter.lora`` draws again), else values that one must have,
told by their ``digest``; neither: lora_B relative to zero, which is how a LoRA begins, and the rest kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from thrifty import fields
from thrifty.contracts import ThriftyError
from thrifty.engines import _vllm_lora
from thrifty.files import aside
from thrifty.weights.codec.compeft import task_vector

MAGIC = b"thrifty adapter 1\n"


def compress(folder: Path, codec: str, out: Path, initial: Path | None, seed: int | None, base: str | None) -> int:
    """Write the LoRA of ``folder`` to ``out``; its size in bytes.

    ``initial`` is the folder as it was before training, ``seed`` the one from which ``thrifty run`` drew it on ``base``
    (default: the model that adapter_config.json names).
    """
    config, tuned = _vllm_lora.read_config(folder), _weights(folder)
    method = _codec(codec)
    start: Mapping[str, Tensor] | None = None
    if initial is not None:
        start = _weights(initial)
    elif seed is not None:
        start = _drawn(config, seed, base)
    kept: dict[str, Tensor] = {}
    if start is None:
        update = {name: value for name, value in tuned.items() if re.search(r"\.lora_B\b", name)}
        kept = {name: value for name, value in tuned.items() if name not in update}
        if not update:
            raise ThriftyError(
                f"{folder} has no lora_B, which begins as zero: say what its weights began as with --initial FOLDER"
            )
    else:
        update = task_vector(tuned, start)
        if _square(update) >= _square(tuned):
            raise ThriftyError(
                f"{folder} did not begin as these initial values: the update would be larger than the adapter itself. "
                "Give the values before its training, or neither --initial nor --seed"
            )
    parts = save(kept), method.encode(update)
    header = {
        "codec": codec,
        "config": config,
        "seed": seed if initial is None else None,
        "digest": None if start is None else _digest(start),
        "lengths": [len(part) for part in parts],
        "sha256": hashlib.sha256(b"".join(parts)).hexdigest(),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    data = b"".join((MAGIC, struct.pack("<I", len(text)), text, *parts))
    with aside(out) as temporary:
        temporary.write_bytes(data)
    return len(data)


def expand(file: Path, out: Path, initial: Path | None, base: str | None) -> dict[str, Any]:
    """Write what ``compress`` wrote as a LoRA folder, all or nothing; the file's header."""
    if out.exists():
        raise ThriftyError(f"{out} exists: write to another folder")
    header, kept, coded = _read(file)
    state = _codec(header["codec"]).decode(coded)
    if header["digest"] is not None:
        if initial is None and header["seed"] is None:
            raise ThriftyError(f"{file} holds the change of an adapter: give what it began as with --initial FOLDER")
        start = _drawn(header["config"], header["seed"], base) if initial is None else _weights(initial)
        if _digest(start) != header["digest"]:
            raise ThriftyError(
                f"{file} was compressed against other initial values: give --initial FOLDER or --base MODEL as then"
            )
        state = {name: start[name].to(value) + value for name, value in state.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
            whole = Path(work) / "whole"
            whole.mkdir()
            (whole / "adapter_config.json").write_text(json.dumps(header["config"], indent=2) + "\n", "utf-8")
            save_file({**load(kept), **state}, whole / _vllm_lora.WEIGHTS, metadata={"format": "pt"})
            os.replace(whole, out)
    except OSError as error:
        raise ThriftyError(f"{out}: cannot be written: {error.strerror or error}") from error
    return header


def size(folder: Path) -> int:
    """Bytes of a LoRA folder: its weights and its configuration."""
    return sum((folder / name).stat().st_size for name in (_vllm_lora.WEIGHTS, "adapter_config.json"))


def _read(file: Path) -> tuple[dict[str, Any], bytes, bytes]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ThriftyError(f"{file}: cannot be read: {error.strerror or error}") from error
    at = len(MAGIC) + 4
    if data[: len(MAGIC)] != MAGIC:
        raise ThriftyError(f"{file} is no compressed adapter: give a file that `thrifty adapter compress` wrote")
    try:
        end = at + struct.unpack("<I", data[len(MAGIC) : at])[0]
        header = json.loads(data[at:end])
        first, second = header["lengths"]
        whole = len(data) == end + first + second and header["sha256"] == hashlib.sha256(data[end:]).hexdigest()
    except (struct.error, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ThriftyError(f"{file} is damaged or cut short: copy it anew")
    return header, data[end : end + first], data[end + first :]


def _weights(folder: Path) -> dict[str, Tensor]:
    _vllm_lora.read_config(folder)
    path = folder / _vllm_lora.WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ThriftyError(f"{path} cannot be read ({error}): save the adapter again, as safetensors") from error


def _codec(text: str) -> Any:
    return fields.part("--codec", text, "weights.codec", "encode")


def _drawn(config: Mapping[str, Any], seed: int, base: str | None) -> dict[str, Tensor]:
    """The LoRA of ``config`` as ``thrifty run --seed`` begins with it. In float32 on the CPU, whatever it ran on."""
    from peft import get_peft_model_state_dict

    from thrifty.models.load import load as load_model
    from thrifty.tune.adapter import lora

    if config.get("peft_type") != "LORA" or config.get("init_lora_weights", True) is not True:
        raise ThriftyError(
            "--seed draws what a plain LoRA begins with, and this adapter began otherwise: give --initial FOLDER"
        )
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ThriftyError("adapter_config.json names no model: give --base DIR_OR_HUB_ID")
    model = load_model(name, device="cpu", dtype="float32").model
    targets = sorted(config["target_modules"])
    made = lora(model, config["r"], config["lora_alpha"], targets, name="drawn", seed=seed)
    state: dict[str, Tensor] = get_peft_model_state_dict(made, adapter_name="drawn", save_embedding_layers=False)
    return state


def _square(state: Mapping[str, Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in state.values())


def _digest(state: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save({name: value.contiguous() for name, value in sorted(state.items())})).hexdigest()
