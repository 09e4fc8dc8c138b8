"""Every record and every contract of thrifty. Read this file first: it is the whole house.

Records are frozen dataclasses; token ids and per-token values are numpy arrays. A method is a frozen
dataclass whose fields are its hyperparameters, with one or two verbs. Data flows one way: problems ->
requests -> traces -> outcomes. Methods never count tokens: the meter stands on the model (see
``engines/meter.py``) and the runner (``engines/runner.py``) counts text.

This module imports the standard library alone (numpy and torch for type checkers only): ``thrifty list`` stays fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import random

    import numpy as np
    import torch
    from torch import Tensor

FAMILIES: tuple[str, ...] = (
    "traces.make", "traces.compress", "traces.select", "traces.perturb",
    "tune.adapter", "tune.sparse", "tune.objective", "tune.reward", "tune.latent",
    "weights.merge", "weights.shrink", "weights.codec",
    "decode.control", "decode.patch", "decode.accelerate",
    "solve.prompt", "solve.search", "solve.verify", "solve.route", "solve.tools",
    "measure.metric", "measure.diagnose", "measure.bench",
    "recipes",
)  # fmt: skip


class ThriftyError(Exception):
    """A mistake the user can mend. The message names the file, row or key, and the remedy."""


class OutOfBudget(Exception):  # noqa: N818 - it is a signal thrown into a strategy, not a fault
    """Thrown into a strategy at its ``yield`` when the problem's budget is spent."""


class RowFailed(ThriftyError):  # noqa: N818 - named like OutOfBudget: both are thrown into a strategy
    """An engine gave up on one row: after all attempts, or because this request can never be answered.

    Thrown into a strategy at its ``yield``, with the other rows of that request stopped; where no strategy catches it,
    it fails that problem alone. ``trace`` is what had come of a ``Sample``, ``usage`` what was paid for it.
    ``outage`` names a fault of the server ("unreachable", "503"), "" one of this row: many of one name in a row end a
    run.
    """

    def __init__(self, text: str, outage: str = "", trace: Trace | None = None, usage: Usage | None = None) -> None:
        super().__init__(text)
        self.outage, self.trace = outage, trace
        self.usage = usage or (Usage() if trace is None else trace.usage)


# ---------------------------------------------------------------------------------------------- records

Split: TypeAlias = Literal["train", "calibration", "dev", "test"]
Finish: TypeAlias = Literal["stop", "until", "length", "cancelled", "context"]
"""Why a trace ended: end-of-sequence; a stop string; the token limit; stopped from outside; context full."""


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer. ``answer`` is None where no gold is known.

    A task says in ``meta["unparsable"]`` why it could not read a gold answer, and with ``meta["checked"]`` that it
    grades answers to this problem without one.
    """

    id: str
    prompt: str
    answer: str | None
    task: str = ""
    level: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gradable(self) -> bool:
        """Whether its task can tell a right answer from a wrong one."""
        return self.answer is not None or bool(self.meta.get("checked"))


@dataclass(frozen=True)
class Grade:
    """``score`` in [0, 1]; ``parsed`` is the answer that was found, None when there was none."""

    score: float
    parsed: str | None
    message: str = ""

    @property
    def right(self) -> bool:
        return self.score >= 1.0


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, end)`` of a trace. ``origin`` says who wrote them."""

    start: int
    end: int
    kind: Literal["thought", "answer", "work", "check", "branch", "plan", "tail", "tool"]
    origin: Literal["sampled", "injected", "tool", "latent"] = "sampled"


@dataclass(frozen=True)
class Usage:
    """What something cost, in tokens, calls and seconds."""

    prompt: int = 0
    """Prompt tokens read anew."""
    cached: int = 0
    """Prompt or prefix tokens taken from a cache."""
    thought: int = 0
    """Tokens sampled before the chain closed."""
    answer: int = 0
    """Tokens sampled after it."""
    injected: int = 0
    """Tokens forced by a control or put in by a strategy, not sampled."""
    discarded: int = 0
    """Sampled tokens of cancelled rows (a subset of thought + answer)."""
    calls: int = 0
    seconds: float = 0.0
    latent: int = 0
    """Latent steps: forwards that think without writing a token."""
    partial: int = 0
    """Calls whose counts the engine could not tell in full: the sums are then lower bounds, never unknown as 0."""

    @property
    def generated(self) -> int:
        return self.thought + self.answer + self.injected + self.latent

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True, eq=False)
class Trace:
    """One sampled continuation of a prompt, prefix included.

    ``ids`` are the response's token ids ``[T]`` int32, beginning with the request's prefix; ``start`` is how
    many of them were that prefix; -1 stands for a token that an endpoint does not name. ``thought`` and
    ``response`` are the decoded text before and after the chain's closing tag, tags excluded; ``closed`` says whether
    the chain was closed. ``answer`` is what the task's parser found in a finished response (None: nothing, or
    unfinished). ``logprobs`` and ``entropies`` are float32 ``[T - start]``.
    """

    ids: np.ndarray
    thought: str
    response: str
    closed: bool
    finish: Finish
    start: int = 0
    answer: str | None = None
    spans: tuple[Span, ...] = ()
    logprobs: np.ndarray | None = None
    entropies: np.ndarray | None = None
    usage: Usage = Usage()
    problem: str = ""
    """Id of the problem."""
    path: tuple[int, ...] = ()
    """Where in the strategy the request stood: the key of its random stream."""
    prompt_ids: np.ndarray | None = None
    """The prompt as the model read it, int32 ``[P]``; None where the engine cannot tell."""

    @property
    def complete(self) -> bool:
        """Ended by itself with the chain closed. An unclosed chain is incomplete, not wrong."""
        return self.closed and self.finish == "stop"


@dataclass(frozen=True, eq=False)
class Group:
    """All samples of one problem in one step of reinforcement learning, and the task's grade of each."""

    problem: Problem
    traces: Sequence[Trace]
    grades: Sequence[Grade]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a strategy made of one problem: the chosen trace, all that were tried, what it cost."""

    problem: Problem
    chosen: Trace | None
    grade: Grade
    tried: Sequence[Trace]
    usage: Usage
    failed: RowFailed | None = None
    """Why the problem was given up where the engine failed a row of it; nothing is chosen then."""


@dataclass(frozen=True)
class Budget:
    """Limits per problem; None is no limit. ``tokens`` counts generated tokens."""

    tokens: int | None = None
    calls: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Artifact:
    """A folder with ``artifact.json`` (what made it, from what) and safetensors or Parquet beside it."""

    folder: Path
    kind: str = ""


@dataclass(frozen=True)
class Card:
    """The literal at the head of a method's file, read without importing it (see ``registry.py``)."""

    key: str
    """Kebab-case; the file is ``key.replace('-', '_') + '.py'``."""
    title: str
    arxiv: str | None = None
    year: int | None = None
    saves: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Engine capabilities the method cannot do without."""
    baseline: bool = False
    """A baseline every method is compared with; stands in no paper list."""


# --------------------------------------------------------------------------------------------- requests

END_OF_THOUGHT = "<|end of thought|>"
"""In ``Sample.until`` and ``Sample.inject``: the model's own closing tag of a chain, filled in by the engine."""

Prompt: TypeAlias = "str | Sequence[Mapping[str, str]]"
"""A user's question, or chat messages. The engine renders it through the model's chat template."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Ask for ``n`` continuations of ``prompt``. Answered by a list of ``n`` traces, in index order.

    With ``first=m`` the ``m`` with the fewest tokens (ties by index) run to their end and the others are stopped
    at that many tokens: they come back too, with ``finish == "cancelled"``. ``prefix`` continues, forks or rewinds a
    response. ``until`` ends a row after a stop string (kept in the trace). ``max_tokens`` counts new tokens; beside it
    an engine may limit the whole response. Where ``temperature`` or ``top_p`` is None, the engine's own is taken.
    """

    prompt: Prompt
    n: int = 1
    first: int | None = None
    prefix: Sequence[int] | np.ndarray = ()
    inject: str = ""
    """Text put in after the prefix; its tokens open the new part of the trace and count as injected."""
    until: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    role: str = "main"
    adapters: Mapping[str, float] = field(default_factory=dict)
    """LoRA name -> strength for these rows."""
    controls: tuple[Control, ...] = ()
    patches: tuple[tuple[Patch, float], ...] = ()
    decoder: Decoder | None = None
    want: frozenset[str] = frozenset()
    """Of {"logprobs", "entropies"}."""


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probability of each continuation (text) after ``prompt`` + ``prefix``; the talk is sent list[float].

    Prefill only: nothing is generated.
    """

    prompt: Prompt
    continuations: tuple[str, ...]
    prefix: Sequence[int] | np.ndarray = ()
    role: str = "main"
    adapters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Hidden:
    """The hidden state after layer ``layer`` (from 0) at the last token of ``prompt`` + ``prefix`` + each text.

    Answered by one float32 array ``[d]`` per text; the text may be empty. Prefill only. The last layer's is taken after
    the model's final norm.
    """

    prompt: Prompt
    texts: tuple[str, ...]
    layer: int
    prefix: Sequence[int] | np.ndarray = ()
    role: str = "main"
    adapters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scores:
    """An engine's reply to ``Score`` and ``Hidden``; the talk is sent ``values`` alone."""

    values: list[Any]
    usage: Usage = Usage()


@dataclass(frozen=True, eq=False)
class Call:
    """Run a tool; answered by its text."""

    tool: Callable[[str], str]
    text: str


@dataclass(frozen=True, eq=False)
class All:
    """Side by side; answered by the list of answers. Items are requests or talks (generators).

    ``stop(index, answer)`` is asked as each item ends; where it says True the items that stand after it are stopped and
    their answers are None, even if they had ended before. So the answers do not depend on who was faster, only the
    cost does: put what decides (a verifier) before what is done on the chance that it is wanted.
    """

    items: Sequence[Any]
    stop: Callable[[int, Any], bool] | None = None


@dataclass(frozen=True, eq=False)
class First:
    """Side by side; the ``m`` with the fewest generated tokens win (ties by index), the rest is stopped.

    Answered by a list of ``(index, answer)`` for the winners, cheapest first.
    """

    m: int
    items: Sequence[Any]


@dataclass(frozen=True)
class Emit:
    """Stream a piece of text to whoever listens; answered by None."""

    text: str


Request: TypeAlias = Sample | Score | Hidden | Call | All | First | Emit
Talk: TypeAlias = Generator[Any, Any, Any]
"""A generator that yields requests and is sent their answers. ``[trace] = yield Sample(...)``."""

# ---------------------------------------------------------------------------------------------- contracts


@runtime_checkable
class Task(Protocol):
    """Problems with an exact checker. ``problems`` is a pure function of its arguments; splits are disjoint."""

    name: str
    levels: tuple[int, ...]

    def problems(self, split: Split, n: int, seed: int = 0, levels: Sequence[int] | None = None) -> list[Problem]:
        """``n`` problems, spread evenly over ``levels``; fewer only when the source has no more."""
        ...

    def parse(self, response: str) -> str | None:
        """The final answer in a response, normalised so that equal answers are equal strings."""
        ...

    def grade(self, problem: Problem, response: str) -> Grade:
        """Grade the response (never the chain). An unparsable gold or response is never right."""
        ...


class Engine(Protocol):
    """Rows in, traces out, by continuous batching: the runner submits, polls, limits and cancels.

    ``capabilities`` is a subset of {"prefix", "logprobs", "entropies", "adapters", "controls", "patches",
    "decoder", "cancel", "score", "hidden", "seed"}; ``engines/capabilities.py`` lists what each engine has.
    """

    name: str
    capabilities: frozenset[str]

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        """Queue one row (``n`` and ``first`` are the runner's affair). ``key`` seeds its random stream."""
        ...

    def poll(self) -> Sequence[tuple[int, Trace | Scores | RowFailed]]:
        """Work for a slice of time, less when a row ends; return all that have ended (often none).

        A row that fails for good is handed back as a ``RowFailed``. What is raised here or in ``submit`` ends the run;
        but a ``RowFailed`` that ``submit`` raises fails the row.
        """
        ...

    def limit(self, ticket: int, tokens: int) -> None:
        """End the row as "cancelled" once it has ``tokens`` new tokens (at once if it has them already)."""
        ...

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        """The model's opening and closing tag of a chain, ("", "") where it has none."""
        ...


class Strategy(Protocol):
    """Solve one problem by talking: yield requests, return the chosen trace (None: gave up)."""

    def solve(self, problem: Problem, rng: random.Random) -> Talk: ...


class Verifier(Protocol):
    """Rate traces of one problem; the talk returns list[float], higher is better."""

    def rate(self, problem: Problem, traces: Sequence[Trace], rng: random.Random) -> Talk: ...


class Router(Protocol):
    """Choose among named arms; the talk returns the names to run, in order."""

    def route(self, problem: Problem, arms: Sequence[str], rng: random.Random) -> Talk: ...


class Prompter(Protocol):
    def prompt(self, problem: Problem, ctx: Context) -> Prompt: ...


@dataclass(frozen=True, eq=False)
class Tail:
    """What a control may see of one row: its own response so far."""

    ids: Sequence[int]
    new: int
    """How many of ``ids`` were made in this request (the rest is prefix)."""


class Control(Protocol):
    """Steer decoding from a row's own tokens and logits. State is passed in and returned.

    ``step`` gets one ``Tail`` per row, ``logits`` ``[B, V]`` and one state per row, and returns logits, per row a tuple
    of token ids to force (empty: none) and per row whether to stop now, and the new states.
    """

    def start(self, tokenizer: Any) -> Any:
        """The state of a new row."""
        ...

    def step(
        self, tails: Sequence[Tail], logits: Tensor, states: Sequence[Any]
    ) -> tuple[Tensor, list[tuple[int, ...]], list[bool], list[Any]]: ...


class Patch(Protocol):
    """Change hidden states, routers or scales while a forward runs; ``strength`` is ``[B]``, one per row."""

    def apply(self, model: torch.nn.Module, strength: Tensor) -> Any:
        """A context manager, entered around every forward of the rows."""
        ...


class Decoder(Protocol):
    """Say which tokens come next in some rows (drafts, trees, latents). ``forward`` is the only way to a model.

    ``decode`` yields ``(index, token ids)`` as a row gets new tokens and is sent whether that row has ended: the engine
    cuts at end-of-sequence, stop strings and limits. It goes on until all rows have. ``rows`` and ``forward`` are
    described in ``engines/decoding.py``.
    """

    def decode(
        self, rows: Sequence[Any], forward: Callable[..., Any]
    ) -> Generator[tuple[int, Sequence[int]], bool | None, None]: ...


class Maker(Protocol):
    def make(self, problem: Problem, ctx: Context) -> list[Trace]: ...


@dataclass(frozen=True)
class Chain:
    """A chain of thought as text: what compressors and tracers work on."""

    problem: Problem
    thought: str
    response: str
    strength: float = 1.0
    """Adapter strength at which to train on it (CoT-Valve++)."""
    source: str = ""


class Compressor(Protocol):
    """One for one; None drops the chain. Sees text, never how the text was written."""

    def compress(self, chains: Sequence[Chain], ctx: Context) -> list[Chain | None]: ...


class Selector(Protocol):
    def select(self, chains: Sequence[Chain], ctx: Context) -> list[int]: ...


class Perturber(Protocol):
    def perturb(self, chain: Chain, rng: random.Random) -> Chain: ...


class Adapter(Protocol):
    """Few weights instead of all. A new one leaves the model's function as it was, or says ``starts_equal = False``.

    ``attach`` freezes the model's own weights. ``fold`` gives an ordinary model of the same function.
    """

    def attach(self, model: Any, batches: Any) -> Any: ...

    def fold(self, model: Any) -> Any: ...


class Objective(Protocol):
    """A loss. ``modules`` makes extra parts to train (heads, auxiliary decoders) by name; ``loss`` gets them back.

    Loss and figures to log are the batch's share of the step's: they are added up over its batches. One that is trained
    on pairs says ``pairs = True``; one on examples of its own kind has ``examples(documents)``, which makes some of
    plain ones (``thrifty check`` asks for them).
    """

    def modules(self, model: Any) -> Mapping[str, Any]: ...

    def loss(
        self, model: Any, batch: Any, step: int, modules: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, float]]: ...


class Source(Protocol):
    """What to train on next: curriculum, allocation, mixture, memory. Saved and resumed with the loop."""

    def next(self, step: int, feedback: Mapping[str, float]) -> Sequence[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Reward(Protocol):
    """Sees all groups of a step; returns one reward per trace per group."""

    def score(self, groups: Sequence[Group], step: int) -> list[list[float]]: ...


class Credit(Protocol):
    """Per-token weights from rewards: float32 ``[T - start]`` per trace, 0 where a token was not sampled.

    A group of all zeros is dropped.
    """

    def weights(self, groups: Sequence[Group], rewards: list[list[float]], step: int) -> list[list[np.ndarray]]: ...


class Hook(Protocol):
    """Moving masks, gradient bias, freezing, moments. Every method is optional to a hook: inherit ``NoHook``.

    ``start`` runs once, before a checkpoint is restored: ``state.optimizer`` may be replaced there.
    """

    def start(self, state: Any) -> None: ...

    def before_step(self, state: Any) -> None: ...

    def after_backward(self, state: Any) -> None: ...

    def after_step(self, state: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Merger(Protocol):
    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]: ...


class Shrinker(Protocol):
    def shrink(self, model: Any, chains: Sequence[Chain], ctx: Context) -> Artifact: ...


class Codec(Protocol):
    def encode(self, state: Mapping[str, Tensor]) -> bytes: ...

    def decode(self, data: bytes) -> dict[str, Tensor]: ...


class Metric(Protocol):
    """One metric, one float; None where it is not defined. ``better`` says which way is up."""

    better: Literal["higher", "lower"]

    def measure(self, outcomes: Sequence[Outcome]) -> float | None: ...


class Recipe(Protocol):
    """A paper's whole pipeline. ``thrifty run`` also calls, where a recipe has them, ``check(lab)`` before any work
    (raises ThriftyError), and for ``--plan`` ``passes(n)``: {"sampled": chains, "trained": chains}.
    """

    def run(self, lab: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Context:
    """What a verb may use beyond its arguments: the task, a way to run strategies, and a random stream."""

    task: Task | None = None
    solve: Callable[[Strategy, Sequence[Problem]], list[Outcome]] | None = None
    rng: random.Random | None = None
    tokenizer: Any = None
