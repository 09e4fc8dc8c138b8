"""``thrifty traces``: what is counted, kept, refused and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.cli import app
from thrifty.traces import shards
from thrifty.traces.store import TraceRow, read, write

ROW = TraceRow(
    "α = 0", 0.0, "roll/1", "roll", 1, "roll 1 .", "4", 0, True, "2 + 2 .", " 4", "4", True, True, "stop",
    9, 0, 5, 2, 0, 0.1,
)  # fmt: skip


def row(**changes: object) -> TraceRow:
    return dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]


def many(n: int) -> list[TraceRow]:
    """Rows of two settings and four levels; one in three is wrong, one in ten ran out of length."""
    return [
        row(
            setting=f"α = {i % 2}", problem=f"roll/{i // 2}", level=1 + i % 4, right=i % 3 > 0, thought=f"{i} .",
            finish="length" if i % 10 == 0 else "stop", thought_tokens=i % 7,
        )
        for i in range(n)
    ]  # fmt: skip


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["traces", *map(str, words)])


def told(*words: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(run(*words, "--json").output)
    return found


def test_a_folder_is_counted_by_setting(tmp_path: Path) -> None:
    rows = many(200)
    write(tmp_path / "a.parquet", rows[:120])
    write(tmp_path / "b.parquet", rows[120:])
    (tmp_path / "stages").mkdir()
    write(tmp_path / "stages" / "part.parquet", rows)
    found = told(tmp_path)
    assert (found["read"], found["kept"], found["faults"]) == (200, 200, {})
    for one in found["settings"]:  # type: ignore[attr-defined]
        mine = [r for r in rows if r.setting == one["setting"]]
        assert one["traces"] == len(mine)
        assert one["right"] == pytest.approx(sum(bool(r.right) for r in mine) / len(mine))
        assert one["complete"] == pytest.approx(sum(r.finish == "stop" for r in mine) / len(mine))
        assert one["thought_tokens"] == pytest.approx(sum(r.thought_tokens for r in mine) / len(mine))


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--keep", "right"], lambda r: r.right),
        (["--keep", "wrong", "--keep", "complete"], lambda r: not r.right and r.finish == "stop"),
        (["--keep", "incomplete"], lambda r: r.finish == "length"),
        (["--setting", "α = 1", "--level", "2", "--level", "4"], lambda r: r.setting == "α = 1" and r.level in (2, 4)),
        (["--task", "list"], lambda r: False),
        (["--longest", "3"], lambda r: r.thought_tokens <= 3),
    ],
)
def test_what_is_kept_is_written(tmp_path: Path, words: list[str], kept: object) -> None:
    rows = many(150)
    write(tmp_path / "a.parquet", rows)
    assert run(tmp_path / "a.parquet", *words, "--to", tmp_path / "b.parquet").exit_code == 0
    assert list(read(tmp_path / "b.parquet")) == [r for r in rows if kept(r)]  # type: ignore[operator]


def test_an_ungraded_trace_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row(right=None)])
    assert [told(tmp_path / "a.parquet", "--keep", k)["kept"] for k in ("right", "wrong")] == [0, 0]
    assert told(tmp_path / "a.parquet")["settings"][0]["right"] is None  # type: ignore[index]


def test_messages_are_what_trl_takes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "a.parquet", many(5))
    for name in ("m.jsonl", "m.parquet"):
        out = tmp_path / name
        assert run(tmp_path / "a.parquet", "--to", out, "--messages").exit_code == 0
        kind = "json" if name.endswith("jsonl") else "parquet"
        found = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
        assert found[3]["messages"] == [
            {"role": "user", "content": "roll 1 ."},
            {"role": "assistant", "content": "<think>3 .</think> 4"},
        ]


def test_twice_the_same_chain_is_kept_once(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row(sample=0), row(sample=1), row(sample=2, thought="other")])
    run(tmp_path / "a.parquet", "--unique", "--to", tmp_path / "b.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [r["sample"] for r in kept] == [0, 2]


def test_a_share_is_drawn_by_what_a_trace_is(tmp_path: Path) -> None:
    rows = many(2000)
    write(tmp_path / "a.parquet", rows)
    write(tmp_path / "b.parquet", rows[::-1])

    def drawn(name: str, *words: str) -> set[str]:
        run(tmp_path / name, "--sample", "0.1", *words, "--to", tmp_path / "out.parquet")
        return {f"{r.setting}/{r.problem}" for r in read(tmp_path / "out.parquet")}

    assert drawn("a.parquet") == drawn("b.parquet") != drawn("a.parquet", "--seed", "1")
    assert 150 <= len(drawn("a.parquet")) <= 250


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"thought_tokens": -1}, "thought_tokens is negative"),
        ({"finish": "done"}, "finish is none of"),
        ({"ids": [1, 2]}, "fewer token ids than tokens counted"),
        ({}, "setting, problem and sample stand there already"),
    ],
)
def test_wrong_rows_are_named_and_nothing_is_written(tmp_path: Path, bad: dict[str, object], says: str) -> None:
    write(tmp_path / "a.parquet", [*many(40), row(problem="roll/x"), row(problem="roll/x" if not bad else "y", **bad)])
    looked = run(tmp_path / "a.parquet")
    assert looked.exit_code == 1
    assert f"a.parquet, row 42: {says}" in looked.output
    kept = run(tmp_path / "a.parquet", "--to", tmp_path / "b.parquet")
    assert kept.exit_code != 0
    assert says in kept.output
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_bad_input_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "empty.parquet").write_bytes(b"")
    write(tmp_path / "a.parquet", many(3))
    for words, says in (
        (["nowhere.parquet"], "nowhere.parquet: no such trace file"),
        ([tmp_path / "folder"], "no Parquet file in this folder"),
        ([tmp_path / "broken.parquet"], "broken.parquet: no Parquet file that can be read"),
        ([tmp_path / "empty.parquet"], "empty.parquet: no Parquet file that can be read"),
        ([tmp_path / "a.parquet", "--to", tmp_path / "a.parquet"], "is read from"),
        ([tmp_path / "a.parquet", "--to", tmp_path / "a.csv"], "must end in .parquet or .jsonl"),
        ([tmp_path / "a.parquet", "--sample", "2"], "above 0, at most 1"),
        ([tmp_path / "a.parquet", "--messages"], "--to FILE"),
        ([tmp_path / "a.parquet", "--messages", "--to", tmp_path / "b.jsonl", "--tags", "<t>"], "one comma"),
    ):
        result = run(*words)
        assert result.exit_code == 2, words
        assert says in result.output


@settings(deadline=None)  # files take what they take
@given(st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=1, max_size=20))
def test_any_text_survives(texts: Sequence[tuple[str, str, str]]) -> None:
    import tempfile

    rows = [row(sample=i, prompt=p, thought=t, response=r) for i, (p, t, r) in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "a.parquet", rows)
        shards.write(Path(folder) / "b.jsonl", shards.stream([Path(folder) / "a.parquet"]))
        lines = (Path(folder) / "b.jsonl").read_text("utf-8").split("\n")[:-1]
    assert [(r["prompt"], r["thought"], r["response"]) for r in map(json.loads, lines)] == list(texts)
