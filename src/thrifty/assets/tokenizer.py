"""The students' tokenizer: byte-level, under 512 tokens, with our symbols and the numbers 0 to 99 as single tokens."""

from __future__ import annotations

import string
from typing import Any

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
NAMES = ("roll", "walk", "list", "row", "bool", "bits", "search", "reach")
CONTROLS = ("direct", "terse", "plain", "full")
WORDS = (
    "mod", "gives", "check", "ok", "good", "no", "wrong", "so", "thus", "now", "still", "maybe", "then", "back", "undo",
)  # fmt: skip
OPERATIONS = (
    *(f"{sign}{x}" for sign in "+*" for x in range(2, 10)),
    *(f"-{x}" for x in range(1, 10)),
    *(f"swap{i}" for i in (1, 2, 3)),
    *(f"turn{i}" for i in (1, 2, 3)),
    *(f"flip{i}" for i in (2, 3, 4)),
    *(f"{word}{i}" for word in ("up", "and", "or", "xor", "not") for i in (1, 2, 3, 4)),
)
"""Operations of the embedded families. One token each: a student of this size finds what stands right after a label,
and learns a table of two entries; operators and operands apart it had not learnt after 3.5 million tokens."""
SYMBOLS = tuple("+-*=.,;:|?_")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|><think>"
    "{% if m.reasoning_content is defined and m.reasoning_content %} {{ m.reasoning_content }}</think> {{ m.content }}"
    "{% elif '</think>' in m.content %}{{ m.content.replace('<think>', '', 1) }}"
    "{% else %} </think> {{ m.content }}{% endif %}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
"""User text, then the assistant's turn with ``<think>`` prefilled; ``reasoning_content`` goes between the tags."""


def phrases() -> list[str]:
    """The fixed sentences of the reasoning-gym prompts in the mixture, from its own templates."""
    from reasoning_gym.algorithmic import string_splitting, string_synthesis

    splitting = string_splitting.QUESTION_TEMPLATE.format(
        A_machine="\0", B_machine="\0", C_machine="\0", max_iterations=1000
    )
    synthesis = string_synthesis.QUESTION_TEMPLATE.format(
        A_square="\0", B_square="\0", C_square="\0", max_iterations=1000
    )
    sums = ("State the final answer to the following arithmetic problem:",)
    found = [piece.removesuffix(" ") for text in (splitting, synthesis) for piece in text.split("\0")]
    return list(dict.fromkeys([*found, *sums]))


def build() -> Any:
    """The tokenizer as a ``PreTrainedTokenizerFast`` with its chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "Ġ"
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [space + str(i) for i in range(100)]
    tokens += [space + letter for letter in string.ascii_lowercase]
    tokens += [space + word for word in (*SYMBOLS, *NAMES, *WORDS, *CONTROLS, *OPERATIONS)]
    tokens += [*NAMES, *CONTROLS]  # a prompt opens without a blank
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    split = pre_tokenizers.Split(
        Regex(r" [+*-][0-9](?![0-9])| [a-z]+[1-4](?![0-9])| ?[0-9]{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]|\s+"), "isolated"
    )
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    # Whole sentences as tokens: a prompt of 300 words costs a student what one of 10 does.
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast
