"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thrifty.contracts import ThriftyError


@contextlib.contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to, renamed to it when the block ends well; folders are made.

    Raises ThriftyError that names the path where that cannot be done; what stood there before then still does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ThriftyError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text, as ``aside`` does."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """``write_text`` of JSON, a line per item, as people read it."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
