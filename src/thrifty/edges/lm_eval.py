"""A task in lm-evaluation-harness: a folder for ``--include_path`` with a YAML file and a small module.

>>> export("tasks", "roll", n=100)                                             # doctest: +SKIP
'thrifty_roll'

    lm-eval run --model local-chat-completions --model_args model=NAME,base_url=http://.../v1/chat/completions \\
        --include_path tasks --tasks thrifty_roll --apply_chat_template
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thrifty import tasks
from thrifty.contracts import Grade, Problem, Split, Task, ThriftyError
from thrifty.files import write_text
from thrifty.models.chat import ChatFormat

YAML = """\
task: {name}
custom_dataset: !function {name}.dataset
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
process_results: !function {name}.process_results
generation_kwargs:
  until: []
  temperature: {temperature}
  do_sample: {sample}
  max_gen_toks: {max_tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
  - metric: complete
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

MODULE = '''\
"""The problems of {spec} and their checker. Written by thrifty.edges.lm_eval.export."""

from thrifty.edges.lm_eval import Exported

EXPORTED = {exported!r}


def dataset(**unused):
    return EXPORTED.dataset()


def process_results(doc, results):
    return EXPORTED.process_results(doc, results)
'''


def export(
    folder: str | Path,
    spec: str,
    split: Split = "test",
    n: int = 500,
    seed: int = 0,
    levels: Sequence[int] | None = None,
    question: str | None = None,
    answer: str | None = None,
    max_tokens: int = 4096,
    temperature: float = 0.0,
) -> str:
    """Write ``FOLDER/NAME.yaml`` and ``FOLDER/NAME.py``; returns NAME, for ``--tasks``.

    ``spec``, ``question`` and ``answer`` are those of ``thrifty.tasks.load``: lm-eval makes the problems anew, so a
    relative ``file:PATH`` is written as an absolute one. Raises ThriftyError where there are none or one cannot be
    graded.
    """
    if spec.startswith("file:"):
        path, mark, query = spec.removeprefix("file:").partition("?")
        spec = f"file:{Path(path).expanduser().resolve()}{mark}{query}"
    exported = Exported(spec, split, n, seed, None if levels is None else tuple(levels), question, answer)
    exported.dataset()
    name = "thrifty_" + re.sub(r"\W+", "_", Path(spec).stem if spec.startswith("file:") else spec).strip("_")
    text = YAML.format(
        name=name, temperature=float(temperature), sample=str(temperature > 0).lower(), max_tokens=max_tokens
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / f"{name}.py", MODULE.format(spec=spec, exported=exported))
    write_text(Path(folder) / f"{name}.yaml", text)
    return name


@dataclass(frozen=True)
class Exported:
    """What an exported module stands on: problems by what they are made from."""

    spec: str
    split: Split
    n: int
    seed: int
    levels: tuple[int, ...] | None = None
    question: str | None = None
    answer: str | None = None

    @cached_property
    def task(self) -> Task:
        return tasks.load(self.spec, question=self.question, answer=self.answer)

    @cached_property
    def problems(self) -> Mapping[str, Problem]:
        found = self.task.problems(self.split, self.n, self.seed, self.levels)
        if lacking := [p.id for p in found if not p.gradable]:
            raise ThriftyError(f"{len(lacking)} problems of {self.spec} cannot be graded (first: {lacking[0]})")
        return {p.id: p for p in found}

    def dataset(self) -> dict[str, Any]:
        """``{"test": Dataset}`` with prompt, answer, level, id and task."""
        from thrifty.edges.datasets import of_problems

        found = of_problems(list(self.problems.values()), conversational=False)
        return {"test": found.map(lambda row: {"answer": row["answer"] or ""})}

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """``exact_match`` by the task's checker, and ``complete``: whether the chain was closed."""
        grade = self.grade(doc, results[0])
        return {"exact_match": float(grade.right), "complete": float(grade.message != "incomplete")}

    def grade(self, doc: Mapping[str, Any], text: str) -> Grade:
        """Grade the response, never the chain; an open chain is incomplete, which lm-eval cannot tell otherwise."""
        _, response, closed = ChatFormat(None).split(text)
        if not closed or not response:
            return Grade(0.0, None, "incomplete")
        return self.task.grade(self.problems[str(doc["id"])], response)
