"""Saves trained weights and latency: scales and shifts features per channel, and merges into the weights afterwards.

    y = gamma * f(x) + beta      after every linear layer f;   gamma ~ N(1, 0.02), beta ~ N(0, 0.02) at first
    W' = diag(gamma) W,   b' = gamma * b + beta;   after a norm: weight' = gamma * weight, bias' = gamma * bias + beta

So 2 values per output channel are trained, and the merged model costs nothing extra.

Paper: Lian, Zhou et al. 2022, Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning,
arXiv 2210.08823. A new kind of peft adapter (``SSF``).
Differs: made for decoders: the output head and the embedding are left alone (the paper trains a new head). After a
norm without bias (RMSNorm) there is only the scale, for a shift could not be merged there and the linear layers behind
it have one. Norms whose output is not proportional to their weight (Gemma's 1 + w) are left out. gamma - 1 is stored.

>>> import torch
>>> layer = torch.nn.Linear(2, 2, bias=False)
>>> _ = layer.weight.data.copy_(torch.tensor([[1., 2.], [3., 4.]]))
>>> ssf = SSFLayer(layer, "default", SSFConfig())
>>> ssf.put("default", scale=torch.tensor([2., 10.]), shift=torch.tensor([0.5, -1.]))
>>> ssf(torch.tensor([[1., 1.]]))                        # 2 * 3 + .5 and 10 * 7 - 1
tensor([[ 6.5000, 69.0000]], grad_fn=<AddBackward0>)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from thrifty.contracts import Card, ThriftyError
from thrifty.tune.adapter._peft import Config, Layer, Tuner, linears, register, target_names
from thrifty.tune.adapter._peft import attach as attached
from thrifty.tune.adapter._peft import fold as merged
from thrifty.tune.adapter._trained import learnt
from thrifty.tune.batches import Batch

CARD = Card(
    key="ssf",
    title="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
    arxiv="2210.08823",
    year=2022,
    saves=("parameters", "latency"),
)


@dataclass(frozen=True)
class SSF:
    scale: bool = field(default=True, metadata={"help": "train the scales"})
    shift: bool = field(default=True, metadata={"help": "train the shifts"})
    norms: bool = field(default=True, metadata={"help": "after normalisations too, not after linear layers alone"})
    spread: float = field(default=0.02, metadata={"help": "standard deviation of scales and shifts at first"})
    targets: str = field(default="all-linear", metadata={"help": "linear layers: names with commas, or all-linear"})
    seed: int = field(default=0, metadata={"help": "of the start"})

    starts_equal: ClassVar[bool] = False

    def attach(self, model: Any, batches: Sequence[Batch] = ()) -> Any:
        """``model`` with a scale and a shift after every target; ``batches`` are not looked at."""
        if not (self.scale or self.shift):
            raise ThriftyError("ssf has neither scale nor shift: switch one of them on")
        names = list(linears(model, target_names(self.targets)))
        if self.norms:
            names += [n for n, m in model.named_modules() if _proportional(m) and (self.scale or _bias(m) is not None)]
        config = SSFConfig(
            task_type=TaskType.CAUSAL_LM, target_modules=names, scale=self.scale, shift=self.shift, spread=self.spread
        )
        return attached(model, config, self.seed)

    def fold(self, model: Any) -> Any:
        """The plain model with what was learnt merged in; its linear layers have biases then.

        Few architectures can save those, so keep the adapter's folder and fold after loading.
        """
        return merged(model)


def _bias(module: nn.Module) -> Tensor | None:
    return getattr(module, "bias", None)


@torch.no_grad()
def _proportional(module: nn.Module) -> bool:
    """Whether this is a normalisation with one weight per channel, to which its output is proportional."""
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None]
    bias, kept = _bias(module), weight.clone()
    once = module(x) - (0 if bias is None else bias)
    weight.mul_(2)
    twice = module(x) - (0 if bias is None else bias)
    weight.copy_(kept)
    return bool(torch.allclose(twice, 2 * once, rtol=1e-2, atol=1e-5))


# ------------------------------------------------------------------------------------------ the peft method


@dataclass
class SSFConfig(Config):
    """peft configuration of an SSF adapter."""

    scale: bool = field(default=True, metadata={"help": "train the scales"})
    shift: bool = field(default=True, metadata={"help": "train the shifts"})
    spread: float = field(default=0.02, metadata={"help": "standard deviation at first"})

    kind: ClassVar[str] = "SSF"


class Scaled(torch.autograd.Function):
    """gamma * (W x + b) + beta as one product with the merged weights: no passes over tokens besides, only x is kept.

    dL/dgamma_c = sum_t g_tc (W x_t + b)_c = sum_i (g^T x)_ci W_ci + b_c sum_t g_tc     for gradients g_t at token t
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        gamma = 1 + scale
        made = None if bias is None else (gamma * bias).to(weight.dtype)
        if shift is not None:
            made = shift.to(weight.dtype) if made is None else made + shift.to(weight.dtype)
        return nn.functional.linear(x, (gamma[:, None] * weight).to(weight.dtype), made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        summed = flat.sum(0, dtype=scale.dtype)
        to_scale = ((flat.T @ x.reshape(-1, x.shape[-1])) * weight).sum(1, dtype=scale.dtype)
        if bias is not None:
            to_scale += summed * bias
        to_x = g @ ((1 + scale)[:, None] * weight).to(weight.dtype) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_scale, summed if ctx.needs_input_grad[4] else None


class SSFLayer(Layer):
    """gamma * f(x) + beta around a linear layer or a norm."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")
    other_param_names = ("scaling",)

    def make(self) -> None:
        base: Any = self.get_base_layer()
        if not isinstance(base, nn.Linear) and getattr(base, "weight", torch.empty(0, 0)).ndim != 1:
            raise TypeError(f"ssf adapts linear layers and norms, not {type(base).__name__}")
        self.ssf_scale, self.ssf_shift = nn.ParameterDict(), nn.ParameterDict()

    def start(self, name: str, config: Any) -> None:
        base: Any = self.get_base_layer()
        channels = base.weight.shape[0]
        if config.scale:
            self.ssf_scale[name] = nn.Parameter(torch.randn(channels) * config.spread)
        if config.shift and (isinstance(base, nn.Linear) or _bias(base) is not None):
            self.ssf_shift[name] = nn.Parameter(torch.randn(channels) * config.spread)

    def put(self, name: str, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Set gamma and beta ``[channels]``."""
        if scale is not None:
            self.ssf_scale[name].data.copy_(scale - 1)
        if shift is not None:
            self.ssf_shift[name].data.copy_(shift)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As of any layer. The gradient of gamma needs f(x), which is not kept: others keep x anyway."""
        if not torch.is_grad_enabled():
            return super().forward(x, *args, **kwargs)
        if merged := self._merged(x):
            scaled: Tensor = Scaled.apply(x, *merged)
            return scaled
        now = dict(self.scaling)  # backward may be called where another strength is in force

        def run(x: Tensor) -> Tensor:
            kept, self.scaling = self.scaling, now
            try:
                return super(SSFLayer, self).forward(x, *args, **kwargs)
            finally:
                self.scaling = kept

        again: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return again

    def _merged(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None:
        """What ``Scaled`` takes, for a frozen linear layer under one adapter at full strength; nothing may cast."""
        base, active = self.base_layer, [name for name in self.active_adapters if self.has(name)]
        if (
            type(base) is not nn.Linear
            or x.dtype != base.weight.dtype
            or any(p.requires_grad for p in base.parameters())
        ):
            return None
        if len(active) != 1 or self.disable_adapters or self.merged or torch.is_autocast_enabled(x.device.type):
            return None
        [name] = active
        if name not in self.ssf_scale or isinstance(self.scaling[name], Tensor) or self.scaling[name] != 1.0:
            return None
        return base.weight, base.bias, self.ssf_scale[name], self.ssf_shift.get(name)

    def change(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        strength = self.scaling[name]
        if isinstance(strength, Tensor):  # [B, T or 1, 1], and some norms see heads: [B, T, heads, d]
            strength = strength.reshape(*strength.shape[:2], *[1] * (y.ndim - 2)).to(y.dtype)
        scale, shift = (p[name].to(y.dtype) if name in p else None for p in (self.ssf_scale, self.ssf_shift))
        made: Any = 0.0
        if scale is not None:
            made = y * scale if shift is None else torch.addcmul(shift, y, scale)
        elif shift is not None:
            made = shift
        return made if isinstance(strength, float) and strength == 1.0 else made * strength

    def weights(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        strength = self.scaling[name]
        if name in self.ssf_scale:
            scale = 1 + strength * self.ssf_scale[name].data
            weight = (scale[:, None] * weight if weight.ndim > 1 else scale * weight).to(weight.dtype)
            bias = None if bias is None else (scale * bias).to(weight.dtype)
        if name in self.ssf_shift:
            shift = (strength * self.ssf_shift[name].data).to(weight.dtype)
            bias = shift if bias is None else bias + shift
        return weight, bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # diag(gamma - 1) W has full rank, and there is a bias


class SSFModel(Tuner):
    """peft's model with SSF around its targets."""

    prefix = "ssf_"
    tuner_layer_cls = SSFLayer


register("ssf", SSFConfig, SSFModel)


CLAIM = {
    "says": "Scales and shifts together learn a new skill better than scales alone, which shifts alone do not.",
    "parts": [{"name": "loss", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.05}],
    "comparator": {"shift": False},
    "placebo": {"scale": False},
    "match": "documents and their order, steps",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "grid": {"lr": [3e-2, 1e-1, 3e-1, 1.0]},
    "gates": {"the skill is new": [None, 0.05]},
    "amendments": [
        "1: five seeds were inconclusive; now eight, and rates on both sides of the largest, which both arms took",
        "2: both arms took the largest rate again, 1e-1; now up to 1, and the skill is spelt in tokens that the "
        "student knows, since nothing that freezes the embeddings could learn the others",
    ],
}


def claim(trial: Any) -> dict[str, Any]:
    """Held-out loss after 150 steps on a spelling that the student has never seen."""
    return learnt(trial)
