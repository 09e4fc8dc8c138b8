"""Stops a chain that has agreed with itself: a verifier reads finished sub-thoughts while the next one is written.

A chain is cut into sub-thoughts at reflection markers ("Wait", "But", "Alternatively"); the last sentences of each are
its intermediate answer s_i. The verifier, asked by prefill only, says yes where p("Yes") > p("No"):

    p1(question, s_i): does it hold an answer?          p2(s_a, s_b): are two answers the same?

Overthinking: over the sub-thoughts with an answer, a count goes up when one agrees with the one before and back to 0
otherwise; at ``agreements`` (2: three answers alike) the chain is told to conclude. Underthinking: without that, after
``share`` of ``budget`` or ``most`` sub-thoughts, it is closed. Repetition: so it is when ``repeat_tokens`` tokens in a
row have come ``repeat_times`` times. Nothing is trained; a verdict that comes while the next piece is written costs the
tokens of that piece, no time.

>>> TrimR(markers=("\\n\\nWait",)).pieces("7 + 3 is 10. So 10.\\n\\nWait, 5 + 5 is 10.")
['7 + 3 is 10. So 10.', ', 5 + 5 is 10.']
>>> counted = 0
>>> for same in (False, True, True): counted = counted + 1 if same else 0  # a, a, a after something else
>>> counted >= TrimR().agreements
True

Paper: Lin et al., TrimR: Verifier-based Training-Free Thinking Compression for Efficient Test-Time Scaling
(2505.17155).
Differs: words of the two questions and of the guides are ours, as are ``sentences``, ``most``, ``share`` and the
lengths of a repetition, whose values we could not check. The verifier is asked once a sub-thought has ended, and at
most ``interval`` tokens are written meanwhile (the paper sends every 50). ``answer`` replaces it by a pattern. Without
``budget`` only ``most`` bounds a chain.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from thrifty.contracts import END_OF_THOUGHT, All, Card, Problem, Sample, Score, Talk, ThriftyError, Trace
from thrifty.traces.segment import cuts

CARD = Card(
    key="trimr",
    title="TrimR: Verifier-based Training-Free Thinking Compression for Efficient Test-Time Scaling",
    arxiv="2505.17155",
    year=2025,
    saves=("tokens", "latency"),
    needs=("prefix",),
)
CLAIM = {
    "says": "Of a reasoner that goes on after its answer, stopping a chain once three sub-thoughts in a row with an "
    "answer have the same saves tokens at the same accuracy.",
    "parts": [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.15},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
    ],
    "comparator": {"key": "single-pass", "temperature": 0.0},
    # A sub-thought is a sentence; it has an answer where it states a value and works nothing out, whatever its words.
    "settings": {
        "markers": (" .",),
        "answer": r"^\W*[a-z]+ (-?\d+)\W*$",
        "agreements": 2,
        "sentences": 1,
        "most": 200,
        # Longer than any solution: one that is written again and again is for ``agreements`` to end.
        "repeat_tokens": 128,
        "mild": " .<|end of thought|>",
        "forced": "",
        "temperature": 0.0,
    },
    "student": "tail",
    "tasks": ["roll"],
    "n": 700,
    "seeds": 3,
    "unit": "student",
    "match": "the same chains up to the stop: greedy",
    "gates": {"accuracy of the student": [0.4, None]},
    "placebo": "stops",
    "oracle": "none: the family's takes the right one of several answers, and this writes one",
    "amendments": [
        "1: on students that stop soon after their answer two alike cost 4.5 points and saved 5 %, and the oracle "
        "could not do better; now a student that goes on, the paper's three alike, and an effect worth having",
        "2: 1,200 problems were inconclusive, and about 1,550 would have been needed for an accuracy as measured",
        "3: the text that concludes had a space token that no chain has, after which answers were miscopied, and 32 "
        "tokens that came three times closed chains in the middle of a solution written again; now no space, and 128",
    ],
}
Verdict = Literal["none", "new", "same"]
"""Of a sub-thought: no answer, another answer than the last one, the same."""
MARKER_TOKENS = 16
"""A marker has at most so many tokens."""


@dataclass(frozen=True)
class TrimR:
    markers: tuple[str, ...] = field(
        default=("\n\nWait", "\n\nBut", "\n\nAlternatively"), metadata={"help": "what begins a sub-thought"}
    )
    agreements: int = field(default=2, metadata={"help": "M: agreeing answers in a row that end the thinking"})
    most: int = field(default=40, metadata={"help": "sub-thoughts without such agreement after which it is closed"})
    share: float = field(default=0.8, metadata={"help": "share of the budget after which it is closed"})
    budget: int | None = field(default=None, metadata={"help": "thinking tokens of a chain; none: no bound"})
    interval: int = field(default=50, metadata={"help": "tokens written at a time, while the verifier reads"})
    sentences: int = field(default=3, metadata={"help": "last sentences of a sub-thought that the verifier reads"})
    repeat_tokens: int = field(default=32, metadata={"help": "tokens in a row whose repetition counts"})
    repeat_times: int = field(default=3, metadata={"help": "times after which a chain is looping"})
    verifier: str = field(default="main", metadata={"help": "role of the model that verifies"})
    answer: str = field(default="", metadata={"help": "pattern whose last match is the answer, in place of a verifier"})
    asks_answer: str = field(
        default="Question: {question}\n\nReasoning: {text}\n\nDoes the reasoning arrive at an answer to the question? "
        "Reply with Yes or No.",
        metadata={"help": "p1, with {question} and {text}"},
    )
    asks_same: str = field(
        default="Question: {question}\n\nFirst result: {before}\n\nSecond result: {text}\n\nDo both arrive at the same "
        "answer? Reply with Yes or No.",
        metadata={"help": "p2, with {question}, {before} and {text}"},
    )
    replies: tuple[str, str] = field(default=("Yes", "No"), metadata={"help": "what the verifier chooses between"})
    mild: str = field(default="\n\n**Final Answer**\n\n", metadata={"help": "put in when it has agreed with itself"})
    forced: str = field(
        default="\n\nTime is up; the best answer so far is my final one.\n",
        metadata={"help": "put in, and the chain closed, when it finds no end"},
    )
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        self._check()
        ask = Sample(problem.prompt, temperature=self.temperature, top_p=self.top_p)
        ends = (*self.markers, END_OF_THOUGHT)
        ids: Any = ()
        pieces = agreed = 0
        before = ""  # the last answer
        unread = ""  # a sub-thought that has ended and that nobody has judged yet
        while True:
            following = replace(ask, prefix=ids, until=ends, max_tokens=self.interval)
            if unread:
                count = agreed

                def enough(index: int, verdict: Any, count: int = count) -> bool:
                    return index == 0 and verdict == "same" and count + 1 >= self.agreements

                verdict, written = yield All([self._judge(problem, unread, before), following], stop=enough)
                if verdict != "none":
                    agreed = agreed + 1 if verdict == "same" else 0
                    before = unread
                if agreed >= self.agreements:
                    kept = yield from self._without_marker(ask, ids)
                    [trace] = yield replace(ask, prefix=kept, inject=self.mild)
                    return trace
            else:
                written = yield following
            [trace] = written
            ids = trace.ids
            if trace.finish not in ("until", "length"):
                return trace
            if trace.closed:
                [trace] = yield replace(ask, prefix=ids)
                return trace
            found = self.pieces(trace.thought)
            unread = self._end_of(found[pieces]) if len(found) > pieces + 1 else ""
            pieces = len(found) - 1
            spent = self.budget is not None and len(ids) >= self.share * self.budget
            if spent or pieces >= self.most or self._loops(ids):
                [trace] = yield replace(ask, prefix=ids, inject=self.forced + END_OF_THOUGHT)
                return trace

    def _check(self) -> None:
        """Raise ThriftyError for settings with which no chain would end or be judged."""
        for name in ("agreements", "most", "interval", "sentences", "repeat_tokens", "repeat_times"):
            if getattr(self, name) < 1:
                raise ThriftyError(f"trimr:{name} is {getattr(self, name)}: give at least 1")
        if not all(self.markers) or not self.markers:
            raise ThriftyError(f"trimr:markers is {self.markers}: give texts that begin a sub-thought")
        if len(self.replies) != 2:
            raise ThriftyError(f"trimr:replies is {self.replies}: give what stands for yes and for no")
        try:
            re.compile(self.answer)
            self.asks_answer.format(question="", text="")
            self.asks_same.format(question="", text="", before="")
        except (re.error, KeyError, IndexError, ValueError) as error:
            raise ThriftyError(
                f"trimr: {error}; answer is a pattern, {{question}} and {{text}} stand in asks_answer, in asks_same "
                "{before} too"
            ) from error

    def pieces(self, thought: str) -> list[str]:
        """The sub-thoughts of a chain, markers left out; the last one may be under way."""
        return [piece.strip() for piece in re.split("|".join(map(re.escape, self.markers)), thought)]

    def _end_of(self, piece: str) -> str:
        ranges = cuts(piece)[-self.sentences :]
        return piece[ranges[0][0] :].strip() if ranges else ""

    def _judge(self, problem: Problem, text: str, before: str) -> Generator[Any, Any, Verdict]:
        """Whether a sub-thought holds an answer, and that of the one before."""
        if self.answer:
            now, last = self._read(text), self._read(before) if before else None
            return "none" if now is None else "same" if now == last else "new"
        question = problem.prompt
        if not (yield from self._yes(self.asks_answer.format(question=question, text=text))):
            return "none"
        if not before:
            return "new"
        same = yield from self._yes(self.asks_same.format(question=question, text=text, before=before))
        return "same" if same else "new"

    def _yes(self, question: str) -> Generator[Any, Any, bool]:
        yes, no = yield Score(question, self.replies, role=self.verifier)
        return bool(yes > no)

    def _read(self, text: str) -> str | None:
        found = re.findall(self.answer, text, re.MULTILINE)
        return None if not found else " ".join(found[-1]) if isinstance(found[-1], tuple) else found[-1]

    def _without_marker(self, ask: Sample, ids: np.ndarray) -> Generator[Any, Any, np.ndarray]:
        """The chain up to the marker that ended its last sub-thought; nothing is generated to find it."""
        cuts_ = range(len(ids), max(0, len(ids) - MARKER_TOKENS) - 1, -1)
        [whole, *shorter] = yield All([replace(ask, prefix=ids[:n], max_tokens=0) for n in cuts_])
        marks = re.split("|".join(map(re.escape, self.markers)), whole[0].thought)
        length = len(whole[0].thought) - len(marks[-1])  # up to the end of the last marker
        bare = max((whole[0].thought[:length].removesuffix(m) for m in self.markers), key=lambda t: length - len(t))
        traces: list[Trace] = [trace for [trace] in (whole, *shorter)]
        return next((t.ids for t in traces if len(t.thought) <= len(bare.rstrip())), ids)

    def _loops(self, ids: np.ndarray) -> bool:
        """Whether some ``repeat_tokens`` tokens in a row, without overlap, have come ``repeat_times`` times."""
        size = self.repeat_tokens
        if len(ids) < size * self.repeat_times:
            return False
        values = np.ascontiguousarray(ids, np.int32)
        seen: Counter[bytes] = Counter()
        last: dict[bytes, int] = {}
        for at in range(len(values) - size + 1):
            window = values[at : at + size].tobytes()
            if window not in last or at - last[window] >= size:
                seen[window] += 1
                last[window] = at
        return max(seen.values()) >= self.repeat_times


def claim(trial: Any) -> dict[str, Any]:
    """Greedy chains with and without the stop: new tokens and accuracy."""
    outcomes = trial.solve(trial.method, trial.problems())
    found: dict[str, Any] = trial.answered(outcomes)
    if trial.arm == "comparator":
        trial.gate("accuracy of the student", sum(found["accuracy"]) / len(found["accuracy"]))
    trial.note("stopped early", sum(o.usage.injected > 0 for o in outcomes) / len(outcomes))
    trial.elsewhere(trial.method)
    return found
