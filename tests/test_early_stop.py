"""Knowing when to stop: the closing tag's temperature, failed branches, stated confidence, length by request."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

import tiny
from thrifty.contracts import Budget, Grade, Group, Outcome, Problem, Sample, Span, Tail, ThriftyError, Trace, Usage
from thrifty.engines.local import LocalEngine
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine
from thrifty.measure.metric.failed_step_fraction import FailedStepFraction, from_graphviz
from thrifty.solve.search.best_of_n import BestOfN
from thrifty.solve.search.single_pass import SinglePass
from thrifty.solve.search.tldr_ts import TldrTs
from thrifty.solve.verify.finece import FineCE, central, clusters, integrate, placements
from thrifty.tune.reward.level_length import LevelLength

torch.set_num_threads(1)
PROBLEM = Problem("p", "7 + 3 ?", "10")


def trace(thought, response="10", finish="stop", tokens=4):
    return Trace(np.arange(tokens), thought, response, finish == "stop", finish, spans=(Span(0, tokens, "thought"),))


# ---------------------------------------------------------------------------------------------- tldr-ts


@pytest.fixture(scope="module")
def loaded():
    return replace(tiny.loaded(template="prefilled"), eos=frozenset())


def test_only_the_closing_tag_is_rescaled_and_only_until_it_is_there(loaded):
    close = loaded.chat.close_id
    logits = torch.randn(3, len(loaded.tokenizer), generator=torch.Generator().manual_seed(0))
    method = TldrTs(tau=2.0, bias=0.5)
    tails = [Tail([1, 2], 2), Tail([1, close, 2], 3), Tail([], 0)]
    changed, forced, stops, states = method.step(tails, logits, [method.start(loaded.tokenizer)] * 3)
    logp = logits.log_softmax(-1)[:, close]
    assert (forced, stops) == ([()] * 3, [False] * 3)
    torch.testing.assert_close((changed - logits)[[0, 2], close], -logp[[0, 2]] / 2 + 0.5)
    torch.testing.assert_close(changed[1], logits[1])
    others = [i for i in range(logits.shape[1]) if i != close]
    torch.testing.assert_close(changed[:, others], logits[:, others])
    again, *_ = method.step([Tail([1, 2, 3], 3), Tail([1, close, 2, 3], 4), Tail([5], 1)], logits, states)
    torch.testing.assert_close(again, changed)


def test_a_higher_temperature_closes_chains_earlier(loaded):
    problems = [Problem(f"p{i}", f"what is {i}", "1") for i in range(12)]

    def thought(method):
        outcomes = Runner(LocalEngine(loaded, max_tokens=30)).solve(method, problems)
        assert all(o.usage.generated <= 30 for o in outcomes)
        return sum(o.usage.thought for o in outcomes)

    lengths = [thought(TldrTs(tau=tau, temperature=1.0, top_p=1.0)) for tau in (0.3, 1.0, 6.0)]
    assert lengths[0] >= lengths[1] > lengths[2]
    assert lengths[1] == thought(SinglePass(1.0, 1.0)), "1 changes nothing"
    with pytest.raises(ThriftyError, match="tau is 0"):
        Runner(LocalEngine(loaded, max_tokens=3)).solve(TldrTs(tau=0), problems[:1])


def test_a_tag_of_several_tokens_is_refused():
    with pytest.raises(ThriftyError, match="is several tokens"):
        TldrTs().start(tiny.tokenizer("none"))


def test_a_level_asks_for_a_length_and_a_long_right_answer_still_beats_a_wrong_one():
    reward = LevelLength(levels=("short", "long"), targets=(10, 40), prices=(0.8, 0.0))
    asked = reward.asked(PROBLEM, "short")
    assert (asked.id, asked.prompt, asked.answer) == ("p/short", "7 + 3 ?\nThink short.", "10")
    lengths = [5, 10, 12, 20, 90]
    traces = [trace("x", tokens=n) for n in lengths]
    right = [Grade(1.0, "10")] * 5
    short, long, wrong = reward.score(
        [Group(asked, traces, right), Group(PROBLEM, traces, right), Group(asked, traces, [Grade(0.0, "9")] * 5)], 0
    )
    assert short == pytest.approx([1, 1, 1 - 0.8 * 0.2, 1 - 0.8, 1 - 0.8])
    assert long == [1.0] * 5, "no level asked for: the longest, which is free"
    assert max(wrong) < min(short)


# ------------------------------------------------------------------------------------ failed-step-fraction


def test_a_dead_end_takes_its_branch_with_it():
    method = FailedStepFraction()
    flags = [failed for _, failed in method.steps(
        "We have 7. Alternatively, suppose x is 4. Then 4 + 3 is 7. This is a dead end. So x is 5. Check: 5 + 2 is 7."
    )]  # fmt: skip
    assert flags == [False, True, True, True, False, False]


def test_a_search_that_restates_its_state_takes_back_a_choice():
    chain = "a + b 4 c 3 : 5 . a + b + c 3 : 1 . a + b + c + : -2 no . a + b + c - : 1 no . a + b - c 3 : 5 . ok ."
    texts = [(text.strip(), failed) for text, failed in FailedStepFraction().steps(chain)]
    assert [failed for _, failed in texts] == [False, True, True, True, False, False]
    assert FailedStepFraction().without_failures(chain) == "a + b 4 c 3 : 5 . a + b - c 3 : 5 . ok ."


def test_a_repair_is_no_dead_end():
    assert FailedStepFraction().fraction("3 b +4 = 8 . | 3 b +4 = 7 no 7 . 7 c *2 = 4 .") == 0
    assert FailedStepFraction().fraction("There is no remainder here. So it is 7.") == 0
    assert FailedStepFraction().fraction("") == 0


def test_the_metric_is_the_mean_over_chosen_chains():
    def outcome(thought):
        chosen = trace(thought) if thought is not None else None
        return Outcome(PROBLEM, chosen, Grade(1.0, "10"), [], Usage())

    half, none = "a + : 1 no . a - : 2 .", "a - : 2 . so 2 ."
    assert FailedStepFraction().measure([outcome(half), outcome(none), outcome(None)]) == 0.25
    assert FailedStepFraction().measure([outcome(None)]) is None


def test_as_a_verifier_it_prefers_the_chain_that_failed_less():
    chains = ["Suppose 1 . Fails . So 7 . </think> 7", "So 10 . </think> 10", "Wait . It is wrong . </think> 8"]
    engine = ScriptedEngine(lambda prompt, key: chains[key[-1]])
    engine.capabilities = engine.capabilities | {"logprobs"}
    [outcome] = Runner(engine).solve(BestOfN(n=3, verifier=FailedStepFraction()), [PROBLEM])
    assert outcome.chosen.response == "10"


def test_a_graph_that_a_model_wrote_is_read():
    nodes = 'node [shape=box];\n a [label="start"]; b [label="try", color=red];\n'
    graph = f"digraph G {{\n {nodes} a -> b -> c;\n a -> d [style=x]\n}}"
    assert from_graphviz(graph) == 0.25
    assert from_graphviz("digraph {}") == 0.0


@pytest.mark.parametrize(
    ("graph", "share"),
    [
        ('digraph { a [label="x; y -> z [q]"]; b [color=red] }', 1 / 2),
        ('digraph {\n a\n b [label="t",\n   color="red"]\n}', 1 / 2),
        ("digraph { rankdir=LR; size = 3; a; b [fillcolor=red] }", 1 / 2),
        ("digraph { node [color=red]; a; b }", 1),
        ('digraph { a [label="it fails here", tooltip=red]; b [class=failed] }', 1 / 2),
        ('digraph { subgraph cluster_0 { label="x"; a; b } c [color=red] }', 1 / 3),
        ("digraph { a -> b\n -> c [color=red] }", 0),
        ('graph { "a 1" -- b:n; // red\n b [color=red] /* c [color=red] */ }', 1 / 2),
    ],
)
def test_a_graph_may_be_written_in_any_of_its_ways(graph, share):
    assert from_graphviz(graph) == pytest.approx(share)


# ------------------------------------------------------------------------------------------------ finece


def test_placements_average_to_the_auroc_and_vary_as_its_estimate_does():
    rng = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(300):
        right = (rng.random(200) < 0.8).astype(float)
        stated = np.round(rng.normal(size=200) + right, 1)  # with ties
        values = placements(stated, right)
        u = mannwhitneyu(stated[right == 1], stated[right == 0]).statistic
        assert values.mean() == pytest.approx(u / (right.sum() * (1 - right).sum()))
        found.append(values.mean())
        errors.append(values.std() / np.sqrt(len(values)))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)
    assert placements(stated, np.ones(200)).tolist() == [0.5] * 200


def asker(told):
    """Finds ``told`` (text -> probability of "1" against "0") in the question it is asked."""

    def score(prompt, word):
        value = next(v for k, v in told.items() if f"Answer: {k}" in prompt)
        return math.log(value if word == "1" else 1 - value)

    return score


class Rates:
    def __init__(self, method, traces):
        self.method, self.traces, self.found = method, traces, None

    def solve(self, problem, rng):
        self.found = yield from self.method.rate(problem, self.traces, rng)


TWO = FineCE(words=("0", "1"), step=("Wait",), width=2, alpha=0.25)


@pytest.mark.parametrize("size", [1, 64])
def test_confidence_is_the_mean_of_what_the_model_may_say(size):
    told = {"so 10 10": 0.75, "so 9 9": 0.25}
    asks = Rates(TWO, [trace("so 10"), trace("so 9", "9")])
    [outcome] = Runner(ScriptedEngine(lambda p, k: "", asker(told), batch_size=size)).solve(asks, [PROBLEM])
    assert asks.found == pytest.approx([0.75, 0.25])
    assert outcome.usage.generated == 0, "it only reads"
    assert FineCE().expected([0.0] * 11) == pytest.approx(0.5)


def test_a_label_is_the_word_whose_number_is_nearest(loaded):
    method = FineCE(words=("0", "0.5", "0.6", "1"))
    made = method.examples(PROBLEM, [("", 0.52), ("", 0.58), ("", 0.9)], loaded.chat)
    said = [loaded.chat.tokenizer.decode(example.target_ids[:-1]) for example in made]
    assert [word.replace(" ", "") for word in said] == ["0.5", "0.6", "1"]


def test_backward_integration_looks_steps_ahead():
    begun = trace("so", "", finish="until", tokens=1)
    engine = ScriptedEngine(lambda p, k: "ten Wait" if k[-1] == 0 else "nine Wait", None)
    engine.encode("so")
    told = {"so ten Wait": 0.8, "so nine Wait": 0.4, "so": 0.9}
    engine.score = asker(told)
    asks = Rates(replace(TWO, depth=1), [begun])
    Runner(engine).solve(asks, [PROBLEM])
    assert asks.found == pytest.approx([0.25 * 0.9 + 0.75 * 0.6])
    assert integrate(0.9, [0.8, 0.4], 0.25) == pytest.approx(0.675)
    deeper = Rates(replace(TWO, depth=2), [begun])
    told |= {f"so {a} Wait {b} Wait": 0.5 for a in ("ten", "nine") for b in ("ten", "nine")}
    engine.score = asker(dict(sorted(told.items(), key=lambda pair: -len(pair[0]))))
    Runner(engine).solve(deeper, [PROBLEM])
    once = [0.25 * own + 0.75 * 0.5 for own in (0.8, 0.4)]
    assert deeper.found == pytest.approx([0.25 * 0.9 + 0.75 * sum(once) / 2])


class Labels:
    def __init__(self, method):
        self.method, self.found = method, None

    def solve(self, problem, rng):
        grade = lambda p, response: Grade(float(response == p.answer), response)  # noqa: E731
        self.found = yield from self.method.labels(problem, grade)


def test_labels_are_shares_of_right_completions():
    def script(prompt, key):
        # path: first the next steps (turn 0, 2, 4 ...), then what completes them (turn 1, 3, 5 ...)
        turn, i = key[2], key[-1] if key[2] % 2 == 0 else key[3]
        if turn == 0:
            return "add them Wait" if i < 3 else "guess nine Wait"
        right = {1: i < 3, 3: i < 4, 5: i == 0}.get(turn, False)
        return "on Wait" if turn % 2 == 0 else f"done </think> {10 if right else 9}"

    asks = Labels(replace(TWO, k=4, m=2))
    engine = ScriptedEngine(script)
    [outcome] = Runner(engine).solve(asks, [PROBLEM])
    found = dict(asks.found)
    assert (found[""], found["add them Wait"], found["guess nine Wait"]) == (0.75, 1.0, 0.25)
    whole = [(text, value) for text, value in asks.found if "done" in text]
    assert all((value == 1.0) == text.endswith("10") for text, value in whole)
    assert [value for _, value in whole] == [1, 1, 1, 0] + [1] * 4 + [1, 0, 0, 0], "8 of all 12 answers are right"
    assert len({t.path for t in outcome.tried}) == 2 * 4 * (1 + 2), "k (1 + m T) completions, in two pieces each"


def test_steps_that_say_the_same_are_one_cluster():
    texts = ["add 7 and 3", "add 7 and 3 now", "subtract three", "add 7 and 3"]
    assert [sorted(c) for c in clusters(texts, 0.3)] == [[0, 1, 3], [2]]
    assert central(texts) in (0, 3)
    assert clusters(["", "x", ""], 0.3) == [[0, 2], [1]]
    assert clusters(["alone"], 0.3) == [[0]]


def test_what_was_learnt_is_what_is_asked(loaded):
    """Training on a label makes the model say it: the examples end where ``Score`` looks."""
    [example] = TWO.examples(PROBLEM, [("so 10", 1.0)], loaded.chat)
    asked = TWO.asks.format(question=PROBLEM.prompt, text="so 10")
    assert list(example.prompt_ids) == loaded.chat.prompt_ids(asked)
    assert list(example.target_ids) == [*loaded.tokenizer.encode("1"), loaded.tokenizer.eos_token_id]
    ids = torch.tensor([[*example.prompt_ids, *example.target_ids]])
    with torch.no_grad():
        logp = loaded.model(ids).logits[0, len(example.prompt_ids) - 1].log_softmax(-1)
    expected = TWO.expected([float(logp[loaded.tokenizer.encode(w)[0]]) for w in TWO.words])
    asks = Rates(TWO, [trace("so 10", "")])
    Runner(LocalEngine(loaded)).solve(asks, [PROBLEM])
    assert asks.found == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_budgets_are_kept(tokens):
    engine = ScriptedEngine(lambda p, k: "a b c Wait")
    [outcome] = Runner(engine, budget=Budget(tokens=tokens)).solve(Labels(replace(TWO, k=4)), [PROBLEM])
    assert outcome.usage.generated <= tokens


def test_ratings_do_not_depend_on_the_batch(loaded):
    problems = [Problem(f"p{i}", f"what is {i}", "1") for i in range(3)]

    class Both:
        def __init__(self):
            self.found = {}

        def solve(self, problem, rng: random.Random):
            begun = yield Sample(problem.prompt, n=2, max_tokens=5, temperature=1.0)
            method = FineCE(words=("0", "1"), asks="{question} {text}", step=("e", "a"), depth=1, width=2)
            bounded = [replace(t, finish="until") for t in begun]
            self.found[problem.id] = yield from method.rate(problem, bounded, rng)

    runs = []
    for size in (1, 8):
        both = Both()
        Runner(LocalEngine(loaded, batch_size=size, max_tokens=6)).solve(both, problems)
        runs.append(both.found)
    assert runs[0] == {name: pytest.approx(values, abs=1e-4) for name, values in runs[1].items()}
