"""Saves trained weights: r * r values per matrix, in the subspace of the first step that full fine-tuning would make.

    W = W0 + s B R A,   B [out, r] and A [r, in] frozen and orthonormal, R [r, r] trained, s = 1

The gradient of R moves W by s B g_R A; the move closest to the full gradient's is reached with
g_R / s^2 (B^T B)^-1 .. (A A^T)^-1, which is g_R itself here: no scale to tune and nothing to project. Start: the full
gradients of about 50 examples are added up, G = sum_i g_i, and the first AdamW step of full fine-tuning is taken apart:

    dW = - eta sign(G),   eta = lr / warmup steps,   dW = U S V^T,   B = U_r,   A = V_r^T,   R = S_r / s

so the adapted model starts at the best rank-r copy of that step.

Paper: Ponkshe, Singhal et al. 2024, Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning, arXiv 2411.19557. A new kind of peft adapter (``LORA_SB``); peft's ``convert_to_lora``
at the same rank makes an exact LoRA of it.
``start="weights"`` is LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): B = U_r S_r and A = V_r^T of W0.
Differs: the SVD is exact where the smaller side of a matrix has at most 1,024 rows, and looks for eight directions
more than are kept where it is randomised; ``eta`` is made of the fields ``lr`` and ``warmup``, which should be those of
full fine-tuning. The paper takes the rate of the training that follows; where that is ten times as large, as on the
shipped students, so is the start.

>>> import torch
>>> step = -0.5 * torch.tensor([[5., -1.], [3., -7.]]).sign()          # dW = [[-.5, .5], [-.5, .5]]
>>> a, r, b = factors(step, rank=1)
>>> r, b @ r @ a                                       # all of dW: one singular value, sqrt(4 * .5^2) = 1
(tensor([[1.]]), tensor([[-0.5000,  0.5000],
        [-0.5000,  0.5000]]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from peft import TaskType
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn.functional import linear

from thrifty.contracts import Card, ThriftyError
from thrifty.tune.adapter._peft import NAME, Config, Layer, Tuner, linears, plain, register, target_names
from thrifty.tune.adapter._peft import attach as attached
from thrifty.tune.adapter._peft import fold as merged
from thrifty.tune.adapter._trained import learnt
from thrifty.tune.batches import Batch
from thrifty.tune.logprobs import target_logprobs

CARD = Card(
    key="lora-sb",
    title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    arxiv="2411.19557",
    year=2024,
    saves=("parameters", "memory"),
)


@dataclass(frozen=True)
class LoraSB:
    rank: int = field(default=96, metadata={"help": "side of the trained square R; the paper takes 32 to 96"})
    lr: float = field(
        default=1e-4, metadata={"help": "learning rate of full fine-tuning, whose first step the start copies"}
    )
    warmup: int = field(default=333, metadata={"help": "its warm-up steps: the paper's 2 % of 16,667"})
    start: str = field(
        default="update",
        metadata={"help": "what B and A span: update (the paper's), weights (LoRA-XS), random (orthonormal)"},
    )
    samples: int = field(default=50, metadata={"help": "examples whose gradients are added up for the start"})
    iterations: int = field(default=10, metadata={"help": "power iterations of the SVD of large matrices"})
    targets: str = field(default="all-linear", metadata={"help": "linear layers: names with commas, or all-linear"})
    seed: int = field(default=0, metadata={"help": "of the randomised SVD"})

    starts_equal: ClassVar[bool] = False

    def attach(self, model: Any, batches: Sequence[Batch] = ()) -> Any:
        """``model`` with the first step of full fine-tuning on ``batches`` in its adapter, at rank ``rank``."""
        plain(model)
        if self.rank < 1 or self.warmup < 1:
            raise ThriftyError(f"lora-sb has rank {self.rank} and warmup {self.warmup}: give at least 1 of each")
        if self.start not in ("update", "weights", "random"):
            raise ThriftyError(f"lora-sb has the start {self.start!r}: choose update, weights or random")
        if self.start == "update" and not batches:
            raise ThriftyError("lora-sb starts from gradients: give it a few batches of the training data")
        names = target_names(self.targets)
        summed = {}
        if self.start == "update":
            summed = gradients(model, list(linears(model, names)), batches, self.samples)
        config = LoraSBConfig(task_type=TaskType.CAUSAL_LM, r=self.rank, target_modules=names)
        made = attached(model, config, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, layer in made.get_base_model().named_modules():
                if isinstance(layer, LoraSBLayer) and self.start == "update":
                    gradient = summed.pop(name).to(layer.base_layer.weight.device)
                    step = -self.lr / self.warmup * gradient.sign()
                    layer.put(NAME, *factors(step, self.rank, self.iterations))
                elif isinstance(layer, LoraSBLayer) and self.start == "weights":
                    a, s, b = factors(layer.base_layer.weight.detach(), self.rank, self.iterations)
                    layer.put(NAME, a, 0.0 * s, b @ s)
        return made

    def fold(self, model: Any) -> Any:
        """The plain model with what was learnt merged in."""
        return merged(model)


def gradients(model: Any, names: Sequence[str], batches: Sequence[Batch], samples: int) -> dict[str, Tensor]:
    """Sum over batches of the gradient of the mean loss with respect to the weights of linear layers, on the CPU.

    Stops after ``samples`` examples. Each gradient is taken away as it is made, so only one stands beside the model.
    """
    total: dict[str, Tensor] = {}
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    hooks = []
    for name in names:

        def take(weight: Tensor, name: str = name) -> None:
            gradient = weight.grad.detach().float().cpu()  # type: ignore[union-attr]
            total[name] = total[name] + gradient if name in total else gradient
            weight.grad = None

        weight = model.get_submodule(name).weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(take))
    seen = 0
    try:
        for batch in batches:
            weights = batch.weights[batch.weights != 0]
            with torch.enable_grad():
                (-(target_logprobs(model, batch) * weights).sum() / weights.abs().sum()).backward()
            seen += len(batch.examples)
            if seen >= samples:
                break
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, learns in before:
            parameter.requires_grad_(learns)
    return total


def factors(matrix: Tensor, rank: int, iterations: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[r, in]``, R ``[r, r]`` and B ``[out, r]`` of the best copy of rank r, float32; B and A orthonormal."""
    matrix, rank = matrix.float(), min(rank, *matrix.shape)
    if min(matrix.shape) <= 1024:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=iterations)
        vt = v.T
    return vt[:rank].contiguous(), torch.diag(s[:rank]), u[:, :rank].contiguous()


# ------------------------------------------------------------------------------------------ the peft method


@dataclass
class LoraSBConfig(Config):
    """peft configuration of a LoRA-SB adapter."""

    r: int = field(default=96, metadata={"help": "side of the trained square"})

    kind: ClassVar[str] = "LORA_SB"


class LoraSBLayer(Layer):
    """W0 x + B R A x. Made bare, B and A are random orthonormal and R is zero: ``LoraSB.attach`` puts the start in."""

    adapter_layer_names = ("lora_sb_R",)
    other_param_names = ("lora_sb_A", "lora_sb_B", "scaling")

    def make(self) -> None:
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"lora-sb adapts linear layers, not {type(base).__name__}")
        self.lora_sb_R = nn.ParameterDict()
        self.lora_sb_A, self.lora_sb_B = BufferDict({}, persistent=True), BufferDict({}, persistent=True)

    def start(self, name: str, config: Any) -> None:
        out, inside = self.base_layer.weight.shape
        rank = min(config.r, out, inside)
        self.lora_sb_A[name] = nn.init.orthogonal_(torch.empty(rank, inside))
        self.lora_sb_B[name] = nn.init.orthogonal_(torch.empty(out, rank))
        self.lora_sb_R[name] = nn.Parameter(torch.zeros(rank, rank))

    def put(self, name: str, a: Tensor, r: Tensor, b: Tensor) -> None:
        for there, value in ((self.lora_sb_A, a), (self.lora_sb_R, r), (self.lora_sb_B, b)):
            there[name].data.copy_(value)

    def change(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        r = self.lora_sb_R[name]
        inner = linear(linear(x.to(r.dtype), self.lora_sb_A[name]), r)
        return (self.scaling[name] * linear(inner, self.lora_sb_B[name])).to(y.dtype)

    def weights(self, name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.get_delta_weight(name).to(weight), bias

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        made: Tensor = (
            self.scaling[adapter] * self.lora_sb_B[adapter] @ self.lora_sb_R[adapter] @ self.lora_sb_A[adapter]
        )
        return made

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LoraSBModel(Tuner):
    """peft's model with LoRA-SB around its targets."""

    prefix = "lora_sb_"
    tuner_layer_cls = LoraSBLayer


register("lora_sb", LoraSBConfig, LoraSBModel)


CLAIM = {
    "says": "r * r values learn a new skill better in the subspace of the first full step than in that of the weights.",
    "parts": [{"name": "loss", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.05}],
    "settings": {"rank": 12, "start": "update", "lr": 3e-3},  # the rate that is best for full fine-tuning here
    "comparator": {"rank": 12, "start": "weights"},
    "placebo": {"start": "random"},
    "match": "documents and their order, steps, trained values",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 5,
    "unit": "training",
    "grid": {"lr": [1e-2, 3e-2, 1e-1, 3e-1]},
    "gates": {"the skill is new": [None, 0.05]},
    "amendments": [
        "1: both arms took the largest rate, 3e-2; now up to 3e-1, the start's size follows full fine-tuning's rate "
        "and not that of R, and the skill is spelt in tokens that the student knows"
    ],
}


def claim(trial: Any) -> dict[str, Any]:
    """Held-out loss after 150 steps on a spelling that the student has never seen, against LoRA-XS."""
    trial.method = replace(trial.method, warmup=max(1, trial.scaled(150) // 20))
    return learnt(trial)
