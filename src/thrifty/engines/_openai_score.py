"""Scoring texts over an endpoint: what a server says of its prompt's own tokens.

Completions tell it with ``echo`` and ``logprobs`` (OpenAI's first API, vLLM, SGLang, llama-cpp-python), or with
``prompt_logprobs`` (vLLM). Prompts go out as token ids, so that context and continuation come apart where our tokenizer
says, as on the local engine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.contracts import RowFailed, Scores, Usage
from thrifty.engines._openai_http import Endpoint
from thrifty.engines._openai_stream import Reply

WAYS: tuple[dict[str, Any], ...] = (
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"echo": True, "logprobs": 1, "max_tokens": 1},
    {"prompt_logprobs": 0, "max_tokens": 1},
)
"""Fields that ask for it, the cheapest first: some servers must generate a token."""


@dataclass
class ScoreRow:
    """One ``Score`` under way: token ids of the context and of each continuation."""

    ticket: int
    context: list[int]
    texts: list[list[int]]
    cut: bool = False
    """Nobody waits for it any more."""
    entered: bool = False


def told(reply: Reply, length: int, fields: Mapping[str, Any]) -> list[float] | None:
    """Log-probabilities of the ``length`` prompt tokens (the first is NaN); None where the reply is another thing."""
    found = reply.prompt or [chance for _, _, chance in reply.logprobs]
    if len(found) not in (length, length + fields["max_tokens"]) or reply.count("prompt_tokens") not in (None, length):
        return None  # it added a token of its own, or does not speak of the prompt
    return found[:length] if all(math.isfinite(chance) for chance in found[1:length]) else None


async def score(
    endpoint: Endpoint, slots: asyncio.Semaphore, base: Mapping[str, Any], fields: Mapping[str, Any], row: ScoreRow
) -> Scores:
    """Ask for every continuation at once, in as many streams as there are slots. Raises RowFailed."""
    began = time.monotonic()
    asked = [asyncio.ensure_future(_one(endpoint, slots, base, fields, row.context, text)) for text in row.texts]
    try:
        answers = await asyncio.gather(*asked)
    finally:
        for one in asked:
            one.cancel()
    usage = sum((usage for _, usage in answers), Usage(seconds=time.monotonic() - began))
    return Scores([value for value, _ in answers], usage)


async def _one(
    endpoint: Endpoint,
    slots: asyncio.Semaphore,
    base: Mapping[str, Any],
    fields: Mapping[str, Any],
    context: Sequence[int],
    text: Sequence[int],
) -> tuple[float, Usage]:
    if not text:  # nothing is sure to follow
        return 0.0, Usage()
    prompt = [*context, *text]
    async with slots:
        try:
            reply = await endpoint.ask("/completions", {**base, **fields, "prompt": prompt, "stream": False}, Reply)
        except TimeoutError:
            waited = endpoint.patience.deadline
            raise RowFailed(f"{endpoint.base_url} scored nothing within {waited:g} s", "silence") from None
    chances = told(reply, len(prompt), fields)
    if chances is None:
        raise RowFailed(f"{endpoint.base_url} sent no log-probabilities of the prompt, though it did when probed")
    read, made = reply.count("prompt_tokens"), reply.count("completion_tokens") or 0
    cached = min(read or 0, reply.count("cached_tokens", "prompt_tokens_details") or 0)
    usage = Usage(
        prompt=(len(prompt) if read is None else read) - cached,
        cached=cached,
        answer=made,
        discarded=made,
        calls=1,
        partial=int(read is None),
    )
    return sum(chances[len(context) :]), usage
