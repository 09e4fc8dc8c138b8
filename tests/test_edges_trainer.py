"""Objectives in transformers' Trainer: the loss of the whole step, its own figures in the log, pairs as well."""

import copy
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

import tiny
from launched import two_processes
from thrifty.contracts import ThriftyError
from thrifty.edges.trainer import ObjectiveMixin, collator, to_batch
from thrifty.files import write_json
from thrifty.tune.batches import Example, Pair, collate
from thrifty.tune.logprobs import referenced
from thrifty.tune.objective.dpo import DPO
from thrifty.tune.objective.masked_thought_mft import MaskedThought
from thrifty.tune.objective.nll import NLL

torch.set_num_threads(1)


class ObjectiveTrainer(ObjectiveMixin, Trainer):
    pass


def documents(n=4, seed=0):
    """Of unlike length and weight, so that a mean of means is another loss."""
    rng = random.Random(seed)
    return [
        Example([rng.randrange(60) for _ in range(3)], [rng.randrange(60) for _ in range(2 + 5 * i)], weight=1 + i % 2)
        for i in range(n)
    ]


def settings(folder, **changes):
    return {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd",
        "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    } | changes  # fmt: skip


def arguments(folder, **changes):
    return TrainingArguments(**settings(folder, **changes))


def gradients(model, objective, items):
    """Of the loss over all ``items`` at once."""
    batch = collator(items)["batch"]
    model = copy.deepcopy(model).train()
    loss, logs = objective.loss(model, batch, 0, {})
    loss.backward()
    return loss.item(), logs, {name: p.grad for name, p in model.named_parameters()}


def pairs():
    rng = random.Random(1)
    drawn = [[[rng.randrange(60) for _ in range(3 + 4 * i)] for _ in "ab"] for i in range(4)]
    return [Pair(Example([1, 2, 3], good), Example([1, 2, 3], bad)) for good, bad in drawn]


@pytest.mark.parametrize("kind", ["examples", "pairs"])
def test_a_step_of_several_batches_is_the_loss_of_all_of_it(kind, tmp_path):
    model = tiny.model(64)
    objective = NLL() if kind == "examples" else DPO(beta=0.5)
    items = documents() if kind == "examples" else referenced(tiny.model(64, seed=1), pairs())
    loss, logs, expected = gradients(model, objective, items)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = ObjectiveTrainer(model, arguments(tmp_path), train_dataset=items, objective=objective)
    trainer.train()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * expected[name], atol=1e-5, rtol=1e-4)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(loss, abs=2e-4)
    assert {name: line[name] for name in logs} == pytest.approx(logs, abs=1e-4)
    assert kind == "examples" or {"preferred", "margin"} <= set(line)


def test_figures_are_means_over_the_steps_between_two_lines(tmp_path):
    trainer = ObjectiveTrainer(
        tiny.model(64), arguments(tmp_path, max_steps=4, logging_steps=2, learning_rate=0.0), train_dataset=documents(),
        objective=MaskedThought(rate=1.0),
    )  # fmt: skip
    trainer.train()
    masked = [line["masked"] for line in trainer.state.log_history if "masked" in line]
    tokens = sum(len(document.target_ids) for document in documents())
    # one token in 64 is replaced by itself
    assert masked == pytest.approx([tokens / sum(document.total for document in documents())] * 2, rel=0.1)


def test_figures_go_on_after_a_stop_and_in_a_second_training(tmp_path):
    def made(**changes):
        changes = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 0.0, **changes}
        rate = MaskedThought(rate=1.0)
        return ObjectiveTrainer(
            tiny.model(64), arguments(tmp_path, **changes), train_dataset=documents(), objective=rate
        )

    made(max_steps=2, save_strategy="steps").train()
    resumed = made()
    resumed.train(resume_from_checkpoint=True)
    expected = [line["masked"] for line in resumed.state.log_history if "masked" in line]
    assert len(expected) == 4
    assert expected == pytest.approx([expected[0]] * 4, rel=0.1)
    resumed.train()
    assert len([line for line in resumed.state.log_history if "masked" in line]) == 4


def test_evaluation_is_the_mean_of_each_batch(tmp_path):
    model, items = tiny.model(64), documents()
    trainer = ObjectiveTrainer(
        model, arguments(tmp_path, per_device_eval_batch_size=4), train_dataset=items, eval_dataset=items
    )
    expected, _, _ = gradients(model, NLL(), items)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "no mask"])
def test_rows_of_any_other_collator_become_the_same_batch(side):
    plain = [replace(document, weight=1.0) for document in documents()]
    width = max(map(len, plain))
    ids, labels, mask = (torch.full((4, width), fill) for fill in (0, -100, 0))
    for row, document in enumerate(plain):
        at = slice(width - len(document), width) if side == "left" else slice(0, len(document))
        whole = np.concatenate([document.prompt_ids, document.target_ids])
        ids[row, at], mask[row, at] = torch.from_numpy(whole), 1
        labels[row, at] = torch.tensor([-100] * 3 + list(document.target_ids))
    given = {"input_ids": ids, "labels": labels} | ({} if side == "no mask" else {"attention_mask": mask})
    found, expected = to_batch(given), collate([[document] for document in plain])
    for name in ("input_ids", "labels", "weights"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), check_dtype=False)
    assert found.total == sum(document.total for document in plain)


def test_labels_are_those_that_transformers_computes_the_same_loss_from():
    model, items = tiny.model(64), [replace(document, weight=1.0) for document in documents()]
    given = collator(items)
    theirs = model(input_ids=given["input_ids"], labels=given["labels"]).loss
    ours, _ = NLL().loss(model, given["batch"], 0, {})
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


@pytest.mark.slow
def test_trls_sft_trainer_computes_the_same_loss_without_and_with_it(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class ObjectiveSFTTrainer(ObjectiveMixin, trl.SFTTrainer):
        pass

    rows = [{"prompt": f"{i} + {i} =", "completion": " and" * i + f" {2 * i}"} for i in range(4)]
    lines = []
    for kind, more in ((trl.SFTTrainer, {}), (ObjectiveSFTTrainer, {"objective": NLL()})):
        tokenizer = tiny.tokenizer("none")
        args = trl.SFTConfig(
            **settings(tmp_path), bf16=False, gradient_checkpointing=False, max_length=64,
        )  # fmt: skip
        trainer = kind(
            tiny.model(len(tokenizer)), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more
        )
        trainer.train()
        lines.append(trainer.state.log_history[0])
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-3)
    assert lines[1]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-3)


def test_data_of_another_kind_than_the_objectives_is_refused(tmp_path):
    def begun(**changes):
        return ObjectiveTrainer(tiny.model(64), arguments(tmp_path), **changes)

    for data in (pairs(), tuple(pairs())):
        with pytest.raises(ThriftyError, match="NLL is trained on Examples, not on Pairs"):
            begun(train_dataset=data).train()
    with pytest.raises(ThriftyError, match="DPO is trained on Pairs, not on Examples"):
        begun(train_dataset=documents(), objective=DPO(), data_collator=collator).train()

    def rows(items):
        return {name: value for name, value in collator(items).items() if name != "batch"}

    with pytest.raises(ThriftyError, match="DPO is trained on pairs, and this data_collator's rows have no partners"):
        begun(train_dataset=documents(), objective=DPO(), data_collator=rows).train()


def trained(folder, batch_size=2):
    model = tiny.model(64)
    data = referenced(model, pairs())
    changes = {"max_steps": 3, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 1}
    trainer = ObjectiveTrainer(model, arguments(folder, **changes), train_dataset=data, objective=DPO())
    trainer.train()
    if trainer.accelerator.is_main_process:
        write_json(Path(folder) / "history.json", trainer.state.log_history)
        save_file(dict(model.named_parameters()), Path(folder) / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "two").mkdir()
    two_processes("test_edges_trainer", "t.trained(sys.argv[1])", tmp_path / "two")
    (tmp_path / "one").mkdir()
    trained(tmp_path / "one", batch_size=4)
    one, two = (json.loads((tmp_path / name / "history.json").read_text())[:3] for name in ("one", "two"))
    for name in ("loss", "grad_norm", "preferred"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4), name
    theirs = load_file(tmp_path / "one" / "weights.safetensors")
    for name, value in load_file(tmp_path / "two" / "weights.safetensors").items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4)


def test_what_a_trainer_cannot_train_is_refused(tmp_path):
    @dataclass(frozen=True)
    class WithHead(NLL):
        def modules(self, model):
            return {"head": nn.Linear(2, 2)}

    with pytest.raises(ThriftyError, match=r"parts of its own \(head\).*supervised.train"):
        ObjectiveTrainer(tiny.model(64), arguments(tmp_path), train_dataset=documents(), objective=WithHead())
    with pytest.raises(ThriftyError, match="strength of their own"):
        to_batch(collator([replace(documents()[0], strength=0.5)]))
    with pytest.raises(ThriftyError, match="not dict: make some, or give a data_collator"):
        collator([{"text": "hello"}])
    ids = torch.arange(6)[None]
    with pytest.raises(ThriftyError, match="turn packing and padding_free off"):
        to_batch({"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})
    with pytest.raises(ThriftyError, match=r"no labels \(it has: input_ids\)"):
        to_batch({"input_ids": ids})
