"""Training speed of the layouts: documents' tokens per second, forward and backward, on a 0.85 M Qwen3-shaped student.

    python bench/train.py                 # all weights
    python bench/train.py --lora          # rank-8 LoRA on all linear layers, every document at a strength of its own

Layouts take turns (A B C, A B C, ...), so that a busy machine slows all of them; with one thread the clock is the
process's CPU time. ``padded`` is what a plain loop does: documents in random order, padded to the longest of the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from thrifty.models.strength import Dial
from thrifty.tune.adapter import lora
from thrifty.tune.batches import Batch, Example, bucketed, collate, packed
from thrifty.tune.objective.nll import NLL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=64, help="documents per step")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every layout; the first is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--attention", default="sdpa")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=given.attention)
    rng = np.random.default_rng(0)
    documents = [
        Example(
            rng.integers(0, 512, rng.integers(10, 40)),
            rng.integers(0, 512, rng.integers(10, 160)),
            strength=float(rng.random()) if given.lora else 1.0,
        )
        for _ in range(given.documents)
    ]
    if given.lora:
        model = lora(model, rank=8)
    one_by_one = [[document] for document in documents]
    layouts = {
        "padded 4096": [one_by_one[i : i + 22] for i in range(0, len(documents), 22)],
        **{f"bucketed {tokens}": bucketed(documents, tokens) for tokens in (1024, 2048, 4096)},
        **{
            f"packed {tokens}, rows {row}": packed(documents, tokens, row)
            for tokens, row in ((1024, 128), (2048, 128), (4096, 128), (2048, 256), (4096, 1024))
        },
    }
    clock = time.process_time if given.threads == 1 else time.perf_counter
    total = float(sum(document.loss_weights().sum() for document in documents))
    speeds: dict[str, list[float]] = {name: [] for name in layouts}
    dial = Dial(model)
    for _ in range(given.rounds):
        for name, layout in layouts.items():
            started = clock()
            for rows in layout:
                step(model, dial, dataclasses.replace(collate(rows), total=total))
            speeds[name].append(sum(map(len, documents)) / (clock() - started))
            model.zero_grad(set_to_none=True)
    first = np.median(speeds["padded 4096"][1:])
    print(f"{'layout':<24}{'forwards':>9}{'padding':>9}{'tokens/s':>10}{'x padded':>10}   lowest to highest")
    for name, layout in layouts.items():
        positions = sum(collate(rows).input_ids.numel() for rows in layout)
        padding = 1 - sum(map(len, documents)) / positions
        some = speeds[name][1:]
        print(
            f"{name:<24}{len(layout):>9}{padding:>9.0%}{np.median(some):>10.0f}{np.median(some) / first:>10.2f}   "
            f"{min(some):.0f} to {max(some):.0f}"
        )


def step(model: torch.nn.Module, dial: Dial, batch: Batch) -> None:
    with dial({"valve": batch.strengths} if batch.strengths is not None else {}):
        loss, _ = NLL().loss(model, batch, 0)
        loss.backward()


if __name__ == "__main__":
    main()
