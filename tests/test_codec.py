"""ComPEFT: what is kept of an update, the exact round trip of its code, and its size against the entropy."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from thrifty.cli import app
from thrifty.contracts import ThriftyError
from thrifty.tune.adapter import lora, save_adapter
from thrifty.weights.codec.compeft import ComPEFT, golomb, remainder_bits, task_vector, ungolomb


def update(n=40_000, seed=0, spread=1e-3):
    torch.manual_seed(seed)
    half = n // 2
    return {"b": spread * torch.randn(half // 10, 10), "a.weight": spread * torch.randn(n - half).to(torch.bfloat16)}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9])
def test_the_round_trip_is_exact(density):
    codec, state = ComPEFT(density=density, alpha=2.0), update()
    decoded, expected = codec.decode(codec.encode(state)), codec.quantised(state)
    assert list(decoded) == ["b", "a.weight"]
    for name, value in expected.items():
        assert torch.equal(decoded[name], value)
        assert (decoded[name].dtype, decoded[name].shape) == (state[name].dtype, state[name].shape)
    assert codec.encode(state) == codec.encode(state)


def test_the_largest_entries_of_the_whole_update_are_kept_at_one_size():
    state = update()
    flat = torch.cat([value.float().flatten() for value in state.values()])
    made = torch.cat([value.float().flatten() for value in ComPEFT(density=0.1, alpha=3.0).quantised(state).values()])
    kept = made != 0
    assert int(kept.sum()) == round(0.1 * len(flat))
    assert flat.abs()[kept].min() >= flat.abs()[~kept].max()
    assert torch.equal(made.sign()[kept], flat.sign()[kept])
    assert made[kept].abs().unique().numel() == 1
    assert float(made.abs().max()) == pytest.approx(3 * float(flat.std()), rel=1 / 128)


def test_the_code_is_near_the_entropy_and_many_times_smaller_than_the_update():
    for density, smaller in ((0.05, 40), (0.1, 23), (0.2, 13)):
        size = ComPEFT(density=density).size(update())
        share = (1 - density) * math.log2(1 - density) + density * math.log2(density)
        assert size.entropy == pytest.approx((40_000 * (density - share) + 16) / 8, rel=1e-3)
        assert size.entropy <= size.code < 1.04 * size.entropy
        assert size.dense == 80_000
        assert size.dense / size.code > smaller
        assert size.coded < size.code + 200


def test_remainders_take_the_bits_that_cost_least():
    for density in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
        gaps = np.random.default_rng(0).geometric(density, 20_000) - 1
        cost = [int((gaps >> bits).sum()) + len(gaps) * (1 + bits) for bits in range(9)]
        assert cost[remainder_bits(density)] <= 1.01 * min(cost)


@settings(max_examples=150, deadline=None)
@given(st.sets(st.integers(0, 5000), max_size=80), st.integers(0, 12), st.randoms())
def test_any_positions_and_signs_come_back(positions, bits, rng):
    index = np.array(sorted(positions), dtype=np.int64)
    signs = np.array([rng.random() < 0.5 for _ in positions], dtype=bool)
    data = golomb(index, signs, bits)
    found, positive = ungolomb(data, len(index), bits)
    assert found.tolist() == index.tolist()
    assert positive.tolist() == signs.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0, 1e-30, 3e4]), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_ties_zeros_and_extremes_come_back(values, density):
    codec, state = ComPEFT(density=density), {"w": torch.tensor(values)}
    decoded, expected = codec.decode(codec.encode(state))["w"], codec.quantised(state)["w"]
    assert torch.equal(decoded, expected)
    assert int((expected != 0).sum()) <= max(1, round(density * len(values)))


def test_updates_of_any_size_keep_their_scale():
    for spread in (1e-12, 1.0, 1e12):
        made = ComPEFT().quantised({"w": spread * torch.randn(1000, generator=torch.Generator().manual_seed(0))})["w"]
        assert float(made.abs().max()) == pytest.approx(spread, rel=0.1)


def test_a_task_vector_is_the_difference_and_wants_equal_names():
    tuned, initial = {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}
    assert task_vector(tuned, initial) == {"w": torch.tensor([2.0])}
    with pytest.raises(ThriftyError, match="do not match in v"):
        task_vector(tuned, {"v": torch.tensor([1.0])})


def test_what_is_damaged_or_wrong_is_refused():
    codec = ComPEFT()
    whole = codec.encode(update())
    with pytest.raises(ThriftyError, match="cut short"):
        codec.decode(whole[:-200])
    with pytest.raises(ThriftyError, match="no update coded by compeft"):
        codec.decode(b"PK\x03\x04")
    with pytest.raises(ThriftyError, match=r"a\.weight has values that are not finite"):
        codec.encode({"b": torch.ones(2), "a.weight": torch.tensor([math.nan])})
    with pytest.raises(ThriftyError, match=r"density 1\.5"):
        ComPEFT(density=1.5).encode(update())
    with pytest.raises(ThriftyError, match="nothing to encode"):
        codec.encode({})


# ---------------------------------------------------------------------- thrifty adapter compress and expand

WEIGHTS = "adapter_model.safetensors"
CODEC = "compeft:density=0.1,alpha=2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny model, a LoRA of it as it began (seed 3), and the same after some training."""
    root = tmp_path_factory.mktemp("trained")
    tiny.save(root / "model")
    model = lora(tiny.loaded().model, rank=4, seed=3)
    save_adapter(model, root / "initial")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(0.01 * torch.randn_like(value))
    save_adapter(model, root / "tuned")
    return root


def adapter(*words):
    result = CliRunner().invoke(app, ["adapter", *map(str, words)])
    assert result.exit_code in (0, 2), (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def weights(folder):
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("how", ["initial", "seed"])
def test_a_folder_comes_back_as_its_initial_values_plus_what_the_codec_left(trained, tmp_path, how):
    said = {"initial": ("--initial", trained / "initial"), "seed": ("--seed", 3, "--base", trained / "model")}[how]
    told = adapter("compress", trained / "tuned", "--codec", CODEC, "--out", tmp_path / "small", *said)
    assert float(told.split(" times smaller")[0].split()[-1]) == pytest.approx(
        sum((trained / "tuned" / name).stat().st_size for name in (WEIGHTS, "adapter_config.json"))
        / (tmp_path / "small").stat().st_size,
        abs=0.06,
    )
    back = ("--initial", trained / "initial") if how == "initial" else ("--base", trained / "model")
    adapter("expand", tmp_path / "small", "--out", tmp_path / "back", *back)
    initial, tuned, found = weights(trained / "initial"), weights(trained / "tuned"), weights(tmp_path / "back")
    left = ComPEFT(density=0.1, alpha=2).quantised(task_vector(tuned, initial))
    assert found.keys() == tuned.keys()
    assert all(torch.equal(found[name], initial[name] + left[name]) for name in found)
    config = [(folder / "adapter_config.json").read_text("utf-8") for folder in (trained / "tuned", tmp_path / "back")]
    assert json.loads(config[0]) == json.loads(config[1])
    model = PeftModel.from_pretrained(tiny.loaded().model, tmp_path / "back")
    name = next(name for name in found if ".lora_B." in name)
    assert torch.equal(model.get_parameter(name.replace("lora_B", "lora_B.default")), found[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "small"], "nothing temporary is left"


def test_without_initial_values_only_what_begins_as_zero_is_coded(trained, tmp_path):
    told = adapter("compress", trained / "tuned", "--codec", CODEC, "--out", tmp_path / "small")
    assert "lora_A is kept as it is" in told
    adapter("expand", tmp_path / "small", "--out", tmp_path / "back")
    tuned, found = weights(trained / "tuned"), weights(tmp_path / "back")
    left = ComPEFT(density=0.1, alpha=2).quantised({n: value for n, value in tuned.items() if "lora_B" in n})
    assert len(left) == len(tuned) / 2
    assert all(torch.equal(found[name], left.get(name, tuned[name])) for name in tuned)


def test_wrong_folders_files_and_initial_values_are_refused(trained, tmp_path):
    compress = ("compress", trained / "tuned", "--out", tmp_path / "small")
    assert "no adapter_config.json" in adapter("compress", tmp_path, *compress[2:], "--codec", CODEC)
    assert "give one of weights.codec (compeft)" in adapter(*compress, "--codec", "average")
    assert "no adapter_config.json" in adapter(*compress, "--codec", CODEC, "--initial", trained / "model")
    assert "did not begin as these" in adapter(*compress, "--codec", CODEC, "--seed", 4, "--base", trained / "model")
    assert "give one of them" in adapter(*compress, "--codec", CODEC, "--seed", 3, "--initial", trained / "initial")
    assert not (tmp_path / "small").exists()

    adapter(*compress, "--codec", CODEC, "--initial", trained / "initial")
    expand = ("expand", tmp_path / "small", "--out", tmp_path / "back")
    assert "give what it began as" in adapter(*expand)
    assert "against other initial values" in adapter(*expand, "--initial", trained / "tuned")
    assert "is no compressed adapter" in adapter("expand", trained / "tuned" / WEIGHTS, *expand[2:])
    assert "cannot be read" in adapter("expand", tmp_path / "none", *expand[2:])
    whole = (tmp_path / "small").read_bytes()
    for damaged in (whole[:-5], whole[:20], whole[:-5] + b"wrong"):
        (tmp_path / "small").write_bytes(damaged)
        assert "damaged or cut short" in adapter(*expand, "--initial", trained / "initial")
    assert not (tmp_path / "back").exists()
    assert "exists" in adapter("expand", tmp_path / "small", "--out", trained / "tuned")
