"""Connections between the processes of a run, on which every message proves its sender."""

import hashlib
import hmac
import select
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Final

from grokctl.errors import PeerError

_MAC: Final = hashlib.sha256().digest_size
_LENGTH: Final = 4
LARGEST: Final = 2**24
"""Bytes of a message: the tokens of a step are four each."""
_CHUNK: Final = 2**16
_ASKED_S, _ASKED = 10, 4
"""Seconds between the system's questions, and how many may stay without an answer."""
_SILENT_S: Final = 20
"""Seconds of silence after which the system asks whether the other end is there: while a person
thinks, firewalls on the way would forget the connection."""


def mac_of(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 of parts in their order; no two lists of parts have the same bytes."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8) + part)
    return mac.digest()


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one connection, made of the job's secret and what both ends have said."""

    base: bytes

    @property
    def of_head(self) -> bytes:
        """Signs what rank 0 sends."""
        return mac_of(self.base, b"from rank 0")

    @property
    def of_other(self) -> bytes:
        """Signs what the other rank sends."""
        return mac_of(self.base, b"to rank 0")


class FrameReader:
    """Messages from the bytes of a stream.

    A message is its length in 4 bytes, its bytes, and an HMAC of both and of its number: none can
    be altered, left out, repeated or moved. After one that is false, nothing more is read.

    Args:
        key: Of the sender.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._bytes = bytearray()
        self._count = 0

    def feed(self, came: bytes) -> list[bytes]:
        """Take the next bytes of the stream.

        Returns:
            The messages that they complete.

        Raises:
            PeerError: They are not what the other process sent.
        """
        self._bytes += came
        messages = []
        while len(self._bytes) >= _LENGTH:
            length = int.from_bytes(self._bytes[:_LENGTH])
            if length > LARGEST:
                raise PeerError("a message from another process is false: it is too long")
            end = _LENGTH + length + _MAC
            if len(self._bytes) < end:
                break
            message = bytes(self._bytes[_LENGTH : end - _MAC])
            mac = self._bytes[end - _MAC : end]
            if not hmac.compare_digest(mac, _frame_mac(self._key, self._count, message)):
                raise PeerError("a message from another process is false: it was altered")
            del self._bytes[:end]
            self._count += 1
            messages.append(message)
        return messages


def frame(key: bytes, number: int, message: bytes) -> bytes:
    """A message as it is sent."""
    return len(message).to_bytes(_LENGTH) + message + _frame_mac(key, number, message)


def _frame_mac(key: bytes, number: int, message: bytes) -> bytes:
    return mac_of(key, number.to_bytes(8), message)


class Channel:
    """A connection to another process of the run; any threads may send while one receives.

    Args:
        connection: Blocking from here on.
        rank: Of the process at the other end.
        sending: Key of what is sent.
        receiving: Key of what comes.
    """

    def __init__(
        self, connection: socket.socket, *, rank: int, sending: bytes, receiving: bytes
    ) -> None:
        self.connection = connection
        self.rank = rank
        self._key = sending
        self._sent = 0
        self._sending = Lock()
        self._reader = FrameReader(receiving)
        self._messages: deque[bytes] = deque()
        connection.setblocking(True)
        keep_alive(connection)

    def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            OSError: The connection is broken.
        """
        with self._sending:
            data = frame(self._key, self._sent, message)
            self._sent += 1
            self.connection.sendall(data)

    def receive(self, within_s: float | None = None) -> bytes:
        """The next message.

        Args:
            within_s: Seconds to wait; None without an end.

        Raises:
            TimeoutError: None has come yet.
            OSError: The connection is broken, or the other end has closed it.
            PeerError: What came is false.
        """
        poll = select.poll()
        try:
            poll.register(self.connection, select.POLLIN)
        except ValueError as error:  # it has no descriptor any more
            raise ConnectionAbortedError("it was closed here") from error
        while not self._messages:
            if not poll.poll(None if within_s is None else max(0, int(1000 * within_s))):
                raise TimeoutError
            came = self.connection.recv(_CHUNK)
            if not came:
                raise ConnectionResetError("it closed the connection")
            self._messages += self._reader.feed(came)
        return self._messages.popleft()

    def close(self) -> None:
        """Close the connection, whichever thread waits for it."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def keep_alive(connection: socket.socket) -> None:
    """Send small messages at once, and let the system notice a host that is gone."""
    with suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASKED_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ASKED)
