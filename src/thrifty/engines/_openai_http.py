"""Asking an OpenAI-compatible server over HTTP: connections, keys, retries, redirects, deadlines.

Nothing here knows what a request is about. Faults that may pass (429, 5xx, broken streams, silence) are asked again
after pauses that double and are jittered (``Retry-After`` is honoured); others are told at once, with the base URL. A
429 uses up no attempt: the server is well and takes the row when others have ended, so only the deadline ends that.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import random
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thrifty.contracts import RowFailed, ThriftyError
from thrifty.engines._openai_stream import Reply, Transient, events, message, parse

try:
    import httpx2
except ImportError as error:
    raise ThriftyError("the endpoint engine needs httpx2: pip install 'thrifty[endpoint]'") from error

PAUSE = 30.0
"""The longest pause between attempts, seconds, unless the server asks for more."""
BODY = 64 << 10
"""Bytes read of an error's body."""
BUSY = frozenset({408, 409, 425, 429})


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds, and how often to ask again."""

    connect: float = 10.0
    first: float = 300.0
    """Until the first token: a busy server queues."""
    stall: float = 60.0
    """Between tokens."""
    deadline: float = 900.0
    """For a row in all, attempts and pauses included."""
    retries: int = 5
    """Beside those after a 429, which is asked again until the deadline."""
    backoff: float = 0.5
    """The first pause; it doubles."""


class Endpoint:
    """One base URL. ``ask`` runs on the event loop in which ``open`` was called.

    Raises ThriftyError where the URL or the key can never work.
    """

    def __init__(self, base_url: str, api_key_env: str | None, patience: Patience, connections: int) -> None:
        self.base_url, self.patience, self.connections = _checked(base_url), patience, connections
        self.key_env = api_key_env
        self.headers = {"Accept": "text/event-stream, application/json", "Content-Type": "application/json"}
        if api_key_env is not None:
            self.headers["Authorization"] = f"Bearer {_key(api_key_env)}"
        self._client: httpx2.AsyncClient | None = None

    def open(self) -> None:
        limits = httpx2.Limits(max_connections=self.connections, max_keepalive_connections=self.connections)
        wait = httpx2.Timeout(None, connect=self.patience.connect, write=self.patience.stall)
        self._client = httpx2.AsyncClient(timeout=wait, limits=limits, follow_redirects=False, headers=self.headers)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def ask(
        self,
        path: str,
        body: dict[str, Any],
        start: Callable[[], Reply],
        enough: Callable[[Reply], bool] = lambda reply: False,
        retries: int | None = None,
    ) -> Reply:
        """POST ``body`` to ``path`` and read the reply, each attempt into a new ``start()``.

        ``enough`` is asked after every delta; where it says True the stream is closed and what came is returned. Raises
        TimeoutError at the deadline, RowFailed where asking again does not help.
        """
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        async with asyncio.timeout(self.patience.deadline) as deadline:
            began = time.monotonic()
            retries = self.patience.retries if retries is None else retries
            attempts = full = 0
            while True:
                reply = start()
                try:
                    return await self._attempt(path, content, reply, enough)
                except Transient as fault:
                    reason, after, outage = str(fault), fault.after, fault.name
                except httpx2.TransportError as fault:
                    reason, after, outage = self._transport(fault), None, "connection"
                if outage == "429" and retries:
                    full += 1
                else:
                    attempts += 1
                if attempts > retries:
                    break
                doubled = self.patience.backoff * 2 ** min(attempts + full - 1, 16)
                pause = min(PAUSE, doubled) * random.uniform(0.5, 1.0)
                pause = max(pause, after or 0.0)
                left = (deadline.when() or 0.0) - asyncio.get_running_loop().time()
                if pause > left:
                    raise RowFailed(
                        f"{self.base_url} {reason} and asks for a pause of {pause:.0f} s, more than the "
                        f"deadline leaves ({left:.0f} s): lower the concurrency, or raise the deadline",
                        outage,
                    )
                await asyncio.sleep(pause)
        raise RowFailed(
            f"{self.base_url} {reason} ({attempts + full} attempts in {time.monotonic() - began:.0f} s). "
            "Is the server up, is this its address, and does it answer `curl`?",
            outage,
        )

    async def _attempt(self, path: str, content: bytes, reply: Reply, enough: Callable[[Reply], bool]) -> Reply:
        assert self._client is not None, "open() comes first"
        url = f"{self.base_url}{path}"
        patience, clock = self.patience, asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(patience.first) as timer, contextlib.AsyncExitStack() as stack:
                for _ in range(4):
                    response = await stack.enter_async_context(self._client.stream("POST", url, content=content))
                    if not response.has_redirect_location:
                        break
                    url = self._redirect(url, response)
                else:
                    raise RowFailed(f"{self.base_url} redirects in a circle: give the server's own URL", "redirect")
                if response.status_code != 200:
                    raise self._refusal(path, response, await _head(response))
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind == "application/json":  # a server that does not stream
                    reply.streamed = False
                    reply.take(parse((await response.aread()).decode("utf-8", "replace")))
                    reply.finish = reply.finish or "stop"
                    enough(reply)
                    return reply
                if kind != "text/event-stream":
                    raise Transient(f"answered with {kind or 'no content type'}, not as an OpenAI-compatible API does")
                stream = await stack.enter_async_context(contextlib.aclosing(events(response.aiter_bytes())))
                async for data in stream:
                    if data.strip() == "[DONE]":
                        reply.finish = reply.finish or "stop"
                        break
                    if reply.take(parse(data)):
                        timer.reschedule(clock() + patience.stall)
                        if enough(reply):
                            return reply
        except (TimeoutError, httpx2.TransportError) as fault:
            if reply.finish is not None:  # all was said but the usage
                return reply
            if not isinstance(fault, TimeoutError):
                raise
            waited = patience.stall if reply.parts else patience.first
            raise Transient(f"sent no token for {waited:g} s") from None
        if reply.finish is None:
            raise Transient("broke off in the middle of a reply")
        return reply

    def _redirect(self, url: str, response: Any) -> str:
        """Where a redirect leads: within the same origin and with the method kept, nowhere else."""
        here, there = httpx2.URL(url), httpx2.URL(url).join(response.headers["location"])
        if (here.scheme, here.host, here.port) != (there.scheme, there.host, there.port):
            raise RowFailed(
                f"{self.base_url} redirects to another host, {there.scheme}://{there.host}:{there.port or ''}, "
                "and the prompts and the key do not follow: if that is the server, give it as the base URL",
                "redirect",
            )
        if response.status_code not in (307, 308):
            text = f"{self.base_url} redirects to {there.path}, which drops the request: give that URL"
            raise RowFailed(text, "redirect")
        return str(there)

    def _refusal(self, path: str, response: Any, body: str) -> Exception:
        status = response.status_code
        try:
            found = json.loads(body)
        except ValueError:
            found = body
        said = f"answered {status} to {path}: {message(found)}"
        detail = found.get("error") if isinstance(found, dict) else None
        spent = isinstance(detail, dict) and detail.get("code") == "insufficient_quota"
        if (status in BUSY or (status >= 500 and status != 501)) and not spent:
            return Transient(said, _retry_after(response.headers.get("retry-after", "")), str(status))
        remedy = {
            401: f"set {self.key_env} to a valid key"
            if self.key_env
            else "name the variable with the key (api_key_env)",
            403: "the key has no right to this",
            404: "does the base URL end in /v1, and is the model's name right?",
            413: "the request is too long for this server",
        }.get(status, "the server refuses this request")
        return Refused(f"{self.base_url} {said}; {remedy}", status)

    def _transport(self, fault: Exception) -> str:
        cause: BaseException | None = fault
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise RowFailed(
                    f"the certificate of {self.base_url} is not trusted ({cause.verify_message}): set SSL_CERT_FILE to "
                    "the certificate authority's file, or mend the server's certificate",
                    "certificate",
                ) from fault
            cause = cause.__cause__ or cause.__context__
        if isinstance(fault, httpx2.ConnectError | httpx2.ConnectTimeout):
            return f"cannot be reached ({message(str(fault)) or type(fault).__name__})"
        return f"broke the connection ({message(str(fault)) or type(fault).__name__})"


class Refused(RowFailed):
    """A request that this server will never take: this one alone (400, 413, 422), or any."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text, "" if status in (400, 413, 422) else str(status))
        self.status = status


async def _head(response: Any) -> str:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) >= BODY:
            break
    return bytes(body[:BODY]).decode("utf-8", "replace")


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header: a number, or a date (RFC 9110, section 10.2.3)."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _checked(base_url: str) -> str:
    """``base_url`` without a slash at its end, with /v1 where it has no path."""
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ThriftyError(f"{base_url!r} is no URL: give one such as http://127.0.0.1:8000/v1") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ThriftyError(f"{base_url!r} is no base URL: give one such as http://127.0.0.1:8000/v1")
    if url.userinfo:
        raise ThriftyError(f"the base URL of {url.host} holds a password: put the key into a variable (api_key_env)")
    path = url.path.rstrip("/") or "/v1"
    return str(url.copy_with(path=path)).rstrip("/")


def _key(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise ThriftyError(f"the environment variable {name} with the API key is not set")
    if not re.fullmatch(r"[\x21-\x7e]+", value):  # a line break would begin another header
        raise ThriftyError(f"the API key in {name} has characters that no header may have: set it again")
    return value
