"""Adapters as peft methods: what they compute and train; nothing is lost in saving, loading and merging."""

import random

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn

import tiny
from thrifty.contracts import ThriftyError
from thrifty.models.strength import strengths
from thrifty.tune.adapter import load_adapter, lora, save_adapter
from thrifty.tune.adapter.eva import EVA
from thrifty.tune.adapter.lora_sb import LoraSB, LoraSBLayer, factors, gradients
from thrifty.tune.adapter.pissa import PiSSA
from thrifty.tune.adapter.plain_lora import PlainLora
from thrifty.tune.adapter.ssf import SSF, SSFConfig, SSFLayer
from thrifty.tune.batches import Example, bucketed, collate
from thrifty.tune.supervised import NoHook, Train, train

torch.set_num_threads(1)
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
METHODS = {
    "pissa": PiSSA(rank=4),
    "pissa-fast": PiSSA(rank=4, alpha=8, iterations=4),
    "pissa-whole": PiSSA(rank=128),
    "eva": EVA(rank=4),
    "lora-sb": LoraSB(rank=4, lr=0.1, warmup=10),
    "ssf": SSF(),
    "ssf-scale": SSF(shift=False),
    "ssf-shift": SSF(scale=False),
}


def documents():
    rng = random.Random(0)
    return [Example([rng.randrange(60) for _ in range(4)], [rng.randrange(60) for _ in range(12)]) for _ in range(16)]


def batches():
    return [collate(rows) for rows in bucketed(documents(), 128)]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


def moved(model, by=0.05):
    """The model with its trained weights somewhere else."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=draw)
    return model


# ------------------------------------------------------------------------------------------ every adapter


def test_nothing_is_lost_in_saving_loading_turning_off_and_merging(method, tmp_path):
    base = logits(tiny.model(64))
    model = moved(method.attach(tiny.model(64), batches()))
    tuned = logits(model)
    assert (tuned - base).abs().max() > 0.05
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny.model(64), folder)
    torch.testing.assert_close(logits(loaded), tuned, atol=1e-4, rtol=0)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), base, atol=1e-4, rtol=0)
    folded = method.fold(model)
    assert not isinstance(folded, PeftModel)
    torch.testing.assert_close(logits(folded), tuned, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", [key for key in METHODS if key != "pissa-fast"])
def test_peft_alone_saves_and_loads_it(key, tmp_path):
    model = moved(METHODS[key].attach(tiny.model(64), batches()))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny.model(64), str(tmp_path / "valve"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", ["lora-sb", "ssf", "ssf-shift"])
def test_unmerging_brings_the_very_same_weights_back(key):
    method = METHODS[key]
    model = moved(method.attach(tiny.model(64), batches()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_only_the_adapter_is_trained_and_the_loop_saves_it(method, tmp_path):
    model = method.attach(tiny.model(64), batches())
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "base_layer" in name or "embed" in name]
    result = train(model, documents(), Train(steps=4, batch_size=8, lr=0.02), tmp_path / "run")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained
    assert result.losses[-1] < result.losses[0]
    loaded = load_adapter(tiny.model(64), result.trained)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)


def test_what_an_adapter_holds_fixed_goes_on_with_its_weights(tmp_path):
    class Break(NoHook):
        def before_step(self, state):
            if state.step == 2:
                raise KeyboardInterrupt

    def run(folder, seen, *hooks):
        model, settings = tiny.model(64), Train(steps=4, batch_size=8, lr=0.02, save_every=1)
        return train(LoraSB(rank=2).attach(model, seen), documents(), settings, tmp_path / folder, hooks=hooks).losses

    with pytest.raises(KeyboardInterrupt):
        run("broken", batches(), Break())
    other = [collate([[Example([7] * 4, [8] * 12)]])]  # from which it would begin elsewhere
    assert run("broken", other, NoHook()) == pytest.approx(run("whole", batches()), abs=1e-5)


def test_a_start_depends_on_its_seed_alone(method):
    torch.manual_seed(5)
    one = logits(method.attach(tiny.model(64), batches()))
    model = tiny.model(64)
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    two = logits(method.attach(model, batches()))
    assert torch.equal(one, two)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are left alone"


def test_a_second_adapter_and_one_of_no_kind_are_refused(method, tmp_path):
    model = method.attach(tiny.model(64), batches())
    with pytest.raises(ThriftyError, match="carries an adapter already"):
        method.attach(model, batches())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NO_SUCH_KIND"}')
    with pytest.raises(ThriftyError, match="NO_SUCH_KIND"):
        load_adapter(tiny.model(64), tmp_path)
    with pytest.raises(ThriftyError, match="no adapter to fold"):
        method.fold(tiny.model(64))


@pytest.mark.parametrize("key", ["pissa", "eva", "pissa-fast"])
def test_starts_that_train_a_lora_leave_the_model_as_it_was_and_save_a_plain_lora(key, tmp_path):
    base = logits(tiny.model(64))
    model = METHODS[key].attach(tiny.model(64), batches())
    torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=0)
    folder = save_adapter(moved(model), tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny.model(64), str(folder))
    assert model.peft_config["default"].init_lora_weights is True
    assert model.peft_config["default"].peft_type == "LORA"
    with model.disable_adapter():
        assert torch.equal(logits(model), base), "a plain LoRA leaves the base alone"


@pytest.mark.parametrize("key", ["lora-sb", "ssf", "ssf-shift"])
def test_every_row_has_a_strength_of_its_own(key):
    base = logits(tiny.model(64))
    model = moved(METHODS[key].attach(tiny.model(64), batches()))
    full = logits(model)
    with strengths(model, {"valve": torch.tensor([0.0, 1.0])}):
        dialled = logits(model)
    torch.testing.assert_close(dialled[0], base[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(dialled[1], full[1], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ each one


def test_pissa_takes_the_principal_part_out_of_each_weight():
    before = tiny.model(64).model.layers[0].mlp.up_proj.weight
    model = PiSSA(rank=3).attach(tiny.model(64), [])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    pair = layer.lora_B["valve"].weight @ layer.lora_A["valve"].weight
    s = torch.linalg.svdvals(before)
    torch.testing.assert_close(torch.linalg.svdvals(pair)[:3], s[:3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[: len(s) - 3], s[3:], atol=1e-4, rtol=1e-4)


def inputs_of(name):
    seen = []
    model = tiny.model(64)
    model.get_submodule(name).register_forward_hook(lambda m, given, out: seen.append(given[0].detach()))
    for batch in batches():
        model(**batch.inputs)
    return torch.cat([x[batch.weights != 0] for x, batch in zip(seen, batches())])


def test_eva_spans_the_directions_in_which_inputs_vary_most_and_shares_the_ranks_out():
    model = EVA(rank=4).attach(tiny.model(64), batches())
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    ranks = [len(layer.lora_A["valve"].weight) for layer in layers.values()]
    assert sum(ranks) == 4 * 14, "the budget is layers * rank"
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8
    for layer in layers.values():
        assert layer.scaling["valve"] == pytest.approx(1 / 4)
        a = layer.lora_A["valve"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-3, rtol=0)
        assert not layer.lora_B["valve"].weight.any()
    name = "model.layers.0.mlp.down_proj"
    a, x = layers[name].lora_A["valve"].weight, inputs_of(name)
    x = x - x.mean(0)
    exact = torch.linalg.svdvals(x)[: len(a)].square().sum()
    assert (x @ a.T).square().sum() > 0.97 * exact


def test_eva_says_what_it_lacks():
    with pytest.raises(ThriftyError, match="at most 0 target tokens"):
        EVA().attach(tiny.model(64), [])
    with pytest.raises(ThriftyError, match="in 32 inputs"):
        EVA(rank=20).attach(tiny.model(64), batches())


def test_lora_sb_starts_at_the_best_copy_of_the_first_full_step():
    model = tiny.model(64)
    name = "model.layers.1.self_attn.o_proj"
    weight = model.get_submodule(name).weight
    for batch in batches():
        flat = model(**batch.inputs).logits[batch.weights != 0]
        nn.functional.cross_entropy(flat, batch.labels[batch.weights != 0]).backward()
    expected = weight.grad.clone()
    found = gradients(tiny.model(64), [name], batches(), samples=50)
    torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
    adapted = LoraSB(rank=4, lr=0.1, warmup=10).attach(tiny.model(64), batches())
    delta = adapted.get_base_model().get_submodule(name).get_delta_weight("valve")
    u, s, vt = torch.linalg.svd(-0.01 * expected.sign())
    torch.testing.assert_close(delta, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5, rtol=1e-4)


def test_lora_sb_trains_r_by_r_values_and_its_gradient_is_the_closest_to_the_full_one():
    model = LoraSB(rank=4, lr=0.1, warmup=10).attach(tiny.model(64), batches())
    layers = [m for m in model.modules() if isinstance(m, LoraSBLayer)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 * len(layers) == 16 * 14
    layer = layers[0]
    a, b = layer.lora_sb_A["valve"], layer.lora_sb_B["valve"]
    layer.base_layer.weight.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    full = layer.base_layer.weight.grad
    closest = torch.linalg.lstsq(torch.kron(b, a.T.contiguous()), full.flatten()[:, None]).solution.view(4, 4)
    torch.testing.assert_close(layer.lora_sb_R["valve"].grad, closest, atol=1e-5, rtol=1e-3)


def test_lora_sb_stops_after_its_samples_and_leaves_the_model_as_it_found_it():
    model = tiny.model(64)
    model.lm_head.requires_grad_(False)
    first = gradients(model, ["model.layers.0.mlp.up_proj"], batches()[:1], samples=50)
    again = gradients(model, ["model.layers.0.mlp.up_proj"], batches(), samples=1)
    torch.testing.assert_close(first, again)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ThriftyError, match="starts from gradients"):
        LoraSB().attach(model, [])


def test_lora_sb_may_start_as_lora_xs_or_anywhere():
    base = logits(tiny.model(64))
    for start in ("weights", "random"):
        model = LoraSB(rank=4, start=start).attach(tiny.model(64), [])
        torch.testing.assert_close(logits(model), base, atol=1e-4, rtol=0)
        layer = next(m for m in model.modules() if isinstance(m, LoraSBLayer))
        spans = layer.lora_sb_B["valve"] @ layer.lora_sb_A["valve"]
        u, s, vt = torch.linalg.svd(layer.base_layer.weight.detach(), full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        assert torch.allclose(spans, best, atol=1e-4) == (start == "weights")
    with pytest.raises(ThriftyError, match="update, weights or random"):
        LoraSB(start="zero").attach(tiny.model(64), [])


def test_lora_sb_becomes_an_exact_lora_of_its_rank():
    model = moved(LoraSB(rank=4, lr=0.1, warmup=10).attach(tiny.model(64), batches()))
    config, state = convert_to_lora(model, rank=4, adapter_name="valve")
    plain = lora(tiny.model(64), rank=4, alpha=4, name="default")
    assert config.r == 4
    missing = plain.load_state_dict(
        {k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False
    )
    assert not missing.unexpected_keys
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-3, rtol=0)


def test_factors_of_large_matrices_are_found_by_a_randomised_svd():
    torch.manual_seed(0)
    low = torch.randn(1100, 3) @ torch.randn(3, 1030)
    a, r, b = factors(low.sign(), rank=2)
    s = torch.linalg.svdvals(low.sign())
    torch.testing.assert_close(r.diagonal(), s[:2], rtol=2e-2, atol=0)
    torch.testing.assert_close(b.T @ b, torch.eye(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(a @ a.T, torch.eye(2), atol=1e-4, rtol=0)


def test_ssf_trains_two_values_per_channel_and_one_behind_norms_without_bias():
    model = tiny.model(64)
    channels = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    attached = SSF().attach(model, [])
    assert sum(p.numel() for p in attached.parameters() if p.requires_grad) == 2 * channels + norms
    alone = SSF(norms=False, targets="q_proj,down_proj").attach(tiny.model(64), [])
    assert sum(p.numel() for p in alone.parameters() if p.requires_grad) == 2 * 2 * (64 + 32)


def test_ssf_keeps_no_more_for_the_backward_pass_than_lora():
    def kept(method):
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = method.attach(tiny.model(64), batches()).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(IDS.repeat(8, 4)).logits.sum()
        return sum(sizes.values())

    assert kept(SSF()) <= 1.02 * kept(PlainLora(rank=1))


@pytest.mark.parametrize("frozen", [True, False], ids=["merged for the product", "computed again"])
@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "scaled alone"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_ssf_has_the_gradients_of_its_formula(frozen, shift, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 2, bias=bias).requires_grad_(False), torch.randn(2, 5, 3, requires_grad=True)
    next(reversed(list(linear.parameters()))).requires_grad_(not frozen)
    layer = SSFLayer(linear, "default", SSFConfig(shift=shift, spread=0.5))
    learnt = [layer.ssf_scale["default"], *layer.ssf_shift.values(), *linear.parameters()]
    wanted = [x, *(p for p in learnt if p.requires_grad)]
    scaled = (1 + layer.ssf_scale["default"]) * linear(x) + (layer.ssf_shift["default"] if shift else 0)
    made = layer(x)
    torch.testing.assert_close(made, scaled)
    expected = torch.autograd.grad(scaled.square().sum(), wanted)
    for one, other in zip(torch.autograd.grad(made.square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_strength_is_that_of_the_forward_pass_wherever_backward_is_called():
    def gradients(inside):
        model = moved(SSF().attach(tiny.model(64), []))
        with strengths(model, {"valve": torch.tensor([0.3, 0.7])}):
            loss = model(IDS[:2]).logits.square().mean()
            if inside:
                loss.backward()
        if not inside:
            with strengths(model, {"valve": torch.tensor([0.0, 1.0])}):
                loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)


def test_ssf_starts_near_one_and_zero():
    model = SSF(spread=0.02).attach(tiny.model(64), [])
    scales = torch.cat([p.flatten() for n, p in model.named_parameters() if "ssf_scale" in n])
    assert float(scales.detach().mean()) == pytest.approx(0.0, abs=0.003)
    assert float(scales.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_ssf_merges_into_a_layer_norm_with_bias_and_leaves_other_norms_alone():
    norm = nn.LayerNorm(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = SSFLayer(norm, "default", SSFConfig(spread=0.5))
    x = torch.randn(2, 4)
    tuned = layer(x)
    layer.merge()
    torch.testing.assert_close(norm(x), tuned)

    class OnePlus(nn.RMSNorm):
        def forward(self, x):
            return nn.functional.rms_norm(x, (4,)) * (1 + self.weight)

    model = tiny.model(64)
    model.model.norm = OnePlus(32)
    adapted = SSF().attach(model, [])
    assert isinstance(adapted.get_base_model().model.norm, OnePlus)
    assert isinstance(adapted.get_base_model().model.layers[0].input_layernorm, SSFLayer)


def test_ssf_without_anything_to_train_is_refused():
    with pytest.raises(ThriftyError, match="neither scale nor shift"):
        SSF(scale=False, shift=False).attach(tiny.model(64), [])
