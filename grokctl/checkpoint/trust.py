"""The root of trust of a release: which infohash was asked for, how, and who could have changed it.

A torrent proves files, and an infohash proves a torrent. The infohash is built in, or was typed, or
is that of a torrent file. `source.json` remembers this since the fetch; it is believed where it has
the MAC of this user, and only this user and root can write.
"""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grokctl.checkpoint.torrent import GROK_1_MAGNET, Metainfo, parse_magnet, read_metainfo
from grokctl.errors import FetchError, Reason, corrupt
from grokctl.os_errors import TooLargeError
from grokctl.own_key import KeyTroubleError, sealed, why_not_sealed
from grokctl.ownership import why_exposed
from grokctl.paths import PRIVATE, TORRENT, quoted, read_limited, write_atomically
from grokctl.text import printable

GROK_1_INFOHASH: Final = parse_magnet(GROK_1_MAGNET).infohash
GROK_1_TOKENIZER_SHA256: Final = "5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f"
"""As published with the reference code; the magnet's torrent may not contain it."""

BUILT_IN: Final = "the built-in magnet"
TYPED: Final = "the magnet that was typed"
FOUND: Final = f"{TORRENT} in the folder"

_SOURCE: Final = "source.json"
_KIND: Final = "source"
_INFOHASH: Final = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
LONGEST: Final = 5000
"""Characters of a root of trust: a path, and words around it."""
_LARGEST: Final = 2**16
"""Bytes of the record."""
_MOST_DIGITS: Final = 20


@dataclass(frozen=True, slots=True)
class Trust:
    """The root of trust of a torrent that lies with a release."""

    root: str
    """In words: `the built-in magnet`, `the torrent file /home/me/x.torrent (sha256 …)`."""
    doubt: str | None = None
    """Why it proves nothing: nobody named the torrent, or others could have put it there."""


def torrent_file(path: Path, data: bytes) -> str:
    """The root of trust of a torrent file that the user named.

    Args:
        path: The file.
        data: Its bytes.
    """
    digest = hashlib.sha256(data).hexdigest()
    return f"the torrent file {printable(str(path.absolute()), limit=4096)} (sha256 {digest})"


def trust_of(root: Path, infohash: str) -> Trust:
    """The root of trust of the torrent in a release.

    Args:
        root: The release.
        infohash: Of the torrent.
    """
    if infohash == GROK_1_INFOHASH:
        return Trust(BUILT_IN)
    place = root / PRIVATE / _SOURCE
    record = _read_record(root)
    if record.get("infohash") != infohash:
        return Trust(FOUND, why_exposed(root / TORRENT) or _unnamed(root))
    if (exposure := why_exposed(place)) is not None:
        return Trust(FOUND, exposure)
    if (problem := why_not_sealed(_KIND, record)) is not None:
        return Trust(FOUND, _unnamed(root, f"{PRIVATE}/{_SOURCE}: {problem}"))
    words = root_in_words(record.get("root_of_trust"), infohash)
    return Trust(words) if words else Trust(FOUND, _unnamed(root))


def root_in_words(words: object, infohash: str | None) -> str:
    """The root of trust that a record of this user names; empty if that is none.

    Args:
        words: From the record.
        infohash: Of the torrent: `the built-in magnet` is a fact about it, and of no record.
    """
    if infohash == GROK_1_INFOHASH:
        return BUILT_IN
    if not isinstance(words, str) or words in {BUILT_IN, FOUND}:
        return ""
    return printable(words, limit=LONGEST)


def _unnamed(root: Path, why: str = "nobody has named it here") -> str:
    """The doubt about a torrent that lies there, with the command that names it."""
    command = f"grokctl verify {quoted(root)} --torrent-file {quoted(root / TORRENT)}"
    return f"{why}; if you know where it comes from: {command}"


def write_source(root: Path, *, infohash: str, trust: str | None = None) -> None:
    """Record the infohash that the user requested.

    Args:
        root: The release.
        infohash: As it was requested.
        trust: The root of trust, in words; None keeps what is known about this infohash.
    """
    if trust is None or infohash == GROK_1_INFOHASH:
        trust = trust_of(root, infohash).root
    values: dict[str, object] = {"version": 1, "infohash": infohash, "root_of_trust": trust}
    with suppress(KeyTroubleError):  # the torrent is then one that nobody named
        values = sealed(_KIND, values)
    write_atomically(root / PRIVATE / _SOURCE, json.dumps(values).encode())


def read_source(root: Path) -> str | None:
    """The infohash that the user requested; None if no download has begun.

    Others may have written it: only `trust_of` says whether it is a root of trust.
    """
    infohash = _read_record(root).get("infohash")
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
        detail, hint = str(error).removeprefix(f"{TORRENT}: "), f"rm {quoted(path)}"
        raise corrupt(TORRENT, Reason.MALFORMED, detail, hint) from error
    requested = read_source(root)
    if requested is not None and requested != metainfo.infohash:
        detail = f"expected infohash {requested}, found {metainfo.infohash}"
        raise corrupt(TORRENT, Reason.ALTERED, detail, f"rm {quoted(path)} && grokctl fetch")
    return metainfo


def _read_record(root: Path) -> dict[str, Any]:
    path = root / PRIVATE / _SOURCE
    try:
        return read_object(path, limit=_LARGEST)
    except TooLargeError as error:
        name, detail = f"{PRIVATE}/{_SOURCE}", error.strerror or ""
        raise corrupt(name, Reason.MALFORMED, detail, f"rm {quoted(path)}") from error


def _number(digits: str) -> int:
    """A number of 64 bits at most: a float cannot hold larger ones, and they fill the screen."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(digits)
    return int(digits)


def read_object(path: Path, *, limit: int, most_values: int | None = None) -> dict[str, Any]:
    """A JSON object; an empty one if the file is missing, holds something else, or huge numbers.

    Args:
        path: The file.
        limit: Bytes that it may have.
        most_values: Values that it may have, and commas in its texts; with more it is not parsed.

    Raises:
        TooLargeError: It has more.
    """
    try:
        data = read_limited(path, limit)
        if most_values is not None and data.count(b",") >= most_values:
            return {}
        values = json.loads(data.decode(), parse_int=_number)
    except TooLargeError:
        raise
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
