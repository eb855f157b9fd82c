"""JAX's coordination service, carried over the proven connections of a run.

The service asks nobody who they are: whoever reaches it can read and write its store, and end the
run. So it listens at a socket in a folder that only this user can enter, and no network reaches it.
"""

import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Final

from grokctl.cluster.channel import Channel
from grokctl.errors import PeerError

_LONGEST: Final = 100
"""Bytes of a socket's path, of 108 that Linux allows."""
_FOLDERS: Final = (None, "/tmp", "/dev/shm", "/var/tmp")  # noqa: S108 (a folder of our own there)
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
        self._folder = _private_folder()
        self._path = str(self._folder / "jax")
        self._until = time.monotonic() + within_s
        if rank:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self._path)
            listener.listen(1)
            Thread(target=self._serve, args=(listener, *services), daemon=True).start()
            return
        for channel in services:
            Thread(target=self._reach, args=(channel,), daemon=True).start()

    @property
    def address(self) -> str:
        """Where JAX's service listens, or seems to."""
        return f"unix:{self._path}"

    def close_door(self) -> None:
        """Remove the socket's name: all are connected, and nobody else shall be."""
        shutil.rmtree(self._folder, ignore_errors=True)

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


def _private_folder() -> Path:
    """A folder that only this user can enter, with a path that is short enough for a socket."""
    why = ""
    for parent in _FOLDERS:
        try:
            folder = Path(tempfile.mkdtemp(prefix="grokctl-", dir=parent))
        except OSError as error:
            why = f" ({error.strerror})"
            continue
        if len(bytes(folder)) <= _LONGEST:
            return folder
        folder.rmdir()
    raise PeerError(f"{tempfile.gettempdir()}: no place for a socket{why}", "export TMPDIR=/tmp")
