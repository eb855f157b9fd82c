"""Connections of strangers: so many at most, and so long to say what they want."""

import asyncio
import sys
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from grokctl.serving.exchange import as_json
from grokctl.serving.wire_errors import WireError, unavailable

RECEIVE_S: Final = 30.0
"""Seconds in which a whole request has to come."""
MOST_CONNECTIONS: Final = 512
_PHRASES: Final = {400: "Bad Request", 431: "Request Header Fields Too Large"}


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with a deadline for requests, and a limit of connections.

    uvicorn waits for ever for the rest of a request, and for the first byte of one.
    """

    receive_s = RECEIVE_S
    most = MOST_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is one too many, or has its time from now on."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._is_refused = True
            error = unavailable(
                "connections: expected fewer at a time", "too_many", retry_after_s=1
            )
            self._answer(error, "Service Unavailable")
            return
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._drop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: the beginning of a request has its time, too."""
        if self._is_refused:
            return
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._set_deadline()
        super().data_received(data)

    def handle_events(self) -> None:
        """A complete request has no deadline any more."""
        super().handle_events()
        cycle = self.cycle  # the last one, until the next request has all its headers
        if cycle is not None and not (cycle.more_body or cycle.response_complete):
            self._drop_deadline()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, as JSON."""
        problem = sys.exception()
        status = getattr(problem, "error_status_hint", 400)
        status = status if status in _PHRASES else 400
        self._answer(WireError(status, msg.rstrip(".").lower()), _PHRASES[status])

    def _answer(self, error: WireError, phrase: str) -> None:
        body = as_json(error.body)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **{name.lower(): value for name, value in error.headers.items()},
        }
        lines = [f"HTTP/1.1 {error.status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _set_deadline(self) -> None:
        self._drop_deadline()
        self._deadline = self.loop.call_later(self.receive_s, self._expire)

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle is not None and not self.cycle.response_started:
            self._answer(WireError(408, "the request did not come in time"), "Request Timeout")
        else:
            self.transport.close()
