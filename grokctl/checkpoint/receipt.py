"""Records of fetch and verify in a release: its infohash, and the receipt of its proof."""

import json
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from grokctl.checkpoint.release import Release
from grokctl.checkpoint.torrent import Metainfo, read_metainfo
from grokctl.errors import FetchError, Reason, corrupt
from grokctl.os_errors import TooLargeError, is_absence
from grokctl.paths import PRIVATE, TORRENT, quoted, read_limited, write_atomically
from grokctl.text import printable

_RECEIPT = "receipt.json"
_VERSION = 1
_SOURCE = "source.json"
_LARGEST = 2**24
"""Bytes of either; a stamp has some two hundred."""
_INFOHASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_TIME = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True, slots=True)
class Stamp:
    """File metadata that shows whether a file changed since it was proven."""

    size: int
    mtime_ns: int
    inode: int
    device: int = field(compare=False)
    """Of the file system, until it is mounted again: recorded, and never compared."""

    @property
    def lasting(self) -> tuple[int, int, int]:
        """What a reboot or another mount does not change."""
        return self.size, self.mtime_ns, self.inode

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """The stamp of a file now; None if it is not a regular file.

        Raises:
            OSError: The machine refuses to look at it.
        """
        try:
            status = path.stat()
        except ValueError:  # an impossible file name
            return None
        except OSError as error:
            if not is_absence(error):
                raise
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Files whose content was proven against an infohash."""

    infohash: str
    verified_at: str
    """When the last of the files was proven; ISO 8601, UTC."""
    stamps: Mapping[str, Stamp]
    """Path below the release -> the file's stamp when it was proven."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Path of a file that was proven before `verified_at` -> the time."""

    def untouched(self, root: Path) -> set[str]:
        """Files that are unchanged since they were proven."""
        return {name for name, stamp in self.stamps.items() if _has(root / name, stamp)}

    def proven_at(self, name: str) -> str:
        """When a file was proven."""
        return self.earlier.get(name, self.verified_at)

    @property
    def since(self) -> str:
        """When the first of the files was proven."""
        return min(map(self.proven_at, self.stamps), default=self.verified_at)

    def write(self, root: Path) -> None:
        """Write it into the release."""
        values = {
            "version": _VERSION,
            "infohash": self.infohash,
            "verified_at": self.verified_at,
            "files": {
                name: [stamp.size, stamp.mtime_ns, stamp.inode, stamp.device]
                for name, stamp in sorted(self.stamps.items())
            },
            "earlier": dict(sorted(self.earlier.items())),
        }
        write_atomically(root / PRIVATE / _RECEIPT, json.dumps(values, indent=1).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRelease:
    """A release of which every byte was proven against the torrent of its magnet."""

    release: Release
    receipt: Receipt


def now() -> str:
    """The current time, for a receipt."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_receipt(root: Path) -> Receipt | None:
    """The receipt of a release; None if there is none, or it is malformed."""
    values = _read_json(root / PRIVATE / _RECEIPT)
    try:
        if values["version"] != _VERSION:
            return None
        return Receipt(
            infohash=_text(values["infohash"], _INFOHASH),
            verified_at=_text(values["verified_at"], _TIME),
            stamps={name: Stamp(*map(_integer, stamp)) for name, stamp in values["files"].items()},
            earlier={name: _text(at, _TIME) for name, at in values.get("earlier", {}).items()},
        )
    except (KeyError, TypeError, AttributeError):
        return None


def unread_receipt(root: Path) -> str | None:
    """The reason why a receipt cannot be read; None if it can, or if there is none."""
    path = root / PRIVATE / _RECEIPT
    if not path.is_file() or read_receipt(root) is not None:
        return None
    version = _read_json(path).get("version")
    is_other = isinstance(version, int | str) and version != _VERSION
    actual = f"version {printable(str(version), limit=40)}" if is_other else "a damaged one"
    return f"{PRIVATE}/{_RECEIPT}: expected a receipt of version {_VERSION}, found {actual}"


def _has(path: Path, stamp: Stamp) -> bool:
    """Whether a file has a stamp; not if the machine refuses to look at it."""
    try:
        return Stamp.of(path) == stamp
    except OSError:
        return False


def _text(value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise TypeError(value)
    return value


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def proof_of(release: Release) -> Receipt | None:
    """The receipt of a release, if it covers every tensor file as it is now."""
    receipt = read_receipt(release.root)
    if receipt is None:
        return None
    wanted = {str(tensor.path.relative_to(release.root)) for tensor in release.tensors}
    return receipt if wanted <= receipt.untouched(release.root) else None


def write_source(root: Path, *, infohash: str) -> None:
    """Record the infohash that the user requested."""
    values = {"version": 1, "infohash": infohash}
    write_atomically(root / PRIVATE / _SOURCE, json.dumps(values).encode())


def read_source(root: Path) -> str | None:
    """The infohash that the user requested; None if no download has begun."""
    infohash = _read_json(root / PRIVATE / _SOURCE).get("infohash")
    return infohash if isinstance(infohash, str) and _INFOHASH.fullmatch(infohash) else None


def trusted_metainfo(root: Path) -> Metainfo | None:
    """The torrent in a release, checked against the requested infohash.

    Returns:
        None if there is no torrent.

    Raises:
        CorruptCheckpointError: It is malformed, or not the requested one.
    """
    path = root / TORRENT
    if not path.is_file():
        return None
    try:
        metainfo = read_metainfo(path)
    except FetchError as error:
        raise corrupt(TORRENT, Reason.MALFORMED, str(error)) from error
    requested = read_source(root)
    if requested is not None and requested != metainfo.infohash:
        detail = f"expected infohash {requested}, found {metainfo.infohash}"
        raise corrupt(TORRENT, Reason.ALTERED, detail, f"rm {quoted(path)} && grokctl fetch")
    return metainfo


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # reading a pipe would block
        return {}
    try:
        values = json.loads(read_limited(path, _LARGEST).decode())
    except TooLargeError as error:
        detail = error.strerror or ""
        name = f"{PRIVATE}/{path.name}"
        raise corrupt(name, Reason.MALFORMED, detail, f"rm {quoted(path)}") from error
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
