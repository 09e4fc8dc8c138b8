"""Masked thought and alignment fine-tuning: the formulas, what they touch, and what training with them does."""

import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import tiny
from thrifty.contracts import ThriftyError
from thrifty.tasks.spelling import respelled
from thrifty.tune import skill
from thrifty.tune.batches import Example, bucketed, collate, packed
from thrifty.tune.objective import aft_alignment
from thrifty.tune.objective.aft_alignment import AFT, Candidate, Question, boundary, detached, unlimited
from thrifty.tune.objective.masked_thought_mft import MaskedThought, Token
from thrifty.tune.objective.nll import NLL
from thrifty.tune.supervised import Train, train

torch.set_num_threads(1)


def documents(n=8):
    rng = random.Random(0)
    draw = lambda k: [rng.randrange(60) for _ in range(k)]  # noqa: E731
    return [Example(draw(4 + i % 3), draw(6 + i)) for i in range(n)]


def batch(made):
    rows = packed(made, 400, 60)
    assert len(rows) == 1
    return dataclasses.replace(collate(rows[0]), total=sum(one.total for one in made))


# ------------------------------------------------------------------------------------------ masked thought


def test_every_target_token_but_none_of_the_question_may_be_masked():
    given = batch(documents())
    torch.manual_seed(0)
    masked = MaskedThought(rate=1.0, replacement=Token(63)).masked(given.input_ids, given.weights, 1.0, 64)
    changed = masked == 63
    for row, length in zip(changed, (given.input_ids != 0).sum(1)):
        assert row[:length].any()
    expected = torch.zeros_like(changed)
    expected[:, 1:] = given.weights[:, :-1] != 0
    assert torch.equal(changed, expected)
    assert int(expected.sum()) == sum(len(d.target_ids) for d in documents())


def test_masks_hit_the_share_they_should_and_are_drawn_anew():
    mask, given = MaskedThought(replacement=Token(63)), batch(documents())
    target = sum(len(d.target_ids) for d in documents())
    torch.manual_seed(0)
    counts = [int((mask.masked(given.input_ids, given.weights, 0.4, 64) == 63).sum()) for _ in range(200)]
    assert sum(counts) / 200 / target == pytest.approx(0.4, abs=0.02)
    assert len(set(counts)) > 5


def test_labels_stay_while_inputs_are_masked():
    model, given = tiny.model(64), batch(documents())
    torch.manual_seed(3)
    ids = MaskedThought(rate=0.5).masked(given.input_ids, given.weights, 0.5, 64)
    corrupted = dataclasses.replace(given, input_ids=ids)  # labels are those of the batch
    expected, _ = NLL().loss(model, corrupted, 0, {})
    torch.manual_seed(3)
    found, logs = MaskedThought(rate=0.5).loss(model, given, 0, {})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert 0.3 < logs["masked"] < 0.7
    plain, _ = MaskedThought(rate=0.0).loss(model, given, 0, {})
    torch.testing.assert_close(plain, NLL().loss(model, given, 0, {})[0], atol=1e-5, rtol=1e-5)


def test_the_share_grows_to_its_rate_as_in_the_authors_trainer():
    mask = MaskedThought(rate=0.4, warmup=20)
    assert [round(mask.probability(step), 4) for step in (0, 7, 21, 500)] == [0.0, 0.1333, 0.4, 0.4]
    assert MaskedThought(rate=0.4).probability(0) == 0.4


def test_masks_are_the_same_when_a_run_is_repeated(tmp_path):
    runs = [
        train(tiny.model(64), documents(), Train(steps=3, batch_size=8, seed=seed), tmp_path / name, MaskedThought())
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_the_placebo_drops_losses_and_leaves_inputs_alone():
    model, given = tiny.model(64), batch(documents())
    torch.manual_seed(0)
    _, logs = MaskedThought(rate=0.5, where="loss").loss(model, given, 0, {})
    assert 0.3 < logs["masked"] < 0.7
    none, _ = MaskedThought(rate=1.0, where="loss").loss(model, given, 0, {})
    assert float(none.detach()) == 0.0
    with pytest.raises(ThriftyError, match="choose input or loss"):
        MaskedThought(where="question").loss(model, given, 0, {})


def test_a_rate_that_is_no_share_is_refused():
    with pytest.raises(ThriftyError, match=r"rate 1\.5"):
        MaskedThought(rate=1.5).loss(tiny.model(64), batch(documents()), 0, {})


# ------------------------------------------------------------------------------------------ the unseen skill


def test_another_spelling_is_one_to_one_and_shows_in_the_prompt():
    digits = [respelled(str(digit)) for digit in range(10)]
    assert digits[0] == "0", "numbers keep no leading zero"
    assert sorted(digits) == [str(digit) for digit in range(10)]
    labels = [respelled(label) for label in "abcdefghij"]
    assert len(set(labels)) == 10
    assert set(labels) == set("abcdefghij"), "tokens that the students were trained on"
    assert labels[0] != "a", "the first operation shows the spelling"
    assert respelled("roll mod 10 . a 9") == "roll mod 70 . f 2", "words stay"


def test_a_chain_is_exact_where_greedy_decoding_writes_it():
    model = tiny.model(64)
    prompt = [5, 6, 7]
    with torch.no_grad():
        written = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    other = [*written[:4], (written[4] + 1) % 64, written[5]]
    loss, exact = skill.measured(model, [Example(prompt, other), Example(prompt, written)])
    assert exact == [0.0, 1.0]
    assert loss[0] > loss[1] > 0


# ------------------------------------------------------------------------------------------ alignment


def questions(n=6):
    rng = random.Random(1)
    draw = lambda k: [rng.randrange(60) for _ in range(k)]  # noqa: E731
    return [
        Question(draw(4), draw(6), right=(draw(5),) * (i % 2), wrong=tuple(draw(7) for _ in range(i % 3)))
        for i in range(n)
    ]


def test_the_loss_is_the_formula_worked_out_from_single_chains():
    model = tiny.model(64)

    def score(prompt, target):
        ids = torch.tensor([[*prompt, *target]])
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0]
        return float(sum(logp[len(prompt) + i - 1, t] for i, t in enumerate(target)) / len(target))

    expected = 0.0
    for one in questions():
        right = [score(one.prompt_ids, ids) for ids in (one.target_ids, *one.right)]
        wrong = [score(one.prompt_ids, ids) for ids in one.wrong]
        expected += -right[0] + math.log(1 + sum(math.exp(n - p) for p in right for n in wrong))
    for rows in (packed, lambda made, tokens, row: bucketed(made, 400)):
        given = dataclasses.replace(collate(rows(questions(), 400, 80)[0]), total=6.0)
        found, logs = AFT(limit="none").loss(model, given, 0, {})
        assert float(found.detach()) == pytest.approx(expected / 6, rel=1e-4)
        assert 0 <= logs["assessment"] <= 1


def test_a_question_stays_in_one_batch_however_little_fits():
    for rows in packed(questions(), 20, 10) + bucketed(questions(), 10):
        found = [document for row in rows for document in row]
        assert found[0].first
        for document, after in itertools.pairwise(found):
            assert after.first or after.prompt_ids == document.prompt_ids


def gradients(limit, right, wrong, beta=0.1):
    right, wrong = torch.tensor(right, requires_grad=True), torch.tensor(wrong, requires_grad=True)
    loss = AFT(limit=limit, beta=beta).per_question(right, wrong)
    r, w = torch.autograd.grad(loss, (right, wrong), allow_unused=True)
    return r, torch.zeros_like(wrong) if w is None else w


def test_detached_wrong_chains_are_not_pushed_and_still_weigh():
    r, w = gradients("detached", [-1.0, -2.0], [-1.5])
    assert not w.any()
    weights = torch.tensor([math.exp(-0.5), math.exp(0.5)])
    torch.testing.assert_close(r, -weights / (1 + weights.sum()))
    worse, _ = gradients("detached", [-1.0, -2.0], [-0.5])
    assert (worse < r).all(), "the better the wrong chain scores, the harder right ones are raised"


def test_the_boundary_stops_pushing_where_the_paper_says():
    lowest, beta = -1.0, 0.1
    _, at = gradients("boundary", [lowest], [lowest - beta], beta)
    _, above = gradients("boundary", [lowest], [lowest - beta / 2], beta)
    _, below = gradients("boundary", [lowest], [lowest - 2 * beta], beta)
    assert float(at[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(above[0]) > 0 > float(below[0]), "descent lowers what stands above, and raises what fell below"
    _, free = gradients("none", [lowest], [lowest - 2 * beta])
    assert float(free[0]) > 0


def test_the_terms_by_hand():
    right, wrong = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])
    torch.testing.assert_close(unlimited(right, wrong, 0.1), torch.tensor([math.exp(-2), math.exp(-1)]))
    torch.testing.assert_close(detached(right, wrong, 0.1), unlimited(right, wrong, 0.1))
    limit = math.exp(-2.2 + 3)  # T = -2 - .2
    torch.testing.assert_close(boundary(right, wrong, 0.1), torch.tensor([math.exp(-2) + limit, math.exp(-1) + limit]))


def test_training_sets_assessment_right_and_only_the_unlimited_form_drives_wrong_chains_away(tmp_path):
    rng = random.Random(2)
    draw = lambda k: [rng.randrange(60) for _ in range(k)]  # noqa: E731
    made = [Question(draw(4), draw(6), wrong=(draw(6),)) for _ in range(4)]
    settings = Train(steps=40, batch_size=4, lr=3e-3, warmup=0, schedule="constant")
    wrong = {}
    for limit in ("none", "boundary"):
        result = train(tiny.model(64), made, settings, tmp_path / limit, AFT(limit=limit))
        last = json.loads((result.folder / "train.jsonl").read_text().splitlines()[-1])
        assert last["assessment"] == 1.0
        wrong[limit] = last["right"] - last["wrong"]
    assert wrong["boundary"] < 0.6 * wrong["none"]


def test_documents_of_one_prompt_become_one_question():
    prompt = [1, 2]
    made = AFT().examples(
        [
            Example(prompt, [3], weight=-1.0),
            Example(prompt, [4]),
            Example([9], [5], weight=-1.0),
            Example(prompt, [6]),
            Example(prompt, [3], weight=-1.0),  # sampled twice
        ]
    )
    assert len(made) == 1, "a question that nobody answered right is left out"
    first, second, third = made[0].documents
    assert ([first.target_ids, second.target_ids, third.target_ids], first.first) == ([[4], [6], [3]], True)
    assert [isinstance(d, Candidate) and d.right for d in (first, second, third)] == [True, True, False]


def test_dealt_labels_keep_the_chains_and_how_many_are_right_and_nothing_else():
    documents = [
        Example([prompt], [chain], weight=1.0 if chain < 20 else -1.0)
        for prompt in range(200)
        for chain in range(18, 22)
    ]
    dealt, again = AFT(labels="dealt").examples(documents), AFT(labels="dealt").examples(documents)
    first = [[d.target_ids for d in question.documents] for question in dealt]
    assert first == [[d.target_ids for d in question.documents] for question in again]
    assert [len(question.wrong) for question in dealt] == [2] * 200
    assert all(sorted(map(tuple, chains)) == [(18,), (19,), (20,), (21,)] for chains in first)
    # 18 and 19 were right: by chance half of 200 references are of them, deviation 7
    assert sum(question.target_ids in ([18], [19]) for question in dealt) == pytest.approx(100, abs=25)
    with pytest.raises(ThriftyError, match="graded or dealt"):
        AFT(labels="mixed").examples(documents)


def test_the_gate_counts_pairs_in_which_a_wrong_chain_is_ahead():
    class Constant(torch.nn.Module):
        """Token 1 has log-probability -1, 2 has -2, and so on, up to what they all share."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=-torch.arange(10.0).expand(*input_ids.shape, 10))

    asked = [
        Question([9], [2], wrong=([1], [3])),  # ahead in one of two
        Question([9], [1], right=([5],), wrong=([4],)),  # in one of two
        Question([9], [1], wrong=([2],)),
        Question([9], [4]),  # no pair: does not count
    ]
    assert aft_alignment._misjudged(Constant(), asked) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert aft_alignment._misjudged(Constant(), asked, tokens=6) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert aft_alignment._misjudged(Constant(), asked[3:]) == 0


def test_what_is_no_question_and_limits_that_do_not_exist_are_refused():
    with pytest.raises(ThriftyError, match="give Question examples"):
        AFT().loss(tiny.model(64), batch(documents()), 0, {})
    with pytest.raises(ThriftyError, match="detached, boundary, none"):
        AFT(limit="soft").per_question(torch.ones(1), torch.ones(1))
