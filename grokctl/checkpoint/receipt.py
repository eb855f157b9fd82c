"""The receipt of a proof: which files of a checkpoint were proven, as they were then."""

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from grokctl.checkpoint.hub_record import HUB_PROOF, INFOHASH_PROOF
from grokctl.checkpoint.published import Checkpoint
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.trust import (
    GROK_1_TOKENIZER_SHA256,
    LONGEST,
    read_object,
    read_source,
    trust_of,
)
from grokctl.os_errors import TooLargeError, is_absence
from grokctl.own_key import sealed, why_not_sealed
from grokctl.ownership import exposed_files, first_exposure, why_exposed
from grokctl.paths import (
    CONFIG,
    LARGEST_TOKENIZER,
    PRIVATE,
    TOKENIZER,
    delete_record,
    read_limited,
    write_atomically,
)
from grokctl.text import printable

_RECEIPT = "receipt.json"
_KIND: Final = "receipt"
_VERSION = 3
_LACKING: Final = {1: "times of change (ctime)", 2: "MAC of this user"}
_INFOHASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_TIME = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_LARGEST: Final = 32 * 2**20
"""Bytes of a receipt: of ten thousand files with the longest names."""
_MOST_VALUES: Final = 200_000
"""Values of a receipt: those files have seven each. A value takes far more memory than bytes."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """File metadata that shows whether a file changed since it was proven."""

    size: int
    mtime_ns: int
    inode: int
    device: int = field(compare=False)
    """Of the file system, until it is mounted again: recorded, and never compared."""
    ctime_ns: int = field(repr=False)
    """Of the last change to the file or to its metadata, which no program can set back. Also
    chmod, a new hard link and a new name count."""

    @property
    def lasting(self) -> tuple[int, int, int, int]:
        """What a reboot or another mount does not change."""
        return self.size, self.mtime_ns, self.inode, self.ctime_ns

    def differs_in_ctime_only(self, other: "Stamp") -> bool:
        """Whether only the metadata of a file seem to have changed."""
        return self.lasting[:-1] == other.lasting[:-1] and self.ctime_ns != other.ctime_ns

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
        return cls(
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            device=status.st_dev,
            ctime_ns=status.st_ctime_ns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Files whose content was proven against an infohash, or against a manifest."""

    infohash: str
    """Of the torrent; of a ready checkpoint, the sha256 of its manifest."""
    verified_at: str
    """When the last of the files was proven; ISO 8601, UTC."""
    stamps: Mapping[str, Stamp]
    """Path below the checkpoint -> the file's stamp when it was proven."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Path of a file that was proven before `verified_at` -> the time."""
    is_complete: bool = False
    """Whether these are all the files that the torrent, or the manifest, promises."""
    root_of_trust: str = ""
    """Of the infohash, in words; see `Trust`. Of a ready checkpoint: of its source, if this machine
    made it from one that was proven; else empty."""
    proven_by: str = INFOHASH_PROOF
    """What the hashes are: the infohash's, or those that a hub names (`HUB_PROOF`), which are less
    of a proof. Of a ready checkpoint: of its source."""

    def unchanged(self, root: Path) -> set[str]:
        """Files that have the same stamps as when they were proven, which others could fake."""
        return {name for name, stamp in self.stamps.items() if _has(root / name, stamp)}

    def untouched(self, root: Path) -> set[str]:
        """Files that are unchanged since they were proven, and that no other user can change."""
        unchanged = self.unchanged(root)
        return unchanged - exposed_files(root, unchanged).keys()

    def proven_at(self, name: str) -> str:
        """When a file was proven."""
        return self.earlier.get(name, self.verified_at)

    @property
    def since(self) -> str:
        """When the first of the files was proven."""
        return min(map(self.proven_at, self.stamps), default=self.verified_at)

    def write(self, root: Path) -> None:
        """Write it into the checkpoint, with the MAC of this user.

        Raises:
            OSError: It cannot be written, or this user has no key.
        """
        values = {
            "version": _VERSION,
            "infohash": self.infohash,
            "verified_at": self.verified_at,
            "files": {
                name: [stamp.size, stamp.mtime_ns, stamp.inode, stamp.device, stamp.ctime_ns]
                for name, stamp in sorted(self.stamps.items())
            },
            "earlier": dict(sorted(self.earlier.items())),
            "complete": self.is_complete,
            "root_of_trust": self.root_of_trust,
            "proven_by": self.proven_by,
        }
        data = json.dumps(sealed(_KIND, values), indent=1).encode()
        write_atomically(root / PRIVATE / _RECEIPT, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRelease:
    """A release of which every byte was proven against the torrent of its magnet."""

    release: Release
    receipt: Receipt


def now() -> str:
    """The current time, for a receipt."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_receipt(root: Path) -> Receipt | None:
    """The receipt of a checkpoint.

    Returns:
        None if there is none, if it is malformed or of a version that did not record all that is
        compared now, or if somebody else could have written it; see `unread_receipt`.
    """
    return look_for_receipt(root)[0]


def look_for_receipt(root: Path) -> tuple[Receipt | None, str | None]:
    """The receipt of a checkpoint, as by `read_receipt`, or the reason why it is not believed.

    Returns:
        None and None if there is none.
    """
    path = root / PRIVATE / _RECEIPT
    with suppress(OSError):  # the reason for that follows
        if not path.is_file():
            return None, None
    if (exposure := why_exposed(path)) is not None:  # costs nothing, whatever is in it
        return None, f"receipt: {exposure}"
    try:
        values = read_object(path, limit=_LARGEST, most_values=_MOST_VALUES)
    except TooLargeError as error:
        return None, f"{PRIVATE}/{_RECEIPT}: {error.strerror}"
    receipt = _parsed(values)
    if receipt is None:
        return None, _reason_in(values)
    if (problem := why_not_sealed(_KIND, values)) is not None:
        return None, f"{PRIVATE}/{_RECEIPT}: {problem}"
    return receipt, None


def _parsed(values: Mapping[str, Any]) -> Receipt | None:
    """A receipt of this version; None if something in it makes no sense."""
    try:
        if values["version"] != _VERSION or type(values["complete"]) is not bool:
            return None
        return Receipt(
            infohash=_text(values["infohash"], _INFOHASH),
            verified_at=_text(values["verified_at"], _TIME),
            stamps={name: Stamp(*map(_integer, stamp)) for name, stamp in values["files"].items()},
            earlier={name: _text(at, _TIME) for name, at in values.get("earlier", {}).items()},
            is_complete=values["complete"],
            root_of_trust=_words(values["root_of_trust"]),
            proven_by=_proof_kind(values.get("proven_by", INFOHASH_PROOF)),
        )
    except (KeyError, TypeError, AttributeError):
        return None


def forget_receipt(root: Path) -> None:
    """Delete the receipt: nothing is proven.

    Raises:
        OSError: The folder cannot be written.
    """
    delete_record(root / PRIVATE / _RECEIPT)


def unread_receipt(root: Path) -> str | None:
    """The reason why a receipt is not believed; None if it is, or if there is none."""
    return look_for_receipt(root)[1]


def _reason_in(values: Mapping[str, Any]) -> str:
    """What a receipt is that cannot be used."""
    version = values.get("version")
    is_other = isinstance(version, int | str) and version != _VERSION
    actual = f"version {printable(str(version), limit=40)}" if is_other else "a damaged one"
    if is_other and version in _LACKING:
        actual += f", which lacks the {_LACKING[version]}"
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


def _words(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return printable(value, limit=LONGEST)


def _proof_kind(value: object) -> str:
    if value not in {INFOHASH_PROOF, HUB_PROOF}:
        raise TypeError(value)
    return str(value)


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether every byte that a run reads is proven, by a receipt."""

    receipt: Receipt | None
    """It covers every file that the torrent promises, and all that a run reads, also a tokenizer
    that is built in, as they are now; None if it does not."""
    reason: str = ""
    """Why not; empty without a receipt."""
    by_hub: Receipt | None = None
    """It covers the same by the hashes that a hub names; None if none does."""

    @property
    def best(self) -> Receipt | None:
        """The receipt, of the infohash if there is one, else of a hub."""
        return self.receipt or self.by_hub


def proof_of(release: Release) -> Proof:
    """The proof of a release as it is now.

    A file that a run reads and the torrent does not promise is not proven by it. The configuration
    of Grok-1 and the sha256 of its tokenizer are built in, which proves these.
    """
    root = release.root
    used = {str(tensor.path.relative_to(root)) for tensor in release.tensors}
    used |= {name for name in (CONFIG, TOKENIZER) if (root / name).exists()}
    return proof_of_files(root, used)


def proof_of_files(root: Path, used: set[str]) -> Proof:
    """The same of a release whose structure nobody has checked.

    Args:
        root: The release.
        used: Files that a run reads, by their paths below it.
    """
    receipt, reason = look_for_receipt(root)
    if receipt is None:
        return Proof(None, reason or first_exposure(root, sorted(used)) or "")
    receipt = with_built_in(root, receipt)
    if (doubt := _doubt(root, receipt, used)) is not None:
        return Proof(None, doubt)
    if receipt.proven_by == HUB_PROOF:
        return Proof(None, f"proven by {receipt.root_of_trust}, not by the infohash", receipt)
    trust = trust_of(root, receipt.infohash)
    if trust.doubt is not None:
        return Proof(None, f"{trust.root}: {trust.doubt}")
    return Proof(replace(receipt, root_of_trust=trust.root))


def changed_since(proof: Receipt, release: Release) -> list[str]:
    """Files that a run reads, and that are not as they were proven; also those that appeared.

    Args:
        proof: From `proof_of`, or of a `VerifiedRelease`.
        release: As it is now.
    """
    root = release.root
    new = {name for name in (CONFIG, TOKENIZER) if os.path.lexists(root / name)}
    return sorted((proof.stamps.keys() | new) - proof.untouched(root))


def _doubt(root: Path, receipt: Receipt, used: set[str]) -> str | None:
    """Why a receipt does not prove the files that a run reads; None if it does."""
    requested = read_source(root)
    if receipt.proven_by == INFOHASH_PROOF and requested not in {None, receipt.infohash}:
        return f"receipt: expected infohash {requested}, found {receipt.infohash}"
    unchanged = receipt.unchanged(root)
    if exposure := first_exposure(root, sorted({*used, *unchanged})):
        return exposure  # hashing again does not mend this
    if changed := receipt.stamps.keys() - unchanged:
        return f"{printable(min(changed))}: changed since it was proven"
    if not receipt.is_complete:
        return "receipt: does not cover every file of the torrent"
    unpromised = sorted(used - receipt.stamps.keys())
    return f"{unpromised[0]}: is not in the torrent" if unpromised else None


def with_built_in(root: Path, receipt: Receipt) -> Receipt:
    """A receipt that covers the tokenizer as well if its bytes are those that are built in.

    So it shows at the end of a load or a reshard whether they were the ones that were used.

    Args:
        root: The release.
        receipt: Of the files of its torrent.
    """
    path = root / TOKENIZER
    stamp = Stamp.of(path)
    if stamp is None or TOKENIZER in receipt.stamps or not _is_built_in(path):
        return receipt
    return replace(receipt, stamps={**receipt.stamps, TOKENIZER: stamp})


def not_promised(root: Path, used: Collection[str], promised: Collection[str]) -> list[str]:
    """Files that a torrent does not promise, and that are not built in.

    Args:
        root: The release.
        used: Files that a run reads.
        promised: Files of the torrent.
    """
    return [
        name
        for name in sorted(set(used) - set(promised))
        if name != TOKENIZER or not _is_built_in(root / name)
    ]


def _is_built_in(tokenizer: Path) -> bool:
    """Whether a tokenizer is Grok-1's."""
    try:
        data = read_limited(tokenizer, LARGEST_TOKENIZER)
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == GROK_1_TOKENIZER_SHA256


def stamps_of(source: Checkpoint) -> dict[Path, Stamp | None]:
    """The stamps of all files of the source, to detect changes."""
    if isinstance(source, Release):
        paths = [tensor.path for tensor in source.tensors]
    else:
        paths = [source.root / name for name in source.records]
    return {path.resolve(): Stamp.of(path) for path in paths}
