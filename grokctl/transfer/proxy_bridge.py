"""A SOCKS5 proxy for libtorrent alone, which reaches everything through the user's HTTP proxy.

libtorrent looks the hosts of https trackers, UDP trackers and web seeds up on this machine before
it asks an HTTP proxy for their addresses, also those that a server redirects to. Names it gives to
a SOCKS5 proxy only. So it gets one: on the loopback interface, with a password that nobody knows.
"""

import asyncio
import hmac
import ipaddress
import re
import secrets
import socket
from base64 import b64encode
from collections.abc import Coroutine
from contextlib import suppress
from threading import Thread
from typing import Final, Self
from urllib.parse import unquote, urlsplit

_ADDRESS: Final = "127.0.0.1"
_BUFFER: Final = 2**18
_ANSWERS_WITHIN_S: Final = 60.0
_GREETS_WITHIN_S: Final = 10.0
_MOST_STRANGERS: Final = 128
"""Connections that have not shown the password yet."""
_NAME: Final = re.compile("[!-~]+")
_MADE: Final = re.compile(rb"HTTP/1\.[01] 2\d\d ")
# RFC 1928 and 1929
_VERSION, _PASSWORD_VERSION, _BY_PASSWORD, _NO_METHOD = 5, 1, 2, 0xFF
_CONNECT: Final = 1
_IPV4, _NAMED, _IPV6 = 1, 3, 4
_FINE, _REFUSED, _UNKNOWN_COMMAND = 0, 5, 7


class _RefusalError(Exception):
    """The proxy does not connect to a host."""


class ProxyBridge:
    """A listening socket and a thread, until it is closed."""

    def __init__(self, proxy: str, *, bind: str | None = None) -> None:
        """Begin to listen.

        Args:
            proxy: `http://user:password@host:port`.
            bind: The only local address to reach it from.

        Raises:
            OSError: There is no port left to listen on.
        """
        parts = urlsplit(proxy)
        assert parts.hostname is not None
        assert parts.port is not None
        self._proxy = parts.hostname, parts.port
        self._headers = ""
        if parts.username is not None:
            known = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers = f"Proxy-Authorization: Basic {b64encode(known.encode()).decode()}\r\n"
        self._from = None if bind is None else (bind, 0)
        self._user, self._password = secrets.token_hex(16), secrets.token_hex(16)
        self._strangers = 0
        self._socket = socket.create_server((_ADDRESS, 0))
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = Thread(target=self._run, name="proxy-bridge", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens, with its password."""
        port = self._socket.getsockname()[1]
        return f"socks5://{self._user}:{self._password}@{_ADDRESS}:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections, and the thread."""
        with suppress(RuntimeError):  # it was closed before
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, sock=self._socket)
        await self._stop.wait()
        server.close()  # its connections end with the loop

    async def _answer(self, near: asyncio.StreamReader, reply: asyncio.StreamWriter) -> None:
        """One connection of libtorrent, from its first byte to its last."""
        away: asyncio.StreamWriter | None = None
        try:
            place = await self._let_in(near, reply)
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                far, away = await asyncio.open_connection(*self._proxy, local_addr=self._from)
                await self._reach(place, far, away)
            reply.write(_answer_of(_FINE))
            await _until_one_ends(_carry(near, away), _carry(far, reply))
        except (OSError, EOFError, ValueError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the other end sees a closed connection
        except _RefusalError:
            with suppress(OSError):
                reply.write(_answer_of(_REFUSED))
        except asyncio.CancelledError:
            pass  # the bridge closes; Python 3.11 would print a handler that says so
        finally:
            for writer in (reply, away):
                if writer is not None:
                    writer.close()

    async def _let_in(self, near: asyncio.StreamReader, reply: asyncio.StreamWriter) -> str:
        """`_asked_for`, for a few at a time and not for long: any program here can connect.

        Raises:
            ValueError: There are too many, or it is not libtorrent.
            TimeoutError: It is slow.
        """
        if self._strangers >= _MOST_STRANGERS:
            raise ValueError(self._strangers)
        self._strangers += 1
        try:
            async with asyncio.timeout(_GREETS_WITHIN_S):
                return await self._asked_for(near, reply)
        finally:
            self._strangers -= 1

    async def _asked_for(self, near: asyncio.StreamReader, reply: asyncio.StreamWriter) -> str:
        """The host and port that libtorrent names, once it has shown the password.

        Raises:
            ValueError: It is not libtorrent, or does not speak SOCKS5, or wants no connection.
        """
        version, count = await near.readexactly(2)
        methods = await near.readexactly(count)
        if version != _VERSION or _BY_PASSWORD not in methods:
            reply.write(bytes([_VERSION, _NO_METHOD]))
            raise ValueError(methods)
        reply.write(bytes([_VERSION, _BY_PASSWORD]))
        await near.readexactly(1)
        given = [await near.readexactly((await near.readexactly(1))[0]) for _ in range(2)]
        known = hmac.compare_digest(given[0], self._user.encode())
        known &= hmac.compare_digest(given[1], self._password.encode())
        reply.write(bytes([_PASSWORD_VERSION, not known]))
        if not known:
            raise ValueError(given[0])
        _, command, _, kind = await near.readexactly(4)
        host = await _host(near, kind)
        port = int.from_bytes(await near.readexactly(2), "big")
        if command != _CONNECT:
            reply.write(_answer_of(_UNKNOWN_COMMAND))
            raise ValueError(command)
        return f"{host}:{port}"

    async def _reach(
        self, place: str, far: asyncio.StreamReader, away: asyncio.StreamWriter
    ) -> None:
        """Let the HTTP proxy connect to a host.

        Raises:
            _RefusalError: It does not.
        """
        away.write(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{self._headers}\r\n".encode())
        head = await far.readuntil(b"\r\n\r\n")
        if not _MADE.match(head):
            raise _RefusalError(place)


async def _host(near: asyncio.StreamReader, kind: int) -> str:
    """The address or name of a request.

    Raises:
        ValueError: It is none, or could smuggle a second line to the proxy.
    """
    if kind == _NAMED:
        name = (await near.readexactly((await near.readexactly(1))[0])).decode("ascii")
        if not _NAME.fullmatch(name):
            raise ValueError(name)
        return name
    if kind not in {_IPV4, _IPV6}:
        raise ValueError(kind)
    address = ipaddress.ip_address(await near.readexactly(4 if kind == _IPV4 else 16))
    return f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004 (IPv6)


def _answer_of(code: int) -> bytes:
    """A reply to a request; nobody looks at its address."""
    return bytes([_VERSION, code, 0, _IPV4, 0, 0, 0, 0, 0, 0])


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Carry bytes until the source ends."""
    while data := await source.read(_BUFFER):
        target.write(data)
        await target.drain()


async def _until_one_ends(*ways: Coroutine[None, None, None]) -> None:
    """Carry both ways; libtorrent closes both at once, and a peer that does not is not waited for.

    What was carried before the end is still sent when the connection is closed.
    """
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
