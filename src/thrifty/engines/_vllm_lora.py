"""LoRA folders as vLLM takes them: whether it accepts one, and one folder per strength.

The rules are those of vLLM 0.33.0, read in its ``lora/peft_helper.py``, ``lora/lora_model.py``, ``lora/utils.py`` and
``config/lora.py``; nothing of vLLM is imported. vLLM computes ``x W' + (alpha / r) x A' B'`` with alpha and r from
``adapter_config.json``, so a strength s is alpha * s: exact, with the weights copied as they are.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from thrifty.contracts import ThriftyError

VERSION = "0.33.0"
"""The vLLM whose rules these are."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be; 16 where it is not given."""
INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts of peft's LoRA, by name, that leave the base weights of a saved adapter alone."""
HEADS = ("classifier", "score")
"""The modules that ``modules_to_save`` may name."""
WEIGHTS = "adapter_model.safetensors"
PLAIN = "write it as a plain LoRA with thrifty.edges.peft.save_lora"
MERGE = "serve the whole model after peft's merge_and_unload"

_REFUSED: tuple[tuple[str, str, str], ...] = (
    ("use_dora", "it is a DoRA", MERGE),
    ("lora_bias", "its B has a bias (lora_bias)", f"train without it, or {MERGE}"),
    ("alora_invocation_tokens", "it is an activated LoRA (aLoRA)", "train a plain LoRA"),
    ("layer_replication", "it replicates layers (layer_replication)", MERGE),
    ("use_bdlora", "it is block-diagonal (BD-LoRA)", MERGE),
    ("use_qalora", "it is a QA-LoRA", MERGE),
)
_UNREAD: tuple[tuple[str, str], ...] = (
    ("arrow_config", "Arrow routing"), ("kasa_config", "KaSA"), ("monteclora_config", "MonteCLoRA"),
)  # fmt: skip
"""Variants that change what the adapter computes and that vLLM does not look for."""


@dataclass(frozen=True)
class Fault:
    """Why vLLM would refuse a folder, or serve something else than was trained."""

    what: str
    remedy: str


@dataclass(frozen=True)
class LoraReport:
    """What ``check_lora`` found. ``faults`` is empty where vLLM takes the folder."""

    folder: Path
    rank: int
    """The largest rank of any layer."""
    needed: int | None
    """The smallest ``--max-lora-rank`` that takes it; None where there is none."""
    modules: tuple[str, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.faults


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``; ThriftyError where ``folder`` holds none that can be read."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError:
        raise ThriftyError(
            f"{folder} holds no adapter (no adapter_config.json): give the folder that peft saved"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ThriftyError(f"{path} is no JSON ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise ThriftyError(f"{path} holds no JSON object: save the adapter again")
    return config


def check_lora(folder: str | Path, max_lora_rank: int | None = None) -> LoraReport:
    """Whether vLLM takes the LoRA in ``folder``, started with ``--max-lora-rank`` (None: with whatever it needs).

    Reads the configuration and the names and shapes of the weights, not their values. What depends on the served model
    (whether it has these layers) is not looked at. Raises ThriftyError where the folder holds no adapter.
    """
    folder = Path(folder)
    config = read_config(folder)
    faults: list[Fault] = []
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        faults.append(Fault(f"it is a {kind} adapter, no LoRA", f"where a LoRA equals it, {PLAIN}; else {MERGE}"))
    missing = [name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if missing:
        faults.append(Fault(f"adapter_config.json lacks {', '.join(missing)}", "save the adapter again with peft"))
        return LoraReport(folder, 0, None, (), tuple(faults))
    ranks = {"r": config["r"], **(config.get("rank_pattern") or {})}
    odd = [name for name, rank in ranks.items() if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1]
    if odd:
        faults.append(Fault(f"the rank of {', '.join(odd)} is no positive whole number", "save the adapter again"))
        return LoraReport(folder, 0, None, (), tuple(faults))
    rank = max(ranks.values())
    needed = next((n for n in RANKS if n >= rank), None)
    faults += _config_faults(config, rank, needed, max_lora_rank)
    modules, wrong, notes = _weight_faults(folder, config)
    return LoraReport(folder, rank, needed, modules, (*faults, *wrong), notes)


def export_strength(folder: str | Path, strength: float, out: str | Path) -> Path:
    """Write the LoRA of ``folder`` at ``strength`` to ``out``, all or nothing, for ``vllm serve --lora-modules``.

    1 is the adapter as trained, more extrapolates, 0 changes nothing. peft reads the folder, too. Raises ThriftyError
    where vLLM would not take it, and where ``out`` is the folder itself or holds something else than an adapter.
    """
    folder, out = Path(folder), Path(out)
    if not math.isfinite(strength):
        raise ThriftyError(f"strength {strength} of {folder}: give a finite number, such as 0.5")
    report = check_lora(folder)
    if report.faults:
        fault = report.faults[0]
        raise ThriftyError(f"vLLM does not take {folder}: {fault.what}; {fault.remedy}")
    if not (folder / WEIGHTS).is_file():
        raise ThriftyError(f"{folder} has pickled weights only: save the adapter as safetensors with peft")
    if out.resolve() == folder.resolve():
        raise ThriftyError(f"{out} is the adapter itself: write to another folder")
    if out.exists() and not (out / "adapter_config.json").is_file():
        raise ThriftyError(f"{out} exists and is no adapter: write to another folder")
    config = read_config(folder)
    config["lora_alpha"] = _scaled(config["lora_alpha"], strength)
    config["alpha_pattern"] = {k: _scaled(v, strength) for k, v in (config.get("alpha_pattern") or {}).items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
            whole = Path(work) / "whole"
            whole.mkdir()
            (whole / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            shutil.copyfile(folder / WEIGHTS, whole / WEIGHTS)
            if out.exists():
                shutil.rmtree(out)
            os.replace(whole, out)
    except OSError as error:
        raise ThriftyError(f"{out}: cannot be written: {error.strerror or error}") from error
    return out


def export_strengths(folder: str | Path, strengths: Sequence[float], out: str | Path) -> dict[str, Path]:
    """``export_strength`` for each, to ``out/NAME-STRENGTH``; the folders by the names vLLM is to call them."""
    folder, out = Path(folder), Path(out)
    return {
        name: export_strength(folder, strength, out / name)
        for strength in strengths
        for name in (f"{folder.resolve().name}-{strength:g}",)
    }


def serve_line(model: str, served: Mapping[str, Path], rank: int) -> str:
    """The ``vllm serve`` command for folders of ``export_strengths``."""
    modules = " ".join(f"{name}={path.resolve()}" for name, path in served.items())
    return f"vllm serve {model} --enable-lora --max-lora-rank {rank} --max-loras {len(served)} --lora-modules {modules}"


# ------------------------------------------------------------------------------------------------------ the rules


def _config_faults(config: Mapping[str, Any], rank: int, needed: int | None, limit: int | None) -> list[Fault]:
    faults = [Fault(what, remedy) for name, what, remedy in _REFUSED if config.get(name)]
    faults += [
        Fault(f"{what} changes what it computes, and vLLM does not read {name}", MERGE)
        for name, what in _UNREAD
        if config.get(name)
    ]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in INITS:
        faults.append(Fault(f"it began as {start}, which moves the base weights when peft loads it", PLAIN))
    extra = [name for name in config.get("modules_to_save") or () if name not in HEADS]
    if extra:
        faults.append(Fault(f"it holds whole modules: {', '.join(extra)} (modules_to_save)", MERGE))
    if config.get("bias", "none") != "none":
        faults.append(Fault(f"it trained biases (bias={config['bias']!r})", f"train with bias='none', or {MERGE}"))
    if needed is None:
        faults.append(Fault(f"its rank is {rank}; vLLM takes {RANKS[-1]} at most", MERGE))
    elif limit is not None and rank > limit:
        faults.append(Fault(f"its rank is {rank}, more than {limit}", f"start vLLM with --max-lora-rank {needed}"))
    return faults


def _weight_faults(
    folder: Path, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[Fault, ...], tuple[str, ...]]:
    """Modules that have weights, what is wrong with these, and what else to know."""
    path = folder / WEIGHTS
    if not path.is_file():
        if any((folder / name).is_file() for name in ("adapter_model.bin", "adapter_model.pt")):
            return (), (), ("its weights are pickled: vLLM reads them, they were not looked at here",)
        return (), (Fault(f"it has no weights ({WEIGHTS})", "save the adapter again"),), ()
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        return (), (Fault(f"{WEIGHTS} cannot be read ({error})", "save the adapter again"),), ()
    pairs: dict[str, dict[str, list[int]]] = {}
    unknown = []
    for name, shape in shapes.items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue  # copies of base weights, which vLLM passes over
        if match := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(\.weight)?", name):
            if ("embedding" in name.rpartition("lora_")[2]) == bool(match[3]):
                unknown.append(name)
            else:
                pairs.setdefault(match[1].removeprefix("base_model.model."), {})[match[2]] = shape
        elif not re.search(r"(^|\.)(score|classifier)\.(weight|bias)$", name):
            unknown.append(name)
    faults = []
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        faults.append(Fault(f"it holds weights that are no LoRA's: {unknown[0]}{more}", MERGE))
    if not pairs:
        faults.append(Fault("it holds no LoRA weights", "save the adapter again"))
    rank_of = _by_pattern(config)
    for module, sides in pairs.items():
        r = rank_of(module)
        if set(sides) != {"A", "B"}:
            faults.append(Fault(f"{module} has only one of lora_A and lora_B", "save the adapter again"))
        elif sides["A"][0] != r or sides["B"][-1] != r:
            found = f"A {sides['A']} and B {sides['B']}"
            faults.append(Fault(f"{module} should have rank {r} by adapter_config.json and has {found}",
                                "save the adapter again, configuration and weights together"))  # fmt: skip
    suffixes = {module.rpartition(".")[2] for module in pairs}
    notes = [
        f"it changes {name}: vLLM takes that for architectures that declare it (Llama and Qwen3 do)"
        for name in sorted(suffixes & {"embed_tokens", "lm_head"})
    ]
    if any(".experts" in module for module in pairs):
        notes.append("it changes experts: what vLLM takes depends on the architecture's layout of experts")
    return tuple(pairs), tuple(faults), tuple(notes)


def _by_pattern(config: Mapping[str, Any]) -> Callable[[str], int]:
    """peft's rule: the first key of ``rank_pattern`` that ends the module's name at a dot, else ``r``."""
    patterns = [(re.compile(rf"(.*\.)?({key})$"), r) for key, r in (config.get("rank_pattern") or {}).items()]
    return lambda module: next((r for pattern, r in patterns if pattern.match(module)), config["r"])


def _scaled(alpha: float, strength: float) -> float:
    value = alpha * strength
    return int(value) if value == int(value) else value
