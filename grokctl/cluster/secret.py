"""The secret of a job, by which the processes of a run know each other."""

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from grokctl.errors import UsageError
from grokctl.machine.disks import existing, file_system
from grokctl.paths import Home, create_beside, quoted

VARIABLE: Final = "GROKCTL_JOB_SECRET"
"""Holds the secret, or `@` and the path of a file with it."""
EXAMPLE: Final = f'export {VARIABLE}="$(head -c 32 /dev/urandom | base64)"'
SAME: Final = f"{EXAMPLE}  # once, and then its value on all hosts"
_LEAST: Final = 16
"""Bytes of a secret: fewer can be guessed from a recorded roll call."""
_MOST: Final = 4096
_OTHERS: Final = 0o077
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
        UsageError: The secret is too short, or other users can read or write its file.
        OSError: Its file cannot be read.
    """
    named = environment.get(VARIABLE, "").strip()
    if named.startswith("@"):
        return _read(Path(named[1:]))
    if named:
        return _checked(named.encode("utf-8", "surrogateescape"), VARIABLE)
    path = home.cluster_key
    if not os.path.lexists(path):
        if file_system(existing(home.root)) not in _SHARED:
            return None
        try:
            _make(path)
        except OSError:  # nobody may write there, or it has no links
            return None
    # as root on a network disk, one's own files belong to nobody: no proof of anything
    return None if path.stat().st_uid not in {0, os.geteuid()} else _read(path)


def _make(path: Path) -> None:
    """Create a file with a new secret, unless another process has just done so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = create_beside(path, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f"{secrets.token_hex(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path}: expected a file with the job secret", EXAMPLE)
        if status.st_uid not in {0, os.geteuid()}:
            raise UsageError(
                f"{path}: expected a file of user {os.geteuid()}, found one of {status.st_uid}",
                EXAMPLE,
            )
        if status.st_mode & _OTHERS:
            mode = stat.S_IMODE(status.st_mode)
            raise UsageError(
                f"{path}: expected mode 600, found {mode:03o}", f"chmod 600 {quoted(path)}"
            )
        return _checked(file.read(_MOST + 1).strip(), str(path))


def _checked(secret: bytes, name: str) -> bytes:
    if not _LEAST <= len(secret) <= _MOST:
        found = f"more than {_MOST}" if len(secret) > _MOST else str(len(secret))
        raise UsageError(
            f"{name}: expected a secret of {_LEAST} to {_MOST} bytes, found {found}", EXAMPLE
        )
    return secret
