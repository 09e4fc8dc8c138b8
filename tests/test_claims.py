"""Claims: what is registered, how it is judged, and what the record says."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from thrifty import claims, controls, evidence, registry
from thrifty.claims import reproduce
from thrifty.commands.reproduce import main, told
from thrifty.contracts import ThriftyError
from thrifty.engines.scripted import ScriptedEngine
from thrifty.lab import Lab
from thrifty.progress import Progress
from thrifty.trial import Trial, fingerprint

torch.set_num_threads(1)
ROW = dict.fromkeys(evidence.ALWAYS)

METHOD = '''"""Take the sample that says it is sure."""

import random
from dataclasses import dataclass, field

from thrifty.contracts import Card, Problem, Sample, Talk
from thrifty.solve.search._vote import majority

CARD = Card(key="surest", title="Take the surest")

CLAIM = {
    "says": "The surest of four samples is right more often than the first.",
    "parts": [{"name": "accuracy", "test": "superior", "smallest": 0.1}],
    "comparator": {"pick": "first"},
    "tasks": ["file:TASK?split=test"],
    "n": 60,
    "unit": "student",
    "gates": {"not all right": [0.1, 0.9]},
}


@dataclass(frozen=True)
class Surest:
    pick: str = field(default="surest", metadata={"help": "which"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        traces = yield Sample(problem.prompt, n=4)
        if self.pick == "first":
            return traces[0]
        return next((t for t in traces if "sure" in t.thought), traces[0])


def claim(trial):
    outcomes = trial.solve(trial.method, trial.problems())
    right = [float(o.grade.right) for o in outcomes]
    if trial.arm == "comparator":
        trial.gate("not all right", sum(right) / len(right))
    return {"accuracy": right}
'''


def script(prompt: str, key: tuple[Any, ...]) -> str:
    """Right three times in ten, and only then sure of it."""
    number = prompt.split()[-1]
    if random.Random(str(key)).random() < 0.3:
        return f"I am sure </think> {number}"
    return f"I guess </think> {int(number) + 1}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a method of its own, its task, and a scripted engine in every lab."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"question": f"say {i}", "answer": str(i)}) for i in range(900)]
    Path("task.jsonl").write_text("\n".join(rows))
    path = tmp_path / "methods" / "solve.search" / "surest.py"
    path.parent.mkdir(parents=True)
    path.write_text(METHOD.replace("TASK", str(tmp_path / "task.jsonl")).replace("split=test", ""))
    monkeypatch.setattr(Lab, "engine", lambda self, model=None, adapter=None: ScriptedEngine(script))
    return path


def commit(path: Path) -> None:
    git = ("git", "-C", str(path.parent), "-c", "user.name=a", "-c", "user.email=a@b")
    if not (path.parent / ".git").exists():
        subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", path.name], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "register"], check=True)


def run(path: Path, **options: Any) -> dict[str, Any]:
    evidence.code_hash.cache_clear()
    sys.modules.pop("thrifty_methods.solve_search_surest", None)  # the file may have been rewritten
    return reproduce(registry.find("surest"), progress=Progress(quiet=True), **options)


# ----------------------------------------------------------------------------------------------- registering


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('"n": 60', '"n": 6 * 10'), "literal"),
        (('"n": 60', '"m": 60'), "no field 'm'"),
        (('    "n": 60,\n', ""), "lacks 'n'"),
        (('"smallest": 0.1', '"margin": 0.1'), "needs smallest"),
        (('"n": 60', '"n": 60, "seeds": 5'), "three students"),
        (('"n": 60', '"n": 60, "students": 3'), "students is 1 to 3 where the unit is the training"),
        (('"unit": "student"', '"unit": "training", "seeds": 2'), "training seeds"),
        (('"test": "superior"', '"test": "better"'), "'test' is 'better'.*superior.*non-inferior"),
        (('"n": 60', '"n": "60"'), "'n' is '60', and should be int"),
        (('"n": 60', '"n": True'), "'n' is True"),
        (('"n": 60', '"n": 60, "levels": 1'), "'levels' is 1"),
        (('"n": 60', '"n": 60, "tasks": "roll"'), "'tasks' is 'roll'"),
        (('"n": 60', '"n": 60, "grid": {"x": 3}'), "'grid' is"),
        (('"n": 60', '"n": 60, "grid": {"x": []}'), "grid 'x' has no values"),
        (('"n": 60', '"n": 60, "scales": {"smoke": 3}'), "'scales' is"),
        (("[0.1, 0.9]", "0.1"), "'gates' is"),
        (("[0.1, 0.9]", "[0.1]"), r"gate 'not all right' is \[lowest, highest\]"),
        (('{"pick": "first"}', '"first"'), "'comparator' is 'first'"),
        (('[{"name": "accuracy", "test": "superior", "smallest": 0.1}]', '["accuracy"]'), "should be a dict"),
    ],
)
def test_a_claim_that_cannot_be_registered_says_why(tmp_path, change, told):
    path = tmp_path / "surest.py"
    path.write_text(METHOD.replace(*change))
    with pytest.raises(ThriftyError, match=told) as error:
        evidence.read_claim(path)
    assert str(path) in str(error.value)


def test_a_file_without_a_claim_has_none(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text(METHOD.replace("CLAIM = {", "_CLAIMS = {"))
    assert evidence.read_claim(path) is None


# ----------------------------------------------------------------------------------------------- the record


def test_a_torn_last_line_costs_itself_alone(tmp_path):
    path = tmp_path / "results" / "key.jsonl"
    evidence.append(path, ROW | {"run": 1, "says": "lines of a PDF\u2028and a terminal\x85"})
    with path.open("a") as file:
        file.write('{"run": 2, "verd')  # killed in the middle of a write
    assert [r["run"] for r in evidence.read(path)] == [1]
    evidence.append(path, ROW | {"run": 3})
    assert [r["run"] for r in evidence.read(path)] == [1, 3]
    path.write_text("<<<<<<< HEAD\n")  # not what a killed run leaves: the run below would be the first that counts
    with pytest.raises(ThriftyError, match=r"key\.jsonl, line 1: not valid JSON"):
        evidence.read(path)
    for strange in ("{}", "3"):
        path.write_text(strange)
        with pytest.raises(ThriftyError, match=r"key\.jsonl, line 1: a run that has no 'scale'"):
            evidence.read(path)


def test_where_no_run_can_be_kept_is_told_before_any_work(project):
    Path("file").touch()
    Path("results/surest.jsonl").mkdir(parents=True)
    for place in ("file", "file/below", "results"):
        done = CliRunner().invoke(main, ["surest", "--results", place])
        assert isinstance(done.exception, ThriftyError)
        assert "runs cannot be kept there" in str(done.exception)
    assert not Path("runs").exists()


def test_runs_that_end_at_once_leave_whole_lines(tmp_path):
    path = tmp_path / "key.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: evidence.append(path, ROW | {"run": i, "pad": "x" * 5000}), range(64)))
    assert sorted(r["run"] for r in evidence.read(path)) == list(range(64))


def record(path: Path, verdict: str, control: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "scale": "tiny", "control": control, "controls": ["placebo", "oracle"], "verdict": verdict, "commit": "abc",
        "code": evidence.code_hash(path), "source": evidence.source_hash(path), "why": "",
    } | changes  # fmt: skip


@pytest.fixture
def file(tmp_path):
    evidence.code_hash.cache_clear()
    path = tmp_path / "surest.py"
    path.write_text(METHOD)
    return path


def test_a_status_follows_from_the_first_registered_run_and_its_controls(file):
    def status(*runs: Any) -> str:
        return evidence.standing(file, runs).status

    shown, refuted = record(file, "shown"), record(file, "refuted")
    failed, held = record(file, "inconclusive", "placebo"), record(file, "shown", "placebo")
    assert status() == "built"
    assert status(record(file, "shown", commit=None), record(file, "shown", scale="dev")) == "built"
    assert status({**shown, "error": "OSError", "verdict": None}) == "built"
    assert status(shown) == "inconclusive"  # nobody knows what its placebo does
    assert status(shown, failed) == "shown"
    assert status(shown, held) == "not carried"
    assert status(shown, record(file, "not carried", "placebo")) == "inconclusive"  # its gate failed: it tells nothing
    assert status(shown, refuted, failed) == "shown"
    assert status(refuted) == "inconclusive"
    assert status(refuted, record(file, "shown", "oracle")) == "refuted"
    assert status(refuted, record(file, "refuted", "oracle")) == "inconclusive"
    assert status({**refuted, "controls": []}) == "refuted"
    assert status(shown, failed, record(file, "inconclusive", scale="gpu")) == "inconclusive"


def test_a_method_whose_code_has_changed_is_stale_and_a_comment_is_no_code(file):
    runs = [record(file, "shown", controls=[])]
    file.write_text(
        METHOD.replace("Take the sample", "Choose the sample").replace("    def solve", "    # why\n    def solve")
    )
    evidence.code_hash.cache_clear()
    assert evidence.standing(file, runs).status == "shown"
    file.write_text(METHOD.replace("n=4", "n=5"))
    evidence.code_hash.cache_clear()
    assert evidence.standing(file, runs).status == "stale"
    again = record(file, "refuted", controls=[])
    assert evidence.standing(file, [*runs, again]).status == "refuted"


def test_hashes_follow_every_way_to_import(tmp_path, monkeypatch):
    """What a method imports counts, and everything that verdicts rest on beside it is the lab."""
    texts = {
        "__init__.py": "", "one.py": "", "part/__init__.py": "", "part/two.py": "", "part/three.py": "",
        "method.py": "from thrifty.part import (\n    two,\n    three as other,\n)\n\n\ndef f():\n"
        "    import thrifty.one\n",
    }  # fmt: skip
    package = tmp_path / "thrifty"
    for name, text in texts.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(evidence, "PACKAGE", package)
    assert evidence._imported(package / "method.py") == {package / name for name in texts} - {
        package / n for n in ("__init__.py", "method.py")
    }


def test_what_verdicts_rest_on_is_hashed(monkeypatch):
    seen: set[str] = set()
    monkeypatch.setattr(evidence, "_code", lambda path: seen.add(path.relative_to(evidence.PACKAGE).as_posix()) or "")
    evidence.lab_hash.__wrapped__()
    assert seen > {
        "claims.py",
        "controls.py",
        "trial.py",
        "lab.py",
        "measure/stats.py",
        "traces/segment.py",
        "tune/rollout.py",
    }
    assert not any(name.startswith(("recipes/", "solve/search/", "report/")) for name in seen)


# ----------------------------------------------------------------------------------------------- runs


def test_an_amended_claim_has_seeds_of_its_own(project, tmp_path):
    first = evidence.read_claim(project)
    seeds = {
        Trial(replace(first, amendments=amendments), "method", unit, "tiny", tmp_path, "secret").seed
        for amendments in ((), ("1: too few",), ("1: too few", "2: still"))
        for unit in range(3)
    }
    assert len(seeds) == 9


def test_trainings_are_dealt_over_the_students_that_are_asked_for(project, tmp_path):
    def assets(**changes: Any) -> list[str]:
        claim = replace(evidence.read_claim(project), student="long", **changes)
        trials = (Trial(claim, "method", unit, "tiny", tmp_path, "secret") for unit in range(5))
        return [Path(t.asset()).name for t in trials]

    assert assets(unit="training", students=3) == ["long-0", "long-1", "long-2", "long-0", "long-1"]
    assert assets(unit="training") == ["long-0"] * 5


def test_a_claim_runs_from_registration_to_status(project):
    commit(project)
    made = run(project)
    assert made["verdict"] == "shown"
    assert made["parts"][0]["effect"]["value"] == pytest.approx(0.7 - 0.3**4 + 0.7**4 - 0.47, abs=0.15)
    assert [u["method"]["accuracy"]["n"] for u in made["units"]] == [60] * 3
    assert (made["family"], made["title"]) == ("solve.search", "Take the surest")
    assert made["registered"]["says"] == "The surest of four samples is right more often than the first."
    for arm, figures in made["figures"].items():  # the same problems, whatever the claim makes of them
        assert [f["accuracy"] for f in figures] == [u[arm]["accuracy"]["mean"] for u in made["units"]]
        assert all(f["generated_tokens"] > f["thought_tokens"] > 0 for f in figures)
        assert all(f["flops"] > f["generated_tokens"] * 100_000 for f in figures)  # a student has 0.7 million
    assert len(set(made["seeds"])) == len(set(made["problems"])) == 3
    assert registry.get("surest").status == "inconclusive"
    placebo = run(project, control="placebo")
    assert placebo["verdict"] != "shown"
    assert placebo["units"][0]["comparator"] == made["units"][0]["comparator"]
    assert registry.get("surest").status == "shown"
    assert run(project, control="oracle")["verdict"] == "shown"
    project.write_text(project.read_text().replace("n=4", "n=3"))
    evidence.code_hash.cache_clear()
    assert registry.get("surest").status == "stale"


def test_a_claim_that_was_changed_says_so_or_is_refused_before_any_work(project):
    commit(project)
    run(project)
    project.write_text(project.read_text().replace('"smallest": 0.1', '"smallest": 0.11'))
    with pytest.raises(ThriftyError, match='no amendment says why: add "1: what was changed, and why"'):
        CliRunner().invoke(main, ["surest"], catch_exceptions=False)
    assert len(evidence.read(Path("results/surest.jsonl"))) == 1
    text = project.read_text().replace('"unit": "student"', '"amendments": ["1: ..."], "unit": "student"')
    project.write_text(text)
    evidence.unamended(project, evidence.read_claim(project), evidence.read(Path("results/surest.jsonl")))


def test_a_verdict_is_stale_once_the_comparator_that_its_claim_names_has_changed(project):
    other = project.with_name("other.py")
    other.write_text(METHOD.replace("CLAIM", "NONE").replace('"surest"', '"other"').replace("Surest", "Other"))
    project.write_text(project.read_text().replace('{"pick": "first"}', '{"key": "other", "pick": "first"}'))
    commit(project)
    assert list(run(project)["beside"]) == [str(other)]
    assert registry.get("surest").status == "inconclusive"
    other.write_text(other.read_text().replace("n=4", "n=3"))
    evidence.code_hash.cache_clear()
    assert registry.get("surest").status == "stale"


def test_runs_of_the_baseline_against_itself_are_gone_on_with(project):
    commit(project)
    for repeat, streams in ((2, [1, 2]), (3, [1, 2, 3])):
        done = CliRunner().invoke(main, f"surest --control aa --repeat {repeat}".split())
        assert done.exit_code == 0, done.output
        assert [r["stream"] for r in evidence.read(Path("results/surest.jsonl"))] == streams


def test_the_baseline_against_itself_differs_by_chance_alone(project):
    effects = [run(project, control="aa", stream=i)["parts"][0]["effect"] for i in (1, 2, 3)]
    assert len({e["value"] for e in effects}) > 1
    assert all(e["p"] > 0.001 and abs(e["value"]) < 0.2 for e in effects)


def test_confirm_problems_follow_from_the_registered_content(project):
    def hashes(**options: Any) -> list[str]:
        return [u["comparator"]["accuracy"]["hash"] for u in run(project, **options)["units"]]

    first = hashes()
    assert first == hashes()
    assert first != hashes(dev=True)
    project.write_text(project.read_text().replace("    def solve", "    # a comment\n    def solve"))
    assert first == hashes()
    project.write_text(project.read_text().replace('"smallest": 0.1', '"smallest": 0.11'))
    other = hashes()
    assert not set(first) & set(other)
    commit(project)
    assert not set(other) & set(hashes()), "a look before registering is not at the problems that decide"


def test_figures_are_those_of_the_answers_that_the_claim_returns(project):
    later = "        trial.solve(type(trial.method)(pick='surest'), trial.problems())\n        trial.gate("
    text = project.read_text().replace("        trial.gate(", later)
    project.write_text(text)
    made = run(project)
    for arm, figures in made["figures"].items():
        assert [f["accuracy"] for f in figures] == [u[arm]["accuracy"]["mean"] for u in made["units"]]
    trained = text.replace('{"accuracy": right}', '{"accuracy": 0.5}').replace(
        '"student",\n', '"training", "seeds": 3,\n'
    )
    project.write_text(trained)
    assert run(project, scale="smoke")["units"][0]["method"]["accuracy"]["mean"] == 0.5, (
        "a training's may be one number"
    )


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ("'placebo': 'bogus'", {}, "no placebo 'bogus'; solve.search has choice"),
        ("'oracle': 'none: why'", {"control": "oracle"}, "has no oracle: none: why"),
        ("'settings': {'kk': 5}", {}, "CLAIM's settings: .*'kk'; Surest has pick"),
        ("'placebo': {'key': 'self-consistency', 'kk': 5}", {}, "CLAIM's placebo: .*'kk'; SelfConsistency has k"),
    ],
)
def test_what_a_claim_names_and_nothing_takes_is_told_before_any_work(project, change, options, told):
    project.write_text(project.read_text().replace('"n": 60', f'"n": 60, {change}'))
    with pytest.raises(ThriftyError, match=told):
        run(project, scale="smoke", **options)
    assert not Path("results").exists()


def test_one_number_for_all_problems_is_refused_where_problems_decide(project):
    project.write_text(project.read_text().replace('{"accuracy": right}', '{"accuracy": 0.5}'))
    with pytest.raises(ThriftyError, match=r"returned 0\.5 for accuracy: .*a value per problem"):
        run(project, scale="smoke")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_value_that_is_not_finite_is_no_evidence(project, value):
    text = project.read_text()
    project.write_text(text.replace('accuracy": right}', f'accuracy": [float("{value}"), *right[1:]]}}'))
    with pytest.raises(ThriftyError, match="returned for accuracy is not finite"):
        run(project)
    text = text.replace('    "unit"', '    "grid": {"k": [1, 4]},\n    "unit"')
    one = f'right[0] if trial.pick["k"] == 4 else float("{value}")'
    project.write_text(text.replace('accuracy": right}', f'accuracy": [{one}, *right[1:]]}}'))
    assert run(project)["tuning"]["method"][0] == ({"k": 1}, None), "a rate at which training diverges loses"


def test_finished_work_is_not_done_again(project, monkeypatch):
    first = run(project)
    monkeypatch.setattr(Lab, "engine", lambda self, model=None, adapter=None: None)
    again = run(project)
    assert (again["units"], again["verdict"]) == (first["units"], first["verdict"])


def test_a_crash_is_recorded_and_a_dirty_file_does_not_count(project):
    commit(project)
    project.write_text(project.read_text().replace('return {"accuracy": right}', "return {}"))
    with pytest.raises(ThriftyError, match="nothing for accuracy"):
        run(project)
    [crash] = evidence.read(Path("results/surest.jsonl"))
    assert "nothing for accuracy" in crash["error"]
    assert crash["commit"] is None


def test_what_a_method_imports_must_be_committed_too(tmp_path):
    helper = tmp_path / "_helper.py"
    method = tmp_path / "method.py"
    for file in (helper, method):
        file.write_text("one")
        commit(file)
    found = claims._commit([method, helper])
    assert found
    helper.write_text("two")
    assert claims._commit([method, helper]) is None
    assert claims._commit([method]) == found
    assert claims._commit([method, Path(click.__file__)]) == found  # installed


def test_a_gate_that_nobody_measures_is_an_error_and_a_failed_one_names_itself(project):
    text = project.read_text()
    project.write_text(text.replace("[0.1, 0.9]", "[0.9, None]"))
    made = run(project)
    assert made["verdict"] == "not carried"
    assert "not all right" in made["why"]
    project.write_text(text.replace('trial.arm == "comparator"', "False"))
    for scale in ("smoke", "tiny"):
        with pytest.raises(ThriftyError, match="not all right"):
            run(project, scale=scale)


def test_claims_share_the_samples_of_the_bank(project, monkeypatch):
    """Two samples of one student do not differ but by chance; a second claim on the same problems samples nothing."""
    ask = "    outcomes = trial.solve(trial.method, trial.problems())\n"
    text = project.read_text().replace(ask, "    outcomes = [s[trial.arm == 'method'] for s in trial.bank(k=2)[1]]\n")
    project.write_text(text.replace("[0.1, 0.9]", "[0.1, 0.5]"))
    first = run(project)
    assert first["verdict"] in ("refuted", "inconclusive")
    assert [u["method"]["accuracy"]["n"] for u in first["units"]] == [60] * 3
    sampled = len(list(Path("runs/claims").rglob("Samples-*")))
    assert sampled == 6  # two blocks of each of three students
    project.write_text(project.read_text().replace("the first", "another"))
    assert run(project)["units"] != first["units"]
    assert len(list(Path("runs/claims").rglob("Samples-*"))) < 2 * sampled


def test_a_family_without_a_placebo_makes_claims_register_one(project, monkeypatch):
    monkeypatch.setitem(controls.PLACEBOS, "solve.search", "nobody knows one")
    with pytest.raises(ThriftyError, match="nobody knows one"):
        run(project)
    project.write_text(project.read_text().replace('"n": 60', '"n": 60, "placebo": {"pick": "first"}'))
    assert run(project)["controls"] == ["placebo", "oracle"]
    assert run(project, control="placebo")["parts"][0]["effect"]["value"] == 0


def test_a_grid_is_tuned_for_both_arms_on_development_problems(project, monkeypatch):
    text = project.read_text().replace('    "unit"', '    "grid": {"k": [1, 4, 9]},\n    "unit"')
    text = text.replace("trial.solve(trial.method,", 'trial.solve(replace(trial.method, k=trial.pick["k"]),')
    text = text.replace("n=4", "n=self.k").replace("    pick: str", "    k: int = 4\n    pick: str")
    text = text.replace("import dataclass, field", "import dataclass, field, replace")
    fails = '    if trial.pick["k"] > LIMIT:\n        raise Diverged("the loss is nan")\n'
    text = text.replace("def claim(trial):\n", f"def claim(trial):\n{fails}")
    text = text.replace("CARD =", "from thrifty.tune.supervised import Diverged\n\nCARD =")
    project.write_text(text.replace("LIMIT", "4"))
    made: list[Any] = []
    monkeypatch.setattr(claims, "Trial", lambda *given, **more: made.append(Trial(*given, **more)) or made[-1])
    record = run(project)
    assert [t.dev for t in made] == [t.tuning for t in made] == [True] * 6 + [False] * 6
    assert record["picks"]["method"] == {"k": 4}
    [(one, low), (four, high), (nine, nothing)] = record["tuning"]["method"]
    assert (one, four, nine, nothing) == ({"k": 1}, {"k": 4}, {"k": 9}, None)
    assert low < high
    assert evidence.tuned(record)["method"] == f"k 4 (1: {low:.4g}, 4: {high:.4g}, 9: diverged)"
    project.write_text(text.replace("LIMIT", "4").replace("[1, 4, 9]", "[1, 4]"))
    record = run(project)
    assert "method tuned to k 4, the largest tried" in told(record)
    assert evidence.tuned(record)["comparator"] == "nothing: all points are alike"
    project.write_text(text.replace("LIMIT", "0"))
    with pytest.raises(ThriftyError, match="diverged at every point"):
        run(project)


def test_the_command_runs_what_is_missing_with_the_controls_it_needs(project, monkeypatch):
    commit(project)
    evidence.code_hash.cache_clear()
    method = registry.find("surest")
    monkeypatch.setattr(registry, "methods", lambda: {"surest": method})
    planned = CliRunner().invoke(main, ["--all", "--plan"]).output
    assert planned.split()[:5] == ["surest", "to", "run", "never", "ran"]
    first = CliRunner().invoke(main, ["--all", "--json"])
    assert first.exit_code == 0, first.output
    runs = evidence.read(Path("results/surest.jsonl"))
    assert [(r["control"], r["verdict"] == "shown") for r in runs] == [(None, True), ("placebo", False)]
    assert CliRunner().invoke(main, ["--all"]).exit_code == 0
    assert len(evidence.read(Path("results/surest.jsonl"))) == 2
    older = {**runs[0], "control": "oracle", "code": "older", "seconds": 6000.0}
    path = Path("results/surest.jsonl")
    path.write_text(json.dumps(older) + "\n" + path.read_text())
    planned = CliRunner().invoke(main, ["--all", "--plan"]).output
    assert planned.split()[:4] == ["surest", "done", "0", "min"], "what its code took, not what an earlier one did"
    smoke = CliRunner().invoke(main, ["surest", "--scale", "smoke"])
    assert "no verdict" in smoke.output


def test_a_fingerprint_is_of_content_and_refuses_what_it_cannot_see(tmp_path):
    @dataclass(frozen=True)
    class Method:
        k: int = 3

        def go(self): ...

    assert fingerprint(Method()) == fingerprint(Method())
    assert fingerprint(Method()) != fingerprint(replace(Method(), k=4))
    assert fingerprint(np.arange(3)) != fingerprint(np.arange(3.0))
    for name in ("a.json", "chat_template.jinja"):
        (tmp_path / name).write_text("1")
        one = fingerprint(tmp_path)
        (tmp_path / name).write_text("2")
        assert fingerprint(tmp_path) != one
    for callables in ((partial(pow, 2), partial(pow, 3)), (Method(1).go, Method(2).go)):
        one, other = map(fingerprint, callables)
        assert one != other
    for strange in (object(), type("Called", (), {"__call__": lambda self: 1})()):
        with pytest.raises(ThriftyError, match="fingerprint"):
            fingerprint(strange)
