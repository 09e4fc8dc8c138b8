"""Traces on disk: what is written is read, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thrifty.contracts import Grade, Outcome, Problem, ThriftyError, Trace, Usage
from thrifty.traces.store import ROW_GROUP, TraceRow, read, rows_from, write


def trace(response: str, closed: bool = True, finish: str = "stop") -> Trace:
    usage = Usage(prompt=7, cached=3, thought=4, answer=2, injected=1, calls=1, seconds=0.25, latent=5, partial=1)
    ids = np.arange(7, dtype=np.int32)
    return Trace(ids, "1 + 4 = 5 .", response, closed, finish, answer=response or None, usage=usage)  # type: ignore[arg-type]


def three_tries(gold: str | None = "5") -> Outcome:
    tried = [trace("6"), trace("5"), trace("", False, "cancelled")]
    return Outcome(Problem("p/1", "1 + 4 = ?", gold, "sum", 2), tried[1], Grade(1.0, "5"), tried, Usage())


def exact(problem: Problem, response: str) -> Grade:
    return Grade(float(response == problem.answer), response or None)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = list(rows_from([three_tries()], "short-1@3", 0.5, ids=True))
    assert write(tmp_path / "traces.parquet", rows) == 3
    assert list(read(tmp_path / "traces.parquet")) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["traces.parquet"]


def test_rows_flag_the_chosen_and_grade_only_what_can_be_graded() -> None:
    rows = list(rows_from([three_tries()], "s"))
    assert [(r.chosen, r.right, r.parsed) for r in rows] == [(False, None, "6"), (True, True, "5"), (False, None, None)]
    rows = list(rows_from([three_tries()], "s", grade=exact))
    assert [r.right for r in rows] == [False, True, None], "a cancelled trace is incomplete, not wrong"
    assert {(r.prompt_tokens, r.cached_tokens, r.thought_tokens, r.answer_tokens, r.injected_tokens) for r in rows} == {
        (7, 3, 4, 2, 1)
    }
    assert {(r.latent_tokens, r.partial) for r in rows} == {(5, 1)}
    assert all(r.right is None for r in rows_from([three_tries(gold=None)], "s", grade=exact))


def test_a_chosen_trace_that_was_put_together_is_kept() -> None:
    outcome = three_tries()
    merged = Outcome(outcome.problem, trace("5"), Grade(1.0, "5"), outcome.tried, Usage())
    assert [r.chosen for r in rows_from([merged], "s")] == [False, False, False, True]


def test_rows_stream_through_in_row_groups(tmp_path: Path) -> None:
    seen = 0

    def many() -> Iterator[TraceRow]:
        nonlocal seen
        for outcome in [three_tries()] * (ROW_GROUP // 3 * 3):
            yield from rows_from([outcome], "s")
            seen += 3

    n = write(tmp_path / "t.parquet", many())
    assert n == seen == sum(1 for _ in read(tmp_path / "t.parquet"))
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == -(-n // ROW_GROUP)


def test_a_crash_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(path, rows_from([three_tries()], "old"))

    def crash() -> Iterator[TraceRow]:
        yield from rows_from([three_tries()], "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, crash())
    assert {r.setting for r in read(path)} == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match=r"none\.parquet: no such trace file"):
        read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(ThriftyError, match=r"text\.parquet: not a readable Parquet file"):
        read(tmp_path / "text.parquet")
    pq.write_table(pa.table({"question": ["1 + 4"], "setting": ["s"]}), tmp_path / "other.parquet")
    with pytest.raises(ThriftyError, match=r"no column alpha, problem.*it has question, setting"):
        read(tmp_path / "other.parquet")
    with pytest.raises(ThriftyError, match=r"text.parquet.t.parquet: cannot be written"):
        write(tmp_path / "text.parquet" / "t.parquet", [])


def test_a_file_cut_short_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(path, rows_from([three_tries()] * 500, "s"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ThriftyError, match=r"t\.parquet"):
        list(read(path))
    path.write_bytes(data[:4] + b"\xff" * 400 + data[404:])
    with pytest.raises(ThriftyError, match=r"t\.parquet: broken in the middle"):
        list(read(path))
