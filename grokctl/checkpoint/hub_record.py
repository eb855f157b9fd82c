"""What a hub promises about the files of a release, and the hashes of the ranges that arrived."""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import HUB, Leaf, padded_files
from grokctl.checkpoint.trust import Trust, read_object, trust_of, trusted_metainfo
from grokctl.own_key import KeyTroubleError, sealed, why_not_sealed
from grokctl.ownership import why_exposed
from grokctl.paths import PRIVATE, read_limited, write_atomically
from grokctl.text import printable, shown_host

INFOHASH_PROOF: Final = "infohash"
HUB_PROOF: Final = "hub sha256"
"""What a receipt goes back to: hashes of a torrent, or those that a hub names."""
RANGES: Final = f"{PRIVATE}/hub.ranges"
"""The journal of ranges: the digest of the promise, then a number and a SHA-256 for each."""

_RECORD: Final = "hub.json"
_KIND: Final = "hub"
_VERSION: Final = 1
_LARGEST: Final = 16 * 2**20
_MOST_FILES: Final = 10_000
_SMALLEST_RANGE, _LARGEST_RANGE = 2**14, 2**22
_RANGES_OF_LARGEST: Final = 256
"""Ranges that the largest file is divided into, unless they would be too small or too large."""
_ENTRY: Final = 4 + 32
_SHA256: Final = re.compile("[0-9a-f]{64}")
_SHA1: Final = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """One file of a repository, with the hash that the hub names."""

    path: str
    """In the repository, such as `ckpt/tensor00000_000`."""
    place: str
    """In a release, such as `ckpt-0/tensor00000_000`."""
    nbytes: int
    sha256: str = ""
    """In hexadecimal; empty for a small file, which has a git hash alone."""
    blob: str = ""
    """SHA-1 of a git blob: of `blob`, the size, a zero byte, and the content."""


@dataclass(frozen=True, kw_only=True)
class HubPromise:
    """The files of one commit of a repository."""

    url: str
    """Of the repository, without credentials: `https://huggingface.co/xai-org/grok-1`."""
    commit: str
    """40 hexadecimal digits."""
    files: tuple[HubFile, ...]
    """In the order in which they are fetched: by place."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the promised names, sizes and hashes, in hexadecimal."""
        values = [[*asdict(file).values()] for file in self.files]
        return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()

    @property
    def host(self) -> str:
        """Of the hub, for messages."""
        return shown_host(urlsplit(self.url).hostname or "")

    @property
    def trust(self) -> str:
        """The root of trust, in words."""
        return f"the sha256 that {self.url} names at commit {self.commit}"

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def blobs(self) -> tuple[str, ...]:
        """Places of the small files, for which the hub names no sha256."""
        return tuple(file.place for file in self.files if not file.sha256)

    def metainfo(self, hashes: bytes | None = None) -> Metainfo:
        """The files divided into ranges, which take the part of a torrent's pieces.

        Args:
            hashes: SHA-256 of every range, 32 bytes each, zeros if unknown; None knows none.
        """
        largest = max(file.nbytes for file in self.files)
        length = 1 << (max(1, largest // _RANGES_OF_LARGEST) - 1).bit_length()
        length = min(max(length, _SMALLEST_RANGE), _LARGEST_RANGE)
        leaves = (Leaf(tuple(file.place.split("/")), file.nbytes, b"") for file in self.files)
        files = tuple(padded_files(leaves, length))
        count = (files[-1].offset + files[-1].length) // length
        return Metainfo(
            version=HUB,
            infohash=self.digest,
            name=self.url.rpartition("/")[2],
            piece_length=length,
            piece_hashes=bytes(32 * count) if hashes is None else hashes,
            files=files,
        )

    def by_index(self, metainfo: Metainfo) -> dict[int, HubFile]:
        """File index in `metainfo` -> the file; without pads."""
        own = (file.index for file in metainfo.files if not file.is_pad)
        return dict(zip(own, self.files, strict=True))

    def address(self, endpoint: str) -> str:
        """The folder of this commit's files at a repository's address; ends with a slash."""
        return f"{endpoint}/resolve/{quote(self.commit, safe='')}/"

    def write(self, root: Path, *, ranges_sha256: str | None = None) -> None:
        """Keep it in the release, with the MAC of this user.

        Args:
            root: The release.
            ranges_sha256: Of the journal, once every file is proven.

        Raises:
            OSError: It cannot be written.
        """
        values: dict[str, object] = {
            "version": _VERSION,
            "url": self.url,
            "commit": self.commit,
            "files": [asdict(file) for file in self.files],
            "ranges_sha256": ranges_sha256,
        }
        with suppress(KeyTroubleError):  # it is then asked for again
            values = sealed(_KIND, values)
        write_atomically(root / PRIVATE / _RECORD, json.dumps(values, indent=1).encode())

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Self | None:
        """Check values from a file; None if they are no promise."""
        try:
            if values["version"] != _VERSION or not 1 <= len(values["files"]) <= _MOST_FILES:
                return None
            files = tuple(HubFile(**file) for file in values["files"])
            is_fine = all(
                isinstance(file.path, str)
                and isinstance(file.place, str)
                and type(file.nbytes) is int
                and file.nbytes >= 0
                and (_SHA256.fullmatch(file.sha256) or _SHA1.fullmatch(file.blob))
                for file in files
            )
            is_fine &= _SHA1.fullmatch(values["commit"]) is not None
            url = printable(str(values["url"]), limit=2000)
            return cls(url=url, commit=values["commit"], files=files) if is_fine else None
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class HubRelease:
    """A release of which every file had the hash that a hub names when it was fetched."""

    promise: HubPromise
    metainfo: Metainfo
    """With the hashes of all ranges."""


def read_promise(root: Path) -> HubPromise | None:
    """What a hub promised about a release; None if this user has recorded nothing."""
    values = _read(root)
    return None if values is None else HubPromise.of_values(values)


def hub_release(root: Path) -> HubRelease | None:
    """The hashes of a release that came from a hub, complete; None if it did not.

    They are those of the ranges that this user's grokctl has read while every file had the hash
    that the hub names.
    """
    values = _read(root)
    promise = None if values is None else HubPromise.of_values(values)
    if values is None or promise is None or values.get("ranges_sha256") is None:
        return None
    journal = _journal_bytes(root)
    if hashlib.sha256(journal).hexdigest() != values["ranges_sha256"]:
        return None
    return HubRelease(promise, promise.metainfo(_hashes_in(journal, promise)))


def read_ranges(root: Path, promise: HubPromise) -> bytes:
    """The hashes of ranges in the journal, 32 bytes each in order; zeros if unknown."""
    return _hashes_in(_journal_bytes(root), promise)


def journal_of(promise: HubPromise, hashes: bytes) -> bytes:
    """A journal of all ranges whose hashes are known."""
    entries = (
        entry(number, hashes[32 * number : 32 * number + 32]) for number in range(len(hashes) // 32)
    )
    return bytes.fromhex(promise.digest) + b"".join(e for e in entries if any(e[4:]))


def entry(number: int, sha256: bytes) -> bytes:
    """One range in the journal."""
    return number.to_bytes(4) + sha256


def trusted_hashes(root: Path) -> Metainfo | None:
    """The hashes that prove a release: those of its torrent, else those of a hub.

    Returns:
        None if there are none.

    Raises:
        CorruptCheckpointError: The torrent is malformed, or not the requested one.
    """
    if (metainfo := trusted_metainfo(root)) is not None:
        return metainfo
    hub = hub_release(root)
    return None if hub is None else hub.metainfo


def trust_in(root: Path, metainfo: Metainfo) -> Trust:
    """The root of trust of the hashes of a release.

    Args:
        root: The release.
        metainfo: From `trusted_hashes`.
    """
    promise = read_promise(root) if metainfo.version == HUB else None
    return trust_of(root, metainfo.infohash) if promise is None else Trust(promise.trust)


def _read(root: Path) -> dict[str, Any] | None:
    """The record, if this user has written it and nobody else can change it."""
    path = root / PRIVATE / _RECORD
    with suppress(OSError):
        if not path.is_file() or why_exposed(path) is not None:
            return None
        values = read_object(path, limit=_LARGEST)
        return values if why_not_sealed(_KIND, values) is None else None
    return None


def _journal_bytes(root: Path) -> bytes:
    with suppress(OSError):
        return read_limited(root / RANGES, _LARGEST)
    return b""


def _hashes_in(journal: bytes, promise: HubPromise) -> bytes:
    hashes = bytearray(promise.metainfo().piece_hashes)
    head = bytes.fromhex(promise.digest)
    if journal.startswith(head):
        for start in range(len(head), len(journal) - _ENTRY + 1, _ENTRY):  # a torn end is left
            number = int.from_bytes(journal[start : start + 4])
            if 32 * number < len(hashes):
                hashes[32 * number : 32 * number + 32] = journal[start + 4 : start + _ENTRY]
    return bytes(hashes)
