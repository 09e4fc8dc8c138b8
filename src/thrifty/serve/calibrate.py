"""From measured settings of a dial to efforts: what is tried, what is dropped, and what each effort gets.

Efforts are evenly spaced in tokens, not in settings: of the settings that none other beats in both tokens and accuracy
(the Pareto set), the cheapest is "none", the dearest "high", and an effort between them gets the setting whose tokens
are nearest to its share of the way. So a dial whose middle is worse than its ends has only ends to offer, and no effort
promises the middle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from thrifty.contracts import Outcome, Problem, Prompt, RowFailed, Talk, ThriftyError
from thrifty.measure import stats, summarise
from thrifty.serve import methods
from thrifty.serve.backend import Backend, Job
from thrifty.serve.effort import EFFORTS, Between, Dial, Level
from thrifty.serve.errors import ApiError
from thrifty.serve.schemas import Ask
from thrifty.serve.talk import Record

NONE = "none"
"""On the command line: no thinking budget, the plain model."""
Setting = float | int | str | None


def settings(dial: Dial, texts: Sequence[str]) -> list[Setting]:
    """The dial's settings that ``texts`` name; ThriftyError for one that is none, is there twice, or is alone."""
    found = [_setting(dial, text.strip()) for text in texts]
    twice = [text for text, one in zip(texts, found) if found.count(one) > 1]
    if twice:
        raise ThriftyError(f"{dial} {twice[0]} is given twice: give every setting once")
    if len(found) < 2:
        raise ThriftyError(f"a dial needs two settings or more to be turned between, and {dial} has {len(found)}")
    return found


def _setting(dial: Dial, text: str) -> Setting:
    if dial == "strategy":
        methods.choose(text)
        return None if text in methods.PLAIN else text
    if dial == "thinking_token_budget":
        if text == NONE:
            return None
        if not text.isdecimal() or len(text) > 9:
            raise ThriftyError(f"--thinking-budget is {text!r}: give a whole number of tokens, or none for no limit")
        return int(text)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ThriftyError(f"--alpha needs a number, not {text!r}")
    return number


@dataclass(frozen=True, eq=False)
class AsServed:
    """A strategy that answers every problem as the gateway would at one setting of the dial."""

    backend: Backend
    dial: Dial
    setting: Setting
    parse: Callable[[str], str | None]

    def job(self, prompt: Prompt) -> Job:
        """One request of the gateway at this setting. Raises ThriftyError where the engine cannot do it."""
        choice = methods.choose(str(self.setting or NONE) if self.dial == "strategy" else NONE)
        job = Job(
            Ask(True, "", {}), prompt, choice, self.parse if choice.compares else None,
            strength=float(self.setting or 0.0) if self.dial == "strength" else None,
            budget=self.setting if self.dial == "thinking_token_budget" else None,  # type: ignore[arg-type]
        )  # fmt: skip
        if choice.samples > self.backend.limits.n:
            raise ThriftyError(f"{self.setting} takes {choice.samples} samples; a gateway gives {self.backend.limits.n}"
                               " unless its --max-n is raised")  # fmt: skip
        return job

    def check(self) -> None:
        """Raise ThriftyError, before any work, where the engine cannot turn the dial so far."""
        try:
            self.backend.check(self.job("?"))
        except ApiError as error:
            raise ThriftyError(error.message) from error

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        record = Record()
        try:
            served = self.backend.strategy(self.job(problem.prompt), record)
        except ApiError as error:
            raise RowFailed(f"problem {problem.id}: {error.message}") from error
        chosen = yield from served.solve(problem, rng)
        if record.fault is not None:
            raise record.fault
        return chosen


def level(setting: Setting, outcomes: Sequence[Outcome]) -> Level:
    """What outcomes at ``setting`` come to: accuracy with its 95 % interval, mean generated tokens per problem."""
    told = summarise(outcomes, "")
    tokens = sum(o.usage.generated for o in outcomes) / len(outcomes)
    return Level(setting, told["accuracy"], tokens, (told["accuracy_low"], told["accuracy_high"]))


def kept(levels: Sequence[Level]) -> list[int]:
    """The Pareto set of ``levels``, cheapest first: no other has at least the accuracy for no more tokens."""
    return stats.pareto([(one.tokens, one.accuracy) for one in levels])


def spread(levels: Sequence[Level]) -> dict[str, int]:
    """Which of ``levels`` every effort gets, by name of effort: see the head of this file. Ties go to the cheaper.

    >>> valve = [Level(a, right, tokens) for a, right, tokens in
    ...          [(0.0, 0.71, 121.0), (0.3, 0.55, 100.0), (0.6, 0.58, 75.0), (1.0, 0.6, 61.0)]]
    >>> spread(valve)
    {'none': 3, 'minimal': 3, 'low': 3, 'medium': 0, 'high': 0}
    """
    best = kept(levels)
    low, high = levels[best[0]].tokens, levels[best[-1]].tokens
    return {
        name: min(best, key=lambda i: (abs(levels[i].tokens - (low + place * (high - low))), levels[i].tokens))
        for name, place in EFFORTS.items()
    }


def between(levels: Sequence[Level]) -> Between:
    """Whether settings between measured ones may be promised: not where any of those tried was beaten."""
    return "interpolate" if len(kept(levels)) == len(levels) else "nearest"


def doubts(chosen: Mapping[str, Level]) -> list[str]:
    """What the figures on other problems do not bear out: a dearer effort that was no more accurate there."""
    told = []
    names = list(chosen)
    for below, above in pairwise(names):
        one, other = chosen[below], chosen[above]
        if other.tokens > one.tokens and other.accuracy <= one.accuracy:
            told.append(f"{above} costs more tokens than {below} and was no more accurate on the problems measured")
    return told


def name_of(dial: Dial, setting: Setting) -> str:
    """A setting as people read it."""
    if dial == "strategy":
        return str(setting or NONE)
    if dial == "strength":
        return f"α = {setting:g}"
    return "no budget" if setting is None else f"budget {setting}"


def table(efforts: Mapping[str, Level], thought: Mapping[str, float], dial: Dial, title: str) -> Any:
    """A rich table of efforts: setting, accuracy, generated and thinking tokens. ``thought`` is by name of effort."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, caption="Means per problem.", caption_justify="left", box=SIMPLE_HEAD, show_edge=False)
    made.add_column("effort", no_wrap=True)
    made.add_column("setting", no_wrap=True)
    for heading in ("accuracy (95 %)", "tokens", "thinking\ntokens", "of high"):
        made.add_column(heading, justify="right", no_wrap=True)
    most = efforts["high"].tokens
    for name, one in efforts.items():
        low, high = one.accuracy_interval or (math.nan, math.nan)
        made.add_row(
            name, name_of(dial, one.setting), f"{one.accuracy * 100:.1f} % ({low * 100:.1f}–{high * 100:.1f})",
            f"{one.tokens:.1f}", f"{thought[name]:.1f}", f"{one.tokens / most * 100:.0f} %" if most else "–",
        )  # fmt: skip
    return made
