"""Controls and decoders in plain ``model.generate``: forced tokens, stops, left padding, greedy text."""

from dataclasses import dataclass, replace
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, MistralConfig

import tiny
from thrifty.contracts import Sample, ThriftyError
from thrifty.decode.accelerate.lookahead_trie import LookaheadTrie, tokens_per_forward
from thrifty.edges.generate import custom_generate
from thrifty.edges.logits import ControlProcessor
from thrifty.engines.local import LocalEngine
from thrifty.engines.meter import Meter
from thrifty.tune.adapter import lora

torch.set_num_threads(1)
PROMPTS = ["1+2", "roll 3 then add 4 and then some", "x", "roll 3 then add 4"]


@pytest.fixture(scope="module")
def loaded():
    return tiny.loaded()


def given(loaded, prompts=PROMPTS):
    texts = [loaded.chat.prompt_text(prompt) for prompt in prompts]
    return loaded.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")


def generate(loaded, prompts=PROMPTS, eos=None, **settings):
    """What follows the prompts, padding cut off."""
    eos = loaded.tokenizer.eos_token_id if eos is None else eos
    inputs = given(loaded, prompts)
    out = loaded.model.generate(
        **inputs, eos_token_id=eos, pad_token_id=loaded.tokenizer.pad_token_id, **{"max_new_tokens": 24} | settings
    )
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    return out[:, inputs["input_ids"].shape[1] :]


def until(ids, end):
    return ids[: ids.index(end)] if end in ids else ids


def engine_ids(loaded, **settings):
    engine = LocalEngine(loaded)
    for ticket, prompt in enumerate(PROMPTS):
        engine.submit(ticket, Sample(prompt, temperature=0.0, max_tokens=24, **settings), (ticket,))
    answers = {}
    while len(answers) < len(PROMPTS):
        answers.update(engine.poll())
    return [answers[i].ids.tolist() for i in range(len(PROMPTS))]


# ------------------------------------------------------------------------------------------------ controls


@dataclass(frozen=True)
class Interrupt:
    """Forbids a token; after as many tokens as the row's first one says, forces three more, then stops some rows."""

    forbid: int = -1
    forced: tuple[int, ...] = (65, 66, 67)

    def start(self, tokenizer):
        return "waiting"

    def step(self, tails, logits, states):
        logits = logits.clone()
        if self.forbid >= 0:
            logits[:, self.forbid] = -torch.inf
        force, stop, after = [], [], []
        for tail, state in zip(tails, states):
            due = state == "waiting" and tail.new and tail.new == 3 + tail.ids[0] % 5
            force.append(self.forced if due else ())
            stop.append(state == "forced" and tail.new > 9 and tail.ids[0] % 2 == 0 and tail.ids[-1] != 67)
            after.append("forced" if due else state)
        return logits, force, stop, after


def test_a_control_does_in_generate_what_it_does_in_our_engine(loaded):
    plain = engine_ids(loaded)
    written = list(chain(*plain))
    forbid = max(set(written), key=written.count)
    controls = (Interrupt(forbid),)
    expected = engine_ids(loaded, controls=controls)
    assert forbid not in chain(*expected)
    found = generate(loaded, logits_processor=[ControlProcessor(controls, loaded.tokenizer)]).tolist()
    end = loaded.tokenizer.eos_token_id
    assert [until(ids, end) for ids in found] == [until(ids, end) for ids in expected]
    assert all(any(ids[i : i + 3] == [65, 66, 67] for i in range(len(ids))) for ids in expected)
    assert len({len(until(ids, end)) for ids in expected}) > 1, "rows stopped at different lengths"


def test_a_stop_with_forced_tokens_ends_the_row_behind_them(loaded):
    class Say:
        def start(self, tokenizer):
            return None

        def step(self, tails, logits, states):
            return logits, [(70, 71)] * len(tails), [tail.ids != [] for tail in tails], states

    end = loaded.tokenizer.eos_token_id
    found = generate(loaded, logits_processor=[ControlProcessor([Say()], loaded.tokenizer)])
    assert found.tolist() == [[70, 71, 70, 71, end]] * len(PROMPTS)
    assert engine_ids(loaded, controls=(Say(),)) == [[70, 71, 70, 71]] * len(PROMPTS)


def test_rows_that_ended_are_not_shown_to_a_control_and_states_are_their_own(loaded):
    seen = []

    class Count:
        def start(self, tokenizer):
            return 0

        def step(self, tails, logits, states):
            assert all(tail.new == len(tail.ids) == state for tail, state in zip(tails, states))
            seen.append(len(tails))
            return logits, [()] * len(tails), [False] * len(tails), [state + 1 for state in states]

    plain = generate(loaded).tolist()
    ends = [plain[0][4], plain[1][9]]
    processor = ControlProcessor([Count()], loaded.tokenizer, eos=ends)
    steered = generate(loaded, eos=ends, logits_processor=[processor])
    assert torch.equal(steered, generate(loaded, eos=ends))
    assert seen[0] == len(PROMPTS)
    assert seen[-1] < len(PROMPTS)


def test_sampling_draws_forced_tokens_too_and_several_controls_act_in_turn(loaded):
    torch.manual_seed(0)
    processor = ControlProcessor([Interrupt(), Interrupt(forbid=3, forced=())], loaded.tokenizer)
    found = generate(loaded, do_sample=True, temperature=1.3, top_p=0.9, logits_processor=[processor]).tolist()
    assert all(any(ids[i : i + 3] == [65, 66, 67] for i in range(len(ids))) for ids in found)
    assert 3 not in chain(*found)


def test_a_second_call_beams_and_a_tokenizer_without_an_end_are_refused(loaded):
    processor = ControlProcessor([Interrupt()], loaded.tokenizer)
    generate(loaded, logits_processor=[processor])
    with pytest.raises(ThriftyError, match="one call of generate"):
        generate(loaded, logits_processor=[processor])
    with pytest.raises(ThriftyError, match="without beams"):
        generate(loaded, num_beams=3, logits_processor=[ControlProcessor([Interrupt(forced=())], loaded.tokenizer)])

    class Endless:
        eos_token_id = None

    with pytest.raises(ThriftyError, match="give eos"):
        ControlProcessor([Interrupt()], Endless())


# ------------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_decoder_gives_the_text_of_greedy_generate_in_fewer_forwards(kind):
    loaded = tiny.loaded(kind)
    prompts = [f"roll {i % 5} then add {i % 3}" + " and so on" * (i % 4) for i in range(17)]
    plain = generate(loaded, prompts, max_new_tokens=40)
    ends = [int(plain[0, 12]), int(plain[3, 25])]
    expected = generate(loaded, prompts, ends, max_new_tokens=40)
    assert (expected == loaded.tokenizer.pad_token_id).any(), "rows end at different places"
    decoder = LookaheadTrie(nodes=12, branch_length=6)
    rates = []
    for _ in range(2):
        meter = Meter()
        found = generate(loaded, prompts, ends, max_new_tokens=40, custom_generate=custom_generate(decoder, meter))
        assert torch.equal(found, expected)
        total = meter.total()
        rates.append(tokens_per_forward(total.accepted, total.positions, total.prefill, total.padding, total.drafted))
    assert rates[1] > max(1.5, rates[0]), "the decoder remembers"


def test_a_decoder_takes_one_row_and_hands_back_what_generate_hands_back(loaded):
    inputs = given(loaded, PROMPTS[:1])
    settings = GenerationConfig(max_new_tokens=12, return_dict_in_generate=True)
    expected = loaded.model.generate(**inputs, generation_config=settings)
    watching = len(loaded.model._forward_pre_hooks)
    found = loaded.model.generate(
        **inputs, generation_config=settings, custom_generate=custom_generate(LookaheadTrie())
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert len(loaded.model._forward_pre_hooks) == watching, "nobody else counts the model afterwards"


def test_adapters_run_as_they_stand():
    loaded = tiny.loaded()
    plain = generate(loaded)
    model = lora(loaded.model, rank=4, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    adapted = replace(loaded, model=model)
    expected = generate(adapted)
    assert not torch.equal(expected, plain)
    assert torch.equal(generate(adapted, custom_generate=custom_generate(LookaheadTrie())), expected)
    with model.disable_adapter():
        assert torch.equal(generate(adapted, custom_generate=custom_generate(LookaheadTrie())), plain)


def test_samples_depend_on_torchs_random_state_and_follow_the_models_distribution(loaded):
    decoder = custom_generate(LookaheadTrie())
    settings = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 1}
    torch.manual_seed(0)
    one = generate(loaded, PROMPTS * 64, custom_generate=decoder, **settings)
    torch.manual_seed(0)
    assert torch.equal(generate(loaded, PROMPTS * 64, custom_generate=decoder, **settings), one)
    torch.manual_seed(1)
    assert not torch.equal(generate(loaded, PROMPTS * 64, custom_generate=decoder, **settings), one)
    logits = loaded.model(**given(loaded)).logits[:, -1]
    likeliest = (logits / 2).softmax(-1).max(-1)
    share = (one.view(64, len(PROMPTS)) == likeliest.indices).float().mean(0)
    assert ((share - likeliest.values).abs() < 4 * (likeliest.values * (1 - likeliest.values) / 64).sqrt()).all()


@pytest.mark.parametrize("config", [MistralConfig, Gemma3TextConfig], ids=["all layers", "some layers"])
def test_a_row_that_may_outgrow_a_layers_window_is_refused(config, loaded):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=len(loaded.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=1, sliding_window=48, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    windowed = replace(loaded, model=model)
    short = 48 - given(windowed)["input_ids"].shape[1]
    found = generate(windowed, custom_generate=custom_generate(LookaheadTrie()), max_new_tokens=short)
    assert torch.equal(found, generate(windowed, max_new_tokens=short))
    with pytest.raises(ThriftyError, match=r"look back 48 tokens at most.*grow to 49 tokens: lower max_tokens"):
        generate(windowed, custom_generate=custom_generate(LookaheadTrie()), max_new_tokens=short + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "TopKLogitsWarper.*top_k=0"),
        ({"repetition_penalty": 1.2}, "RepetitionPenalty"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
        ({"num_beams": 2}, "no beams"),
        ({"return_dict_in_generate": True, "output_scores": True}, "no scores"),
    ],
)
def test_what_a_decoder_cannot_follow_is_refused(loaded, settings, message):
    with pytest.raises(ThriftyError, match=message):
        generate(loaded, custom_generate=custom_generate(LookaheadTrie()), **settings)
