"""What recipes, claims and commands are made of: a model, a task, and results that are kept as they are made.

Everything that a run computes stands in its folder under ``stages/``, in shards written whole or not at all, so that
resuming is running again. A lab holds no results itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from thrifty.contracts import (
    Budget,
    Chain,
    Context,
    Engine,
    Finish,
    Grade,
    Outcome,
    Problem,
    Source,
    Span,
    Split,
    Strategy,
    Task,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines import spread
from thrifty.engines.local import LocalEngine
from thrifty.engines.meter import Meter
from thrifty.engines.runner import Runner
from thrifty.files import write_json
from thrifty.measure import stats
from thrifty.models.load import Loaded, load
from thrifty.progress import Progress
from thrifty.traces import store
from thrifty.tune.adapter import load_adapter, lora
from thrifty.tune.batches import Example
from thrifty.tune.supervised import Train, train

ADAPTER = "valve"
"""The name of the adapter that a lab trains and turns."""
SHARD = 512
"""Problems per shard: what a killed run may have to do again."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One point of a comparison: a name, its dial if it has one, and what came of every problem."""

    name: str
    outcomes: Sequence[Outcome]
    alpha: float | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """What a recipe hands back, measured on ``Lab.split``.

    ``line`` names the settings at the ends of the straight line (long, short).
    """

    settings: Sequence[Setting]
    baseline: str
    line: tuple[str, str] | None = None
    notes: Sequence[str] = ()
    verdicts: Sequence[Mapping[str, Any]] = ()
    margin: float | None = None
    """Accuracy that may be lost, as in the verdicts."""
    best: str | None = None
    """The setting to use, chosen without a look at ``settings``: on the calibration problems."""
    calibration: Mapping[str, Any] | None = None
    """How it was chosen: "n" problems, and the "verdicts" of every candidate on them."""


@dataclass
class Lab:
    """A model and a task, and a folder in which results are kept."""

    folder: Path
    model: str
    task: Task
    n: int = 500
    seed: int = 0
    split: Split = "test"
    """Whose problems the settings are measured on."""
    batch_size: int = 64
    max_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    _models: dict[str, Loaded] = field(default_factory=dict)
    _recipes: WeakKeyDictionary[Any, spread.Recipe] = field(default_factory=WeakKeyDictionary)
    """How its engines were made, so that others can make them too."""

    def loaded(self, name: str | None = None) -> Loaded:
        """The model of this name (default: the lab's own), loaded once."""
        name = name or self.model
        if name not in self._models:
            self._models[name] = load(name, device=self.device, dtype=self.dtype)
        return self._models[name]

    def fresh(self) -> Loaded:
        """The lab's model loaded anew, to be trained; those in memory are let go, so that there is one of it."""
        self._models.clear()
        return load(self.model, device=self.device, dtype=self.dtype)

    def engine(self, model: str | Loaded | None = None, adapter: Path | None = None) -> LocalEngine:
        """A new engine on the lab's model or another, with an adapter to turn; counted by the lab's meter."""
        loaded = model if isinstance(model, Loaded) else self.loaded(model)
        engine = LocalEngine(
            loaded, batch_size=self.batch_size, seed=self.seed, max_tokens=self.max_tokens, meter=self.meter
        )
        if adapter is not None:
            engine.add_adapter(ADAPTER, adapter)
        if loaded is not model:  # one in memory has no name by which others could load it
            where = loaded.name if loaded.folder is None else str(loaded.folder.resolve())
            turned = None if adapter is None else (ADAPTER, str(adapter.resolve()))
            how = (self.batch_size, self.seed, self.max_tokens, self.device, self.dtype)
            self._recipes[engine] = spread.Recipe(where, turned, *how)
        return engine

    def problems(self, split: Split, n: int, levels: Sequence[int] | None = None, gold: bool = True) -> list[Problem]:
        """``n`` problems; fewer with a note where the task has no more.

        Raises ThriftyError where it has none, or (unless ``gold`` is False) none that can be graded.
        """
        found = self.task.problems(split, n, self.seed, levels)
        if not found:
            raise ThriftyError(f"task {self.task.name} has no usable {split} problems; look at its source and columns")
        if gold and not any(p.gradable for p in found):
            raise ThriftyError(
                f"none of the {len(found)} {split} problems of {self.task.name} can be graded: name the column of the "
                "answers with --answer COLUMN, or measure agreement with `thrifty measure --no-gold`"
            )
        if len(found) < n:
            self.progress.say(f"{self.task.name} has only {len(found)} {split} problems of the {n} asked for")
        return found

    def notes(self, problems: Sequence[Problem]) -> list[str]:
        """What a report must say about the task's source, and about ``problems`` that cannot be graded."""
        return [*getattr(self.task, "notes", list)(), *unusable(problems)]

    def context(self, rng: Any = None) -> Context:
        return Context(task=self.task, rng=rng, tokenizer=self.loaded().tokenizer)

    def solve(
        self,
        stage: str,
        strategy: Strategy,
        problems: Sequence[Problem],
        engine: Engine | None = None,
        adapters: Mapping[str, float] | None = None,
        seed: int | None = None,
        budget: int | None = None,
    ) -> list[Outcome]:
        """Outcomes of ``strategy`` on ``problems``, kept under ``stages/STAGE``; what is there already is read.

        Problems that the engine failed are not kept: another run tries them again. Inside ``spread.on`` its executor
        solves them, unless the engine's model is in memory alone or behind an endpoint.
        """
        folder, seed = self.stage(stage), self.seed if seed is None else seed
        outcomes: list[Outcome] = []
        runner: Runner | spread.Spread | None = None
        parts = [problems[start : start + SHARD] for start in range(0, len(problems), SHARD)]
        paths = [folder / f"{start:07d}.parquet" for start in range(0, len(problems), SHARD)]
        stored = [_restore(path, part) for path, part in zip(paths, parts)]
        waiting = [[p for p in part if p.id not in done] for part, done in zip(parts, stored)]
        with self.progress.bar(stage, len(problems)) as bar:
            for path, part, done, missing in zip(paths, parts, stored, waiting):
                bar.advance(len(done))
                if missing:
                    if runner is None:
                        engine = engine or self.engine()
                        runner = self._elsewhere(stage, engine, strategy, waiting, seed, budget, adapters)
                        runner = runner or Runner(engine, self.task, Budget(tokens=budget), adapters=adapters)
                    runner.answered += sum(o.failed is None for o in (*outcomes, *done.values()))

                    def ended(outcome: Outcome, done: dict[str, Outcome] = done) -> None:
                        bar.advance(1)
                        done[outcome.problem.id] = outcome

                    try:
                        runner.solve(strategy, missing, seed, ended)
                    finally:
                        whole = [done[p.id] for p in part if p.id in done and done[p.id].failed is None]
                        if whole:
                            write_json(_costs(path), {o.problem.id: dataclasses.asdict(o.usage) for o in whole})
                            store.write(path, store.rows_from(whole, stage, ids=True))
                outcomes += [done[problem.id] for problem in part]
        failed = [outcome for outcome in outcomes if outcome.failed is not None]
        if failed:
            self.progress.say(
                f"{stage}: {len(failed)} of {len(outcomes)} problems failed and stand as not answered "
                f"(first: {failed[0].problem.id}: {failed[0].failed})"
            )
        return outcomes

    def _elsewhere(
        self, stage: str, engine: Engine, strategy: Strategy, waiting: Sequence[Sequence[Problem]], seed: int,
        budget: int | None, adapters: Mapping[str, float] | None,
    ) -> spread.Spread | None:  # fmt: skip
        """What hands ``waiting`` to the executor in force; None without one, or where it could not make the engine."""
        executor = spread.executor()
        if executor is None:
            return None
        recipe = self._recipes.get(engine)
        if recipe is None:
            self.progress.say(f"{stage}: solved in this process, whose engine ({engine.name}) no other can make")
            return None
        work = spread.Work(recipe, self.task, strategy, seed, Budget(tokens=budget), adapters)
        return spread.Spread(executor, work, [shard for shard in waiting if shard], self.meter)

    def chains(self, outcomes: Sequence[Outcome], source: str) -> list[Chain]:
        """The chains of the right, complete answers."""
        return [
            Chain(o.problem, o.chosen.thought, o.chosen.response, source=source)
            for o in outcomes
            if o.chosen is not None and o.grade.right
        ]

    def tune(
        self, stage: str, data: Source | Sequence[Example], settings: Train, rank: int, start: Path | None = None
    ) -> Path:
        """Train a LoRA (from ``start`` where given) on the lab's model; returns the adapter's folder. Resumes."""

        def make(folder: Path) -> None:
            model = self.fresh().model
            if start is None:
                model = lora(model, rank=rank, name=ADAPTER, seed=self.seed)
            else:
                model = load_adapter(model, start, name=ADAPTER, trainable=True)
            with self.progress.bar(stage, settings.steps or 0) as bar:
                train(model, data, settings, folder, meter=self.meter, progress=lambda done, of, line: bar.advance(1))

        return self.once(stage, make) / "adapter"

    def training(self, steps: int, batch_size: int, lr: float | None) -> Train:
        """The loop's settings; without ``lr`` 1e-4, or 5e-4 for students below 10 million parameters."""
        if lr is None:
            lr = 5e-4 if sum(p.numel() for p in self.loaded().model.parameters()) < 10_000_000 else 1e-4
        return Train(steps=steps, batch_size=batch_size, lr=lr, seed=self.seed, save_every=25)

    def stage(self, name: str) -> Path:
        """The folder of a stage's results."""
        folder = self.folder / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def once(self, stage: str, make: Callable[[Path], None]) -> Path:
        """A folder that ``make`` fills, whole or not at all; where it was stopped, it is given what it left.

        Of several processes that need it, one fills it and the others wait.
        """
        done = self.folder / "stages" / stage
        if not done.exists():
            working = done.with_name(f"{done.name}.working")
            with _alone(done):
                if not done.exists():
                    working.mkdir(parents=True, exist_ok=True)
                    make(working)
                    os.replace(working, done)
        return done

    def publish(self, stage: str, name: str) -> Path:
        """Copy a stage's folder to the top of the run, for people to take away."""
        target = self.folder / name
        temporary = target.with_name(f".{name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.folder / "stages" / stage, temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        return target


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold ``path`` against other processes: a lock beside it, which ends with this process however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unusable(problems: Sequence[Problem]) -> list[str]:
    """A note where problems cannot be graded, with the first one's reason."""
    missing = [p for p in problems if not p.gradable]
    if not missing:
        return []
    why = missing[0].meta.get("unparsable", "no gold answer")
    return [
        f"{len(missing)} of {len(problems)} problems cannot be graded and are never counted as right: they stand in no "
        f"accuracy (first: {missing[0].id}: {why})"
    ]


def verdict(setting: Setting, long: Setting, short: Setting | None, margin: float) -> dict[str, Any]:
    """Saving, non-inferiority and height above the straight line of one setting against the long baseline."""

    def arms(s: Setting) -> tuple[list[float], list[float]]:
        graded = [o for o in s.outcomes if o.problem.gradable]
        return [float(o.grade.right) for o in graded], [float(o.usage.thought) for o in graded]

    (right, tokens), (right_long, tokens_long) = arms(setting), arms(long)
    strata = [f"{o.problem.task} {o.problem.level}" for o in long.outcomes if o.problem.gradable]
    test = stats.non_inferior(right, right_long, margin, strata)
    spent, spent_long = (sum(o.usage.thought for o in s.outcomes) for s in (setting, long))
    saving = 1 - spent / max(1, spent_long)
    found: dict[str, Any] = {
        "setting": setting.name,
        "saving": saving,
        "difference": test.difference,
        "difference_low": test.low,
        "margin": margin,
        "non_inferior": bool(test.holds),
    }
    if short is not None and sum(arms(short)[1]) != sum(tokens_long):
        above = stats.above_line((right, tokens), (right_long, tokens_long), arms(short), strata)
        found |= {"above_line": above.value, "above_line_low": above.low, "above_line_high": above.high}
    return found


def choose(settings: Sequence[Setting], long: Setting, margin: float) -> tuple[str, list[dict[str, Any]]]:
    """Name of the shortest setting that is non-inferior to ``long``, else of the most accurate; and all verdicts."""
    verdicts = [verdict(s, long, None, margin) for s in settings]
    held = [v for v in verdicts if v["non_inferior"]]
    if held:
        return max(held, key=lambda v: v["saving"])["setting"], verdicts
    return max(verdicts, key=lambda v: (v["difference"], v["saving"]))["setting"], verdicts


def settings_of(method: Any) -> dict[str, Any]:
    """A method's fields as plain values, for the configuration file."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def _restore(path: Path, problems: Sequence[Problem]) -> dict[str, Outcome]:
    """Outcomes by problem of a shard that stands on disk; none where it is of other problems."""
    if not path.exists():
        return {}
    by_problem: dict[str, list[store.TraceRow]] = {}
    for row in store.read(path):
        by_problem.setdefault(row.problem, []).append(row)
    if not set(by_problem) <= {p.id for p in problems}:
        return {}
    costs = json.loads(_costs(path).read_text("utf-8")) if _costs(path).exists() else {}
    return {p.id: _outcome(p, by_problem[p.id], costs.get(p.id)) for p in problems if p.id in by_problem}


def _costs(path: Path) -> Path:
    """Beside a shard: what each problem cost, since its traces do not say what was read to score them."""
    return path.with_suffix(".usage.json")


def _outcome(problem: Problem, rows: Sequence[store.TraceRow], cost: Mapping[str, Any] | None) -> Outcome:
    traces = [_trace(row) for row in rows]
    chosen = next((i for i, row in enumerate(rows) if row.chosen), None)
    usage = sum((t.usage for t in traces), Usage()) if cost is None else Usage(**cost)
    if chosen is None:
        return Outcome(problem, None, Grade(0.0, None, "gave up"), traces, usage)
    row = rows[chosen]
    return Outcome(problem, traces[chosen], Grade(float(bool(row.right)), row.parsed), traces, usage)


def _trace(row: store.TraceRow) -> Trace:
    import numpy as np

    finish: Finish = row.finish  # type: ignore[assignment]
    cancelled = finish == "cancelled"
    kind: Literal["thought"] = "thought"
    ids = np.array(row.ids or [], np.int32)
    return Trace(
        ids=ids,
        thought=row.thought,
        response=row.response,
        closed=row.closed,
        finish=finish,
        answer=row.parsed,
        spans=(Span(0, row.thought_tokens, kind),),
        usage=Usage(
            prompt=row.prompt_tokens,
            cached=row.cached_tokens,
            thought=row.thought_tokens,
            answer=row.answer_tokens,
            injected=row.injected_tokens,
            latent=row.latent_tokens,
            partial=row.partial,
            discarded=row.thought_tokens + row.answer_tokens if cancelled else 0,
            calls=1,
            seconds=row.seconds,
        ),
        problem=row.problem,
    )
