"""Tables of rows, read by streaming: JSONL, JSON, CSV and Parquet files.

A table is scanned once (every row is checked, only positions are kept) and then asked for the few rows that are
needed. Rows are counted from 1; in a JSONL file row and line are the same.
"""

from __future__ import annotations

import csv
import itertools
import json
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


def open_table(path: Path) -> Table:
    """The table in a file, by its suffix. Every mistake about the path is a ``ThriftyError`` with the remedy."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.casefold() in KINDS)
        hint = f"Name one of its files: {', '.join(inside[:10])}." if inside else "It holds no data file."
        raise ThriftyError(f"{path} is a directory, not a file. {hint} (A data set folder loads as hf:{path}.)")
    if not path.exists():
        near = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        names = [p.name for p in near if p.suffix.casefold() in KINDS]
        here = f"Its folder has: {', '.join(names[:10])}." if names else "Its folder has no data file either."
        raise ThriftyError(f"{path} does not exist. {here} Check the path (it is relative to {Path.cwd()}).")
    if not path.is_file():
        raise ThriftyError(f"{path} is not a regular file; save the data to a file first.")
    try:
        if path.stat().st_size == 0:
            raise ThriftyError(f"{path} is empty (0 bytes): write one problem a line, or check the export.")
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise ThriftyError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ThriftyError(f"{path} is UTF-16. Convert it: iconv -f utf-16 -t utf-8 {path.name} > fixed{path.suffix}")
    if head[:2] == b"\x1f\x8b":
        raise ThriftyError(f"{path} is compressed with gzip. Unpack it first: gunzip -k {path.name}")
    suffix = path.suffix.casefold()
    if suffix not in KINDS:
        raise ThriftyError(f"{path}: unknown kind of file {suffix!r}; the suffix must be one of {', '.join(KINDS)}.")
    if suffix == ".json" and head.removeprefix(BOM).lstrip()[:1] != b"[" and _is_lines(path):
        return JsonLines(path)
    return KINDS[suffix](path)


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


class JsonLines:
    """One JSON object a line; positions are byte offsets."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._stat = _stamp(path)

    def peek(self) -> list[Row]:
        return [values[0] for _, (_, _, values) in zip(range(PEEK), self.scan(()))]

    def columns(self) -> list[str]:
        return list(dict.fromkeys(str(key) for row in self.peek() for key in row))

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """As ``Table.scan``; without columns the value is the whole row."""
        names, row = tuple(columns), 0
        for start, lines in blocks(self.path, "row"):
            positions = itertools.accumulate(map(len, lines), initial=start)
            for line, position, value in zip(lines, positions, _loads_all(lines)):
                row += 1
                if type(value) is not dict:
                    if row == 1:
                        line = line.removeprefix(BOM)
                    if not line.strip():
                        continue
                    value = self._parse(line, row, position)
                yield position, row, tuple([value.get(name) for name in names]) if names else (value,)

    def _parse(self, line: bytes, row: int, start: int) -> Row:
        """One line as an object, or an error that says what is wrong with it."""
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise not_utf8(self.name, f"row {row}", error, start) from error
        except json.JSONDecodeError as error:
            shown = line.decode()[max(0, error.pos - 20) : error.pos + 20].strip()
            raise ThriftyError(
                f"{self.name}: row {row} is not valid JSON: {error.msg} at character {error.colno}, near {shown!r}. "
                "Mend that line, or delete it."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ThriftyError(
                f"{self.name}: row {row} is not usable JSON: {str(error)[:100]}. Mend that line, or delete it."
            ) from error
        if not isinstance(value, dict):
            raise ThriftyError(
                f"{self.name}: row {row} is {_kind(value)}, not an object. Write every row as "
                '{"question": ..., "answer": ...}.'
            )
        return value

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        if _stamp(self.path) != self._stat:
            raise ThriftyError(f"{self.name} changed while it was in use. Start again when it is complete.")
        rows: dict[int, Row] = {}
        with self.path.open("rb") as file:
            for position in sorted(set(positions)):
                file.seek(position)
                rows[position] = json.loads(file.readline().removeprefix(BOM if position == 0 else b""))
        return [rows[position] for position in positions]


class JsonArray:
    """A JSON array of objects, or an object with one list of objects in it; read whole, positions are indices."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        data = path.read_bytes().removeprefix(BOM)
        try:
            value = json.loads(data.decode())
        except UnicodeDecodeError as error:
            raise not_utf8(self.name, f"line {data.count(10, 0, error.start) + 1}", error, 0) from error
        except json.JSONDecodeError as error:
            row = f", in row {_items_before(data.decode(), error.pos) + 1}" if data.lstrip()[:1] == b"[" else ""
            raise ThriftyError(
                f"{self.name} is not valid JSON: {error.msg} at line {error.lineno}, character {error.colno}{row}. "
                "Mend it there."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ThriftyError(f"{self.name} is not usable JSON: {str(error)[:100]}. Mend it.") from error
        if isinstance(value, dict):
            lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
            if len(lists) != 1:
                raise ThriftyError(
                    f"{self.name} holds one object with the keys {', '.join(map(str, value)) or '(none)'}, not a list "
                    "of rows. Write [{...}, {...}], or one object a line in a .jsonl file."
                )
            value = lists[0]
        if not isinstance(value, list):
            raise ThriftyError(f"{self.name} holds {_kind(value)}, not a list of rows. Write [{{...}}, {{...}}].")
        for i, row in enumerate(value):
            if not isinstance(row, dict):
                raise ThriftyError(
                    f"{self.name}: row {i + 1} is {_kind(row)}, not an object. Write every row as "
                    '{"question": ..., "answer": ...}.'
                )
        self._rows: list[Row] = value

    def peek(self) -> list[Row]:
        return self._rows[:PEEK]

    def columns(self) -> list[str]:
        return list(dict.fromkeys(str(key) for row in self.peek() for key in row))

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        for i, row in enumerate(self._rows):
            yield i, i + 1, tuple(row.get(name) for name in columns)

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        return [self._rows[position] for position in positions]


class Csv:
    """Comma-, semicolon- or tab-separated with a header; positions are byte offsets of a record's first line."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._stat = _stamp(path)
        with path.open("rb") as file:
            head = file.readline(MAX_ROW).removeprefix(BOM).decode(errors="replace")
        self.delimiter = max(",;\t", key=head.count)
        _, _, header = next(self._records(), (0, 0, []))
        self._header = [name.strip() for name in header]
        if not any(self._header):
            raise ThriftyError(f"{self.name}: the first line is blank; it must name the columns.")

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
        places = [self._header.index(name) if name in self._header else width for name in columns]
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
            yield position, row, tuple([fields[i] if i < width else None for i in places])

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        if _stamp(self.path) != self._stat:
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


KINDS: dict[str, Any] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonArray,
    ".csv": Csv,
    ".tsv": Csv,
    ".parquet": Parquet,
}


def not_utf8(name: str, place: str, error: UnicodeDecodeError, start: int) -> ThriftyError:
    """The error for a byte that is not UTF-8, ``start`` bytes into the file."""
    byte = error.object[error.start]
    return ThriftyError(
        f"{name}: {place} is not UTF-8: byte 0x{byte:02x} at byte {start + error.start} of the file. "
        f"Convert it, for example: iconv -f latin1 -t utf-8 {Path(name).name} > fixed{Path(name).suffix}"
    )


def _loads_all(lines: list[bytes]) -> list[Any]:
    """The lines' JSON values, parsed a thousand lines at a time (five times as fast as one by one).

    None for a line that has to be looked at by itself: every line of a batch that is not valid as a whole.
    """
    mark = "end of line"
    between = f',"{mark}",'.encode()
    values: list[Any] = []
    for first in range(0, len(lines), 1000):
        batch = lines[first : first + 1000]
        try:
            parsed = json.loads("[" + between.join(batch).decode() + "]")
        except (ValueError, RecursionError):
            parsed = []
        # Between any two lines' values stands the mark, unless values begin or end within a line.
        whole = len(parsed) == 2 * len(batch) - 1 and parsed[1::2].count(mark) == len(batch) - 1
        values += parsed[::2] if whole else [None] * len(batch)
    return values


def _stamp(path: Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _kind(value: Any) -> str:
    names = {
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _is_lines(path: Path) -> bool:
    """Whether a .json file holds an object a line: its first line with text is one object by itself."""
    with path.open("rb") as file:
        lines = (line for line in iter(lambda: file.readline(MAX_ROW), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        value = json.loads(first.removeprefix(BOM))
    except ValueError:
        return False
    return isinstance(value, dict) and (
        bool(second) or not any(isinstance(v, list) and v and isinstance(v[0], dict) for v in value.values())
    )


def _items_before(text: str, stop: int) -> int:
    """How many complete items of a JSON array stand before a place in its text."""
    decoder, at, items = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except ValueError:
            return items
        if at > stop:
            return items
        items += 1
