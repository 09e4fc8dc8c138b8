"""Adapters for whoever has peft, or only serves LoRAs: our kinds made known to peft, and any adapter as plain LoRA.

peft's ``save_pretrained``, ``PeftModel.from_pretrained`` and ``merge_and_unload`` take every adapter of ours. A folder
of a kind that peft does not have (``SSF``, ``LORA_SB``) can be read once ``register()`` was called. vLLM and other
servers take plain LoRAs only:

| adapter | as a plain LoRA |
|---|---|
| plain-lora, eva | as it is |
| pissa | exact, of rank 2r, since the base was moved |
| lora-sb | exact, of rank r: B and R A |
| ssf | none: diag(gamma - 1) W has full rank, and there are biases |

>>> from thrifty.edges.peft import register, save_lora                    # doctest: +SKIP
>>> save_lora(model, "served")                                            # doctest: +SKIP
>>> register(); PeftModel.from_pretrained(base, "run/adapter")            # doctest: +SKIP
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from thrifty import registry
from thrifty.contracts import ThriftyError
from thrifty.tune.adapter import save_adapter

MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of peft's LoRA that take something out of the base weights."""


def register() -> None:
    """Make peft know every kind of adapter that is a method here or in a plug-in; call it before loading one."""
    for key, method in registry.methods().items():
        if method.family == "tune.adapter":
            registry.load(key)


def save_lora(
    model: Any, folder: str | Path, name: str = "valve", rank: int | None = None, tolerance: float = 1e-3
) -> Path:
    """Write adapter ``name`` of ``model`` as a plain LoRA, all or nothing; peft alone and servers of LoRAs load it.

    An adapter that is no LoRA is converted by peft's ``convert_to_lora`` to ``rank`` (default: its own ``r``).
    ``tolerance`` is the largest part of a layer's update, in Frobenius norm, that may be lost. Raises ThriftyError with
    the remedy where a kind cannot be a LoRA, where too much would be lost, and where the base was moved by others.
    """
    folder = Path(folder)
    if not isinstance(model, PeftModel):
        raise ThriftyError("the model carries no adapter: attach or load one first")
    if name not in model.peft_config:
        raise ThriftyError(f"the model has no adapter {name!r}, it has: {', '.join(model.peft_config)}")
    config: Any = model.peft_config[name]
    if config.peft_type == "LORA":
        _check_lora(model, config, name, rank)
        return save_adapter(model, folder, name)
    rank = rank if rank is not None else getattr(config, "r", None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    without = [n for n, m in layers.items() if not any(name in getattr(m, kept) for kept in m.adapter_layer_names)]
    if without:
        others = [other for other in model.peft_config if other != name]
        raise ThriftyError(
            f"{without[0]} carries {', '.join(others)} and not {name!r}, and peft converts one on all layers: "
            f"delete_adapter({others[0]!r}) first"
        )
    _check_convertible(config, layers, name, rank)
    try:
        made, state = convert_to_lora(model, rank, adapter_name=name)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ThriftyError(f"peft cannot make a LoRA of this {config.peft_type.lower()} adapter: {error}") from error
    lost, worst = max((_lost(layer, name, state, where), where) for where, layer in layers.items())
    if lost > tolerance:
        raise ThriftyError(
            f"a LoRA of rank {rank} loses {lost:.1%} of the update of {worst}: give a higher rank, or tolerance="
            f"{lost * 1.05:.2g} if that may be lost"
        )
    made.task_type = config.task_type
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        whole = Path(work) / "whole"
        made.save_pretrained(str(whole))
        save_file(state, whole / "adapter_model.safetensors", metadata={"format": "pt"})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(whole, folder)
    return folder


def _check_lora(model: Any, config: Any, name: str, rank: int | None) -> None:
    if rank not in (None, config.r):
        raise ThriftyError(f"adapter {name!r} is a LoRA of rank {config.r} and is saved as it is: leave rank out")
    more = [name for name in ("use_dora", "modules_to_save", "alora_invocation_tokens") if getattr(config, name, None)]
    more += ["bias"] if config.bias != "none" else []
    if more:
        raise ThriftyError(
            f"adapter {name!r} is more than a plain LoRA ({', '.join(more)}), which servers refuse: save it with "
            "save_adapter, or save the whole model after merge_and_unload"
        )
    start = str(config.init_lora_weights)
    if start.startswith(MOVES_THE_BASE) and name not in getattr(model, "starts", {}):
        raise ThriftyError(
            f"adapter {name!r} began as {start}, which moved the base, and its start is not known here: save it with "
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER OF THE UNTRAINED ADAPTER)"
        )


def _check_convertible(config: Any, layers: Mapping[str, Any], name: str, rank: int | None) -> None:
    kind = config.peft_type.lower().replace("_", "-")
    if not layers:
        raise ThriftyError(f"a {kind} adapter changes no weights, so no LoRA equals it: keep it as peft saves it")
    if not all(layer.supports_lora_conversion(name) for layer in layers.values()):
        raise ThriftyError(
            f"no LoRA equals a {kind} adapter: save it with save_adapter and read it where thrifty is installed "
            "(thrifty.edges.peft.register, then PeftModel.from_pretrained), or save the whole model after "
            "merge_and_unload, where its architecture has the biases that this may add"
        )
    if rank is None:
        raise ThriftyError(f"a {kind} adapter names no rank: give rank, the rank of the LoRA to be made of it")
    narrow, side = min(
        ((n, min(layer.get_base_layer().weight.shape)) for n, layer in layers.items()), key=lambda found: found[1]
    )
    if not 1 <= rank <= side:
        raise ThriftyError(f"a LoRA of rank {rank} does not fit {narrow}, which is {side} wide: give rank 1 to {side}")


@torch.no_grad()
def _lost(layer: Any, name: str, state: Mapping[str, Tensor], where: str) -> float:
    """Which part of the layer's update the LoRA in ``state`` lacks, in Frobenius norm."""
    update = layer.get_delta_weight(name).float()
    a, b = (state[f"{where}.lora_{side}.weight"].float() for side in "AB")
    size = float(update.norm())
    return float((update - b @ a).norm()) / size if size else 0.0
