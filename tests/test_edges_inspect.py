"""A task and strategies in inspect-ai's own ``eval``, on the gateway in front of the shipped student."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("inspect_ai", reason="pip install 'thrifty[eval]'")
pytest.importorskip("fastapi", reason="pip install 'thrifty[serve]'")

import inspect_ai
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.log import EvalLog
from inspect_ai.scorer import match

from serving import LONG
from test_serve import started
from thrifty import tasks
from thrifty.commands.serve import gateway
from thrifty.contracts import Problem, Sample, Talk, ThriftyError
from thrifty.edges import inspect_ai as edge
from thrifty.engines.openai import OpenAIEngine
from thrifty.serve.app import build
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.solve.search.short_m_at_k import ShortMAtK
from thrifty.solve.search.single_pass import SinglePass

torch.set_num_threads(1)
ROLL = tasks.load("roll")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started(build(gateway(LONG, None, name="long"))) as one:
        yield one.url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def run(task: inspect_ai.Task, url: str, folder: Path, **options: Any) -> EvalLog:
    [log] = inspect_ai.eval(
        task, model="openai-api/local/long", model_base_url=url, model_args={"api_key": "open"}, log_dir=str(folder),
        display="none", log_level="error", max_connections=4, **options,
    )  # fmt: skip
    return log


def scores(log: EvalLog) -> dict[str, dict[str, float]]:
    assert log.status == "success", log.error
    return {score.name: {k: m.value for k, m in score.metrics.items()} for score in log.results.scores}


def made(log: EvalLog) -> int:
    return sum(usage.output_tokens for usage in log.stats.model_usage.values())


def test_a_plain_pass_is_graded_as_we_grade_and_its_tokens_stand_beside_accuracy(url, folder):
    log = run(edge.task(ROLL, "test", 6, levels=[1]), url, folder, temperature=0)
    found = scores(log)
    problems = {p.id: p for p in ROLL.problems("test", 6, levels=[1])}
    rights = []
    for sample in log.samples:
        assert sample.input == problems[sample.id].prompt
        rights.append(ROLL.grade(problems[sample.id], sample.output.completion).score)
    assert found["right"]["mean"] == pytest.approx(sum(rights) / 6)
    assert found["complete"]["mean"] == 1.0
    assert found["tokens"]["mean"] == pytest.approx(made(log) / 6)
    assert "stderr" in found["right"]


def test_an_answer_that_was_cut_is_incomplete_and_never_right(url, folder):
    found = scores(run(edge.task(ROLL, "test", 3, levels=[1]), url, folder, max_tokens=3))
    assert found["complete"]["mean"] == found["right"]["mean"] == 0.0
    assert found["tokens"]["mean"] == 3


def test_a_strategy_runs_on_the_model_that_inspect_evaluates_and_all_its_samples_are_charged(url, folder):
    solver = edge.solver(SelfConsistency(k=3), ROLL)
    log = run(edge.task(ROLL, "test", 4, levels=[1], solver=solver), url, folder)
    found = scores(log)
    assert found["complete"]["mean"] == 1.0
    for sample in log.samples:
        cost = sample.store["thrifty"]
        assert cost["tried"] == cost["calls"] == 3
        assert cost["partial"] == 0
        [usage] = sample.model_usage.values()
        assert usage.output_tokens == cost["thought"] + cost["answer"] == sample.output.usage.output_tokens
        assert usage.reasoning_tokens == cost["thought"] > 0
        assert len([event for event in sample.events if event.event == "model"]) == 3, "in this sample's own transcript"
    assert found["tokens"]["mean"] == pytest.approx(made(log) / 4)


def test_epochs_sample_anew_and_one_epoch_repeats_itself(url, folder):
    task = edge.task(ROLL, "test", 2, solver=edge.solver(SinglePass(temperature=1.5), ROLL))
    first, second = (run(task, url, folder, epochs=2) for _ in range(2))
    said = [{(s.id, s.epoch): repr(s.output.message.content) for s in log.samples} for log in (first, second)]
    assert said[0] == said[1], "the seed follows from problem, epoch and path"
    assert any(said[0][id, 1] != said[0][id, 2] for id, _ in said[0])


def test_a_strategy_that_continues_responses_needs_an_engine_of_ours_and_is_charged_all_the_same(url, folder):
    refused = run(edge.task(ROLL, "test", 1, solver=edge.solver(ShortMAtK(m=1, k=3), ROLL)), url, folder)
    assert refused.status == "error"
    assert "short-m-at-k needs cancel, prefix" in refused.error.message
    assert "openai" in refused.error.message
    engine = OpenAIEngine(url, "long", LONG)
    solver = edge.solver(SelfConsistency(k=2), ROLL, engine)
    log = run(edge.task(ROLL, "test", 4, levels=[1], solver=solver), url, folder)
    found = scores(log)
    costs = [sample.store["thrifty"] for sample in log.samples]
    assert found["complete"]["mean"] == 1.0
    assert all(cost["tried"] == cost["calls"] == 2 and not cost["partial"] for cost in costs)
    assert made(log) == sum(cost["thought"] + cost["answer"] for cost in costs)
    assert found["tokens"]["mean"] == pytest.approx(made(log) / 4)


def test_inspects_token_limit_ends_a_strategy(url, folder):
    task = edge.task(ROLL, "test", 2, solver=edge.solver(SelfConsistency(k=4), ROLL))
    log = run(task, url, folder, token_limit=40)
    assert log.status == "success", log.error
    assert {sample.limit.type for sample in log.samples} == {"token"}


def test_the_solver_serves_tasks_of_others(url, folder):
    sample = InspectSample(ROLL.problems("test", 1, levels=[1])[0].prompt, target="x")
    task = inspect_ai.Task(dataset=[sample], solver=edge.solver(SelfConsistency(k=2)), scorer=match())
    log = run(task, url, folder)
    assert log.status == "success"
    assert log.samples[0].store["thrifty"]["tried"] == 2


@dataclass(frozen=True)
class _Stopping:
    def solve(self, problem: Problem, rng: random.Random) -> Talk:
        [trace] = yield Sample(problem.prompt, until=("\n",))
        return trace


def test_what_inspect_cannot_say_is_refused(url, folder):
    log = run(edge.task(ROLL, "test", 1, solver=edge.solver(_Stopping())), url, folder)
    assert log.status == "error"
    assert "engine=OpenAIEngine" in log.error.message


def test_problems_without_answers_or_ids_of_their_own_are_refused():
    with pytest.raises(ThriftyError, match="no problems"):
        edge.of_problems([])
    with pytest.raises(ThriftyError, match="1 of 1 problems cannot be graded"):
        edge.of_problems([Problem("a", "?", None)])
    with pytest.raises(ThriftyError, match="share an id"):
        edge.of_problems([Problem("a", "?", "1"), Problem("a", "!", "2")])
