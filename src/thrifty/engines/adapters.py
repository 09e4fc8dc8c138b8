"""The LoRAs that an engine may turn on a model which it shares with other engines and with training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from thrifty.contracts import ThriftyError
from thrifty.engines._vllm_lora import INITS
from thrifty.engines.reader import Reader
from thrifty.models.load import Loaded
from thrifty.models.strength import Dial


class Adapters:
    """LoRAs of one reader's model. Names are the engine's own: two engines may call different weights the same.

    Outside ``on`` the model is as it was: adapters that were added here are off.
    """

    def __init__(self, reader: Reader, loaded: Loaded) -> None:
        self.reader, self.loaded = reader, loaded
        self.names: dict[str, str] = {}
        """Names that this engine gave, and what the model calls them."""
        self.used: list[str] = []
        self._seen: tuple[Any, ...] = ()
        self._layers: list[Any] = []

    def add(self, name: str, folder: Path) -> None:
        """Load the LoRA in ``folder``; ThriftyError where there is none that takes a strength per row."""
        from peft import PeftConfig, PeftModel

        if name in self.names:
            raise ThriftyError(f"this engine has an adapter {name!r} already: choose another name")
        if not (folder / "adapter_config.json").is_file():
            raise ThriftyError(f"{folder} holds no adapter (no adapter_config.json): give the folder that peft saved")
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:
            raise ThriftyError(
                f"{folder}/adapter_config.json is none that peft wrote ({error}): save it again"
            ) from error
        if config.peft_type != "LORA":
            raise ThriftyError(
                f"{folder} holds a {config.peft_type} adapter; only a LoRA takes a strength per row: convert it first"
            )
        if getattr(config, "use_dora", False):
            raise ThriftyError(f"{folder} holds a DoRA, which takes one strength per call: use a plain LoRA")
        _check(folder, config)
        model, carried = self.reader.model, self._carried()
        inside = next(n for n in (name, *(f"{name}-{i}" for i in range(len(carried) + 1))) if n not in carried)
        active = {layer: layer._active_adapter for layer in _lora_layers(model)}
        learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if isinstance(self.loaded.model, PeftModel):
                    self.loaded.model.load_adapter(str(folder), adapter_name=inside)
                else:
                    PeftModel.from_pretrained(model, str(folder), adapter_name=inside)
            except (ValueError, RuntimeError, SafetensorError) as error:  # other modules, other shapes, a torn file
                why = str(error).strip().partition("\n")[0]
                raise ThriftyError(
                    f"{folder} does not fit {self.loaded.name}, or is damaged: {why}; give the model that it was "
                    "trained on, or save the adapter again"
                ) from error
            finally:  # peft has turned the new adapter on and frozen everything: leave the model as it was found
                for layer in _lora_layers(model):
                    layer._active_adapter = active.get(layer, [])
                for parameter, learns in learning:
                    parameter.requires_grad_(learns)
        # peft also warns of the adapters that were there before, which this folder does not hold.
        if any("missing adapter keys" in str(w.message) and f".{inside}." in str(w.message) for w in caught):
            raise ThriftyError(f"{folder} lacks weights that its adapter_config.json speaks of: save the adapter again")
        self.names[name] = inside

    def resolve(self, given: Mapping[str, float]) -> dict[str, float]:
        """The model's names of ``given`` and their strengths, those of strength 0 left out."""
        if not given:
            return {}
        carried = self._carried()
        found = {}
        for name, strength in given.items():
            inside = self.names.get(name, name)
            if inside not in carried:
                have = ", ".join(self.names or carried) or "none"
                raise ThriftyError(
                    f"no adapter {name!r} on role {self.reader.role!r} (it has: {have}): add_adapter first"
                )
            if strength:
                found[inside] = float(strength)
                if inside not in self.used:
                    self.used.append(inside)
        return found

    @contextmanager
    def on(self) -> Iterator[None]:
        """Run the model in evaluation mode with the adapters that requests have named, and no others."""
        model = self.reader.model
        seen = (*self.used, None, *self._carried())
        if seen != self._seen:
            self._seen, self._layers = seen, _lora_layers(model)
            dial = Dial(model)
            dial.layers = {name: dial.layers[name] for name in self.used}
            self.reader.dial = dial
        # Not by set_adapter: it would freeze the weights of a model in training.
        before = [(layer, layer._active_adapter) for layer in self._layers]
        training = model.training
        try:
            for layer in self._layers:
                layer._active_adapter = [name for name in self.used if name in layer.scaling]
            if training:
                model.eval()
            yield
        finally:
            for layer, names in before:
                layer._active_adapter = names
            if training:
                model.train()

    def forget(self) -> None:
        """Look at the model anew."""
        self._seen = ()

    def _carried(self) -> tuple[str, ...]:
        return tuple(getattr(self.reader.model, "peft_config", None) or ())


def _check(folder: Path, config: Any) -> None:
    """Refuse a LoRA whose weights are not there, or that changes the model at strength 0 as well."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # peft would look for them on the Hub
        raise ThriftyError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME} (no pickle is read): save the adapter again")
    more = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    more += ["bias"] if getattr(config, "bias", "none") != "none" else []
    if more:
        raise ThriftyError(
            f"{folder} trained more than a LoRA ({', '.join(more)}), which no strength turns: use a plain LoRA, or "
            "merge it (merge_and_unload) and give the whole model"
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in INITS:
        raise ThriftyError(
            f"{folder} began as {start}, which changes the model's own weights when it is loaded: save it with "
            "thrifty.edges.peft.save_lora, or with peft's path_initial_model_for_weight_conversion"
        )


def _lora_layers(model: Any) -> list[Any]:
    return [
        m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict) and hasattr(m, "active_adapters")
    ]
