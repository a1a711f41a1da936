"""API keys: who may ask, and how much. The server knows their hashes alone."""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llama3v.server.errors import ApiError

PREFIX = "l3v-"


class Key(BaseModel):
    """One `[[keys]]` of the config file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_waiting: Annotated[int, Field(ge=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


def new_key(name: str) -> tuple[str, str]:
    """(a key of 256 random bits, what the config file gets)."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f'[[keys]]\nname = "{name}"\nsha256 = "{digest_of(key)}"\n'


def digest_of(key: str) -> str:
    """SHA-256: keys are random, so there is nothing to guess and nothing to slow down."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """Knows a caller by its key, and counts its requests. Without keys everybody is `anonymous`."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.keys = tuple(keys)
        self._pace = {key.name: _Pace(key.requests_per_minute) for key in keys if key.requests_per_minute}

    def holder_of(self, authorization: str | None) -> Key | None:
        """Whose key this header carries; None where no key is needed. Raises ApiError (401)."""
        if not self.keys:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise ApiError(401, "Send your API key in the header Authorization: Bearer KEY.", code="missing_api_key")
        digest = digest_of(given.strip())
        found = None
        for key in self.keys:  # all of them, each in constant time: how long it takes tells nothing
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None:
            raise ApiError(401, "This API key is not known here.", code="invalid_api_key")
        return found

    def count(self, key: Key | None) -> None:
        """One more request of this key. Raises ApiError (429) where it has had its share of this minute."""
        pace = self._pace.get(key.name) if key else None
        if pace is not None:
            pace.take()


class _Pace:
    """A bucket of requests that fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._per_second = per_minute / 60
        self._most = self._left = float(per_minute)
        self._at = time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._left = min(self._most, self._left + (now - self._at) * self._per_second)
            self._at = now
            if self._left < 1:
                wait = max(1, round((1 - self._left) / self._per_second))
                raise ApiError(
                    429, "This key has used its requests of this minute.", code="rate_limited", retry_after=wait
                )
            self._left -= 1
