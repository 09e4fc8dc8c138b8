"""A text told apart as it grows: nothing is lost, and what is sent adds up to what is said in the end."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.contracts import Trace
from thrifty.models.chat import ChatFormat
from thrifty.serve.streaming import Splitter, parts

BITS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "think>", "/", " ", "\n", "a", "STOP", "ST", "b."]), max_size=12
)


def streamed(form: ChatFormat, pieces: list[str], stops: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """What is sent of each field, and what is said of the whole."""
    splitter, sent = Splitter(form, stops), {"reasoning_content": "", "content": ""}
    for text in accumulate(pieces):
        for name, piece in splitter.push(text):
            sent[name] += piece
    thought, response, closed = form.split("".join(pieces))
    trace = Trace(np.zeros(1, np.int32), thought, response, closed, "stop")
    final = parts(trace, True, stops, lambda ids: "".join(pieces))["parts"]
    for name, piece in splitter.end(final):
        sent[name] += piece
    return sent, final


@given(BITS, st.booleans(), st.booleans())
def test_what_is_sent_is_what_is_said(pieces: list[str], declared: bool, prefilled: bool) -> None:
    if not prefilled:
        pieces = ["<think>", *pieces]
    texts = list(accumulate(pieces))
    pieces = pieces[: next((i + 1 for i, text in enumerate(texts) if "STOP" in text), len(pieces))]  # as engines end
    sent, final = streamed(ChatFormat(None, declared=declared, prefilled=prefilled), pieces, ("STOP",))
    assert sent == final


@pytest.mark.parametrize("close", [["</think>"], ["</", "think", ">"]])
def test_a_chain_that_was_never_opened_is_content_and_the_response_follows_it(close: list[str]) -> None:
    sent, final = streamed(ChatFormat(None), ["one ", "two", *close, " fo", "ur", " STOP", " five"], ("STOP",))
    assert final == {"reasoning_content": "one two", "content": "four "}
    assert sent == {"reasoning_content": "", "content": "one two\n\nfour "}
