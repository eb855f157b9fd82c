"""What fetch and verify leave behind: where a release came from, and what was proven about it."""

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
from grokctl.paths import PRIVATE, TORRENT, quoted, write_atomically
from grokctl.text import printable

_RECEIPT = "receipt.json"
_VERSION = 1
_SOURCE = "source.json"
_INFOHASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_TIME = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file was not touched since it was proven."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """The stamp of a file as it is now; None if there is no regular file."""
        try:
            status = path.stat()
        except (OSError, ValueError):  # ValueError: a name that no file can have
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
    """Path below the release -> how the file was when it was proven."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Path of a file that was proven before `verified_at` -> when."""

    def untouched(self, root: Path) -> set[str]:
        """Which files are still as they were when they were proven."""
        return {name for name, stamp in self.stamps.items() if Stamp.of(root / name) == stamp}

    def proven_at(self, name: str) -> str:
        """When a file was proven."""
        return self.earlier.get(name, self.verified_at)

    @property
    def since(self) -> str:
        """When the first of the files was proven."""
        return min(map(self.proven_at, self.stamps), default=self.verified_at)

    def write(self, root: Path) -> None:
        """Keep it with the release."""
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
    """A release whose every byte was proven against the torrent that its magnet named."""

    release: Release
    receipt: Receipt


def now() -> str:
    """The time for a receipt."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_receipt(root: Path) -> Receipt | None:
    """The receipt that lies with a release; None when there is none that can be read."""
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
    """Why a release's receipt cannot be read; None if it can, or if there is none."""
    path = root / PRIVATE / _RECEIPT
    if not path.is_file() or read_receipt(root) is not None:
        return None
    version = _read_json(path).get("version")
    is_other = isinstance(version, int | str) and version != _VERSION
    found = f"version {printable(str(version), limit=40)}" if is_other else "a damaged one"
    return f"{PRIVATE}/{_RECEIPT}: expected a receipt of version {_VERSION}, found {found}"


def _text(value: object, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise TypeError(value)
    return value


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def proof_of(release: Release) -> Receipt | None:
    """The receipt of a release, if it covers every tensor as the files are now."""
    receipt = read_receipt(release.root)
    if receipt is None:
        return None
    wanted = {str(tensor.path.relative_to(release.root)) for tensor in release.tensors}
    return receipt if wanted <= receipt.untouched(release.root) else None


def write_source(root: Path, *, infohash: str) -> None:
    """Record which infohash the user asked for."""
    values = {"version": 1, "infohash": infohash}
    write_atomically(root / PRIVATE / _SOURCE, json.dumps(values).encode())


def read_source(root: Path) -> str | None:
    """The infohash that the user asked for; None if no download was begun here."""
    infohash = _read_json(root / PRIVATE / _SOURCE).get("infohash")
    return infohash if isinstance(infohash, str) and _INFOHASH.fullmatch(infohash) else None


def trusted_metainfo(root: Path) -> Metainfo | None:
    """The torrent that lies with a release, if it is the one that was asked for.

    Returns:
        None if there is no torrent.

    Raises:
        CorruptCheckpointError: It is malformed, or not the one that the magnet named.
    """
    path = root / TORRENT
    if not path.is_file():
        return None
    try:
        metainfo = read_metainfo(path)
    except FetchError as error:
        raise corrupt(TORRENT, Reason.MALFORMED, str(error)) from error
    asked = read_source(root)
    if asked is not None and asked != metainfo.infohash:
        detail = f"its infohash is {metainfo.infohash}, the magnet named {asked}"
        raise corrupt(TORRENT, Reason.ALTERED, detail, f"rm {quoted(path)} && grokctl fetch")
    return metainfo


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would make us wait
        return {}
    try:
        values = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
