"""``thrifty reproduce --workers``: processes of this machine, which end with the one that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from thrifty import evidence, registry
from thrifty.cli import app
from thrifty.commands import reproduce

METHOD = '''"""A strategy whose claim meets the other one's. Paper: (0000.00000)."""
import os, time
from dataclasses import dataclass, field
from pathlib import Path
from thrifty.contracts import Card, Sample

CARD = Card(key="KEY", title="KEY", arxiv="0000.00000", year=2026, saves=("tokens",))
CLAIM = {
    "says": "It waits.",
    "parts": [{"name": "accuracy", "test": "superior", "smallest": 0.1}],
    "comparator": {"pick": "other"},
    "tasks": ["roll"],
    "n": 2,
    "student": None,
    "unit": "training",
}

@dataclass(frozen=True)
class Waits:
    pick: str = field(default="this", metadata={"help": "which"})

    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt)
        return trace

def claim(trial):
    Path("KEY.pid").write_text(str(os.getpid()))
    while not (Path("OTHER.pid").exists() and Path("go").exists()):
        time.sleep(0.05)
    return {"accuracy": [1.0 if trial.arm == "method" else 0.0]}
'''
UNITS = (
    METHOD.partition("def claim")[0].replace(
        '"comparator"', '"seeds": 3, "grid": {"lr": [1, 2]}, "gates": {"pid": [1, None]}, "comparator"'
    )
    + """
def claim(trial):
    number = str(trial.unit) if not trial.tuning else f"{trial.arm}-{trial.pick['lr']}"
    Path(f"{number}.at").touch()
    others = {"0": "1", "1": "0", "method-1": "method-2", "method-2": "method-1"}
    while not Path(f"{others.get(number, number)}.at").exists():
        time.sleep(0.05)
    if trial.arm == "comparator" and not trial.tuning:
        assert trial.other["spare"] == [trial.unit]
    trial.gate("pid", os.getpid())
    trial.note("unit", trial.unit)
    return {"accuracy": [trial.rng.random() + trial.pick["lr"] + (trial.arm == "method")], "spare": [trial.unit]}
"""
)
RUN = """
import signal
from thrifty import registry
from thrifty.cli import app

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell runs in the background ignores
    methods = {key: registry.find(key) for key in ("one", "two")}
    registry.methods = lambda: methods
    app("reproduce --all --scale smoke --results results --workers 2".split(), prog_name="thrifty")
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two claims that run at once: each waits for the other, and for a file ``go``."""
    folder = tmp_path / "methods" / "solve.search"
    folder.mkdir(parents=True)
    for key, other in (("one", "two"), ("two", "one")):
        (folder / f"{key}.py").write_text(METHOD.replace("KEY", key).replace("OTHER", other))
    (tmp_path / "run.py").write_text(RUN)
    process = subprocess.Popen(
        [sys.executable, "run.py"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _until(lambda: all((tmp_path / f"{key}.pid").exists() for key in ("one", "two")) or process.poll() is not None)
    yield process
    process.kill()


def test_two_claims_run_at_once_and_are_recorded_once(started, tmp_path):
    (tmp_path / "go").touch()
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    assert "one, method, unit 0" in err
    assert "no verdict at this scale" in out
    for key in ("one", "two"):
        [record] = evidence.read(tmp_path / "results" / f"{key}.jsonl")
        assert record["units"][0]["method"]["accuracy"]["mean"] == 1
    assert len({(tmp_path / f"{key}.pid").read_text() for key in ("one", "two")}) == 2


def test_points_and_units_of_a_claim_run_at_once_and_give_what_one_process_gives(tmp_path):
    file = tmp_path / "methods" / "solve.search" / "units.py"
    file.parent.mkdir(parents=True)
    file.write_text(UNITS.replace("KEY", "units"))
    for workers in (2, 1):  # the first points wait for each other, and the first units; then their files stand
        words = f"reproduce units --dev --workers {workers} --results results --cache cache"
        command = [sys.executable, "-m", "thrifty.cli", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "units, method, unit 2" in done.stderr
    spread, alone = evidence.read(tmp_path / "results" / "units.jsonl")
    pids = [set(record["gates"].pop("pid")) for record in (spread, alone)]
    assert [len(found) for found in pids] == [2, 1]
    assert spread["picks"] == {"method": {"lr": 2}, "comparator": {"lr": 2}}
    assert spread["notes"] == {"method: unit": [0, 1, 2], "comparator: unit": [0, 1, 2]}
    varying = ("time", "seconds")
    assert {k: v for k, v in spread.items() if k not in varying} == {k: v for k, v in alone.items() if k not in varying}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_what_started_them(started, tmp_path, end):
    pids = [int((tmp_path / f"{key}.pid").read_text()) for key in ("one", "two")]
    if end == signal.SIGINT:  # as a terminal sends it: to all of them
        for pid in pids:
            os.kill(pid, end)
    started.send_signal(end)
    _, err = started.communicate(timeout=60)
    assert started.returncode == (130 if end == signal.SIGINT else -end), err
    _until(lambda: not any(_runs(pid) for pid in pids))
    assert not any(_runs(pid) for pid in pids)
    assert not (tmp_path / "results").exists()


def test_the_longest_claims_begin_first_and_those_of_which_nothing_is_known_before_them(tmp_path):
    class Submitted(list):
        def submit(self, run, folder, method, *rest):
            self.append(method.key)
            done = Future()
            done.set_result(([], "stopped here"))
            return done

    method, runs = registry.find("greedy"), []
    for key, seconds in {"short": 5, "crashed": None, "long": 60, "middle": 7, "unknown": None}.items():
        path, error = tmp_path / f"{key}.jsonl", {"error": "it broke"} if key == "crashed" else {}
        if key != "unknown":
            row = dict.fromkeys(evidence.ALWAYS) | {"scale": "tiny", "seconds": seconds or 90, **error}
            path.write_text(json.dumps(row))
        runs.append(reproduce._Runs(key, replace(method, key=key), path, iter([(None, 1)])))
    submitted = Submitted()
    list(reproduce._away(submitted, runs, "tiny", False, tmp_path))
    assert submitted == ["crashed", "unknown", "long", "middle", "short"]


def test_no_workers_are_refused():
    done = CliRunner().invoke(app, ["reproduce", "--all", "--workers", "0"])
    assert done.exit_code == 2
    assert "--workers" in done.output


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except OSError:
        return False


def _until(done, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
