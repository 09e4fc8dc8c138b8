"""Who may ask, and how much at once: API keys, bodies, concurrency."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from thrifty.contracts import ThriftyError
from thrifty.serve.errors import ApiError

ENVIRONMENT = "THRIFTY_API_KEYS"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may be under way."""

    body: int = 4 << 20
    """Bytes."""
    concurrency: int = 64
    n: int = 16
    """Samples of one request, a strategy's own included."""
    tokens: int = 32_768
    """New tokens of one sample."""


class Keys:
    """The keys that open the gateway; without any it is open. Keys are compared in constant time."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        odd = [number for number, key in enumerate(keys, 1) if not re.fullmatch(r"[!-~]{8,512}", key)]
        if odd:
            raise ThriftyError(
                f"API key number {odd[0]} is no key: give 8 to 512 printable ASCII characters without spaces"
            )
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """Keys of ``file``, one per line (``#`` begins a comment), and of the environment, comma-separated."""
        found = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",") if key.strip()]
        if file is not None:
            try:
                lines = file.read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ThriftyError(f"cannot read the API keys in {file}: {error}") from error
            inside = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not inside:
                raise ThriftyError(f"{file} holds no API key: the gateway would be open. Write one key per line")
            found += inside
        return cls(tuple(found))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Mapping[str, str]) -> None:
        """ApiError 401 unless ``Authorization: Bearer KEY`` holds a key."""
        if not self._digests:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        found = False
        for known in self._digests:  # all of them: the time says nothing about which one it was
            found = hmac.compare_digest(known, digest) or found
        if not found or scheme.lower() != "bearer":
            told = "send it as 'Authorization: Bearer KEY'" if not given else "it is none of this gateway's"
            raise ApiError(
                401, f"no valid API key: {told}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )


class Gate:
    """Lets ``Limits.concurrency`` requests in; who comes then is told when to come again."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.inside = limits, 0

    def enter(self) -> None:
        if self.inside >= self.limits.concurrency:
            raise ApiError(
                429,
                f"{self.inside} requests are under way, as many as this gateway takes at once: try again soon",
                code="concurrency",
                headers={"Retry-After": "1"},
            )
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1


async def read_body(stream: AsyncIterator[bytes], declared: str | None, most: int) -> bytes:
    """A request's body; ApiError 413 as soon as it is known to be longer than ``most`` bytes."""
    too_long = ApiError(413, f"the body is longer than {most} bytes, the limit of this gateway", code="body_too_large")
    if declared is not None and declared.isdigit() and (len(declared) > 15 or int(declared) > most):
        raise too_long
    body = bytearray()
    async for part in stream:
        body += part
        if len(body) > most:
            raise too_long
    return bytes(body)
