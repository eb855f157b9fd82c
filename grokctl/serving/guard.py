"""Who may ask: keys, hosts and origins, before a handler sees a request."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from grokctl.serving.exchange import App, Receive, Scope, Send, exchange_of, header, start
from grokctl.serving.wire_errors import WireError

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:@/\\\[\]]+)(?::[0-9]*)?")
"""A name, an address of IPv4, or one of IPv6 in brackets; and a port, perhaps."""
_SAFE: Final = frozenset({"GET", "HEAD"})
_ASKING: Final = "OPTIONS"
_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOptions:
    """Who may ask."""

    key: str | None = None
    """What clients have to know; None lets everybody in."""
    hosts: tuple[str, ...] | None = ()
    """Names in the header `Host`, beside those of the loopback interface; None allows all."""
    origins: tuple[str, ...] = ()
    """Other origins whose pages may ask, exactly as browsers name them."""


class Guard:
    """Refuses requests of those who may not ask.

    Args:
        app: Gets all others.
        options: Who may ask.
        open_paths: Need no key; every other path does, also one that leads nowhere.
    """

    def __init__(self, app: App, options: GuardOptions, *, open_paths: Collection[str]) -> None:
        self._app = app
        self._options = options
        self._open = frozenset(open_paths)
        self._digest = None if options.key is None else _digest(options.key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or raise.

        Raises:
            WireError: It may not.
        """
        self._check_host(scope)
        exchange = exchange_of(scope)
        exchange.origin = self._checked_origin(scope)
        if scope["method"] == _ASKING:  # a browser asks before it sends a key
            exchange.route = _ASKING
            await self._answer_browser(exchange.origin, send)
            return
        self._check_key(scope)
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        """A page whose name leads here by a trick of its name server is refused by that name."""
        if self._options.hosts is None:
            return
        host = header(scope, b"host") or ""
        name = _without_port(host)
        if not _is_loopback(name) and name not in self._options.hosts:
            message = "host: expected a name of this server (--allowed-host adds one)"
            raise WireError(403, message, "host_not_allowed")

    def _checked_origin(self, scope: Scope) -> str | None:
        """The origin that may read the answer, if it is another one than this server's."""
        origin = header(scope, b"origin")
        if origin is None:
            return None
        if origin in self._options.origins:
            return origin
        own = (header(scope, b"host") or "").lower()
        is_own = origin != "null" and _netloc(origin) == own
        if not is_own and scope["method"] not in _SAFE:
            message = "origin: expected this server's own page (--cors-origin allows another)"
            raise WireError(403, message, "origin_not_allowed")
        return None

    def _check_key(self, scope: Scope) -> None:
        if self._digest is None or scope["path"] in self._open:
            return
        given = header(scope, b"authorization") or ""
        scheme, _, key = given.partition(" ")
        if scheme.lower() != "bearer":
            key = header(scope, b"api-key") or header(scope, b"x-api-key") or ""
        if not hmac.compare_digest(_digest(key.strip()), self._digest):
            message = "key: expected `Authorization: Bearer` with this server's key"
            headers = {"WWW-Authenticate": "Bearer"}
            raise WireError(401, message, "invalid_api_key", headers=headers)

    async def _answer_browser(self, origin: str | None, send: Send) -> None:
        headers = {"content-length": "0"}
        if origin is not None:
            headers |= {
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": "authorization, content-type, x-request-id",
                "access-control-max-age": str(_DAY_S),
            }
        await send(start(204, headers))
        await send({"type": "http.response.body", "body": b""})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _without_port(host: str) -> str:
    """The name or address of a `Host` header, IPv6 in its brackets; empty if it is neither."""
    found = _HOST.fullmatch(host.lower())
    return "" if found is None else found[1]


def _is_loopback(name: str) -> bool:
    """Whether a name is this machine's alone; no name server has a say in what an address is."""
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
