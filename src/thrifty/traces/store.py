"""Traces on disk: one Parquet file, one row per tried trace, written at once or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from thrifty.contracts import Grade, Outcome, Problem, ThriftyError, Trace
from thrifty.files import aside

ROW_GROUP = 2048


@dataclass(frozen=True)
class TraceRow:
    """One tried trace of one problem under one setting. Token counts are those of the trace alone."""

    setting: str
    alpha: float | None
    """Adapter strength; None where the setting has no dial."""
    problem: str
    task: str
    level: int
    prompt: str
    gold: str | None
    sample: int
    """Index among the traces tried for this problem."""
    chosen: bool
    """Whether the strategy answered with this trace."""
    thought: str
    response: str
    parsed: str | None
    right: bool | None
    """None: not graded (not chosen, and no grader was given; or not gradable)."""
    closed: bool
    finish: str
    prompt_tokens: int
    cached_tokens: int
    thought_tokens: int
    answer_tokens: int
    injected_tokens: int
    seconds: float
    ids: list[int] | None = None
    """The response's token ids, where kept."""
    latent_tokens: int = 0
    partial: int = 0
    """Calls whose counts the engine could not tell in full: the counts above are then lower bounds."""


SCHEMA = pa.schema(
    [
        pa.field("setting", pa.string(), nullable=False),
        pa.field("alpha", pa.float64()),
        pa.field("problem", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("level", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("gold", pa.string()),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("chosen", pa.bool_(), nullable=False),
        pa.field("thought", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("parsed", pa.string()),
        pa.field("right", pa.bool_()),
        pa.field("closed", pa.bool_(), nullable=False),
        pa.field("finish", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("thought_tokens", pa.int32(), nullable=False),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("injected_tokens", pa.int32(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("latent_tokens", pa.int32(), nullable=False),
        pa.field("partial", pa.int32(), nullable=False),
    ],
    metadata={"thrifty.traces": "1"},
)
_NAMES = tuple(f.name for f in fields(TraceRow))


def rows_from(
    outcomes: Sequence[Outcome],
    setting: str,
    alpha: float | None = None,
    grade: Callable[[Problem, str], Grade] | None = None,
    ids: bool = False,
) -> Iterator[TraceRow]:
    """Rows of every tried trace, the chosen one flagged.

    ``grade`` (a task's) grades the traces that were tried and not chosen; without it their ``right`` is None. ``ids``
    keeps the token ids.
    """
    for outcome in outcomes:
        tried = list(outcome.tried)
        if outcome.chosen is not None and not any(t is outcome.chosen for t in tried):
            tried.append(outcome.chosen)
        for sample, trace in enumerate(tried):
            yield _row(outcome, trace, sample, setting, alpha, grade, ids)


def write(path: str | Path, rows: Iterable[TraceRow]) -> int:
    """Write rows in row groups, streaming; returns how many. The file appears whole or not at all.

    Raises ThriftyError where the folder cannot be made or the disk is full; nothing is left behind then.
    """
    written, iterator = 0, iter(rows)
    with aside(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        while batch := list(islice(iterator, ROW_GROUP)):
            columns = {name: [getattr(row, name) for row in batch] for name in _NAMES}
            writer.write_table(pa.Table.from_pydict(columns, schema=SCHEMA), row_group_size=ROW_GROUP)
            written += len(batch)
    return written


def read(path: str | Path) -> Iterator[TraceRow]:
    """Rows of a trace file, streaming. The file is checked at once, not at the first row.

    Raises ThriftyError that names the file where it is missing, broken or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ThriftyError(f"{path}: no such trace file; a finished run leaves traces.parquet in its folder")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ThriftyError(f"{path}: not a readable Parquet file ({error}); run again to make it anew") from error
    missing = [name for name in _NAMES if name not in file.schema_arrow.names]
    if missing:
        file.close()
        raise ThriftyError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. "
            "Write it with thrifty.traces.store.write"
        )
    return _stream(path, file)


def _stream(path: Path, file: pq.ParquetFile) -> Iterator[TraceRow]:
    with file:
        try:
            for batch in file.iter_batches(ROW_GROUP, columns=list(_NAMES)):
                for row in batch.to_pylist():
                    yield TraceRow(**row)
        except (pa.ArrowException, OSError) as error:
            raise ThriftyError(f"{path}: broken in the middle ({error}); run again to make it anew") from error


def _row(
    outcome: Outcome,
    trace: Trace,
    sample: int,
    setting: str,
    alpha: float | None,
    grade: Callable[[Problem, str], Grade] | None,
    ids: bool,
) -> TraceRow:
    problem, chosen = outcome.problem, trace is outcome.chosen
    verdict = outcome.grade if chosen else grade(problem, trace.response) if grade and trace.complete else None
    graded = verdict is not None and problem.gradable
    return TraceRow(
        setting=setting,
        alpha=alpha,
        problem=problem.id,
        task=problem.task,
        level=problem.level,
        prompt=problem.prompt,
        gold=problem.answer,
        sample=sample,
        chosen=chosen,
        thought=trace.thought,
        response=trace.response,
        parsed=verdict.parsed if verdict is not None else trace.answer,
        right=verdict.right if verdict is not None and graded else None,
        closed=trace.closed,
        finish=trace.finish,
        prompt_tokens=trace.usage.prompt,
        cached_tokens=trace.usage.cached,
        thought_tokens=trace.usage.thought,
        answer_tokens=trace.usage.answer,
        injected_tokens=trace.usage.injected,
        latent_tokens=trace.usage.latent,
        partial=trace.usage.partial,
        seconds=trace.usage.seconds,
        ids=[int(i) for i in trace.ids] if ids else None,
    )
