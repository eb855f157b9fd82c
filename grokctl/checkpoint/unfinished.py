"""The record of a download that has begun and is not complete."""

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from grokctl.checkpoint.release_files import EXTRA
from grokctl.checkpoint.torrent import read_metainfo
from grokctl.checkpoint.torrent_files import TorrentFile
from grokctl.checkpoint.trust import read_object
from grokctl.errors import CorruptCheckpointError, FetchError
from grokctl.own_key import KeyTroubleError, sealed, why_not_sealed
from grokctl.ownership import why_exposed
from grokctl.paths import BEGUN, CKPT, PRIVATE, TORRENT, UNFINISHED, delete_record, write_atomically
from grokctl.text import format_bytes, has_secret

_KIND: Final = "unfinished"
_VERSION: Final = 1
_BLOCK: Final = 512
_BUILT_IN: Final = "grok-1"
_LARGEST: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """How far a download has come, and the command that continues it."""

    source: str
    """`grok-1`, a magnet link, or the absolute path of a `.torrent` file."""
    options: tuple[str, ...] = field(default=())
    """Options of the command other than `--to`, without credentials."""
    have: int = 0
    """Bytes of the release that are on disk and proven."""
    nbytes: int = 0
    """Bytes of the release; 0 if they are not known."""
    is_final: bool = False
    """Whether it was written at the end of a fetch; a killed one has more on disk."""

    @property
    def share(self) -> str:
        """Such as `34%`; never 100%."""
        return f"{min(99, 100 * self.have // self.nbytes)}%" if self.nbytes else "0%"

    def command(self, root: Path) -> str:
        """The command that continues the download."""
        words = ("grokctl", "fetch", self.source, "--to", str(root.resolve()), *self.options)
        return shlex.join(words)

    def write(self, root: Path) -> None:
        """Write it into the release."""
        values: dict[str, object] = {
            "version": _VERSION,
            "source": self.source,
            "options": list(self.options),
            "have_bytes": self.have,
            "bytes": self.nbytes,
            "final": self.is_final,
        }
        words = (self.source, *self.options)
        # earlier versions took more URLs for harmless than this one does
        is_private = any(("://" in word or ":?" in word) and has_secret(word) for word in words)
        with suppress(KeyTroubleError):  # its command is then not repeated
            values = sealed(_KIND, values)
        data = json.dumps(values, indent=1).encode()
        write_atomically(root / PRIVATE / UNFINISHED, data, mode=0o600 if is_private else 0o666)

    @classmethod
    def of_values(cls, values: dict[str, Any]) -> Self | None:
        """Check values from a file; None if they are not such a record."""
        source, options = values.get("source"), values.get("options")
        have, nbytes = values.get("have_bytes"), values.get("bytes")
        if (
            values.get("version") != _VERSION
            or not isinstance(source, str)
            or not isinstance(options, list)
            or not all(isinstance(option, str) for option in options)
            or type(have) is not int
            or type(nbytes) is not int
            or type(values.get("final")) is not bool
            or not 0 <= have <= nbytes
        ):
            return None
        return cls(
            source=source,
            options=tuple(options),
            have=have,
            nbytes=nbytes,
            is_final=values["final"],
        )


def read_unfinished(root: Path) -> Unfinished | None:
    """The download of a release that is not complete; None if there is none."""
    path = root / PRIVATE / UNFINISHED
    if path.is_file():
        with suppress(OSError):
            values = read_object(path, limit=_LARGEST)
            record = Unfinished.of_values(values)
            if record is not None and (why_exposed(path) or why_not_sealed(_KIND, values)):
                # a stranger's source and options are no command to paste
                own = root / TORRENT
                source = str(own) if own.is_file() else _BUILT_IN
                record = replace(record, source=source, options=())
            if record is not None and not record.is_final:
                looked = _looked_at(root)
                have = min(record.nbytes, max(record.have, looked.have if looked else 0))
                return replace(record, have=have)
            if record is not None:
                return record
    if not (root / PRIVATE / BEGUN).is_file():
        return None
    return _looked_at(root)  # a version without the record began it


def forget_unfinished(root: Path) -> None:
    """The download is complete."""
    delete_record(root / PRIVATE / UNFINISHED)


def incomplete(root: Path, unfinished: Unfinished) -> CorruptCheckpointError:
    """The error about a release whose download is not complete."""
    of = f" ({format_bytes(unfinished.have)} of {format_bytes(unfinished.nbytes)})"
    message = f"{root}: incomplete, {unfinished.share}{of if unfinished.nbytes else ''}"
    return CorruptCheckpointError(message, unfinished.command(root))


def refuse_unfinished(root: Path) -> None:
    """Refuse a release whose download is not complete.

    Raises:
        CorruptCheckpointError: It is not; the hint is the command that continues it.
    """
    unfinished = read_unfinished(root)
    if unfinished is not None:
        raise incomplete(root, unfinished)


def _looked_at(root: Path) -> Unfinished | None:
    """The state of a download by the sizes of its files; None if all have theirs."""
    try:
        files = [file for file in read_metainfo(root / TORRENT).files if not file.is_pad]
    except (FetchError, OSError):
        return None
    nbytes = sum(file.length for file in files)
    have = sum(min(file.length, _stored(root, file)) for file in files)
    if have >= nbytes:
        return None
    return Unfinished(source=str(root / TORRENT), have=have, nbytes=nbytes)


def _stored(root: Path, file: TorrentFile) -> int:
    """Bytes of a file that are on disk; a release has its tensors in one folder."""
    places = (f"{CKPT}/{file.path[-1]}", "/".join(file.path), f"{EXTRA}/{file.index}")
    for place in places:
        with suppress(OSError):
            status = (root / place).lstat()
            return min(status.st_size, status.st_blocks * _BLOCK)
    return 0
