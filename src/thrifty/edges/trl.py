"""A reward as one of trl's ``reward_funcs``: the groups are put together again from the flat lists that trl passes.

trl repeats every prompt ``num_generations`` times and deals the rows out to the processes in contiguous slices. Only
the global batch holds whole groups: a process may get the end of one and the start of the next. So the rows of all
processes are gathered, as rewards of a step may depend on all of its groups anyway, and every process returns its own.

>>> from thrifty.edges.datasets import of_problems                        # doctest: +SKIP
>>> problems = task.problems("train", 1000)                               # doctest: +SKIP
>>> GRPOTrainer(model, reward_func(RelativeLength(), task, problems, tokenizer),
...             train_dataset=of_problems(problems), args=GRPOConfig(num_generations=8))    # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from thrifty.contracts import Grade, Group, Problem, Reward, Span, Task, ThriftyError, Trace, Usage
from thrifty.engines import capabilities
from thrifty.models.chat import ChatFormat
from thrifty.tune.answers import check_rewards


def reward_func(
    reward: Reward, task: Task, problems: Sequence[Problem], tokenizer: Any, eos: Collection[int] = ()
) -> Callable[..., list[float]]:
    """A function for ``reward_funcs`` that grades completions by ``task`` and rewards them by ``reward``.

    The data set's rows must carry the ``id`` of one of ``problems``, as ``edges.datasets`` makes them. ``eos`` are
    token ids that end a response beside the tokenizer's (those of the model's generation config): an answer without any
    is incomplete, as is one whose chain is open. ``step`` is trl's global step. trl logs the reward under its class's
    name, and accuracy and completion beside it. Raises ThriftyError for a reward that needs what trl does not pass
    (log-probabilities, entropies), for an unknown id, and where rewards do not match the answers.
    """
    lacking = sorted({name for names in capabilities.needs(reward).values() for name in names})
    if lacking:
        raise ThriftyError(
            f"{type(reward).__name__} needs {', '.join(lacking)}, which trl does not pass to rewards: train with "
            "thrifty.tune.rollout.rollout instead"
        )
    known = {problem.id: problem for problem in problems}
    chat = ChatFormat.detect(tokenizer)
    ends = {*eos, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}

    def score(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        id: Sequence[str] | None = None,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **others: Any,
    ) -> list[float]:
        if id is None:
            raise ThriftyError("the data set has no column id: make it with thrifty.edges.datasets.of_problems")
        if strange := [one for one in id if one not in known]:
            raise ThriftyError(
                f"the data set's id {strange[0]!r} is none of the {len(known)} problems: give the same ones"
            )
        rank, rows = PartialState().process_index, []
        for key, prompt, ids in zip(id, prompts, completion_ids, strict=True):
            trace = _trace(_as_prompted(chat, prompt), ends, known[key], np.asarray(ids, np.int32))
            rows.append((rank, key, *_graded(task, known[key], trace)))
        if log_metric is not None:
            log_metric("accuracy", float(np.mean([grade.right for *_, grade in rows])))
            log_metric("completion", float(np.mean([trace.complete for *_, trace, _ in rows])))
        ranks, groups = [], []
        for key, members in itertools.groupby(gather_object(rows), lambda row: row[1]):
            one = list(members)
            ranks.append([row[0] for row in one])
            groups.append(Group(known[key], [row[2] for row in one], [row[3] for row in one]))
        rewards = reward.score(groups, int(getattr(trainer_state, "global_step", 0)))
        check_rewards(groups, rewards, reward)
        flat = zip(itertools.chain(*ranks), itertools.chain(*rewards))
        return [float(value) for owner, value in flat if owner == rank]

    score.__name__ = type(reward).__name__
    return score


def _as_prompted(chat: ChatFormat, prompt: Any) -> ChatFormat:
    """The chat format where the prompt was ``prompt``: a plain text opens a chain only where it says so itself."""
    if not isinstance(prompt, str):
        return chat
    return dataclasses.replace(chat, prefilled=prompt.rstrip().endswith(chat.open))


def _trace(chat: ChatFormat, ends: Collection[int], problem: Problem, ids: np.ndarray) -> Trace:
    text = chat.decode(ids.tolist())
    thought, response, closed = chat.split(text)
    cut = len(ids) if not closed else chat.cut(ids) if chat.close in text else 0
    spans = [Span(0, cut, "thought")] * (cut > 0) + [Span(cut, len(ids), "answer")] * (cut < len(ids))
    return Trace(
        ids, thought, response, closed, "stop" if len(ids) and int(ids[-1]) in ends else "length",
        spans=tuple(spans), usage=Usage(thought=cut, answer=len(ids) - cut, calls=1), problem=problem.id,
    )  # fmt: skip


def _graded(task: Task, problem: Problem, trace: Trace) -> tuple[Trace, Grade]:
    """As the runner grades: an incomplete answer is never right, and one without gold earns nothing."""
    if not trace.complete:
        return trace, Grade(0.0, None, f"incomplete ({trace.finish})")
    trace = dataclasses.replace(trace, answer=task.parse(trace.response))
    if not problem.gradable:
        return trace, Grade(0.0, trace.answer, "no gold answer")
    return trace, task.grade(problem, trace.response)
