"""Temperature scaling of the stopping decision: one number makes chains shorter or longer, without any training.

Small models distilled from long chains do not know when to stop. Of all tokens only the closing tag's competition with
the rest is rescaled, at every step of the chain:

    log p'(stop) = log p(stop) / tau + bias,        log p'(v) = log p(v) otherwise, then normalised

tau > 1 makes stopping likelier where the model considers it at all, and hardly anywhere else; below 1 it makes it
rarer. After the tag the answer is decoded as usual. It is a strategy, and the control that the strategy uses.

>>> import torch
>>> logits = torch.tensor([[0.9, 0.1]]).log()  # the tag is token 1: log 0.1 / 2 = log 0.316
>>> (TldrTs(tau=2.0).scaled(logits, torch.tensor([1]))).exp().round(decimals=3)
tensor([[0.9000, 0.3160]])

Paper: Zhang et al., Making Small Language Models Efficient Reasoners: Intervention, Supervision, Reinforcement
(2505.07961).
Differs: the paper's exact form could not be checked. A logit is known up to a constant only, so the temperature divides
the log-probability. TLDR, its reinforcement, is the reward ``level-length``. The tag must be one token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from thrifty.contracts import Card, Problem, Sample, Tail, Talk, ThriftyError

if TYPE_CHECKING:
    from torch import Tensor

CARD = Card(
    key="tldr-ts",
    title="Making Small Language Models Efficient Reasoners: Intervention, Supervision, Reinforcement",
    arxiv="2505.07961",
    year=2025,
    saves=("tokens", "latency"),
    needs=("controls",),
)
CLAIM = {
    "says": "At equal thinking tokens, scaling the stopping decision is more accurate than cutting chains at a budget.",
    "parts": [{"name": "accuracy", "test": "superior", "smallest": 0.02}],
    "comparator": None,
    "settings": {"tau": 2.0},
    "student": "long",
    "tasks": ["roll"],
    "n": 500,
    "seeds": 3,
    "unit": "student",
    "match": "mean thinking tokens: truncation's budget is chosen so that full chains cut there have as many",
    "gates": {"tokens saved": [0.03, 0.95], "accuracy of the student": [0.4, None]},
    "placebo": "stops",
}


@dataclass(frozen=True)
class TldrTs:
    tau: float = field(default=2.0, metadata={"help": "temperature of the closing tag; 1 changes nothing"})
    bias: float = field(default=0.0, metadata={"help": "added to its log-probability"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        if self.tau <= 0:
            raise ThriftyError(f"tau is {self.tau}: give a temperature above 0 (1 changes nothing, 2 stops earlier)")
        [trace] = yield Sample(problem.prompt, temperature=self.temperature, top_p=self.top_p, controls=(self,))
        return trace

    def start(self, tokenizer: Any) -> tuple[int, int, bool]:
        """The tag's token id, how many tokens of the row were looked at, and whether the tag was among them."""
        return _close_id(tokenizer), 0, False

    def step(
        self, tails: Sequence[Tail], logits: Tensor, states: Sequence[tuple[int, int, bool]]
    ) -> tuple[Tensor, list[tuple[int, ...]], list[bool], list[tuple[int, int, bool]]]:
        import torch

        after = [
            (close, len(tail.ids), closed or close in tail.ids[read:])
            for tail, (close, read, closed) in zip(tails, states)
        ]
        rows = [row for row, (_, _, closed) in enumerate(after) if not closed]
        if rows:
            logits = logits.clone()
            close = torch.tensor([after[row][0] for row in rows], device=logits.device)
            logits[rows] = self.scaled(logits[rows], close)
        return logits, [()] * len(tails), [False] * len(tails), after

    def scaled(self, logits: Tensor, close: Tensor) -> Tensor:
        """Logits ``[B, V]`` with those of ``close`` ``[B]`` rescaled."""
        stop = logits.float().log_softmax(-1).gather(1, close[:, None])
        return logits.scatter_add(1, close[:, None], (stop * (1 / self.tau - 1) + self.bias).to(logits.dtype))


@lru_cache(maxsize=8)
def _close_id(tokenizer: Any) -> int:
    from thrifty.models.chat import ChatFormat

    chat = ChatFormat.detect(tokenizer)
    if chat.close_id is None:
        raise ThriftyError(f"tldr-ts scales one token, but {chat.close} is several tokens of this tokenizer")
    return chat.close_id


def claim(trial: Any) -> dict[str, Any]:
    """Scaled stopping, and truncation at as many thinking tokens."""
    from thrifty import registry

    problems = trial.problems()
    full = trial.solve(registry.load("single-pass")(), problems)
    lengths = [o.usage.thought for o in full]
    if trial.arm == "method":
        outcomes = trial.solve(trial.method, problems)
    else:
        wanted = trial.other["thought"]
        budget = next((b for b in range(1, max(lengths)) if sum(min(n, b) for n in lengths) >= wanted * len(lengths)),
                      max(lengths))  # fmt: skip
        outcomes = trial.solve(registry.load("truncation")(budget), problems)
    thought = sum(o.usage.thought for o in outcomes) / len(outcomes)
    trial.gate("tokens saved", 1 - thought / max(1.0, sum(lengths) / len(lengths)))
    trial.gate("accuracy of the student", sum(o.grade.right for o in full) / len(full))
    trial.note("thinking tokens", thought)
    if trial.arm == "method":
        trial.elsewhere(trial.method)
    return {"accuracy": [float(o.grade.right) for o in outcomes], "thought": thought}
