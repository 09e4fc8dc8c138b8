"""What adapters share: a place in peft for a new kind, attaching and folding, PiSSA-like starts as plain LoRA."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thrifty.contracts import ThriftyError

NAME = "valve"
"""What an adapter is called on the model, as in ``thrifty.tune.adapter.lora``."""


def register(name: str, config: type, model: type) -> None:
    """Make ``name`` (lower case) a peft type: peft saves, loads and merges it from then on.

    peft keeps its types in an enumeration and offers no way to add one, so this adds a member by hand.
    """
    key = name.upper()
    if key in PeftType.__members__:
        return
    member = str.__new__(PeftType, key)
    member._name_, member._value_ = key, key
    type.__setattr__(PeftType, key, member)
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = member
    PeftType._value2member_map_[key] = member
    register_peft_method(name=name, config_cls=config, model_cls=model)


def plain(model: Any) -> None:
    """Raise ThriftyError for a model that carries an adapter already."""
    if isinstance(model, PeftModel):
        raise ThriftyError("the model carries an adapter already: fold it first, or load the model anew")


def attach(model: Any, config: PeftConfig, seed: int) -> PeftModel:
    """``model`` (changed too) with an adapter called ``NAME``; whatever is drawn is drawn from ``seed``."""
    plain(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: PeftModel = get_peft_model(model, config, adapter_name=NAME)
        except (ValueError, TypeError) as error:
            raise ThriftyError(f"{config.peft_type} cannot be attached: {error}") from error
    return made


def fold(model: Any) -> Any:
    """The plain model with its active adapter merged into the weights."""
    if not isinstance(model, PeftModel):
        raise ThriftyError("the model carries no adapter to fold: attach or load one first")
    return model.merge_and_unload()


def target_names(targets: str) -> str | list[str]:
    """peft's ``target_modules``: "all-linear", or names with commas between them."""
    return targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]


def linears(model: Any, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that ``targets`` speaks of, by name; the output head is never among them with "all-linear"."""
    head = model.get_output_embeddings()
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if isinstance(targets, str):
        return {name: m for name, m in found.items() if m is not head}
    return {name: m for name, m in found.items() if any(name == t or name.endswith(f".{t}") for t in targets)}


# ------------------------------------------------------------------------------------------- new kinds


@dataclass
class Config(PeftConfig):
    """peft's configuration of a new kind, the one that was registered under ``kind``."""

    target_modules: Any = field(default=None, metadata={"help": "names of the modules to adapt, or all-linear"})
    exclude_modules: Any = field(default=None, metadata={"help": "names to leave out"})

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.kind]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class Layer(nn.Module, BaseTunerLayer):
    """A target with adapters around it. A kind says how one changes the output, and what that makes of the weights."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.merged_adapters: list[str] = []
        self.scaling: dict[str, Any] = {}
        """Strength by adapter, 1 as trained; the dial puts a tensor ``[B, 1, 1]`` here, as with peft's LoRA."""
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self._active_adapter = adapter_name
        self.make()
        self.update_layer(adapter_name, config)

    def make(self) -> None:
        """Set up the dicts of weights, empty."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: Any) -> None:
        self.scaling[adapter_name] = 1.0
        self.start(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def start(self, name: str, config: Any) -> None:
        """Make the weights of adapter ``name``."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        return name in self.scaling

    def change(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """What adapter ``name`` adds to the output ``y`` of the target for the input ``x``."""
        raise NotImplementedError

    def weights(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``weight`` and ``bias`` of the target with adapter ``name`` merged into them."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging ``adapter`` adds to the weight."""
        base: Any = self.get_base_layer()
        weight = base.weight.detach()
        return self.weights(adapter, weight, None)[0] - weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if self.has(name):
                y = y + self.change(x, y, name)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into the target; ``unmerge`` brings the very same weights back."""
        base: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if not self.has(name):
                continue
            old_bias = getattr(base, "bias", None)
            weight, bias = self.weights(name, base.weight.data, None if old_bias is None else old_bias.data)
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"merging adapter {name} gives weights that are not finite")
            self._before.append((base.weight.data, None if old_bias is None else old_bias.data))
            self._put(weight, bias)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            self._put(*self._before.pop())

    def _put(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        base.weight.data = weight
        if bias is None:
            if getattr(base, "bias", None) is not None:
                base.bias = None
        elif getattr(base, "bias", None) is None:
            base.bias = nn.Parameter(bias, requires_grad=False)
        else:
            base.bias.data = bias


class Tuner(BaseTuner):
    """peft's model of a new kind: a ``tuner_layer_cls`` (a ``Layer``) goes around every target."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - declared so by peft

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kind: Any = self.tuner_layer_cls
        if isinstance(target, kind):
            target.update_layer(adapter_name, peft_config)
            return
        layer = kind(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# ------------------------------------------------------------------------------- starts that move the base


def as_lora(folder: Path, initial: Mapping[str, Tensor]) -> None:
    """Rewrite a LoRA saved in ``folder``, whose start ``initial`` was taken out of the base, as one of the whole base.

        s B'A' - s BA = s [B' B] [A'; -A]        of rank 2r, alpha doubled so that s = alpha / r stays

    ``initial`` has the start's A and B under the names of the saved file. PiSSA (arXiv 2404.02948), appendix C.
    """
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    now = load_file(file)
    made = {}
    for name, value in now.items():
        start = initial[name].to(value)
        made[name] = torch.cat([value, -start], 0) if ".lora_A." in name else torch.cat([value, start], 1)
    config = json.loads(settings.read_text("utf-8"))
    ranks = {
        name.removeprefix("base_model.model.").split(".lora_A.")[0]: len(value)
        for name, value in made.items()
        if ".lora_A." in name
    }
    scale = config["lora_alpha"] / config["r"]
    config["r"] = max(ranks.values())
    config["lora_alpha"] = scale * config["r"]
    config["rank_pattern"] = {name: rank for name, rank in ranks.items() if rank != config["r"]}
    config["alpha_pattern"] = {name: scale * rank for name, rank in config["rank_pattern"].items()}
    config["init_lora_weights"] = True
    save_file(made, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
