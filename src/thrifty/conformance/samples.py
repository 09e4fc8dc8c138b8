"""What the checks are run on: embedded problems, their chains and traces, an engine whose answers are scripted."""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from thrifty import tasks
from thrifty.contracts import (
    Budget,
    Chain,
    Context,
    Finish,
    Group,
    Hidden,
    Outcome,
    Problem,
    Prompt,
    Sample,
    Score,
    Scores,
    Span,
    Strategy,
    Task,
    Trace,
    Usage,
)
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import CLOSE, ScriptedEngine
from thrifty.tasks import tracing

WIDTH = 8
"""Of scripted hidden states."""
SCRIPTED = frozenset({"prefix", "cancel", "score", "seed", "logprobs", "entropies", "hidden"})
"""What the scripted engine of the checks can do; the rest needs a model."""
Mode = Literal["ordinary", "unclosed", "unparsable"]


# ------------------------------------------------------------------------------------- problems, chains, traces


@functools.cache
def task() -> Task:
    return tasks.load("roll")


def problems(n: int = 8) -> list[Problem]:
    return list(_problems(n))


@functools.cache
def _problems(n: int) -> tuple[Problem, ...]:
    return tuple(task().problems("dev", n))


def wrong(problem: Problem) -> str:
    """A well-formed answer that is not the problem's."""
    return str((int(problem.answer or 0) + 1) % 10)


def thought(problem: Problem, style: str = "long", seed: int = 0) -> str:
    """A right chain for the problem by the task's tracer; a sentence for a problem that is none of the task's."""
    steps: Any = task()
    if "content" not in problem.meta:
        return f"so {problem.answer} ."
    return tracing.text_of(steps.trace(problem, tracing.style(style), random.Random(f"{problem.id}|{seed}")))


def chains(n: int = 8) -> list[Chain]:
    """Right chains of different length; some problems have two."""
    made = []
    for i, problem in enumerate(problems(n)):
        for k, style in enumerate(("long", "plain")[: 1 + i % 2]):
            made.append(Chain(problem, thought(problem, style, i), str(problem.answer), source=f"source-{k}"))
    return made


def prose() -> list[Chain]:
    """Chains that no tracer wrote: English sentences, lines, formulas, another script."""
    texts = (
        "Let me see. 12 + 30 = 42. Wait, let me check: 30 + 12 = 42, yes. So the answer is 42.",
        "First, x = 2.\n\nThen y = 3 * x = 6.\nAlternatively, try x = 3.\nThat fails. So y = 6.",
        "1. We need $\\frac{1}{2}$ of 84.\n2. That is 42.",
        "先算 6 × 7 = 42。所以答案是 42。",
    )
    return [Chain(Problem(f"prose-{i}", "What is it?", "42"), text, "42") for i, text in enumerate(texts)]


def odd() -> list[Chain]:
    """Chains at the edge: empty, blank, one step, one word."""
    problem = problems(1)[0]
    texts = ("", "   \n ", "2 b -2 = 0 .", "0")
    return [Chain(replace(problem, id=f"odd-{i}"), text, str(problem.answer)) for i, text in enumerate(texts)]


def trace(
    problem: Problem,
    text: str,
    response: str,
    closed: bool = True,
    finish: Finish = "stop",
    path: tuple[int, ...] = (0,),
    want: Sequence[str] = (),
) -> Trace:
    """A trace whose tokens are words, as the scripted engine's are; with ``want``ed values of every token."""
    words = [*text.split(), *([CLOSE] if closed else ()), *(response.split() if closed else ())]
    ids = np.array([number(word) % 250 for word in words], np.int32)
    cut = words.index(CLOSE) + 1 if closed else len(words)
    rng = np.random.default_rng(number(f"{problem.id}|{path}|{text}"))
    complete = closed and finish == "stop"
    return Trace(
        ids=ids,
        thought=text,
        response=response if closed else "",
        closed=closed,
        finish=finish,
        answer=task().parse(response) if complete else None,
        spans=tuple(s for s in (Span(0, cut, "thought"), Span(cut, len(ids), "answer")) if s.end > s.start),
        logprobs=-rng.exponential(0.3, len(ids)).astype(np.float32) if "logprobs" in want else None,
        entropies=rng.exponential(0.5, len(ids)).astype(np.float32) if "entropies" in want else None,
        usage=Usage(prompt=len(problem.prompt.split()), thought=cut, answer=len(ids) - cut, calls=1),
        problem=problem.id,
        path=path,
        prompt_ids=np.array([number(word) % 250 for word in problem.prompt.split()], np.int32),
    )


def traces(problem: Problem, n: int = 6, want: Sequence[str] = (), only: str = "") -> list[Trace]:
    """Right, wrong, unparsable, cut and unclosed traces of a problem, in this order again and again."""
    made = []
    for i in range(n):
        kind = only or ("right", "wrong", "right", "unparsable", "right", "cut", "unclosed")[i % 7]
        text, path = thought(problem, ("long", "plain", "short")[i % 3], i), (0, i)
        answer = {"wrong": wrong(problem), "unparsable": "none"}.get(kind, str(problem.answer))
        finish: Finish = "length" if kind in ("cut", "unclosed") else "stop"
        made.append(trace(problem, text, answer, kind != "unclosed", finish, path, want))
    return made


def group(problem: Problem, given: Sequence[Trace]) -> Group:
    """The traces of a problem with their grades."""
    grader = Runner(Playbook(), task())
    return Group(problem, list(given), [grader.grade(problem, t) for t in given])


def context(seed: int = 0) -> Context:
    """A context with all that a verb may use; its strategies run on the scripted engine."""

    def solve(strategy: Strategy, asked: Sequence[Problem]) -> list[Outcome]:
        return Runner(Playbook(asked=asked), task()).solve(strategy, asked)

    return Context(task=task(), solve=solve, rng=random.Random(seed), tokenizer=Words())


class Words:
    """A tokenizer of words, for verbs that count or cut tokens."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [number(word) % 250 for word in text.split()]

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}


# --------------------------------------------------------------------------------------------------- engines


class Playbook(ScriptedEngine):
    """Answers by a script that depends on the problem and the request's key: right, wrong, unparsable, never closing.

    Log-probabilities, entropies and hidden states are numbers drawn from the text they belong to. ``by_text``: answers
    depend on prompt and prefix in place of the key. It knows the task's first ``n`` problems, or those in ``asked``.
    """

    def __init__(
        self,
        mode: Mode = "ordinary",
        capabilities: frozenset[str] = SCRIPTED,
        batch_size: int = 64,
        n: int = 8,
        by_text: bool = False,
        asked: Sequence[Problem] | None = None,
    ) -> None:
        known = {problem.id: problem for problem in (problems(n) if asked is None else asked)}
        super().__init__(lambda prompt, key: script(known[str(key[1])], key, mode), _score, batch_size)
        self.capabilities, self.by_text = capabilities, by_text

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        return "<think>", CLOSE

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        if isinstance(request, Hidden):
            values = [_vector(f"{request.prompt}|{request.layer}|{list(request.prefix)}|{t}") for t in request.texts]
            self.replies.append((ticket, Scores(values, Usage(prompt=len(str(request.prompt).split()), calls=1))))
            return
        if self.by_text:  # equal questions get equal answers, whichever request they stand in
            given = " ".join(self.words[i] for i in getattr(request, "prefix", ()) if i < len(self.words))
            key = (*key[:2], number(f"{request.prompt}|{given}|{getattr(request, 'inject', '')}"), key[-1])
        super().submit(ticket, request, key)
        if isinstance(request, Sample):
            row = self.rows[-1]
            words = [self.words[i] for i in row.reply]
            if CLOSE in [self.words[i] for i in row.prefix + row.injected]:  # the chain is over: the answer is left
                row.reply = row.reply[words.index(CLOSE) + 1 :] if CLOSE in words else row.reply[-1:]

    def _end(self, row: Any, finish: Finish) -> None:
        super()._end(row, finish)
        ticket, made = self.replies[-1]
        assert isinstance(made, Trace)
        rng = np.random.default_rng(number(" ".join(map(str, made.ids))))
        values = {name: rng.exponential(0.4, len(made.ids) - made.start) for name in ("logprobs", "entropies")}
        values["logprobs"] *= -1
        wanted: dict[str, Any] = {name: values[name].astype(np.float32) for name in values if name in row.request.want}
        self.replies[-1] = (ticket, replace(made, **wanted))


def script(problem: Problem, key: tuple[Hashable, ...], mode: Mode = "ordinary") -> str:
    """The whole response of one row: a chain, and an answer that is right more often than not."""
    rng = random.Random(repr(key))
    text = thought(problem, rng.choice(("long", "plain", "short")), rng.randrange(4))
    draw = rng.random()
    if mode == "unclosed" or (mode == "ordinary" and draw < 0.1):
        return text
    if mode == "unparsable" or draw < 0.2:
        return f"{text} {CLOSE} none"
    return f"{text} {CLOSE} {problem.answer if draw < 0.75 else wrong(problem)}"


def solve(
    strategy: Strategy, engine: Any, asked: Sequence[Problem], budget: Budget | None = None, concurrency: int = 256
) -> list[Outcome]:
    return Runner(engine, task(), budget, concurrency).solve(strategy, asked)


def number(text: str) -> int:
    """A number that belongs to the text, the same in every process."""
    return zlib.crc32(text.encode())


def _score(prompt: str, text: str) -> float:
    return -1.0 - number(f"{prompt}|{text}") % 997 / 100


def _vector(text: str) -> np.ndarray:
    return np.random.default_rng(number(text)).standard_normal(WIDTH).astype(np.float32)


# ------------------------------------------------------------------------------------------------- comparing


def plain(value: Any) -> Any:
    """Anything a verb takes or gives as nested tuples that compare with ``==``: records, arrays, tensors, modules."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value) if isinstance(value, float) else value  # nan equals itself
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, *(plain(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return tuple(sorted(((plain(key), plain(item)) for key, item in value.items()), key=repr))
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(repr, map(plain, value))))
    if hasattr(value, "state_dict") and hasattr(value, "named_parameters"):
        return plain(dict(value.state_dict()))
    if hasattr(value, "detach"):
        tensor = value.detach().cpu().contiguous()
        return (str(tensor.dtype), tuple(tensor.shape), repr(tensor.tolist()))
    if isinstance(value, random.Random):
        return "rng"
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__qualname__", type(value).__name__)
    return type(value).__name__
