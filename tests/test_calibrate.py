"""``thrifty calibrate``: which settings efforts get, and its file in the gateway's hands, on the shipped student."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import openai
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_serve import LONG, ROLL, started
from thrifty.cli import app
from thrifty.commands.serve import gateway
from thrifty.contracts import ThriftyError
from thrifty.models.load import load
from thrifty.serve import calibrate, effort
from thrifty.serve.app import build
from thrifty.serve.effort import EFFORTS, Level
from thrifty.traces import store

torch.set_num_threads(1)
SMALL = ("--model", LONG, "--task", "roll", "--n", "5", "--calibration-n", "6")
BUDGETS = ("--thinking-budget", "0", "--thinking-budget", "12", "--thinking-budget", "none")


def thrifty(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    result = thrifty("calibrate", *SMALL, *BUDGETS, "--runs", runs, "--name", "c", "--out", runs / "out.json")
    assert result.exit_code == 0, result.output
    for name in EFFORTS:
        assert name in result.output
    assert f"thrifty serve --calibration {runs / 'out.json'}" in result.output
    return runs / "c"


def test_the_file_says_what_was_measured_on_other_problems(run: Path) -> None:
    found = effort.load(run / "effort.json")
    assert found == effort.load(run.parent / "out.json")
    assert (found.dial, found.n, found.task) == ("thinking_token_budget", 5, "roll")
    assert list(found.levels) == list(EFFORTS)
    rows = list(store.read(run / "traces.parquet"))
    chosen = {row.problem for row in store.read(next((run / "stages").glob("choose-0-*/*.parquet")))}
    assert len(chosen) == 6
    assert not chosen & {row.problem for row in rows}, "chosen on some problems, measured on others"
    for level in found.levels.values():
        mine = [row for row in rows if row.setting == calibrate.name_of(found.dial, level.setting)]
        assert len(mine) == 5
        assert level.accuracy == sum(bool(row.right) for row in mine) / 5
        spent = sum(row.thought_tokens + row.answer_tokens + row.injected_tokens for row in mine)
        assert level.tokens == pytest.approx(spent / 5)
        low, high = level.accuracy_interval or (1, 0)
        assert low <= level.accuracy <= high
        if level.setting is not None:
            assert all(row.thought_tokens <= int(str(level.setting)) for row in mine)
            assert all(row.response for row in mine), "an answer is left room for"
    assert found.levels["none"].tokens <= found.levels["high"].tokens


def test_it_goes_on_where_it_was_stopped(run: Path) -> None:
    before = (run / "effort.json").read_bytes()
    stages = sorted((run / "stages").glob("*/*.parquet"))
    kept = {path: path.stat().st_mtime_ns for path in stages}
    stages[-1].unlink()
    (run / "result.json").unlink()
    again = thrifty("calibrate", *SMALL, *BUDGETS, "--runs", run.parent, "--name", "c", "--out",
                    run.parent / "out.json", "--json")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert (run / "effort.json").read_bytes() == before
    assert all(path.stat().st_mtime_ns == kept[path] for path in stages[:-1]), "what was there is not made again"
    assert json.loads(again.stdout)["format"] == effort.FORMAT
    other = thrifty("calibrate", *SMALL, *BUDGETS[:4], "--runs", run.parent, "--name", "c")
    assert other.exit_code == 2
    assert "another configuration" in other.output


def test_the_gateway_keeps_what_the_file_promises(run: Path) -> None:
    found = effort.load(run / "effort.json")
    made = gateway(LONG, None, name="long", calibration=run / "effort.json")
    with started(build(made)) as one:
        client = openai.OpenAI(base_url=one.url, api_key="none-needed", max_retries=0, timeout=60)
        for name in ("none", "low"):
            reply = client.chat.completions.create(
                model="long", messages=[{"role": "user", "content": ROLL[0].prompt}], reasoning_effort=name
            )
            told = reply.thrifty["effort"]
            level = found.levels[name]
            assert told["asked"] == name
            assert told["setting"] == level.setting
            assert told["calibrated"] == {"accuracy": level.accuracy, "tokens": level.tokens}
            assert reply.choices[0].message.content
            if level.setting is not None:
                assert reply.usage.completion_tokens_details.reasoning_tokens <= int(str(level.setting)) + 3


@pytest.mark.parametrize("dial", ["strength", "strategy"])
def test_the_other_dials_are_turned_too(dial: str, tmp_path: Path) -> None:
    if dial == "strength":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(load(LONG).model, config).save_pretrained(str(tmp_path / "lora"))
        words = ["--adapter", tmp_path / "lora", "--alpha", "0", "--alpha", "4"]
    else:
        words = ["--strategy", "none", "--strategy", "short-1@2"]
    small = ("--model", LONG, "--task", "roll", "--n", "3", "--calibration-n", "3", "--max-tokens", "150")
    result = thrifty("calibrate", *small, *words, "--runs", tmp_path, "--name", "c")
    assert result.exit_code == 0, result.output
    found = effort.load(tmp_path / "c" / "effort.json")
    assert found.dial == dial
    turned = {level.setting for level in found.levels.values()}
    assert turned <= ({0.0, 4.0} if dial == "strength" else {None, "short-1@2"})
    if dial == "strategy":
        dear = list(store.read(next((tmp_path / "c/stages").glob("choose-1-*/*.parquet"))))
        assert len(dear) >= 6, "two samples of each of three problems"


# ------------------------------------------------------------------------------------------- choosing


levels = st.builds(Level, st.integers(0, 9), st.sampled_from([0.2, 0.4, 0.5, 0.6, 0.9]), st.integers(0, 200).map(float))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # cores are shared
@given(st.lists(levels, min_size=2, max_size=8))
def test_dearer_efforts_are_better_and_nothing_beats_what_is_chosen(tried: list[Level]) -> None:
    efforts = calibrate.spread(tried)
    assert list(efforts) == list(EFFORTS)
    chosen = [tried[i] for i in efforts.values()]
    for below, above in pairwise(chosen):
        assert below is above or (below.tokens < above.tokens and below.accuracy < above.accuracy)
    for one in chosen:
        assert not any(
            other.tokens <= one.tokens and other.accuracy >= one.accuracy and other != one
            and (other.tokens, other.accuracy) != (one.tokens, one.accuracy)
            for other in tried
        )  # fmt: skip
    assert chosen[-1].accuracy == max(one.accuracy for one in tried)
    assert chosen[0].tokens == min(one.tokens for one in tried)


def test_efforts_are_even_in_tokens_and_a_bad_middle_is_not_promised(tmp_path: Path) -> None:
    even = [Level(i, 0.1 * i, float(t)) for i, t in enumerate([10, 20, 31, 60, 90, 100, 110])]
    assert calibrate.spread(even) == {"none": 0, "minimal": 2, "low": 3, "medium": 4, "high": 6}
    valve = [Level(a, r, t) for a, r, t in ((0.0, 0.71, 121.0), (0.5, 0.5, 80.0), (1.0, 0.6, 61.0))]
    assert (calibrate.between(even), calibrate.between(valve)) == ("interpolate", "nearest")
    efforts = calibrate.spread(valve)
    made = effort.Calibration(
        "m", "roll", 9, "strength", {name: valve[i] for name, i in efforts.items()}, between="nearest"
    )
    effort.save(made, tmp_path / "e.json")
    known = effort.load(tmp_path / "e.json")
    assert known == made
    assert {known.at(place / 40).setting for place in range(41)} == {0.0, 1.0}, "0.5 is worse than 1 and costs more"
    (tmp_path / "e.json").write_text((tmp_path / "e.json").read_text().replace('"nearest"', '"cubic"'))
    with pytest.raises(ThriftyError, match="between is 'cubic'"):
        effort.load(tmp_path / "e.json")


def test_what_other_problems_do_not_bear_out_is_said() -> None:
    chosen = {"none": Level(0, 0.5, 10.0), "low": Level(1, 0.5, 20.0), "high": Level(1, 0.6, 30.0)}
    assert calibrate.doubts(chosen) == [
        "low costs more tokens than none and was no more accurate on the problems measured"
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no dial is turned"),
        (["--thinking-budget", "3", "--strategy", "none"], "--thinking-budget and --strategy are two dials"),
        (["--alpha", "0", "--alpha", "1"], "--adapter FOLDER belong together"),
        (["--adapter", "x", "--thinking-budget", "3"], "belong together"),
        (["--thinking-budget", "3"], "two settings or more"),
        (["--thinking-budget", "3", "--thinking-budget", "3"], "twice"),
        (["--thinking-budget", "-3", "--thinking-budget", "3"], "whole number"),
        (["--adapter", "x", "--alpha", "nan", "--alpha", "1"], "needs a number"),
        (["--strategy", "none", "--strategy", "short-m-at-q"], "Did you mean 'short-m-at-k'"),
        (["--strategy", "none", "--strategy", "majority@99"], "99 samples"),
        (["--engine", "openai", "--thinking-budget", "3", "--thinking-budget", "9"], "--base-url"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], says: str, tmp_path: Path) -> None:
    result = thrifty("calibrate", "--model", LONG, "--runs", tmp_path, *words)
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output
