"""A task in lm-evaluation-harness, run by its own evaluator on the gateway in front of the shipped student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install 'thrifty[eval]'")
pytest.importorskip("fastapi", reason="pip install 'thrifty[serve]'")

import lm_eval
from lm_eval.tasks import TaskManager

from serving import LONG
from test_serve import started
from thrifty import tasks
from thrifty.commands.serve import gateway
from thrifty.contracts import ThriftyError
from thrifty.edges.lm_eval import Exported, export
from thrifty.serve.app import build

torch.set_num_threads(1)
EASY = {"n": 8, "levels": [1]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started(build(gateway(LONG, None, name="long"))) as one:
        yield one.url


def evaluate(name: str, folder: Path, url: str, **arguments: Any) -> dict[str, Any]:
    given = {"model": "long", "base_url": f"{url}/chat/completions", "num_concurrent": 4, "max_retries": 1}
    return lm_eval.simple_evaluate(
        "local-chat-completions", model_args=given | arguments, tasks=[name], apply_chat_template=True,
        task_manager=TaskManager(include_path=str(folder)), log_samples=True, bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip


def test_lm_eval_asks_our_problems_and_grades_them_by_our_checker(url, tmp_path):
    name = export(tmp_path, "roll", **EASY)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.py", f"{name}.yaml"]
    found = evaluate(name, tmp_path, url)
    task = tasks.load("roll")
    problems = {p.id: p for p in task.problems("test", **EASY)}
    samples = found["samples"][name]
    assert {sample["doc"]["id"] for sample in samples} == set(problems)
    rights = []
    for sample in samples:
        problem = problems[sample["doc"]["id"]]
        [asked] = json.loads(sample["arguments"][0][0][0])
        assert asked["content"] == problem.prompt
        rights.append(task.grade(problem, sample["resps"][0][0]).right)
        assert sample["exact_match"] == rights[-1]
    assert found["results"][name]["exact_match,none"] == pytest.approx(sum(rights) / 8)
    assert found["results"][name]["complete,none"] == 1.0


def test_the_limit_of_tokens_reaches_the_server(url, tmp_path):
    name = export(tmp_path, "roll", n=2, max_tokens=3)
    for sample in evaluate(name, tmp_path, url)["samples"][name]:
        assert len(sample["resps"][0][0].split()) <= 3


def test_inline_chains_are_not_graded():
    made = Exported("roll", "test", 2, 0)
    one = made.dataset()["test"][0]
    right = f"The answer is {one['answer']}."
    wrong = f"The answer is {(int(one['answer']) + 1) % 10}."
    assert made.process_results(one, [right]) == {"exact_match": 1.0, "complete": 1.0}
    assert made.process_results(one, [f"<think>{wrong}</think>{right}"]) == {"exact_match": 1.0, "complete": 1.0}
    assert made.process_results(one, [f"{right}</think>{wrong}"]) == {"exact_match": 0.0, "complete": 1.0}
    assert made.process_results(one, [f"<think>{right}"]) == {"exact_match": 0.0, "complete": 0.0}
    assert made.process_results(one, [""]) == {"exact_match": 0.0, "complete": 0.0}


def test_files_are_named_wherever_lm_eval_runs(tmp_path, monkeypatch):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    name = export(tmp_path / "out", "file:sums.jsonl", n=3)
    assert name == "thrifty_sums"
    assert f"file:{tmp_path}/sums.jsonl" in (tmp_path / "out" / f"{name}.py").read_text()
    with pytest.raises(ThriftyError, match="unknown task 'rol'"):
        export(tmp_path / "out", "rol")
    assert len(list((tmp_path / "out").iterdir())) == 2
