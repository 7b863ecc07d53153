"""Who is calling: API keys, compared by SHA-256 in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from configs.settings import KeySettings, Limits
from services.gateway.errors import ApiError, refused

ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key: name, what it may use, whether /admin is open to it, whether its requests may be logged, and the tag of those
    that give none."""

    name: str
    admin: bool
    limits: Limits
    store: bool = True
    tag: str = ""


class Keyring:
    """All keys of the service. Without any, every caller on this machine may do everything, and no other caller anything."""

    def __init__(self, keys: Sequence[KeySettings], limits: Limits) -> None:
        self.open = not keys
        self._everyone = Caller(ANONYMOUS, True, limits)
        self._callers = [(digest(key), holder(key, limits)) for key in keys]

    def caller(self, request: Request) -> Caller:
        """Who sent a request. Raises ApiError 401."""
        if self.open:
            return self._local(request)
        given = hashlib.sha256(bearer(request).encode()).hexdigest()
        found = [caller for secret, caller in self._callers if hmac.compare_digest(secret, given)]
        if not found:
            raise unauthorised("The API key is not valid." if bearer(request) else "An API key is needed: Authorization: Bearer KEY.")
        return found[0]

    def admin(self, request: Request) -> Caller:
        """The same for /admin. Raises ApiError 401 or 403."""
        caller = self.caller(request)
        if not caller.admin:
            raise refused(403, f"The key {caller.name} does not open /admin.", code="admin_key_needed")
        return caller

    def _local(self, request: Request) -> Caller:
        """Everyone, if the caller sits at this machine and no web page of elsewhere speaks through its browser."""
        if not loopback(request.client.host if request.client else ""):
            raise unauthorised("This service has no API keys and therefore answers to callers on its own machine only.")
        for name in ("host", "origin"):
            for value in request.headers.getlist(name):
                if not loopback(hostname(value)):
                    raise foreign(name.capitalize(), value)
        return self._everyone


def holder(key: KeySettings, limits: Limits) -> Caller:
    return Caller(key.name, key.admin, key.limits or limits, key.store, key.tag or "")


def digest(key: KeySettings) -> str:
    return key.sha256 or hashlib.sha256(key.key.get_secret_value().encode()).hexdigest()  # type: ignore[union-attr]


def bearer(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hostname(value: str) -> str:
    """The host that a Host or Origin header names, without scheme and port; empty if it names none."""
    try:
        return urlsplit(value if "://" in value else f"//{value}").hostname or ""
    except ValueError:
        return ""


def foreign(header: str, value: str) -> ApiError:
    """What a web page gets that reaches for this machine, by a name that resolves to it or across sites."""
    message = f"This service has no API keys and therefore accepts 127.0.0.1, localhost and [::1] as {header} only, not {value[:80]!r}."
    return refused(403, message, code="foreign_caller")


def unauthorised(message: str) -> ApiError:
    error = refused(401, message, code="invalid_api_key")
    error.headers["www-authenticate"] = "Bearer"
    return error
