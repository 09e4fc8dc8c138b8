"""Which columns of a table hold what, and what a cell means: questions, choices, gold answers."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.contracts import ThriftyError
from thrifty.tasks.spec import did_you_mean

QUESTION = ("question", "problem", "prompt", "input", "query", "instruction", "messages")
ANSWER = (
    "answer", "solution", "target", "output", "label", "gold",
    "final_answer", "expected_answer", "correct_answer", "ground_truth", "answerkey", "response",
)  # fmt: skip
CHAIN = ("solution", "rationale", "reasoning", "chain", "explanation", "cot", "thought", "generated_solution")
CHOICES = ("choices", "options")
LEVEL = ("level", "difficulty")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    question: str
    answer: str | None
    chain: str | None = None
    choices: str | None = None
    level: str | None = None


def find_columns(name: str, found: Sequence[str], question: str | None, answer: str | None, gold: bool) -> Columns:
    """Match a table's columns by name; a missing one raises ``ThriftyError`` that lists those found."""

    def pick(named: str | None, candidates: tuple[str, ...], taken: tuple[str | None, ...] = ()) -> str | None:
        if named is not None:
            if named not in found:
                raise ThriftyError(
                    f"{name} has no column {named!r}. {did_you_mean(named, found)}Columns found: {', '.join(found)}."
                )
            return named
        by_name = {column.casefold(): column for column in reversed(found) if column not in taken}
        return next((by_name[candidate] for candidate in candidates if candidate in by_name), None)

    columns = {"question": pick(question, QUESTION)}
    columns["answer"] = pick(answer, ANSWER, (columns["question"],)) if gold else None
    for role in ("question", "answer") if gold else ("question",):
        if columns[role] is None:
            names = ", ".join(QUESTION if role == "question" else ANSWER)
            raise ThriftyError(
                f"{name} has no {role} column. Columns found: {', '.join(found) or '(none)'}. Name it with "
                f"--{role} COLUMN or ?{role}=COLUMN (in Python: {role}='COLUMN'), or rename it to one of: {names}."
            )
    taken = (columns["question"], columns["answer"])
    return Columns(
        question=str(columns["question"]),
        answer=columns["answer"],
        chain=pick(None, CHAIN, taken) if gold else None,
        choices=pick(None, CHOICES, taken),
        level=pick(None, LEVEL, taken),
    )


def question_text(value: Any, choices: Any = None, name: str = "", row: int = 0) -> str | None:
    """The text of a question: a text, a number, or messages whose user turn is taken; choices are lettered below."""
    if value is None or value != value:
        return None
    if _is_chat(value):
        value = next((turn["content"] for turn in reversed(value) if turn.get("role") == "user"), None)
        if value is None:
            return None
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise ThriftyError(
            f"{name}: the question in row {row} is {type(value).__name__}, not text. Name the text's column with "
            "?question=COLUMN."
        )
    texts = choice_texts(choices)
    return value + "".join(f"\n{letter}. {text}" for letter, text in texts.items()) if texts else value


def choice_texts(choices: Any) -> dict[str, str]:
    """Letter -> text of a multiple choice: a list (MMLU), or texts with labels (ARC)."""
    if isinstance(choices, dict) and isinstance(choices.get("text"), (list, tuple)):
        return {str(k): str(v) for k, v in zip(choices.get("label", string.ascii_uppercase), choices["text"])}
    if isinstance(choices, dict) and all(len(str(key)) == 1 for key in choices):
        return {str(key): str(value) for key, value in choices.items()}
    return dict(zip(string.ascii_uppercase, map(str, choices))) if isinstance(choices, (list, tuple)) else {}


def gold_text(value: Any, choices: Any = None) -> str | None:
    """A gold answer as text; among choices its letter, whether given as letter, index or text."""
    if value is None or value != value:
        return None
    if _is_chat(value):
        value = next((turn["content"] for turn in reversed(value) if turn.get("role") == "assistant"), None)
        return None if value is None else str(value)
    texts = choice_texts(choices)
    if texts and str(value) not in texts:
        letters = list(texts)
        if isinstance(value, int) and 0 <= value < len(letters):
            return letters[value]
        return next((letter for letter, text in texts.items() if text == str(value)), str(value))
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (dict, list, tuple)):
        return ", ".join(map(str, value)) if not isinstance(value, dict) and value else None
    return str(value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "content" in m for m in value)
