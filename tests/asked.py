"""What an engine answers, without a runner: asked at once, polled to the end."""

from __future__ import annotations

from typing import Any

import torch

from thrifty.engines.local import LocalEngine
from thrifty.models.load import Loaded


def run(engine: LocalEngine, requests: list[Any], keys: list[Any] | None = None) -> list[Any]:
    """Submit all, poll to the end; the answers in order."""
    for ticket, request in enumerate(requests):
        engine.submit(ticket, request, tuple(keys[ticket]) if keys else (ticket,))
    answers: dict[int, Any] = {}
    while engine.busy:
        answers.update(engine.poll())
    assert sorted(answers) == list(range(len(requests)))
    return [answers[i] for i in range(len(requests))]


def plain(loaded: Loaded, prompt: str, tokens: int) -> list[int]:
    """What ``model.generate`` makes of one prompt, greedily."""
    ids = torch.tensor([loaded.chat.prompt_ids(prompt)])
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        eos_token_id=sorted(loaded.eos), pad_token_id=0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()
