"""Tables of rows, read by streaming: CSV and Parquet files here, JSON in ``jsonrows``, the hub's in ``hub``.

A table is scanned once (every row is checked, only positions are kept) and then asked for the few rows that are
needed. Rows are counted from 1; in a JSONL file row and line are the same.
"""

from __future__ import annotations

import csv
import itertools
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from thrifty.contracts import ThriftyError

MAX_ROW = 10 * 2**20
"""Bytes a row may have."""
BLOCK = 2**20
BOM = b"\xef\xbb\xbf"
PEEK = 50
"""Rows looked at to find the columns."""

Row = dict[str, Any]


class Table(Protocol):
    """Rows with named columns. ``position`` is what ``fetch`` wants back; ``row`` counts from 1."""

    name: str

    def peek(self) -> list[Row]:
        """The first rows."""
        ...

    def columns(self) -> list[str]:
        """The names of the columns, in order."""
        ...

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """Every row as (position, row, the values of ``columns``, None where missing)."""
        ...

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        """The rows at these positions, in the order asked for."""
        ...


def blocks(path: Path, noun: str, start: int = 0, size: int = BLOCK) -> Iterator[tuple[int, list[bytes]]]:
    """(offset, whole lines with their ends) from an offset on, about ``size`` bytes at a time."""

    def check(line: bytes) -> None:
        if len(line) > MAX_ROW:
            raise ThriftyError(
                f"{path}: {noun} {done + 1} is longer than {MAX_ROW >> 20} MB. Are its line ends lost? "
                "Cut that row, or delete it."
            )

    done, rest = 0, b""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(size):
            end = block.rfind(b"\n") + 1
            if end == 0:
                rest += block
                check(rest)
                continue
            # Not splitlines: it also splits at a carriage return.
            lines = [line + b"\n" for line in (rest + block[:end]).split(b"\n")[:-1]]
            rest = block[end:]
            check(lines[0])
            yield start, lines
            start, done = start + sum(map(len, lines)), done + len(lines)
    if rest:
        yield start, [rest]


def not_utf8(name: str, place: str, error: UnicodeDecodeError, start: int) -> ThriftyError:
    """The error for a byte that is not UTF-8, ``start`` bytes into the file."""
    byte = error.object[error.start]
    return ThriftyError(
        f"{name}: {place} is not UTF-8: byte 0x{byte:02x} at byte {start + error.start} of the file. "
        f"Convert it, for example: iconv -f latin1 -t utf-8 {Path(name).name} > fixed{Path(name).suffix}"
    )


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change: a file that has another stamp was changed."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


class Csv:
    """Comma-, semicolon- or tab-separated with a header; positions are byte offsets of a record's first line."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._stat = stamp(path)
        with path.open("rb") as file:
            head = file.readline(MAX_ROW).removeprefix(BOM).decode(errors="replace")
        self.delimiter = max(",;\t", key=head.count)
        _, _, header = next(self._records(), (0, 0, []))
        self._header = [name.strip() for name in header]
        if not any(self._header):
            raise ThriftyError(f"{self.name}: the first line is blank; it must name the columns.")
        twice = [name for i, name in enumerate(self._header) if name and name in self._header[:i]]
        if twice:
            raise ThriftyError(f"{self.name} has two columns called {twice[0]!r}; rename one.")

    def _records(self, position: int = 0, block: int = BLOCK) -> Iterator[tuple[int, int, list[str]]]:
        """(offset, row, fields) of the records from an offset on; from the start on the header is row 0."""
        offsets = array("q")

        def lines() -> Iterator[str]:
            for start, batch in blocks(self.path, "line", position, block):
                offsets.extend(itertools.accumulate(map(len, batch), initial=start))
                offsets.pop()
                if start == 0:
                    batch[0] = batch[0].removeprefix(BOM)
                yield from map(bytes.decode, batch)

        csv.field_size_limit(MAX_ROW)
        reader = csv.reader(lines(), delimiter=self.delimiter, strict=True)
        row = before = 0
        try:
            for fields in reader:
                if fields:
                    yield offsets[before], row, fields
                    row += 1
                before = reader.line_num
        except UnicodeDecodeError as error:
            line = reader.line_num
            raise not_utf8(self.name, f"line {line + 1}", error, offsets[line]) from error
        except csv.Error as error:
            raise ThriftyError(
                f"{self.name}: row {row} (it begins on line {before + 1}) is not valid CSV: {error}. "
                'Is a quote left open or not doubled ("")?'
            ) from error

    def peek(self) -> list[Row]:
        names = tuple(self._header)
        return [dict(zip(names, values)) for _, (_, _, values) in zip(range(PEEK), self.scan(names))]

    def columns(self) -> list[str]:
        return [name for name in self._header if name]

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        width = len(self._header)
        places = [self._header.index(name) for name in columns]
        for position, row, fields in self._records():
            if row == 0:
                continue
            if len(fields) != width:
                if any(fields[width:]):
                    raise ThriftyError(
                        f"{self.name}: row {row} has {len(fields)} fields, the header has {width}. "
                        f"Put quotes around a text that holds {self.delimiter!r}."
                    )
                fields = (fields + [""] * width)[:width]
            yield position, row, tuple(map(fields.__getitem__, places))

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        if stamp(self.path) != self._stat:
            raise ThriftyError(f"{self.name} changed while it was in use. Start again when it is complete.")
        rows: dict[int, Row] = {}
        for position in sorted(set(positions)):
            rows[position] = dict(zip(self._header, next(self._records(position, block=2**14))[2]))
        return [rows[position] for position in positions]


class Parquet:
    """A Parquet file; positions are row numbers from 0."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path, self.name = path, str(path)
        try:
            self._file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ThriftyError(
                f"{self.name} is not a readable Parquet file: {str(error)[:200]}. Write it again."
            ) from error

    def peek(self) -> list[Row]:
        return [row for batch in self._batches(None, PEEK, once=True) for row in batch.to_pylist()]

    def columns(self) -> list[str]:
        return list(self._file.schema_arrow.names)

    def _batches(self, columns: Sequence[str] | None, size: int = 8192, once: bool = False) -> Iterator[Any]:
        import pyarrow

        try:
            for batch in self._file.iter_batches(size, columns=None if columns is None else list(columns)):
                yield batch
                if once:
                    return
        except (pyarrow.ArrowException, OSError) as error:
            raise ThriftyError(f"{self.name} is damaged: {str(error)[:200]}. Write it again.") from error

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        names, first = list(dict.fromkeys(columns)), 0
        for batch in self._batches(names):
            lists = [batch.column(name).to_pylist() for name in columns]
            for i, values in enumerate(zip(*lists)):
                yield first + i, first + i + 1, values
            first += batch.num_rows

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        wanted, first = sorted(set(positions)), 0
        rows: dict[int, Row] = {}
        for batch in self._batches(None):
            here = [p - first for p in wanted if first <= p < first + batch.num_rows]
            if here:
                rows.update(zip((p + first for p in here), batch.take(here).to_pylist()))
            first += batch.num_rows
            if len(rows) == len(wanted):
                break
        return [rows[position] for position in positions]
