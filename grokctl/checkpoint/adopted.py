"""Releases that lie elsewhere, as folders of links under home: the proof is kept beside the links.

Nothing is ever written where a release lies that grokctl did not fetch. Its folder under home has
the usual shape, whatever shape the release has, and a repair replaces links by files.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from grokctl.checkpoint.folders import ReleaseFolder
from grokctl.checkpoint.receipt import read_receipt
from grokctl.checkpoint.release_files import is_tensor_file, names_of, release_paths
from grokctl.checkpoint.torrent import Metainfo, torrent_bytes, write_torrent
from grokctl.checkpoint.trust import write_source
from grokctl.errors import FetchError
from grokctl.ownership import why_exposed
from grokctl.paths import CKPT, CONFIG, PRIVATE, TOKENIZER, TORRENT, Home

_SMALL: Final = (CONFIG, TOKENIZER)


def adopted_root(home: Home, folder: ReleaseFolder) -> Path:
    """The folder under home for a release elsewhere; it need not exist."""
    place = os.fsencode(os.path.realpath(folder.tensors))
    key = hashlib.sha256(place).hexdigest()[:12]
    return home.adopted / key / (folder.root.absolute().name or "release")


def is_adopted(home: Home, folder: ReleaseFolder) -> bool:
    """Whether a torrent of a release elsewhere is kept under home."""
    return (adopted_root(home, folder) / TORRENT).is_file()


def may_write(place: Path) -> bool:
    """Whether this user can write to a folder, which a read-only disk refuses to root as well."""
    is_read_only = os.statvfs(place).f_flag & os.ST_RDONLY
    return os.access(place, os.W_OK | os.X_OK) and not is_read_only


def keeps_proofs(root: Path) -> bool:
    """Whether a proof that is written into a release counts later: it can be, and by nobody else.

    Args:
        root: The release.
    """
    private = root / PRIVATE
    if private.is_symlink() or not may_write(private if private.is_dir() else root):
        return False
    return why_exposed(private) is None


def is_proven_at_home(home: Home, folder: ReleaseFolder) -> bool:
    """Whether the proof of a release that grokctl fetched is the one under home.

    It is where the release cannot keep one, or cannot be repaired, or has none.

    Args:
        home: Keeps torrents and proofs.
        folder: The release, with its torrent.
    """
    if not is_adopted(home, folder):
        return False
    own, kept = folder.root / TORRENT, adopted_root(home, folder) / TORRENT
    try:
        if torrent_bytes(own) != torrent_bytes(kept):  # another release came later
            return False
    except (OSError, FetchError):
        return False
    root = folder.root
    return not keeps_proofs(root) or folder.tensors.is_symlink() or read_receipt(root) is None


def adopt(
    home: Home,
    folder: ReleaseFolder,
    torrent: bytes | None = None,
    metainfo: Metainfo | None = None,
    *,
    trust: str | None = None,
) -> Path:
    """Make or renew the links to a release elsewhere.

    Args:
        home: Gets the links.
        folder: The release.
        torrent: Of the release, kept beside the links.
        metainfo: The same, parsed.
        trust: Its root of trust; None keeps what is known.

    Returns:
        The folder of links, which is a release.

    Raises:
        OSError: Home cannot be written.
        FetchError: The torrent is not that of a release.
    """
    root = adopted_root(home, folder)
    places = {*folder.small_files(), *(name for name in _SMALL if (root / name).is_symlink())}
    names: dict[str, str] = {}
    if metainfo is not None:
        there = release_paths(metainfo)
        names = {there[index]: name for index, name in names_of(metainfo, there).items()}
        places |= names.keys()
    if folder.tensors.is_dir():
        found = (entry.name for entry in os.scandir(folder.tensors))
        places |= {f"{CKPT}/{name}" for name in found if is_tensor_file(name)}
    (root / CKPT).mkdir(parents=True, exist_ok=True)
    places |= {f"{CKPT}/{path.name}" for path in (root / CKPT).iterdir() if path.is_symlink()}
    for place in sorted(places):
        _link(root / place, folder.sources(names.get(place, place)))
    if torrent is not None and metainfo is not None:
        path = root / TORRENT
        if not path.is_file() or torrent_bytes(path) != torrent:
            write_torrent(path, torrent)
        write_source(root, infohash=metainfo.infohash, trust=trust)
    return root


def _link(path: Path, sources: Iterable[Path]) -> None:
    """Link to the first source that is there; a file that a repair put there stays."""
    if path.exists() and not path.is_symlink():
        return
    source = next((source.absolute() for source in sources if source.exists()), None)
    if source is None:
        path.unlink(missing_ok=True)
        return
    if path.is_symlink():
        if path.readlink() == source:
            return
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(source)
