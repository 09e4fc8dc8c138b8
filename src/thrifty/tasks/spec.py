"""What all sources of problems share: the spec's grammar, the split rule, and content keys.

The split rule: the blake2b hash of a question's normalised text (spacing and case put away) is a number in [0, 1);
the split is where it falls in ``FRACTIONS``. So the same question is never in two splits, whatever the seed, the
order of the rows or the file it stands in.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import numpy as np

from thrifty.contracts import Split, Task, ThriftyError

if TYPE_CHECKING:
    import datasets

SPLITS: tuple[Split, ...] = ("train", "calibration", "dev", "test")
FRACTIONS: Mapping[str, float] = {"train": 0.6, "calibration": 0.1, "dev": 0.1, "test": 0.2}
"""The share of questions in each split."""

EMBEDDED: Mapping[str, str] = {
    "roll": "a running value mod 10 through 3-7 operations",
    "search": "reach a target from numbers: depth-first with dead ends",
    "list": "operations on a fixed-width list",
    "bool": "evaluate a Boolean expression",
}
"""Task families that ship with the package, with one line each."""


@dataclass(frozen=True)
class Spec:
    """A parsed task name: ``kind`` is "embedded", "rg", "hf" or "file"."""

    text: str
    kind: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_spec(text: str) -> Spec:
    """Parse ``roll``, ``rg:NAME?key=value``, ``hf:DATASET[:CONFIG]?split=test`` or ``file:PATH?answer=COLUMN``."""
    text = text.strip()
    kind, colon, rest = text.partition(":")
    if not colon:
        kind, rest = "embedded", text
    elif kind not in ("rg", "hf", "file"):
        raise ThriftyError(
            f"unknown task {text!r}: {kind!r} is no source. {did_you_mean(kind, ('rg', 'hf', 'file'))}"
            f"Write {', '.join(EMBEDDED)}, rg:NAME, hf:DATASET[:CONFIG] or file:PATH."
        )
    name, _, query = rest.partition("?")
    if not name:
        raise ThriftyError(f"the task {text!r} names nothing; write for example roll, rg:chain_sum or file:x.jsonl")
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and not all("=" in part for part in query.split("&")):
        raise ThriftyError(f"cannot read the options of {text!r}; write ?key=value&key=value")
    return Spec(text, kind, name, dict(pairs))


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """ "Did you mean ...? " with the nearest known names, or "" where none is near."""
    known = list(known)
    near = difflib.get_close_matches(wrong.casefold(), known, 3, 0.5) or [name for name in known if wrong in name][:3]
    return f"Did you mean {' or '.join(near)}? " if near else ""


def normalised(text: str) -> str:
    """A question's content: spacing and case put away."""
    return " ".join(text.split()).casefold()


# ASCII text, the usual case, four times as fast: lower case, every kind of white space a space.
_ASCII = bytes(32 if chr(code).isspace() else ord(chr(code).lower()) for code in range(128)) + bytes(128)


_EMPTY = hashlib.blake2b(digest_size=8)


def content_digest(text: str) -> bytes:
    """Eight bytes of the normalised text's blake2b hash; b"" for a text without content."""
    if text.isascii():
        data = text.encode().translate(_ASCII).strip()
        if b"  " in data:
            data = b" ".join(data.split())
    else:
        data = normalised(text).encode("utf-8", "surrogatepass")
    if not data:
        return b""
    hashed = _EMPTY.copy()  # half the time of a new one
    hashed.update(data)
    return hashed.digest()


def content_key(text: str) -> int:
    """A 64-bit key of the normalised text: its digest, little-endian (0 for a text without content)."""
    return int.from_bytes(content_digest(text), "little")


_EDGES = np.cumsum([FRACTIONS[split] for split in SPLITS])[:-1]
_EDGES_64 = (_EDGES * 2.0**64).astype(np.uint64)


def split_codes(keys: np.ndarray) -> np.ndarray:
    """The index in ``SPLITS`` of every key: uint64 ``[N]`` -> uint8 ``[N]``."""
    return np.searchsorted(_EDGES_64, keys, side="right").astype(np.uint8)


def split_of(text: str) -> Split:
    """The split that the question belongs to."""
    return SPLITS[int(split_codes(np.array([content_key(text)], dtype=np.uint64))[0])]


def shuffled(keys: np.ndarray, seed: int) -> np.ndarray:
    """A sort key per content key for one seed: splitmix64 (Steele et al. 2014), uint64 ``[N]``."""
    with np.errstate(over="ignore"):
        z = keys + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def check_split(split: str) -> int:
    """The split's index in ``SPLITS``."""
    if split not in SPLITS:
        raise ThriftyError(f"unknown split {split!r}. {did_you_mean(split, SPLITS)}Splits are {', '.join(SPLITS)}.")
    return SPLITS.index(split)


def level_of(value: Any) -> int:
    """The first integer in a level ("Level 5", 5, "5"), 0 where there is none."""
    if isinstance(value, float) and value == value and abs(value) < 1e4:
        return int(value)
    found = re.search(r"\d{1,4}", str(value)) if value is not None else None
    return int(found[0]) if found else 0


def as_dataset(task: Task, split: Split, n: int, seed: int = 0) -> datasets.Dataset:
    """Problems as a ``datasets.Dataset``: id, question, answer, task, level, and chain where the source has one."""
    import datasets

    problems = task.problems(split, n, seed)
    rows: dict[str, list[Any]] = {
        "id": [problem.id for problem in problems],
        "question": [problem.prompt for problem in problems],
        "answer": [problem.answer for problem in problems],
        "task": [problem.task for problem in problems],
        "level": [problem.level for problem in problems],
        "chain": [problem.meta.get("chain") for problem in problems],
    }
    return datasets.Dataset.from_dict(rows)
