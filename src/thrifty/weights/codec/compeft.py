"""Saves memory and transfer: a task vector as signs of its largest entries and one scale, 8 to 50 times smaller.

    tau = tuned - initial;   tau_c = alpha * std(tau) * sign(tau) where |tau| is among the ``density`` largest, else 0

std and the choice are taken over the whole task vector, all tensors together. Positions are stored as gaps between
non-zeros in Golomb code (unary quotient, b bits of remainder), with one sign bit each and one 16-bit scale:

    b = 1 + floor(log2(log(phi - 1) / log(1 - density))),   phi = (1 + sqrt 5) / 2
    entropy of it all in bits: n * (-(1 - k) log2(1 - k) - k log2 k + k) + 16   for n entries and k = density

``decode(encode(state))`` is ``quantised(state)``, to the last bit.

Paper: Yadav, Choshen et al. 2023, ComPEFT: Compression for Communicating Parameter Efficient Updates via
Sparsification and Quantization, arXiv 2311.13171; b after Sattler et al. 2019, arXiv 1903.02891, equation 13.
Differs: the scale is a bfloat16, so that updates of any size can be stored. The three parts of the code (quotients,
remainders, signs) stand one after the other rather than interleaved, which takes the same bits and is decoded at once.

>>> import torch
>>> tau = {"w": torch.tensor([[3., -1.], [0., -5.]])}                  # mean -.75, std sqrt(131) / 4 = 2.861
>>> codec = ComPEFT(density=0.5)
>>> codec.quantised(tau)                                               # in bfloat16
{'w': tensor([[ 2.8594,  0.0000],
        [ 0.0000, -2.8594]])}
>>> golomb(np.array([0, 3]), np.array([True, False]), bits=1)          # gaps 0, 2: 0, 10 | 0, 0 | 1, 0
b'D'
>>> torch.equal(codec.decode(codec.encode(tau))["w"], codec.quantised(tau)["w"])
True
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from thrifty.contracts import Card, ThriftyError
from thrifty.models.load import load
from thrifty.tune import skill
from thrifty.tune.adapter import load_adapter, lora, save_adapter
from thrifty.tune.batches import examples
from thrifty.tune.supervised import Train, train

CARD = Card(
    key="compeft",
    title="ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
    arxiv="2311.13171",
    year=2023,
    saves=("memory", "parameters", "latency"),
)

MAGIC = b"CPFT\x01"
PHI = (1 + math.sqrt(5)) / 2


@dataclass(frozen=True)
class Size:
    """What an update takes, in bytes."""

    dense: int
    """Two bytes for each entry."""
    coded: int
    """The whole file, names and shapes included."""
    code: int
    """Quotients, remainders, signs and scale."""
    entropy: float
    """The least that any code of as many non-zeros at random places could take, with signs and scale."""


@dataclass(frozen=True)
class ComPEFT:
    density: float = field(default=0.2, metadata={"help": "share of entries that are kept; the paper tries .05 to .5"})
    alpha: float = field(default=1.0, metadata={"help": "their size, in standard deviations of the whole update"})

    def encode(self, state: Mapping[str, Tensor]) -> bytes:
        """A task vector (tuned minus initial weights, by name) as bytes. Raises ThriftyError on values not finite."""
        at, positive, scale, _ = self._ternary(state)
        bits = remainder_bits(self.density)
        header = {
            "tensors": [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()],
            "kept": len(at),
            "bits": bits,
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        return MAGIC + struct.pack("<I", len(text)) + text + _bfloat16(scale) + golomb(at, positive, bits)

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """The quantised task vector that ``encode`` was given, with its names, shapes and types."""
        header, at = _header(data)
        scale = float(torch.frombuffer(bytearray(data[at : at + 2]), dtype=torch.bfloat16)[0])
        n = sum(math.prod(shape) for _, shape, _ in header["tensors"])
        index, positive = ungolomb(data[at + 2 :], header["kept"], header["bits"])
        if len(index) and index[-1] >= n:
            raise ThriftyError("this update is damaged: it has more entries than its tensors; copy it anew")
        flat = torch.zeros(n)
        flat[torch.from_numpy(index)] = torch.from_numpy(np.where(positive, scale, -scale).astype(np.float32))
        return _tensors(flat, header["tensors"])

    def quantised(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is left of a task vector: zeros and plus or minus one scale."""
        index, positive, scale, n = self._ternary(state)
        flat = torch.zeros(n)
        flat[torch.from_numpy(index)] = torch.from_numpy(np.where(positive, scale, -scale).astype(np.float32))
        return _tensors(flat, [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()])

    def size(self, state: Mapping[str, Tensor]) -> Size:
        """What ``state`` takes dense and encoded."""
        coded = self.encode(state)
        n = sum(t.numel() for t in state.values())
        share = _header(coded)[0]["kept"] / max(1, n)
        entropy = -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0) + share
        return Size(2 * n, len(coded), len(coded) - _header(coded)[1], (n * entropy + 16) / 8)

    def _ternary(self, state: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Positions ``[kept]`` ascending and whether each is positive, the scale, and the number of entries."""
        if not 0 < self.density < 1 or not self.alpha > 0:
            raise ThriftyError(
                f"compeft has density {self.density} and alpha {self.alpha}: give 0 < density < 1, alpha > 0"
            )
        if not sum(t.numel() for t in state.values()):
            raise ThriftyError("there is nothing to encode: give a task vector (tuned minus initial weights) by name")
        flat = torch.cat([t.detach().float().cpu().flatten() for t in state.values()]).numpy()
        if not np.isfinite(flat).all():
            name = next(name for name, t in state.items() if not t.isfinite().all())
            raise ThriftyError(f"{name} has values that are not finite: encode an update of a training that went well")
        size = np.abs(flat)
        kept = max(1, round(self.density * len(flat)))
        least = np.partition(size, len(flat) - kept)[len(flat) - kept]
        index = np.flatnonzero(size > least)
        ties = np.flatnonzero(size == least)[: kept - len(index)] if least > 0 else np.empty(0, np.int64)
        index = np.sort(np.concatenate([index, ties]))
        scale = float(torch.tensor(self.alpha * flat.astype(np.float64).std()).to(torch.bfloat16))
        return index, flat[index] > 0, scale, len(flat)


def task_vector(tuned: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """tuned - initial, tensor by tensor; ThriftyError where names or shapes differ."""
    odd = sorted(set(tuned) ^ set(initial)) or [n for n in tuned if tuned[n].shape != initial[n].shape]
    if odd:
        raise ThriftyError(
            f"tuned and initial weights do not match in {odd[0]}: give two states of one model or adapter"
        )
    return {name: value - initial[name].to(value) for name, value in tuned.items()}


def remainder_bits(density: float) -> int:
    """Bits of the remainder, the best power of two for gaps of non-zeros at this density."""
    return max(0, 1 + math.floor(math.log2(math.log(PHI - 1) / math.log(1 - density))))


def golomb(index: np.ndarray, positive: np.ndarray, bits: int) -> bytes:
    """Ascending positions ``[N]`` and their signs: quotients in unary (q ones and a zero), remainders, sign bits."""
    gaps = np.diff(index, prepend=-1) - 1
    quotient = gaps >> bits
    ends = np.cumsum(quotient + 1)
    unary = np.ones(int(ends[-1]) if len(ends) else 0, bool)
    unary[ends - 1] = False
    remainder = (gaps[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(np.concatenate([unary, remainder.astype(bool).ravel(), positive.astype(bool)])).tobytes()


def ungolomb(data: bytes, count: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions ``[count]`` and signs that ``golomb`` wrote. Raises ThriftyError where the data end too early."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8)).astype(bool)
    ends = np.flatnonzero(~stream)[:count]
    start = int(ends[-1]) + 1 if count and len(ends) == count else 0
    if len(ends) < count or len(stream) < start + count * (bits + 1):
        raise ThriftyError("this update is cut short: copy it anew")
    quotient = np.diff(ends, prepend=-1) - 1
    remainder = stream[start : start + count * bits].reshape(count, bits) @ (1 << np.arange(bits - 1, -1, -1))
    gaps = (quotient << bits) + remainder.astype(np.int64)
    signs = stream[start + count * bits : start + count * (bits + 1)]
    return np.cumsum(gaps + 1) - 1, signs


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the scale begins."""
    if data[: len(MAGIC)] != MAGIC:
        raise ThriftyError("these bytes are no update coded by compeft: give what ComPEFT.encode made")
    start = len(MAGIC) + 4
    end = start + struct.unpack("<I", data[len(MAGIC) : start])[0]
    try:
        header = json.loads(data[start:end])
    except ValueError as error:
        raise ThriftyError(f"this update is damaged ({error}): copy it anew") from error
    return header, end


def _tensors(flat: Tensor, shapes: list[Any]) -> dict[str, Tensor]:
    parts = flat.split([math.prod(shape) for _, shape, _ in shapes])
    return {name: part.view(shape).to(getattr(torch, dtype)) for (name, shape, dtype), part in zip(shapes, parts)}


def _bfloat16(value: float) -> bytes:
    return torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


RATE = 1e-2
"""Of the LoRA that the claim compresses."""
CLAIM = {
    "says": "A LoRA's update as signs of a few of its entries and one scale is as accurate as the update itself.",
    "parts": [{"name": "accuracy", "test": "non-inferior", "margin": 0.03}],
    "comparator": None,
    "match": "the same trained LoRA of rank 8",
    "student": "mixed",
    "tasks": ["roll"],
    "levels": [1, 2],
    "n": 400,
    "seeds": 8,
    "unit": "training",
    "grid": {"density": [0.1, 0.2, 0.3, 0.5], "alpha": [1.0, 2.0, 3.0]},
    "gates": {"the update matters": [0.3, None], "the skill is new": [None, 0.05]},
    "amendments": [
        "1: the skill was spelt in tokens that the student does not know, near-ties that any coding turns over; now in "
        "tokens that it knows, and the LoRA's rate is 1e-2, at which it learns 80 % of development problems"
    ],
}


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy on a new spelling with a LoRA trained for 400 steps, dense (the comparator) or coded and decoded."""
    settings = Train(steps=trial.scaled(400), batch_size=32, lr=RATE, seed=trial.seed)
    practice = trial.problems("train", trial.scaled(2000))

    def make(folder: Path) -> None:
        loaded = load(trial.asset())
        model = lora(loaded.model, rank=8, seed=trial.seed)
        save_adapter(model, folder / "initial")
        train(model, examples(skill.chains(practice), loaded.chat), settings, folder)

    folder = trial.once("lora", make, dataclasses.asdict(settings), practice)
    trial.trained(folder)
    initial, tuned = (load_file(folder / name / "adapter_model.safetensors") for name in ("initial", "adapter"))
    codec = trial.method
    if codec is not None:
        chosen = getattr(codec, "inner", codec)  # a control stands around one
        chosen = replace(chosen, **trial.pick)
        codec = chosen if isinstance(codec, ComPEFT) else replace(codec, inner=chosen)
        update = task_vector(tuned, initial)
        trial.note("times smaller", chosen.size(update).dense / chosen.size(update).coded)
        back = codec.decode(codec.encode(update))
        tuned = {name: value + back[name] for name, value in initial.items()}
    loaded = load(trial.asset())
    fresh = examples(skill.chains(trial.problems()), loaded.chat)
    naive = float(np.mean(skill.measured(loaded.model, fresh)[1]))
    model = load_adapter(loaded.model, folder / "adapter", name="valve")
    set_peft_model_state_dict(model, tuned, adapter_name="valve")
    exact = skill.measured(model, fresh)[1]
    trial.figure("accuracy", float(np.mean(exact)))
    trial.gate("the skill is new", naive)
    if trial.arm == "comparator":
        trial.gate("the update matters", float(np.mean(exact)) - naive)
    return {"accuracy": exact}
