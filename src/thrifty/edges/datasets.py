"""A task as a ``datasets.Dataset`` that trl's trainers take.

>>> from thrifty.tasks import load
>>> rows = dataset(load("roll"), "test", 2, conversational=False)
>>> rows.column_names
['prompt', 'answer', 'level', 'id', 'task']
>>> rows[0]["prompt"] == load("roll").problems("test", 2)[0].prompt
True
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, Features, Value

from thrifty.contracts import Problem, Split, Task, ThriftyError


def dataset(
    task: Task,
    split: Split,
    n: int,
    seed: int = 0,
    levels: Sequence[int] | None = None,
    conversational: bool = True,
) -> Dataset:
    """``of_problems(task.problems(split, n, seed, levels), conversational)``."""
    return of_problems(task.problems(split, n, seed, levels), conversational)


def of_problems(problems: Sequence[Problem], conversational: bool = True) -> Dataset:
    """One row per problem: ``prompt``, ``answer`` (None where no gold is known), ``level``, ``id`` and ``task``.

    A conversational prompt is ``[{"role": "user", "content": ...}]``, which trl renders through the chat template, as
    our engines do; a plain one is the bare text, for models without a template. Raises ThriftyError where there is no
    problem or where two share an id: ``edges.trl`` finds a row's problem by it.
    """
    if not problems:
        raise ThriftyError("no problems to make a data set of: ask the task for some, or choose another split or level")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ThriftyError(f"two problems have the id {problem.id!r}: give every problem an id of its own")
        seen.add(problem.id)
    text = Value("string")
    turns = [{"role": text, "content": text}]
    features = {"answer": text, "level": Value("int64"), "id": text, "task": text}
    rows = {
        "prompt": [[{"role": "user", "content": p.prompt}] if conversational else p.prompt for p in problems],
        "answer": [p.answer for p in problems],
        "level": [p.level for p in problems],
        "id": [p.id for p in problems],
        "task": [p.task for p in problems],
    }
    return Dataset.from_dict(rows, features=Features({"prompt": turns if conversational else text, **features}))
