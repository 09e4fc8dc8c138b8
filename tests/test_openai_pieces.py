"""The endpoint engine's pieces that need no server, and what it refuses before it asks one."""

from __future__ import annotations

import asyncio
import gc
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import QUICK, free_port
from thrifty.contracts import Sample, ThriftyError
from thrifty.engines import _openai_http
from thrifty.engines._openai_stream import Reply, Transient, events, parse
from thrifty.engines._openai_text import LOWEST, UNKNOWN, Pieces, Text
from thrifty.engines._openai_trace import Row, build
from thrifty.engines.openai import OpenAIEngine, Patience


async def _read(*chunks: bytes) -> list[str]:
    async def source() -> Any:
        for chunk in chunks:
            yield chunk

    return [event async for event in events(source())]


async def test_events_survive_any_cut() -> None:
    body = 'data: {"a": "é\u2028🙂"}\r\n\r\n: ping\n\ndata: 1\ndata: 2\n\ndata: [DONE]'.encode()
    expected = ['{"a": "é\u2028🙂"}', "1\n2", "[DONE]"]
    assert await _read(body) == expected
    assert await _read(*(body[i : i + 1] for i in range(len(body)))) == expected
    with pytest.raises(Transient, match="UTF-8"):
        await _read(b'data: "\xff"\n\n')
    for broken in ('{"a": ', "[1]", '{"error": {"message": "x"}}'):
        with pytest.raises(Transient):
            parse(broken)


def test_halves_of_a_character_become_one() -> None:
    reply = Reply()
    for half in ("\ud83d", "\ude42", "\ud83d"):
        reply.feed({"choices": [{"index": 0, "delta": {"content": half}}]})
    assert reply.text("text") == "🙂\ufffd"


@pytest.mark.parametrize(
    ("echo", "texts", "kept"),
    [("go on", ("user go on assistant", "a go on"), "a go on"), ("go on", ("a", " go on"), "a go on"), ("go", (), ""),
     ("", ("go on",), "go on"), ("go on", ("go on",), "go on")],
)  # fmt: skip
def test_a_prompt_that_is_sent_back_is_no_reply(echo: str, texts: tuple[str, ...], kept: str) -> None:
    reply = Reply(echo)
    for text in ("", *texts):
        reply.feed({"choices": [{"index": 0, "delta": {"content": text}}]})
    assert (reply.text("text"), reply.echoed) == (kept, "".join(texts) != kept)


def test_a_stop_string_is_found_behind_white_space_before_the_chain() -> None:
    nothing = np.zeros(0, np.int32)
    row = Row(0, Sample("x", until=("b",)), "", {}, Text(), "", nothing, "", ("b",), False, False, None, "length")
    reply = row.begin()
    for delta in ({"content": "\n\n"}, {"reasoning_content": "t"}, {"content": "a b c"}):
        reply.feed({"choices": [{"index": 0, "delta": delta}]})
    assert row.enough(reply)
    trace = build(row, lambda kind, text: None)
    assert (trace.finish, trace.thought, trace.response) == ("until", "t", "a b")


def test_text_is_named_by_pieces_without_a_tokenizer() -> None:
    text = Text()
    ids = text.encode(["<think>", "one", " two", "</think>", " 3", "one"])
    assert max(ids) < UNKNOWN
    assert ids[1] == ids[5]
    assert text.decode([*ids[:2], UNKNOWN, *ids[2:]]) == "<think>one two</think> 3one"
    assert text.cut(ids) == 4
    assert text.trimmed(" 3<|im_end|><|endoftext|>\n") == " 3"
    with pytest.raises(ThriftyError, match="tokenizer"):
        text.decode([5])


def test_pieces_are_kept_as_long_as_somebody_holds_their_ids() -> None:
    text = Text()
    one, two = text.encode(["a", "b", "a"]), text.encode(["b", "c"])
    assert (len(text.pieces), one[1]) == (3, two[0])
    whole = text.pieces.keep(np.concatenate([one, two, [UNKNOWN]]))
    del one, two
    part, copied = whole[2:4], whole.tolist()
    assert text.decode(whole) == "ababc"
    del whole
    gc.collect()
    assert text.decode(part) == "ab", "a slice holds what it was cut from"
    assert len(text.pieces) == 3
    del part
    gc.collect()
    assert len(text.pieces) == 0
    with pytest.raises(ThriftyError, match="forgotten"):
        text.decode(copied)
    again = text.encode(["a"])
    assert again[0] not in copied, "a forgotten id does not come to mean something else"


def test_ids_of_pieces_begin_again_where_they_are_used_up() -> None:
    pieces = Pieces()
    first = pieces.name(["kept"])
    pieces._last = LOWEST + 1
    low, around = pieces.name(["low"]), pieces.name(["around"])
    assert (low[0], around[0]) == (LOWEST, first[0] - 1)
    assert [pieces.text(int(i)) for i in (first[0], low[0], around[0])] == ["kept", "low", "around"]


def test_threads_share_pieces() -> None:
    pieces = Pieces()

    def work(seed: int) -> None:
        for i in range(300):
            ids = pieces.name([f"{(seed * i + k) % 17}" for k in range(5)])
            wanted = [f"{(seed * i + k) % 17}" for k in range(5)]
            found.append([pieces.text(int(i)) for i in ids] == wanted)

    found: list[bool] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 1200
    assert all(found)
    assert len(pieces) == 0


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x/v1", "http://me:secret@host/v1", "http://h/v1?key=secret"]
)
def test_base_urls_that_cannot_work(url: str) -> None:
    with pytest.raises(ThriftyError) as told:
        OpenAIEngine(url, "m")
    assert url == "" or "secret@" not in str(told.value)


def test_a_path_is_added_where_the_base_url_has_none() -> None:
    at = [_openai_http.Endpoint(u, None, QUICK, 1).base_url for u in ("http://h:1", "http://h:1/", "http://h/api/v3/")]
    assert at == ["http://h:1/v1", "http://h:1/v1", "http://h/api/v3"]


@pytest.mark.parametrize("key", ["", "   ", "a\r\nX-Evil: 1", "a\nb", "clé", "a\x00b"])
def test_keys_cannot_inject_headers(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\x00" in key:
        monkeypatch.setattr("os.environ", {"KEY": key})
    else:
        monkeypatch.setenv("KEY", key)
    with pytest.raises(ThriftyError, match="KEY") as told:
        OpenAIEngine("http://127.0.0.1:1/v1", "m", api_key_env="KEY")
    assert "Evil" not in str(told.value)


def test_bad_settings() -> None:
    with pytest.raises(ThriftyError, match="extra may not set model, n"):
        OpenAIEngine("http://127.0.0.1:1", "m", extra={"n": 3, "model": "x"})
    with pytest.raises(ThriftyError, match="concurrency"):
        OpenAIEngine("http://127.0.0.1:1", "m", concurrency=0)


def test_retry_after_takes_dates() -> None:
    assert _openai_http._retry_after("2.5") == 2.5
    assert _openai_http._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _openai_http._retry_after("soon") is None


def test_a_server_that_is_down_is_told_with_its_url() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ThriftyError, match=rf"{url} cannot be reached .*2 attempts"):
        OpenAIEngine(url, "m", patience=Patience(retries=1, backoff=0.01))


def test_a_certificate_that_nobody_vouches_for_is_told(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost"], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def serve() -> asyncio.Server:
        return await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(serve(), loop).result()
    try:
        with pytest.raises(ThriftyError, match=r"certificate of https://127\S+ is not trusted .*SSL_CERT_FILE"):
            OpenAIEngine(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "m", patience=QUICK)
    finally:
        loop.call_soon_threadsafe(listening.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
