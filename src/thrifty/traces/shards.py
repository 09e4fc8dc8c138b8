"""Trace files as a stream of record batches: checked, filtered, thinned out, written in another shape.

Nothing here holds more than a batch of rows, beside one 64-bit key per row where rows are compared.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from thrifty.contracts import Finish, ThriftyError
from thrifty.files import aside
from thrifty.traces.store import SCHEMA

ROWS = 8192
"""Rows per batch."""
COUNTS = ("prompt_tokens", "cached_tokens", "thought_tokens", "answer_tokens", "injected_tokens", "latent_tokens")
_TOLD = 20
"""Faults named one by one; the rest is counted."""


@dataclass(frozen=True)
class Piece:
    """Rows ``[first, first + len(rows))`` of a file."""

    path: Path
    first: int
    rows: pa.RecordBatch


def files(paths: Sequence[str | Path]) -> list[Path]:
    """Trace files among ``paths``: files as they are, of a folder all Parquet files below it, in order of names.

    A run's ``stages`` are left out: its traces.parquet has the same rows.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.parquet") if "stages" not in p.relative_to(path).parts)
        if not inside:
            raise ThriftyError(
                f"{path}: no Parquet file in this folder; a finished run leaves traces.parquet in its own"
            )
        found += inside
    return found


def stream(paths: Iterable[Path]) -> Iterator[Piece]:
    """The rows of trace files. Raises ThriftyError that names the file (and row) where one is missing or broken."""
    for path in paths:
        if not path.is_file():
            raise ThriftyError(f"{path}: no such trace file; a finished run leaves traces.parquet in its folder")
        first = 0
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if missing := [name for name in SCHEMA.names if name not in names]:
                    raise ThriftyError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}")
                for batch in file.iter_batches(ROWS, columns=SCHEMA.names):
                    yield Piece(path, first, batch.select(SCHEMA.names).cast(SCHEMA))
                    first += len(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            what = f"broken after row {first:,} ({error}); make it anew"
            if not first:
                what = f"no Parquet file that can be read ({error}); give one as a run leaves it, traces.parquet"
            raise ThriftyError(f"{path}: {what}") from error


@dataclass
class Check:
    """What is wrong with traces, row by row; rows count from 1 within their file."""

    rows: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.look(piece)
            yield piece

    def look(self, piece: Piece) -> None:
        rows = piece.rows
        self.rows += len(rows)
        for name in COUNTS:
            self._note(piece, pc.less(rows[name], 0), f"{name} is negative")
        known = pc.is_in(rows["finish"], value_set=pa.array(get_args(Finish)))
        self._note(piece, pc.invert(known), f"finish is none of {', '.join(get_args(Finish))}")
        new = pc.add(pc.add(rows["thought_tokens"], rows["answer_tokens"]), rows["injected_tokens"])
        fewer = pc.and_(pc.less(pc.list_value_length(rows["ids"]), new), pc.equal(rows["partial"], 0))
        self._note(piece, pc.fill_null(fewer, False), "fewer token ids than tokens counted")
        again = []
        for key in keys(rows, ("setting", "problem", "sample"), str(piece.path)):
            again.append(key in self.seen)
            self.seen.add(key)
        self._note(piece, pa.array(again, pa.bool_()), "setting, problem and sample stand there already")

    def _note(self, piece: Piece, bad: pa.BooleanArray, what: str) -> None:
        at = pc.indices_nonzero(bad).to_pylist()
        if at:
            self.faults[what] += len(at)
            room = _TOLD - len(self.told)
            self.told += [f"{piece.path}, row {piece.first + i + 1:,}: {what}" for i in at[: max(0, room)]]

    def add(self, other: Check) -> None:
        """What another check found in files of its own."""
        self.rows += other.rows
        self.faults += other.faults
        self.told += other.told[: _TOLD - len(self.told)]


def keys(rows: pa.RecordBatch, columns: Sequence[str], salt: str = "") -> list[int]:
    """A 64-bit key of what stands in these columns, per row."""
    values = zip(*(rows[name].to_pylist() for name in columns))
    return [
        int.from_bytes(hashlib.blake2b(repr((salt, *value)).encode("utf-8", "replace"), digest_size=8).digest(), "big")
        for value in values
    ]


def where(test: Callable[[pa.RecordBatch], pa.BooleanArray]) -> Callable[[Iterable[Piece]], Iterator[Piece]]:
    """Keep the rows that a test says True of; null is no."""

    def kept(pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            yield Piece(piece.path, piece.first, piece.rows.filter(pc.fill_null(test(piece.rows), False)))

    return kept


def unique(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Of rows with the same prompt, chain and response the first."""
    seen: set[int] = set()
    for piece in pieces:
        new = []
        for key in keys(piece.rows, ("prompt", "thought", "response")):
            new.append(key not in seen)
            seen.add(key)
        yield Piece(piece.path, piece.first, piece.rows.filter(pa.array(new, pa.bool_())))


def sampled(share: float, seed: int) -> Callable[[Iterable[Piece]], Iterator[Piece]]:
    """About this share of the rows, chosen by what they are: the same ones whatever file and order they stand in."""
    if not 0 < share <= 1:
        raise ThriftyError(f"a share of {share:g} of the traces cannot be drawn: give one above 0, at most 1")
    bound = share * 2**64

    def drawn(pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            found = keys(piece.rows, ("setting", "problem", "sample", "thought"), str(seed))
            yield Piece(piece.path, piece.first, piece.rows.filter(pa.array([k < bound for k in found], pa.bool_())))

    return drawn


def messages(rows: pa.RecordBatch, tags: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Rows as trl's SFTTrainer takes them: ``{"messages": [user, assistant]}``, the chain between its tags."""
    opening, closing = tags
    for prompt, thought, response in zip(*(rows[name].to_pylist() for name in ("prompt", "thought", "response"))):
        said = f"{opening}{thought}{closing}{response}"
        yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]}


def write(path: Path, pieces: Iterable[Piece], tags: tuple[str, str] | None = None) -> int:
    """Write rows to ``path``, whole or not at all, and say how many.

    The name's ending says how: ``.parquet`` or ``.jsonl``. With ``tags`` the rows are messages (see ``messages``).
    """
    if path.suffix not in (".parquet", ".jsonl"):
        raise ThriftyError(f"{path}: the name must end in .parquet or .jsonl")
    with aside(path) as temporary:
        return (_parquet if path.suffix == ".parquet" else _jsonl)(temporary, pieces, tags)


def _jsonl(path: Path, pieces: Iterable[Piece], tags: tuple[str, str] | None) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for piece in pieces:
            for row in messages(piece.rows, tags) if tags else piece.rows.to_pylist():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += len(piece.rows)
    return written


_MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
_MESSAGES = pa.schema([pa.field("messages", pa.list_(_MESSAGE))])


def _parquet(path: Path, pieces: Iterable[Piece], tags: tuple[str, str] | None) -> int:
    written = 0
    with pq.ParquetWriter(path, _MESSAGES if tags else SCHEMA, compression="zstd") as writer:
        for piece in pieces:
            if len(piece.rows):
                rows = pa.RecordBatch.from_pylist(list(messages(piece.rows, tags)), _MESSAGES) if tags else piece.rows
                writer.write_batch(rows)
                written += len(piece.rows)
    return written


@dataclass
class Tally:
    """Rows, right ones, complete ones and tokens, by setting."""

    count: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    graded: Counter[str] = field(default_factory=Counter)
    complete: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            table = pa.Table.from_batches([piece.rows]).select(
                ["setting", "right", "closed", "finish", "thought_tokens"]
            )
            table = table.append_column("complete", pc.and_(table["closed"], pc.equal(table["finish"], "stop")))
            sums = table.group_by("setting").aggregate(
                [
                    ("right", "sum"),
                    ("right", "count"),
                    ("complete", "sum"),
                    ("thought_tokens", "sum"),
                    ([], "count_all"),
                ]
            )
            for row in sums.to_pylist():
                name = row["setting"]
                self.count[name] += row["count_all"]
                self.right[name] += row["right_sum"] or 0
                self.graded[name] += row["right_count"]
                self.complete[name] += row["complete_sum"] or 0
                self.tokens[name] += row["thought_tokens_sum"]
            yield piece
