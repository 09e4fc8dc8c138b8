"""The report as its readers meet it: in the terminal, in a file, in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from browser import CHROMIUM, browser, open_page
from example_run import SETTINGS, example_run, outcomes, problems
from thrifty.contracts import Grade, Outcome, Problem, ThriftyError, Trace, Usage
from thrifty.measure import summarise
from thrifty.report import charts, picture, table, write_report
from thrifty.report import viewer as viewer_module
from thrifty.report.run import SHOWN, load
from thrifty.traces.store import read, rows_from, write

NASTY = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><!-- & \u2028 \"'"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def nasty() -> Outcome:
    """A problem whose every text tries to break out of the page."""
    usage = Usage(prompt=5, thought=9, answer=2, calls=1, seconds=0.1)
    trace = Trace(np.arange(11, dtype=np.int32), f"Wait, {NASTY} = 7.", NASTY, True, "stop", usage=usage)
    return Outcome(Problem(f"id {NASTY}", NASTY, "7", "roll", 1), trace, Grade(1.0, "7"), [trace], usage)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = example_run(tmp_path_factory.mktemp("runs") / "demo", 120, extra=[nasty()])
    write_report(made)
    return made


@pytest.fixture(scope="module")
def page_text(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def copy_run(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run folder with keys of its result changed (None: removed)."""
    to.mkdir()
    (to / "traces.parquet").write_bytes((folder / "traces.parquet").read_bytes())
    result = json.loads((folder / "result.json").read_text()) | changes
    (to / "result.json").write_text(json.dumps({key: value for key, value in result.items() if value is not None}))
    return to


# ------------------------------------------------------------------------------------------------ the file


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_fetches_nothing(page_text: str) -> None:
    tags = Tags()
    tags.feed(page_text)
    assert not [t for t, a in tags.seen if t in ("link", "img", "iframe", "object", "embed")]
    assert not [a for _, a in tags.seen if "src" in a]
    assert all(a["href"].startswith("#") for _, a in tags.seen if a.get("href"))
    assert "url(" not in page_text[: page_text.index("</style>")]
    assert "default-src 'none'" in page_text


def test_chains_cannot_end_their_script(page_text: str) -> None:
    tags = Tags()
    tags.feed(page_text)
    assert [t for t, _ in tags.seen].count("script") == 3
    assert page_text.count("</script>") == 3
    assert "<img src=x" not in page_text
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page_text, re.DOTALL)
    assert embedded is not None
    assert NASTY in [p["prompt"] for p in json.loads(embedded[1])["viewer"]["problems"]]


def test_the_headline_says_what_was_saved_and_what_it_cost(folder: Path, tmp_path: Path) -> None:
    run = load(folder)
    settings = {s["name"]: s for s in run.settings}
    chosen = copy_run(folder, tmp_path / "chosen", best="valve 0.75")
    sentence = load(chosen).headline()
    saved = 1 - settings["valve 0.75"]["thought_tokens"] / settings["long"]["thought_tokens"]
    assert sentence.startswith(f"valve 0.75 spends {saved * 100:.0f} % fewer thinking tokens at ")
    assert (
        f"{settings['valve 0.75']['accuracy'] * 100:.1f} % accuracy against {settings['long']['accuracy'] * 100:.1f} %"
        in sentence
    )
    worse = load(copy_run(folder, tmp_path / "worse", best="short")).headline()
    assert "not shown to stay within 3 points of long" in worse


def test_the_best_setting_is_the_cheapest_that_holds(folder: Path) -> None:
    run = load(folder)
    held = {s["name"] for s in run.settings if s["name"] != "long" and (t := run.non_inferior(s["name"])) and t.holds}
    dialled = [s for s in run.settings if s["name"] in held - {"short"}]
    if dialled:
        assert run.best == min(dialled, key=lambda s: s["thought_tokens"])["name"]
    else:
        assert run.best in {name for name, *_ in SETTINGS} - {"long", "short"}
    assert run.above_line("long").value == pytest.approx(0, abs=1e-12)  # type: ignore[union-attr]


def test_every_change_to_the_best_setting_is_embedded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(copy_run(folder, tmp_path / "run", best="valve 1.25"))
    right = {(r.setting, r.problem): r.right for r in read(folder / "traces.parquet") if r.chosen}
    changed = {p for s, p in right if s == "valve 1.25" and right[s, p] != right["long", p]}
    monkeypatch.setattr(viewer_module, "PROBLEMS", len(changed) + 5)
    shown = viewer_module.embedded(run)
    assert changed <= {p["id"] for p in shown["problems"]}
    assert len(shown["problems"]) == len(changed) + 5 < shown["total"]
    monkeypatch.setattr(viewer_module, "BYTES", 20_000)
    shown = viewer_module.embedded(run)
    assert 0 < len(viewer_module.as_json({"problems": shown["problems"]})) <= 20_100


def test_long_chains_fill_the_page_to_below_three_megabytes(tmp_path: Path) -> None:
    chosen = problems(80)
    runs = []
    for name, alpha, checks, merge, slip in SETTINGS[:2]:
        done = outcomes(chosen, checks, merge, slip, 0)
        longer = [
            Outcome(o.problem, t, o.grade, [t], o.usage)
            for o in done
            for t in [Trace(o.chosen.ids, o.chosen.thought * 45, o.chosen.response, True, "stop", usage=o.usage)]  # type: ignore[union-attr]
        ]
        runs.append((name, alpha, longer))
    result = {"recipe": "r", "task": "t", "settings": [summarise(done, name, alpha) for name, alpha, done in runs]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    write(tmp_path / "traces.parquet", (row for name, alpha, done in runs for row in rows_from(done, name, alpha)))
    assert 2_000_000 < write_report(tmp_path).stat().st_size < 3_000_000


def test_a_report_without_gold_answers(tmp_path: Path) -> None:
    def hidden(done: list[Outcome]) -> list[Outcome]:
        return [
            Outcome(Problem(o.problem.id, o.problem.prompt, None, "log"), o.chosen, o.grade, o.tried, o.usage)
            for o in done
        ]

    chosen = problems(30)
    full, brief = hidden(outcomes(chosen, 1.0, 1, 0.01, 0)), hidden(outcomes(chosen, 0.2, 2, 0.05, 0))
    settings = [summarise(full, "full", reference=full), summarise(brief, "brief", reference=full)]
    (tmp_path / "result.json").write_text(
        json.dumps({"recipe": "measure", "task": "file:log.jsonl", "settings": settings})
    )
    write(tmp_path / "traces.parquet", [*rows_from(full, "full"), *rows_from(brief, "brief")])
    text = write_report(tmp_path).read_text()
    assert load(tmp_path).measure == "agreement"
    assert "gives the same answer as full on" in text
    assert "Agreement against thinking tokens" in text


def test_a_report_of_a_model_that_does_not_think_and_is_never_right(tmp_path: Path) -> None:
    usage = Usage(prompt=9, answer=4, calls=1)
    trace = Trace(np.arange(4, dtype=np.int32), "", "dunno", True, "stop", usage=usage)
    done = [Outcome(p, trace, Grade(0.0, None), [trace], usage) for p in problems(8)]
    settings = [summarise(done, name, alpha) for name, alpha in (("base", None), ("dial", 1.0))]
    (tmp_path / "result.json").write_text(json.dumps({"task": "t", "settings": settings}))
    write(tmp_path / "traces.parquet", (row for name in ("base", "dial") for row in rows_from(done, name)))
    assert "No setting spends fewer thinking tokens than base" in write_report(tmp_path).read_text()


def test_verdicts_of_every_shape_are_told(folder: Path, tmp_path: Path, page_text: str) -> None:
    assert "valve 0.75: −61 % thinking tokens at an accuracy at most 3 points lower" in page_text
    assert "difference −0.6 points, at least −2.2 points; +26.4 points from the straight line" in page_text
    told = write_report(copy_run(folder, tmp_path / "run", verdicts=["the ++ variant was not better"])).read_text()
    assert "the ++ variant was not better" in told


def test_a_report_of_one_setting_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    only = json.loads((folder / "result.json").read_text())["settings"][:1]
    bare = copy_run(folder, tmp_path / "one", settings=only, baseline=None, line=None, verdicts=None, notes=None)
    text = write_report(bare).read_text()
    assert f"long (α = 0) is right on {only[0]['accuracy'] * 100:.1f} % of the problems with" in text
    assert "has no config.yaml" in text


def test_the_picture_is_an_svg_that_needs_no_style_sheet(folder: Path, tmp_path: Path) -> None:
    light = picture(folder, tmp_path / "light.svg").read_text()
    ElementTree.fromstring(light)
    assert "valve 0.75" in light
    assert "var(--" not in light
    assert light != picture(folder, tmp_path / "dark.svg", "dark").read_text()


def test_broken_run_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match="no such run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ThriftyError, match="empty: no run folder"):
        write_report(tmp_path / "empty")
    (tmp_path / "empty" / "config.yaml").touch()
    with pytest.raises(ThriftyError, match=r"result\.json: missing; the run did not finish"):
        write_report(tmp_path / "empty")
    settings = json.loads((folder / "result.json").read_text())["settings"]
    broken = copy_run(folder, tmp_path / "a", settings=[{"name": "x"}])
    with pytest.raises(ThriftyError, match=r'settings\[0\] has no "accuracy"'):
        load(broken)
    with pytest.raises(ThriftyError, match="two settings of one name"):
        load(copy_run(folder, tmp_path / "b", settings=[settings[0], settings[0]]))
    with pytest.raises(ThriftyError, match="\"baseline\" is 'nobody'"):
        load(copy_run(folder, tmp_path / "c", baseline="nobody"))
    (broken / "result.json").write_text('{"settings": [')
    with pytest.raises(ThriftyError, match="not valid JSON"):
        load(broken)
    cut = copy_run(folder, tmp_path / "d")
    (cut / "train.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n')
    with pytest.raises(ThriftyError, match=r"train\.jsonl, row 2"):
        load(cut)
    (cut / "train.jsonl").replace(cut / "rollout.jsonl")
    with pytest.raises(ThriftyError, match=r"rollout\.jsonl, row 2"):
        load(cut)


def test_reinforcement_is_drawn_from_the_runs_own_log_and_its_stages(folder: Path, tmp_path: Path) -> None:
    run = load(folder)
    assert {name: len(log) for name, log in run.rollouts.items()} == {"grpo": 100, "grpo-greedy": 60}
    drawn = charts.reinforcement(run)
    assert list(drawn) == ["rollout-accuracy", "rollout-completion", "rollout-length"]
    steps = [spec["encoding"]["x"]["scale"]["domain"] for spec in drawn.values()]
    assert steps == [[0, 100]] * 3, "one axis of steps, also where a stage was stopped early"
    assert all(drawn[f"rollout-{key}"]["encoding"]["y"]["scale"]["domain"] == [0, 1] for key in SHOWN[:2])
    for key in SHOWN:
        shown = [row[key] for row in drawn[f"rollout-{key}"]["data"]["values"] if row["stage"] == "grpo-greedy"]
        assert shown == [row[key] for row in run.rollouts["grpo-greedy"]]

    alone = copy_run(folder, tmp_path / "alone")
    assert charts.reinforcement(load(alone)) == {}
    line = {"step": 1, "accuracy": 0.5, "completion": 1.0, "length": 9}
    rows = [line, {**line, "step": 2, "length": None}, 3, {"step": 2, "loss": 1.0}, {**line, "step": 3}]
    (alone / "rollout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["step"] for row in load(alone).rollouts["reinforcement"]] == [1, 3]
    text = write_report(alone).read_text()
    assert 'data-chart="rollout-length"' in text
    assert 'aria-label="stages"' not in text, "one stage needs no legend"


def test_without_altair_the_table_works_and_the_report_names_the_remedy(folder: Path) -> None:
    code = (
        "import sys; sys.modules['altair'] = None\n"
        "from thrifty.report import table, write_report\n"
        "from thrifty.contracts import ThriftyError\n"
        f"try: write_report({str(folder)!r})\n"
        "except ThriftyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'thrifty[report]'" in done.stdout


def test_the_terminal_table(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    console = Console(width=80, file=open(folder / "table.txt", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(table(result))
    console.file.close()
    lines = (folder / "table.txt").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if "valve 0.75" in line)
    setting = next(s for s in result["settings"] if s["name"] == "valve 0.75")
    for figure in (f"{setting['accuracy'] * 100:.1f} %", f"{setting['thought_tokens']:,.1f}"):
        assert figure in row
    assert re.search(r"−\d\d %", row), "tokens against the baseline"
    assert not any("−" in line for line in lines if line.strip().startswith("long "))
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "nothing is cut"


def test_the_page_says_how_the_best_setting_was_chosen_and_how_it_did(folder: Path, tmp_path: Path) -> None:
    there = {
        "setting": "valve 0.75",
        "saving": 0.583,
        "difference": 0.004,
        "difference_low": -0.0291,
        "margin": 0.03,
        "non_inferior": True,
    }
    chosen = copy_run(folder, tmp_path / "a", best="valve 0.75", calibration={"n": 200, "verdicts": [there]})
    text = write_report(chosen).read_text()
    assert "was chosen on 200 calibration problems as the shortest that stayed within 3 points of long" in text
    assert "−58 % thinking tokens and +0.4 points of accuracy (at least −2.9 points)" in text
    assert "The 121 problems measured here had no say in it." in text
    assert "picked on these problems" not in text
    none_held = {**there, "non_inferior": False, "margin": 0.01}
    calibration = {"n": 200, "verdicts": [none_held]}
    assert (
        "the most accurate, since none was shown to stay within 1 points"
        in load(copy_run(folder, tmp_path / "b", best="valve 0.75", calibration=calibration)).choice()
    )
    assert load(folder).choice() == ""
    assert "picked on these problems" in (folder / "report.html").read_text()


# --------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as launched:
        yield launched


@pytest.fixture
def page(chromium: Any, folder: Path) -> Iterator[Any]:
    opened = open_page(chromium, folder / "report.html")
    yield opened
    assert opened.problems == []
    assert opened.requests == []
    opened.close()


def colours(page: Any) -> list[str]:
    return page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("h1")).color,
        getComputedStyle(document.querySelector('[data-chart="frontier"] .role-axis-label text')).fill,
        getComputedStyle(document.querySelector('[data-chart="length-0"] .mark-rect path')).fill]"""
    )


@needs_chromium
def test_dark_mode_changes_every_colour_and_the_page_is_clean_in_both(chromium: Any, folder: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = open_page(chromium, folder / "report.html", 1400, scheme)
        seen[scheme] = colours(page)
        assert page.problems == []
        assert page.requests == []
        page.close()
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True)), seen


@needs_chromium
@pytest.mark.parametrize("width", [400, 820])
def test_nothing_overflows_sideways(chromium: Any, folder: Path, width: int) -> None:
    page = open_page(chromium, folder / "report.html", width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.chart svg')].map((s) => s.getBoundingClientRect().right))"
    )
    assert widest <= width
    assert page.problems == []
    page.close()


@needs_chromium
def test_what_reinforcement_did_stands_side_by_side_or_in_one_column(page: Any) -> None:
    boxes = """() => [...document.querySelectorAll('[data-chart^="rollout-"] svg')].map(
        (svg) => { const box = svg.getBoundingClientRect(); return [box.left, box.top, box.right]; })"""
    wide = page.evaluate(boxes)
    assert len({top for _, top, _ in wide}) == 1
    assert all(a[2] <= b[0] for a, b in pairwise(wide))
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_function(f"Math.max(...({boxes})().map((box) => box[2])) <= 400")
    narrow = page.evaluate(boxes)
    assert len({left for left, _, _ in narrow}) == 1
    assert all(a[1] < b[1] for a, b in pairwise(narrow))


@needs_chromium
def test_filters_show_what_they_say(page: Any, folder: Path) -> None:
    rows = {(r.setting, r.problem): r for r in read(folder / "traces.parquet") if r.chosen}
    ids = {p for _, p in rows}
    assert page.locator("#problems li").count() == len(ids)
    page.select_option("#after", label="short")
    page.select_option("#filter-verdict", "lost")
    lost = {p for p in ids if rows["long", p].right and not rows["short", p].right}
    assert lost
    shown = page.eval_on_selector_all("#problems li", "items => items.map((item) => item.dataset.id)")
    assert set(shown) == lost
    assert page.inner_text("#count") == f"{len(lost)} of {len(ids)} problems"
    page.select_option("#filter-level", "roll 2")
    shown = page.eval_on_selector_all("#problems li", "items => items.map((item) => item.dataset.id)")
    assert set(shown) == {p for p in lost if rows["long", p].level == 2 and rows["long", p].task == "roll"}
    page.select_option("#filter-verdict", "all")
    page.select_option("#filter-level", "all")
    page.fill("#search", "alternatively")
    matching = {r.problem for r in rows.values() if "alternatively" in r.thought.lower()}
    assert page.locator("#problems li").count() == len(matching) > 0
    page.fill("#search", "no such text anywhere")
    assert page.locator("#problems li").count() == 0
    assert "No problem matches" in page.inner_text("#detail")


@needs_chromium
def test_chains_stand_side_by_side_whole_and_coloured(page: Any, folder: Path) -> None:
    rows = {(r.setting, r.problem): r for r in read(folder / "traces.parquet") if r.chosen}
    page.locator("#problems li[data-id=roll-2]").click()
    for setting in (load(folder).baseline, load(folder).best):
        box = page.locator(f".chain[data-setting='{setting}']")
        row = rows[setting, "roll-2"]
        assert box.locator(".thought").evaluate("(e) => e.textContent.replace('✓', '')") == row.thought
        assert f"{row.thought_tokens} thinking tokens" in box.inner_text()
    checks = page.locator(".chain[data-setting=long] .thought .check")
    assert checks.count() > 0
    backgrounds = {
        page.locator(f".chain[data-setting=long] .thought .{kind}").first.evaluate(
            "(e) => getComputedStyle(e).backgroundColor"
        )
        for kind in ("work", "check")
    }
    assert len(backgrounds) == 2
    left, right = (page.locator(".chain").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


@needs_chromium
def test_hostile_text_is_shown_not_run(page: Any) -> None:
    page.fill("#search", "window.pwned")
    assert page.inner_text("#count").startswith("1 of")
    assert page.locator("#detail .prompt").evaluate("(e) => e.textContent") == NASTY
    assert page.evaluate("window.pwned") is None


@needs_chromium
def test_the_keyboard_is_enough(page: Any) -> None:
    first, second = (page.locator("#problems li").nth(i).get_attribute("data-id") for i in (0, 1))
    selected = "#problems li[aria-selected=true]"
    assert page.get_attribute(selected, "data-id") == first
    page.focus("#problems")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute(selected, "data-id") == second
    assert page.evaluate("location.hash") == f"#problem={second}"
    before = page.input_value("#after")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#after") != before
    page.keyboard.press("End")
    assert page.get_attribute(selected, "data-id") == page.locator("#problems li").last.get_attribute("data-id")
    page.keyboard.press("/")
    page.keyboard.type("roll-1")
    assert page.input_value("#search") == "roll-1"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "problems"


@needs_chromium
def test_a_link_leads_to_its_problem(chromium: Any, folder: Path) -> None:
    page = open_page(chromium, folder / "report.html", fragment="#problem=roll-7")
    assert page.inner_text("#detail h3").startswith("roll-7")
    assert page.evaluate("document.getElementById('traces').getBoundingClientRect().top") < 600
    page.fill("#search", "chain_sum")
    page.evaluate("location.hash = '#problem=roll-8'")
    page.wait_for_function("document.querySelector('#detail h3').textContent.startsWith('roll-8')")
    assert page.input_value("#search") == "", "a link works whatever the filters say"
    page.close()


@needs_chromium
def test_the_table_sorts_by_value_with_unknown_last(page: Any, folder: Path) -> None:
    settings = {s["name"]: s for s in load(folder).settings}

    def names() -> list[str]:
        return page.eval_on_selector_all(
            "#settings-table tbody th", "cells => cells.map((c) => c.textContent.replace('◆', '').trim())"
        )

    def clean(shown: list[str]) -> list[str]:
        return [name.split(" (α")[0] for name in shown]

    tokens = page.get_by_role("button", name="Thinking tokens")
    tokens.click()
    assert clean(names()) == sorted(settings, key=lambda n: settings[n]["thought_tokens"])
    tokens.click()
    assert clean(names())[0] == max(settings, key=lambda n: settings[n]["thought_tokens"])
    change = page.get_by_role("button", name="Accuracy change")
    for _ in range(2):
        change.click()
        assert clean(names())[-1] == "long", "the baseline has no change and stays last"
