"""Where the proof of a release is kept: in its folder if grokctl may write there, or under home."""

import os
from pathlib import Path

from grokctl.checkpoint.adopted import (
    adopt,
    adopted_root,
    is_adopted,
    keeps_proofs,
    may_write,
)
from grokctl.checkpoint.adoption import begin_adoption
from grokctl.checkpoint.finding import Found
from grokctl.checkpoint.folders import ReleaseFolder, is_of_links, release_folder
from grokctl.checkpoint.hub_record import read_promise
from grokctl.checkpoint.receipt import read_receipt
from grokctl.checkpoint.release_files import release_paths
from grokctl.checkpoint.torrent import (
    Metainfo,
    parse_metainfo,
    read_metainfo,
    torrent_bytes,
    write_torrent,
)
from grokctl.checkpoint.trust import FOUND, read_source, trust_of, trusted_metainfo, write_source
from grokctl.checkpoint.trust import torrent_file as named
from grokctl.checkpoint.unfinished import read_unfinished
from grokctl.errors import FetchError, UsageError, invalid
from grokctl.ownership import why_exposed
from grokctl.paths import (
    CKPT,
    PRIVATE,
    PUBLISHED,
    TORRENT,
    Home,
    kind_of,
    quoted,
    write_atomically,
)


def read_torrent(path: Path) -> tuple[bytes, Metainfo]:
    """A torrent file that the user names.

    Raises:
        UsageError: There is no such file, or it is no torrent of a release.
    """
    if not path.is_file():
        raise invalid("torrent_file", path, "no such file", f"ls -l {quoted(path)}")
    try:
        data = torrent_bytes(path)
        metainfo = parse_metainfo(data, source=str(path))
        release_paths(metainfo)
    except FetchError as error:
        raise UsageError(f"--torrent-file: {error}", f"ls -l {quoted(path)}") from error
    return data, metainfo


def any_folder(name: str) -> Found | None:
    """A folder that is named to be proven, whatever is in it; None if there is no such folder."""
    path = Path(name)
    try:
        if not path.is_dir() or kind_of(path) in PUBLISHED:
            return None
        folder = release_folder(path) or ReleaseFolder(path.absolute(), path.absolute() / CKPT)
    except (OSError, ValueError):
        return None
    return Found(root=folder.root, shown=path, folder=folder)


def root_to_prove(
    home: Home,
    found: Found,
    torrent_file: Path | None,
    *,
    is_repaired: bool,
    is_dry: bool = False,
) -> Path:
    """The folder in which a release is proven.

    A release that grokctl did not fetch is proven as a folder of links under home, so that its own
    folder stays as it is. Only a repair works in it, where that is possible. One that grokctl
    fetched is proven like that where its own folder cannot keep the proof.

    Args:
        home: Keeps torrents and proofs.
        found: The checkpoint.
        torrent_file: Its torrent; None if one is kept with it already.
        is_repaired: Whether damaged files are to be mended.
        is_dry: Whether nothing may be written but links and proofs under `home`.

    Raises:
        UsageError: It is a ready checkpoint, or of another torrent; or the file is no torrent.
    """
    if torrent_file is None:
        return _root_to_prove_again(home, found, is_repaired=is_repaired)
    data, metainfo = read_torrent(torrent_file)
    if (kind := kind_of(found.root)) in PUBLISHED:
        words = "a ready checkpoint" if kind == "ready" else "an export"
        problem = f"{words} has no torrent; its manifest proves it"
        hint = f"grokctl verify {quoted(found.root)}"
        raise UsageError(f"--torrent-file {torrent_file}: {problem}", hint)
    trust = named(torrent_file, data)
    folder = found.folder
    if folder is not None and _came_from_hub(found.root):
        _refuse_other(found.root, metainfo, torrent_file)
        write_torrent(found.root / TORRENT, data)
        write_source(found.root, infohash=metainfo.infohash, trust=trust)
        return found.root
    if folder is None:
        _refuse_other(found.root, metainfo, torrent_file)
        is_kept_there = is_of_links(found.root) or (
            (found.root / TORRENT).is_file() and _is_worked_in(found.root, is_repaired=is_repaired)
        )
        if is_kept_there:
            if not (found.root / TORRENT).is_file():
                write_torrent(found.root / TORRENT, data)
            is_found = trust_of(found.root, metainfo.infohash).root == FOUND
            may_record = not is_dry or is_of_links(found.root)
            if is_found and may_record and may_write(found.root):
                if is_repaired:
                    begin_adoption(found.root, metainfo, is_repair=True)
                write_source(found.root, infohash=metainfo.infohash, trust=trust)
            return found.root
        folder = ReleaseFolder(found.root, found.root / CKPT)
    if is_repaired and _may_repair_in(folder):
        begin_adoption(folder.root, metainfo, is_repair=True)
        write_torrent(folder.root / TORRENT, data)
        write_source(folder.root, infohash=metainfo.infohash, trust=trust)
        return folder.root
    return adopt(home, folder, data, metainfo, trust=trust)


def _came_from_hub(root: Path) -> bool:
    """Whether this user fetched a release from a hub into a folder that keeps proofs."""
    return read_promise(root) is not None and keeps_proofs(root)


def root_to_repair(home: Home, found: Found) -> Path:
    """The folder in which a repair would mend a release: its own if possible, else under home."""
    folder = found.folder
    has_torrent = (found.root / TORRENT).is_file()
    if folder is None and has_torrent and _is_worked_in(found.root, is_repaired=True):
        return found.root
    folder = folder or ReleaseFolder(found.root, found.root / CKPT)
    return folder.root if _may_repair_in(folder) else adopted_root(home, folder)


def _root_to_prove_again(home: Home, found: Found, *, is_repaired: bool) -> Path:
    """The same for a release whose torrent is kept already, if it has one."""
    if found.folder is None:
        return _root_of_own(home, found.root, is_repaired=is_repaired)
    if not is_repaired or not _may_repair_in(found.folder):
        return found.root
    kept = adopted_root(home, found.folder)
    if found.root != kept or not (kept / TORRENT).is_file():
        return found.root
    return _move_in(kept, found.folder.root)


def _is_worked_in(root: Path, *, is_repaired: bool) -> bool:
    """Whether a release that has its torrent is repaired, or proven, in its own folder."""
    tensors = root / CKPT
    if is_repaired:
        return not os.path.lexists(tensors) or _may_repair_in(ReleaseFolder(root, tensors))
    return keeps_proofs(root)


def _root_of_own(home: Home, root: Path, *, is_repaired: bool) -> Path:
    """The same for a release that grokctl fetched: its torrent and what is proven move along."""
    if kind_of(root) in PUBLISHED or not (root / CKPT).is_dir() or is_of_links(root):
        return root
    if _is_worked_in(root, is_repaired=is_repaired) or read_unfinished(root) is not None:
        return root
    metainfo = trusted_metainfo(root)
    if metainfo is None:
        return root
    if why_exposed(root / TORRENT) is not None:  # it says nothing, wherever that is kept
        return root
    trust = trust_of(root, metainfo.infohash)
    folder = ReleaseFolder(root, root / CKPT)
    kept = adopt(home, folder, torrent_bytes(root / TORRENT), metainfo, trust=trust.root)
    receipt = read_receipt(root)
    if receipt is not None and read_receipt(kept) is None:
        receipt.write(kept)
    return kept


def _refuse_other(root: Path, metainfo: Metainfo, torrent_file: Path) -> None:
    """Refuse the torrent of another release than the one that was asked for, or that lies there.

    Raises:
        UsageError: It is.
    """
    claimed = read_source(root)
    if claimed is not None and claimed != metainfo.infohash:
        raise UsageError(
            f"{root}: expected release {claimed}, found {metainfo.infohash} in {torrent_file}",
            f"grokctl verify {quoted(root)}",
        )
    own = root / TORRENT
    if claimed is None and own.is_file():
        found = read_metainfo(own).infohash
        if found != metainfo.infohash:
            raise UsageError(
                f"{own}: expected the torrent {metainfo.infohash} of {torrent_file}, found {found}",
                f"rm {quoted(own)}  # then the same command again",
            )


def root_to_seed(home: Home, root: Path, torrent: bytes | None, *, is_seeded: bool = False) -> Path:
    """The folder of links for a release in a folder that cannot be written; else that folder.

    Args:
        home: Keeps torrents and proofs.
        root: A folder to fetch into.
        torrent: Of the release, if it is on this machine.
        is_seeded: Whether to seed, also from tensors behind a link, which are never written to.

    Raises:
        FetchError: It is not the torrent of a release.
    """
    is_behind_link = is_seeded and (root / CKPT).is_symlink()
    if not root.is_dir() or (may_write(root) and not is_behind_link) or kind_of(root) in PUBLISHED:
        return root
    folder = release_folder(root)
    if folder is None:
        return root
    if torrent is None:
        return adopt(home, folder) if is_adopted(home, folder) else root
    return adopt(home, folder, torrent, parse_metainfo(torrent, source="torrent to seed"))


def _may_repair_in(folder: ReleaseFolder) -> bool:
    """Whether damaged files can be replaced where they are."""
    places = (folder.root, folder.tensors)
    return (
        folder.is_usual
        and not folder.tensors.is_symlink()
        and all(place.is_dir() and may_write(place) for place in places)
    )


def _move_in(kept: Path, root: Path) -> Path:
    """Put a torrent and its proof from under home into the folder of the release itself."""
    mended = [path for path in kept.rglob("*") if path.is_file() and not path.is_symlink()]
    own = {kept / TORRENT, *(kept / PRIVATE).rglob("*")}
    if set(mended) - own:
        return kept  # an earlier repair put files there
    begin_adoption(root, read_metainfo(kept / TORRENT), is_repair=True)
    for path in (kept / PRIVATE).iterdir():
        if path.is_file() and not path.is_symlink():
            write_atomically(root / PRIVATE / path.name, path.read_bytes())
    write_torrent(root / TORRENT, torrent_bytes(kept / TORRENT))
    return root
