"""Several tasks as one, and a task with an upper limit of problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thrifty.contracts import Grade, Problem, Split, Task, ThriftyError
from thrifty.tasks.spec import as_dataset

if TYPE_CHECKING:
    import datasets


class Mixture:
    """Problems of several tasks in turn; each is graded by its own task."""

    def __init__(self, name: str, tasks: Sequence[Task]) -> None:
        self.name = name
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks):
            raise ThriftyError(f"the mixture {name} names a task twice; name each once.")
        self.levels = tuple(sorted({level for task in tasks for level in task.levels}))

    def problems(self, split: Split, n: int, seed: int = 0, levels: Sequence[int] | None = None) -> list[Problem]:
        """``n`` problems, evenly over the tasks; where one has no more the others give more."""
        share = -(-n // len(self.tasks))
        pools = [task.problems(split, share, seed, levels) for task in self.tasks.values()]
        if sum(map(len, pools)) < n:
            pools = [task.problems(split, n, seed, levels) for task in self.tasks.values()]
        longest = max(map(len, pools), default=0)
        return [pool[i] for i in range(longest) for pool in pools if i < len(pool)][:n]

    def parse(self, response: str) -> str | None:
        """The first answer that a task of the mixture finds."""
        return next((found for task in self.tasks.values() if (found := task.parse(response)) is not None), None)

    def grade(self, problem: Problem, response: str) -> Grade:
        """The grade by the problem's own task."""
        if problem.task not in self.tasks:
            raise ThriftyError(f"problem {problem.id} is of task {problem.task!r}, not of {self.name}.")
        return self.tasks[problem.task].grade(problem, response)

    def notes(self) -> list[str]:
        """What a report should say about the sources."""
        return [f"{task.name}: {note}" for task in self.tasks.values() for note in getattr(task, "notes", list)()]

    @property
    def unparsable(self) -> int:
        """Gold answers that cannot be parsed, in all sources."""
        return sum(getattr(task, "unparsable", 0) for task in self.tasks.values())

    def as_dataset(self, split: Split, n: int, seed: int = 0) -> datasets.Dataset:
        """Problems as a ``datasets.Dataset``."""
        return as_dataset(self, split, n, seed)


class Limited:
    """A task that gives at most ``most`` problems a call."""

    def __init__(self, task: Task, most: int) -> None:
        self.task, self.most = task, most
        self.name, self.levels = task.name, task.levels
        self.parse, self.grade = task.parse, task.grade

    def problems(self, split: Split, n: int, seed: int = 0, levels: Sequence[int] | None = None) -> list[Problem]:
        return self.task.problems(split, min(n, self.most), seed, levels)

    def notes(self) -> list[str]:
        return list(getattr(self.task, "notes", list)())

    @property
    def unparsable(self) -> int:
        return int(getattr(self.task, "unparsable", 0))

    def as_dataset(self, split: Split, n: int, seed: int = 0) -> datasets.Dataset:
        return as_dataset(self, split, n, seed)
