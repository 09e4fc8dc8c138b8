"""The meter: what the hook sees is what the traces say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny
from test_engine import Force
from thrifty.contracts import Sample, Score, Scores, Trace
from thrifty.engines.local import LocalEngine
from thrifty.engines.meter import Meter, active_parameters, scope

torch.set_num_threads(1)
LOADED = tiny.loaded()
SAMPLES = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["x", "2 + 2", "a prompt that is rather longer than the rest"]),
        "prefix": st.sampled_from([(), (70, 71, 72), tuple(range(60, 80))]),
        "inject": st.sampled_from(["", "so", "</think>"]),
        "until": st.sampled_from([(), ("e", "t"), ("\n",)]),
        "max_tokens": st.integers(0, 20),
        "temperature": st.sampled_from([0.0, 1.0]),
        "controls": st.sampled_from([(), (Force(2, "ab"),), (Force(1, "abc", stop=3),), (Force(stop=0),)]),
    }
)
LIMITS = st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 12)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(SAMPLES, LIMITS), min_size=1, max_size=9),
    st.lists(st.lists(st.sampled_from(["", "yes", "a longer continuation"]), max_size=3), max_size=2),
    st.integers(1, 5),
    st.sampled_from([0, 20_000, 1 << 28]),
)
def test_tokens_in_traces_are_positions_seen_less_reading_and_padding(
    rows: list[Any], scores: list[list[str]], size: int, kept: int
) -> None:
    engine = LocalEngine(LOADED, batch_size=size, prefix_bytes=kept)
    for ticket, (fields, _) in enumerate(rows):
        engine.submit(ticket, Sample(**fields), (ticket,))
    for i, texts in enumerate(scores):
        engine.submit(1000 + i, Score("2 + 2", tuple(texts)), (i,))
    limits = {ticket: limit for ticket, (_, limit) in enumerate(rows) if limit is not None}
    answers: dict[int, Any] = {}
    polls = 0
    while True:
        for ticket in [t for t, (when, _) in limits.items() if when == polls and t not in answers]:
            engine.limit(ticket, limits[ticket][1])
        polls += 1
        answers.update(engine.poll())
        if not engine.busy:
            break
    assert len(answers) == len(rows) + len(scores)
    traces = [a for a in answers.values() if isinstance(a, Trace)]
    scored = [a for a in answers.values() if isinstance(a, Scores)]
    total = engine.meter.total()
    # A request's injected text is read with its prompt; what is left was made one position at a time.
    read_in = sum(
        len(LOADED.tokenizer.encode(rows[t][0]["inject"])) for t, a in answers.items() if t < 1000 and a.usage.calls
    )
    made = sum(trace.usage.generated for trace in traces) - read_in
    assert made == total.positions - total.padding - total.prefill
    assert total.thought + total.answer + total.injected == made + read_in
    usages = [answer.usage for answer in [*traces, *scored]]
    for name in ("prompt", "cached", "thought", "answer", "injected", "discarded", "calls"):
        assert getattr(total, name) == sum(getattr(usage, name) for usage in usages)
    for trace in traces:
        assert trace.usage.generated == (len(trace.ids) - trace.start if trace.usage.calls else 0)
        assert sum(span.end - span.start for span in trace.spans) == len(trace.ids) - trace.start
        injected = sum(span.end - span.start for span in trace.spans if span.origin == "injected")
        assert injected == trace.usage.injected or not trace.usage.calls
    assert engine.poll() == []


def test_rows_are_kept_by_phase_and_role() -> None:
    model, meter = tiny.model(262).train(), Meter()
    meter.watch(model, "student")
    meter.watch(model, "student")
    ids = torch.zeros(2, 5, dtype=torch.long)
    with scope(phase="train", padding=3):
        model(input_ids=ids)
        model(inputs_embeds=torch.zeros(1, 4, 32))
        with torch.no_grad():
            model(ids)
    with scope(phase="fit"), scope(role="judge", prefill=10):
        model(input_ids=ids)
    rows = meter.rows()
    assert set(rows) == {("train", "student"), ("fit", "judge")}
    train = rows["train", "student"]
    assert (train.forwards, train.positions, train.padding, train.backward) == (3, 24, 9, 14)
    size = active_parameters(model)
    assert train.flops == 2 * size * (24 + 2 * 14)
    assert rows["fit", "judge"].prefill == 10
    assert meter.total().positions == 34
    meter.forget(model)
    model(input_ids=ids)
    assert meter.total().positions == 34


def test_a_peft_wrapper_and_its_model_count_once() -> None:
    model, meter = tiny.model(262), Meter()
    meter.watch(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    meter.watch(wrapped)
    wrapped(input_ids=torch.zeros(1, 7, dtype=torch.long))
    assert meter.total().positions == 7


def test_an_engine_inside_a_scope_counts_for_its_phase() -> None:
    engine = LocalEngine(LOADED)
    with scope(phase="train"):
        engine.submit(0, Sample("x", max_tokens=3, temperature=1.0), (0,))
        engine.poll()
    assert set(engine.meter.rows()) == {("train", "main")}
    assert engine.meter.total().backward == 0


def test_two_engines_on_one_meter_count_every_forward_once() -> None:
    meter = Meter()
    ask = Sample("2 + 2", max_tokens=6, temperature=1.0)
    one = replace(LOADED, eos=frozenset())
    for engine in (LocalEngine(one, meter=meter), LocalEngine(one, meter=meter)):
        engine.submit(0, ask, (0,))
        engine.poll()
    length = len(LOADED.chat.prompt_ids("2 + 2"))
    assert meter.total().positions == 2 * (length - 1 + 6)


def test_active_parameters_leave_out_idle_experts_and_look_up_tables() -> None:
    tied, loose = tiny.model(262, tie_word_embeddings=True), tiny.model(262)
    assert active_parameters(tied) == active_parameters(loose) == tied.num_parameters()
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    experts = 2 * 8 * 3 * 16 * 8
    assert active_parameters(model) == model.num_parameters() - 64 * 16 - experts * 3 // 4


@pytest.mark.parametrize("size", [1, 4])
def test_no_forward_carries_a_dead_row(size: int) -> None:
    engine = LocalEngine(replace(LOADED, eos=frozenset()), batch_size=size)
    for ticket in range(6):
        engine.submit(ticket, Sample("x", max_tokens=1 + 5 * ticket, temperature=1.0), (ticket,))
    while engine.busy:
        engine.poll()
    total = engine.meter.total()
    assert total.padding == 0
    assert total.positions - total.prefill == sum(1 + 5 * ticket for ticket in range(6))
