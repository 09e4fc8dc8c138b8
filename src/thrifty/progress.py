"""Progress on the terminal: bars where somebody watches, a line now and then where a log is written."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    def advance(self, steps: float) -> None: ...


class _Silent:
    def advance(self, steps: float) -> None:
        pass


class _Lines:
    """A line at the start, every ten seconds, and at the end."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0.0
        self.started = self.told = time.monotonic()

    def advance(self, steps: float) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.told > 10 or self.done >= self.total:
            self.told = now
            print(
                f"  {self.label}: {self.done:.0f}/{self.total}, {now - self.started:.0f} s", file=sys.stderr, flush=True
            )


class Progress:
    """Says what is going on, on standard error. Without ``bars`` for one of several processes at a terminal."""

    def __init__(self, quiet: bool = False, bars: bool = True):
        self.quiet, self.bars = quiet, bars and not quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        if not self.bars:
            yield _Silent()
        elif not sys.stderr.isatty():
            yield _Lines(label, total)
        else:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("  {task.description:<34}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with RichProgress(*columns, console=Console(stderr=True)) as rich:
                task = rich.add_task(label, total=total)
                yield _RichBar(rich, task)


class _RichBar:
    def __init__(self, rich: object, task: object):
        self.rich, self.task = rich, task

    def advance(self, steps: float) -> None:
        self.rich.advance(self.task, steps)  # type: ignore[attr-defined]
