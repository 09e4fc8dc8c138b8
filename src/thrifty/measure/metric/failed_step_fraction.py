"""How much of a chain went into branches that were given up: of several samples, the one with the least is righter.

    FSF = steps in abandoned branches / steps

The mean over chains is the metric. As a verifier (``BestOfN(verifier=FailedStepFraction())``) it rates a trace by -FSF:
nothing is asked of a model. Steps and branches are read off the surface of a chain (``traces/segment.py``):

- a step that holds a ``failure`` cue is a dead end: it is abandoned;
- in prose so are the steps before it, back to the one that opened the branch ("Alternatively", "Suppose", "Let me
  try"), where there is one since the last dead end;
- where steps restate a state of fixed width, so are the steps before it that share the choice which the next step
  takes back: the first word in which the next step differs from the dead end.

>>> FailedStepFraction().fraction("First 2 + 3. Suppose x is 4. Then 4 + 3 is 7. That does not work. Now x is 5.")
0.6
>>> FailedStepFraction().fraction("a + b 4 : 5 . a + b + : 1 no . a - b 4 : 7 . a - b + : 3 .")
0.5
>>> graph = 'digraph { a -> b; a -> c; b [color=red]; c; a }'
>>> from_graphviz(graph)  # one node of three is marked
0.3333333333333333

Paper: Feng et al., What Characterizes Effective Reasoning? Revisiting Length, Review, and Structure of CoT
(2509.19284).
Differs: the paper has a large model write a chain as a Graphviz graph; here rules read the chain, and ``from_graphviz``
reads such a graph. Of its other two metrics length is on every trace and review is the share of check steps of
``traces/segment.py``; its second intervention, cutting failed branches off a prefix, is ``without_failures``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from thrifty.contracts import Card, Outcome, Problem, Talk, Trace
from thrifty.traces.segment import segment

CARD = Card(
    key="failed-step-fraction",
    title="What Characterizes Effective Reasoning? Revisiting Length, Review, and Structure of CoT",
    arxiv="2509.19284",
    year=2025,
    saves=("tokens",),
)
CLAIM = {
    "says": "Of eight samples the one with the smallest share of failed steps is right more often than the shortest.",
    "parts": [
        {"name": "against the shortest", "test": "superior", "smallest": 0.02},
        {"name": "against a random one", "test": "superior", "smallest": 0.02},
    ],
    "comparator": None,
    "student": "long",
    "tasks": ["search"],
    "levels": [1, 2, 3],
    "n": 600,
    "seeds": 3,
    "unit": "student",
    "match": "the same eight samples of every problem, from the bank",
    "gates": {"accuracy of a sample": [0.1, 0.95], "problems whose samples differ in it": [0.3, None]},
    "placebo": {"failure": "(?!)"},
}
FAILURE = (
    r"\b(?:dead end|does(?:n't| not) work|did(?:n't| not) work|won't work|not possible|impossible|contradict\w*|no luck"
    r"|that(?:'s| is) (?:wrong|not right|incorrect)|this is wrong|fail(?:s|ed)?|backtrack\w*|back up)\b"
    r"|\b(?:no|wrong)\b(?=\s*(?:back\b|undo\b|[.,;!]?\s*$))"
)
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|/\*.*?\*/|//[^\n]*|^#[^\n]*', re.DOTALL | re.MULTILINE)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-[->]|[\[\]{};,=\n]|(?:(?!-[->])[^\s\[\]{};,="])+')
_WORDS = ("node", "edge", "graph", "digraph", "subgraph", "strict")


@dataclass(frozen=True)
class FailedStepFraction:
    failure: str = field(default=FAILURE, metadata={"help": "pattern that tells a dead end, in any case"})

    better: ClassVar[Literal["higher", "lower"]] = "lower"

    def measure(self, outcomes: Sequence[Outcome]) -> float | None:
        """Mean over the chosen chains that have any text; None without one."""
        found = [self.fraction(o.chosen.thought) for o in outcomes if o.chosen is not None and o.chosen.thought.strip()]
        return sum(found) / len(found) if found else None

    def rate(self, problem: Problem, traces: Sequence[Trace], rng: random.Random) -> Talk:
        """-FSF of each trace; asks for nothing."""
        return [-self.fraction(trace.thought) for trace in traces]
        yield

    def fraction(self, thought: str) -> float:
        """FSF of a chain; 0 for an empty one."""
        flags = [failed for _, failed in self.steps(thought)]
        return sum(flags) / len(flags) if flags else 0.0

    def without_failures(self, thought: str) -> str:
        """The chain without its abandoned steps: a prefix from which to sample anew."""
        return "".join(text for text, failed in self.steps(thought) if not failed)

    def steps(self, thought: str) -> list[tuple[str, bool]]:
        """The steps of a chain, and whether each stands in an abandoned branch. They join up to the chain."""
        found = segment(thought)
        texts = [thought[step.start : step.end] for step in found]
        words = [text.split() for text in texts]
        dead = re.compile(self.failure, re.IGNORECASE)
        failed = [bool(dead.search(text)) for text in texts]
        opened: int | None = None
        for i, step in enumerate(found):
            if step.kind == "branch" and opened is None:
                opened = i
            if not dead.search(texts[i]):
                continue
            if opened is not None:
                failed[opened:i] = [True] * (i - opened)
                opened = None
            if i + 1 < len(texts):
                for earlier in _shares_choice(words, i):
                    failed[earlier] = True
        return list(zip(texts, failed))


def from_graphviz(graph: str, marked: str = r"red|fail|abandon") -> float:
    """FSF of a chain that a model wrote as a Graphviz graph: the share of nodes whose attributes match ``marked``.

    Labels and tooltips say what a step is about and mark nothing.
    """
    tokens = _TOKEN.findall(_COMMENT.sub(r"\1", graph.partition("{")[2].rpartition("}")[0]))
    usual, marks = "", dict[str, str]()  # the attributes of nodes to come, and of each node
    here: list[str] = []  # names of this statement
    joined = False
    while tokens:
        token = tokens.pop(0)
        if token == "[":
            end = tokens.index("]") if "]" in tokens else len(tokens)
            given, tokens = _attributes(tokens[:end]), tokens[end + 1 :]
            if here == ["node"]:
                usual += given
            elif not joined and here and here[-1] in marks:
                marks[here[-1]] += given
        elif token == "=":  # of the graph, not a node
            if here and marks.get(here[-1]) == usual:
                del marks[here[-1]]
            tokens, here = tokens[1:], []
        elif token in ("->", "--"):
            joined = True
        elif token in ("{", "}", ";", ",", "\n"):
            if token != "\n" or not (tokens and tokens[0] in ("[", "->", "--")):
                here, joined = [], False
        else:
            here.append(token.strip('"') if '"' in token else token.partition(":")[0])  # a:n is a port of a
            if token not in _WORDS and here[0] != "subgraph":
                marks.setdefault(here[-1], usual)
    failed = [bool(re.search(marked, given, re.IGNORECASE)) for given in marks.values()]
    return sum(failed) / len(failed) if failed else 0.0


def _attributes(tokens: Sequence[str]) -> str:
    """Names and values, but for those that are text to read."""
    words = [token for token in tokens if token not in ("=", ",", ";", "\n")]
    pairs = zip(words[::2], words[1::2])
    return " ".join(f"{name}={value}" for name, value in pairs if name.strip('"') not in ("label", "xlabel", "tooltip"))


def _shares_choice(words: Sequence[Sequence[str]], dead: int) -> list[int]:
    """Steps before a dead end that hold the choice which the step after it takes back, where all restate one state."""
    here, after = words[dead], words[dead + 1]
    where = next((i for i, (a, b) in enumerate(zip(here, after)) if a != b), None)
    if where is None or where == 0 or here[0] != after[0]:
        return []
    found = []
    for i in range(dead - 1, -1, -1):
        if list(words[i][: where + 1]) != list(here[: where + 1]):
            break
        found.append(i)
    return found


def claim(trial: Any) -> dict[str, Any]:
    """Accuracy of the sample that each rule chooses among eight; ties go to the first."""
    _, samples = trial.bank(k=8)
    right = [[float(o.grade.right) for o in group] for group in samples]
    differs = [len({FailedStepFraction().fraction(o.chosen.thought) for o in group}) > 1 for group in samples]
    trial.gate("accuracy of a sample", sum(map(sum, right)) / sum(map(len, right)))
    trial.gate("problems whose samples differ in it", sum(differs) / len(differs))
    if trial.arm == "comparator":
        shortest = [min(range(len(group)), key=lambda i: (len(group[i].chosen.ids), i)) for group in samples]
        return {
            "against the shortest": [ok[i] for ok, i in zip(right, shortest)],
            "against a random one": [sum(ok) / len(ok) for ok in right],
        }
    failed = [[trial.method.fraction(o.chosen.thought) for o in group] for group in samples]
    chosen = [ok[f.index(min(f))] for ok, f in zip(right, failed)]
    trial.note("failed-step fraction of right samples", _mean(failed, right, 1.0))
    trial.note("failed-step fraction of wrong samples", _mean(failed, right, 0.0))
    return {"against the shortest": chosen, "against a random one": chosen}


def _mean(values: Sequence[Sequence[float]], right: Sequence[Sequence[float]], which: float) -> float:
    among = [v for vs, oks in zip(values, right) for v, ok in zip(vs, oks) if ok == which]
    return sum(among) / len(among) if among else 0.0
