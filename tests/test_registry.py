"""The registry finds methods by where they stand, and says what is wrong with those it cannot use."""

import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest

from thrifty import registry
from thrifty.contracts import FAMILIES, ThriftyError
from thrifty.papers import _asked, _effects, markdown, papers

ROOT = Path(__file__).parents[1]

METHOD = '''"""A method."""

import random
from dataclasses import dataclass

from thrifty.contracts import Card, Problem, Sample, Talk

CARD = Card(key="{key}", title="A title", year=2026, saves=("tokens",))


@dataclass(frozen=True)
class Mine:
    n: int = 3

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        [trace] = yield Sample(problem.prompt)
        return trace
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


# ------------------------------------------------------------------------------------------------- papers


def test_the_mission_is_228_papers_with_plain_facts():
    listed = papers()
    assert len(listed) == 228
    for paper in listed.values():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.key), paper.key
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv), paper.key
        assert 2000 < paper.year < 2100
        assert paper.priority in (1, 2, 3)
        assert paper.family in registry.CATEGORIES
        assert paper.saves
        assert set(paper.saves) <= set(registry.SAVES)
        assert paper.system is None or paper.system in listed
    assert len({p.arxiv for p in listed.values() if p.arxiv}) == 227


def test_papers_md_is_up_to_date():
    assert (ROOT / "papers.md").read_text("utf-8") == markdown(), "run `make papers`"


def test_evidence_is_told_as_ratios_and_differences_of_the_arms():
    parts = [
        {"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": math.log(1.25)},
        {"name": "accuracy", "test": "non-inferior", "margin": 0.03},
        {"name": "error", "test": "superior", "better": "lower", "smallest": 0.01},
    ]
    halved = {"value": math.log(2), "low": math.log(1.25), "high": math.log(2.5)}
    effects = (halved, {"value": -0.01, "low": -0.02, "high": 0.005}, {"value": 0.2, "low": 0.1, "high": 0.3})
    run = {
        "registered": {"parts": parts, "unit": "training"},
        "parts": [{"name": p["name"], "effect": e} for p, e in zip(parts, effects)],
    }
    told = "tokens ×0.50 [×0.40, ×0.80]; accuracy -0.010 [-0.020, +0.005]; error -0.200 [-0.300, -0.100]"
    assert _effects(run) == told
    # of problems it is the geometric mean of their ratios; that of their totals stands beside it
    units = [{"method": {"tokens": {"mean": new}}, "comparator": {"tokens": {"mean": 100.0}}} for new in (50.0, 70.0)]
    per_problem = run | {"registered": {"parts": parts, "unit": "student"}, "units": units}
    assert _effects(per_problem) == told.replace("×0.80]", "×0.80], totals ×0.60")
    assert [_asked(part) for part in parts] == [
        "tokens at most ×0.80",
        "accuracy at least -0.030",
        "error at most -0.010",
    ]


def test_papers_md_has_a_row_for_every_paper_and_a_working_link_for_every_built_one():
    table = markdown()
    links = dict(re.findall(r"^\| \[`([a-z0-9-]+)`\]\(([^)]+)\)", table, re.MULTILINE))
    names = set(re.findall(r"^\| \[?`([a-z0-9-]+)`", table, re.MULTILINE))
    assert set(papers()) <= names
    assert "short-m-at-k" in links
    assert all((ROOT / link).is_file() for link in links.values())


# ---------------------------------------------------------------------------------------- finding methods


def test_a_method_of_the_package_is_found_by_folder_and_file_name():
    method = registry.find("short-m-at-k")
    assert method.family == "solve.search"
    assert method.path == registry.PACKAGE / "solve/search/short_m_at_k.py"
    assert method.card.arxiv == "2505.17813"


@pytest.mark.parametrize("folder", ["methods/solve.search", "methods/solve/search"])
def test_an_own_method_is_found_loaded_and_listed(project, folder):
    path = put(project / folder / "my_own.py", METHOD.format(key="my-own"))
    entry = registry.get("my-own")
    assert (entry.family, entry.status, entry.priority, entry.where) == ("solve.search", "built", None, path)
    cls = registry.load("my-own")
    assert cls.__name__ == "Mine"
    assert cls(n=5).n == 5
    assert registry.load("my-own") is cls
    assert "my-own" not in registry.methods(plugins=False)


def test_own_methods_of_two_projects_do_not_mix(tmp_path, monkeypatch):
    for name, n in (("one", 1), ("two", 2)):
        text = METHOD.format(key="my-own").replace("n: int = 3", f"n: int = {n}")
        put(tmp_path / name / "methods/solve.search/my_own.py", text)
        monkeypatch.chdir(tmp_path / name)
        assert registry.load("my-own")().n == n


def test_listing_imports_no_method(project):
    put(project / "methods/solve.search/bomb.py", METHOD.format(key="bomb") + "\nraise RuntimeError('imported')\n")
    assert registry.get("bomb").status == "built"
    with pytest.raises(RuntimeError, match="imported"):
        registry.load("bomb")
    with pytest.raises(RuntimeError, match="imported"):  # a failed import leaves no half-made module behind
        registry.load("bomb")


def test_a_paper_is_built_by_a_file_with_its_key_and_keeps_its_own_facts(project):
    before = registry.get("particle-filtering")
    put(project / "methods/recipes/particle_filtering.py", METHOD.format(key="particle-filtering"))
    after = registry.get("particle-filtering")
    assert after == dataclasses.replace(before, where=project / "methods/recipes/particle_filtering.py")
    assert after.family == "solve.search"


def test_a_paper_covered_by_another_papers_file_is_built_with_it(project):
    assert registry.get("cort-tools").status == "missing"
    put(project / "methods/solve.tools/cort.py", METHOD.format(key="cort"))
    assert registry.get("cort-tools").where == project / "methods/solve.tools/cort.py"
    assert registry.load("cort-tools") is registry.load("cort")


def test_helpers_and_foreign_folders_are_left_alone(project):
    put(project / "methods/solve.search/_shared.py", "x = 1")
    put(project / "methods/chemistry/titration.py", "x = 1")
    assert registry.methods() == registry.methods(plugins=False)


def test_a_plug_in_is_found_by_its_entry_point_without_importing_it(project, monkeypatch):
    site = project / "site"
    put(site / "acme/__init__.py", "raise RuntimeError('the parent was imported')")
    put(site / "acme/solve/search/plugged.py", METHOD.format(key="plugged"))
    put(site / "acme-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    points = put(
        site / "acme-1.0.dist-info/entry_points.txt", "[thrifty.methods]\nplugged = acme.solve.search.plugged\n"
    )
    monkeypatch.syspath_prepend(site)
    assert registry.find("plugged").family == "solve.search"
    assert "acme" not in sys.modules
    (site / "acme/__init__.py").write_text("")
    try:
        assert registry.load("plugged")().n == 3
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "acme"]:
            del sys.modules[name]
    points.write_text("[thrifty.methods]\nplugged = acme.solve.search.gone\n")
    with pytest.raises(ThriftyError, match=r"plugged = acme\.solve\.search\.gone.*no module file"):
        registry.methods()
    put(site / "acme/odd/stray.py", METHOD.format(key="stray"))
    points.write_text("[thrifty.methods]\nstray = acme.odd.stray\n")
    with pytest.raises(ThriftyError, match=r"stray\.py.*stands in no family"):
        registry.methods()


# ------------------------------------------------------------------------------------------------- errors


def test_two_methods_with_one_key_are_an_error_that_names_both(project):
    put(project / "methods/recipes/greedy.py", METHOD.format(key="greedy"))
    with pytest.raises(ThriftyError, match=r"'greedy'.*solve/search/greedy\.py.*methods/recipes/greedy\.py"):
        registry.methods()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"mine\.py.*has no CARD"),
        ('CARD = Card(key="other", title="t")\n', r"says key 'other', its name 'mine'"),
        ('CARD = Card(key="mine", title="t", save=("tokens",))\n', r"no field 'save'. Did you mean 'saves'"),
        ('CARD = Card(key="mine")\n', r"lacks 'title'"),
        ('CARD = Card(key="mine", title=TITLE)\n', r"title must be a literal"),
        ('CARD = Card("mine", "t")\n', r"keywords only"),
        ('CARD = {"key": "mine"}\n', r"keywords only"),
        ('CARD = Card(key="mine", title="t", saves=("money",))\n', r"saves 'money', which is none of: tokens"),
        ('CARD = Card(key="mine", title="t", saves="tokens")\n', r"saves must be a tuple"),
        ('CARD = Card(key="mine", title="t"\n\n\ndef f(:\n', r"mine\.py, line 4"),
        (b"CARD = '\xff'", r"mine\.py cannot be read"),
    ],
)
def test_a_bad_card_is_an_error_that_names_the_file(project, text, message):
    path = put(project / "methods/solve.search/mine.py", "")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ThriftyError, match=message) as caught:
        registry.methods()
    assert str(path) in str(caught.value)


def test_a_card_in_a_folder_that_is_no_family_names_the_family_that_was_meant(project):
    put(project / "methods/solve.serch/mine.py", METHOD.format(key="mine"))
    with pytest.raises(ThriftyError, match=r"no family 'solve\.serch'\. Did you mean 'solve\.search'"):
        registry.methods()


@pytest.mark.parametrize(
    "card",
    [
        'CARD = Card(key="mine", title="T (1) )", saves=("tokens",))',
        'CARD: Card = Card(key="mine", title="T (1) )", saves=("tokens",))  # a comment (here)',
        'CARD = Card(\n    key="mine",\n    title="T (1) )",\n    saves=("tokens",),\n)',
        'CARD = Card(\n    key="mine", title="T (1) )",\n    saves=(\n"tokens",\n),\n)  # fmt: skip',
        'CARD = Card(key="mine", title="T (1) )",\n            saves=("tokens",))\n\n\nprint(\n"x"\n)',
        'CARD = Card(\n  key="mine",  # (\n  title="T "\n"(1) )",\n  saves=("tokens",))\nx = (1,\n)',
    ],
)
def test_a_card_is_read_whatever_its_layout(tmp_path, card):
    found = registry.read_card(put(tmp_path / "mine.py", f'"""Doc."""\n\nfrom thrifty import x\n\n{card}\n\ny = 1\n'))
    assert found is not None
    assert (found.key, found.title, found.saves, found.baseline) == ("mine", "T (1) )", ("tokens",), False)


def test_an_unknown_key_names_near_ones():
    with pytest.raises(ThriftyError, match=r"'cot-vlave'\. Did you mean 'cot-valve'"):
        registry.get("cot-vlave")
    with pytest.raises(ThriftyError, match=r"Did you mean 'short-m-at-k'"):
        registry.load("short_m_at_k")
    with pytest.raises(ThriftyError) as caught:
        registry.get("zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_loading_a_paper_that_nobody_has_built_says_so():
    with pytest.raises(ThriftyError, match="not built yet"):
        registry.load("survey-inference-engines")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Mine:", "class _Mine:", "has: none"),
        ("def solve", "def answer", "has: none"),
        (
            "\n@dataclass",
            "\n@dataclass(frozen=True)\nclass Twin:\n    def solve(self): ...\n\n\n@dataclass",
            "has: Twin, Mine",
        ),
    ],
)
def test_a_file_must_have_one_public_dataclass_with_a_verb(project, old, new, message):
    put(project / "methods/solve.search/mine.py", METHOD.format(key="mine").replace(old, new))
    with pytest.raises(ThriftyError, match=message):
        registry.load("mine")


# ------------------------------------------------------------------------------------------------ entries


def test_entries_are_every_paper_and_every_method_once_in_the_order_of_the_families():
    rows = registry.entries(plugins=False)
    keys = [e.key for e in rows]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(papers()) | set(registry.methods(plugins=False))
    order = [registry.CATEGORIES.index(e.family) for e in rows]
    assert order == sorted(order)
    assert {e.key for e in rows if e.priority is None} == set(registry.methods(plugins=False)) - set(papers())
    assert next(e for e in rows if e.key == "greedy").priority is None
    assert set(FAMILIES) < set(registry.CATEGORIES)
