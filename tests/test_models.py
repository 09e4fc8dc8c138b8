"""Loading models, and reading their chat format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import tiny
from thrifty.contracts import ThriftyError
from thrifty.models.chat import ChatFormat
from thrifty.models.load import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def test_a_saved_folder_loads_in_float32_on_a_cpu(folder: Path) -> None:
    found = load(str(folder), device="cpu")
    assert found.model.dtype == torch.float32
    assert not found.model.training
    assert found.context == 512
    assert found.eos == {found.tokenizer.eos_token_id}
    assert found.chat.open == "<think>"
    assert load(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_special_tokens_that_have_no_name_are_no_part_of_a_response():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=True)])
    chat = ChatFormat.detect(tokenizer)
    ids = tokenizer.encode("so</think>Paris<|turn_end|>", add_special_tokens=False)
    assert chat.decode(ids) == "so</think>Paris"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no/such/model", "looks like a path"),
        ("/no/such/model", "looks like a path"),
        ("what is this", "neither a folder"),
    ],
)
def test_a_missing_folder_is_named(name: str, said: str) -> None:
    with pytest.raises(ThriftyError, match=said):
        load(name)


def test_a_hub_id_that_cannot_be_had_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ThriftyError, match="Hub id 'nobody/nothing'"):
        load("nobody/nothing")


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (("config.json",), "no config.json"),
        (("tokenizer.json",), "no tokenizer"),
        (("model.safetensors",), "no weights"),
    ],
)
def test_a_folder_that_lacks_files_is_refused_by_name(
    folder: Path, tmp_path: Path, removed: tuple[str, ...], said: str
) -> None:
    for file in folder.iterdir():
        if file.name not in removed:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ThriftyError, match=said) as caught:
        load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_other_wrong_folders_and_types_are_told_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ThriftyError, match="adapter, not a model"):
        load(str(tmp_path))
    with pytest.raises(ThriftyError, match="is a file"):
        load(str(folder / "config.json"))
    with pytest.raises(ThriftyError, match="no dtype 'half-ish'"):
        load(str(folder), dtype="half-ish")
    with pytest.raises(ThriftyError, match="no dtype 'nn'"):
        load(str(folder), dtype="nn")


def test_a_broken_config_is_a_clear_error(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ThriftyError, match="cannot load"):
        load(str(tmp_path))


def test_without_a_chat_template_the_prompt_is_plain_text() -> None:
    chat = tiny.chat("none")
    assert chat.tokenizer.decode(chat.prompt_ids("two and two")) == "two and two"
    assert chat.prompt_text([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "a\n\nb"
    assert not chat.declared
    assert (chat.open, chat.close) == ("<think>", "</think>")


def test_messages_and_text_render_through_the_template() -> None:
    chat = tiny.chat("think")
    assert chat.prompt_text("hi") == "<|user|>hi<|end|><|assistant|>"
    assert chat.prompt_text([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]).startswith(
        "<|system|>s<|end|><|user|>hi"
    )
    assert chat.tokenizer.decode(chat.prompt_ids("hi")) == "<|user|>hi<|end|><|assistant|>"


def test_a_prefilled_opening_tag_is_seen_and_not_written_twice() -> None:
    chat = tiny.chat("prefilled")
    assert chat.prefilled
    whole = chat.prompt_text("q") + chat.target("t", "r")
    assert whole.endswith("<think>\nt\n</think>\n\nr")
    assert whole.count("<think>") == 1


def test_white_space_around_the_tags_is_the_templates_own() -> None:
    assert tiny.chat("reasoning").target("t", "r") == "<think> t </think> r"
    assert tiny.chat("think").target("t", "r") == "<think>\nt\n</think>\n\nr"
    assert tiny.chat("think").target("", "r") == "<think>\n</think>\n\nr"


@pytest.mark.parametrize(("template", "eats"), [("think", False), ("prefilled", False), ("eats", True)])
def test_a_template_that_eats_chains_is_found_out_and_does_no_harm(template: str, eats: bool) -> None:
    chat = tiny.chat(template)
    assert chat.eats_thinking is eats
    ids = chat.tokenizer.encode(chat.target("the chain", "the end"), add_special_tokens=False)
    assert chat.split(chat.decode(ids)) == ("the chain", "the end", True)


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("think", "<think>\na\n</think>\n\nb", ("a", "b", True)),
        ("think", "a</think>b", ("a", "b", True)),
        ("think", "<think>a</think>b</think>c", ("a", "b</think>c", True)),
        ("think", "<think>a", ("a", "", False)),
        ("think", "just b", ("", "just b", True)),
        ("prefilled", "a", ("a", "", False)),
        ("prefilled", "a</think>b", ("a", "b", True)),
        ("prefilled", "<think>a</think>b", ("a", "b", True)),
        ("think", "", ("", "", True)),
        ("prefilled", "", ("", "", False)),
    ],
)
def test_split_is_robust(template: str, text: str, expected: tuple[str, str, bool]) -> None:
    assert tiny.chat(template).split(text) == expected


@given(st.text(), st.text())
def test_split_undoes_target(thought: str, response: str) -> None:
    if "think>" in thought or "think>" in response:
        return
    for template in ("think", "prefilled", "reasoning"):
        chat = CHATS[template]
        assert chat.split(chat.target(thought, response)) == (thought.strip(), response.strip(), True)


CHATS = {name: tiny.chat(name) for name in ("think", "prefilled", "reasoning")}


def test_tags_can_be_overridden_and_decode_keeps_only_them() -> None:
    fast = tiny.tokenizer("think")
    chat = ChatFormat.detect(fast, "<a>", "</a>")
    assert chat.split("<a>x</a>y") == ("x", "y", True)
    assert not chat.declared
    with pytest.raises(ThriftyError, match="both tags"):
        ChatFormat.detect(fast, open="<a>")
    ids = fast.encode("<think>x</think>y<|end|><|pad|>", add_special_tokens=False)
    assert tiny.chat("think").decode(ids) == "<think>x</think>y"
    assert tiny.chat("think").close_id == fast.convert_tokens_to_ids("</think>")
    assert chat.close_id is None


def test_a_template_that_refuses_messages_says_so() -> None:
    fast = tiny.tokenizer("think")
    fast.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ThriftyError, match="refuses messages with roles user: roles must alternate"):
        ChatFormat.detect(fast)
