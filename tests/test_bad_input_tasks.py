"""Every mistake in a task's name or data is named, with its place and the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thrifty import tasks
from thrifty.contracts import ThriftyError
from thrifty.tasks import answers, gym, tables, worker
from thrifty.tasks.files import TableTask


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"file:{path}"


def line(i: int, **more: object) -> str:
    return json.dumps({"question": f"Question {i}?", "answer": str(i), **more}) + "\n"


def error_of(spec: str, **options: object) -> str:
    with pytest.raises(ThriftyError) as caught:
        tasks.load(spec, **options)  # type: ignore[arg-type]
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("rol", ["'rol'", "Did you mean roll"]),
        ("openai/gsm8k", ["hf:openai/gsm8k"]),
        ("", ["roll", "rg:"]),
        ("gr:chain_sum", ["'gr'", "Did you mean rg"]),
        ("rg:", ["names nothing"]),
        ("file:", ["names nothing"]),
        ("rg:chain_summ", ["chain_summ", "Did you mean chain_sum"]),
        ("rg:chain_sum?min_trms=2", ["min_trms", "Did you mean min_terms", "max_digits"]),
        ("rg:chain_sum?min_terms=9", ["min_terms=9", "max_terms must be"]),
        ("rg:chain_sum?min_terms", ["?key=value"]),
        ("roll+roll", ["twice"]),
    ],
)
def test_a_wrong_name_is_answered_with_what_there_is(spec: str, parts: list[str]) -> None:
    message = error_of(spec)
    for part in parts:
        assert part in message


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    task = tasks.load(write(tmp_path / "a.jsonl", "".join(map(line, range(20)))))
    with pytest.raises(ThriftyError, match="Did you mean train"):
        task.problems("trian", 3)  # type: ignore[arg-type]
    assert "'tests'" in error_of(f"file:{tmp_path / 'a.jsonl'}?split=tests")
    assert "'quesion'" in error_of(f"file:{tmp_path / 'a.jsonl'}?quesion=q")


def test_fewer_than_one_problem_is_refused() -> None:
    assert "1 or more" in error_of("roll", n=0)


# ------------------------------------------------------------------------------------------------ paths


def test_a_wrong_path_is_answered_with_the_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "right.jsonl", line(1))
    message = error_of(f"file:{tmp_path / 'rihgt.jsonl'}")
    assert "does not exist" in message
    assert "right.jsonl" in message


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    write(tmp_path / "inside.csv", "question,answer\n")
    message = error_of(f"file:{tmp_path}")
    assert "directory" in message
    assert "inside.csv" in message


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty.{suffix}"
    assert f"{path} is empty" in error_of(write(path, ""))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_with_nothing_in_it(tmp_path: Path, suffix: str) -> None:
    assert str(tmp_path) in error_of(write(tmp_path / f"blank.{suffix}", "\n \n\n"))


def test_a_csv_with_a_header_only(tmp_path: Path) -> None:
    assert "no rows" in error_of(write(tmp_path / "head.csv", "question,answer\n"))


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"x"), ("a.jsonl.gz", b"\x1f\x8b123"), ("a", b"x")])
def test_other_kinds_of_file(tmp_path: Path, name: str, data: bytes) -> None:
    message = error_of(write(tmp_path / name, data))
    assert "gunzip" in message if name.endswith("gz") else ".parquet" in message


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user who may not read")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", line(1))
    (tmp_path / "a.jsonl").chmod(0)
    assert "permissions" in error_of(spec)


# ------------------------------------------------------------------------------------------------- rows


def test_broken_json_in_row_17_of_many_is_named_and_fast(tmp_path: Path) -> None:
    rows = [line(i) for i in range(1, 100_001)]
    rows[16] = '{"question": "Question 17?", "answer": "17"\n'
    message = error_of(write(tmp_path / "big.jsonl", "".join(rows)))
    assert "row 17 " in message
    assert "delimiter" in message
    rows[16], rows[99_876] = line(17), '{"question": "cut'
    assert "row 99877 " in error_of(write(tmp_path / "big.jsonl", "".join(rows)))


@pytest.mark.parametrize(
    "pair",
    [
        ('{"question": "a", "answer": [1', "2]}"),  # two broken lines that are one object when joined
        ('{"question": "a", "answer": "1"},', '{"question": "b", "answer": "2"}'),
        ('{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}', ""),
    ],
)
def test_lines_are_never_read_as_one(tmp_path: Path, pair: tuple[str, str]) -> None:
    assert "row 2 " in error_of(write(tmp_path / "a.jsonl", line(1) + "\n".join(pair) + "\n" + line(9)))


def test_lines_that_are_valid_only_together_are_found_even_when_their_number_is_right(tmp_path: Path) -> None:
    text = '{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}\n{"question": "c", "answer": [1\n2]}\n'
    assert "row 1 " in error_of(write(tmp_path / "a.jsonl", text))


@pytest.mark.parametrize(
    ("value", "kind"), [("[1, 2]", "a list"), ('"text"', "a text"), ("7", "a number"), ("null", "null")]
)
def test_a_row_that_is_no_object(tmp_path: Path, value: str, kind: str) -> None:
    message = error_of(write(tmp_path / "a.jsonl", line(1) + line(2) + value + "\n" + line(4)))
    assert f"row 3 is {kind}, not an object" in message


def test_blank_lines_count_but_do_no_harm(tmp_path: Path) -> None:
    assert isinstance(task := tasks.load(write(tmp_path / "a.jsonl", line(1) + "\n  \n" + line(4))), TableTask)
    assert sum(task.sizes.values()) == 2
    assert "row 4 " in error_of(write(tmp_path / "b.jsonl", line(1) + "\n\n{broken\n"))


def test_a_json_array_names_the_row(tmp_path: Path) -> None:
    good = [json.loads(line(i)) for i in range(30)]
    text = json.dumps(good, indent=1).replace('"Question 16?",', '"Question 16?"')
    message = error_of(write(tmp_path / "a.json", text))
    assert "row 17" in message
    assert "line" in message
    assert "row 2 is a number" in error_of(write(tmp_path / "b.json", '[{"question": "a", "answer": "b"}, 3]'))
    assert "keys a, b" in error_of(write(tmp_path / "c.json", '{"a": 1,\n "b": 2}'))


def test_json_files_of_lines_and_of_one_list_are_read(tmp_path: Path) -> None:
    for text in (line(1) + line(2), json.dumps({"data": [json.loads(line(1)), json.loads(line(2))]})):
        task = tasks.load(write(tmp_path / "a.json", text), split="test")
        assert {p.answer for p in task.problems("test", 9)} == {"1", "2"}


def test_bytes_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    data = line(1).encode() + '{"question": "Café?", "answer": "1"}\n'.encode("latin1")
    message = error_of(write(tmp_path / "a.jsonl", data))
    assert "row 2 is not UTF-8: byte 0xe9" in message
    assert f"byte {data.index(0xE9)} of the file" in message
    assert "iconv" in message
    data = b"question,answer\nok,1\nCaf\xe9,2\n"
    message = error_of(write(tmp_path / "a.csv", data))
    assert f"line 3 is not UTF-8: byte 0xe9 at byte {data.index(0xE9)}" in message
    assert "not UTF-8" in error_of(write(tmp_path / "a.json", b'[{"question": "Caf\xe9", "answer": "1"}]'))
    assert "UTF-16" in error_of(write(tmp_path / "b.jsonl", line(1).encode("utf-16")))


def test_a_row_of_more_than_10_mb(tmp_path: Path) -> None:
    long = json.dumps({"question": "x" * (tables.MAX_ROW + 10), "answer": "1"}) + "\n"
    assert "row 3 is longer than 10 MB" in error_of(write(tmp_path / "a.jsonl", line(1) + line(2) + long + line(4)))
    assert "row 1 is longer than 10 MB" in error_of(write(tmp_path / "b.jsonl", long.strip()))
    message = error_of(write(tmp_path / "a.csv", "question,answer\n" + "x" * (tables.MAX_ROW + 10) + ",1\n"))
    assert "line 2 is longer than 10 MB" in message


def test_a_row_just_short_of_10_mb_is_read(tmp_path: Path) -> None:
    row = json.dumps({"question": "x" * (tables.MAX_ROW - 100), "answer": "1"}) + "\n"
    task = tasks.load(write(tmp_path / "a.jsonl", line(1) + row), split="test")
    assert len(task.problems("test", 5)) == 2


def test_a_number_too_long_for_python_and_nesting_too_deep_are_named(tmp_path: Path) -> None:
    assert "row 2 " in error_of(
        write(tmp_path / "a.jsonl", line(1) + '{"question": "a", "answer": ' + "9" * 5000 + "}\n")
    )
    assert "row 2 " in error_of(write(tmp_path / "b.jsonl", line(1) + "[" * 100_000 + "\n"))


# ---------------------------------------------------------------------------------------------- columns


def test_a_missing_column_lists_those_found_and_how_to_name_it(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", json.dumps({"text": "1+1?", "result": "2", "id": 7}) + "\n")
    message = error_of(spec)
    assert "no question column" in message
    assert "text, result, id" in message
    assert "?question=COLUMN" in message
    assert "no answer column" in error_of(spec + "?question=text")
    assert "Did you mean result" in error_of(spec, question="text", answer="resutl")
    [problem] = tasks.load(spec + "?question=text&answer=result&split=test").problems("test", 1)
    assert (problem.prompt, problem.answer) == ("1+1?", "2")


def test_without_gold_no_answer_column_is_needed(tmp_path: Path) -> None:
    task = tasks.load(write(tmp_path / "log.jsonl", '{"prompt": "1+1?"}\n'), gold=False, split="test")
    [problem] = task.problems("test", 1)
    assert problem.answer is None
    assert task.parse("so it is 2") == "2"
    assert not task.grade(problem, "2").right


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path: Path) -> None:
    for path, text in ((tmp_path / "a.csv", "question,answer\nq,1\n"), (tmp_path / "a.jsonl", line(1))):
        [problem] = tasks.load(write(path, text.encode("utf-8-sig")), split="test").problems("test", 1)
        assert problem.answer == "1"


def test_csv_mistakes_are_named(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.csv", "question,answer\nq1,1\nwhat, then,2\n"))
    assert "row 2 has 3 fields, the header has 2" in message
    message = error_of(write(tmp_path / "b.csv", 'question,answer\nq1,1\n"open,2\nq3,3\n'))
    assert "row 2 (it begins on line 3)" in message
    assert "quote" in message


def test_two_csv_columns_of_one_name(tmp_path: Path) -> None:
    assert "two columns called 'answer'" in error_of(write(tmp_path / "a.csv", "question,answer,answer\nq,1,2\n"))


def test_csv_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    text = 'Question;Answer;\r\n"a ""b""\r\nc?";1;\r\n\r\nd?;2;\r\n'
    task = tasks.load(write(tmp_path / "a.csv", text), split="test")
    assert {(p.prompt, p.answer) for p in task.problems("test", 5)} == {('a "b"\r\nc?', "1"), ("d?", "2")}


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    assert "not a readable Parquet" in error_of(write(tmp_path / "a.parquet", b"PAR1 this is not one PAR1"))


def test_a_question_that_is_no_text(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.jsonl", line(1) + '{"question": {"a": 1}, "answer": "1"}\n'))
    assert "row 2 is dict, not text" in message


# --------------------------------------------------------------------------------------- usable problems


def test_null_and_blank_questions_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [line(1), '{"question": null, "answer": "2"}\n', '{"question": "  ", "answer": "3"}\n', '{"answer": "4"}\n']
    task = tasks.load(write(tmp_path / "a.jsonl", "".join(rows)))
    assert isinstance(task, TableTask)
    assert sum(task.sizes.values()) == 1
    [note] = task.notes()
    assert note.startswith("3 of 4 rows left out: no question (first: row 2")


def test_duplicate_questions_are_kept_once_with_the_first_answer(tmp_path: Path) -> None:
    rows = '{"question": "A?", "answer": "1"}\n{"question": " a? ", "answer": "2"}\n' + line(3)
    task = tasks.load(write(tmp_path / "a.jsonl", rows), split="test")
    assert isinstance(task, TableTask)
    assert {p.answer for p in task.problems("test", 9)} == {"1", "3"}
    assert task.notes() == ["1 of 3 rows left out: their question was there before"]


def test_no_usable_problem(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "a.jsonl", '{"question": null, "answer": "1"}\n' * 3))
    assert "no usable problem: none of its 3 rows has a question" in message
    message = error_of(
        write(tmp_path / "b.jsonl", '{"question": "a", "answer": null}\n{"question": "b", "answer": " "}\n')
    )
    assert "no usable problem: none of its 2 gold answers can be parsed" in message
    assert "row 1" in message


def test_a_split_without_problems_says_where_they_are(tmp_path: Path) -> None:
    task = tasks.load(write(tmp_path / "a.jsonl", line(1)), split="test")
    with pytest.raises(ThriftyError, match=r"split 'train' .* is empty; its splits hold: .*test 1"):
        task.problems("train", 5)


@pytest.mark.parametrize("bad", ["no mark here", "#### ", "####", "", None, "  "])
def test_a_gold_answer_that_cannot_be_parsed_is_counted_and_never_scored_right(tmp_path: Path, bad: str | None) -> None:
    rows = [{"question": f"q{i}?", "answer": f"so\n#### {i}"} for i in range(9)] + [{"question": "bad?", "answer": bad}]
    task = tasks.load(write(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows)), split="test")
    assert isinstance(task, TableTask)
    assert task.unparsable == 1
    assert "row 10" in task.notes()[0]
    [problem] = [p for p in task.problems("test", 99) if p.prompt == "bad?"]
    assert problem.answer is None
    for response in ("", "here", str(bad), "#### 0", "None", r"\boxed{}"):
        grade = task.grade(problem, response)
        assert grade.score == 0.0
        assert "gold answer cannot be parsed" in grade.message


def test_an_open_box_in_a_gold_solution_is_counted(tmp_path: Path) -> None:
    rows = [{"problem": f"q{i}", "solution": r"so \boxed{" + str(i) + "}"} for i in range(5)]
    rows += [{"problem": "open", "solution": r"so \boxed{3"}, {"problem": "none", "solution": "so 3"}]
    task = tasks.load(write(tmp_path / "a.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))
    assert isinstance(task, TableTask)
    assert task.unparsable == 2


def test_a_formula_that_cannot_be_parsed_is_never_right() -> None:
    for gold, answer in ((r"\frac{", r"\frac{x"), (r"\sqrt{2}", r"\begin{"), (r"\undefined{x}", r"\frac{}{}")):
        grade = answers.compare(gold, answer)
        assert not grade.right
        assert grade.message


def test_a_checker_that_hangs_scores_zero_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real process hangs in a real check; only the wait is shortened, and the hang is asked for.
    mine = worker.Worker(seconds=1.0)
    monkeypatch.setattr(worker, "_shared", mine)
    monkeypatch.setattr(worker, "ask", lambda question: mine.ask({"kind": "sleep", "for": 60}))
    grade = answers.compare(r"\sqrt{2}", r"2^{1/2}")
    assert (grade.score, grade.parsed, grade.message) == (0.0, r"2^{1/2}", "checker timed out after 1 s")
    mine.close()


def test_half_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    text = '{"question": "smile \\ud83d?", "answer": "\\ud83d"}\n' + line(1)
    task = tasks.load(write(tmp_path / "a.jsonl", text), split="test")
    for problem in task.problems("test", 5):
        assert f"{problem.prompt}{problem.answer}".encode()


def test_a_file_that_changes_under_us(tmp_path: Path) -> None:
    task = tasks.load(write(tmp_path / "a.jsonl", "".join(map(line, range(50)))))
    write(tmp_path / "a.jsonl", line(1))
    with pytest.raises(ThriftyError, match="changed while"):
        task.problems("train", 5)


# -------------------------------------------------------------------------------------------------- hub


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    # A fresh process: the client reads its settings at import. Nothing listens on port 9 of this machine.
    code = "from thrifty import tasks\ntry: tasks.load('hf:openai/gsm8k')\nexcept tasks.ThriftyError as e: print(e)"
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.casefold() and name[:3] != "HF_"}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert "hf:openai/gsm8k is not on this machine and the hub cannot be reached" in done.stdout, done.stderr
    assert "--local-dir" in done.stdout
    assert "Retrying" not in done.stderr


def test_hub_folders_that_are_none(tmp_path: Path) -> None:
    assert "no such folder" in error_of(f"hf:{tmp_path / 'nope'}")
    write(tmp_path / "a.jsonl", line(1))
    assert "Load it as file:" in error_of(f"hf:{tmp_path / 'a.jsonl'}")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in error_of(f"hf:{tmp_path / 'empty'}")


def test_a_hub_folder_without_the_columns(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", json.dumps({"text": "x", "tag": "y"}) + "\n")
    assert "Columns found: text, tag" in error_of(f"hf:{tmp_path / 'set'}")


# ---------------------------------------------------------------------------------------- reasoning-gym


def test_settings_in_a_spec_keep_their_types() -> None:
    assert [gym.typed(v) for v in ("4", "0.5", "true", "(1, 2)", "abc")] == [4, 0.5, True, (1, 2), "abc"]


def test_an_answerless_or_foreign_problem_is_refused_with_a_reason(tmp_path: Path) -> None:
    task = tasks.load("rg:chain_sum")
    foreign = tasks.load(write(tmp_path / "a.jsonl", line(1)), split="test").problems("test", 1)[0]
    with pytest.raises(ThriftyError, match="not made by rg:chain_sum"):
        task.grade(foreign, "1")


# ------------------------------------------------------------------------------------------------- fuzz

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["question", "answer", "choices", "level", "solution", "prompt", "x"])


def use(spec: str) -> None:
    """Load and use a task as a run does; only a ``ThriftyError`` may come out."""
    try:
        task = tasks.load(spec, split="test")
    except ThriftyError:
        return
    for problem in task.problems("test", 3):
        problem.prompt.encode()
        assert problem.prompt.strip()
        assert not task.grade(problem, "").right
        assert problem.answer is None or problem.answer.strip()
        if problem.answer is None:
            assert not task.grade(problem, "None").right


ROWS = st.fixed_dictionaries({"question": st.text(max_size=5) | VALUES, "answer": VALUES}) | st.dictionaries(
    NAMES, VALUES
)


@given(st.lists(ROWS, max_size=6), st.sampled_from(["jsonl", "json"]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_are_used_or_refused_with_a_reason(tmp_path: Path, rows: list[dict[str, object]], suffix: str) -> None:
    text = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    use(write(tmp_path / f"fuzz.{suffix}", text))


@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_used_or_refused_with_a_reason(tmp_path: Path, data: bytes, suffix: str) -> None:
    use(write(tmp_path / f"fuzz.{suffix}", data))


@given(st.text(alphabet='question,answer;"\n\r\t \ufeffé1', max_size=120))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_csv_is_used_or_refused_with_a_reason(tmp_path: Path, text: str) -> None:
    use(write(tmp_path / "fuzz.csv", "question,answer\n" + text))
