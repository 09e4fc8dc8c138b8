"""The board as its readers meet it: the record read line by line, the page, the browser, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from browser import CHROMIUM, browser, open_page
from example_board import crash, record
from thrifty import evidence, registry
from thrifty.commands.board import main
from thrifty.contracts import ThriftyError
from thrifty.report import board, records, viewer
from thrifty.report.board import collect, payload, write_board

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
NASTY = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><!-- \u2028"
KEY = "short-m-at-k"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A method that is shown with its placebo, one that is refuted, one only tried out, one that nobody has here."""
    folder = tmp_path_factory.mktemp("results")
    rows = {
        KEY: [crash(KEY), record(KEY, 0.5), record(KEY, 0.0, 0.1, control="placebo")],
        "c3ot": [record("c3ot", 0.35, 0.3), record("c3ot", 0.0, 0.1, control="placebo", why=NASTY)],
        "cot-valve": [record("cot-valve", 0.4, scale="dev", commit=None)],
    }
    for key, runs in rows.items():
        for run in runs:
            evidence.append(folder / f"{key}.jsonl", run)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "theirs.jsonl"
    for run in (record("their-method", 0.5, family="solve.search"), record("their-method", 0.45, control="placebo")):
        evidence.append(path, run | {"title": NASTY})
    return path


@pytest.fixture(scope="module")
def page(results: Path, stranger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_board(tmp_path_factory.mktemp("board") / "board.html", results, [stranger])[0]


@pytest.fixture(scope="module")
def methods(results: Path, stranger: Path) -> dict[str, Any]:
    return {m["key"]: m for m in payload(collect(results, [stranger])[0])["methods"]}


# ------------------------------------------------------------------------------------------------ the record


def lines(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(texts))
    return path


ROW = json.dumps(crash(KEY), sort_keys=True)


def test_what_a_killed_run_left_is_named_and_passed_over(tmp_path):
    path = lines(tmp_path / "a.jsonl", ROW, ROW[:40])
    found, torn = records.read(path)
    assert [r.line for r in found] == [1]
    assert torn == [f"{path}, line 2: breaks off after 40 characters, as a killed run leaves it; passed over"]
    evidence.append(path, json.loads(ROW))  # the next run closes it
    assert [r.line for r in records.read(path)[0]] == [1, 3]


@given(cut=st.integers(1, len(ROW) - 1), before=st.booleans(), after=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_line_cut_anywhere_costs_that_line_alone(tmp_path_factory, cut, before, after):
    path = lines(tmp_path_factory.getbasetemp() / "cut.jsonl", *[ROW] * before, ROW[:cut], *[ROW] * after)
    found, torn = records.read(path)
    assert [r.row for r in found] == [json.loads(ROW)] * (before + after)
    assert len(torn) == 1
    assert f"line {before + 1}:" in torn[0]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", "not valid JSON"),
        (ROW.replace('"key": ', '"key" '), "not valid JSON"),
        ("[1, 2]", "JSON object"),
        ('{"key": "a"}', "'scale'"),
        (ROW.replace(KEY, "../etc"), "'key'"),
        (ROW.replace('"scale": "tiny"', '"scale": "huge"'), "'scale'"),
        (json.dumps({**json.loads(ROW), "error": ""}), "'verdict'"),
        (json.dumps({**record(KEY), "units": [{"method": {"accuracy": 1}}]}), "'units'"),
        (json.dumps({**record(KEY), "parts": [{"name": "accuracy"}]}), "'parts'"),
        (json.dumps({**record(KEY), "figures": {"method": [{"flops": "many"}]}}), "'figures'"),
    ],
)
def test_any_other_broken_line_is_an_error_that_names_it(tmp_path, line, told):
    path = lines(tmp_path / "a.jsonl", ROW, line, ROW)
    with pytest.raises(ThriftyError, match=told) as error:
        records.read(path)
    assert f"{path}, line 2" in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(record(KEY))), value=JSON)
@settings(max_examples=60, deadline=None)
def test_whatever_stands_in_a_record_it_is_drawn_or_refused_by_name(tmp_path_factory, name, value):
    path = lines(tmp_path_factory.getbasetemp() / "any.jsonl", json.dumps({**record(KEY), name: value}))
    try:
        found, _ = records.read(path)
    except ThriftyError as error:
        told = str(error)
    else:
        viewer.as_json([board._stranger("x", [made]) for made in found])
        told = str(path)
    assert str(path) in told


def test_what_the_command_prints_can_be_brought_in(tmp_path):
    rows = [record(KEY), record(KEY, control="placebo")]
    indented = tmp_path / "printed.json"
    indented.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    as_list = tmp_path / "list.json"
    as_list.write_text(json.dumps(rows))
    for path in (indented, as_list):
        assert [r.row for r in records.read(path)[0]] == rows


def test_figures_are_those_that_an_axis_can_show():
    row = record(KEY)
    own = records.figures(row, "method")
    assert own["accuracy"] == [u["method"]["accuracy"]["mean"] for u in row["units"]]
    assert own["thought_tokens"] == [u["method"]["tokens"]["mean"] for u in row["units"]]
    assert own["trained_parameters"] == [10000.0] * 3
    row["figures"] = {"method": [{"thought_tokens": 7.0, "flops": 1e9, "odd": 1}] * 3}
    assert records.figures(row, "method")["thought_tokens"] == [7.0] * 3
    assert records.figures(row, "method")["flops"] == [1e9] * 3
    assert "odd" not in records.figures(row, "method")
    assert records.figures(row, "comparator") == {}, "what the record does not hold is not there"


def test_figures_of_other_answers_than_those_judged_are_left_out():
    row = record(KEY)
    judged = [u["comparator"]["accuracy"]["mean"] for u in row["units"]]
    row["figures"]["comparator"][1] |= {"accuracy": judged[1] + 0.3, "seconds": 9.0}
    assert records.figures(row, "comparator") == {"accuracy": judged, "trained_parameters": [7e5] * 3}
    assert records.figures(row, "method")["thought_tokens"], "the other arm's stand"
    row = record(KEY)
    tokens = [u["method"]["tokens"]["mean"] for u in row["units"]]
    for unit, spent in zip(row["figures"]["method"], tokens, strict=True):
        unit["generated_tokens"] = spent + 2
    assert records.figures(row, "method")["generated_tokens"], "the claim counts thinking tokens"
    for unit in row["figures"]["method"]:
        unit["thought_tokens"] *= 3
    assert set(records.figures(row, "method")) == {"accuracy", "trained_parameters"}
    for unit in row["units"]:
        unit["method"] = {"loss": {"mean": 1.0, "n": 9}}
    assert records.figures(row, "method")["generated_tokens"], "nothing is said against them"


# ------------------------------------------------------------------------------------------------ the data


def test_every_paper_and_method_stands_on_the_board_with_its_status(methods):
    assert {e.key for e in registry.entries()} < set(methods)
    assert methods["medusa"]["status"] == "missing" or methods["medusa"]["file"]
    assert methods[KEY]["status"] == "shown"
    assert methods["c3ot"]["status"] == "refuted"
    assert methods["cot-valve"]["status"] == "built"
    assert methods["cot-valve"]["counts"] is None
    assert methods["cot-valve"]["runs"][methods["cot-valve"]["drawn"]]["scale"] == "dev"


def test_a_method_from_elsewhere_is_judged_by_its_own_controls(methods):
    assert methods["their-method"]["status"] == "not carried"  # its placebo held as well
    assert methods["their-method"]["family"] == "solve.search"
    assert methods["their-method"]["runs"][0]["added"]


def test_a_verdict_from_elsewhere_without_its_control_is_not_taken_over(tmp_path):
    def status(*runs: dict[str, Any]) -> str:
        path = lines(tmp_path / "theirs.jsonl", *map(json.dumps, runs))
        found = payload(collect(tmp_path / "none-of-ours", [path])[0])["methods"]
        return next(m["status"] for m in found if m["key"] == "theirs")

    (tmp_path / "none-of-ours").mkdir()
    shown, placebo = record("theirs", 0.5), record("theirs", 0.0, 0.1, control="placebo")
    assert shown["verdict"] == "shown"
    assert status(shown) == "inconclusive"
    assert status(shown, placebo) == "shown"
    assert status(shown | {"commit": None}, placebo) == "built"


def test_own_runs_go_before_those_brought_in(results, tmp_path):
    theirs = lines(tmp_path / "theirs.jsonl", json.dumps(record(KEY, 0.35, 0.3)))
    found = {m["key"]: m for m in payload(collect(results, [theirs])[0])["methods"]}
    assert found[KEY]["status"] == "shown"
    assert len(found[KEY]["runs"]) == 4
    empty = tmp_path / "empty"
    empty.mkdir()
    found = {m["key"]: m for m in payload(collect(empty, [theirs])[0])["methods"]}
    assert found[KEY]["status"] == "refuted"


def test_the_controls_of_the_drawn_run_stand_beside_it(methods):
    assert methods[KEY]["controls"]["placebo"] == {"runs": [2], "called for": True}
    assert methods[KEY]["work"]["id"] == "long · search 3–4"
    assert methods[KEY]["counts"] == 1


def test_a_control_that_does_not_count_stands_beside_no_run_that_does(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    placebo = record(KEY, control="placebo")
    lines(ours / f"{KEY}.jsonl", json.dumps(record(KEY)), json.dumps({**placebo, "commit": None}))
    lines(theirs / f"{KEY}.jsonl", json.dumps(placebo))
    found = {m["key"]: m for m in payload(collect(ours, [theirs])[0])["methods"]}[KEY]
    assert found["why"].startswith("its placebo has not been run")
    assert found["controls"]["placebo"] == {"runs": [], "called for": True}


def test_a_skill_that_none_has_is_other_work():
    row = record(KEY)
    respelled = row | {"registered": row["registered"] | {"gates": {evidence.NEW_SKILL: [None, 0.05]}}}
    assert board._work(respelled)["id"] == "long · search 3–4, respelled"


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_is_one_file_that_fetches_nothing(page):
    text = page.read_text()
    assert not re.search(r"<(?:link|img|iframe)\b|\bsrc=|@import|url\(", text.split('<script id="data"')[0])
    assert "connect-src" not in text
    assert "default-src 'none'" in text
    assert NASTY not in text
    assert page.stat().st_size < 2_000_000


def test_missing_files_and_folders_are_named(tmp_path):
    for arguments in (["--results", "nowhere"], ["--add", "nowhere.jsonl"]):
        with pytest.raises(ThriftyError, match="nowhere"):
            CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "b.html")], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ThriftyError, match=r"has no KEY\.jsonl"):
        write_board(tmp_path / "board.html", tmp_path)


def test_the_command_says_where_the_page_is_and_what_it_passed_over(results, tmp_path):
    copy = tmp_path / "results"
    copy.mkdir()
    (copy / f"{KEY}.jsonl").write_bytes((results / f"{KEY}.jsonl").read_bytes() + b'{"claim": "ab')
    done = CliRunner().invoke(main, ["--results", str(copy), "--out", str(tmp_path / "deep" / "b.html")])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "deep" / "b.html")
    assert f"{KEY}.jsonl, line 4: breaks off" in done.stderr
    assert "line 4: breaks off" in (tmp_path / "deep" / "b.html").read_text()


# --------------------------------------------------------------------------------------------- the browser


@needs_chromium
def test_the_board_in_a_browser(page):
    with browser() as launched:
        tab = open_page(launched, page)
        rows = "#board tbody tr"

        def keys() -> list[str]:
            return list(tab.eval_on_selector_all(f"{rows} th a", "all => all.map(a => a.textContent)"))

        assert set(keys()) >= {KEY, "c3ot", "cot-valve", "their-method"}
        assert "medusa" not in keys() or not tab.query_selector("input[value=missing]")
        assert keys()[0] == KEY  # by verdict: shown first
        # every figure drawn, a filter, and the missing ones on demand
        assert tab.locator("#chart a.point").count() >= 4
        tab.check("input[value=missing]")
        assert len(keys()) >= 228
        tab.fill("#search", "short-m")
        assert KEY in keys()
        assert "c3ot" not in keys()
        tab.fill("#search", "")
        tab.uncheck("input[value=missing]")
        tab.select_option("#axis", "trained_parameters")
        assert "trained parameters" in tab.inner_text("#chart-title")
        tab.select_option("#axis", "flops")
        assert "Nothing to draw" in tab.inner_text("#chart")
        assert KEY in tab.inner_text("#without")
        tab.select_option("#axis", "thought_tokens")
        # sorting by the keyboard, both ways; unknown last
        tab.focus("thead th.accuracy button")
        tab.keyboard.press("Enter")
        up = keys()
        tab.keyboard.press("Enter")
        measured = {KEY, "c3ot", "cot-valve", "their-method"}
        assert [k for k in keys() if k in measured] == [k for k in up if k in measured][::-1]
        assert set(keys()[:4]) == set(up[:4]) == measured
        # a method's page and back
        tab.keyboard.press("Escape")
        tab.focus(f"a[href='#/method/{KEY}']")
        tab.keyboard.press("Enter")
        tab.wait_for_selector(".page h1")
        text = tab.inner_text("#method")
        for words in (
            "fifth fewer",
            "placebo",
            "a vote helps",
            "crashed",
            "the bank has 50 problems",
            "comparator: lr 0.003 (0.003: 0.5",
            "thrifty reproduce",
        ):
            assert words in tab.text_content("#method"), words
        assert "shown" in text
        assert tab.locator("#method .forest").count() == 2
        tab.keyboard.press("Escape")
        assert tab.is_visible("#board")
        tab.goto(page.as_uri() + "#/method/no-such")
        assert "no method" in tab.inner_text("#method")
        for key in ("c3ot", "their-method", "medusa", "cot-valve"):
            tab.goto(page.as_uri() + f"#/method/{key}")
            tab.wait_for_selector(".page h1")
        # narrow: nothing scrolls sideways
        tab.set_viewport_size({"width": 400, "height": 800})
        for fragment in ("#/", f"#/method/{KEY}", "#/method/c3ot"):
            tab.goto(page.as_uri() + fragment)
            tab.wait_for_timeout(100)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 400, fragment
        assert tab.evaluate("window.pwned") is None
        assert not tab.problems
        assert not tab.requests


@needs_chromium
def test_what_a_filter_hides_makes_nothing_else_better(results, stranger, tmp_path):
    copy = tmp_path / "results"
    copy.mkdir()
    for path in results.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    lone = record("trimr", 0.1)
    for unit in lone["figures"]["comparator"]:
        del unit["trained_parameters"]
    evidence.append(copy / "trimr.jsonl", lone)
    page, _ = write_board(tmp_path / "board.html", copy, [stranger])
    with browser() as launched:
        tab = open_page(launched, page)

        def best() -> set[str]:
            return set(tab.eval_on_selector_all("#board th:has(.pareto) a", "all => all.map(a => a.textContent)"))

        # the Pareto set is that of the work
        front = best()
        assert front
        assert "their-method" not in front, "not carried"
        line = "document.querySelector('#chart .front') !== null"
        stepped = tab.evaluate(line)
        for key in (KEY, "c3ot", "trimr", "their-method"):
            tab.fill("#search", key)
            assert best() == front & {key}, key
            assert tab.evaluate(line) == stepped
        tab.fill("#search", "")
        # an axis says how many methods it draws
        for work in tab.eval_on_selector_all("#work option", "all => all.map(o => o.value)"):
            tab.select_option("#work", work)
            for axis in ("thought_tokens", "trained_parameters", "flops"):
                tab.select_option("#axis", axis)
                points = tab.eval_on_selector_all("#chart a.point", "all => all.map(a => a.ariaLabel)")
                some = sum("the comparator of" not in point for point in points)
                assert tab.inner_text(f"#axis option[value={axis}]").endswith(f"({some})"), (work, axis)
        assert some == 0
        # a status that hides all that fits is named
        tab.select_option("#family", "survey")
        assert "“missing” (" in tab.inner_text("#nothing")
        tab.fill("#search", "no such method")
        assert tab.inner_text("#nothing") == "No method fits these filters."
        # a change that rounds to nothing
        changes = tab.evaluate("[0.998, 1, 1.02, 0.5].map(change)")
        assert changes == ["±0\xa0%", "±0\xa0%", "+2\xa0%", "−50\xa0%"]
        assert tab.evaluate("[-0.0002, -0.02].map(points)") == ["±0.0\xa0points", "−2.0\xa0points"]
        # the paper's words have room, the table scrolls by itself
        assert tab.locator("thead th.headline").bounding_box()["width"] > 150
        tab.set_viewport_size({"width": 900, "height": 800})
        assert tab.locator("thead th.headline").bounding_box()["width"] > 150
        assert tab.evaluate("document.documentElement.scrollWidth") <= 900
        # only controls that the method has
        tab.goto(page.as_uri() + "#/method/c3ot")
        tab.wait_for_selector(".page h1")
        text = tab.text_content("#method")
        assert "--control placebo" in text
        assert "--control aa" in text
        assert "oracle" not in text
        assert not tab.problems
