"""How a model's conversation looks as tokens, and how its chain of thought is told from its response.

Everything is read off the tokenizer and its chat template by rendering probes. Training targets are written by
``ChatFormat.target`` and never pass through the template's assistant turn, so a template that drops chains (DeepSeek's
``content.split('</think>')[-1]``) does no harm.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import numpy as np

from thrifty.contracts import Prompt, ThriftyError

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>"), ("<thought>", "</thought>"))
"""Tag pairs looked for, in this order; the first is also the default of models that show none."""
_THOUGHT, _RESPONSE = "PROBETHOUGHT", "PROBERESPONSE"


@dataclass(frozen=True)
class ChatFormat:
    """The chat format of one model. Build it with ``ChatFormat.detect(tokenizer)``; every field can be overridden."""

    tokenizer: Any
    open: str = "<think>"
    close: str = "</think>"
    declared: bool = True
    """The tokenizer or the template mentions the tags: this is a model with chains."""
    prefilled: bool = False
    """The rendered generation prompt already ends in the opening tag."""
    eats_thinking: bool = False
    """The template drops the chain of an assistant turn, even of the last one."""
    before: str = "\n"
    """Between the opening tag and the thought."""
    after: str = "\n"
    """Between the thought and the closing tag."""
    gap: str = "\n\n"
    """Between the closing tag and the response."""

    @classmethod
    def detect(cls, tokenizer: Any, open: str | None = None, close: str | None = None) -> ChatFormat:
        """Read the format off ``tokenizer`` and its chat template; ``open`` and ``close`` name unusual tags."""
        if (open is None) != (close is None):
            raise ThriftyError("give both tags of a chain, open and close, or neither")
        template = tokenizer.chat_template or ""
        if isinstance(template, dict):  # named templates; "default" is what apply_chat_template takes
            template = template.get("default", "")
        vocabulary = tokenizer.get_vocab()
        pairs = TAGS if open is None else ((open, close or ""),)
        found = next((pair for pair in pairs if pair[1] in template or pair[1] in vocabulary), None)
        opening, closing = found or pairs[0]
        # A tokenizer that has no line break (word-level students) gets blanks instead.
        breaks = tokenizer.decode(tokenizer.encode("a\na", add_special_tokens=False)).count("\n") == 1
        before, after, gap = ("\n", "\n", "\n\n") if breaks else (" ", " ", " ")
        prefilled, eats = False, False
        if template:
            turns = [{"role": "user", "content": "hello"}]
            asked = _render(tokenizer, turns, generation=True)
            prefilled = asked.rstrip().endswith(opening)
            shape = _reasoning_shape(tokenizer, turns, opening, closing)
            if shape is not None:
                before, after, gap = shape
            if prefilled:
                before = before if asked.endswith(opening) else ""
            eats = _eats(tokenizer, turns, opening, closing)
        return cls(tokenizer, opening, closing, found is not None, prefilled, eats, before, after, gap)

    def prompt_text(self, prompt: Prompt) -> str:
        """``prompt`` as the model reads it, up to where its response begins."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        if self.tokenizer.chat_template:
            return _render(self.tokenizer, turns, generation=True)
        return "\n\n".join(turn["content"] for turn in turns)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of ``prompt`` with the generation prompt; plain text where the model has no chat template."""
        # A template writes its own beginning-of-sequence token.
        plain = not self.tokenizer.chat_template
        return list(self.tokenizer(self.prompt_text(prompt), add_special_tokens=plain)["input_ids"])

    def target(self, thought: str, response: str) -> str:
        """The text that follows the prompt when the model thinks ``thought`` and says ``response``.

        Without end-of-sequence. An empty thought still opens and closes the chain.
        """
        opening = self.before if self.prefilled else self.open + self.before
        body = thought.strip() + self.after if thought.strip() else ""
        return f"{opening}{body}{self.close}{self.gap}{response.strip()}"

    def split(self, text: str) -> tuple[str, str, bool]:
        """``(thought, response, closed)`` of a response's text, tags excluded.

        The first closing tag counts; the opening tag may be missing. Text without any tag, where the prompt did not
        open the chain, is a response without a chain: closed. Else an unclosed chain is all thought, with no response.
        """
        thought, closing, response = text.partition(self.close)
        if not closing and not self.prefilled and self.open not in text:
            return "", text.strip(), True
        return thought.replace(self.open, "", 1).strip(), response.strip(), bool(closing)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response's token ids, tags kept, special tokens (end of sequence, padding) dropped."""
        kept = [i for i in map(int, ids) if i not in self._dropped]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def cut(self, ids: np.ndarray) -> int:
        """Where the closing tag ends: the fewest leading ``ids`` whose text holds it; ``len(ids)`` where none does."""
        found = np.flatnonzero(ids == (-1 if self.close_id is None else self.close_id))
        if len(found):
            return int(found[0]) + 1
        return bisect.bisect_left(range(len(ids)), True, key=lambda n: self.close in self.decode(ids[:n].tolist()))

    @cached_property
    def close_id(self) -> int | None:
        """The closing tag's token id where it is one token."""
        ids = self.tokenizer.encode(self.close, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else None

    @cached_property
    def _dropped(self) -> frozenset[int]:
        vocabulary = self.tokenizer.get_vocab()
        tags = {vocabulary.get(self.open), vocabulary.get(self.close)}
        # Tokens that end a turn are often special without being one of the tokenizer's named ones.
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*self.tokenizer.all_special_ids, *special} - tags)


def _render(tokenizer: Any, turns: list[dict[str, str]], generation: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except jinja2.TemplateError as error:
        roles = ", ".join(turn.get("role", "?") for turn in turns)
        raise ThriftyError(f"the model's chat template refuses messages with roles {roles}: {error}") from error


def _reasoning_shape(
    tokenizer: Any, turns: list[dict[str, str]], opening: str, closing: str
) -> tuple[str, str, str] | None:
    """White space around the tags, from a template that renders ``reasoning_content`` (Qwen3 and others do)."""
    turn = {"role": "assistant", "content": _RESPONSE, "reasoning_content": _THOUGHT}
    try:
        text = _render(tokenizer, [*turns, turn], generation=False)
    except ThriftyError:
        return None
    shape = rf"{re.escape(opening)}(\s*){_THOUGHT}(\s*){re.escape(closing)}(\s*){_RESPONSE}"
    match = re.search(shape, text)
    return (match[1], match[2], match[3]) if match else None


def _eats(tokenizer: Any, turns: list[dict[str, str]], opening: str, closing: str) -> bool:
    turn = {"role": "assistant", "content": f"{opening}\n{_THOUGHT}\n{closing}\n\n{_RESPONSE}"}
    try:
        return _THOUGHT not in _render(tokenizer, [*turns, turn], generation=False)
    except ThriftyError:
        return True
