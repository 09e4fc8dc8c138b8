"""Drafts from a trie: the text stays that of plain decoding, in fewer forwards."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny
from asked import run
from thrifty.contracts import First, Problem, Sample
from thrifty.decode.accelerate._trie import Draft, Trie
from thrifty.decode.accelerate.lookahead_trie import (
    LookaheadTrie,
    _accepted,
    hierarchical,
    parallel,
    single,
    tokens_per_forward,
)
from thrifty.engines.local import LocalEngine
from thrifty.engines.runner import Runner

torch.set_num_threads(1)
PROMPTS = [f"roll {i % 5} then add {i % 3}" for i in range(18)]


@pytest.fixture(scope="module")
def loaded():
    return replace(tiny.loaded(), eos=frozenset({7}))


def rate(meter):
    total = meter.total()
    return tokens_per_forward(total.accepted, total.positions, total.prefill, total.padding, total.drafted)


def same(traces, expected):
    return [(t.ids.tolist(), t.finish) for t in traces] == [(t.ids.tolist(), t.finish) for t in expected]


# ------------------------------------------------------------------------------------------- the memory


def test_a_longer_match_counts_unless_too_little_followed_it():
    memory = Trie()
    memory.note([1, 2, 3, 4, 5])
    memory.note([2, 9, 9, 9])
    memory.note([2, 9, 9, 9])
    row = memory.open([])
    assert memory.draft([1, 2], row, depth=3, nodes=9, weight=1e-4).tokens == [3, 4, 5]
    assert memory.draft([1, 2], row, depth=4, nodes=9, weight=1e-4).tokens == [9, 9, 9], "only three followed 1 2"
    assert len(memory.draft([8, 8], row, depth=3, nodes=9, weight=1e-4)) == 0


def test_a_prompt_ranks_above_outputs_and_is_forgotten_with_its_row():
    memory = Trie()
    memory.note([1, 2])
    one, other = memory.open([1, 3, 1, 3]), memory.open([1, 4])
    assert memory.draft([1], one, 1, 1, 1e-4).tokens == [2], "half the nodes, here the one, are for outputs"
    assert memory.draft([1], one, 1, 2, 1e-4).tokens == [3, 2]
    assert memory.draft([1], other, 1, 9, 1e-4).tokens == [4, 2], "another row's prompt is none of its business"
    memory.shut(one)
    memory.shut(other)
    assert list(memory.top.children) == [1]
    assert list(memory.top.children[1].children) == [2]


def test_what_was_seen_once_fades_when_a_trie_is_full():
    memory = Trie(capacity=8)
    for _ in range(4):
        memory.note([1, 2, 3])
    for rare in range(10, 17):
        memory.note([1, rare])
    assert memory.sizes[1] <= 8
    assert memory.draft([1], memory.open([]), 2, 2, 1e-4).tokens == [2, 3]


def test_branches_lie_in_a_tree_apart_or_alone():
    tree = Draft([5, 6, 7, 8], [-1, 0, 0, -1])
    assert hierarchical(tree, 4) is tree
    assert tree.depths() == [1, 2, 2, 1]
    apart = parallel(tree, 4)
    assert (apart.tokens, apart.parents) == ([5, 6, 5, 7], [-1, 0, -1, 2])
    assert single(tree, 4).tokens == [5, 6]
    assert single(tree, 1).tokens == [5]


def test_one_branch_is_as_deep_as_the_memory_has_it_where_a_tree_of_so_many_nodes_would_cut_it():
    memory = Trie()
    for output, times in (([1, 2, 3, 4, 5], 3), ([1, 6, 7, 8, 9], 2), ([1, 2, 10, 11], 2)):
        for _ in range(times):
            memory.note(output)
    decoder = LookaheadTrie(branch_length=4, nodes=4, suffix=1, memory=memory)
    row = SimpleNamespace(context=np.zeros(1), max_tokens=99)
    draft = lambda branches: replace(decoder, branches=branches)._draft(row, [1], memory.open([]))  # noqa: E731
    # after 1: 2 five times, below it 3, 4, 5 three times and 10, 11 twice; 6, 7, 8, 9 twice
    assert draft("single").tokens == [2, 3, 4, 5]
    assert replace(decoder, nodes=3, branches="single")._draft(row, [1], memory.open([])).tokens == [2, 3, 4]
    for _ in range(4):
        memory.note([1, 6])  # 6 six times: the tree's best four are 6, 2, and 3 and 4 below 2; the branch is of 6
    assert draft("hierarchical").tokens == [6, 2, 3, 4]
    assert single(draft("hierarchical"), 4).tokens == [6], "cut out of the tree"
    assert draft("single").tokens == [6, 7, 8, 9]


# ------------------------------------------------------------------------------------------ the decoder


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("branches", ["hierarchical", "parallel", "single"])
def test_greedy_text_is_identical_and_costs_fewer_forwards(kind, branches):
    loaded = replace(tiny.loaded(kind), eos=frozenset({7}))
    asks = [Sample(prompt, temperature=0.0, max_tokens=40) for prompt in PROMPTS]
    expected = run(LocalEngine(loaded, batch_size=18), asks)
    decoder = LookaheadTrie(nodes=12, branch_length=6, branches=branches)
    engine = LocalEngine(loaded, batch_size=18)
    cold = run(engine, [replace(ask, decoder=decoder) for ask in asks])
    first = rate(engine.meter)
    warm_engine = LocalEngine(loaded, batch_size=18)
    warm = run(warm_engine, [replace(ask, decoder=decoder) for ask in asks])
    assert same(cold, expected)
    assert same(warm, expected)
    assert rate(warm_engine.meter) > max(1.5, first)


def test_every_position_is_accounted_for(loaded):
    engine = LocalEngine(loaded, batch_size=5)
    decoder = LookaheadTrie(nodes=8, branch_length=4)
    traces = run(engine, [Sample(p, temperature=0.0, max_tokens=5 + i, decoder=decoder) for i, p in enumerate(PROMPTS)])
    total = engine.meter.total()
    made = sum(trace.usage.generated for trace in traces)
    assert [len(t.ids) for t in traces if t.finish == "length"] == [5 + i for i in range(18)
                                                                    if traces[i].finish == "length"]  # fmt: skip
    assert total.accepted > 0
    assert total.positions - total.prefill - total.padding - (total.drafted - total.accepted) == made


@pytest.mark.parametrize("size", [4, 18])
def test_sampled_text_is_the_one_that_plain_decoding_draws(loaded, size):
    asks = [Sample(p, temperature=1.0, top_p=0.9 if i % 2 else 1.0, max_tokens=25) for i, p in enumerate(PROMPTS[:9])]
    asks += [Sample("greedy among them", temperature=0.0, max_tokens=25)]
    expected = run(LocalEngine(loaded), asks)
    decoder = LookaheadTrie(nodes=8, branch_length=5)
    for _ in range(2):
        assert same(run(LocalEngine(loaded, batch_size=size), [replace(a, decoder=decoder) for a in asks]), expected)


def test_rows_end_at_stop_strings_prefixes_go_on_and_losers_stop(loaded):
    ask = Sample(PROMPTS[0], temperature=0.0, max_tokens=30)
    [plain] = run(LocalEngine(loaded), [ask])
    letter = loaded.tokenizer.decode(plain.ids[9:10])
    asks = [ask, replace(ask, until=(letter,)), replace(ask, prefix=plain.ids[:7], inject="so")]
    expected = run(LocalEngine(loaded), asks)
    decoder = LookaheadTrie()
    run(LocalEngine(loaded), [replace(ask, decoder=decoder)])
    assert same(run(LocalEngine(loaded), [replace(a, decoder=decoder) for a in asks]), expected)

    class Race:
        def solve(self, problem, rng):
            short = Sample(problem.prompt, temperature=0.0, max_tokens=4, decoder=decoder)
            [(_, [trace])] = yield First(1, [short, replace(short, max_tokens=300)])
            return trace

    engine = LocalEngine(loaded)
    [outcome] = Runner(engine).solve(Race(), [Problem("p", PROMPTS[1], "1")])
    assert len(outcome.chosen.ids) == 4
    assert not decoder.memory._read, "a row that was stopped left its prompt behind"


def test_drafts_are_as_deep_as_was_asked_for(loaded):
    decoder = LookaheadTrie(branch_length=20, suffix=3)  # a memory's own length is 14
    [trace] = run(LocalEngine(loaded), [Sample(PROMPTS[0], temperature=0.0, max_tokens=60, decoder=decoder)])
    row = SimpleNamespace(context=trace.ids[:30], max_tokens=60)
    draft = decoder._draft(row, trace.ids[:30].tolist(), decoder.memory.open([]))
    assert max(draft.depths()) == 20


def test_the_longest_end_counts_where_few_tokens_are_wanted():
    memory = Trie()
    memory.note([1, 2, 3, 4, 5])
    memory.note([2, 9, 9, 9])
    memory.note([2, 9, 9, 9])
    assert memory.draft([1, 2], memory.open([]), depth=9, nodes=3, weight=1e-4).tokens == [3, 4, 5]


def test_a_memory_of_something_else_only_costs(loaded):
    memory = Trie()
    rng = np.random.default_rng(0)
    for _ in range(200):
        memory.note(rng.integers(0, 200, 14).tolist())
    asks = [Sample(p, temperature=0.0, max_tokens=12) for p in PROMPTS[:4]]
    engine = LocalEngine(loaded)
    decoder = LookaheadTrie(memory=memory)
    assert same(run(engine, [replace(a, decoder=decoder) for a in asks]), run(LocalEngine(loaded), asks))
    assert rate(engine.meter) >= 1


def test_of_branches_that_begin_alike_the_longest_is_kept():
    draft = Draft([5, 6, 5, 7, 8], [-1, 0, -1, 2, 3])
    own = [5, 7, 0, 7, 8, 4]  # after the root 5, after either 5 a 7, then 8, then 4
    assert _accepted(draft, own) == [2, 3, 4]
    assert _accepted(draft, [9, 0, 0, 0, 0, 0]) == []
