"""Preference objectives: equal to trl's, on pairs that stay together and apart from their neighbours."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from thrifty.contracts import Chain, Problem, ThriftyError
from thrifty.tune.adapter import lora
from thrifty.tune.batches import Example, Pair, bucketed, collate, packed, pairs
from thrifty.tune.logprobs import document_logprobs, kept, per_document, referenced, target_logprobs
from thrifty.tune.objective.dpo import DPO
from thrifty.tune.objective.nll import NLL
from thrifty.tune.objective.simpo import SimPO
from thrifty.tune.supervised import Train, train

trl = pytest.importorskip("trl")


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(dataclasses.replace(config, **changes)).eval()


def some_pairs(n=12, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        prompt = rng.integers(2, 64, rng.integers(2, 9))
        chosen, rejected = (Example(prompt, rng.integers(2, 64, rng.integers(1, 20))) for _ in range(2))
        made.append(Pair(chosen, rejected))
    return made


def plain_logprobs(model, example):
    """[len(target)], by the book: one document, all logits, log-softmax."""
    ids = torch.tensor(np.concatenate([example.prompt_ids, example.target_ids]))[None]
    with torch.no_grad():
        chances = model(ids).logits.log_softmax(-1)[0]
    at = torch.arange(len(example.prompt_ids), ids.shape[1])
    return chances[at - 1, ids[0, at]]


def trainer(cls, config, model, items, folder, parts=None, **more):
    """A trainer of trl's, without a data set: it is handed batches."""
    from datasets import Dataset

    from tiny import tokenizer

    plain = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}  # full precision
    args = config(output_dir=str(folder), per_device_train_batch_size=len(items), **plain, **more)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return cls(model=model, args=args, train_dataset=rows, processing_class=tokenizer(), **parts or {})


def padded(documents, fill=0):
    """input_ids, attention_mask, completion_mask ``[B, T]`` as trl's collator lays them out."""
    width = max(map(len, documents))
    shape = (len(documents), width)
    ids, mask, completion = (torch.full(shape, fill, dtype=torch.long) for _ in range(3))
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.tensor(np.concatenate([document.prompt_ids, document.target_ids]))
        mask[i, : len(document)] = 1
        completion[i, len(document.prompt_ids) : len(document)] = 1
    return ids, mask, completion


def step_loss(objective, model, items, layout="packed"):
    rows = packed(items, 64, 40) if layout == "packed" else bucketed(items, 64)
    assert len(rows) > 1
    losses, logs = zip(
        *(objective.loss(model, dataclasses.replace(collate(part), total=float(len(items))), 0, {}) for part in rows)
    )
    return sum(losses), {name: sum(one[name] for one in logs) for name in logs[0]}


# ------------------------------------------------------------------------------------------ log-probabilities


def test_logprobs_and_their_gradient_are_those_of_log_softmax():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64).float().requires_grad_()
    labels, weights = torch.tensor([0, 6, 3, 3, 1]), torch.randn(5)
    from thrifty.tune import logprobs

    chunk, logprobs.CHUNK = logprobs.CHUNK, 14  # three chunks
    try:
        mine = logprobs._Picked.apply(logits, labels, 1 / 0.7)
        (mine * weights).sum().backward()
    finally:
        logprobs.CHUNK = chunk
    got, logits.grad = logits.grad, None
    theirs = (logits / 0.7).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (theirs * weights).sum().backward()
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(got, logits.grad)


def test_documents_of_a_pair_neither_see_each_other_nor_their_neighbours():
    model, items = tiny(), some_pairs()
    documents = [document for pair in items for document in pair.documents]
    expected = [plain_logprobs(model, document) for document in documents]
    for found, by_the_book in zip(document_logprobs(model, documents, 64), expected):
        torch.testing.assert_close(torch.from_numpy(found), by_the_book, atol=2e-5, rtol=1e-4)
    sums = {id(d): e.sum() for d, e in zip(documents, expected)}
    for layout in (packed(items, 64, 40), bucketed(items, 64)):
        seen = 0
        for rows in layout:
            batch = collate(rows)
            with torch.no_grad():
                per = per_document(batch, target_logprobs(model, batch))
            torch.testing.assert_close(per, torch.stack([sums[id(d)] for d in batch.examples]), atol=1e-4, rtol=1e-4)
            for i in range(0, len(batch.examples), 2):
                assert any(batch.examples[i] is p.chosen and batch.examples[i + 1] is p.rejected for p in items)
                seen += 1
        assert seen == len(items)


def test_masked_tokens_are_left_out():
    model = tiny()
    example = Example([3, 4], [5, 6, 7], mask=[True, False, True])
    (found,) = document_logprobs(model, [example], 64)
    whole = plain_logprobs(model, example).numpy()
    assert kept(example).tolist() == [True, False, True]
    np.testing.assert_allclose(found, [whole[0], 0.0, whole[2]], atol=1e-5)


# ------------------------------------------------------------------------------------------------- against trl


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_dpo_equals_trl(tmp_path, layout):
    model, reference, items = tiny(0), tiny(1), some_pairs()
    theirs = trainer(trl.DPOTrainer, trl.DPOConfig, model, items, tmp_path, {"ref_model": reference}, beta=0.3)
    ids, mask, completion = padded([p.chosen for p in items] + [p.rejected for p in items])
    expected = theirs.compute_loss(
        theirs.model, {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    )
    loss, logs = step_loss(DPO(beta=0.3), tiny(0), referenced(tiny(1), items), layout)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert 0 < logs["preferred"] < 1
    (ours := tiny(0)).zero_grad()
    expected.backward()
    step_loss(DPO(beta=0.3), ours, referenced(tiny(1), items), layout)[0].backward()
    for mine, their in zip(ours.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(mine.grad, their.grad, atol=1e-4, rtol=1e-3)


def test_simpo_and_label_smoothing_equal_trl(tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, items = tiny(0), some_pairs()
    theirs = trainer(
        CPOTrainer, CPOConfig, model, items, tmp_path, loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=0.7
    )
    theirs.pad_token_id = 0  # the tokenizer's is beyond this vocabulary
    batch = {}
    for name in ("chosen", "rejected"):
        ids, mask, completion = padded([getattr(p, name) for p in items])
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}
        batch[f"{name}_labels"] = ids.masked_fill(completion == 0, -100)
    expected, _ = theirs.get_batch_loss_metrics(theirs.model, batch)
    loss, _ = step_loss(SimPO(beta=2.5, gamma=0.7), tiny(0), items)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    # trl's conservative form stands in CPO: with log-ratios in place of log-probabilities it is that of DPO.
    theirs.loss_type, theirs.label_smoothing = "sigmoid", 0.1
    chosen, rejected = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(
        DPO(beta=2.5, smoothing=0.1).per_pair(chosen, rejected), theirs.cpo_loss(chosen, rejected)[0]
    )


def test_values_worked_by_hand():
    # beta 0.1, log-ratios 3 and -2: margin 0.5; log(1 + exp(-0.5)) = 0.474077
    assert DPO().per_pair(torch.tensor(3.0), torch.tensor(-2.0)).item() == pytest.approx(0.474077, abs=1e-6)
    # the same pair the wrong way round: log(1 + exp(0.5)) = 0.974077; a tenth of it is mixed in
    smooth = 0.9 * 0.474077 + 0.1 * 0.974077
    assert DPO(smoothing=0.1).per_pair(torch.tensor(3.0), torch.tensor(-2.0)).item() == pytest.approx(smooth, abs=1e-6)
    # beta 2, gamma 1, means -0.5 and -1.5: log(1 + exp(-1)) = 0.313262
    assert SimPO().per_pair(torch.tensor(-0.5), torch.tensor(-1.5)).item() == pytest.approx(0.313262, abs=1e-6)


# ----------------------------------------------------------------------------------------------- in the loop


def test_dpo_trains_a_lora_from_log_2_and_resumes(tmp_path):
    model, items = lora(tiny(), rank=4, seed=1), some_pairs()
    settings = Train(steps=12, batch_size=6, tokens=64, lr=2e-2, save_every=5)
    result = train(model, items, settings, tmp_path, objective=DPO(beta=0.5))
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)  # at first the model is its own reference
    assert np.mean(result.losses[-2:]) < 0.45
    assert all(pair.chosen.reference is None for pair in items)  # the caller's pairs are left alone
    again = train(lora(tiny(), rank=4, seed=1), items, settings, tmp_path, objective=DPO(beta=0.5))
    assert again.losses == result.losses
    with pytest.raises(ThriftyError, match=r"sum of the starting weights was .*: set them back, or train"):
        train(model, items, settings, tmp_path, objective=DPO(beta=0.5))  # half trained, it is another reference


def test_simpo_trains_all_weights_and_the_layout_changes_nothing(tmp_path):
    losses = {
        layout: train(
            tiny(), some_pairs(), Train(steps=4, batch_size=8, tokens=64, lr=3e-3, layout=layout),
            tmp_path / layout, objective=SimPO(),
        ).losses
        for layout in ("packed", "bucketed")
    }  # fmt: skip
    assert losses["packed"] == pytest.approx(losses["bucketed"], rel=1e-4)
    assert losses["packed"][-1] < losses["packed"][0]


def test_examples_and_pairs_are_not_mistaken_for_each_other(tmp_path):
    with pytest.raises(ThriftyError, match="NLL is trained on Examples, not on Pairs"):
        train(tiny(), some_pairs(), Train(steps=1), tmp_path, objective=NLL())
    with pytest.raises(ThriftyError, match="SimPO is trained on Pairs, not on Examples"):
        train(tiny(), [Example([1], [2])], Train(steps=1), tmp_path, objective=SimPO())

    class Own:
        def next(self, step, feedback):
            return some_pairs()

        def state_dict(self):
            return {}

    with pytest.raises(ThriftyError, match=r"referenced\(model, pairs\)"):
        train(tiny(), Own(), Train(steps=1), tmp_path, objective=DPO())


def test_pairs_are_made_of_chains_of_one_problem():
    import tiny as model

    chat = model.chat()
    problems = [Problem(str(i), f"{i} + 1?", str(i + 1)) for i in range(3)]
    short = [Chain(p, "so", p.answer) for p in problems]
    long = [Chain(p, "so much more than that", p.answer) for p in problems]
    made = pairs(short, long, chat)
    assert [len(p.chosen) < len(p.rejected) for p in made] == [True] * 3
    assert all(np.array_equal(p.chosen.prompt_ids, p.rejected.prompt_ids) for p in made)
    assert all(d.target_ids[-1] == chat.tokenizer.eos_token_id for p in made for d in p.documents)
    with pytest.raises(ThriftyError, match="two problems, '0' and '2'"):
        pairs(short, long[::-1], chat)
    with pytest.raises(ThriftyError, match="3 chosen and 2 rejected"):
        pairs(short, long[:2], chat)
    with pytest.raises(ThriftyError, match="the longest of 3"):
        pairs(short, long, chat, max_length=5)
