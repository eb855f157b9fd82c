"""JAX's coordination service, carried over the proven connections of a run.

The service asks nobody who they are: whoever reaches it can read and write its store, and end the
run. So it listens at a socket in a folder that only this user can enter, and no network reaches it.
"""

import errno
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Final

from grokctl.cluster.channel import Channel
from grokctl.errors import PeerError
from grokctl.os_errors import reason_of
from grokctl.temporary import TemporaryFolder, temporary_folder

_CHUNK: Final = 2**16
_AGAIN_S: Final = 0.02


class Tunnel:
    """The way to JAX's service, which rank 0 runs.

    Args:
        rank: Of this process.
        services: On rank 0, connections to all other ranks; elsewhere, the one to rank 0.
        within_s: Seconds until the service is there.

    Raises:
        PeerError: There is no folder for the socket.
    """

    def __init__(self, rank: int, services: tuple[Channel, ...], *, within_s: float) -> None:
        self._closing = ExitStack()
        self._folder = _private_folder(self._closing)
        self._path = str(self._folder.path / "jax")
        self._until = time.monotonic() + within_s
        if rank:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self._path)
            self.require_own()
            listener.listen(1)
            Thread(target=self._serve, args=(listener, *services), daemon=True).start()
            return
        for channel in services:
            Thread(target=self._reach, args=(channel,), daemon=True).start()

    @property
    def address(self) -> str:
        """Where JAX's service listens, or seems to."""
        return f"unix:{self._path}"

    def require_own(self) -> None:
        """Check that the socket is in the folder that was made for it.

        Raises:
            PeerError: Its path leads to another.
        """
        if not self._folder.is_in_place:
            message = "was replaced by somebody while the processes came together"
            raise PeerError(f"{self._folder.path}: {message}", "export TMPDIR=/tmp")

    def close_door(self) -> None:
        """Remove the socket's name: all are connected, and nobody else shall be."""
        self._closing.close()

    def _serve(self, listener: socket.socket, channel: Channel) -> None:
        """Carry the bytes of the one client of this process."""
        with listener:
            local, _ = listener.accept()
        carry(local, channel)

    def _reach(self, channel: Channel) -> None:
        """Carry the bytes of another rank's client to the service, once it is there."""
        local = socket.socket(socket.AF_UNIX)
        while time.monotonic() < self._until:
            try:
                local.connect(self._path)
            except OSError:
                time.sleep(_AGAIN_S)
            else:
                carry(local, channel)
                return
        local.close()
        channel.close()


def carry(local: socket.socket, channel: Channel) -> None:
    """Carry bytes both ways until either end closes, or what came from outside is false."""
    outwards = (partial(local.recv, _CHUNK), channel.send, local, channel)
    thread = Thread(target=_copy, args=outwards, daemon=True)
    with local:
        thread.start()
        _copy(channel.receive, local.sendall, local, channel)
        thread.join()


def _copy(
    take: Callable[[], bytes], give: Callable[[bytes], None], local: socket.socket, to: Channel
) -> None:
    with suppress(OSError, PeerError):
        while came := take():
            give(came)
    with suppress(OSError):
        local.shutdown(socket.SHUT_RDWR)
    to.close()


def _private_folder(closing: ExitStack) -> TemporaryFolder:
    """A folder that only this user can enter, in which a socket can be made."""
    try:
        return closing.enter_context(temporary_folder(suits=_takes_sockets))
    except OSError as error:
        message = f"{error.filename}: no place for a socket ({reason_of(error)})"
        raise PeerError(message, "export TMPDIR=/tmp") from error


def _takes_sockets(folder: Path) -> None:
    """Make a socket in a folder: not every disk has them, and not every path is short enough.

    Raises:
        OSError: It cannot be made.
    """
    path = folder / "a-trial"
    try:
        with socket.socket(socket.AF_UNIX) as trial:
            trial.bind(str(path))
        path.unlink()
    except OSError as error:
        raise OSError(error.errno or errno.ENAMETOOLONG, reason_of(error), str(folder)) from error
