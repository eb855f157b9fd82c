"""The roll call of a run: all processes meet by rank before JAX waits for them."""

import errno
import ipaddress
import itertools
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final, Self

from grokctl.cluster.channel import Channel, Keys
from grokctl.cluster.handshake import (
    LONGEST,
    OURS,
    Purpose,
    Stranger,
    hello,
    is_challenge,
    keys_of,
    proof_line,
)
from grokctl.cluster.launcher import Launch
from grokctl.cluster.secret import EXAMPLE, SAME
from grokctl.errors import PeerError
from grokctl.text import printable

Note = Callable[[str], None]
"""Shows a sentence about what this process waits for."""

_TRY_S: Final = 5.0
_AGAIN_S: Final = 0.2
_LATER_S: Final = 1.0
"""The others wait longer than rank 0 by this, because rank 0 names the missing ranks."""
_BEGIN: Final = b"begin"
_LONGEST_ERROR: Final = 500
_STRANGERS: Final = 50
"""Connections at a time that have not proven a rank."""
_NOTES: Final = 3
"""Notes about strangers: each may come from another address."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """The connections of this process: on rank 0 to every other rank, elsewhere to rank 0."""

    services: tuple[Channel, ...]
    orders: tuple[Channel, ...]


def meet(launch: Launch, secret: bytes | None, *, within_s: float, note: Note) -> Meeting:
    """Meet the other processes.

    JAX would wait for them as well, but proves nothing, does not name missing ranks, takes any
    other server at the address for rank 0, and ends a run if a rank comes twice.

    Args:
        launch: This process.
        secret: Of this job; None where the hosts share none.
        within_s: Seconds in which the others must come.
        note: Shows who was refused, and why all of the network can reach rank 0.

    Returns:
        Connections on which every message is proven.

    Raises:
        PeerError: Ranks are missing, rank 0 cannot be reached, with the system's reason, or it does
            not have the same secret.
    """
    if launch.rank:
        return _call(launch, secret, within_s)
    if secret is None:
        note(
            f"no job secret: until all have come, whoever reaches {launch.address} can take the"
            f" place of a rank ({EXAMPLE}, the same on all hosts)"
        )
    with _Roll(launch, secret, note) as roll:
        return roll.call(within_s)


# --- rank 0


class _Roll:
    """The processes that have come; on rank 0."""

    def __init__(self, launch: Launch, secret: bytes | None, note: Note) -> None:
        self._launch = launch
        self._secret = secret
        self._note = note
        self._notes = 0
        self._selector = selectors.DefaultSelector()
        self._listeners = listen(launch, note)
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        self._strangers: dict[socket.socket, Stranger] = {}
        self._services: dict[bytes, tuple[socket.socket, Channel]] = {}
        """Proven connections of processes whose other one has not come yet."""
        self._present: list[tuple[Channel, Channel]] = []
        """Service and orders of each rank that has come."""
        self._ranks: dict[socket.socket, int] = {}
        """Of their connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Stop listening, and send the others on, or home with an error."""
        self._selector.close()
        for connection in (*self._listeners, *self._strangers):
            connection.close()
        line = _BEGIN
        if error is not None:
            why = str(error) if isinstance(error, PeerError) else "rank 0: was interrupted"
            line = why.encode()[:_LONGEST_ERROR]
        for channel in itertools.chain.from_iterable(self._present):
            with suppress(OSError):
                channel.send(line)
            if error is not None:
                channel.close()

    def call(self, within_s: float) -> Meeting:
        """Wait until all have come."""
        until = time.monotonic() + within_s
        while missing := set(range(1, self._launch.count)) - set(self._ranks.values()):
            left = until - time.monotonic()
            if left < 0:
                raise PeerError(
                    f"{_names(missing)} not come to {self._launch.address} within {within_s:.0f} s"
                )
            for key, _ in self._selector.select(left):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj in self._listeners:
                    self._accept(key.fileobj)
                elif key.fileobj.fileno() >= 0:  # not just dropped
                    self._hear(key.fileobj)
        self._present.sort(key=lambda pair: pair[0].rank)
        return Meeting(*zip(*self._present, strict=True))

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the connection is gone again
            connection, _ = listener.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
            self._strangers[connection] = Stranger(self._secret)
        if len(self._strangers) > _STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        stranger = self._strangers.pop(connection)
        if stranger.is_proven:
            self._services.pop(stranger.process, None)
        if stranger.has_no_proof and self._notes < _NOTES:
            self._notes += 1
            why = "it has not proven that it has the secret of this job"
            if self._secret is None:
                why = "it has a job secret, and rank 0 has none"
            with suppress(OSError):
                self._note(f"refused {connection.getpeername()[0]}: {why}")
        connection.close()

    def _hear(self, connection: socket.socket) -> None:
        try:
            came = connection.recv(LONGEST + 1)
        except BlockingIOError:
            return
        except OSError:
            came = b""
        if connection in self._ranks:
            raise PeerError(f"rank {self._ranks[connection]} was lost before all had come")
        stranger = self._strangers[connection]
        if stranger.is_proven:
            self._drop(connection)  # it must wait for our word
            return
        stranger.hear(came)
        if stranger.reply:
            with suppress(OSError):  # a full buffer: it does not read what it asked for
                connection.send(stranger.reply)
            stranger.reply = b""
        if stranger.is_refused:
            self._drop(connection)
        elif stranger.is_proven:
            self._seat(connection, stranger)

    def _seat(self, connection: socket.socket, rank: Stranger) -> None:
        """Take in a connection that has proven itself; with the second, the rank has come."""
        assert rank.keys is not None
        channel = Channel(
            connection, rank=rank.rank, sending=rank.keys.of_head, receiving=rank.keys.of_other
        )
        if rank.purpose is Purpose.SERVICE:
            self._services[rank.process] = connection, channel
            return
        if rank.process not in self._services:
            self._drop(connection)
            return
        other, service = self._services.pop(rank.process)
        del self._strangers[connection], self._strangers[other]
        has_come_twice = rank.rank in self._ranks.values()
        self._ranks[connection] = self._ranks[other] = rank.rank
        self._present.append((service, channel))
        if rank.count != self._launch.count:
            raise PeerError(
                f"number of processes: rank 0 has {self._launch.count}, rank {rank.rank} has"
                f" {rank.count}"
            )
        if has_come_twice:
            raise PeerError(f"rank {rank.rank} has come twice")


def _names(missing: set[int]) -> str:
    if len(missing) == 1:
        return f"rank {min(missing)}: has"
    first = sorted(missing)[:8]
    return f"ranks {', '.join(map(str, first))}{' …' if len(missing) > len(first) else ''}: have"


def listen(launch: Launch, note: Note) -> list[socket.socket]:
    """Listen for the other ranks: at the own addresses that the coordinator's name has, if any.

    A name may have none here, as behind a router that translates addresses, and many systems know
    themselves by a loopback address, by which no other host finds them: then at all addresses.

    Raises:
        PeerError: The port cannot be opened.
    """
    own: list[socket.socket] = []
    try:
        for family, address in _addresses(launch):
            try:
                own.append(socket.create_server(address, family=family))  # type: ignore[arg-type]
            except OSError as error:
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
        if own and not (_is_name(launch.host) and all(map(_is_loopback, own))):
            return own
        is_loopback = bool(own)
        while own:
            own.pop().close()
        why = "only a loopback address" if is_loopback else "no address"
        note(f"{launch.host}: {why} on this host, so rank 0 listens at all of its addresses")
        has_both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if has_both else socket.AF_INET
        return [socket.create_server(("", launch.port), family=family, dualstack_ipv6=has_both)]
    except OSError as error:
        for listener in own:
            listener.close()
        why = os.strerror(error.errno) if error.errno else str(error)
        other = 61440 + (launch.port + 1) % 4096
        raise PeerError(
            f"rank 0: port {launch.port} cannot be opened ({why})",
            f"--coordinator {launch.host}:{other}"
            if launch.is_by_hand
            else f"export JAX_COORDINATOR_PORT={other}",
        ) from error


def _addresses(launch: Launch) -> list[tuple[socket.AddressFamily, object]]:
    """The addresses that the coordinator's name has here, each once."""
    try:
        found = socket.getaddrinfo(launch.host, launch.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for an impossible host name
        return []
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _is_name(host: str) -> bool:
    """Whether a host is named by what other hosts may know by another address."""
    if host == "localhost":
        return False
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return True
    return False


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


# --- the others


def _call(launch: Launch, secret: bytes | None, within_s: float) -> Meeting:
    """Send rank 0 this rank, as soon as it is there, and wait until all have come."""
    until = time.monotonic() + within_s
    while True:
        try:
            return _come(launch, secret, until)
        except (OSError, UnicodeError) as error:  # the latter for an impossible host name
            why = getattr(error, "strerror", None) or str(error)
        if time.monotonic() > until:
            raise PeerError(f"{_unreachable(launch)} within {within_s:.0f} s ({why})")
        time.sleep(_AGAIN_S)


def _come(launch: Launch, secret: bytes | None, until: float) -> Meeting:
    """Open both connections to rank 0, and wait for its word.

    Raises:
        OSError: They are not opened, or closed again.
    """
    service, orders = channels = open_channels(launch, secret, until=until)
    try:
        words = [
            channel.receive(max(_AGAIN_S, until + _LATER_S - time.monotonic()))
            for channel in channels
        ]
    except BaseException as error:
        service.close()
        orders.close()
        if isinstance(error, TimeoutError):
            raise TimeoutError("it does not answer") from None
        raise
    for word in words:
        if word != _BEGIN:
            service.close()
            orders.close()
            raise PeerError(printable(word.decode(errors="replace"), limit=_LONGEST_ERROR))
    return Meeting((service,), (orders,))


def open_channels(launch: Launch, secret: bytes | None, *, until: float) -> tuple[Channel, Channel]:
    """The connections of this process to rank 0, on which both ends have proven themselves.

    Args:
        launch: This process.
        secret: Of this job; None where the hosts share none.
        until: Time, of the monotonic clock, until which rank 0 must answer; a few seconds at most.

    Raises:
        OSError: Rank 0 does not answer, or closes a connection.
        PeerError: It is not rank 0 of this run that answers.
    """
    process = secrets.token_hex(8)
    channels = []
    with ExitStack() as opened:
        for purpose in Purpose:
            left = max(_AGAIN_S, min(_TRY_S, until - time.monotonic()))
            connection = socket.create_connection((launch.host, launch.port), timeout=left)
            opened.enter_context(connection)
            keys = _prove(connection, hello(purpose, launch, secret, process), launch, secret)
            channels.append(
                Channel(connection, rank=0, sending=keys.of_other, receiving=keys.of_head)
            )
        opened.pop_all()
    service, orders = channels
    return service, orders


def _unreachable(launch: Launch) -> str:
    return f"rank {launch.rank}: rank 0 cannot be reached at {launch.address}"


def _prove(connection: socket.socket, line: bytes, launch: Launch, secret: bytes | None) -> Keys:
    """Prove this rank to rank 0, after rank 0 has proven itself."""
    connection.sendall(line)
    answer = _line(connection)
    keys = keys_of(secret, line, answer)
    if keys is None:
        why = "it has another job secret" if is_challenge(answer) else "something else answers"
        raise PeerError(f"{_unreachable(launch)} ({why})", SAME if is_challenge(answer) else None)
    connection.sendall(proof_line(keys))
    return keys


def _line(connection: socket.socket) -> bytes:
    """A line of rank 0, or as much as shows another server.

    Raises:
        OSError: Nothing came within the connection's timeout, or it was closed.
    """
    line, until = b"", time.monotonic() + (connection.gettimeout() or 0)
    while not line.endswith(b"\n") and len(line) <= LONGEST:
        try:
            came = connection.recv(LONGEST)
        except TimeoutError:
            raise TimeoutError("it does not answer") from None
        if not came:
            raise ConnectionResetError("the connection was closed")
        line += came
        if not line.startswith(OURS[: len(line)]):
            break
        if time.monotonic() > until:
            raise TimeoutError("it does not answer")
    return line
