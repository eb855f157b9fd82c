"""The secret of a job, by which the processes of a run know each other."""

import errno
import os
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from grokctl.errors import UsageError
from grokctl.machine.disks import existing, file_system
from grokctl.ownership import is_own, why_exposed
from grokctl.paths import Home, create_beside, quoted

VARIABLE: Final = "GROKCTL_JOB_SECRET"
"""Holds the secret, or `@` and the path of a file with it."""
EXAMPLE: Final = f'export {VARIABLE}="$(head -c 32 /dev/urandom | base64)"'
SAME: Final = f"{EXAMPLE}  # once, and then its value on all hosts"
_LEAST: Final = 16
"""Bytes of a secret: fewer can be guessed from a recorded roll call."""
_MOST: Final = 4096
_OTHERS: Final = 0o077
_MAKING_S: Final = 2.0
"""Seconds in which another process ends to make the file."""
_AGAIN_S: Final = 0.05
_SHARED: Final = frozenset(
    {"beegfs", "ceph", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "wekafs"}
)
"""File systems that hosts of a cluster share, and that keep owners and modes."""


def find_secret(environment: Mapping[str, str], home: Home) -> bytes | None:
    """The secret of this job; None where the hosts share none.

    Without the variable, it is the file `cluster.key` in the home. Where the home is on a network
    disk, which other hosts are likely to share, the first process makes that file.

    Args:
        environment: Of this process.
        home: Where checkpoints are kept.

    Raises:
        UsageError: The secret is too short, or its file is a link, or other users can read, write
            or replace it. What is there and cannot be believed is never taken for no secret.
        OSError: The file that the variable names cannot be read.
    """
    named = environment.get(VARIABLE)
    if named is not None:
        named = named.strip()
        if named.startswith("@"):
            return _read(Path(named[1:]))
        return _checked(named.encode("utf-8", "surrogateescape"), VARIABLE)
    path = home.cluster_key
    if not os.path.lexists(path):
        if file_system(existing(home.root)) not in _SHARED or why_exposed(path) is not None:
            return None
        try:
            _make(path)
        except OSError:  # nobody may write there, or it has no links
            return None
    return _read(path)


def _make(path: Path) -> None:
    """Create a file with a new secret, unless another process has just done so.

    Raises:
        OSError: It cannot be created here, or nobody could believe it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = create_beside(path, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{secrets.token_hex(32)}\n")
            file.flush()
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                # as root on a network disk, one's own files belong to nobody: no proof of anything
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _read(path: Path) -> bytes:
    """The secret in a file of this user's own, which nobody else can read or replace."""
    until = time.monotonic() + _MAKING_S
    while True:
        with _opened(path) as file:
            status = os.fstat(file.fileno())
            if status.st_nlink == 1 or time.monotonic() > until:
                _refuse_foreign(path, status)
                return _checked(file.read(_MOST + 1).strip(), str(path))
        time.sleep(_AGAIN_S)  # the process that makes it removes its other name


def _opened(path: Path) -> BinaryIO:
    """Open a file that is no link.

    Raises:
        UsageError: It is one, or may not be read.
        OSError: It cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.fdopen(os.open(path, flags), "rb")
    except IsADirectoryError:
        found = "a folder"
    except PermissionError:
        found = "one that this user may not read"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        found = "a symbolic link"
    raise UsageError(f"{path}: expected a file with the job secret, found {found}", SAME)


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    """Refuse a file that may not be this user's secret.

    Args:
        path: Where it was opened.
        status: Of what was opened.
    """
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path}: expected a file with the job secret, found something else", SAME)
    if not is_own(status):
        raise UsageError(
            f"{path}: expected a file of user {os.geteuid()}, found one of {status.st_uid}", SAME
        )
    if status.st_mode & _OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise UsageError(
            f"{path}: expected mode 600, found {mode:03o}", f"chmod 600 {quoted(path)}"
        )
    if status.st_nlink != 1:
        found = f"found {status.st_nlink} names (hard links)"
        raise UsageError(f"{path}: expected a job secret with one name, {found}", SAME)
    exposed = why_exposed(path)
    if exposed is not None:
        raise UsageError(
            f"{path}: expected a job secret that nobody else can replace, but {exposed}", SAME
        )


def _checked(secret: bytes, name: str) -> bytes:
    if not _LEAST <= len(secret) <= _MOST:
        found = f"more than {_MOST}" if len(secret) > _MOST else str(len(secret))
        raise UsageError(
            f"{name}: expected a secret of {_LEAST} to {_MOST} bytes, found {found}", EXAMPLE
        )
    return secret
