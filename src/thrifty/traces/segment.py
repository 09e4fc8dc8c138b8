"""Cut a chain of thought into steps and say what each is for, from its surface alone.

Nothing here knows who wrote a chain or what its markers mean (rule 1 of the evidence rules): a step ends at a line
break, at the end of a sentence, or at a free-standing mark (`` . ``, `` ; ``, `` , ``); a free-standing
``|`` opens one. Kinds come from the cue words that the literature on reasoning chains lists ("Wait", "Alternatively",
"let me verify"; e.g. arXiv 2501.18585, 2412.21187). They are good enough to colour a page and to count by, not ground
truth: a search's dead ends, say, look like work until they die.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["work", "check", "branch", "tail"]
KINDS: tuple[Kind, ...] = ("work", "check", "branch", "tail")

_CUT = re.compile(
    r"""\s*\n\s*                              # line breaks
      | (?<=\s)[.;,](?:\s+|$)                 # a free-standing full stop, semicolon or comma
      | (?<=[^\s.])[.!?]["')\]*]*\s+(?=[^\sa-z])  # the end of a sentence
      | (?<=\s)(?=\|(?:\s|$))                 # before a free-standing bar
    """,
    re.VERBOSE,
)
_STOP = re.compile(r"\s[.;](?:\s|$)")
_COMMA = re.compile(r"\s,(?:\s|$)")
_CHECK = re.compile(
    r"""^\W*(?:wait|hmm+|hold\ on|check|verify|verif|recheck|re-check|double-check|actually|sanity
            |(?:let\ me|let's|to|i(?:'ll|\ should)?)\ (?:re-?)?(?:check|verify|confirm|make\ sure))\b
      | \bdouble[- ]check | \blet\ me\ (?:check|verify|confirm|make\ sure|recheck|see\ if)
      | ^\W*(?:ok|okay|yes|no|right|wrong|correct)\b[,!]?(?:\s+\S+)?\s*[.;!]?\s*$   # a verdict standing alone
      | ^\W*no,
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BRANCH = re.compile(
    r"""^\W*(?:alternatively|instead|otherwise|maybe|perhaps|suppose|what\ if|or\ maybe|try
            |back|backtrack|undo|fail(?:ed)?|let(?:'s|\ me|\ us)\ try)\b
      | \b(?:another|different|other)\ (?:way|approach|method|possibility|option|idea)\b | \bdead\ end\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.)])[-−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?|\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_WORD = re.compile(r"[^\W_]+")
_FILLERS = frozenset(
    "a an and ans answer are be equals final hence is it result so that the therefore this thus value".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Step:
    """Characters ``[start, end)`` of a chain. The steps of a chain join up to the chain."""

    start: int
    end: int
    kind: Kind


def segment(thought: str) -> list[Step]:
    """The steps of a chain with their kinds.

    >>> text = "a 7 + 3 = 0 . | 7 + 3 = 0 ; ok . so 0 ."
    >>> [(text[s.start : s.end].strip(), s.kind) for s in segment(text)]
    [('a 7 + 3 = 0 .', 'work'), ('| 7 + 3 = 0 ;', 'check'), ('ok .', 'check'), ('so 0 .', 'tail')]
    """
    pieces = [(start, end, thought[start:end]) for start, end in cuts(thought)]
    marks, lines = _marks(thought), "\n" in thought.strip()
    kinds: list[Kind] = []
    carried: Kind | None = None
    line_start = True
    opened_line = False
    for _, _, piece in pieces:
        own = _cue(piece, marks != "")
        if own is not None:
            carried, opened_line = own, lines and line_start
        kinds.append(own or carried or "work")
        # A check lasts to the end of its sentence; where it opened a line, to the end of that line.
        line_start = "\n" in piece[len(piece.rstrip()) :]
        if line_start or (not opened_line and piece.rstrip().endswith((".", "!", "?", " ,"))):
            carried, opened_line = None, False
    _mark_tail([piece for _, _, piece in pieces], kinds)
    return [Step(start, end, kind) for (start, end, _), kind in zip(pieces, kinds, strict=True)]


def cuts(thought: str) -> list[tuple[int, int]]:
    """Character ranges of the steps, in order, without gaps; a bare ``1.`` stays with its sentence."""
    ranges: list[tuple[int, int]] = []
    start, marks = 0, _marks(thought)
    for match in _CUT.finditer(thought):
        # Elsewhere a bar is divisibility or an absolute value, and between free-standing stops a comma parts a list.
        if (not match.group() and not marks) or (match.group().startswith(",") and marks != ","):
            continue
        end = match.end()
        piece = thought[start:end].strip()
        if end == start or not piece or re.fullmatch(r"\(?\d+[.)]", piece):
            continue
        ranges.append((start, end))
        start = end
    if start < len(thought):
        if thought[start:].strip() or not ranges:
            ranges.append((start, len(thought)))
        else:
            ranges[-1] = (ranges[-1][0], len(thought))
    return ranges


def numbers(text: str) -> list[str]:
    """The numbers in a text as written, without thousands separators.

    >>> numbers("1,200 - 3.5 is -7/2")
    ['1200', '3.5', '-7/2']
    """
    return [m.replace(",", "").replace("−", "-") for m in _NUMBER.findall(text)]


def _marks(thought: str) -> str:
    """The free-standing marks that end a text's sentences: stops, else commas, else none (ordinary prose)."""
    return ".;" if _STOP.search(thought) else "," if _COMMA.search(thought) else ""


def _cue(piece: str, spaced: bool) -> Kind | None:
    if (spaced and piece.lstrip().startswith("|")) or _CHECK.search(piece):
        return "check"
    return "branch" if _BRANCH.search(piece) or (spaced and piece.lstrip().startswith("?")) else None


def _content(piece: str, numeric: bool) -> list[str]:
    """What a step says, without its number in a list and without filler words."""
    piece = re.sub(r"^\W*\d+[.)]\s", "", piece)
    if numeric:
        return numbers(piece)
    return [word for word in _WORD.findall(piece.lower()) if word not in _FILLERS]


def _mark_tail(pieces: list[str], kinds: list[Kind]) -> None:
    """Work after the last real step that only says the final value again is tail. Changes ``kinds`` in place."""
    numeric = any(_NUMBER.search(piece) for piece in pieces)
    contents = [_content(piece, numeric) for piece in pieces]
    final = next((content for content in reversed(contents) if content), None)
    if final is None:
        return
    last = len(pieces) - 1
    while last > 0 and (kinds[last] != "work" or contents[last] in ([], final)):
        last -= 1
    stated = False
    for i in range(last, len(pieces)):
        if stated and kinds[i] == "work":
            kinds[i] = "tail"
        stated = stated or contents[i][-len(final) :] == final
