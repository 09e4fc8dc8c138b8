"""What a run will cost, from a probe of a few problems: tokens, time and disk."""

from __future__ import annotations

import inspect
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from thrifty.contracts import ThriftyError
from thrifty.engines.runner import Runner
from thrifty.lab import Lab
from thrifty.models.load import Loaded
from thrifty.solve.search.single_pass import SinglePass

PROBE = 32
POSITIONS = 2048
"""Positions per forward pass, as in training."""


def estimate(lab: Lab, method: Any) -> str:
    """Sample ``PROBE`` problems and time them; count what ``method.passes`` says the run will do.

    That is chains ``sampled`` and ``trained`` on; and, where a run keeps more than adapters, how many times the model's
    ``whole`` weights go to disk.
    """
    if not hasattr(method, "passes"):
        raise ThriftyError(f"{type(method).__name__} has no passes(n), so nothing can be said of its cost")
    loaded = lab.loaded()
    with tempfile.TemporaryDirectory() as scratch:
        lab.folder = Path(scratch)
        problems = lab.problems("train", PROBE)
        started = time.perf_counter()
        outcomes = Runner(lab.engine(), lab.task).solve(SinglePass(), problems, lab.seed)
        seconds = time.perf_counter() - started
    made = sum(o.usage.generated for o in outcomes) / len(outcomes)
    prompt = sum(o.usage.prompt + o.usage.cached for o in outcomes) / len(outcomes)
    rate = made * len(outcomes) / seconds

    per_position = _per_position(loaded, max(2, int(prompt + made)))

    passes = method.passes(lab.n)
    sampled, trained = passes["sampled"] * made, passes["trained"] * (prompt + made)
    # A backward pass costs twice a forward one.
    minutes = (sampled / rate + 3 * trained * per_position) / 60
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    disk = passes["sampled"] * (6 * made + 400) + (0.2 + passes.get("whole", 0)) * weights
    return "\n".join(
        (
            f"probe: {len(outcomes)} problems, {prompt:.0f} prompt and {made:.0f} generated tokens each, "
            f"{rate:,.0f} tokens/s",
            f"sample {passes['sampled']:,} chains: at most {sampled:,.0f} tokens (shortened ones cost less)",
            f"train on {passes['trained']:,} chains: at most {trained:,.0f} tokens",
            f"time about {minutes:.1f} min on this machine, disk about {disk / 1e6:.0f} MB",
        )
    )


def _per_position(loaded: Loaded, length: int) -> float:
    """Seconds of a forward pass per position, in a batch as training has it: no more memory than that takes."""
    ids = torch.zeros((max(1, POSITIONS // length), length), dtype=torch.long, device=loaded.device)
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters else {}
    with torch.inference_mode():
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            loaded.model(input_ids=ids, use_cache=False, **few)
            if ids.device.type == "cuda":
                torch.cuda.synchronize(ids.device)
    return (time.perf_counter() - started) / ids.numel()
