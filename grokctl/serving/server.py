"""The life of a server: bound before it loads, ready, draining after a signal, and its end."""

import asyncio
import contextlib
import errno
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import uvicorn

from grokctl import interrupts
from grokctl.errors import GrokctlError, UsageError, invalid
from grokctl.serving.certificates import tls_context
from grokctl.serving.connections import EncryptedProtocol, GuardedProtocol
from grokctl.serving.exchange import App
from grokctl.serving.service import Service

_BACKLOG: Final = 1024
_LAST_WORDS_S: Final = 2.0
"""For the last events of streams, after the engine or the patience has ended."""
_ENGINE_S: Final = 5.0
"""For the present step of the engine."""
_LOOK_S: Final = 0.05
_PULSE_S: Final = 1.0
_PATIENT: Final = 2
"""Signals that leave the end to the loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where a server listens, and how it ends."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes any that is free."""
    certificate: Path | None = None
    """With `private_key`, connections are encrypted."""
    private_key: Path | None = None
    drain_s: float = 30.0
    """What runs when the server has to end may go on for so long."""


@dataclass(frozen=True, slots=True)
class End:
    """How a server ended."""

    cut_off: int
    """Requests that had not ended."""
    failure: BaseException | None
    """Of the engine."""
    is_engine_idle: bool
    """Whether the thread of the engine has ended; else the process must not wait for it."""


def bound(options: ServerOptions) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        UsageError: The port is taken, the address is none of this machine, or both are impossible.
    """
    if not 0 <= options.port < 2**16:
        raise invalid("port", options.port, "expected 0 to 65535")
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        problem = "expected an address of this machine"
        raise invalid("host", options.host, problem, "--host 127.0.0.1") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_bind(error, options) from error
    listener.setblocking(False)
    return listener


def _cannot_bind(error: OSError, options: ServerOptions) -> GrokctlError:
    match error.errno:
        case errno.EADDRINUSE:
            problem = f"port {options.port} of {options.host} is taken{_by_whom(options.port)}"
            return UsageError(problem, f"--port {options.port + 1}")
        case errno.EADDRNOTAVAIL:
            problem = "expected an address of this machine"
            return invalid("host", options.host, problem, "--host 127.0.0.1")
        case errno.EACCES:
            problem = f"port {options.port}: this user may not listen there"
            return UsageError(problem, "--port 8080")
        case _:
            return UsageError(f"port {options.port} of {options.host}: {error.strerror}")


def _by_whom(port: int) -> str:
    """The program that listens, where this user may know it."""
    import psutil  # noqa: PLC0415 (for a failure alone)

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr.port == port and connection.pid and not connection.raddr:
                return f" by {psutil.Process(connection.pid).name()} ({connection.pid})"
    return ""


class _NoSignalServer(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing."""
        yield


def _protocol(options: ServerOptions) -> Callable[..., GuardedProtocol]:
    """What makes the protocol of a connection."""
    if options.certificate is None or options.private_key is None:
        return GuardedProtocol
    context = tls_context(options.certificate, options.private_key)
    return partial(EncryptedProtocol, context=context)


class Server:
    """Serves an application until a signal, or the end of its engine.

    Args:
        service: Begins to load when the server runs.
        app: Answers requests.
        options: How it ends, and its certificate.
        pulse: Called every second.

    Raises:
        UsageError: The certificate or its key cannot be used.
    """

    def __init__(
        self,
        service: Service,
        app: App,
        options: ServerOptions,
        *,
        pulse: Callable[[], object] = lambda: None,
    ) -> None:
        self._service = service
        self._options = options
        self._pulse = pulse
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0
        self._must_end = asyncio.Event()
        self._must_end_now = asyncio.Event()
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its words are not ours
        config = uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", _protocol(options)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(_LAST_WORDS_S),
            backlog=_BACKLOG,
        )
        self._uvicorn = _NoSignalServer(config)

    def run(self, listener: socket.socket) -> End:
        """Serve on a bound socket, in this thread."""
        with interrupts.handled(self._take_signal):
            return asyncio.run(self.serve(listener))

    def _take_signal(self) -> None:
        """The first signal lets what runs end, the second one ends it, the third one everything."""
        self._signals += 1
        if self._signals > _PATIENT:
            interrupts.leave()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop)

    def fail(self) -> bool:
        """End all requests with an error, from any thread; whether there is anybody to tell."""
        if self._loop is None or not self._service.busy:
            return False
        self._loop.call_soon_threadsafe(self._service.cut_off)
        return True

    def stop(self) -> None:
        """Finish what runs, and end; a second time, end now. In the loop."""
        (self._must_end_now if self._must_end.is_set() else self._must_end).set()

    async def serve(self, listener: socket.socket) -> End:
        """Serve on a bound socket, in this loop."""
        self._loop = loop = asyncio.get_running_loop()
        for _ in range(self._signals):  # from before there was a loop
            self.stop()
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[listener]))
        await _until(lambda: self._uvicorn.started or serving.done())
        self._service.engine.begin(loop)
        beating = asyncio.ensure_future(self._beat())
        try:
            await self._until_end(serving)
            cut_off = await self._drain()
        finally:
            beating.cancel()
            self._uvicorn.should_exit = True
            await serving
        is_idle = await self._service.engine.end(within_s=_ENGINE_S)
        return End(cut_off, self._service.failure, is_idle)

    async def _until_end(self, serving: "asyncio.Future[None]") -> None:
        await _until(lambda: self._must_end.is_set() or serving.done() or self._service.has_failed)

    async def _drain(self) -> int:
        """Let running requests end; how many were cut off."""
        service = self._service
        for each in self._uvicorn.servers:
            each.close()
        if not service.has_failed:
            service.drain()
            await _until(
                lambda: not service.busy or self._must_end_now.is_set() or service.has_failed,
                within_s=self._options.drain_s,
            )
        cut_off = service.cut_off()
        await _until(lambda: not service.served, within_s=_LAST_WORDS_S)
        return cut_off

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_PULSE_S)
            self._pulse()


async def _until(is_true: Callable[[], bool], *, within_s: float = math.inf) -> None:
    """Wait for what no event tells: of uvicorn, of a thread, of the answers under way."""
    until = time.monotonic() + within_s
    while not is_true() and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)
