r"""Final answers: find them in a response, normalise them, compare them, and read gold answers.

A response's answer is, in this order: the last ``<answer>...</answer>``, the last complete ``\boxed{...}``, the last
``#### x`` (GSM8K's mark), the last "answer is x" or "Answer: x", and only then, without any mark, the last number
(where the answers are numbers, or where that is not known) or the last line with text. An empty answer is none.
Two answers are equal when their normalised strings are, when both are numbers of one value (``1/2 = 0.5 = \frac12``),
or when math-verify, asked in a worker process with a hard timeout, says so for LaTeX.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from thrifty.contracts import Grade

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++"
_IN_TEXT = re.compile(
    rf"(?<![0-9A-Za-z_)\]}}.])[-−+]?\\?[$€£]?(?:{_NUMBER})(?:/[1-9][0-9]*+|[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z]))?|(?:{_NUMBER})"
)
_WHOLE = re.compile(rf"([-+]?)(?:{_NUMBER})(?:[eE][-+]?[0-9]{{1,3}})?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac(?:\{(-?[0-9]+)\}|([0-9]))\s*(?:\{(-?[0-9]+)\}|([0-9]))")
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAYS = re.compile(r"\banswer\b[*_`\"']*+[^\S\n]*+(?:(?:is|are|was)\b:?+|[:=])[*_`]*+\s*+([^\n]*+)", re.IGNORECASE)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_SENTENCE_END = re.compile(r"(?<=[^\s.])\.(?=\s|$)")
_SPACING = re.compile(r"\\!\s*|\\[,;: ]|\\q?quad\b|~")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|operatorname)\{([^{}]*)\}")
_MATHS = re.compile(
    r".*[\\^]|(?=.*[0-9a-zA-Z])(?=.*[-+*/=<>(\[,])(?!.*[A-Za-z]{2})[-+*/=<>()\[\],.!|\s0-9a-zA-Z]+$", re.DOTALL
)
_FORMULA = re.compile(r"(?:\\(?!f?box)[A-Za-z]++|(?<![A-Za-z])[A-Za-z]|[^A-Za-z\\])++")
"""A line without words but LaTeX commands."""

GSM8K, BOXED, PLAIN = "gsm8k", "boxed", "plain"


@dataclass(frozen=True)
class Gold:
    """A gold answer as found in a data set; ``answer`` is None where none could be parsed, and ``why`` says why."""

    answer: str | None
    chain: str | None = None
    why: str = ""


def number(text: str) -> Fraction | None:
    r"""The value of a text that is one number, else None.

    >>> number("$1,234.50"), number("50%"), number(r"\frac{1}{2}"), number("3 apples")
    (Fraction(2469, 2), Fraction(50, 1), Fraction(1, 2), None)
    """
    if len(text) > 300:
        return None
    text = (
        text.strip().strip("$€£").strip().replace("−", "-").replace("\\$", "").replace("\\%", "%").replace("{,}", ",")
    )
    text = re.sub(r"^([-+]?)\s*[$€£]\s*", r"\1", text)
    text = re.sub(r"\s*(?:%|\^\{?\\circ\}?|°)$", "", text).rstrip(".").strip()
    if match := _FRACTION.fullmatch(text):
        sign, a, a1, b, b1 = match.groups()
        top, bottom = int(a or a1), int(b or b1)
        return None if bottom == 0 else Fraction(-top if sign == "-" else top, bottom)
    top_text, slash, bottom_text = text.partition("/")
    if slash and not bottom_text.strip().isascii():
        return None
    top_value = _plain_number(top_text.strip())
    if not slash or top_value is None:
        return top_value
    bottom_value = _plain_number(bottom_text.strip())
    return top_value / bottom_value if bottom_value else None


def _plain_number(text: str) -> Fraction | None:
    return Fraction(text.replace(",", "")) if _WHOLE.fullmatch(text) else None


def canonical(value: Fraction) -> str:
    """One spelling per value: an integer, a decimal where it ends, else a fraction.

    >>> canonical(Fraction(6, 2)), canonical(Fraction(-1, 8)), canonical(Fraction(2, 6))
    ('3', '-0.125', '1/3')
    """
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}" if places else f"{sign}{digits}"


def normal(text: str) -> str:
    r"""Equal answers, equal strings: numbers by value, text without case, spacing or wrapping marks.

    >>> normal("**1,000.0**."), normal("(B)"), normal("  New   York. "), normal(r"$\dfrac{x}{2}$")
    ('1000', 'b', 'new york', '\\frac{x}{2}')
    """
    before = None
    while before != text:
        before, text = text, _normal_once(text)
    return text


def _normal_once(text: str) -> str:
    """One pass; what it leaves may unwrap further, never into something longer but a number's one spelling."""
    text = _unwrap(text)
    value = number(text)
    if value is not None:
        return canonical(value)
    if "\\" in text:
        text = _SPACING.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
        text = _TEXT.sub(lambda match: match[1], text.replace("\\left", "").replace("\\right", ""))
        if "\\" in text:
            return "".join(text.split()).rstrip(".")
    value = number(text)
    if value is not None:
        return canonical(value)
    text = " ".join(text.split()).rstrip(".").casefold()
    if match := re.fullmatch(r"\(?([a-z])\)?[.:]?", text):
        return match[1]
    return text


def _unwrap(text: str) -> str:
    before = None
    while before != text:
        before, text = text, text.strip().strip("*_`").strip()
        if text.endswith(("*.", "_.", "`.")):
            text = text[:-1]
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("'", "'")):
            if len(text) > len(left) + len(right) and text.startswith(left) and text.rstrip(".").endswith(right):
                inner = text.rstrip(".")[len(left) : -len(right)]
                if left[-1] not in inner or left in ("\\(", "\\["):
                    text = inner
    return "" if not text.strip("$*_`.") else text


def boxed(text: str) -> str | None:
    r"""What stands in the last complete ``\boxed{...}`` (or ``\fbox``), braces balanced; None without one.

    >>> boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text))[-20:]):
        depth = 1
        for i in range(match.end(), len(text)):
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
                if depth == 0:
                    return text[match.end() : i].strip()
    bare = re.findall(r"\\boxed\s+([^\s{$]+)", text)
    return bare[-1] if bare else None


def extract(response: str, numeric: bool | None = None, block: bool = False, cut: bool = True) -> str | None:
    r"""The final answer in a response as it was written, None when there is none.

    ``numeric``: True where the task's answers are numbers (the answer is then cut down to one), False where they are
    text, None where that is not known. ``block``: answers have several lines, so it is all that stands behind the mark.
    ``cut``: the text behind "answer is" ends with its sentence, not with its line.

    >>> extract("We add 3 and 4. The answer is 7 apples.", numeric=True), extract("2 + 2 = 4\nso yes", numeric=False)
    ('7', 'so yes')
    """
    marked = _marked(response, block, cut)
    if marked is not None:
        if numeric:
            return _cut_to_number(marked) or (_last_number(response) if marked else None)
        return marked or None
    if block:
        return response.strip() or None
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    last = _unwrap(lines[-1]) if lines else ""
    if numeric is None and _FORMULA.fullmatch(last) and is_maths(last) and len(_IN_TEXT.findall(last)) != 1:
        return last.rsplit("=", 1)[-1].strip() or None
    return (None if numeric is False else _last_number(response)) or last or None


def _marked(response: str, block: bool, cut: bool) -> str | None:
    """The answer behind a mark; "" where the last marks have nothing behind them, None without any mark."""
    if tags := _TAGS.findall(response):
        return tags[-1].strip()
    inside = boxed(response)
    if inside is not None:
        return inside
    if "####" in response:
        return _unwrap(response.rsplit("####", 1)[1].strip().split("\n", 1)[0])
    if block and (ends := [match.start(1) for match in _SAYS.finditer(response)]):
        return response[ends[-1] :].strip("\n").rstrip()
    said = [
        found
        for found in (_clause(text) if cut else text.strip() for text in _SAYS.findall(response))
        if found is not None
    ]
    return next((text for text in reversed(said) if text), "") if said else None


def _clause(text: str) -> str:
    """The text up to the end of its sentence, without the marks around it."""
    text = text.strip()
    if end := _SENTENCE_END.search(text):
        text = text[: end.start()]
    return _unwrap(text)


def _cut_to_number(text: str) -> str | None:
    if number(text) is not None:
        return text
    right = text.rsplit("=", 1)[-1].strip()
    if right != text and number(right) is not None:
        return right
    found = _IN_TEXT.findall(right) or _IN_TEXT.findall(text)
    return found[0] if found else None


def _last_number(text: str) -> str | None:
    found = _IN_TEXT.findall(text[-20_000:])
    return found[-1] if found else None


def parse(response: str, numeric: bool | None = None) -> str | None:
    """The final answer in a response, normalised; None when there is none."""
    found = extract(response, numeric)
    return (normal(found) or None) if found else None


def layout(golds: list[str]) -> str:
    """How most of these gold answers are written: "gsm8k" (``#### 42``), "boxed" (MATH) or "plain"."""
    votes = [GSM8K if "####" in gold else BOXED if "\\boxed" in gold or "\\fbox" in gold else PLAIN for gold in golds]
    return max((GSM8K, BOXED, PLAIN), key=votes.count) if votes else PLAIN


def read_gold(raw: str, written: str = PLAIN) -> Gold:
    r"""Read a gold answer in layout ``written``; the text before ``####`` or around ``\boxed`` is kept as the chain.

    >>> read_gold("3 + 4 = <<3+4=7>>7 apples\n#### 7", "gsm8k")
    Gold(answer='7', chain='3 + 4 = 7 apples', why='')
    >>> read_gold("no mark here", "gsm8k").why
    "no '#### x' as in the other rows"
    """
    text, thought = raw.strip(), None
    if "</think>" in text:
        thought, _, text = text.partition("</think>")
        thought, text = thought.replace("<think>", "").strip(), text.strip()
    if not text or text.casefold() in ("null", "nan"):
        return Gold(None, thought, "the answer is empty")
    if "####" in text:
        before, _, after = text.rpartition("####")
        chain = thought or _CALCULATOR.sub("", before).strip() or None
        return Gold(after.strip(), chain) if after.strip() else Gold(None, chain, "nothing stands behind '####'")
    if "\\boxed" in text or "\\fbox" in text:
        inside = boxed(text)
        return (
            Gold(inside, thought or text) if inside else Gold(None, thought or text, "its \\boxed{} is empty or open")
        )
    if written == GSM8K:
        return Gold(None, thought, "no '#### x' as in the other rows")
    if written == BOXED:
        return Gold(None, thought, "no \\boxed{x} as in the other rows")
    said = _SAYS.findall(text)
    if (said and "\n" in text) or thought:
        found = extract(text)
        return Gold(found, thought or text) if found else Gold(None, thought or text, "no final answer in it")
    return Gold(text, thought)


def compare(gold: str, answer: str) -> Grade:
    """Grade a parsed answer against a gold answer. Only an equal answer scores, and it scores 1."""
    wanted, found = normal(gold), normal(answer)
    if not wanted:
        return Grade(0.0, found or None, "the gold answer is empty: never scored right")
    if not found:
        return Grade(0.0, None, "the answer is empty")
    if wanted == found:
        return Grade(1.0, found)
    if number(wanted) is not None and number(found) is not None:
        return Grade(0.0, found, f"expected {wanted}")
    if not (is_maths(wanted) or is_maths(found)) or max(len(wanted), len(found)) > 2000:
        return Grade(0.0, found, f"expected {wanted}")
    from thrifty.tasks import worker

    reply = worker.ask({"kind": "math", "gold": wanted, "answer": found})
    if "error" in reply:
        return Grade(0.0, found, reply["error"])
    return (
        Grade(1.0, found) if reply["score"] == 1.0 else Grade(0.0, found, reply.get("message") or f"expected {wanted}")
    )


def is_maths(text: str) -> bool:
    r"""Whether a text reads as a formula: LaTeX, or symbols and operators without words."""
    return bool(_MATHS.match(text))
