"""Step time and memory of every adapter against peft's LoRA of the same rank, in one run, steps taken in turn.

    .venv/bin/python bench/adapters.py [--width 256 --layers 4 --rank 8 --tokens 2048 --rounds 10]

Prints per adapter: trained weights, the median step (forward, backward, AdamW) and its ratio to LoRA's, and the peak of
memory over a step (weights and AdamW's state included) with its ratio: on CUDA by the allocator's own counter, on CPU
by what torch's profiler saw allocated and freed. The goal is 1.15 for both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is silent
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from thrifty.tune.adapter.eva import EVA
from thrifty.tune.adapter.lora_sb import LoraSB
from thrifty.tune.adapter.pissa import PiSSA
from thrifty.tune.adapter.plain_lora import PlainLora
from thrifty.tune.adapter.ssf import SSF
from thrifty.tune.batches import Batch, Example, collate


def model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        num_key_value_heads=max(1, args.width // 128),
        head_dim=64,
    )
    return Qwen3ForCausalLM(config).to(args.device).train()


def batch(args: argparse.Namespace) -> Batch:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(max(1, args.tokens // args.length)):
        ids = torch.randint(args.vocabulary, (args.length,), generator=draw).numpy()
        rows.append([Example(ids[:8], ids[8:])])
    return collate(rows).to(torch.device(args.device))


class Run:
    """One adapted model, its optimiser, and a step of both."""

    def __init__(self, method: Any, args: argparse.Namespace) -> None:
        self.batch, self.device = batch(args), args.device
        self.clock = time.process_time if (args.device, args.threads) == ("cpu", 1) else time.perf_counter
        self.model = method.attach(model(args), [self.batch]).train()
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4)

    def loss(self) -> torch.Tensor:
        kept = self.batch.weights != 0
        logits = self.model(**self.batch.inputs, logits_to_keep=kept).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), self.batch.labels[kept])

    def step(self) -> float:
        """Seconds of one step."""
        self.settle()
        started = self.clock()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.settle()
        return self.clock() - started

    def settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> float:
        """Peak MB over a step."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() / 1e6
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        standing = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        with torch.profiler.profile(profile_memory=True) as profile:
            self.step()
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text("utf-8"))["traceEvents"]
        changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
        live = itertools.accumulate(e["args"]["Bytes"] for e in changes)
        return (sum(standing.values()) + max(live)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 4), ("vocabulary", 512), ("rank", 8), ("tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--rounds", type=int, default=10, help="steps per adapter that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    methods: dict[str, Any] = {
        "plain-lora": PlainLora(rank=args.rank),
        "pissa": PiSSA(rank=args.rank),
        "eva": EVA(rank=args.rank, rho=1.0, tau=0.5),
        "lora-sb": LoraSB(rank=args.rank),
        "ssf": SSF(),
    }
    memory = {}
    for key, method in methods.items():  # one at a time, so that a peak is one model's
        run = Run(method, args)
        run.step()
        memory[key] = run.memory()
        del run
    runs = {key: Run(method, args) for key, method in methods.items()}
    for run in runs.values():
        run.step()
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(args.rounds):
        for key, run in runs.items():
            times[key].append(run.step())
    base = statistics.median(times["plain-lora"])
    print(f"{args.device}, width {args.width}, {args.layers} layers, rank {args.rank}, {args.tokens} tokens per step")
    print(f"{'adapter':12}{'trained':>10}{'ms':>9}{'x LoRA':>8}{'MB':>9}{'x LoRA':>8}")
    for key, run in runs.items():
        step, trained = statistics.median(times[key]), sum(p.numel() for p in run.learning)
        print(
            f"{key:12}{trained:10,}{1e3 * step:9.1f}{step / base:8.2f}"
            f"{memory[key]:9.1f}{memory[key] / memory['plain-lora']:8.2f}"
        )


if __name__ == "__main__":
    main()
