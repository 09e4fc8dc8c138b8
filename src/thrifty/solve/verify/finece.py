"""The model itself says how likely a beginning is to end right, at any point of a chain: stop, abstain or vote by it.

*Labels* by Monte Carlo: for a text s (a question, with or without the beginning of an answer) k completions are
sampled, and Conf(s) is the share of right ones; a finished answer has 1 or 0. To avoid a k-ary tree, the first steps of
a question's k answers are clustered (TF-IDF, cosine distance, average linkage, threshold 0.3) and one of each of the m
largest clusters goes on; of its k continuations only the next step of the most central one does, T levels deep:
k * (1 + m * T) completions (``labels``). *Training* is ordinary: a question about s, the number as target
(``examples``). *Asking* is prefill only: the mean of the numbers 0, 0.1 ... 1 under the model's probabilities for them
(``confidence``).
Backward integration looks ahead from a beginning: w next steps are sampled,

    Conf'(s) = alpha * Conf(s) + (1 - alpha) * mean over the w next s' of Conf'(s'),      depth steps deep.

>>> FineCE().expected([-1.0, -1.0], words=("0.2", "0.6"))  # two numbers, equally likely
0.4
>>> integrate(0.5, [0.9, 0.7], alpha=0.5)
0.65
>>> clusters(["add 3 and 4", "add 3 and 4 first", "multiply them"], threshold=0.3)
[[0, 1], [2]]

Paper: Han et al., Mind the Generation Process: Fine-Grained Confidence Estimation During LLM Generation
(2508.12040).
Differs: the number is not sampled but read as a mean over what the model may say. The target follows the prompt without
a chain of thought. The paper's alpha could not be checked.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.contracts import All, Card, Grade, Problem, Sample, Score, Talk, Trace

if TYPE_CHECKING:
    from thrifty.models.chat import ChatFormat
    from thrifty.tune.batches import Example

CARD = Card(
    key="finece",
    title="Mind the Generation Process: Fine-Grained Confidence Estimation During LLM Generation",
    arxiv="2508.12040",
    year=2025,
    saves=("tokens",),
    needs=("score",),
)
CLAIM = {
    "says": "A confidence learnt from Monte Carlo labels tells right from wrong answers better than the answer's own "
    "probability.",
    "parts": [
        {"name": "AUROC", "test": "superior", "smallest": 0.03},
        {"name": "Brier score", "test": "superior", "better": "lower", "smallest": 0.01},
    ],
    "comparator": None,
    "settings": {
        "asks": "{question} | {text} ?",
        "words": ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        "adapter": "valve",
        "k": 8,
        "m": 2,
        "step": (" .",),
    },
    "student": "long",
    "students": 3,
    "tasks": ["roll"],
    "levels": [3, 4],
    "n": 700,
    "seeds": 6,
    "unit": "training",
    "match": "the same answers, drawn at temperature 1 as those learnt from; training is extra",
    "gates": {"accuracy": [0.1, 0.95]},
    "placebo": {"words": ("0",)},
    "amendments": [
        "1: the answer's own probability was asked for without the space before it, which the students never write: it "
        "was 1e-8, and the placebo held",
        "2: one right and one wrong answer of each batch were learnt from, and answers at temperature 0.7 judged by "
        "what was learnt at 1: false base rates, both; now all finished answers are learnt from, all are drawn at 1, "
        "and 150 steps at 3e-3 take the place of 300 at 1e-3, as tried on development problems of one student; and "
        "AUROC's interval followed from the plain spread of shares, which is at most half of DeLong's",
        "3: the confidence is trained, but problems were taken as the unit, with one training per student; now the "
        "training is, two on each student",
    ],
}
ASK = (
    "Here is a question and, perhaps, the beginning of an answer. How likely is it that the answer will be right? "
    "Reply with one number between 0 and 1.\n\nQuestion: {question}\n\nAnswer: {text}"
)


@dataclass(frozen=True)
class FineCE:
    asks: str = field(default=ASK, metadata={"help": "the question about a text, with {question} and {text}"})
    words: tuple[str, ...] = field(
        default=tuple(f"{i / 10:.1f}" for i in range(11)),
        metadata={"help": "what the model may say, from certainly wrong to certainly right"},
    )
    adapter: str = field(default="", metadata={"help": "LoRA that was trained on the labels; none: the model as it is"})
    role: str = field(default="main", metadata={"help": "role of the model that is asked"})
    k: int = field(default=30, metadata={"help": "completions per text, for labels"})
    m: int = field(default=3, metadata={"help": "clusters of first steps that go on"})
    levels: int = field(default=1, metadata={"help": "T: steps deep that labels go"})
    threshold: float = field(default=0.3, metadata={"help": "cosine distance at which clusters stay apart"})
    step: tuple[str, ...] = field(default=("\n\n",), metadata={"help": "what ends a step"})
    alpha: float = field(default=0.5, metadata={"help": "weight of a text's own confidence when looking ahead"})
    width: int = field(default=4, metadata={"help": "w: next steps sampled when looking ahead"})
    depth: int = field(default=0, metadata={"help": "steps looked ahead for an unfinished text; 0 asks once"})
    temperature: float = field(default=1.0, metadata={"help": "sampling temperature"})

    def rate(self, problem: Problem, traces: Sequence[Trace], rng: random.Random) -> Talk:
        """One confidence in [0, 1] per trace; unfinished ones are looked ahead of where ``depth`` is above 0."""
        return (yield All([self.confidence(problem, t, 0 if t.complete else self.depth) for t in traces]))

    def confidence(self, problem: Problem, trace: Trace, depth: int = 0) -> Generator[Any, Any, float]:
        """Conf'(s) of a problem with what ``trace`` holds of its answer."""
        asked = self.asks.format(question=problem.prompt, text=_text(trace))
        adapters = {self.adapter: 1.0} if self.adapter else {}
        scores = yield Score(asked, self.words, role=self.role, adapters=adapters)
        own = self.expected(scores)
        if depth < 1 or trace.finish == "stop":
            return own
        ask = Sample(problem.prompt, prefix=trace.ids, temperature=self.temperature)
        following = yield replace(ask, n=self.width, until=self.step)
        ahead = yield All([self.confidence(problem, t, depth - 1) for t in following])
        return integrate(own, ahead, self.alpha)

    def expected(self, scores: Sequence[float], words: Sequence[str] | None = None) -> float:
        """Mean of the numbers under these log-probabilities; words that are no numbers count as evenly spread."""
        chances = np.exp(np.asarray(scores, float) - max(scores))
        return round(float(chances @ self.numbers(words) / chances.sum()), 12)

    def numbers(self, words: Sequence[str] | None = None) -> np.ndarray:
        """What each word stands for, in [0, 1]."""
        words = words or self.words
        values = [float(w) if re.fullmatch(r"[01](\.\d+)?", w) else math.nan for w in words]
        if any(math.isnan(v) or v > 1 for v in values) or len(words) == 1:
            values = [i / (len(words) - 1) if len(words) > 1 else 0.5 for i in range(len(words))]
        return np.asarray(values)

    # ---- training data --------------------------------------------------------------------------------

    def labels(
        self, problem: Problem, grade: Callable[[Problem, str], Grade]
    ) -> Generator[Any, Any, list[tuple[str, float]]]:
        """A talk that returns texts (what stands of an answer, "" for none) and their confidences."""
        firsts, answers = yield from self._complete(problem, ())
        found = [("", self._share(problem, answers, grade)), *self._whole(problem, answers, grade)]
        groups = clusters([_text(t) for t in firsts], self.threshold)
        for group in sorted(groups, key=len, reverse=True)[: self.m]:
            at = firsts[group[0]]
            for _ in range(self.levels):
                if at.finish != "until":
                    break
                following, answers = yield from self._complete(problem, at.ids)
                found += [(_text(at), self._share(problem, answers, grade)), *self._whole(problem, answers, grade)]
                at = following[central([_text(t) for t in following])]
        return found

    def examples(self, problem: Problem, found: Sequence[tuple[str, float]], chat: ChatFormat) -> list[Example]:
        """Training examples: the question about each text, and its confidence as the nearest word."""
        from thrifty.tune.batches import Example

        numbers, end, made = self.numbers(), chat.tokenizer.eos_token_id, []
        for text, value in found:
            asked = chat.prompt_ids(self.asks.format(question=problem.prompt, text=text))
            nearest = self.words[int(np.abs(numbers - value).argmin())]
            word = chat.tokenizer.encode(nearest, add_special_tokens=False)
            made.append(Example(asked, [*word, end]))
        return made

    def _complete(self, problem: Problem, prefix: Any) -> Generator[Any, Any, tuple[list[Trace], list[Trace]]]:
        """``k`` continuations: their next steps, and the whole answers that these became."""
        ask = Sample(problem.prompt, prefix=prefix, temperature=self.temperature)
        steps = yield replace(ask, n=self.k, until=self.step)
        unfinished = [t for t in steps if t.finish == "until"]
        rests = iter((yield All([replace(ask, prefix=t.ids) for t in unfinished])))
        return steps, [next(rests)[0] if t.finish == "until" else t for t in steps]

    @staticmethod
    def _share(problem: Problem, traces: Sequence[Trace], grade: Callable[[Problem, str], Grade]) -> float:
        return sum(t.complete and grade(problem, t.response).right for t in traces) / len(traces)

    def _whole(
        self, problem: Problem, traces: Sequence[Trace], grade: Callable[[Problem, str], Grade]
    ) -> list[tuple[str, float]]:
        """All finished answers, as often as they came: how many of them are right is the base rate that is learnt."""
        return [(_text(t), float(grade(problem, t.response).right)) for t in traces if t.complete]


def integrate(own: float, ahead: Sequence[float], alpha: float) -> float:
    """Conf' of a text from its own confidence and those of the texts one step on."""
    return alpha * own + (1 - alpha) * sum(ahead) / len(ahead)


def clusters(texts: Sequence[str], threshold: float) -> list[list[int]]:
    """Indices of texts by cluster: average linkage on the cosine distance of TF-IDF vectors, cut at ``threshold``."""
    from scipy.cluster.hierarchy import fcluster, linkage

    distances = _distances(texts)
    if len(texts) < 2:
        return [[i] for i in range(len(texts))]
    upper = distances[np.triu_indices(len(texts), 1)]
    names = fcluster(linkage(upper, "average"), threshold, "distance")
    found: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(int(name), []).append(i)
    return sorted(found.values())


def central(texts: Sequence[str]) -> int:
    """Index of the text that is nearest to all others."""
    return int(_distances(texts).sum(1).argmin())


def _distances(texts: Sequence[str]) -> np.ndarray:
    """Cosine distances ``[n, n]`` of TF-IDF vectors over words and marks, idf = log((1 + n) / (1 + df)) + 1."""
    words = [Counter(re.findall(r"\w+|[^\w\s]", text.lower())) for text in texts]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*words)))}
    counts = np.zeros((len(texts), max(1, len(vocabulary))))
    for row, found in enumerate(words):
        for word, count in found.items():
            counts[row, vocabulary[word]] = count
    vectors = counts * (np.log((1 + len(texts)) / (1 + (counts > 0).sum(0))) + 1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, 1e-12)
    distances: np.ndarray = np.clip(1 - unit @ unit.T, 0, 2)
    # Two empty texts are alike, an empty one and another are not.
    empty = norms[:, 0] == 0
    distances[np.ix_(empty, empty)] = 0.0
    return distances


def _text(trace: Trace) -> str:
    return f"{trace.thought} {trace.response}".strip()


# ------------------------------------------------------------------------------------------------- the claim


LEARNT = Path("stages/confidence")
QUESTIONS, STEPS, RATE = 120, 150, 3e-3
"""Training problems, optimiser steps and learning rate."""


@dataclass
class _Heard:
    """Runs a talk for every problem and keeps what it returns."""

    talk: Callable[[Problem], Any]
    found: dict[str, Any] = field(default_factory=dict)

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        self.found[problem.id] = yield from self.talk(problem)


def claim(trial: Any) -> dict[str, Any]:
    """How well a confidence tells one sampled answer per problem: placements (AUROC) and squared error (Brier)."""
    from thrifty.engines.runner import Runner

    # Drawn as the paper draws those that it learns from: of other answers another share is right.
    problems, samples = trial.bank(k=1, temperature=1.0, top_p=1.0)
    answers = {p.id: group[0] for p, group in zip(problems, samples)}
    right = np.array([float(answers[p.id].grade.right) for p in problems])
    lab = trial.lab()
    trial.gate("accuracy", float(right.mean()))
    if trial.arm == "method":
        method = trial.method
        amount = trial.scaled(QUESTIONS), trial.scaled(STEPS)
        learnt = trial.once("confidence", lambda folder: _learn(trial, method, folder), method, *amount) / LEARNT
        trial.trained(learnt)

        def talk(problem: Problem) -> Talk:
            return method.rate(problem, [answers[problem.id].chosen], random.Random(0))

        engine = lab.engine(adapter=learnt / "adapter")
    else:

        def talk(problem: Problem) -> Talk:
            trace = answers[problem.id].chosen
            cut = next((span.end for span in trace.spans if span.kind == "thought"), 0)
            # as it was written, with the space before it
            said = tokenizer.decode(trace.ids[cut:].tolist(), skip_special_tokens=True)
            [score] = yield Score(problem.prompt, (said or "?",), prefix=trace.ids[:cut])
            return [math.exp(score)]

        engine, tokenizer = lab.engine(), lab.loaded().tokenizer
    heard = _Heard(talk)
    Runner(engine, lab.task).solve(heard, problems, trial.seed)
    stated = np.array([heard.found[p.id][0] for p in problems])
    trial.note("mean confidence", float(stated.mean()))
    return {"AUROC": placements(stated, right), "Brier score": (stated - right) ** 2}


def placements(stated: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One value per answer, whose mean is the AUROC and whose variance is that of its DeLong estimate.

    An answer's share of the other kind's answers that it stands on the right side of (ties count half) differs from the
    AUROC by its influence on its own kind's mean, so the difference is multiplied by answers over answers of the kind
    (E. DeLong et al., Biometrics 44, 1988). 0.5 everywhere if all answers are of one kind.
    """
    kinds = right == 1
    if kinds.all() or not kinds.any():
        return np.full(len(right), 0.5)
    above = (stated[:, None] > stated) + 0.5 * (stated[:, None] == stated)
    shares = np.where(kinds, above[:, ~kinds].mean(1), 1 - above[:, kinds].mean(1))
    auroc = shares.mean()
    weighted: np.ndarray = auroc + (shares - auroc) * len(kinds) / np.where(kinds, kinds.sum(), (~kinds).sum())
    return weighted


def _learn(trial: Any, method: FineCE, folder: Path) -> None:
    from thrifty.engines.runner import Runner
    from thrifty.tune.batches import Shuffled

    lab = trial.lab()
    lab.folder = folder
    train = lab.task.problems("train", trial.scaled(QUESTIONS), trial.seed, trial.claim.levels)
    heard = _Heard(lambda problem: method.labels(problem, lab.task.grade))
    Runner(lab.engine(), lab.task).solve(heard, train, trial.seed)
    data = [e for p in train for e in method.examples(p, heard.found[p.id] or [], lab.loaded().chat)]
    lab.tune("confidence", Shuffled(data, 32, trial.seed), lab.training(trial.scaled(STEPS), 32, RATE), rank=8)
