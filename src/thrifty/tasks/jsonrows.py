"""Rows of JSON: one object a line (JSONL), or an array of objects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thrifty.contracts import ThriftyError
from thrifty.tasks.tables import BOM, MAX_ROW, PEEK, Row, blocks, not_utf8, stamp


class JsonLines:
    """One JSON object a line; positions are byte offsets."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._stat = stamp(path)

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
                yield position, row, tuple(map(value.get, names)) if names else (value,)

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
        if stamp(self.path) != self._stat:
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


def is_lines(path: Path) -> bool:
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
