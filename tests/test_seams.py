"""The seams between contracts, engine, runner and loop, where methods of every kind meet them. No method is named."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import tiny
from asked import run
from thrifty.contracts import All, Budget, Card, First, Hidden, Problem, Sample, Score, ThriftyError, Trace, Usage
from thrifty.engines.local import LocalEngine
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine
from thrifty.tune.batches import Example
from thrifty.tune.objective.nll import NLL
from thrifty.tune.supervised import NoHook, Train, train

torch.set_num_threads(1)
PROBLEMS = [Problem(f"p{i}", f"question {i}", "1") for i in range(4)]
LONG = " ".join(["step"] * 60)


@dataclass(frozen=True)
class Asks:
    """Yields ``request`` and keeps what it was answered in ``heard``."""

    request: object
    heard: list = field(default_factory=list)

    def solve(self, problem, rng):
        self.heard.append((yield self.request() if callable(self.request) else self.request))
        return None


Asks.__module__ = "thrifty.contracts"  # a module without a card: the one below is for one class


# ------------------------------------------------------------------------------- things side by side


def beside(answer):
    """A short row decides about a long one, which decides about a third."""
    stop = lambda index, value: index == 0 and value[0].response == answer  # noqa: E731
    return All([Sample("short"), Sample("long"), Score("x", ("yes",))], stop=stop)


def script(prompt, key):
    return "a b </think> no" if prompt == "short" else LONG


@pytest.mark.parametrize("size", [1, 2, 64])
def test_what_decides_stops_what_stands_after_it(size):
    heard = {}
    for answer in ("no", "yes"):
        engine = ScriptedEngine(script, score=lambda prompt, text: 1.0, batch_size=size)
        asks = Asks(beside(answer))
        [outcome] = Runner(engine).solve(asks, PROBLEMS[:1])
        [heard[answer]] = asks.heard
        if answer == "no":
            assert engine.generated < 30, "the long row went on"
            assert outcome.usage.discarded == outcome.usage.generated - 4
        else:
            assert engine.generated == 64
    assert heard["no"][1:] == [None, None], "stopped, even what had ended before"
    assert len(heard["yes"][1][0].ids) == 60
    assert heard["yes"][2] == [1.0]


def test_what_decides_at_once_starts_nothing():
    def at_once():
        return True
        yield

    engine = ScriptedEngine(script)
    asks = Asks(lambda: All([at_once(), Sample("long")], stop=lambda index, value: value))
    Runner(engine).solve(asks, PROBLEMS)
    assert asks.heard == [[True, None]] * 4
    assert engine.generated == 0


def test_things_side_by_side_can_lose_a_race():
    engine = ScriptedEngine(script)
    asks = Asks(First(1, [Sample("short"), All([Sample("long"), Sample("long")])]))
    Runner(engine).solve(asks, PROBLEMS[:1])
    [[(index, [trace])]] = asks.heard
    assert (index, len(trace.ids)) == (0, 4)
    assert engine.generated < 20


def test_a_budget_too_small_to_share_ends_a_strategy_that_asks_for_ever():
    @dataclass(frozen=True)
    class Greedy:
        def solve(self, problem, rng):
            while True:
                yield All([Sample("short", n=2), Sample("short")])

    Greedy.__module__ = "thrifty.contracts"
    [outcome] = Runner(ScriptedEngine(script), budget=Budget(tokens=15)).solve(Greedy(), PROBLEMS[:1])
    assert outcome.chosen is None
    assert 0 < outcome.usage.generated <= 15


def test_unknown_counts_are_marked_and_add_up():
    whole = Usage(thought=3, calls=1) + Usage(thought=2, latent=4, calls=1, partial=1)
    assert (whole.thought, whole.generated, whole.partial, whole.calls) == (5, 9, 1, 2)


# -------------------------------------------------------------------------------------- capabilities

CARD = Card(key="test-seams", title="Needs what few engines have", needs=("prefix", "hidden"))


@dataclass(frozen=True)
class Needs:
    def solve(self, problem, rng):
        [trace] = yield Sample(problem.prompt)
        return trace


@pytest.mark.parametrize("strategy", [Needs(), Asks(Needs())])
def test_an_engine_that_lacks_what_a_card_needs_is_refused_before_any_request(strategy):
    engine = ScriptedEngine(script)
    engine.submit = lambda *request: pytest.fail("a request was sent")
    with pytest.raises(ThriftyError, match=r"test-seams needs hidden, .*'scripted'.* engines that can: local"):
        Runner(engine).solve(strategy, PROBLEMS)


@pytest.mark.parametrize(
    ("request_", "missing"),
    [
        (Sample("x", want=frozenset({"logprobs"})), "logprobs"),
        (Sample("x", patches=((object(), 1.0),)), "patches"),
        (Sample("x", adapters={"valve": 0.5}), "adapters"),
        (Sample("x", decoder=object()), "decoder"),
        (All([Sample("x", controls=(object(),))]), "controls"),
        (Hidden("x", ("y",), 0), "hidden"),
    ],
)
def test_a_request_that_an_engine_would_ignore_is_refused(request_, missing):
    with pytest.raises(ThriftyError, match=f"asks for {missing}.*engines that can: local"):
        Runner(ScriptedEngine(script)).solve(Asks(request_), PROBLEMS)


# ------------------------------------------------------------------------------------------ decoders


@dataclass(frozen=True)
class Drafts:
    """Thinks ``latents`` steps, then drafts two tokens a forward: the ones in ``guess``, right or wrong."""

    guess: tuple[int, ...] = ()
    latents: int = 0

    def decode(self, rows, forward):
        for i, row in enumerate(rows):
            cache, ids = DynamicCache(), row.context.tolist()
            forward(row.role, [i], ids=torch.tensor([ids[:-1]]), cache=cache, prefill=len(ids) - 1)
            for _ in range(self.latents):
                forward(row.role, [i], ids=torch.tensor([ids[-1:]]), cache=cache, latent=True)
            made, ended = 0, False
            while not ended:
                draft = list(self.guess[made : made + 2])
                given = torch.tensor([[ids[-1], *draft]])
                best = forward(row.role, [i], ids=given, cache=cache, drafted=len(draft)).logits[0].argmax(-1).tolist()
                right = next((k for k, (a, b) in enumerate(zip(draft, best)) if a != b), len(draft))
                if right < len(draft):
                    cache.crop(right - len(draft))
                ids, made = ids + best[: right + 1], made + right + 1
                ended = yield i, best[: right + 1]


@pytest.fixture(scope="module")
def loaded():
    return replace(tiny.loaded(), eos=frozenset())


def test_a_decoder_only_says_what_comes_next_and_the_engine_ends_its_rows(loaded):
    ask = Sample("2 + 2", temperature=0.0, max_tokens=14)
    [plain] = run(LocalEngine(loaded), [ask])
    letter = loaded.tokenizer.decode(plain.ids[6:7])
    guess = plain.ids.copy()
    guess[[1, 9]] += 1  # two drafts are wrong
    decoder = Drafts(tuple(guess.tolist()))
    asks = [ask, replace(ask, max_tokens=5), replace(ask, until=(letter,)), replace(ask, prompt="another")]
    expected = run(LocalEngine(loaded), asks)
    engine = LocalEngine(loaded, batch_size=3)
    traces = run(engine, [replace(one, decoder=decoder) for one in asks])
    for trace, other in zip(traces, expected):
        assert (trace.ids.tolist(), trace.finish) == (other.ids.tolist(), other.finish)
    assert traces[2].finish == "until"
    total = engine.meter.total()
    made = sum(trace.usage.generated for trace in traces)
    assert 0 < total.accepted < total.drafted
    assert total.positions - total.prefill - total.padding - (total.drafted - total.accepted) == made


def test_latent_steps_are_counted_beside_the_tokens(loaded):
    engine = LocalEngine(loaded)
    [trace] = run(engine, [Sample("2 + 2", temperature=0.0, max_tokens=4, decoder=Drafts(latents=3))])
    total = engine.meter.total()
    assert (len(trace.ids), trace.usage.latent, trace.usage.generated, total.latent) == (4, 3, 7, 3)
    assert total.positions - total.prefill == 7


def test_a_decoders_rows_stop_when_they_have_lost(loaded):
    short = Sample("2 + 2", temperature=0.0, max_tokens=6, decoder=Drafts())
    asks = Asks(First(1, [short, replace(short, max_tokens=40)]))
    engine = LocalEngine(loaded)
    Runner(engine).solve(asks, PROBLEMS[:1])
    [[(index, [winner])]] = asks.heard
    assert (index, len(winner.ids)) == (0, 6)
    assert engine.meter.total().positions < 40


def test_a_decoder_that_gives_up_or_takes_what_it_would_ignore_is_refused(loaded):
    class Lazy:
        def decode(self, rows, forward):
            yield 0, []

    with pytest.raises(ThriftyError, match="Lazy left 1 rows without an end"):
        run(LocalEngine(loaded), [Sample("x", max_tokens=3, decoder=Lazy())])
    with pytest.raises(ThriftyError, match="a decoder takes no controls"):
        run(LocalEngine(loaded), [Sample("x", max_tokens=3, decoder=Lazy(), want=frozenset({"logprobs"}))])


# ---------------------------------------------------------------------------- what methods are told


def test_hidden_states_are_those_of_the_last_token_of_each_text(loaded):
    prefix = loaded.tokenizer.encode("so", add_special_tokens=False)
    asks = [Hidden("2 + 2", ("", "a longer text", "b"), layer, prefix) for layer in (0, 1)]
    with_scores = [*asks, Score("2 + 2", ("yes", "no"))]
    before = run(LocalEngine(loaded), with_scores[2:])[0].values
    engine = LocalEngine(loaded)
    *found, scores = run(engine, with_scores)
    total = engine.meter.total()
    assert total.positions == total.prefill + total.padding
    assert scores.values == pytest.approx(before, abs=1e-4)
    for layer, reply in enumerate(found):
        for text, value in zip(asks[0].texts, reply.values):
            tail = loaded.tokenizer.encode(text, add_special_tokens=False) if text else []
            ids = torch.tensor([[*loaded.chat.prompt_ids("2 + 2"), *prefix, *tail]])
            with torch.no_grad():
                whole = loaded.model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1]
            np.testing.assert_allclose(value, whole.numpy(), atol=1e-4)
    with pytest.raises(ThriftyError, match="layers 0 to 1, no layer 7"):
        run(engine, [Hidden("x", ("y",), 7)])
    asked = Asks(asks[0])
    Runner(engine).solve(asked, PROBLEMS[:1])
    assert [value.shape for value in asked.heard[0]] == [(32,)] * 3


@dataclass(frozen=True)
class Nothing:
    @contextmanager
    def apply(self, model: torch.nn.Module, strength: torch.Tensor) -> Iterator[None]:
        yield


def test_a_trace_knows_its_prompt_and_strength_zero_shares_what_was_read(loaded):
    ask = Sample("2 + 2 and some more", temperature=1.0, max_tokens=3)
    engine = LocalEngine(loaded)
    [first] = run(engine, [ask])
    assert first.prompt_ids.tolist() == loaded.chat.prompt_ids(ask.prompt)
    [again, other] = run(engine, [replace(ask, patches=((Nothing(), s),)) for s in (0.0, 1.0)])
    assert (again.usage.prompt, other.usage.cached) == (1, 0)


def test_one_step_of_policy_gradient_can_be_rebuilt_from_a_trace(loaded):
    ask = Sample("2 + 2", inject="hm", temperature=1.0, max_tokens=8, want=frozenset({"logprobs"}))
    [trace] = run(LocalEngine(loaded), [ask])
    assert isinstance(trace, Trace)
    ids = torch.tensor([[*trace.prompt_ids, *trace.ids]])
    begin = len(trace.prompt_ids) + trace.start
    with torch.no_grad():
        new = loaded.model(ids).logits[0, begin - 1 : -1].log_softmax(-1).gather(1, ids[0, begin:, None])[:, 0].numpy()
    sampled = np.zeros(len(trace.ids), bool)
    for span in trace.spans:
        sampled[span.start : span.end] = span.origin == "sampled"
    assert sampled.tolist() == [False] * 2 + [True] * 6
    assert np.isnan(trace.logprobs[~sampled[trace.start :]]).all()
    np.testing.assert_allclose(trace.logprobs[sampled[trace.start :]], new[sampled[trace.start :]], atol=1e-4)


# ------------------------------------------------------------------------------------------ the loop


class Own(NoHook):
    """Brings an optimiser of its own, with state that AdamW does not have."""

    class Momentum(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"lr": 0.0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        state, some = self.state[p], p.grad.flatten()[:3]
                        state["mean"] = 0.9 * state.get("mean", torch.zeros_like(some)) + some
                        p.flatten()[:3] -= group["lr"] * state["mean"]

    def start(self, state):
        state.optimizer = self.Momentum([{"params": group["params"]} for group in state.optimizer.param_groups])


class Head(NLL):
    """Trains a part of its own, and logs how many documents it saw."""

    def modules(self, model):
        torch.manual_seed(3)
        return {"head": torch.nn.Linear(model.config.vocab_size, 1)}

    def loss(self, model, batch, step, modules):
        loss, _ = super().loss(model, batch, step, modules)
        guess = modules["head"](model(**batch.inputs).logits[batch.weights != 0])
        return loss + guess.square().sum() / batch.total, {"documents": float(len(batch.examples))}


def test_parts_of_objectives_and_optimisers_of_hooks_are_trained_saved_and_resumed(tmp_path: Path):
    rng = random.Random(0)
    pick = lambda n: [rng.randrange(60) for _ in range(n)]  # noqa: E731
    documents = [Example(pick(4), pick(5)) for _ in range(12)]
    settings = Train(steps=6, batch_size=6, tokens=24, row=12, lr=0.05, save_every=2)

    def go(folder, hook):
        return train(tiny.model(64), documents, settings, folder, objective=Head(), hooks=[hook])

    class Stops(Own):
        def after_step(self, state):
            if state.step == 3:
                raise RuntimeError

    whole = go(tmp_path / "whole", Own())
    with pytest.raises(RuntimeError):
        go(tmp_path / "parts", Stops())
    assert go(tmp_path / "parts", Own()).losses == whole.losses
    lines = (tmp_path / "whole" / "train.jsonl").read_text().splitlines()
    assert all('"documents": 6.0' in line for line in lines), "figures are added up over a step's batches"
    saved = load_file(whole.trained / "modules.safetensors")
    fresh = Head().modules(tiny.model(64))["head"]
    assert set(saved) == {"head:weight", "head:bias"}
    moved = (saved["head:weight"] != fresh.weight).flatten()
    assert moved[:3].all()
    assert not moved[3:].any()
