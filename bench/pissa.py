"""What PiSSA's start gains, and from what: the paper's ordering of singular slices, and its quantisation error.

    .venv/bin/python bench/pissa.py [--seeds 3] [--rank 4]

The unseen skill of the claims (150 steps on roll, levels 1 and 2, the student *mixed*), learnt by a LoRA that starts
from nothing, from the principal, middle or minor singular values with their vectors, or from other vectors at the
principal values: the minor ones, and random ones as the placebo's. Every start takes the rate of the claim's grid at
which a seed of its own loses least early. Prints the mean loss of the first 50 steps, gradient norms and the share of
held-out chains that are right. The paper (arXiv 2404.02948): principal before middle before minor, all slices.

Below: the nuclear norm of what quantising W_res to 4 bits loses, as a share of what quantising W loses (the paper:
below 1). Simulated: round to nearest on 15 even levels, a scale of the largest entry per 64 entries of a row.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thrifty import assets
from thrifty.contracts import Problem
from thrifty.controls import RandomDirections
from thrifty.models.load import load
from thrifty.tasks import embedded
from thrifty.tune.adapter._peft import NAME, linears
from thrifty.tune.adapter.pissa import CLAIM, PiSSA, start
from thrifty.tune.adapter.plain_lora import PlainLora
from thrifty.tune.batches import examples
from thrifty.tune.skill import chains, measured
from thrifty.tune.supervised import Train, train

STEPS, EARLY = 150, 50
TUNING = 10_000  # the seed at which rates are chosen


@dataclass(frozen=True)
class Slice:
    """PiSSA from other singular values: ``at`` 0 are the principal ones, 1 the minor ones."""

    rank: int
    at: float
    principal_values: bool = False

    def attach(self, model: Any, batches: Any = ()) -> Any:
        model = PiSSA(rank=self.rank).attach(model)
        for layer in [m for m in model.modules() if len(getattr(m, "lora_A", ()))]:
            down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            with torch.no_grad():
                base = layer.get_base_layer().weight
                base += up @ down
                u, s, vt = torch.linalg.svd(base, full_matrices=False)
                i = int(self.at * (len(s) - self.rank))
                root = (s[: self.rank] if self.principal_values else s[i : i + self.rank]).sqrt()
                down.copy_(root[:, None] * vt[i : i + self.rank])
                up.copy_(u[:, i : i + self.rank] * root)
                base -= up @ down
        return model


def starts(rank: int) -> dict[str, Callable[[int], Any]]:
    """Adapters by name, from a seed."""
    return {
        "nothing (LoRA)": lambda seed: PlainLora(rank=rank, alpha=float(rank), seed=seed),
        "principal (PiSSA)": lambda seed: PiSSA(rank=rank),
        "middle": lambda seed: Slice(rank, 0.5),
        "minor": lambda seed: Slice(rank, 1),
        "minor vectors, principal values": lambda seed: Slice(rank, 1, principal_values=True),
        "random vectors, principal values": lambda seed: RandomDirections(PiSSA(rank=rank), seed),
    }


def learnt(method: Any, lr: float, seed: int, test: list[Problem]) -> dict[str, float]:
    """How one training went."""
    loaded = load(str(assets.find(CLAIM["student"])))
    practice = embedded.task("roll").problems("train", 2000, seed, CLAIM["levels"])
    model = method.attach(loaded.model, ())
    with tempfile.TemporaryDirectory() as folder:
        settings = Train(steps=STEPS, batch_size=32, lr=lr, seed=seed)
        result = train(model, examples(chains(practice), loaded.chat), settings, Path(folder))
        log = [json.loads(line) for line in (Path(folder) / "train.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in log]
    right = measured(model, examples(chains(test), loaded.chat))[1]
    return {
        "early loss": statistics.mean(result.losses[:EARLY]),
        "first gradient": norms[0],
        "gradient by then": statistics.mean(norms[EARLY - 10 : EARLY]),
        "right": statistics.mean(right),
    }


def quantised(weight: Tensor, block: int = 64) -> Tensor:
    """``weight`` rounded to 15 even levels, each ``block`` entries of a row over their largest."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % block))
    blocks = padded.unflatten(1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return ((blocks / scale).round() * scale).flatten(1)[:, : weight.shape[1]]


def errors(rank: int) -> list[float]:
    """Per linear layer: the nuclear norm of W_res's quantisation error over that of W's."""
    found = []
    for layer in linears(load(str(assets.find(CLAIM["student"]))).model, "all-linear").values():
        rest = copy.deepcopy(layer)
        start(rest, rank)
        lost = [torch.linalg.matrix_norm(w - quantised(w), "nuc") for w in (rest.weight.data, layer.weight.data)]
        found.append(float(lost[0] / lost[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=CLAIM["settings"]["rank"])
    parser.add_argument("--n", type=int, default=400, help="held-out chains per seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, levels = embedded.task("roll"), CLAIM["levels"]
    dev, test = task.problems("dev", 16, 0, levels), task.problems("test", arguments.n, 1, levels)
    columns = ("early loss", "first gradient", "gradient by then", "right")
    print(f"{'start':<34}{'lr':>8}" + "".join(f"{c:>18}" for c in columns) + "   early losses")
    for name, make in starts(arguments.rank).items():
        lr = min(CLAIM["grid"]["lr"], key=lambda lr: learnt(make(TUNING), lr, TUNING, dev)["early loss"])
        runs = [learnt(make(seed), lr, seed, test) for seed in range(arguments.seeds)]
        means = [statistics.mean(run[c] for run in runs) for c in columns]
        each = " ".join(f"{run['early loss']:.3f}" for run in runs)
        print(f"{name:<34}{lr:>8}" + "".join(f"{m:>18.3f}" for m in means) + f"   {each}", flush=True)
    print("\nrank   quantisation error over W's, mean of layers and largest")
    for rank in (4, 8, 16, 32):
        found = errors(rank)
        print(f"{rank:>4}   {statistics.mean(found):.3f}   {max(found):.3f}")


if __name__ == "__main__":
    main()
