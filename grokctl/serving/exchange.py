"""One request and its answer: what the log says of it, and how it is written."""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from grokctl.serving.wire_errors import WireError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_KEY: Final = "grokctl"
_LONGEST_ID: Final = 128
UNKNOWN: Final = "unknown"


@dataclass(slots=True)
class Exchange:
    """What is known of a request; nothing of its texts."""

    own_id: str
    """Of a completion."""
    id: str
    """The caller's, or our own."""
    route: str = UNKNOWN
    """The template of the path."""
    origin: str | None = None
    """Of another server's page that may read the answer."""
    status: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    began_at: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.began_at

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those of every answer."""
        headers = {"x-request-id": self.id}
        if self.origin is not None:
            headers |= {
                "access-control-allow-origin": self.origin,
                "access-control-expose-headers": "x-request-id, x-grokctl-ignored, retry-after",
                "vary": "origin",
            }
        return _encoded(headers.items())


def open_exchange(scope: Scope) -> Exchange:
    """Begin an exchange; `exchange_of` finds it."""
    own = f"cmpl-{secrets.token_hex(16)}"
    given = header(scope, b"x-request-id") or ""
    is_id = 0 < len(given) <= _LONGEST_ID and given.isascii() and given.isprintable()
    exchange = Exchange(own, given if is_id and " " not in given else own)
    scope[_KEY] = exchange
    return exchange


def exchange_of(scope: Scope) -> Exchange:
    """The exchange of a request under way."""
    exchange = scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of a name, in lower case; None without one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def as_json(values: object) -> bytes:
    """One line of JSON."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="replace")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, which is an ASGI application."""

    body: bytes = b""
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        del receive
        headers = {
            "content-type": self.media_type,
            "content-length": str(len(self.body)),
            **self.headers,
        }
        await send(start(self.status, headers))
        body = b"" if scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.body", "body": body})


def json_answer(values: object, *, status: int = 200, **headers: str) -> Answer:
    """An answer of JSON; names of headers have `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(as_json(values), status, headers=named)


def error_answer(error: WireError) -> Answer:
    """An answer that says what is wrong."""
    return Answer(as_json(error.body), error.status, headers=error.headers)


def start(status: int, headers: Mapping[str, str]) -> dict[str, Any]:
    """The ASGI message that begins an answer."""
    return {
        "type": "http.response.start",
        "status": status,
        "headers": _encoded(headers.items()),
    }


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in headers
    ]
