"""The endpoint engine: rows run as streams of an OpenAI-compatible server (vLLM, SGLang, transformers serve, ...).

One row is one streamed request, ``concurrency`` of them at once, on an event loop in a thread of its own. A fresh row
goes to chat completions; a row that continues a response goes to completions with the prompt rendered here, which takes
the model's tokenizer, or to chat where the server continues the last turn. What the server really does is probed first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import threading
import warnings
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from thrifty.contracts import (
    END_OF_THOUGHT,
    Finish,
    Hidden,
    Prompt,
    RowFailed,
    Sample,
    Score,
    Scores,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines._openai_http import Endpoint, Patience, Refused
from thrifty.engines._openai_probe import Facts, probe, tokens_field
from thrifty.engines._openai_score import ScoreRow, score
from thrifty.engines._openai_text import Text
from thrifty.engines._openai_trace import Row, build, lost
from thrifty.engines.capabilities import caps, check_row
from thrifty.models.chat import TAGS

__all__ = ["OpenAIEngine", "Patience"]

SLICE = 0.02
"""Seconds that a poll waits for a row to end."""
NO_LIMIT: tuple[None, Finish] = (None, "length")
STOPS = 4
"""Stop strings that the API takes; with more, streams are cut here."""
OURS = frozenset({"model", "messages", "prompt", "stream", "stream_options", "n", "stop", "seed", "logprobs"})
_PROBED: dict[tuple[Hashable, ...], Facts] = {}
_PROBING = threading.Lock()


class OpenAIEngine:
    """Runs rows on ``model`` behind ``base_url`` (/v1 is added where it has no path). Implements ``contracts.Engine``.

    ``tokenizer`` (a folder, a Hub id, or a transformers tokenizer) is the served model's: with it tokens are counted
    exactly and responses are continued. ``api_key_env`` names the environment variable that holds the key. ``api``
    "completions" renders every prompt here. ``temperature`` and ``top_p`` hold where a request names none;
    ``max_tokens`` limits every response. ``extra`` are further fields of every body, such as
    ``{"chat_template_kwargs": {...}}``. ``tags`` open and close a chain where there is no tokenizer to tell.

    The server is probed once per process: ``facts`` is what was found, ``missing`` says why a capability is not there.
    Raises ThriftyError where the server cannot be reached, refuses the key, or does not speak the API.
    """

    name = "openai"

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Any = None,
        api_key_env: str | None = None,
        api: Literal["chat", "completions"] | None = None,
        concurrency: int = 16,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        extra: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
        tags: tuple[str, str] = TAGS[0],
    ) -> None:
        taken = sorted(OURS & set(extra or {}))
        if concurrency < 1 or taken:
            fault = (
                f"extra may not set {', '.join(taken)}"
                if taken
                else f"concurrency must be 1 or more, not {concurrency}"
            )
            raise ThriftyError(f"endpoint engine: {fault}")
        self.model, self.seed, self.temperature, self.top_p, self.max_tokens = (
            model,
            seed,
            temperature,
            top_p,
            max_tokens,
        )
        self.text = Text(tokenizer, tags)
        templated = self.text.tokenizer is None or bool(self.text.tokenizer.chat_template)
        self.api = api or ("chat" if templated else "completions")
        self.extra = dict(extra or {})
        self.endpoint = Endpoint(base_url, api_key_env, patience or Patience(), concurrency)
        self._rows: dict[int, Row | ScoreRow] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ended: queue.SimpleQueue[tuple[int, Trace | Scores | BaseException]] = queue.SimpleQueue()
        self._warned: set[str] = set()
        self._slots = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name=f"thrifty {self.endpoint.base_url}", daemon=True)
        thread.start()
        self._loop.call_soon_threadsafe(self.endpoint.open)
        self.close = weakref.finalize(self, _shut, self._loop, thread, self.endpoint)
        """End all streams and the thread. Called when the engine is forgotten, too."""
        try:
            self.facts = self._probe()
        except BaseException:
            self.close()
            raise
        self.missing = self.facts.missing
        for note in self.facts.notes:
            self._warn(note, note)

    @property
    def capabilities(self) -> frozenset[str]:
        return self.facts.capabilities

    # What the runner calls -------------------------------------------------------------------------------

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        """Queue one row; ThriftyError where the request cannot be put to this server."""
        if isinstance(request, Hidden):
            raise ThriftyError(f"{self.endpoint.base_url} answers no {type(request).__name__}")
        if request.role != "main":
            raise ThriftyError(f"no model for role {request.role!r}; this engine has: main")
        row = self._row(ticket, request, key) if isinstance(request, Sample) else self._score_row(ticket, request)
        self._rows[ticket] = row
        self._loop.call_soon_threadsafe(self._start, row)

    def poll(self) -> list[tuple[int, Trace | Scores | RowFailed]]:
        """Wait a slice of time for a row to end; hand back all that have, those that failed as ``RowFailed``.

        Raises what is no fault of the server's; the other rows are then dropped, their streams closed.
        """
        ended: list[tuple[int, Trace | Scores | BaseException]] = []
        with contextlib.suppress(queue.Empty):
            ended.append(self._ended.get(timeout=SLICE))
            while True:
                ended.append(self._ended.get_nowait())
        replies: list[tuple[int, Trace | Scores | RowFailed]] = []
        for ticket, reply in ended:
            self._rows.pop(ticket, None)
            if isinstance(reply, BaseException) and not isinstance(reply, RowFailed):
                self._rows.clear()
                self._loop.call_soon_threadsafe(self._drop)
                raise reply
            replies.append((ticket, reply))
        return replies

    def limit(self, ticket: int, tokens: int) -> None:
        """End the row as "cancelled" once it has ``tokens`` new tokens, injected ones included; closes its stream.

        At 0 a ``Score`` ends too, as failed.
        """
        self._loop.call_soon_threadsafe(self._limit, ticket, tokens)

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        """The opening and closing tag of a chain; ("", "") where neither tokenizer nor replies show one."""
        chat = self.text.chat
        return (chat.open, chat.close) if chat.declared or self.facts.chain else ("", "")

    @property
    def busy(self) -> bool:
        """Whether a row is under way, or has ended and was not handed out yet."""
        return bool(self._rows)

    # Requests --------------------------------------------------------------------------------------------

    def _row(self, ticket: int, request: Sample, key: tuple[Hashable, ...]) -> Row:
        chat, facts = self.text.chat, self.facts
        temperature, top_p = check_row(request, self.temperature, self.top_p)
        turns = _turns(request.prompt)
        inject = request.inject.replace(END_OF_THOUGHT, chat.close)
        injected = self.text.encode([inject])
        if len(request.prefix):  # the row holds it, whatever becomes of the trace that it came from
            request = replace(request, prefix=self.text.pieces.keep(np.array(request.prefix, np.int32)))
        before = self.text.decode(request.prefix) + inject if len(request.prefix) or inject else ""
        stops = tuple(stop.replace(END_OF_THOUGHT, chat.close) for stop in request.until)
        completions = self.api == "completions" or (bool(before) and facts.continuation == "completions")
        if completions and self.text.hides_tags and "skip_special_tokens" in facts.refused and chat.close not in before:
            raise ThriftyError(
                f"{self.endpoint.base_url} leaves special tokens out of completions, and {chat.close} is one of this "
                "tokenizer: where a continued chain closes cannot be seen. Continue closed chains only, or use a "
                "server that takes skip_special_tokens (vLLM, SGLang) or the local engine"
            )
        sent = bool(stops) and len(stops) <= STOPS and facts.stops in ("named", "kept")
        # Whoever hides where it stopped can still be told the closing tag: chain and response come apart there.
        sent = sent or (stops == (chat.close,) and facts.stops == "stripped" and not completions)
        limits = caps(request, self.max_tokens, len(injected))
        cap, full = min(limits, key=lambda pair: pair[0]) if limits else NO_LIMIT
        body: dict[str, Any] = {
            "stream_options": {"include_usage": True}, "temperature": temperature, "top_p": top_p,
            "seed": _seed(self.seed, key),
        }  # fmt: skip
        if sent:
            body["stop"] = list(stops)
        if "logprobs" in request.want:
            body["logprobs"] = 1 if completions else True
        body = {name: value for name, value in body.items() if name not in facts.refused}
        if cap is not None:
            body[tokens_field(facts.refused)] = cap
        rendered = self.text.rendered(request.prompt) if completions or self.text.tokenizer is not None else ""
        if completions:
            body["prompt"] = rendered + before
            if self.text.hides_tags and "skip_special_tokens" not in facts.refused:
                body["skip_special_tokens"] = False
        elif before:
            opening = chat.open if before[:1].isspace() else chat.open + chat.before
            chained = facts.chain or chat.close in before
            opening = "" if before.lstrip().startswith(chat.open) or not chained else opening
            body["messages"] = [*turns, {"role": "assistant", "content": opening + before}]
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            body["messages"] = turns
        prompt_ids = None
        if self.text.tokenizer is not None:
            prompt_ids = np.array(chat.prompt_ids(request.prompt), np.int32)
        return Row(
            ticket, request, "/completions" if completions else "/chat/completions",
            self.extra | {"model": self.model} | body | {"stream": True}, self.text,
            turns[-1]["content"] if facts.echoes else "", injected, before, stops, sent, chat.close in stops, cap, full,
            prompt_ids,
        )  # fmt: skip

    def _score_row(self, ticket: int, request: Score) -> ScoreRow:
        if self.facts.scoring is None:
            raise ThriftyError(f"{self.endpoint.base_url} scores nothing: {self.missing['score']}")
        prefix = [int(i) for i in request.prefix]
        if any(i < 0 for i in prefix):  # tokens that the server did not name
            prefix = self.text.encode([self.text.decode(prefix)]).tolist()
        texts = [self.text.encode([text]).tolist() for text in request.continuations]
        return ScoreRow(ticket, [*self.text.chat.prompt_ids(_turns(request.prompt)), *prefix], texts)

    def _probe(self) -> Facts:
        name = getattr(self.text.tokenizer, "name_or_path", None)
        place = (
            self.endpoint.base_url,
            self.model,
            self.api,
            name,
            self.endpoint.key_env,
            repr(sorted(self.extra.items())),
        )
        with _PROBING:
            if place not in _PROBED:
                ask = probe(self.endpoint, self.api, self.text, self.extra | {"model": self.model})
                _PROBED[place] = asyncio.run_coroutine_threadsafe(ask, self._loop).result()
            return _PROBED[place]

    # On the event loop -----------------------------------------------------------------------------------

    def _start(self, row: Row | ScoreRow) -> None:
        run = self._run(row) if isinstance(row, Row) else self._score(row)
        self._tasks[row.ticket] = self._loop.create_task(run)

    async def _score(self, row: ScoreRow) -> None:
        reply: Scores | BaseException
        row.entered = True
        unknown = Usage(calls=1, partial=1)
        try:
            if row.cut or self.facts.scoring is None:
                reply = RowFailed("stopped")
            else:
                base = self.extra | {"model": self.model}
                reply = await score(self.endpoint, self._slots, base, self.facts.scoring, row)
        except asyncio.CancelledError:
            if not row.cut:
                return
            reply = RowFailed("stopped", usage=unknown)
        except RowFailed as error:
            reply = RowFailed(str(error), error.outage, usage=unknown)
        except Exception as error:
            reply = error
        finally:
            self._tasks.pop(row.ticket, None)
        self._ended.put((row.ticket, reply))

    async def _run(self, row: Row) -> None:
        reply: Trace | BaseException
        row.entered = True
        try:
            await self._stream(row)
            reply = build(row, self._warn)
        except asyncio.CancelledError:
            if row.cut is None:  # dropped: nobody waits for it
                return
            reply = build(row, self._warn)
        except RowFailed as error:
            trace = lost(row, self._warn, refused=isinstance(error, Refused))
            reply = RowFailed(str(error), error.outage, trace)
        except Exception as error:
            reply = error
        finally:
            self._tasks.pop(row.ticket, None)
        self._ended.put((row.ticket, reply))

    async def _stream(self, row: Row) -> None:
        if row.cut is not None:
            return
        async with self._slots:
            if row.cap == 0:
                row.cut = row.full
                return
            try:
                await self.endpoint.ask(row.path, row.body, row.begin, row.enough)
            except TimeoutError:
                if row.reply is None or not row.reply.parts:
                    raise RowFailed(
                        f"{self.endpoint.base_url} sent nothing within {self.endpoint.patience.deadline:g} s: raise "
                        "the deadline, or lower the concurrency",
                        "silence",
                    ) from None
                row.cut = "cancelled"
                self._warn("deadline", "rows were cut at the deadline; they count as incomplete")

    def _limit(self, ticket: int, tokens: int) -> None:
        row, task = self._rows.get(ticket), self._tasks.get(ticket)
        if row is None or task is None:
            return
        if isinstance(row, ScoreRow):
            if tokens <= 0:
                row.cut = True
                if row.entered:
                    task.cancel()
            return
        tokens = max(0, tokens - len(row.injected))
        row.limit = tokens if row.limit is None else min(row.limit, tokens)
        if row.count >= row.limit:
            row.cut = "cancelled"
            if row.entered:
                task.cancel()

    def _drop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()  # who had not begun yet cannot do it itself

    def _warn(self, kind: str, text: str) -> None:
        """Once of a kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{self.endpoint.base_url}: {text}", stacklevel=2)


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    for turn in turns:
        odd = sorted(set(turn) - {"role", "content", "name"})
        if odd or turn.get("role") == "tool" or not isinstance(turn.get("content"), str):
            raise ThriftyError(
                f"a message of role {turn.get('role')!r} with {', '.join(sorted(turn))}: the endpoint engine sends "
                "text only, no tools and no tool calls"
            )
    if not turns:
        raise ThriftyError("a prompt needs at least one message")
    return turns


def _seed(seed: int, key: tuple[Hashable, ...]) -> int:
    """The row's random stream as the 31 bits that every server takes."""
    return int.from_bytes(hashlib.blake2b(repr((seed, key)).encode(), digest_size=4).digest(), "little") >> 1


def _shut(loop: asyncio.AbstractEventLoop, thread: threading.Thread, endpoint: Endpoint) -> None:
    async def end() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await endpoint.close()

    if threading.current_thread() is thread:  # forgotten by the collector while the loop ran
        loop.create_task(end()).add_done_callback(lambda _: loop.stop())
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(end(), loop).result(timeout=5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    if not thread.is_alive():
        loop.close()
