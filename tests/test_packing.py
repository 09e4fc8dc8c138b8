"""Documents stay apart in every layout, and a step's loss and gradient do not depend on the layout."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedTokenizerFast, Qwen3Config

from thrifty.contracts import Chain, Problem, ThriftyError
from thrifty.models.chat import ChatFormat
from thrifty.models.strength import strengths
from thrifty.tune.adapter import lora
from thrifty.tune.batches import Example, Shuffled, bucketed, collate, examples, packed, packs
from thrifty.tune.objective.nll import NLL, target_logits


def tiny(attention="sdpa", adapted=False):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if adapted:
        model = lora(model, rank=4, seed=1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def documents(n, seed=0, **fields):
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(0, 64, rng.integers(1, 9)), rng.integers(0, 64, rng.integers(2, 20)), **fields)
        for _ in range(n)
    ]


def logits_of(model, batch, **changes):
    with torch.no_grad():
        return model(**{**batch.inputs, **changes}).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapted", [False, True])
def test_packed_documents_do_not_see_their_neighbours(attention, adapted):
    model = tiny(attention, adapted)
    one, two, other, three = documents(4)
    other = Example(one.prompt_ids + 1, one.target_ids % 7)
    start, end = len(one), len(one) + len(two)
    alone = logits_of(model, collate([[two]]))[0]
    # Rows of two documents beside rows of one, and padding after both.
    ab = logits_of(model, collate([[one, two], [three]]))[0, start:end]
    cb = logits_of(model, collate([[other, two], [three]]))[0, start:end]
    assert torch.equal(ab, cb)
    torch.testing.assert_close(ab, alone, atol=1e-5, rtol=1e-5)
    # The test can fail: without restarts the first document leaks into the second.
    a, c = collate([[one, two], [three]]), collate([[other, two], [three]])
    straight = torch.arange(a.input_ids.shape[1]).expand(2, -1)
    leak = (
        logits_of(model, a, position_ids=straight)[0, start:end]
        - logits_of(model, c, position_ids=straight)[0, start:end]
    )
    assert leak.abs().max() > 1e-2


def test_bucketed_rows_do_not_see_each_other_or_their_padding():
    model = tiny()
    docs = sorted(documents(3), key=len)
    batch = collate([[d] for d in docs])
    assert batch.input_ids.shape == (3, len(docs[-1]))
    together = logits_of(model, batch)
    for row, doc in enumerate(docs):
        alone = logits_of(model, collate([[doc]]))[0]
        torch.testing.assert_close(together[row, : len(doc)], alone, atol=1e-5, rtol=1e-5)


def test_packs_tells_models_that_isolate_from_models_that_leak():
    assert packs(tiny("sdpa"), 64)
    assert packs(tiny("eager", adapted=True), 64)
    recurrent = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.5)
    )
    assert not packs(recurrent, 64)


def step_gradient(model, docs, layout):
    """Loss and gradient of one step over the layout's batches."""
    model.zero_grad(set_to_none=True)
    total, loss_sum = float(sum(np.abs(d.loss_weights()).sum() for d in docs)), 0.0
    for rows in layout:
        batch = collate(rows)
        object.__setattr__(batch, "total", total)
        dialled = strengths(model, {"valve": batch.strengths}) if batch.strengths is not None else strengths(model, {})
        with dialled:
            loss, _ = NLL().loss(model, batch, 0, {})
            loss.backward()
        loss_sum += loss.item()
    return loss_sum, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_loss_and_gradient_do_not_depend_on_the_layout():
    model = tiny()
    docs = documents(9)
    whole, gradient = step_gradient(model, docs, [[[d] for d in docs]])
    for layout in (bucketed(docs, 40), packed(docs, 60, 25), packed(docs, 10**6, 10**6), [[[d]] for d in docs]):
        loss, same = step_gradient(model, docs, layout)
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(same, gradient, atol=1e-5, rtol=1e-4)


def test_every_document_trains_at_its_own_strength_exactly():
    model = tiny(adapted=True)
    docs = [Example(d.prompt_ids, d.target_ids, strength=s) for d, s in zip(documents(4), (0.0, 0.25, 1.0, 1.5))]
    expected_loss, expected = 0.0, 0.0
    total = float(sum(d.loss_weights().sum() for d in docs))
    for doc in docs:  # peft's own float scaling, one document at a time
        model.zero_grad(set_to_none=True)
        batch = collate([[doc]])
        with strengths(model, {"valve": doc.strength}):
            logits, labels, _ = target_logits(model, batch)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total
            loss.backward()
        expected_loss += loss.item()
        expected = expected + torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    for layout in (bucketed(docs, 10**6), packed(docs, 10**6, 30)):
        loss, gradient = step_gradient(model, docs, layout)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    at_one, _ = step_gradient(model, [Example(d.prompt_ids, d.target_ids) for d in docs], [[[d] for d in documents(4)]])
    assert abs(at_one - expected_loss) > 1e-2  # strengths matter here


def test_strengths_refuse_what_they_cannot_do():
    model = tiny(adapted=True)
    with pytest.raises(ThriftyError, match=r"carries no LoRA named 'x' .it has: valve"), strengths(model, {"x": 1.0}):
        pass
    scaling = [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    with pytest.raises(RuntimeError, match="stop"), strengths(model, {"valve": [0.5, 1.0]}):
        raise RuntimeError("stop")
    assert scaling == [dict(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    model.merge_adapter()
    with pytest.raises(ThriftyError, match="merged"), strengths(model, {"valve": [1.0]}):
        pass


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40)), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(1, 100),
)
def test_layouts_hold_every_document_once(lengths, tokens, row):
    docs = [Example(np.zeros(p, int), np.zeros(t, int)) for p, t in lengths]
    for layout in (bucketed(docs, tokens), packed(docs, tokens, row)):
        placed = [id(d) for batch in layout for r in batch for d in r]
        assert sorted(placed) == sorted(map(id, docs))
        assert all(r for batch in layout for r in batch)
    for batch in bucketed(docs, tokens):
        assert len(batch) == 1 or len(batch) * max(len(r[0]) for r in batch) <= tokens


def test_only_targets_carry_loss_and_slips_do_not():
    doc = Example([5, 6], [7, 8, 9], weight=2.0, mask=[True, False, True])
    batch = collate([[doc, Example([], [3, 4])]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    # Position t predicts token t + 1; no prediction crosses into the next document; its first token is given.
    assert batch.weights.tolist() == [[0, 2, 0, 2, 0, 1, 0]]
    assert batch.labels[batch.weights != 0].tolist() == [7, 9, 4]


def test_logits_are_made_at_targets_only_and_agree_with_the_full_ones():
    model = tiny(adapted=True)
    batch = collate([documents(2), documents(1, seed=5)])
    logits, labels, weights = target_logits(model, batch)
    assert logits.shape == (int((batch.weights > 0).sum()), 64)
    torch.testing.assert_close(logits, model(**batch.inputs).logits[batch.weights > 0])
    assert len(labels) == len(weights) == len(logits)


def test_shuffled_is_a_function_of_seed_and_step():
    docs = documents(10)
    first, again = Shuffled(docs, 4, seed=3), Shuffled(docs, 4, seed=3)
    steps = [first.next(step, {}) for step in range(5)]
    assert [again.next(step, {}) for step in (4, 0, 2)] == [steps[4], steps[0], steps[2]]
    assert {id(d) for step in steps for d in step} == set(map(id, docs))
    flat = [id(d) for step in steps for d in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(map(id, docs))  # every epoch has each example once
    assert flat[:10] != flat[10:]
    assert [id(d) for d in Shuffled(docs, 4, seed=4).next(0, {})] != flat[:4]
    with pytest.raises(ThriftyError, match="other examples"):
        Shuffled(docs[1:], 4).load_state_dict(first.state_dict())


def chat_format(eos="<eos>"):
    words = ["<eos>", "<unk>", "<think>", "</think>", *"abcdefgh1234567890+=?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return ChatFormat.detect(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>"))


def test_examples_are_prompt_then_chain_then_end_of_sequence():
    chat = chat_format()
    chains = [
        Chain(Problem("1", "1 + 2 = ?", "3"), "a b", "3", strength=0.5),
        Chain(Problem("2", "1 + 2 = ?", "3"), "a b c d e f g h", "3"),
    ]
    first, second = examples(chains, chat)
    text = chat.tokenizer.decode(first.target_ids)
    assert list(first.prompt_ids) == chat.prompt_ids("1 + 2 = ?")
    assert chat.split(text.removesuffix("<eos>")) == ("a b", "3", True)
    assert first.target_ids[-1] == chat.tokenizer.eos_token_id
    assert (first.strength, second.strength) == (0.5, 1.0)
    assert len(second) == len(first) + 6
    asked = examples(chains, chat, prompt=lambda problem: f"h {problem.prompt}")
    assert len(asked[0].prompt_ids) == len(first.prompt_ids) + 1
    with pytest.warns(UserWarning, match="left out 1 of 2 chains"):
        assert len(examples(chains, chat, max_length=len(first))) == 1
    with pytest.raises(ThriftyError, match="longest of 2 has"):
        examples(chains, chat, max_length=3)
    with pytest.raises(ThriftyError, match="no chains"):
        examples([], chat)
    with pytest.raises(ThriftyError, match="end-of-sequence"):
        examples(chains, chat_format(eos=None))
