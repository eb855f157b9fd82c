"""The roll call of a run: all processes meet by rank before JAX waits for them."""

import os
import re
import selectors
import socket
import time
from contextlib import closing, suppress
from typing import Final, Self

from grokctl.cluster.launcher import Launch
from grokctl.errors import PeerError

_TRY_S: Final = 5.0
_AGAIN_S: Final = 0.2
_LATER_S: Final = 1.0
"""The others wait longer than rank 0 by this, because rank 0 names the missing ranks."""
_OURS: Final = b"grokctl "
"""Beginning of our lines, which tells them from a web server's or JAX's."""
_HERE: Final = re.compile(_OURS + rb"(\d{1,9}) of (\d{1,9})\n")
_BEGIN: Final = _OURS + b"begin\n"
_LONGEST: Final = 1000
"""Bytes of a line."""
_STRANGERS: Final = 50
"""Connections at a time that have not sent a rank."""


def meet(launch: Launch, *, within_s: float) -> None:
    """Meet the other processes, at the future address of JAX's service.

    JAX would wait for them as well, but does not name missing ranks, takes any other server at the
    address for rank 0, and ends a run if a rank comes twice.

    Args:
        launch: This process.
        within_s: Seconds in which the others must come.

    Raises:
        PeerError: Ranks are missing, or rank 0 cannot be reached; with the system's reason.
    """
    if launch.rank:
        _call(launch, within_s)
        return
    with _Roll(launch) as roll:
        roll.call(within_s)


class _Roll:
    """The processes that have come; on rank 0."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._listener = _listen(launch)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._strangers: dict[socket.socket, bytes] = {}
        """Connections without a rank yet, and the bytes that they sent."""
        self._present: dict[socket.socket, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Send the others on to JAX, whose service listens here next, or home with an error."""
        self._selector.close()
        self._listener.close()
        for connection in self._strangers:
            connection.close()
        line = _BEGIN
        if error is not None:
            why = str(error) if isinstance(error, PeerError) else "rank 0: was interrupted"
            line = _OURS + why.encode()[: _LONGEST // 2] + b"\n"
        for connection in self._present:
            with suppress(OSError), connection:
                connection.sendall(line)

    def call(self, within_s: float) -> None:
        """Wait until all have come."""
        until = time.monotonic() + within_s
        while len(self._present) < self._launch.count - 1:
            left = until - time.monotonic()
            if left < 0:
                missing = set(range(1, self._launch.count)) - set(self._present.values())
                raise PeerError(
                    f"{_ranks(missing)} not come to {self._launch.address} within {within_s:.0f} s"
                )
            for key, _ in self._selector.select(left):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj.fileno() >= 0:  # not just dropped
                        self._hear(key.fileobj)

    def _accept(self) -> None:
        with suppress(OSError):  # the connection is gone again
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
            self._strangers[connection] = b""
        if len(self._strangers) > _STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _drop(self, stranger: socket.socket) -> None:
        self._selector.unregister(stranger)
        del self._strangers[stranger]
        stranger.close()

    def _hear(self, connection: socket.socket) -> None:
        try:
            came = connection.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            came = b""
        if connection in self._present:
            if not came:
                raise PeerError(f"rank {self._present[connection]} was lost before all had come")
            return
        line = self._strangers[connection] + came
        self._strangers[connection] = line
        match = _HERE.fullmatch(line)
        if match is None or int(match[1]) >= int(match[2]):
            if not came or match or len(line) > _LONGEST or not _OURS.startswith(line[:8]):
                self._drop(connection)
            return
        rank, count = int(match[1]), int(match[2])
        present = set(self._present.values()) | {0}
        del self._strangers[connection]
        self._present[connection] = rank
        if count != self._launch.count:
            raise PeerError(
                f"number of processes: rank 0 has {self._launch.count}, rank {rank} has {count}"
            )
        if rank in present:
            raise PeerError(f"rank {rank} has come twice")


def _ranks(missing: set[int]) -> str:
    if len(missing) == 1:
        return f"rank {min(missing)}: has"
    first = sorted(missing)[:8]
    return f"ranks {', '.join(map(str, first))}{' …' if len(missing) > len(first) else ''}: have"


def _call(launch: Launch, within_s: float) -> None:
    """Send rank 0 this rank, and wait until all have come."""
    until = time.monotonic() + within_s
    unreachable = f"rank {launch.rank}: rank 0 cannot be reached at {launch.address}"
    while True:
        try:
            left = max(_AGAIN_S, min(_TRY_S, until - time.monotonic()))
            address = (launch.host, launch.port)
            with closing(socket.create_connection(address, timeout=left)) as connection:
                answer = _ask(launch, connection, within_s + _LATER_S)
        except (OSError, UnicodeError) as error:  # the latter for an impossible host name
            why = getattr(error, "strerror", None) or error
        else:
            if answer == _BEGIN:
                return
            if answer.endswith(b"\n") and answer.startswith(_OURS):
                raise PeerError(answer[len(_OURS) :].decode(errors="replace").strip())
            if answer:
                raise PeerError(f"{unreachable} (something else answers, or a run that has begun)")
            why = "the connection was closed"
        if time.monotonic() > until:
            raise PeerError(f"{unreachable} within {within_s:.0f} s ({why})")
        time.sleep(_AGAIN_S)


def _ask(launch: Launch, connection: socket.socket, within_s: float) -> bytes:
    """Rank 0's answer, or as much as shows another server; empty if the connection closed."""
    until, answer = time.monotonic() + within_s, b""
    connection.sendall(_OURS + f"{launch.rank} of {launch.count}\n".encode())
    while not answer.endswith(b"\n") and len(answer) < _LONGEST:
        connection.settimeout(max(_AGAIN_S, until - time.monotonic()))
        try:
            came = connection.recv(_LONGEST)
        except TimeoutError:
            raise TimeoutError("it does not answer") from None
        if not came:
            return b""
        answer += came
        if not answer.startswith(_OURS[: len(answer)]):
            break
        if time.monotonic() > until:
            break
    return answer


def _listen(launch: Launch) -> socket.socket:
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    try:
        return socket.create_server(("", launch.port), family=family, dualstack_ipv6=has_both)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        other = 61440 + (launch.port + 1) % 4096
        raise PeerError(
            f"rank 0: port {launch.port} cannot be opened ({why})",
            f"--coordinator {launch.host}:{other}"
            if launch.is_by_hand
            else f"export JAX_COORDINATOR_PORT={other}",
        ) from error
