"""What lets a loop stop and go on: checkpoints as JSON and safetensors (no pickle), written aside, then renamed.

A folder ``step-00000100`` holds the state after 100 steps. It appears whole or not at all, so a kill at any moment
leaves the one before it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from thrifty.contracts import ThriftyError
from thrifty.files import write_text


def save(root: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``state`` (dicts, lists, tensors, arrays, JSON values) as the checkpoint of ``step``; keep ``keep``.

    A full disk raises ``ThriftyError`` and leaves the earlier checkpoints as they were.
    """
    folder = root / f"step-{step:08d}"
    if folder.exists():
        return folder
    work = root / f".{folder.name}.{os.getpid()}"
    tensors: dict[str, Tensor] = {}
    plain = _split(state, "", tensors)
    try:
        with disk(folder):
            work.mkdir(parents=True, exist_ok=True)
            save_file(tensors, work / "state.safetensors")
            (work / "state.json").write_text(json.dumps(plain), encoding="utf-8")
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(root: Path) -> Path | None:
    """The newest checkpoint under ``root``; what a killed run left half-written is cleared away."""
    for left in root.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    return next(reversed(_folders(root)), None)


def load(folder: Path) -> dict[str, Any]:
    """The state that ``save`` wrote; arrays come back as tensors. Raises ``ThriftyError`` naming a damaged folder."""
    try:
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state: dict[str, Any] = _join(plain, load_file(folder / "state.safetensors"))
    except Exception as error:  # safetensors raises its own kinds
        raise ThriftyError(
            f"checkpoint {folder} cannot be read ({error}): delete that folder to go on from an earlier one"
        ) from error
    return state


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn a full disk, met while writing ``path``, into a ``ThriftyError`` that says what to do."""
    try:
        yield
    except Exception as error:
        # safetensors reports the same fault in words.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full:
            raise
        raise ThriftyError(
            f"no space left on the disk while writing {path}: free some and run the same command again; "
            "it goes on from the last checkpoint, which is untouched"
        ) from error


def trim(log: Path, done: int) -> list[dict[str, float]]:
    """Start or shorten the log to its first ``done`` steps: a killed run logs beyond its checkpoint."""
    text = log.read_text(encoding="utf-8").splitlines()[:done] if log.exists() else []
    with disk(log):
        write_text(log, "".join(f"{line}\n" for line in text))
    return [json.loads(line) for line in text]


def cost(folder: Path) -> dict[str, float]:
    """What the finished training in ``folder`` took: values trained, tokens (of a rollout: sampled), FLOPs, seconds."""
    [log] = [path for path in (folder / "train.jsonl", folder / "rollout.jsonl") if path.exists()]
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = latest(folder / "checkpoints")
    if last is None:
        raise ThriftyError(f"{folder} holds no finished training: its checkpoints are missing")
    return {
        "trained_parameters": sum(value.numel() for value in load(last)["weights"].values()),
        "training_tokens": sum(line["tokens"] for line in lines),
        "training_flops": sum(line["flops"] for line in lines),
        "training_seconds": sum(line["seconds"] for line in lines),
    }


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of the step; a second one stops at once. Yields whether it was pressed."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nfinishing this step and saving a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _folders(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors moved to ``tensors`` and references in their place."""
    if isinstance(value, Tensor | np.ndarray):
        tensors[path] = torch.as_tensor(value).detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):  # as pairs: JSON would turn an optimiser's integer keys into strings
        return {"items": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _join(item, tensors) for key, item in value["items"]}
    return [_join(item, tensors) for item in value] if isinstance(value, list) else value
