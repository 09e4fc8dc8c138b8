"""Model cards of the shipped students, measured: ``python -m thrifty.assets.students --card``.

Every student answers the same fixed problems of the test split, sampled at T = 0.7. The figures go into a README.md in
each student's folder and, all students together, into docs/students.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thrifty import assets
from thrifty.assets.evaluate import Cells, Pass, by_level, outcomes
from thrifty.assets.students import CONTROL
from thrifty.files import write_text
from thrifty.models.load import load as load_model
from thrifty.tasks import embedded, load
from thrifty.tasks.gymchains import GYM_CONFIG
from thrifty.tasks.machines import FAMILIES

if TYPE_CHECKING:
    from thrifty.contracts import Task

WHAT = {
    "long": "thinks at length: re-checks (some repair a slip), redundant branches, restatements, a tail after the "
    "answer; how much of each is a mood that the prompt does not show",
    "tail": "thinks like *long*, finds its answer, and writes its whole solution out again up to eight times and more; "
    "it is for roll, and has lost much of the other tasks",
    "short": "thinks tersely: three operations per line, no re-check",
    "mixed": "takes a control word in front of the prompt: `full`, `plain`, `terse` or `direct`",
    "base": "answers without a chain",
}

NOTES = """## What the recipe rests on

- *Labels.* With one label per line operations in the middle of a prompt were still guessed after 5 million tokens. With
  every operation right after its own label, in the prompt and in the chain (`7 b +3 = 0 .`), looking one up is copying
  what followed the label. From nothing, on all families at once, that appears between 6 and 8 million tokens (the
  loss that training prints falls from 0.43 to 0.22 within 2 million) and lifts every family with it: at the gates plain
  bool goes from 0.2 to 0.8 and string_splitting from 0.03 to 0.5 between 5 and 10 million.
- *One token per operation* (`+3`): a table of two entries.
- *The state first.* Chains of list, bool and the reasoning-gym tasks open with the state they start from, so that
  every later line finds it at a fixed distance. With it list is learnt (1.00 at levels 1 to 3 on seed 2, plain);
  without it it stood at 0.
- *Long contexts* cost look-ups: at the trunk's last gate plain roll chains are right at 1.00, long ones at 0.4. The two
  stages of *long* mend that; a third of plain chains under their control word in the second keeps *long* able to
  write them, as a reasoning model keeps what it knew before.
- *Two operations a line* are no handicap: a *short* with two was right more often than *long*. It writes three, and so
  do the heavy slots of roll, where *long* needs its re-checks. Three are still being learnt when its training ends: at
  1 million tokens 20 to 25 % of roll were right.
- *Re-checks* (`python -m thrifty.assets.evaluate --checks roll --n 400`, seeds 0, 1, 2): 7.4, 13.7 and 14.2 % repair.
  Accuracy of *long* by level, mean of the seeds: 91/88/80/61; with `|` never sampled 80/21/20/15; with the re-checks
  that found nothing taken out of the chain 91/86/79/59.
- *Still open*: search stays below half, string_synthesis between a third and two thirds; chain_sum is not learnt.
- *Plain chains of string rules* apply a rule up to three times a line. A line per rule, however often it applies, was
  right for *long* at 57 to 65 %; three at once are at 85 to 93 % after the last stage, at a third of the long chain.
- *Stages.* Per seed `--which trunk` (exported, it is `mixed`) and `think`, then `long`, `tail`, `short` and `base`. All
  but the first two are trained by the recipe as it is. Trunk and think are older: a heavy slot of roll still held two
  operations (so `mixed` does not know three), and a plain line of a string rule applied it as often as it went. In a
  checkout of the commit that trained them, and from the run before, each stage prints its first loss again:

  | stage | commit | first loss, seeds 0, 1, 2 |
  |---|---|---|
  | trunk; seed 2 `--tokens 13` | e302081 | 4.7853 / 4.7322 / 4.8106 |
  | think, seeds 0 and 1, there called `long` | e302081 | 0.3397 / 0.3098 |
  | think, seed 2 `--tokens 3.5`, taken at its checkpoint at 2.5 million | 3e99bdb | 0.4678 |
  | long | as it is | 0.3111 / 0.3185 / 0.2215 |
  | tail | as it is | 0.5363 / 0.5788 / 0.4351 |
  | short | as it is | 1.4467 / 1.3605 / 1.2609 |
  | base | as it is | 2.2297 / 2.4814 / 2.5214 |
"""


def tasks(n: int) -> list[tuple[Task, int]]:
    """The tasks of the card, with the number of problems of each: ``n`` of roll, half as many of the others."""
    found: list[tuple[Task, int]] = [(embedded.task(name), n if name == "roll" else n // 2) for name in FAMILIES]
    found.append((embedded.task("roll-b"), n // 2))
    found += [(load(f"rg:{name}", config=config), n // 2) for name, config in GYM_CONFIG.items()]
    return found


def measure(folder: Path, n: int, prefix: str = "") -> dict[str, Cells]:
    """A student's figures on the fixed problems, by task."""
    loaded = load_model(str(folder))
    return {
        task.name: by_level(outcomes(loaded, task, task.problems("test", count), Pass(prefix)))
        for task, count in tasks(n)
    }


def table(cells: dict[str, Cells]) -> str:
    """Markdown: a row per task, a column per level, "accuracy % / thinking tokens"."""
    rows = ["| task | level 1 | level 2 | level 3 | level 4 | mean |", "|---|---|---|---|---|---|"]
    for name, levels in cells.items():
        shown = {level: f"{right:.0%} / {tokens:.0f}" for level, (right, tokens, _) in levels.items()}
        right, tokens = (sum(cell[i] for cell in levels.values()) / len(levels) for i in (0, 1))
        columns = [shown.get(level, "") for level in (1, 2, 3, 4)]
        rows.append(f"| {name} | {' | '.join(columns)} | {right:.0%} / {tokens:.0f} |")
    return "\n".join(rows)


def write(docs: Path | None, n: int) -> str:
    """Measure every shipped student and write the cards; the text of docs/students.md comes back."""
    parts = [
        "# The students\n",
        "Tiny reasoning models that ship with thrifty: Qwen3-shaped, 4 layers, d = 128, about 0.75 million parameters, "
        "bf16. `thrifty.assets.find(NAME)` gives the folder, an ordinary one for `from_pretrained`. The three training "
        "seeds share nothing: each starts from its own random weights.\n",
        "Accuracy / mean thinking tokens at T = 0.7 on fixed problems of the test split "
        f"({n} of roll, {n // 2} of each other task). Printed by `python -m thrifty.assets.students --card --n {n} "
        "--docs docs/students.md`, which writes the students' model cards too.\n",
    ]
    for name in assets.available():
        kind = name.split("-")[0]
        folder = assets.find(name)
        body = []
        for control in CONTROL.values() if kind == "mixed" else ("",):
            head = f"With the control word `{control}`:\n\n" if control else ""
            body.append(head + table(measure(folder, n, f"{control} " if control else "")))
            print(f"{name} {control}\n{body[-1]}\n", flush=True)
        parts.append(f"## {name}\n\n{name} {WHAT[kind]}.\n\n" + "\n\n".join(body) + "\n")
        write_text(folder / "README.md", model_card(name, kind, n, "\n\n".join(body)))
    text = "\n".join([*parts, NOTES])
    if docs is not None:
        write_text(docs, text)
    return text


def model_card(name: str, kind: str, n: int, body: str) -> str:
    """The README.md of one student's folder."""
    return (
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# thrifty student {name}\n\nA tiny reasoning model for tests and demonstrations. It {WHAT[kind]}. Trained "
        "from nothing on procedural problems only, by `thrifty/assets/students.py`; it knows no language. The chain of "
        "thought stands between `<think>` (prefilled by the chat template) and `</think>`.\n\n"
        f"Accuracy / mean thinking tokens, T = 0.7, {n} test problems of roll and {n // 2} of each other task:\n\n"
        f"{body}\n"
    )
