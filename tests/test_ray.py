"""Work handed to others comes back once, and is what one process finds: in pools, and (slow) on a real Ray cluster."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import tiny
from thrifty import assets, evidence, lab, registry, tasks
from thrifty.cli import app
from thrifty.contracts import Outcome, Problem, Sample, Talk, ThriftyError
from thrifty.edges import ray as edge
from thrifty.engines import spread
from thrifty.engines.local import LocalEngine
from thrifty.engines.scripted import ScriptedEngine
from thrifty.progress import Progress
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.traces import store

torch.set_num_threads(1)
LONG = str(assets.find("long"))
ROLL = tasks.load("roll")
SHARDS = ["0000000.parquet", "0000008.parquet", "0000016.parquet"]

METHOD = '''"""Take the shorter of two samples; where FOLDER/kill-KEY stands, remove it and die."""

import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

from thrifty.contracts import Card, Problem, Sample, Talk

CARD = Card(key="KEY", title="Take the shorter")

CLAIM = {
    "says": "The shorter of two samples is right more often than the first.",
    "parts": [{"name": "accuracy", "test": "superior", "smallest": 0.1}],
    "comparator": {"pick": "first"},
    "tasks": ["roll"],
    "levels": (1,),
    "n": 16,
    "unit": "student",
}


@dataclass(frozen=True)
class Shorter:
    pick: str = field(default="shorter", metadata={"help": "which"})

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        traces = yield Sample(problem.prompt, n=2, max_tokens=60)
        trap = Path("FOLDER/kill-KEY")
        if self.pick == "first" and trap.exists():
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return traces[0] if self.pick == "first" else min(traces, key=lambda t: len(t.ids))


def claim(trial):
    outcomes = trial.solve(trial.method, trial.problems())
    return {"accuracy": [float(o.grade.right) for o in outcomes]}
'''


@dataclass(frozen=True)
class Noted:
    """A pass that notes who ran it; at ``victim`` the first worker kills itself, in the middle of a piece."""

    folder: str
    victim: str = ""
    always: bool = False

    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        [trace] = yield Sample(problem.prompt, temperature=0.7)
        killed = Path(self.folder, "killed")
        if problem.id == self.victim and (self.always or not killed.exists()):
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(self.folder, "ran").open("a") as file:
            file.write(f"{os.getpid()} {problem.id}\n")
        return trace


@dataclass(frozen=True)
class Scripted:
    """In a ``Recipe``'s place: an engine that takes no time to make."""

    device: str = "cpu"

    def engine(self) -> ScriptedEngine:
        return ScriptedEngine(script)


def script(prompt: str, key: tuple[Any, ...]) -> str:
    number = random.Random(repr(key)).randint(1, 9)
    return " ".join(["so"] * number) + f" </think> {number}"


def pool(workers: int = 2) -> Executor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))


def made(folder: Path) -> lab.Lab:
    return lab.Lab(folder, LONG, ROLL, n=20, max_tokens=60, progress=Progress(quiet=True))


def scripted(folder: Path) -> tuple[lab.Lab, ScriptedEngine]:
    one, engine = made(folder), Scripted().engine()
    one._recipes[engine] = Scripted()  # type: ignore[assignment]
    return one, engine


def said(outcomes: list[Outcome]) -> list[tuple[Any, ...]]:
    """All that does not depend on time and on what a cache held."""
    return [
        (
            o.problem.id,
            o.grade.score,
            o.grade.parsed,
            [(t.ids.tolist(), t.finish, t.answer, t.usage.generated) for t in o.tried],
        )
        for o in outcomes
    ]


def words(outcomes: list[Outcome]) -> list[tuple[Any, ...]]:
    """``said`` of a scripted engine, whose token ids follow the order in which words came up."""
    return [
        (o.problem.id, o.grade.score, o.grade.parsed, [(t.thought, t.response, t.usage.generated) for t in o.tried])
        for o in outcomes
    ]


def kept(one: lab.Lab, stage: str = "s") -> Counter[str]:
    """How often each problem stands in a stage's shards."""
    return Counter(row.problem for path in one.stage(stage).glob("*.parquet") for row in store.read(path))


def project(folder: Path, *keys: str) -> dict[str, registry.Method]:
    """A folder with these methods of its own, which is gone into; only they are registered."""
    (folder / "methods" / "solve.search").mkdir(parents=True)
    for key in keys:
        text = METHOD.replace("KEY", key).replace("FOLDER", str(folder))
        (folder / "methods" / "solve.search" / f"{key}.py").write_text(text)
    os.chdir(folder)
    return {key: registry.find(key) for key in keys}


def units(folder: str, key: str) -> list[Any]:
    return [(r["control"], r["units"]) for r in evidence.read(Path(folder) / f"{key}.jsonl")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """20 problems are shards of 8, 8 and 4, in pieces of 4; the folder is left as it was."""
    monkeypatch.setattr(lab, "SHARD", 8)
    monkeypatch.setattr(spread, "PIECE", 4)
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------- the seam, without Ray


def test_threads_with_a_model_each_find_what_one_process_finds(tmp_path):
    problems = ROLL.problems("test", 20, levels=[1])
    alone, many = made(tmp_path / "alone"), made(tmp_path / "many")
    expected = alone.solve("s", SelfConsistency(k=2), problems)
    with ThreadPoolExecutor(2) as threads, spread.on(threads):
        found = many.solve("s", SelfConsistency(k=2), problems)
    assert said(found) == said(expected)
    assert sorted(path.name for path in many.stage("s").glob("*.parquet")) == SHARDS
    generated = sum(o.usage.generated for o in found)
    for one in (alone, many):
        counted = one.meter.total()
        assert counted.thought + counted.answer == generated
        assert counted.positions - counted.prefill - counted.padding == generated
    assert set(many.meter.rows()) == set(alone.meter.rows())


def test_a_pool_that_lost_a_worker_says_so_and_the_next_goes_on_with_what_stands(tmp_path):
    problems = ROLL.problems("test", 20)
    expected = scripted(tmp_path / "alone")
    expected = expected[0].solve("s", Noted(str(tmp_path)), problems, expected[1])
    one, engine = scripted(tmp_path / "many")
    with pool() as workers, spread.on(workers):
        deadly = Noted(str(tmp_path), victim=problems[13].id)
        with pytest.raises(ThriftyError, match="the 4 problems from"):
            one.solve("s", deadly, problems, engine)
    stood = kept(one)
    assert set(stood.values()) <= {1}
    assert problems[13].id not in stood
    (tmp_path / "ran").unlink()
    with pool() as workers, spread.on(workers):
        assert words(one.solve("s", deadly, problems, engine)) == words(expected)
    assert kept(one) == {p.id: 1 for p in problems}
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert str(os.getpid()) not in {pid for pid, _ in ran}
    assert Counter(name for _, name in ran) == {p.id: 1 for p in problems if p.id not in stood}, "nothing again"


def test_a_model_in_memory_alone_stays_in_this_process(tmp_path, capsys):
    one = made(tmp_path)
    one.progress = Progress()
    with pool() as workers, spread.on(workers):
        found = one.solve("s", Noted(str(tmp_path)), ROLL.problems("test", 4), LocalEngine(tiny.loaded(), max_tokens=8))
    assert len(found) == 4
    assert {line.split()[0] for line in (tmp_path / "ran").read_text().splitlines()} == {str(os.getpid())}
    assert "solved in this process" in capsys.readouterr().err


def test_claims_side_by_side_leave_the_records_of_one_after_the_other(tmp_path, monkeypatch):
    methods = project(tmp_path, "one", "two", "broken")
    path = methods["broken"].path
    path.write_text(path.read_text().replace('{"accuracy": [', '{"nothing": ['))
    monkeypatch.setattr(registry, "methods", lambda: methods)
    monkeypatch.setattr(lab.Lab, "engine", lambda self, model=None, adapter=None: ScriptedEngine(script))
    asked = ["reproduce", "--all", "--scale", "smoke"]
    alone = CliRunner().invoke(app, [*asked, "--cache", "a", "--results", "alone"])
    with pool() as workers, spread.on(workers):
        many = CliRunner().invoke(app, [*asked, "--cache", "b", "--results", "many"])
    for done in (alone, many):
        assert done.exit_code == 1
        assert "1 of 3 claims crashed: broken" in done.output
    for key in ("one", "two"):
        assert len(units("many", key)) == 1
        assert units("many", key) == units("alone", key)
    [crash] = evidence.read(Path("many/broken.jsonl"))
    assert "nothing for accuracy" in crash["error"]


def traces(folder: Path) -> None:
    """Four files of 50 rows, every third wrong, the last two alike but for the setting."""
    row = store.TraceRow(
        "s", None, "p", "roll", 1, "q", "1", 0, True, "so", "1", "1", True, True, "stop", 3, 0, 2, 1, 0, 0.1
    )
    for number in range(4):
        fields = [
            {"setting": f"s{number}", "problem": f"p{i}", "thought": f"so {i} {min(number, 2)}", "right": i % 3 > 0}
            for i in range(50)
        ]
        store.write(folder / f"{number}.parquet", (store.TraceRow(**{**vars(row), **one}) for one in fields))


TRACES = [[], ["--keep", "right"], ["--sample", "0.5"], ["--unique", "--sample", "0.5", "--keep", "wrong"]]


@pytest.mark.parametrize("words", TRACES, ids=" ".join)
def test_trace_files_looked_at_by_others_are_written_as_by_one(words, tmp_path):
    traces(tmp_path)
    asked = ["traces", "0.parquet", "3.parquet", "2.parquet", "1.parquet", *words, "--json", "--to"]
    alone = CliRunner().invoke(app, [*asked, "alone.jsonl"])
    with pool() as workers, spread.on(workers):
        many = CliRunner().invoke(app, [*asked, "many.jsonl"])
    assert alone.exit_code == many.exit_code == 0, many.output
    assert many.output == alone.output
    assert json.loads(many.output)["read"] == 200
    assert Path("many.jsonl").read_text() == Path("alone.jsonl").read_text() != ""


def test_faults_in_trace_files_are_told_as_by_one(tmp_path):
    traces(tmp_path)
    rows = [row for number in (0, 1) for row in store.read(tmp_path / f"{number}.parquet")]
    for number in (0, 1):
        store.write(tmp_path / f"{number}.parquet", [store.TraceRow(**{**vars(r), "prompt_tokens": -1}) for r in rows])
    asked = ["traces", "0.parquet", "1.parquet"]
    alone = CliRunner().invoke(app, asked)
    with pool() as workers, spread.on(workers):
        many = CliRunner().invoke(app, asked)
        missing = CliRunner().invoke(app, ["traces", "0.parquet", "none.parquet"])
        twice = CliRunner().invoke(app, ["traces", "0.parquet", "0.parquet"])
    assert (many.exit_code, many.output) == (alone.exit_code, alone.output)
    assert "200 x prompt_tokens is negative" in many.output
    assert "none.parquet: no such trace file" in missing.output
    assert "named twice" in twice.output


def test_an_endpoint_is_not_spread():
    asked = ["measure", "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--model", "m"]
    with ThreadPoolExecutor(1) as threads, spread.on(threads):
        done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert "an endpoint is asked by one process" in done.output


def test_without_ray_or_with_another_thrifty_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = CliRunner().invoke(app, ["traces", str(tmp_path), "--ray", "auto"])
    assert (done.exit_code, done.output) == (2, "thrifty: --ray needs Ray: pip install 'thrifty[ray]'\n")
    with pytest.raises(ThriftyError, match="another thrifty"):
        edge._called("0" * 16, len, [])
    assert edge._called(edge.code(), len, [1, 2]) == 2


@pytest.mark.parametrize("words", [["--help"], ["list"], ["measure", "--help"]], ids=" ".join)
def test_ray_is_imported_where_it_is_asked_for_alone(words):
    code = "import atexit, sys; atexit.register(lambda: print('ray' in sys.modules, file=sys.stderr)); "
    code += f"sys.argv = {['thrifty', *words]}; from thrifty.cli import main; main()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "False\n"


# --------------------------------------------------------------------------------------- a cluster of two workers


def needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'thrifty[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head with two workers, as `ray start` leaves one, and this process connected to it; its address."""
    needs_ray()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of sockets are short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read when Ray is imported
    settings = os.environ | {"RAY_worker_niceness": "0"}  # not 15, which beside other work is a standstill
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    command += ["--min-worker-port=10002", "--max-worker-port=10999"]
    command += ["--disable-usage-stats", "--object-store-memory=100000000"]
    with Path(folder, "log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=settings, start_new_session=True)
    try:
        yield _connected(head, Path(folder, "log"))
    finally:
        import ray

        ray.shutdown()
        head.terminate()  # a head that blocks takes its processes with it
        head.wait(60)


def _connected(head: subprocess.Popen[bytes], log: Path) -> str:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have the tests on their path
    until = time.monotonic() + 200
    while True:
        if head.poll() is not None or time.monotonic() > until:
            pytest.fail(f"no cluster came up:\n{log.read_text()}")
        if told := re.search(r"ray start --address='(\S+)'", log.read_text()):
            ray.init(address=told[1], log_to_driver=False)
            return told[1]
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_a_piece_and_results_are_those_of_one_process(cluster, tmp_path):
    problems = ROLL.problems("test", 20, levels=[1])
    alone, many = made(tmp_path / "alone"), made(tmp_path / "many")
    expected = alone.solve("s", Noted(str(tmp_path)), problems)
    (tmp_path / "ran").unlink()
    with edge.over(cluster):
        found = many.solve("s", Noted(str(tmp_path), victim=problems[10].id), problems)
    assert (tmp_path / "killed").exists()
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert str(os.getpid()) not in {pid for pid, _ in ran}
    assert len({pid for pid, _ in ran}) >= 2
    assert {name for _, name in ran} == {p.id for p in problems}
    assert said(found) == said(expected)
    assert kept(many) == {p.id: 1 for p in problems}
    assert sorted(path.name for path in many.stage("s").glob("*.parquet")) == SHARDS
    counted = many.meter.total()
    assert counted.thought + counted.answer == sum(o.usage.generated for o in found)
    (tmp_path / "ran").unlink()
    assert said(many.solve("s", Noted(str(tmp_path)), problems)) == said(expected), "read, without a cluster"
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_samples_with_an_adapter_are_the_same_on_workers(cluster, tmp_path):
    from thrifty.tune.adapter import lora

    model = lora(made(tmp_path).loaded().model, rank=2, name=lab.ADAPTER, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(tmp_path / "saved"), selected_adapters=[lab.ADAPTER])
    problems = ROLL.problems("test", 8, levels=[1])
    results = []
    for executor in (None, edge._Cluster(gpu=True)):
        one = made(tmp_path / str(len(results)))
        engine = one.engine(adapter=tmp_path / "saved" / lab.ADAPTER)
        with spread.on(executor):
            results.append(said(one.solve("s", SelfConsistency(k=3), problems, engine, {lab.ADAPTER: 0.5})))
    assert results[0] == results[1]
    with edge.over(cluster), pytest.raises(ThriftyError, match="nowhere"):  # what a worker refuses, as it is
        made(tmp_path / "r").solve("s", SelfConsistency(k=1), problems, adapters={"nowhere": 1.0})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_piece_that_kills_every_worker_is_given_up_and_the_others_are_kept(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "RETRIES", 1)
    problems = ROLL.problems("test", 16, levels=[1])
    one, told = made(tmp_path), f"4 problems from {problems[8].id} on were given up: 2 workers"
    with edge.over(cluster), pytest.raises(ThriftyError, match=told):
        one.solve("s", Noted(str(tmp_path), problems[9].id, always=True), problems)
    stood = kept(one)
    assert {p.id for p in problems[:8]} <= set(stood)
    assert problems[9].id not in stood


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_finds_the_same_with_a_method_of_ones_own(cluster, tmp_path):
    project(tmp_path, "mine")
    results = []
    for name, more in (("alone", []), ("many", ["--ray", cluster])):
        asked = ["--model", "long", "--n", "10", "--strategy", "mine:pick=first", "--runs", str(tmp_path / "runs")]
        (tmp_path / "kill-mine").unlink(missing_ok=True)
        if more:
            (tmp_path / "kill-mine").touch()
        done = CliRunner().invoke(app, ["measure", *asked, "--name", name, "--json", *more])
        assert done.exit_code == 0, done.output
        [setting] = json.loads((tmp_path / "runs" / name / "result.json").read_text())["settings"]
        read = ("prompt_tokens", "cached_tokens")  # anew or from a cache: that depends on who ran before
        results.append({k: v for k, v in setting.items() if "seconds" not in k and k not in read})
    assert not (tmp_path / "kill-mine").exists()
    assert results[0] == results[1]
    assert spread.executor() is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_claim_whose_worker_is_killed_is_recorded_once(cluster, tmp_path, monkeypatch):
    methods = project(tmp_path, "one", "two")
    monkeypatch.setattr(registry, "methods", lambda: methods)
    asked = ["reproduce", "--all", "--scale", "smoke"]
    assert CliRunner().invoke(app, [*asked, "--cache", "a", "--results", "alone"]).exit_code == 0
    (tmp_path / "kill-two").touch()
    done = CliRunner().invoke(app, [*asked, "--cache", "b", "--results", "many", "--ray", cluster])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "kill-two").exists()
    for key in ("one", "two"):
        assert len(units("many", key)) == 1
        assert units("many", key) == units("alone", key)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trace_files_on_a_cluster(cluster, tmp_path):
    traces(tmp_path)
    asked = ["traces", *(f"{i}.parquet" for i in range(4)), "--keep", "right", "--json", "--to"]
    assert CliRunner().invoke(app, [*asked, "alone.parquet"]).exit_code == 0
    done = CliRunner().invoke(app, [*asked, "many.parquet", "--ray", cluster])
    assert done.exit_code == 0, done.output
    assert list(store.read("many.parquet")) == list(store.read("alone.parquet"))


@pytest.mark.slow
def test_no_cluster_is_ever_started():
    needs_ray()
    command = [sys.executable, "-m", "thrifty.cli", "traces", ".", "--ray"]
    for address, told in (("local", "start one with `ray start --head`"), ("127.0.0.1:1", "Connection refused")):
        done = subprocess.run([*command, address], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
