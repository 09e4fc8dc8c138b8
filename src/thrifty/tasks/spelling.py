"""The machines' problems and chains in another spelling: a skill that no student has.

Digits other than 0 are permuted, so the arithmetic has to be learnt anew, and the labels of operations start at f, so a
prompt shows which spelling it is in. Every token is one that the students were trained on: what freezes the embeddings
could not learn to write another.
"""

from __future__ import annotations

import re

_DIGITS = str.maketrans("123456789", "794168352")
_LABELS = dict(zip("abcdefghij", "fghijabcde"))


def respelled(text: str) -> str:
    """The text in the other spelling.

    >>> respelled("roll mod 10 . a 9 . b +3 .")
    'roll mod 70 . f 2 . g +4 .'
    """
    return re.sub(r"(?<!\S)[a-j](?!\S)", lambda found: _LABELS[found.group()], text.translate(_DIGITS))
