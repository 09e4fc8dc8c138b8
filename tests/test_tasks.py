"""Problems come from where the spec says, splits never share a question, and only equal answers score."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty import tasks
from thrifty.contracts import Problem, ThriftyError
from thrifty.tasks import answers, spec, worker
from thrifty.tasks.files import TableTask

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="{}\\"), max_size=40)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"file:{path}"


def sums(n: int) -> list[dict[str, object]]:
    return [{"question": f"What is {i} + {i * i}?", "answer": str(i + i * i)} for i in range(n)]


# ----------------------------------------------------------------------------------------------- splits


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tasks.Task:
    return tasks.load(write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", sums(400)))


@given(st.lists(st.tuples(st.sampled_from(tasks.SPLITS), st.integers(0, 2**40)), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_question_is_in_two_splits_whatever_the_seeds(many: tasks.Task, draws: list[tuple[str, int]]) -> None:
    home: dict[str, str] = {}
    for split, seed in draws:
        for problem in many.problems(split, 30, seed):
            assert home.setdefault(spec.normalised(problem.prompt), split) == split


@given(st.integers(0, 2**31), st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_reasoning_gym_splits_are_disjoint_where_the_generator_repeats_itself(a: int, b: int) -> None:
    # Sums of two one-digit numbers: a few hundred questions in all, so seeds must collide.
    task = tasks.load("rg:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1")
    of = {split: {p.prompt for p in task.problems(split, 40, seed)} for split in tasks.SPLITS for seed in (a, b)}
    for one in of:
        for other in of:
            assert one == other or not of[one] & of[other]


def test_the_file_is_spread_over_the_splits_by_the_stated_fractions(many: tasks.Task) -> None:
    assert isinstance(many, TableTask)
    assert sum(many.sizes.values()) == 400
    for split, share in spec.FRACTIONS.items():
        assert abs(many.sizes[split] - 400 * share) < 5 * math.sqrt(400 * share)


def test_problems_depend_on_the_seed_but_not_on_the_order_of_the_rows(tmp_path: Path, many: tasks.Task) -> None:
    backwards = tasks.load(write_jsonl(tmp_path / "many.jsonl", sums(400)[::-1]))
    prompts = [
        [p.prompt for p in task.problems("train", 20, seed)] for task, seed in ((many, 0), (backwards, 0), (many, 1))
    ]
    assert prompts[0] == prompts[1] != prompts[2]
    assert [p.id for p in many.problems("train", 20)] == [p.id for p in many.problems("train", 30)][:20]


@given(WORDS)
def test_the_content_key_ignores_spacing_and_case_only(text: str) -> None:
    assert spec.content_key(f"  {text}\n") == spec.content_key(text)
    assert spec.content_key(" ".join(text.split()).upper().lower()) == spec.content_key(
        " ".join(text.split()).upper().lower()
    )
    assert spec.content_key(text + "x") != spec.content_key(text)
    assert spec.content_key("1 23") != spec.content_key("12 3")


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_key_of_ascii_text_is_the_general_one(text: str) -> None:
    import hashlib

    general = spec.normalised(text).encode()
    assert spec.content_digest(text) == (hashlib.blake2b(general, digest_size=8).digest() if general else b"")


def test_problems_are_spread_evenly_over_levels_and_the_rest_comes_from_where_there_is_more(tmp_path: Path) -> None:
    rows = [{**row, "level": f"Level {1 if i < 5 else 2}"} for i, row in enumerate(sums(60))]
    task = tasks.load(write_jsonl(tmp_path / "levels.jsonl", rows) + "?split=test")
    assert task.levels == (1, 2)
    assert [p.level for p in task.problems("test", 8)].count(1) == 4
    assert [p.level for p in task.problems("test", 20)].count(1) == 5
    assert {p.level for p in task.problems("test", 20, levels=[2])} == {2}


# ---------------------------------------------------------------------------------------------- sources


def test_gsm8k_layout_keeps_the_rationale_as_chain_without_calculator_marks(tmp_path: Path) -> None:
    row = {"question": "Apples?", "answer": "She buys 3*4=<<3*4=12>>12 apples.\nSo 12 - 2 = <<12-2=10>>10.\n#### 1,010"}
    [problem] = tasks.load(write_jsonl(tmp_path / "gsm.jsonl", [row]), split="test").problems("test", 5)
    assert problem.answer == "1,010"
    assert problem.meta["chain"] == "She buys 3*4=12 apples.\nSo 12 - 2 = 10."
    task = tasks.load(f"file:{tmp_path / 'gsm.jsonl'}")
    assert task.grade(problem, "So she has $1010.00.").right
    assert not task.grade(problem, "So she has 12.").right


def test_math_layout_reads_the_box_and_keeps_the_level(tmp_path: Path) -> None:
    row = {
        "problem": "Half?",
        "level": "Level 3",
        "solution": r"We get $x$, so \boxed{\frac{\sqrt{3}}{2}}.",
        "type": "Algebra",
    }
    task = tasks.load(write_jsonl(tmp_path / "math.jsonl", [row]), split="test")
    [problem] = task.problems("test", 5)
    assert (problem.answer, problem.level) == (r"\frac{\sqrt{3}}{2}", 3)
    assert problem.meta["chain"].startswith("We get")
    assert task.grade(problem, r"Thus \boxed{\dfrac{\sqrt 3}{2}}").right
    assert task.grade(problem, r"Thus \boxed{\sqrt{3}/2}").right
    assert not task.grade(problem, r"Thus \boxed{\frac{3}{2}}").right


def test_an_answer_column_wins_and_the_solution_beside_it_is_the_chain(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "solution": "One and one is two.", "answer": "2"}
    [problem] = tasks.load(write_jsonl(tmp_path / "m.jsonl", [row]), split="test").problems("test", 1)
    assert (problem.answer, problem.meta["chain"]) == ("2", "One and one is two.")


def test_a_choice_is_shown_with_letters_and_graded_by_letter(tmp_path: Path) -> None:
    rows = [{"question": "Largest?", "choices": ["mouse", "whale", "cat"], "answer": 1}]
    task = tasks.load(write_jsonl(tmp_path / "mmlu.jsonl", rows), split="test")
    [problem] = task.problems("test", 1)
    assert problem.prompt.endswith("\nA. mouse\nB. whale\nC. cat")
    assert problem.answer == "B"
    assert task.grade(problem, "The answer is (B).").right
    assert not task.grade(problem, "The answer is (A).").right


def test_a_chat_log_gives_the_user_s_turn_and_where_asked_the_assistant_s(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    path = write_jsonl(tmp_path / "log.jsonl", [{"messages": chat}])
    [logged] = tasks.load(path, gold=False, split="test").problems("test", 1)
    [graded] = tasks.load(path, answer="messages", split="test").problems("test", 1)
    assert (logged.prompt, logged.answer, graded.prompt, graded.answer) == ("1+1?", None, "1+1?", "2")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path: Path, suffix: str) -> None:
    import csv

    import pyarrow
    from pyarrow import parquet

    rows = [{**row, "question": f'{row["question"]}\nwith "quotes", é and a comma'} for row in sums(50)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    found = tasks.load(f"file:{path}").problems("train", 10)
    assert len(found) == 10
    write_jsonl(tmp_path / "reference.jsonl", rows)
    wanted = tasks.load(f"file:{tmp_path / 'reference.jsonl'}").problems("train", 10)
    assert [(p.prompt, p.answer) for p in found] == [(p.prompt, p.answer) for p in wanted]


def hub_folder(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train.jsonl", sums(100))
    write_jsonl(folder / "data" / "test.jsonl", sums(120)[90:])  # ten questions stand in both
    return folder


def test_a_hub_data_set_keeps_its_test_split_and_its_train_split_gives_the_rest(tmp_path: Path) -> None:
    task = tasks.load(f"hf:{hub_folder(tmp_path / 'set')}")
    of = {split: {p.prompt for p in task.problems(split, 1000)} for split in tasks.SPLITS}
    assert of["test"] == {row["question"] for row in sums(120)[90:]}
    assert of["train"] | of["calibration"] | of["dev"] == {row["question"] for row in sums(90)}
    assert sum(map(len, of.values())) == 120


def test_one_split_of_a_hub_data_set_can_be_chosen(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "set")
    task = tasks.load(f"hf:{folder}", split="train")
    assert len(task.problems("train", 1000)) == 100
    with pytest.raises(ThriftyError, match=r"no split 'validation'.*train, test"):
        tasks.load(f"hf:{folder}?split=validation")


def test_of_several_configurations_main_is_taken_and_others_are_listed(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: {}\n  data_files: a.jsonl\n- config_name: socratic\n  data_files: b.jsonl\n---\n"
    )
    write_jsonl(tmp_path / "a.jsonl", sums(20))
    write_jsonl(tmp_path / "b.jsonl", sums(30))
    (tmp_path / "README.md").write_text(card.format("main"))
    assert len(tasks.load(f"hf:{tmp_path}", split="test").problems("test", 99)) == 20
    assert len(tasks.load(f"hf:{tmp_path}:socratic", split="test").problems("test", 99)) == 30
    (tmp_path / "README.md").write_text(card.format("plain"))
    with pytest.raises(ThriftyError, match=r"several configurations.*plain, socratic"):
        tasks.load(f"hf:{tmp_path}")
    with pytest.raises(ThriftyError, match="no configuration 'scratic'"):
        tasks.load(f"hf:{tmp_path}:scratic")


def test_a_mixture_takes_turns_and_grades_each_by_its_own_task(tmp_path: Path) -> None:
    mixture = tasks.load("roll+rg:chain_sum+" + write_jsonl(tmp_path / "a.jsonl", sums(50)))
    problems = mixture.problems("train", 12)
    assert [p.task.split(":")[0] for p in problems[:3]] == ["roll", "rg", "file"]
    assert all(mixture.grade(p, f"{p.answer}").right for p in problems if p.task != "roll")


def test_n_bounds_what_a_call_gives(tmp_path: Path) -> None:
    task = tasks.load(write_jsonl(tmp_path / "a.jsonl", sums(50)), n=3)
    assert len(task.problems("train", 100)) == 3


def test_problems_are_also_a_hugging_face_dataset(many: tasks.Task) -> None:
    assert isinstance(many, TableTask)
    dataset = many.as_dataset("train", 7)
    assert dataset.num_rows == 7
    assert dataset[0]["question"] == many.problems("train", 7)[0].prompt


def test_names_and_package_import_without_torch_or_reasoning_gym() -> None:
    code = (
        "import sys; from thrifty import tasks; print(tasks.names()); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'reasoning_gym', 'datasets', 'pyarrow', 'math_verify')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "roll" in done.stdout


# -------------------------------------------------------------------------------------------- reasoning-gym


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "mini_sudoku", "countdown", "fraction_simplification"])
def test_the_gold_answer_of_reasoning_gym_is_right_and_another_is_not(name: str) -> None:
    task = tasks.load(f"rg:{name}")
    problems = task.problems("test", 3)
    for problem in problems:
        assert task.grade(
            problem, f"The answer is:\n{problem.answer}" if name != "mini_sudoku" else problem.answer
        ).right
        wrong = task.grade(problem, "The answer is 987654321.")
        assert 0.0 <= wrong.score < 1.0
        assert not task.grade(problem, "").right


def test_reasoning_gym_problems_are_a_function_of_split_and_seed() -> None:
    task = tasks.load("rg:chain_sum", config={"max_terms": 3})
    assert task.problems("dev", 5, 3) == task.problems("dev", 5, 3)
    assert task.problems("dev", 5, 3) != task.problems("dev", 5, 4)


def test_neighbouring_seeds_share_no_reasoning_gym_problems() -> None:
    task = tasks.load("rg:chain_sum?min_digits=4&max_digits=6&min_terms=4")
    assert not {p.prompt for p in task.problems("test", 20, 0)} & {p.prompt for p in task.problems("test", 20, 1)}


# --------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("response", "numeric", "wanted"),
    [
        (r"First \boxed{1}, no: \boxed{\frac{1}{2}}", None, "0.5"),
        (r"\boxed{f(\{1,2\})}", None, r"f(\{1,2\})"),
        (r"cut off: \boxed{12", None, "12"),
        ("3 + 4 = 7\n#### 1,234", True, "1234"),
        ("The answer is 12. I checked 3 ways.", None, "12"),
        ("the final answer is: $42$.", None, "42"),
        ("**Answer:** 42", None, "42"),
        ("Answer: **42**", True, "42"),
        ("Answer:\n\n42", True, "42"),
        ("The answer is 7 apples, of the 12.", True, "7"),
        ("Answer: 3 + 4 = 7", True, "7"),
        ("It costs $1,234.50.", None, "1234.5"),
        ("so 10-5 gives 5", True, "5"),
        ("it falls to -5 degrees", True, "-5"),
        ("We have 3 apples\nso yes.", False, "so yes"),
        ("The answer is New York.", False, "new york"),
        ("<answer>5</answer> or <answer>6</answer>", None, "6"),
        ("The answer is 42.\n\nAnswer:", None, "42"),
        ("I saw 41. Answer:", None, None),
        (r"\boxed{}", None, None),
        ("  \n ", None, None),
        ("", None, None),
        (r"\boxed{50\%}", None, "50"),
        (r"\boxed{\text{yes}}", False, "yes"),
        (r"\boxed{90^\circ}", True, "90"),
        ("Answer: (C)", False, "c"),
        ("the answer is 3.0.", None, "3"),
        ("about 2.5e-3 of it", True, "0.0025"),
        ("so 3 + 4 = 7", None, "7"),
        ("3 + 4 = 7", None, "7"),
        ("(1, -2)", None, "(1, -2)"),
        ("Sum:\n- 42", None, "42"),
        (r"\boxed{11,\! 111}", None, "11111"),
    ],
)
def test_the_final_answer_is_found(response: str, numeric: bool | None, wanted: str | None) -> None:
    assert answers.parse(response, numeric) == wanted


def test_an_answer_of_several_lines_is_taken_whole() -> None:
    grid = "1 2\n3 4"
    for response in (grid, f"Let me see.\nThe answer is:\n{grid}\n", f"<answer>\n{grid}\n</answer>"):
        assert answers.extract(response, numeric=False, block=True) == grid


@given(st.text(max_size=300), st.sampled_from([True, False, None]))
@settings(max_examples=300)
def test_parsing_never_fails_and_never_returns_an_empty_answer(response: str, numeric: bool | None) -> None:
    assert answers.parse(response, numeric) != ""


@given(st.text(alphabet="\\boxed{}#answer is: .\n1/2,-$%*=", max_size=200))
@settings(max_examples=500)
def test_parsing_survives_marks_in_any_order(response: str) -> None:
    found = answers.parse(response)
    assert found is None or answers.normal(found) == found


@given(st.fractions(max_denominator=10**6))
def test_a_number_has_one_spelling_that_reads_back_as_itself(value: Fraction) -> None:
    text = answers.canonical(value)
    assert answers.number(text) == value
    assert answers.normal(text) == text
    assert answers.normal(f"  ${value.numerator}/{value.denominator}$ ") == text


@given(st.integers(-(10**12), 10**12))
def test_separators_signs_and_trailing_zeros_do_not_change_a_number(value: int) -> None:
    for written in (
        f"{value:,}",
        f"{value}.00",
        f"{value}.",
        f"**{value}**",
        f"\\boxed{{{value}}}",
        f"So {value:,} it is",
    ):
        assert answers.parse(written, True) == str(value)


@given(WORDS.filter(lambda text: text.strip(" .*_`$'\"")))
def test_what_stands_in_a_box_is_the_answer(text: str) -> None:
    assert answers.extract(f"thus \\boxed{{ {text} }}. Check: 99", False) == (text.strip() or None)


@pytest.mark.parametrize(
    "evil", ["answer" + " " * 100_000, "{" * 100_000, "\\boxed{" * 20_000, "1," * 100_000, "#" * 99_999]
)
def test_parsing_takes_linear_time(evil: str) -> None:
    start = time.perf_counter()
    answers.parse(evil)
    assert time.perf_counter() - start < 2.0


def test_an_empty_answer_never_wins() -> None:
    for gold, given_answer in (("", ""), (" ", "x"), ("x", ""), ("$$", "$$")):
        assert answers.compare(gold, given_answer).score == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("3", "3.0", True),
        ("1/3", r"\frac{2}{6}", True),
        ("0.5", r"\frac12", True),
        ("1/3", "0.333", False),
        (r"x^2+1", r"1+x^2", True),
        (r"(1,2)", r"(2,1)", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("New York", "new  york.", True),
        ("New York", "York", False),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("Apollo 11", "11", False),
    ],
)
def test_equal_answers_are_equal_and_others_are_not(gold: str, answer: str, right: bool) -> None:
    assert answers.compare(gold, answer).right is right


# ---------------------------------------------------------------------------------------------- worker


def test_a_checker_that_hangs_is_killed_and_the_next_question_is_answered() -> None:
    mine = worker.Worker(seconds=0.5)
    assert mine.ask({"kind": "math", "gold": r"\frac{1}{2}", "answer": "x"}, 60) == {"score": 0.0}
    start = time.perf_counter()
    assert mine.ask({"kind": "sleep", "for": 60}) == {"error": "checker timed out after 0.5 s"}
    assert time.perf_counter() - start < 5
    assert mine.ask({"kind": "math", "gold": r"\sqrt{4}", "answer": "2"}, 60) == {"score": 1.0}
    mine.close()


def test_a_check_that_needs_too_much_memory_or_time_is_not_right_and_does_no_harm() -> None:
    start = time.perf_counter()
    grade = answers.compare(r"9^{9^{9^{9}}}", r"9^{9^{9^{9^{9}}}}")
    assert not grade.right
    assert time.perf_counter() - start < 60


def test_a_worker_that_dies_is_started_again() -> None:
    mine = worker.Worker()
    mine.ask({"kind": "sleep", "for": 0})
    assert mine._process is not None
    mine._process.kill()
    mine._process.wait()
    assert mine.ask({"kind": "sleep", "for": 0}) == {"score": 1.0}
    mine.close()


def test_the_worker_can_be_asked_from_many_threads() -> None:
    mine = worker.Worker(seconds=60)
    replies: dict[int, object] = {}

    def ask(i: int) -> None:
        replies[i] = mine.ask({"kind": "math", "gold": f"{i}^2", "answer": str(i * i if i % 2 else i * i + 1)})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {i: {"score": float(i % 2)} for i in range(2, 10)}
    mine.close()


@pytest.mark.skipif(os.name != "posix", reason="the alarm is POSIX")
def test_a_hanging_worker_ends_by_itself_when_its_parent_was_killed() -> None:
    code = (
        "from thrifty.tasks import worker; w = worker.Worker(seconds=1); w.ask({'kind': 'sleep', 'for': 0}); "
        'w._process.stdin.write(\'{"kind": "sleep", "for": 60, "seconds": 1}\\n\'); w._process.stdin.flush(); '
        "print(w._process.pid, flush=True); import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120)
    pid = int(done.stdout)
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_a_partial_score_of_reasoning_gym_is_kept_below_one() -> None:
    task = tasks.load("rg:chain_sum")
    [problem] = task.problems("test", 1)
    source = problem.meta["source"]
    unknown = Problem(problem.id, problem.prompt, "another gold", problem.task, meta={"source": source})
    grade = task.grade(unknown, f"Answer: {problem.answer}")
    assert grade.score == 1.0  # the data set's own checker decides, not our string
    assert task.grade(problem, "Answer: 123456").score < 1.0
