"""The local engine: the same tokens as plain decoding, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

import tiny
from asked import plain, run
from thrifty.contracts import END_OF_THOUGHT, Problem, RowFailed, Sample, Score, Scores, ThriftyError, Trace
from thrifty.engines.local import LocalEngine
from thrifty.engines.runner import Runner
from thrifty.models.load import Loaded, wrap
from thrifty.solve.search._vote import thinking_length
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.solve.search.trimr import TrimR

torch.set_num_threads(1)  # two cores are shared by everything that runs
PROMPTS = ["2 + 2", "a much longer prompt than the others, to make rows of unlike length", "x", "the same", "the same"]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny.loaded()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_greedy_decoding_equals_generate(kind: str, size: int) -> None:
    one = tiny.loaded(kind)
    traces = run(LocalEngine(one, batch_size=size), [Sample(p, temperature=0.0, max_tokens=24) for p in PROMPTS])
    for prompt, trace in zip(PROMPTS, traces):
        assert trace.ids.tolist() == plain(one, prompt, 24)
        assert trace.finish == ("stop" if trace.ids[-1] in one.eos else "length")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"head_dim": 8, "num_key_value_heads": 4},
        {"attn_implementation": "eager"},
    ],
    ids=["mixed sliding window", "another head dimension", "eager attention"],
)
def test_greedy_decoding_equals_generate_on_other_shapes(changes: dict[str, Any]) -> None:
    one = tiny.loaded(**changes)
    traces = run(LocalEngine(one, batch_size=4), [Sample(p, temperature=0.0, max_tokens=16) for p in PROMPTS])
    assert [trace.ids.tolist() for trace in traces] == [plain(one, p, 16) for p in PROMPTS]


def test_a_soft_capped_model_with_alternating_windows_equals_generate() -> None:
    torch.manual_seed(0)
    fast = tiny.tokenizer()
    config = Gemma2Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=5, max_position_embeddings=128, initializer_range=0.2,
        eos_token_id=None, bos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    one = wrap(Gemma2ForCausalLM(config).eval(), fast)
    traces = run(LocalEngine(one, batch_size=4), [Sample(p, temperature=0.0, max_tokens=12) for p in PROMPTS])
    assert [trace.ids.tolist() for trace in traces] == [plain(one, p, 12) for p in PROMPTS]


def test_a_model_without_a_plain_cache_is_refused() -> None:
    fast = tiny.tokenizer()
    model = MambaForCausalLM(MambaConfig(vocab_size=len(fast), hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ThriftyError, match="MambaForCausalLM"):
        LocalEngine(wrap(model, fast))


def mixed_requests() -> list[Sample]:
    shapes = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 0.0},
        {"temperature": 1.3, "want": frozenset({"logprobs", "entropies"})},
        {"temperature": 1.0, "inject": "so ", "until": ("e",)},
    ]
    return [
        Sample(prompt, max_tokens=5 + 13 * (i % 4), **shapes[i % len(shapes)])  # type: ignore[arg-type]
        for i, prompt in enumerate(PROMPTS * 4)
    ]


@pytest.mark.parametrize("size", [3, 64])
def test_results_do_not_depend_on_the_batch(loaded: Loaded, size: int) -> None:
    alone = run(LocalEngine(loaded, batch_size=1, prefix_bytes=0), mixed_requests())
    together = run(LocalEngine(loaded, batch_size=size), mixed_requests())
    for one, other in zip(alone, together):
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.finish, one.thought, one.response, one.spans) == (
            other.finish, other.thought, other.response, other.spans,
        )  # fmt: skip
    assert len({tuple(trace.ids) for trace in alone}) > 15


def test_the_seed_and_the_key_make_the_stream(loaded: Loaded) -> None:
    def ids(seed: int, keys: list[Any]) -> list[list[int]]:
        requests = [Sample("2 + 2", max_tokens=20, temperature=1.0)] * len(keys)
        return [t.ids.tolist() for t in run(LocalEngine(loaded, seed=seed), requests, keys)]

    first, again, other = ids(0, [("a", 0), ("a", 0), ("a", 1)])
    assert first == again
    assert first != other
    assert ids(1, [("a", 0)]) != [first]


@pytest.mark.parametrize("cut", [1, 7, 63, 64, 70])
def test_a_continuation_equals_the_uninterrupted_run_and_reads_nothing_again(loaded: Loaded, cut: int) -> None:
    ask = Sample("2 + 2", temperature=1.0, max_tokens=90)
    endless = replace(loaded, eos=frozenset())
    [whole] = run(LocalEngine(endless), [ask])
    engine = LocalEngine(endless)
    [head] = run(engine, [replace(ask, max_tokens=cut)])
    [rest] = run(engine, [replace(ask, prefix=head.ids, max_tokens=90 - cut)])
    assert rest.ids.tolist() == whole.ids.tolist()
    assert rest.start == cut
    assert (rest.usage.prompt, rest.usage.cached) == (1, len(loaded.chat.prompt_ids("2 + 2")) + cut - 1)
    [anew] = run(LocalEngine(endless, prefix_bytes=0), [replace(ask, prefix=head.ids, max_tokens=90 - cut)])
    assert anew.ids.tolist() == whole.ids.tolist()
    assert anew.usage.cached == 0


def test_rewinding_reuses_the_common_part_of_another_response(loaded: Loaded) -> None:
    engine = LocalEngine(replace(loaded, eos=frozenset()))
    [first] = run(engine, [Sample("2 + 2", temperature=1.0, max_tokens=40)])
    fork = [*first.ids[:20].tolist(), int(first.ids[20]) ^ 1, 5]
    ask = Sample("2 + 2", temperature=0.0, max_tokens=10, prefix=fork)
    [again] = run(engine, [ask])
    [clean] = run(LocalEngine(replace(loaded, eos=frozenset()), prefix_bytes=0), [ask])
    assert again.ids.tolist() == clean.ids.tolist()
    assert again.usage.cached == len(loaded.chat.prompt_ids("2 + 2")) + 20


def test_rows_of_one_prompt_share_one_reading(loaded: Loaded) -> None:
    engine = LocalEngine(loaded)
    run(engine, [Sample("a prompt of some length", temperature=1.0, max_tokens=4)] * 8)
    length = len(loaded.chat.prompt_ids("a prompt of some length"))
    assert engine.meter.total().prefill == length - 1
    assert engine.meter.total().prompt == length + 7
    assert engine.meter.total().cached == 7 * (length - 1)


def test_the_prefix_cache_stays_within_its_bytes(loaded: Loaded) -> None:
    engine = LocalEngine(loaded, prefix_bytes=60_000)
    prefixes = engine.batches["main"].reader.prefixes
    for i in range(20):
        run(engine, [Sample(f"prompt number {i}", temperature=1.0, max_tokens=20)])
        assert 0 < prefixes.bytes <= 60_000
        assert prefixes.bytes == sum(kept.bytes for kept in prefixes._kept.values())
    assert len(prefixes) < 20


def test_stop_strings_end_a_row_and_stay_in_it(loaded: Loaded) -> None:
    endless = replace(loaded, eos=frozenset())
    [free] = run(LocalEngine(endless), [Sample("2 + 2", temperature=1.0, max_tokens=60)])
    text = loaded.tokenizer.decode(free.ids)
    stop = next(text[i : i + 2] for i in range(10, 50) if text[i : i + 2].isascii())
    [cut] = run(LocalEngine(endless), [Sample("2 + 2", temperature=1.0, max_tokens=60, until=("never seen", stop))])
    assert cut.finish == "until"
    assert loaded.tokenizer.decode(cut.ids).endswith(stop)
    assert stop not in loaded.tokenizer.decode(cut.ids)[:-1]
    # A prefix that ends in the stop string does not end the row at once.
    [on] = run(
        LocalEngine(endless), [Sample("2 + 2", temperature=1.0, max_tokens=60, prefix=cut.ids, until=("never seen",))]
    )
    assert (
        on.ids.tolist()
        == run(LocalEngine(endless), [Sample("2 + 2", temperature=1.0, max_tokens=60 + len(cut.ids))])[0].ids.tolist()
    )


def test_injected_text_closes_a_chain(loaded: Loaded) -> None:
    endless = replace(loaded, eos=frozenset())
    head = LocalEngine(endless).encode("<think>some thought")
    [trace] = run(
        LocalEngine(endless),
        [Sample("2 + 2", temperature=0.0, prefix=head, inject=f"hm{END_OF_THOUGHT}", max_tokens=9)],
    )
    assert trace.closed
    assert trace.thought == "some thoughthm"
    assert trace.start == len(head)
    assert trace.usage.injected == 3
    assert (trace.usage.thought, trace.usage.answer) == (0, 6)
    assert [(s.start - trace.start, s.end - trace.start, s.kind, s.origin) for s in trace.spans] == [
        (0, 3, "thought", "injected"), (3, 9, "answer", "sampled"),
    ]  # fmt: skip
    [until] = run(
        LocalEngine(endless, temperature=0.0),
        [Sample("2 + 2", controls=(Force(at=4, text="</think>"),), until=(END_OF_THOUGHT,), max_tokens=30)],
    )
    assert (until.finish, until.closed, len(until.ids)) == ("until", True, 5)


def test_limit_ends_rows_where_it_says(loaded: Loaded) -> None:
    engine = LocalEngine(replace(loaded, eos=frozenset()), batch_size=2)
    ask = Sample("2 + 2", temperature=1.0, max_tokens=40)
    for ticket in range(5):
        engine.submit(ticket, replace(ask, max_tokens=3) if ticket == 0 else ask, (ticket,))
    answers = dict(engine.poll())
    assert list(answers) == [0]
    engine.limit(1, 2)  # has three already
    engine.limit(2, 7)
    engine.limit(3, 0)  # still waiting
    while engine.busy:
        answers.update(engine.poll())
    assert [answers[i].finish for i in range(5)] == ["length", "cancelled", "cancelled", "cancelled", "length"]
    assert [len(answers[i].ids) for i in range(5)] == [3, 3, 7, 0, 40]
    assert answers[3].usage.generated == answers[3].usage.prompt == answers[3].usage.calls == 0
    free = run(LocalEngine(replace(loaded, eos=frozenset())), [ask] * 5)
    assert answers[2].ids.tolist() == free[2].ids[:7].tolist()
    assert answers[2].usage.discarded == 7


def test_logprobs_and_entropies_equal_a_plain_forward(loaded: Loaded) -> None:
    want = frozenset({"logprobs", "entropies"})
    [trace] = run(LocalEngine(loaded), [Sample("2 + 2", temperature=1.0, max_tokens=12, want=want, inject="so")])
    ids = torch.tensor([[*loaded.chat.prompt_ids("2 + 2"), *trace.ids.tolist()]])
    with torch.no_grad():
        chances = loaded.model(ids).logits[0].log_softmax(-1)
    at = torch.arange(ids.shape[1] - len(trace.ids) - 1, ids.shape[1] - 1)
    expected = chances[at, ids[0, at + 1]]
    assert trace.logprobs is not None
    assert trace.entropies is not None
    assert np.isnan(trace.logprobs[:2]).all()
    np.testing.assert_allclose(trace.logprobs[2:], expected[2:], rtol=1e-4, atol=1e-4)
    entropy = -(chances.exp() * chances).sum(-1)[at]
    np.testing.assert_allclose(trace.entropies[2:], entropy[2:], rtol=1e-4, atol=1e-4)


def test_scores_equal_a_plain_forward(loaded: Loaded) -> None:
    engine = LocalEngine(loaded)
    prefix = engine.encode("because")
    texts = ("yes", "no, not at all", "", "y")
    scores: list[Scores] = run(
        engine, [Score("2 + 2", texts, prefix), Score("2 + 2", ("yes",), prefix), Score("x", ("yes",))]
    )
    total = engine.meter.total()
    assert total.prefill == total.positions - total.padding == sum(s.usage.prompt for s in scores)
    head = loaded.chat.prompt_ids("2 + 2")
    for text, value in zip(texts, scores[0].values):
        ids = torch.tensor([[*head, *prefix, *engine.encode(text)]])
        with torch.no_grad():
            chances = loaded.model(ids).logits[0].log_softmax(-1)
        at = torch.arange(len(head) + len(prefix) - 1, ids.shape[1] - 1)
        assert value == pytest.approx(float(chances[at, ids[0, at + 1]].sum()), rel=1e-4, abs=1e-4)
    assert scores[1].values == pytest.approx(scores[0].values[:1], rel=1e-4)
    assert scores[2].values != pytest.approx(scores[0].values[:1], rel=1e-2)


def test_a_score_amid_decoding_leaves_the_rows_alone(loaded: Loaded) -> None:
    asks = [Sample(p, temperature=1.0, max_tokens=4 + 9 * i) for i, p in enumerate(PROMPTS)]
    alone = run(LocalEngine(loaded), asks)
    engine = LocalEngine(loaded)
    for ticket, ask in enumerate(asks):
        engine.submit(ticket, ask, (ticket,))
    answers = dict(engine.poll())
    engine.submit(99, Score("a prompt that is new and rather long", ("one", "two", "three")), ())
    while engine.busy:
        answers.update(engine.poll())
    assert len(answers.pop(99).values) == 3
    assert [answers[i].ids.tolist() for i in range(len(asks))] == [t.ids.tolist() for t in alone]


# Controls and patches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Force:
    """Force ``text`` after ``at`` new tokens, stop after ``stop``; its state counts its steps."""

    at: int = -1
    text: str = ""
    stop: int = -1

    def start(self, tokenizer: Any) -> Any:
        return (tuple(tokenizer.encode(self.text, add_special_tokens=False)), 0)

    def step(self, tails: Any, logits: Any, states: Any) -> Any:
        assert logits.shape[0] == len(tails) == len(states)
        forced = [state[0] if tail.new == self.at else () for tail, state in zip(tails, states)]
        stops = [tail.new == self.stop for tail in tails]
        return logits, forced, stops, [(state[0], state[1] + 1) for state in states]


@dataclass(frozen=True)
class Ban:
    """Only tokens that the prompt's row may use: even ones."""

    def start(self, tokenizer: Any) -> Any:
        return None

    def step(self, tails: Any, logits: Any, states: Any) -> Any:
        logits[:, 1::2] = -torch.inf
        return logits, [()] * len(tails), [False] * len(tails), list(states)


def test_controls_force_stop_and_change_logits_of_their_rows_only(loaded: Loaded) -> None:
    endless = replace(loaded, eos=frozenset())
    ask = Sample("2 + 2", temperature=0.0, max_tokens=12)
    force, ban = Force(at=3, text="abc", stop=9), Ban()
    free, forced, even, both = run(
        LocalEngine(endless),
        [ask, replace(ask, controls=(force,)), replace(ask, controls=(ban,)), replace(ask, controls=(ban, force))],
    )
    assert free.ids.tolist() == plain(endless, "2 + 2", 12)
    assert forced.ids[:3].tolist() == free.ids[:3].tolist()
    assert loaded.tokenizer.decode(forced.ids[3:6]) == "abc"
    assert (len(forced.ids), forced.finish) == (9, "until")
    assert (forced.usage.injected, forced.usage.generated) == (3, 9)
    assert (even.ids % 2 == 0).all()
    assert len(even.ids) == 12
    assert (np.delete(both.ids, [3, 4, 5]) % 2 == 0).all()
    # Forced text is read like any other: the tokens after it are those of a plain continuation.
    [rest] = run(LocalEngine(endless), [replace(ask, prefix=forced.ids[:6], max_tokens=3)])
    assert rest.ids.tolist() == forced.ids.tolist()


@dataclass(frozen=True)
class Push:
    """Add ``strength`` to the first layer's output."""

    @contextmanager
    def apply(self, model: torch.nn.Module, strength: torch.Tensor) -> Iterator[None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + strength[:, None, None] * torch.linspace(-1, 1, output.shape[-1])

        handle = model.model.layers[0].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def test_patches_touch_their_rows_at_their_strength(loaded: Loaded) -> None:
    ask, push = Sample("2 + 2", temperature=0.0, max_tokens=16), Push()
    asks = [replace(ask, patches=((push, s),)) if s else ask for s in (0.0, 2.0, 0.0, 5.0)]
    engine = LocalEngine(loaded)
    for _ in range(2):
        traces = run(engine, asks)
        alone = [run(LocalEngine(loaded, batch_size=1), [one])[0] for one in asks]
        assert [t.ids.tolist() for t in traces] == [t.ids.tolist() for t in alone]
    assert len({tuple(t.ids) for t in traces}) == 3


@dataclass(frozen=True)
class Greedy:
    """A decoder that runs each row by itself."""

    def decode(self, rows: Any, forward: Any) -> Any:
        for i, row in enumerate(rows):
            ids, cache, new = torch.tensor([row.context.tolist()]), None, []
            while len(new) < row.max_tokens and not (new and new[-1] in row.eos):
                prefill = ids.shape[1] if not new else 0
                out = forward("main", [i], ids=ids, cache=cache, prefill=prefill)
                cache = out.past_key_values
                ids = out.logits[:, -1:].argmax(-1)
                new.append(int(ids))
            yield i, new


def test_a_decoder_owns_its_rows_and_shares_the_engine(loaded: Loaded) -> None:
    ask = Sample("2 + 2", temperature=0.0, max_tokens=15)
    owned, other, ordinary = run(
        LocalEngine(loaded), [replace(ask, decoder=Greedy()), replace(ask, prompt="x", decoder=Greedy()), ask]
    )
    assert owned.ids.tolist() == ordinary.ids.tolist()
    assert owned.finish == ordinary.finish
    assert other.ids.tolist() == plain(loaded, "x", 15)


# Bad input -----------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_fails_its_problem_alone(loaded: Loaded) -> None:
    problems = [Problem(f"p{i}", "x" * (600 if i == 1 else 5 + i), None) for i in range(3)]
    outcomes = Runner(LocalEngine(loaded, max_tokens=4)).solve(SelfConsistency(k=2), problems)
    assert [o.failed is not None for o in outcomes] == [False, True, False]
    assert "shorten the prompt" in outcomes[1].grade.message
    assert outcomes[1].usage.generated == 0


def test_after_a_fault_in_a_step_the_engine_is_empty_and_works(loaded: Loaded) -> None:
    class Broken:
        def start(self, tokenizer: Any) -> int:
            return 0

        def step(self, tails: Any, logits: Any, states: Any) -> Any:
            if any(tail.new > 2 for tail in tails):
                raise ZeroDivisionError("a defect")
            return logits, [()] * len(tails), [False] * len(tails), states

    engine = LocalEngine(loaded)
    ask = Sample("2 + 2", temperature=0.0, max_tokens=8)
    [expected] = run(LocalEngine(loaded), [ask])
    engine.submit(0, replace(ask, controls=(Broken(),)), (0,))
    engine.submit(1, ask, (1,))
    with pytest.raises(ZeroDivisionError):
        [engine.poll() for _ in range(20)]
    assert not engine.busy
    assert engine.poll() == []
    engine.limit(1, 0)  # of a row that is gone
    [trace] = run(engine, [ask])
    assert trace.ids.tolist() == expected.ids.tolist()


def test_a_prompt_longer_than_the_context_is_refused_with_its_key_and_lengths(loaded: Loaded) -> None:
    engine = LocalEngine(loaded)
    with pytest.raises(RowFailed, match=r"roll-17.*prompt has \d{3} tokens.*512"):
        engine.submit(0, Sample("x" * 600), (0, "roll-17", 0))
    with pytest.raises(RowFailed, match="512"):
        engine.submit(0, Score("x" * 490, ("y" * 40,)), (0,))
    assert engine.poll() == []
    long = Sample("x" * 470, temperature=1.0)
    [trace] = run(LocalEngine(replace(loaded, eos=frozenset())), [long])
    assert trace.finish == "context"
    assert len(loaded.chat.prompt_ids(long.prompt)) + len(trace.ids) == 512


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Sample("x", role="judge"), "no model for role 'judge'"),
        (Sample("x", adapters={"valve": 1.0}), "no adapter 'valve'"),
        (Sample("x", until=("",)), "empty stop string"),
        (Sample("x", n=2), "one row at a time"),
        (Sample("x", temperature=-1.0), "temperature -1"),
        (Sample("x", top_p=0.0), "top_p 0"),
    ],
)
def test_requests_that_cannot_run_are_refused(loaded: Loaded, request_: Sample, said: str) -> None:
    with pytest.raises(ThriftyError, match=said):
        LocalEngine(loaded).submit(0, request_, (0,))


def test_folders_that_hold_no_lora_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match="holds no adapter"):
        LocalEngine(loaded).add_adapter("valve", tmp_path)
    with pytest.raises(ThriftyError, match="batch size"):
        LocalEngine(loaded, batch_size=0)


def test_a_limit_is_of_the_whole_response(loaded: Loaded) -> None:
    engine = LocalEngine(replace(loaded, eos=frozenset()), max_tokens=12)
    [piece] = run(engine, [Sample("2 + 2", max_tokens=5)])
    assert (len(piece.ids), piece.finish) == (5, "length")
    more = Sample("2 + 2", prefix=piece.ids, max_tokens=5)
    [second] = run(engine, [more])
    [third] = run(engine, [replace(more, prefix=second.ids)])
    assert (len(second.ids), second.finish) == (10, "length")
    assert (len(third.ids), third.finish) == (12, "context"), "nobody need ask for the next piece"
    [rest] = run(engine, [replace(more, max_tokens=None)])
    assert (len(rest.ids), rest.finish) == (12, "length")
    [outcome] = Runner(engine).solve(TrimR(markers=("never",), interval=5), [Problem("p", "2 + 2", "4")])
    assert len(outcome.chosen.ids) == 12


def test_stop_strings_work_where_the_tokenizer_has_more_tokens_than_the_model(loaded: Loaded) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>", "<sound>"])
    more = wrap(loaded.model, tokenizer, "more")
    ask = Sample("2 + 2", temperature=1.0, max_tokens=60, until=("e",))
    assert run(LocalEngine(more), [ask])[0].ids.tolist() == run(LocalEngine(loaded), [ask])[0].ids.tolist()


def test_a_chain_is_as_long_when_its_answer_is_written_later(loaded: Loaded) -> None:
    engine = LocalEngine(replace(loaded, eos=frozenset()))
    [open_] = run(engine, [Sample("2 + 2", temperature=1.0, max_tokens=7)])
    [shut] = run(engine, [Sample("2 + 2", prefix=open_.ids, inject=END_OF_THOUGHT, max_tokens=1)])
    [answered] = run(engine, [Sample("2 + 2", temperature=1.0, prefix=shut.ids, max_tokens=5)])
    assert thinking_length(shut) == thinking_length(answered) == len(shut.ids) == 8


def test_roles_run_their_own_models() -> None:
    main, judge = tiny.loaded(seed=0), tiny.loaded(seed=1)
    engine = LocalEngine({"main": main, "judge": judge})
    ask = Sample("2 + 2", temperature=0.0, max_tokens=12)
    first, second = run(engine, [ask, replace(ask, role="judge")])
    assert first.ids.tolist() == plain(main, "2 + 2", 12)
    assert second.ids.tolist() == plain(judge, "2 + 2", 12)
    assert set(engine.meter.rows()) == {("solve", "main"), ("solve", "judge")}


def test_a_prefilled_prompt_counts_its_chain_as_thought() -> None:
    one = tiny.loaded(template="prefilled")
    [open_] = run(LocalEngine(one), [Sample("2 + 2", temperature=1.0, max_tokens=5)])
    assert not open_.closed
    assert (open_.usage.thought, open_.usage.answer) == (len(open_.ids), 0)
    [shut] = run(LocalEngine(one, temperature=1.0), [Sample("2 + 2", controls=(Force(2, "</think>"),), max_tokens=8)])
    assert shut.closed
    assert (shut.usage.thought, shut.usage.injected) == (2, 1)
    assert LocalEngine(one).thinking("2 + 2") == ("<think>", "</think>")
    assert LocalEngine(tiny.loaded(template="none")).thinking("2 + 2") == ("", "")


def test_everything_is_a_trace(loaded: Loaded) -> None:
    assert all(isinstance(t, Trace) for t in run(LocalEngine(loaded), mixed_requests()))


def test_a_poll_is_a_slice_so_that_a_limit_gets_through(loaded: Loaded) -> None:
    engine = LocalEngine(replace(loaded, eos=frozenset()))
    engine.submit(0, Sample("2 + 2", temperature=1.0, max_tokens=300), (0,))
    assert engine.poll() == []
    engine.limit(0, 1)
    answers: dict[int, Any] = {}
    while engine.busy:
        answers.update(engine.poll())
    assert answers[0].finish == "cancelled"
    assert len(answers[0].ids) < 50
