"""Rewards in trl's GRPOTrainer, tasks as data sets: groups come out whole, with one process and with two."""

import doctest
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import groupby

import pytest
import torch
from transformers import TrainerState

import tiny
from thrifty.contracts import Grade, Problem, ThriftyError
from thrifty.edges import datasets
from thrifty.edges.datasets import dataset, of_problems
from thrifty.edges.trl import reward_func
from thrifty.tasks import load
from thrifty.tune.reward.pear import Pear
from thrifty.tune.reward.relative_length import RelativeLength

torch.set_num_threads(1)
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


@dataclass(frozen=True)
class Sums:
    """A task: the answer is what stands behind the chain."""

    name: str = "sums"
    levels: tuple[int, ...] = (1,)

    def problems(self, split, n, seed=0, levels=None):
        return [Problem(f"{split}-{i}", f"{i}+{i}=", str(2 * i), "sums", 1 + i % 2) for i in range(n)]

    def parse(self, response):
        return response or None

    def grade(self, problem, response):
        return Grade(float(response == problem.answer), response)


@dataclass
class Rank:
    """Depends on the whole step and on whole groups: 100 per group before, and the place by tokens within it."""

    seen: list

    def score(self, groups, step):
        self.seen.append((step, groups))
        sums = [[int(trace.ids.sum()) for trace in group.traces] for group in groups]
        return [[100.0 * at + sorted(one).index(value) for value in one] for at, one in enumerate(sums)]


def completions(*texts, template="think", end=True):
    tokenizer = tiny.tokenizer(template)
    ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] * end for text in texts]
    return {"completions": [[{"role": "assistant", "content": text}] for text in texts], "completion_ids": ids}


def asked(problem):
    return [{"role": "user", "content": problem.prompt}]


# ------------------------------------------------------------------------------------------------ data sets


def test_a_task_becomes_rows_that_name_their_problem():
    task = load("roll")
    rows = dataset(task, "train", 6, seed=3, levels=[2])
    problems = task.problems("train", 6, 3, [2])
    assert rows["prompt"] == [asked(problem) for problem in problems]
    for name in ("answer", "level", "id"):
        assert rows[name] == [getattr(problem, name) for problem in problems]
    assert set(rows["level"]) == {2}
    plain = of_problems([Problem("a", "what?", None), Problem("b", "why?", "so")], conversational=False)
    assert plain["prompt"] == ["what?", "why?"]
    assert plain["answer"] == [None, "so"]
    assert plain.features["answer"].dtype == "string"


def test_the_example_is_right():
    assert doctest.testmod(datasets) == (0, 4)


def test_no_problems_and_ids_that_repeat_are_refused():
    with pytest.raises(ThriftyError, match="no problems"):
        of_problems([])
    with pytest.raises(ThriftyError, match="two problems have the id 'a'"):
        of_problems([Problem("a", "1", "1"), Problem("a", "2", "2")])


# -------------------------------------------------------------------------------------------------- rewards


def test_flat_rows_become_groups_graded_by_the_task():
    problems, rank, logged = Sums().problems("train", 3), Rank([]), {}
    score = reward_func(rank, Sums(), problems, tiny.tokenizer())
    state = TrainerState(global_step=7)
    given = completions("<think>a</think>2", "<think>b</think>3", "2", "<think>c", "</think>4", "<think></think>4")
    order = [problems[1]] * 4 + [problems[2]] * 2
    found = score(
        prompts=[asked(p) for p in order], id=[p.id for p in order], level=[p.level for p in order],
        trainer_state=state, log_extra=None, log_metric=logged.__setitem__, **given,
    )  # fmt: skip
    [(step, groups)] = rank.seen
    assert step == 7
    assert [group.problem for group in groups] == [problems[1], problems[2]]
    assert [[grade.right for grade in group.grades] for group in groups] == [[True, False, True, False], [True, True]]
    assert [trace.complete for trace in groups[0].traces] == [True, True, True, False], "a chain is open"
    first = groups[0].traces[0]
    assert (first.thought, first.response, first.answer, first.finish) == ("a", "2", "2", "stop")
    assert [(span.start, span.end, span.kind) for span in first.spans] == [(0, 3, "thought"), (3, 5, "answer")]
    assert found == [value for one in Rank([]).score(groups, 7) for value in one]
    assert max(found) >= 100, "the second group knows that there is a first one"
    assert logged == {"accuracy": pytest.approx(4 / 6), "completion": pytest.approx(5 / 6)}
    assert score.__name__ == "Rank"


def test_an_answer_without_an_end_is_incomplete_and_other_ends_count():
    [problem] = Sums().problems("train", 1)
    given = completions("</think>0", "</think>0 or so", end=False)
    rest = {"prompts": [asked(problem)] * 2, "id": [problem.id] * 2, **given}
    tokenizer = tiny.tokenizer()
    assert reward_func(RelativeLength(), Sums(), [problem], tokenizer)(**rest) == [0.0, -0.5]
    ends = tokenizer.encode("0")
    assert reward_func(RelativeLength(), Sums(), [problem], tokenizer, ends)(**rest) == [1.5, -0.5]


def test_a_chain_that_the_prompt_opened_is_told_from_a_response():
    [problem] = Sums().problems("train", 1)
    score = reward_func(RelativeLength(), Sums(), [problem], tiny.tokenizer("prefilled"))
    given = completions("0", "0", template="prefilled")
    assert score(prompts=[asked(problem)] * 2, id=[problem.id] * 2, **given) == [0.0, 0.0], "still thinking"
    assert score(prompts=[problem.prompt] * 2, id=[problem.id] * 2, **given) == [1.0, 1.0], "no template, no chain"
    assert score(prompts=[problem.prompt + "<think>\n"] * 2, id=[problem.id] * 2, **given) == [0.0, 0.0]


def test_what_trl_does_not_pass_and_rows_of_other_problems_are_refused():
    [problem] = Sums().problems("train", 1)
    with pytest.raises(ThriftyError, match=r"Pear needs entropies.*rollout"):
        reward_func(Pear(), Sums(), [problem], tiny.tokenizer())
    score = reward_func(RelativeLength(), Sums(), [problem], tiny.tokenizer())
    with pytest.raises(ThriftyError, match="no column id"):
        score(prompts=[asked(problem)], **completions("0"))
    with pytest.raises(ThriftyError, match="'other' is none of the 1 problems"):
        score(prompts=[asked(problem)], id=["other"], **completions("0"))


# ---------------------------------------------------------------------------------------------- through trl

TRAIN = """
import json, os, sys
import torch
from accelerate import PartialState
from trl import GRPOConfig, GRPOTrainer
sys.path.insert(0, {tests!r})
import tiny
from test_edges_trl import Rank, Sums, of_problems, reward_func
torch.set_num_threads(1)
problems, calls = Sums().problems("train", 6), []
tokenizer = tiny.tokenizer()
tokenizer.padding_side = "left"
inner = reward_func(Rank([]), Sums(), problems, tokenizer)
def rank(**given):
    rewards = inner(**given)
    calls.append(dict(step=given["trainer_state"].global_step, id=given["id"], ids=given["completion_ids"],
                      rewards=rewards))
    return rewards
args = GRPOConfig(output_dir="out", per_device_train_batch_size={size}, num_generations=2, max_completion_length=5,
                  max_steps=2, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
                  save_strategy="no", disable_tqdm=True)
trainer = GRPOTrainer(tiny.model(len(tokenizer)), rank, args=args, train_dataset=of_problems(problems),
                      processing_class=tokenizer)
trainer.train()
json.dump([calls, trainer.state.log_history], open(f"rank{{PartialState().process_index}}.json", "w"))
"""


def trained(folder, size, *launch):
    """What the reward was given and gave back in each process, and what was logged, over two steps of trl."""
    script = folder / "train.py"
    script.write_text(TRAIN.format(tests=os.path.dirname(__file__), size=size))
    done = subprocess.run(
        [sys.executable, *launch, str(script)], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert not done.returncode, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def check(parts):
    """Rewards of every call are those of the whole step's groups, in the order of processes."""
    calls = list(zip(*(calls for calls, _ in parts)))
    assert [[part["step"] for part in call] for call in calls] == [[step] * len(parts) for step in (0, 1)]
    for call in calls:
        rows = [row for part in call for row in zip(part["id"], part["ids"], part["rewards"])]
        groups = [list(members) for _, members in groupby(rows, lambda row: row[0])]
        assert [len(group) for group in groups] == [2] * 3
        for at, group in enumerate(groups):
            sums = [sum(ids) for _, ids, _ in group]
            assert [reward for *_, reward in group] == [100.0 * at + sorted(sums).index(one) for one in sums]


@pytest.mark.slow
def test_trl_trains_with_it(tmp_path):
    pytest.importorskip("trl")
    parts = trained(tmp_path, 6)
    check(parts)
    [[_, lines]] = parts
    assert {"rewards/rank/mean", "accuracy", "completion"} <= set(lines[0])


@pytest.mark.slow
def test_two_processes_share_groups_that_are_cut_in_two(tmp_path):
    pytest.importorskip("trl")
    # not accelerate launch: with --cpu it starts one process, however many are asked for
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parts = trained(tmp_path, 3, *launch)
    assert len(parts) == 2
    check(parts)
    first, second = (calls[0] for calls, _ in parts)
    assert first["id"][-1] == second["id"][0], "the second group lies in both processes"
