"""Connections of strangers: so many at most, and so long to say what they want, and to listen."""

import asyncio
import socket
import ssl
import sys
import time
from contextlib import suppress
from typing import Any, Final, cast

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from grokctl.serving.exchange import as_json
from grokctl.serving.heads import MOST_NBYTES
from grokctl.serving.wire_errors import TOO_MANY, WireError, unavailable

RECEIVE_S: Final = 30.0
"""Seconds in which a whole request has to come."""
TAKE_S: Final = 60.0
"""Seconds in which a client has to take what was sent."""
MOST_REQUESTS: Final = 512
"""Under way at a time."""
_SPARE: Final = 64
"""Connections beside those of requests under way: for probes, and for those who say nothing yet."""
_FREE_CHUNKS: Final = 1024
"""Chunks of a body that may have any size."""
_CHUNK_NBYTES: Final = 256
"""Of a chunk on the average, in longer bodies."""
_PHRASES: Final = {400: "Bad Request", 431: "Request Header Fields Too Large"}


class _Connection(h11.Connection):
    """The state of HTTP, with an end to bodies in the smallest of chunks.

    All chunks of a read are taken apart before anybody else has a turn, and each costs as much as
    a kilobyte.
    """

    def __init__(self, *, most: int) -> None:
        super().__init__(h11.SERVER, most)
        self._chunks = self._nbytes = 0

    def next_event(self) -> Any:
        """The next event, unless there are too many."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._nbytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._nbytes += len(event.data)
            if self._chunks > _FREE_CHUNKS and self._nbytes < self._chunks * _CHUNK_NBYTES:
                raise h11.RemoteProtocolError("chunks are too small")
        return event


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with deadlines, and a limit of connections.

    uvicorn waits for ever for the first byte of a request, for the rest of one, and for a client
    that reads nothing. Of too many connections, the one that has been idle longest is closed: who
    only holds connections keeps nobody out.
    """

    receive_s = RECEIVE_S
    take_s = TAKE_S
    most = MOST_REQUESTS + _SPARE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Connection(most=MOST_NBYTES)
        self._deadline: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._idle_since = 0.0
        self._is_refused = False

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered, and it is not about to be closed."""
        return not self._is_refused and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection has its time from now on, if there is room for it."""
        super().connection_made(transport)
        _limit_unread(transport, seconds=self.take_s)
        self._idle_since = time.monotonic()
        if len(self.connections) > self.most and not self._has_made_room():
            self._is_refused = True
            error = unavailable("connections: expected fewer at a time", TOO_MANY, retry_after_s=1)
            self._answer(error, "Service Unavailable")
            return
        self._set_deadline()

    def _has_made_room(self) -> bool:
        others = cast("set[GuardedProtocol]", self.connections - {self})
        idle = [each for each in others if each.is_idle]
        if not idle:
            return False
        longest = min(idle, key=lambda each: each._idle_since)  # noqa: SLF001 (of this class)
        longest._is_refused = True  # noqa: SLF001
        longest.transport.abort()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._drop_deadline()
        self._drop_patience()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """It is idle again, or has the next request already."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client takes less than is sent to it, for a while at most."""
        super().pause_writing()
        self._drop_patience()
        self._patience = self.loop.call_later(self.take_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken most of it."""
        self._drop_patience()
        super().resume_writing()

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

    def _drop_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

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


class EncryptedProtocol(GuardedProtocol):
    """The same behind TLS; a handshake takes of the time and of the room of its connection.

    asyncio would tell of a connection after its handshake only, and hold any number until then.

    Args:
        context: Encrypts.
        arguments: Of uvicorn.
        options: Of uvicorn.
    """

    def __init__(self, *arguments: Any, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._context = context
        self._early: list[bytes] | None = []
        """What came with the end of the handshake; None behind it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection has its place, and begins its handshake."""
        super().connection_made(transport)
        if not self._is_refused:
            task = self.loop.create_task(self._encrypt(transport))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _encrypt(self, transport: asyncio.Transport) -> None:
        try:
            encrypted = await self.loop.start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=self.take_s
            )
        except OSError:  # no TLS, or the deadline
            encrypted = None
        if self not in self.connections:
            return
        if encrypted is None:
            self.connection_lost(None)
            return
        self.transport, self.flow, self.scheme = encrypted, FlowControl(encrypted), "https"
        early, self._early = self._early or [], None
        for data in early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        """Bytes have come, decrypted."""
        if self._early is not None:
            self._early.append(data)
        else:
            super().data_received(data)


def _limit_unread(transport: asyncio.Transport, *, seconds: float) -> None:
    """Have the system end a connection whose client reads nothing, where Linux can."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    found = transport.get_extra_info("socket")
    if option is not None and found is not None:
        with suppress(OSError):
            found.setsockopt(socket.IPPROTO_TCP, option, round(1000 * seconds))
