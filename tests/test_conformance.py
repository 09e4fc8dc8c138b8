"""Every card against every check of its family, and the mutants: each is caught, by the check that is meant for it."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mutants import MUTANTS
from thrifty import conformance, registry
from thrifty.cli import app
from thrifty.conformance import Subject
from thrifty.contracts import FAMILIES

METHODS = registry.methods(plugins=False)
TEMPLATES = sorted((Path(__file__).parents[1] / "templates").glob("*.py"))


def failures(results):
    return [f"{result.check}: {result.why}" for result in results if result.ok is False]


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.key)
def test_every_method_keeps_its_contract(method):
    assert not failures(conformance.check_method(method))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_keeps_its_contract(template, tmp_path):
    path = tmp_path / "methods" / template.stem / "my_method.py"
    path.parent.mkdir(parents=True)
    shutil.copy(template, path)
    assert not failures(conformance.check_method(conformance.find(str(path))))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.family}-{mutant.cls.__name__}")
def test_a_broken_method_is_caught_by_the_check_meant_for_it(mutant):
    [function] = [check for check in conformance.checks(mutant.family) if conformance.name(check) == mutant.check]
    result = conformance.run_one(function, Subject(mutant.cls, mutant.family, mutant.needs))
    assert result.ok is False
    assert mutant.why in result.why


@pytest.mark.parametrize("family", conformance.MODULES)
def test_every_family_has_mutants_for_all_of_its_checks(family):
    own = [conformance.name(check) for check in conformance.checks(family)[len(conformance.CHECKS["*"]) :]]
    assert own
    assert not set(own) - {mutant.check for mutant in MUTANTS if mutant.family == family}


def test_every_family_with_a_verb_has_a_template_and_checks():
    verbless = {"tune.latent", "solve.tools", "measure.diagnose", "measure.bench"}
    assert {path.stem for path in TEMPLATES} == set(FAMILIES) - verbless
    assert set(conformance.MODULES) == set(FAMILIES) - verbless


def run(*arguments):
    return CliRunner().invoke(app, ["check", *arguments], prog_name="thrifty")


def write(tmp_path, monkeypatch, change=lambda text: text, name="mine.py"):
    """A compressor of somebody's own in ./methods, made of the template."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "methods" / "traces.compress" / name
    path.parent.mkdir(parents=True)
    text = (TEMPLATES[0].parent / "traces.compress.py").read_text("utf-8").replace("my-method", "mine")
    path.write_text(change(text), "utf-8")
    return str(path)


def test_somebodys_own_method_is_checked_by_key_and_by_file(tmp_path, monkeypatch):
    path = write(tmp_path, monkeypatch)
    for word in ("mine", path):
        result = run(word)
        assert result.exit_code == 0, result.output
        assert "0 failed" in result.output
        assert "..." not in result.output
    found = json.loads(run("mine", "--json").output)
    assert (found["method"], found["family"], found["ok"]) == ("mine", "traces.compress", True)
    assert {check["ok"] for check in found["checks"]} == {True}


ENDLESS = """{0}while True:
{0}    try:
{0}        pass
{0}    except Exception:
{0}        pass
"""


@pytest.mark.parametrize(
    ("change", "check", "why"),
    [
        (lambda text: text.replace("wait'", "hm'"), "its examples are right", "Expected"),
        (lambda text: text.replace("Differs: nothing.", ""), "its docstring says", "no Differs:"),
        (lambda text: text.replace("import Sequence\n", "import Sequence\n\nimport torch\n"), "without torch", "torch"),
        (lambda text: text.replace("@dataclass(frozen=True)\n", ""), "can be imported", "exactly one public dataclass"),
        (
            lambda text: text.replace("import Card,", "import Cart, Card,"),
            "can be imported",
            "cannot import name 'Cart'",
        ),
        (lambda text: text + "\nCARD = Card('mine', 'Another')\n", "its card matches its file", "changed after"),
        (
            lambda text: text.replace("year=2026", "year='abc'"),
            "fields of its card",
            "year is 'abc': it must be int | N",
        ),
        (lambda text: text.replace("year=2026", "year=True"), "fields of its card", "year is True: it must be int | N"),
        (lambda text: text.replace("year=2026", "arxiv=5"), "fields of its card", "arxiv is 5: it must be str | None"),
        (lambda text: text.replace("year=2026", "needs=(['score'],)"), "fields of its card", "tuple[str, ...]"),
        (lambda text: text + "\nraise SystemExit(0)\n", "can be imported", "SystemExit: 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(change, check, why, tmp_path, monkeypatch):
    path = write(tmp_path, monkeypatch, change)
    result = run(path, "--json")
    assert result.exit_code == 1
    [failed] = failures([conformance.Result(**one) for one in json.loads(result.output)["checks"]])
    assert check in failed
    assert why in failed


def test_a_file_of_another_familys_shape_fails_once_and_is_told_where_it_belongs(tmp_path, monkeypatch):
    path = Path(write(tmp_path, monkeypatch))
    moved = tmp_path / "methods" / "solve.search" / path.name
    moved.parent.mkdir()
    path.rename(moved)
    result = run(str(moved), "--json")
    assert result.exit_code == 1
    imported, failed = json.loads(result.output)["checks"]
    assert imported["ok"]
    assert failed["check"] == "has the verb of its family"
    for piece in (
        f"{moved} stands in solve.search: expected solve(problem: Problem, rng: random.Random) -> Talk, but MyMethod ",
        "has no solve (it has compress)",
        "the verb of traces.compress: put the file",
    ):
        assert piece in failed["why"]


def test_a_method_that_ends_the_process_has_failed(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        monkeypatch,
        lambda text: text.replace("        shorter", "        raise SystemExit(0)\n        shorter"),
    )
    result = run(path)
    assert result.exit_code == 1
    assert "SystemExit: 0 (line" in result.output
    result = run(path, "--json")
    assert result.exit_code == 1
    assert not json.loads(result.output)["ok"]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda text: text.replace("        shorter", ENDLESS.format("        ") + "        shorter"), "every time"),
        (lambda text: text + "\n\n" + ENDLESS.format(""), "can be imported"),
    ],
)
def test_a_method_that_never_returns_has_failed(change, check, tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "LIMIT", 0.5)
    result = run(write(tmp_path, monkeypatch, change), "--json")
    assert result.exit_code == 1
    failed = [one for one in json.loads(result.output)["checks"] if one["ok"] is False]
    assert len(failed) <= 2  # the examples are run by doctest, which goes on
    assert check in failed[-1]["check"]
    assert "did not end within 0.5 seconds" in failed[-1]["why"]


def test_the_check_that_is_run_is_on_the_screen(tmp_path, monkeypatch):
    path = write(tmp_path, monkeypatch, lambda text: text + "\n\nwhile True:\n    pass\n")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "thrifty.cli", "check", path], stdout=theirs)
    os.close(theirs)
    try:
        seen = b""
        while b"can be imported" not in seen and select.select([ours], [], [], 30)[0]:
            seen += os.read(ours, 1024)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"...    can be imported" in seen


def test_a_file_of_another_name_than_its_key(tmp_path, monkeypatch):
    path = Path(write(tmp_path, monkeypatch))
    moved = path.rename(tmp_path / "methods" / "traces.compress" / "other.py")
    monkeypatch.chdir(tmp_path.parent)  # where the registry does not look
    result = run(str(moved), "--json")
    assert "the card says 'mine', the file's name 'other'" in result.output
    assert result.exit_code == 1


def test_what_is_no_method_is_refused(tmp_path, monkeypatch):
    path = Path(write(tmp_path, monkeypatch))
    nowhere = tmp_path / "loose.py"
    shutil.copy(path, nowhere)
    for word, why in (("no-such", "no method"), ("no/such.py", "no file"), (str(nowhere), "no family's folder")):
        result = run(word)
        assert result.exit_code == 2
        assert why in result.output
