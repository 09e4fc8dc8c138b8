"""The supervised loop: it learns, saves what peft and transformers load, and goes on after every kind of end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3Config

from launched import two_processes
from thrifty.contracts import ThriftyError
from thrifty.engines.meter import Meter, active_parameters
from thrifty.tune import checkpoint
from thrifty.tune.adapter import load_adapter, lora, save_adapter
from thrifty.tune.batches import Example, collate
from thrifty.tune.objective.nll import NLL
from thrifty.tune.supervised import NoHook, Train, learning_rate, train

SETTINGS = Train(steps=20, batch_size=12, tokens=96, row=40, lr=1e-2, save_every=5, clip=0.5)


def tiny():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def adapted(dropout=0.0):
    return lora(tiny(), rank=4, dropout=dropout, seed=1)


def documents(n=40, seed=0):
    """Reversal: the target is the prompt backwards, then 1."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        prompt = rng.integers(2, 64, rng.integers(3, 9))
        made.append(Example(prompt, np.append(prompt[::-1], 1), strength=float(rng.choice([0.5, 1.0]))))
    return made


class Curriculum:
    """A source with state: it moves on when the last step's loss says so."""

    def __init__(self):
        self.docs, self.at = documents(), 0

    def next(self, step, feedback):
        self.at += 7 if feedback.get("loss", 9.0) < 4.1 else 3
        return [self.docs[(self.at + i) % len(self.docs)] for i in range(12)]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Momentum(NoHook):
    """A hook with state: adds its running mean of the gradients. ``end`` is called after that many steps' backward."""

    def __init__(self, end=None, at=12):
        self.mean, self.end, self.at = {}, end, at

    def after_backward(self, state):
        for name, p in state.model.named_parameters():
            if p.grad is not None:
                self.mean[name] = 0.9 * self.mean.get(name, 0.0) + 0.1 * p.grad
                p.grad += 0.3 * self.mean[name]
        if self.end and state.step + 1 == self.at:
            self.end()

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def run(folder, end=None, model=None):
    return train(model or adapted(dropout=0.1), Curriculum(), SETTINGS, folder, hooks=[Momentum(end)])


def run_elsewhere(call, folder, *prefix, **environment):
    """Call a function of this file in a process of its own."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import conftest, test_supervised as t; t.{call}"
    command = [*prefix, sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=290, env={**os.environ, **environment})


def adapter_weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def assert_same(result, expected):
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)
    theirs = adapter_weights(expected.folder)
    for name, weight in adapter_weights(result.folder).items():
        torch.testing.assert_close(weight, theirs[name])


# ------------------------------------------------------------------------------------------------ learning


def test_lora_learns_and_peft_loads_it(tmp_path):
    docs = [Example(d.prompt_ids[:3], d.prompt_ids[2::-1]) for d in documents()]
    model, before = adapted(), {k.replace(".base_layer", ""): v.clone() for k, v in tiny().named_parameters()}
    seen = []
    settings = Train(epochs=30, batch_size=20, lr=2e-2)
    result = train(model, docs, settings, tmp_path / "run", progress=lambda *line: seen.append(line))
    assert result.steps == 60 == len(result.losses)
    assert np.mean(result.losses[-5:]) < 0.7 * np.mean(result.losses[:5])
    assert result.tokens == 60 * 20 * 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61)) == [at for at, _, _ in seen]
    assert {"loss", "lr", "tokens", "seconds", "grad_norm"} <= set(lines[0])
    for name, weight in model.get_base_model().named_parameters():  # the base has not moved
        if "lora" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
    loaded = PeftModel.from_pretrained(tiny(), result.trained).eval()
    ids = collate([[docs[0]]]).input_ids
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert not torch.allclose(loaded(ids).logits, tiny().eval()(ids).logits, atol=1e-2)


def test_all_weights_train_and_transformers_loads_them(tmp_path):
    model = tiny().eval()
    result = train(model, [Example(d.prompt_ids, d.target_ids) for d in documents()], Train(steps=8, lr=1e-2), tmp_path)
    assert result.losses[-1] < result.losses[0]
    assert not model.training  # as it was handed over
    loaded = AutoModelForCausalLM.from_pretrained(result.trained)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_adapters_of_several_names_live_side_by_side(tmp_path):
    model = lora(adapted(), rank=2, name="second")
    assert model.active_adapters == ["second"]
    with pytest.raises(ThriftyError, match="already carries"):
        lora(model, name="second")
    folder = save_adapter(model, tmp_path / "a", "second")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_adapter(tiny(), folder, "third").active_adapters == ["third"]
    with pytest.raises(ThriftyError, match=r"no adapter_config\.json"):
        load_adapter(tiny(), tmp_path)
    with pytest.raises(ThriftyError, match="nonsense"):
        lora(tiny(), targets=["nonsense"])


def test_layout_and_split_change_nothing(tmp_path):
    def losses(**changes):
        settings = Train(**{"steps": 5, "batch_size": 12, "lr": 1e-2, **changes})
        folder = tmp_path / "-".join(map(str, changes.values()))
        return train(adapted(), documents(), settings, folder).losses

    whole = losses(layout="bucketed", tokens=4096)
    for changes in (
        {"layout": "bucketed", "tokens": 30},
        {"layout": "packed", "tokens": 64, "row": 32},
        {"layout": "auto"},
    ):
        assert losses(**changes) == pytest.approx(whole, rel=1e-4)


def test_the_meter_counts_what_was_trained_on(tmp_path):
    meter, docs = Meter(), documents()
    result = train(
        adapted(), docs, Train(steps=3, batch_size=10, layout="bucketed", tokens=10**6), tmp_path, meter=meter
    )
    ((key, row),) = meter.rows().items()
    assert key == ("train", "main")
    assert row.positions - row.padding == result.tokens > 0
    assert row.padding > 0
    assert row.backward == row.positions
    assert row.forwards == 3


def test_learning_rate_warms_up_and_falls():
    settings = Train(lr=1.0, warmup=0.2, floor=0.1)
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.55)  # half-way down: floor + (1 - floor) / 2
    assert learning_rate(settings, 10, 10) == pytest.approx(0.1)
    assert learning_rate(Train(lr=1.0, warmup=0, schedule="constant"), 9, 10) == 1.0
    assert learning_rate(Train(lr=1.0, warmup=0, schedule="linear"), 5, 10) == pytest.approx(0.5)


class Auxiliary(NLL):
    """An objective with a part of its own: a head that predicts the prompt's length from the last hidden state."""

    def __init__(self):
        torch.manual_seed(5)
        object.__setattr__(self, "head", torch.nn.Linear(64, 1))

    def modules(self, model):
        return {"head": self.head}

    def loss(self, model, batch, step, modules):
        loss, _ = super().loss(model, batch, step, modules)
        guess = modules["head"](model(**batch.inputs).logits[batch.weights != 0])
        extra = (guess - 3.0).square().sum() / batch.total
        return loss + extra, {"extra": extra.item()}


def test_an_objective_trains_and_resumes_its_own_parts(tmp_path):
    objective, again = Auxiliary(), Auxiliary()
    before = objective.head.weight.detach().clone()
    settings = Train(steps=6, batch_size=10, lr=1e-2)
    result = train(adapted(), documents(), settings, tmp_path, objective=objective)
    assert not torch.allclose(objective.head.weight, before, atol=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["extra"] < lines[0]["extra"]
    assert train(adapted(), documents(), settings, tmp_path, objective=again).losses == result.losses
    assert torch.equal(again.head.weight, objective.head.weight)


@pytest.mark.parametrize("attach", [True, False])
def test_bfloat16_models_train_in_their_own_type(tmp_path, attach):
    model = tiny().to(torch.bfloat16)
    model = lora(model, rank=4, seed=1) if attach else model
    docs = documents() if attach else [Example(d.prompt_ids, d.target_ids) for d in documents()]
    losses = train(model, docs, Train(steps=10, batch_size=20, lr=1e-2), tmp_path).losses
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    base = model.get_base_model() if attach else model
    assert base.model.norm.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- going on


def test_kill_9_and_again_gives_the_same_curve(tmp_path, uninterrupted):
    ended = run_elsewhere("run(sys.argv[1], end=lambda: t.os.kill(t.os.getpid(), t.signal.SIGKILL))", tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 11
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000010"
    left = tmp_path / "checkpoints" / ".step-00000015.99"  # as a kill in the middle of writing leaves it
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    assert_same(run(tmp_path), uninterrupted)
    assert not left.exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000015", "step-00000020"]
    assert [p.suffix for p in sorted((tmp_path / "checkpoints" / "step-00000020").iterdir())] == [
        ".json",
        ".safetensors",
    ]


def test_a_finished_run_is_not_trained_again(uninterrupted):
    model = adapted(dropout=0.1)
    again = run(uninterrupted.folder, end=lambda: pytest.fail("trained again"), model=model)
    assert again == uninterrupted
    theirs = adapter_weights(uninterrupted.folder)
    assert all(torch.equal(p, theirs[n.replace(".valve", "")]) for n, p in model.named_parameters() if p.requires_grad)


def test_a_finished_run_says_what_it_cost(uninterrupted):
    cost = checkpoint.cost(uninterrupted.folder)
    assert cost["trained_parameters"] == sum(w.numel() for w in adapter_weights(uninterrupted.folder).values())
    assert (cost["training_tokens"], cost["training_seconds"]) == (uninterrupted.tokens, uninterrupted.seconds)
    least = 6 * active_parameters(adapted().get_base_model()) * uninterrupted.tokens  # padding comes on top
    assert least <= cost["training_flops"] <= 2 * least


def test_training_leaves_no_hook_on_the_model(tmp_path):
    model = adapted()
    run(tmp_path, model=model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ctrl_c_finishes_the_step_saves_and_goes_on(tmp_path, uninterrupted, capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 12 of 20; run the same command again"):
        run(tmp_path, end=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000012"
    assert_same(run(tmp_path), uninterrupted)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Spoil(NoHook):
        def before_step(self, state):
            if state.step == 7:
                with torch.no_grad():
                    next(p for p in state.model.parameters() if p.requires_grad).fill_(torch.nan)

    with pytest.raises(
        ThriftyError, match=r"loss is nan at step 8 \(learning rate .*step-00000005 is as it was.*Lower lr"
    ):
        train(adapted(), documents(), SETTINGS, tmp_path, hooks=[Spoil()])
    good = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))
    assert good["step"] == 5
    assert all(bool(w.isfinite().all()) for w in good["weights"].values())
    assert not (tmp_path / "adapter").exists()


def fill_the_disk(folder):
    os.makedirs(folder, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    try:
        train(adapted(), documents(), SETTINGS, folder, hooks=[Fill(folder)])
    except ThriftyError as error:
        state = checkpoint.load(checkpoint.latest(Path(folder) / "checkpoints"))
        print(json.dumps({"error": str(error), "kept": state["step"]}))


def test_what_a_hook_draws_as_it_starts_follows_from_the_seed(tmp_path):
    drawn = []

    class Draws(NoHook):
        def start(self, state):
            drawn.append(torch.rand(3).tolist())

    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        train(adapted(), documents(), Train(steps=1, seed=seed), tmp_path / str(number), hooks=[Draws()])
    assert drawn[0] == drawn[1] != drawn[2]


class Fill(NoHook):
    def __init__(self, folder):
        self.folder = folder

    def before_step(self, state):
        if state.step == 6:
            with open(Path(self.folder) / "ballast", "wb") as file:
                file.write(b"0" * 130_000)


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode != 0,
    reason="needs a mount namespace for a small disk",
)
def test_a_full_disk_says_so_and_keeps_the_last_good_checkpoint(tmp_path):
    ended = run_elsewhere("fill_the_disk(sys.argv[1])", tmp_path / "small", "unshare", "-rm")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1])
    assert "no space left on the disk while writing" in said["error"]
    assert "step-00000010" in said["error"]
    assert said["kept"] == 5


def test_a_full_disk_is_recognised_and_other_faults_are_not():
    with pytest.raises(ThriftyError, match="no space left on the disk while writing log"), checkpoint.disk("log"):
        Path("/dev/full").write_text("x")
    with pytest.raises(FileNotFoundError), checkpoint.disk("log"):
        Path("/nowhere/at/all").write_text("x")


def test_checkpoints_hold_any_nested_state(tmp_path):
    state = {"a": [1, 2.5, None, "x"], "b": {0: {"m": torch.eye(2)}, "t": np.arange(3)}, "c": (True, {})}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, state))
    assert loaded["a"] == state["a"]
    assert torch.equal(loaded["b"][0]["m"], torch.eye(2))
    assert loaded["b"]["t"].tolist() == [0, 1, 2]
    assert loaded["c"] == [True, {}]
    damaged = tmp_path / "step-00000003" / "state.json"
    damaged.write_text(damaged.read_text()[:10])
    with pytest.raises(ThriftyError, match=r"step-00000003 cannot be read .* delete that folder"):
        checkpoint.load(tmp_path / "step-00000003")


# --------------------------------------------------------------------------------------------- bad input


def test_a_changed_set_up_is_refused_not_mixed(tmp_path, uninterrupted):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted.folder, folder)
    hooks = [Momentum()]
    with pytest.raises(ThriftyError, match=r"other settings \(lr was 0.01, is 0.1; steps was 20, is 30\)"):
        train(adapted(), Curriculum(), Train(**{**vars(SETTINGS), "steps": 30, "lr": 0.1}), folder, hooks=hooks)
    with pytest.raises(ThriftyError, match="other trained weights"):
        train(lora(tiny(), rank=2), Curriculum(), SETTINGS, folder, hooks=hooks)
    with pytest.raises(ThriftyError, match="1 hooks, not 0"):
        train(adapted(), Curriculum(), SETTINGS, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"steps": 0}, "0 steps is nothing to do"),
        ({"lr": 0.0}, "above 0"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ThriftyError, match=message):
        train(adapted(), documents(), Train(**{"steps": 2, **changes}), tmp_path)


@pytest.mark.parametrize(
    ("docs", "message"),
    [
        ([], "list of examples is empty"),
        ([Example([1, 2], [])], "none of the 64 examples"),
        ([Example([1], [2, 70])], "token id 70 is beyond the model's vocabulary of 64"),
        ([Example([1], [2] * 200)], "has 201 tokens, the model's context 128"),
    ],
)
def test_bad_examples(tmp_path, docs, message):
    with pytest.raises(ThriftyError, match=message):
        train(adapted(), docs, Train(steps=2), tmp_path)


def test_bad_models(tmp_path):
    with pytest.raises(ThriftyError, match="attach a LoRA first"):
        train(tiny(), documents(), Train(steps=2), tmp_path)
    with pytest.raises(ThriftyError, match="nothing to train"):
        train(tiny().requires_grad_(False), documents(), Train(steps=2), tmp_path)
    with pytest.raises(ThriftyError, match="rank is 0"):
        lora(tiny(), rank=0)


# ------------------------------------------------------------------------------------------- two processes


class Telling(NLL):
    """Logs its loss, which the loop adds up over batches and processes."""

    def loss(self, *args):
        loss, logs = super().loss(*args)
        return loss, {**logs, "told": loss.item()}


def test_two_processes_train_as_one(tmp_path):
    call = "t.train(t.adapted(), t.documents(), t.SETTINGS, sys.argv[1], t.Telling())"
    two_processes("test_supervised", call, tmp_path / "two")
    two = [json.loads(line) for line in (tmp_path / "two" / "train.jsonl").read_text().splitlines()]
    one = train(adapted(), documents(), SETTINGS, tmp_path / "one")
    assert [line["loss"] for line in two] == pytest.approx(one.losses, rel=1e-4)
    assert [line["told"] for line in two] == pytest.approx(one.losses, rel=1e-4)
    theirs = adapter_weights(tmp_path / "one")
    for name, weight in adapter_weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-3)
