"""Work done elsewhere: an executor, set by ``on``, takes a stage's problems in pieces. Ray's is in ``edges/ray.py``.

Whoever works only computes. The process that was started collects what comes back and writes every shard once, under
its name, by rename, as it does alone. Random streams follow from problem, path and seed, so outcomes are those of one
process (in fp32, up to near-ties).

>>> with processes(4) as pool, on(pool):                                                     # doctest: +SKIP
...     lab.solve("long", SinglePass(), problems)
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from thrifty.contracts import Budget, Outcome, Problem, RowFailed, Strategy, Task, ThriftyError

PIECE = 32
"""Problems per piece: what a dead worker costs, and what is batched together."""

_EXECUTOR: ContextVar[Executor | None] = ContextVar("executor", default=None)


@contextlib.contextmanager
def on(executor: Executor | None) -> Iterator[None]:
    """Inside, work goes to ``executor``; None: it is done here, as without ``on``."""
    token = _EXECUTOR.set(executor)
    try:
        yield
    finally:
        _EXECUTOR.reset(token)


def executor() -> Executor | None:
    """Where work goes now."""
    return _EXECUTOR.get()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """In a worker: the folder in which the run was started, and nothing handed on. Raises ThriftyError without it."""
    if not folder.is_dir():
        raise ThriftyError(f"a worker has no folder {folder}: it must stand at the same place on every node")
    with contextlib.chdir(folder), on(None):
        yield


@contextlib.contextmanager
def processes(n: int) -> Iterator[Executor]:
    """Inside, ``n`` processes of this machine, each with its share of the cores; ``on`` takes them.

    They end with this block and with the process that began it, however that ends, in the middle of their work too.
    """
    context = multiprocessing.get_context("spawn")
    end, ours = context.Pipe(duplex=False)  # whoever waits at ``end`` is told once ours is closed, or this process dies
    with ProcessPoolExecutor(n, context, _started, (n, end)) as pool, ours:
        yield pool


def _started(n: int, end: Connection) -> None:
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started them
    threading.Thread(target=lambda: (wait_for([end]), os._exit(1)), daemon=True).start()


class _Kept(threading.local):
    made: tuple[Recipe, Any] | None = None


_KEPT = _Kept()
"""A worker's engine: its next piece does not load the model again."""
_LOADING = threading.Lock()
"""While transformers loads a model, it has torch initialise nothing: for all threads."""


@dataclass(frozen=True)
class Recipe:
    """What a worker makes a local engine of. Folders are absolute, and stand at the same place on every node."""

    model: str
    adapter: tuple[str, str] | None
    """Name and folder."""
    batch_size: int
    seed: int
    max_tokens: int | None
    device: str
    dtype: str

    def engine(self) -> Any:
        from thrifty.engines.local import LocalEngine
        from thrifty.models.load import load

        if _KEPT.made is None or _KEPT.made[0] != self:
            _KEPT.made = None  # two models would be in memory at once
            with _LOADING:
                loaded = load(self.model, self.device, self.dtype)
            engine = LocalEngine(loaded, self.batch_size, self.seed, max_tokens=self.max_tokens)
            if self.adapter is not None:
                engine.add_adapter(*self.adapter)
            _KEPT.made = (self, engine)
        return _KEPT.made[1]


@dataclass(frozen=True, eq=False)
class Work:
    """What all pieces of a stage have in common."""

    recipe: Recipe
    task: Task
    strategy: Strategy
    seed: int
    budget: Budget
    adapters: Mapping[str, float] | None


class Spread:
    """Stands where a ``Runner`` does in ``Lab.solve``. All pieces of a stage are handed out at once.

    ``shards`` are the problems to solve, as ``solve`` will be asked for them. ``meter`` is given what the workers'
    meters counted.
    """

    def __init__(self, executor: Executor, work: Work, shards: Sequence[Sequence[Problem]], meter: Any) -> None:
        self.answered, self._meter = 0, meter
        self._shards: list[dict[Future[Any], Sequence[Problem]]] = []
        for shard in shards:
            pieces = [shard[at : at + PIECE] for at in range(0, len(shard), PIECE)]
            self._shards.append({executor.submit(_solve, work, piece): piece for piece in pieces})

    def solve(
        self, strategy: Strategy, problems: Sequence[Problem], seed: int, on_outcome: Callable[[Outcome], None]
    ) -> None:
        """Wait for the next shard, which ``problems`` are; ``on_outcome`` hears of each of them.

        Raises what a worker raised, and ThriftyError for a piece that workers died of; what else is out is cancelled.
        """
        pending, failed = self._shards.pop(0), list[RowFailed]()
        assert [p.id for piece in pending.values() for p in piece] == [p.id for p in problems], "not the next shard"
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    outcomes, counts = _got(future, pending.pop(future))
                    self._count(counts)
                    self.answered += sum(outcome.failed is None for outcome in outcomes)
                    failed += [outcome.failed for outcome in outcomes if outcome.failed is not None]
                    for outcome in outcomes:
                        on_outcome(outcome)
        except BaseException:
            for future in [*pending, *(future for shard in self._shards for future in shard)]:
                future.cancel()
            raise
        if failed and not self.answered:
            raise failed[0]

    def _count(self, counts: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
        from thrifty.engines.meter import scope

        for (phase, role), amounts in counts.items():
            with scope(phase=phase, role=role):
                self._meter.count(**amounts)


def _got(future: Future[Any], piece: Sequence[Problem]) -> Any:
    try:
        return future.result()
    except BrokenExecutor as error:
        raise ThriftyError(
            f"the {len(piece)} problems from {piece[0].id} on were given up: {error}. Shards that are done stand: look "
            "for the cause, then run the same command again"
        ) from error


def _solve(work: Work, piece: Sequence[Problem]) -> tuple[list[Outcome], dict[tuple[str, str], dict[str, float]]]:
    """In a worker: outcomes of a piece, and what the meter counted meanwhile."""
    from thrifty.engines.runner import Runner

    engine = work.recipe.engine()
    meter = getattr(engine, "meter", None)
    before = meter.rows() if meter else {}
    runner = Runner(engine, work.task, work.budget, adapters=work.adapters)
    runner.answered = 1  # whether a run failed altogether is not for one piece to say
    outcomes = runner.solve(work.strategy, piece, work.seed)
    counts = {}
    for key, row in meter.rows().items() if meter else ():
        old = dataclasses.asdict(before[key]) if key in before else {}
        counts[key] = {name: value - old.get(name, 0) for name, value in dataclasses.asdict(row).items()}
    return outcomes, counts
