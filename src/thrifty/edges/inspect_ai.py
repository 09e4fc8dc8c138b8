"""A task and a strategy in inspect-ai: samples, a scorer that grades as we do, a solver that runs a strategy.

>>> from thrifty.tasks import load
>>> made = task(load("roll"), "test", 100, solver=solver(SelfConsistency(k=5), load("roll")))    # doctest: +SKIP
>>> inspect_ai.eval(made, model="openai-api/local/NAME", model_base_url="http://...")             # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import time
from collections.abc import Hashable, Sequence
from typing import Any

import inspect_ai
import numpy as np
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.model._model import record_and_check_model_usage, sample_model_usage
from inspect_ai.scorer import Score as InspectScore
from inspect_ai.scorer import Scorer, Target, mean, stderr
from inspect_ai.scorer import scorer as registered_scorer
from inspect_ai.solver import Generate, Solver, TaskState
from inspect_ai.solver import solver as registered_solver

from thrifty.contracts import (
    Engine,
    Finish,
    Hidden,
    Outcome,
    Problem,
    Prompt,
    Sample,
    Score,
    Span,
    Split,
    Strategy,
    Task,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines import sampling
from thrifty.engines.runner import Runner
from thrifty.models.chat import ChatFormat

SLICE = 0.05
"""Seconds a poll waits for a reply: what a new request of a strategy may have to wait."""
STORE = "thrifty"
"""Where the solver leaves what a strategy cost, in a sample's store."""
_FINISH: dict[str, Finish] = {"stop": "stop", "max_tokens": "length", "model_length": "context"}
_STOP = {"stop": "stop", "until": "stop", "length": "max_tokens", "context": "model_length", "cancelled": "unknown"}


# ------------------------------------------------------------------------------------------------ tasks


def task(
    task: Task,
    split: Split,
    n: int,
    seed: int = 0,
    levels: Sequence[int] | None = None,
    solver: Solver | None = None,
) -> inspect_ai.Task:
    """An inspect-ai task of ``task.problems(split, n, seed, levels)``; ``solver`` is one plain pass by default."""
    problems = task.problems(split, n, seed, levels)
    name = "".join(c if c.isalnum() else "_" for c in task.name).strip("_")
    about: dict[str, Any] = {"name": name, "dataset": of_problems(problems, name), "scorer": scorer(task, problems)}
    if solver is not None:
        about["solver"] = solver
    return inspect_ai.Task(**about)


def of_problems(problems: Sequence[Problem], name: str | None = None) -> MemoryDataset:
    """One sample per problem. Raises ThriftyError where there is none, one has no answer, or two share an id."""
    if not problems:
        raise ThriftyError("no problems to make a data set of: ask the task for some, or choose another split or level")
    if lacking := [p.id for p in problems if not p.gradable]:
        raise ThriftyError(
            f"{len(lacking)} of {len(problems)} problems cannot be graded (first: {lacking[0]}): leave them out"
        )
    if len({p.id for p in problems}) < len(problems):
        raise ThriftyError("two problems share an id: give every problem an id of its own")
    samples = [
        InspectSample(p.prompt, target=p.answer or "", id=p.id, metadata={"task": p.task, "level": p.level})
        for p in problems
    ]
    return MemoryDataset(samples, name)


def scorer(task: Task, problems: Sequence[Problem]) -> Scorer:
    """Grades by ``task``: ``right``, ``complete`` and ``tokens``, the new tokens of all the sample's model calls.

    As in thrifty's own runs the response is graded, never the chain, and an answer that was cut is not right. Give it
    the problems that the data set was made of: a sample is found by its id.
    """
    known = {p.id: p for p in problems}

    @registered_scorer(metrics={"right": [mean(), stderr()], "complete": [mean()], "tokens": [mean()]}, name="thrifty")
    def graded() -> Scorer:
        async def score(state: TaskState, target: Target) -> InspectScore:
            problem = known.get(str(state.sample_id))
            if problem is None:
                raise ThriftyError(f"sample {state.sample_id!r} is none of the {len(known)} problems: give the same")
            _, response, closed = _told(state.output)
            complete = closed and state.output.stop_reason == "stop"
            grade = await asyncio.to_thread(task.grade, problem, response) if complete else None
            spent = sum(usage.output_tokens for usage in sample_model_usage().values())
            value = {"right": grade.score if grade else 0.0, "complete": float(complete), "tokens": spent}
            why = grade.message if grade else "incomplete"
            return InspectScore(value=value, answer=grade.parsed if grade else None, explanation=why or None)

        return score

    return graded()


# ------------------------------------------------------------------------------------------- strategies


def solver(strategy: Strategy, task: Task | None = None, engine: Engine | None = None, seed: int = 0) -> Solver:
    """Runs ``strategy`` on every sample: on the model that inspect evaluates, or on an ``engine`` of ours.

    inspect's models take whole chats, so strategies that continue a response, stop at a string or steer decoding need
    an engine (``OpenAIEngine`` on the same server); ThriftyError says so, naming what is missing. ``task`` reads
    answers, for strategies that compare them. The sample's output is the chosen trace, its usage that of all calls: in
    the log, in inspect's limits, and under "thrifty" in the sample's store. Epochs sample anew.
    """
    runners: dict[asyncio.AbstractEventLoop, Runner] = {}

    @registered_solver(name=type(strategy).__name__)
    def solving() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            problem = Problem(f"{state.sample_id}", _prompt(state), None)  # type: ignore[arg-type]
            stream = seed + 1_000_003 * (state.epoch - 1)
            model = get_model()
            if engine is None:
                # Of its own for every sample: calls are charged to the sample in whose context they are made.
                calls = InspectEngine(model, stream)
                try:
                    outcome = await Runner(calls, task).asolve(strategy, problem, stream)
                finally:
                    calls.close()
            else:
                loop = asyncio.get_running_loop()
                if loop not in runners:
                    runners.clear()
                    runners[loop] = Runner(engine, task)
                outcome = await runners[loop].asolve(strategy, problem, stream)
            if outcome.failed is not None:
                raise outcome.failed
            state.output = _output(outcome, str(model) if engine is None else engine.name)
            state.messages.append(state.output.message)
            state.store.set(STORE, {**dataclasses.asdict(outcome.usage), "tried": len(outcome.tried)})
            if engine is not None and state.output.usage is not None:
                record_and_check_model_usage(model, state.output.usage)
            return state

        return solve

    return solving()


def _prompt(state: TaskState) -> Prompt:
    turns = []
    for message in state.messages:
        parts = [] if isinstance(message.content, str) else message.content
        if message.role == "tool" or any(part.type not in ("text", "reasoning") for part in parts):
            raise ThriftyError(f"sample {state.sample_id}: a strategy takes turns of text, and one has other parts")
        turns.append({"role": message.role, "content": message.text})
    return turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else turns


def _output(outcome: Outcome, model: str) -> ModelOutput:
    """The chosen trace as a model's output, with the usage of all that was tried."""
    trace, usage = outcome.chosen, outcome.usage
    content: list[Any] = []
    if trace is not None:
        content += [ContentReasoning(reasoning=trace.thought)] if trace.thought else []
        content += [ContentText(text=trace.response)]
    made, read = usage.thought + usage.answer + usage.latent, usage.prompt + usage.injected
    total = ModelUsage(
        input_tokens=read, output_tokens=made, total_tokens=read + made + usage.cached,
        input_tokens_cache_read=usage.cached or None, reasoning_tokens=usage.thought + usage.latent,
    )  # fmt: skip
    message = ChatMessageAssistant(content=content, model=model, source="generate")
    reason: Any = "unknown" if trace is None else _STOP[trace.finish]
    choice = ChatCompletionChoice(message=message, stop_reason=reason)
    return ModelOutput(model=model, choices=[choice], usage=total, time=usage.seconds)


def _told(output: ModelOutput) -> tuple[str, str, bool]:
    """``(thought, response, closed)`` of a model's output, chains told apart by the provider or written inline."""
    if not output.choices:
        return "", "", False
    content = output.message.content
    parts = [] if isinstance(content, str) else content
    thought = "\n".join(part.reasoning for part in parts if isinstance(part, ContentReasoning)).strip()
    text = output.message.text
    if thought:
        return thought, text.strip(), bool(text.strip())
    return ChatFormat(None).split(text)


class InspectEngine:
    """Rows on a model of inspect's, one call each. Implements ``contracts.Engine``; made in a running event loop.

    Calls run as tasks of that loop, in the context in which it is polled; so inspect counts them, retries them and
    holds their limits. A ``limit`` above 0 cannot stop a call, since nothing is known of it before its end: the row
    comes back as cancelled with all that was paid for.
    """

    name = "inspect-ai"
    capabilities: frozenset[str] = frozenset()
    missing = dict.fromkeys(("prefix", "cancel", "logprobs"), "a call of inspect's is a whole chat, from its beginning")

    def __init__(self, model: Model, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self._loop = asyncio.get_running_loop()
        self._limits: dict[int, int] = {}
        self._tasks: dict[int, Any] = {}
        self._ended: queue.SimpleQueue[tuple[int, Trace | BaseException]] = queue.SimpleQueue()

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        """Queue one row; ThriftyError for stop strings: inspect does not say whether a call ended at one."""
        if not isinstance(request, Sample) or request.until:
            raise ThriftyError(
                "a strategy that stops at strings needs an engine of thrifty's: "
                "solver(strategy, engine=OpenAIEngine(url, name))"
            )
        config = GenerateConfig(
            temperature=request.temperature, top_p=request.top_p, max_tokens=request.max_tokens,
            seed=sampling.stream(self.seed, key) & 0x7FFFFFFF,
        )  # fmt: skip
        self._tasks[ticket] = asyncio.run_coroutine_threadsafe(self._ask(ticket, request, config), self._loop)

    def poll(self) -> list[tuple[int, Trace]]:
        """Rows that have ended; waits up to ``SLICE`` seconds for the first. Raises what a call raised."""
        found: list[tuple[int, Trace]] = []
        try:
            while True:
                ticket, reply = self._ended.get(timeout=0 if found else SLICE)
                self._tasks.pop(ticket, None)
                if isinstance(reply, BaseException):
                    raise reply
                found.append((ticket, reply))
        except queue.Empty:
            return found

    def limit(self, ticket: int, tokens: int) -> None:
        self._limits[ticket] = min(tokens, self._limits.get(ticket, tokens))
        if tokens <= 0 and ticket in self._tasks:
            self._tasks[ticket].cancel()

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        return ChatFormat(None).open, ChatFormat(None).close

    def close(self) -> None:
        """Stop what still runs."""
        for call in self._tasks.values():
            call.cancel()

    async def _ask(self, ticket: int, request: Sample, config: GenerateConfig) -> None:
        started = time.monotonic()
        reply: Trace | BaseException
        try:
            output = await self.model.generate(_messages(request.prompt), config=config)
            reply = _trace(output, self._limits.get(ticket), time.monotonic() - started)
        except asyncio.CancelledError:
            usage = Usage(calls=1, partial=1, seconds=time.monotonic() - started)
            self._ended.put((ticket, Trace(np.zeros(0, np.int32), "", "", False, "cancelled", usage=usage)))
            raise
        except Exception as error:
            reply = error
        self._ended.put((ticket, reply))


def _messages(prompt: Prompt) -> Any:
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser

    if isinstance(prompt, str):
        return [ChatMessageUser(content=prompt)]
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return [kinds[turn["role"]](content=turn["content"]) for turn in prompt]


def _trace(output: ModelOutput, limit: int | None, seconds: float) -> Trace:
    """Token ids are unknown (-1). Where a provider does not count the chain, it is estimated by its characters."""
    thought, response, closed = _told(output)
    told = output.usage
    made = 0 if told is None else told.output_tokens
    inside = None if told is None else told.reasoning_tokens
    if inside is None:
        inside = round(made * len(thought) / max(1, len(thought) + len(response)))
        unknown = told is None or bool(thought)
    else:
        unknown = False
    inside = min(inside, made)
    cut = limit is not None and made > limit
    finish: Finish = "cancelled" if cut else _FINISH.get(output.stop_reason, "cancelled")
    read = (0, 0) if told is None else (
        told.input_tokens + (told.input_tokens_cache_write or 0), told.input_tokens_cache_read or 0
    )  # fmt: skip
    spans = [Span(0, inside, "thought")] * (inside > 0) + [Span(inside, made, "answer")] * (made > inside)
    usage = Usage(
        prompt=read[0], cached=read[1], thought=inside, answer=made - inside, calls=1, seconds=seconds,
        discarded=made if finish == "cancelled" else 0, partial=int(unknown),
    )  # fmt: skip
    ids = np.full(made, -1, np.int32)
    return Trace(ids, thought, response, closed, finish, spans=tuple(spans), usage=usage)
