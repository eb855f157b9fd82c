"""Remove what grokctl made under home; everything else in those folders stays."""

import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from grokctl.checkpoint.export_manifest import read_export
from grokctl.checkpoint.hub_record import read_promise
from grokctl.checkpoint.ready import SUMS
from grokctl.checkpoint.release_files import release_paths
from grokctl.checkpoint.torrent import read_metainfo
from grokctl.errors import FetchError, UsageError
from grokctl.list import Kept, Kind, list_kept
from grokctl.marks import MARK, delete_in, is_marked
from grokctl.os_errors import refusal
from grokctl.own_files import folder_of, names_in, opened_folder, why_not_own
from grokctl.paths import (
    EXPORT_MANIFEST,
    LOCK,
    PRIVATE,
    TOKENIZER,
    TORRENT,
    Home,
    locked,
    locked_open,
    quoted,
)
from grokctl.resharding.replaced import JOURNAL, READY, FolderKind, delete_files


def find_kept(home: Home, name: str) -> Kept:
    """What a name means that `list` shows.

    Args:
        home: The folder of all checkpoints.
        name: Such as `ready/grok-1-int8-8`; its last part is enough where only one has it.

    Raises:
        UsageError: Nothing under home has the name, or several have.
    """
    kept = list_kept(home)
    wanted = name.strip("/")
    found = [each for each in kept if each.name == wanted]
    found = found or [each for each in kept if each.path.name == wanted]
    if not found:
        raise UsageError(f"{name}: nothing under {home.root} has this name", "grokctl list")
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        hint = f"grokctl remove {quoted(found[0].name)}"
        raise UsageError(f"{name}: expected one, found {names}", hint)
    return found[0]


def remove(kept: Kept) -> tuple[str, ...]:
    """Delete the files that grokctl made, and the folders that are empty then. Follows no link.

    A removal that is killed is continued by another one: what tells the files from others goes
    last.

    Args:
        kept: From `find_kept`.

    Returns:
        Paths of what is left in the folder, because grokctl did not make it.

    Raises:
        UsageError: It is a link, may not be grokctl's work, or another grokctl is writing to it.
        OSError: A file cannot be deleted.
    """
    path = kept.path
    if kept.link is not None:
        hint = f"rm {quoted(path)}  # the link alone"
        raise UsageError(f"{path}: is a symbolic link, expected a folder", hint)
    try:
        with opened_folder(path.parent) as above, opened_folder(path.name, above=above) as folder:
            if (problem := why_not_own(os.fstat(folder))) is not None:
                raise _not_ours(path, problem)
            _empty(kept, folder)
            with suppress(OSError):  # what is left keeps it
                os.rmdir(path.name, dir_fd=above)
    except OSError as error:
        raise refusal(error, path) from error
    if kept.kind is Kind.LINKS:
        with suppress(OSError):
            path.parent.rmdir()
    return tuple(sorted(_left(path)))


def _empty(kept: Kept, folder: int) -> None:
    """Delete what grokctl made in an open folder."""
    path, busy = kept.path, UsageError(f"{kept.path}: another grokctl is writing to it")
    match kept.kind:
        case Kind.RELEASE:
            _empty_release(path, folder)
        case Kind.PARTIAL:
            if not is_marked(folder, path.name) and not is_marked(folder, path.name, is_copy=True):
                raise _not_ours(path, "has no mark of grokctl")
            with locked_open(folder, busy=busy):
                delete_in(folder, last=MARK)
        case Kind.READY:
            _delete_published(folder, READY)
        case Kind.EXPORT:
            _delete_published(folder, _export_kind(path))
        case Kind.LINKS | Kind.CACHE:
            delete_in(folder, last=TORRENT)


def _delete_published(folder: int, kind: FolderKind) -> None:
    names = names_in(folder)
    last = [name for name in names if name == kind.manifest]
    delete_files(folder, [name for name in names if name not in last], kind)
    delete_files(folder, last, kind)


def _export_kind(path: Path) -> FolderKind:
    """The names of the files of an export: its manifest has them.

    Raises:
        CorruptCheckpointError: It is malformed.
    """
    others = {SUMS, TOKENIZER, EXPORT_MANIFEST, JOURNAL, MARK, PRIVATE}
    names = read_export(path).records.keys() | others
    return FolderKind(
        name="export",
        words="an export",
        manifest=EXPORT_MANIFEST,
        is_own_name=lambda name: name in names,
    )


def _empty_release(root: Path, folder: int) -> None:
    """Delete the files of a release that grokctl fetched, and its records.

    Raises:
        UsageError: It was not fetched by grokctl, which then knows none of its files.
    """
    places = _places_of(root)
    if places is None or not (root / PRIVATE / LOCK).is_file():
        raise _not_ours(root, "was not fetched by grokctl")
    lock = root / PRIVATE / LOCK
    with locked(lock, busy=UsageError(f"{root}: another grokctl is fetching into it")):
        for place in (*places, TOKENIZER):
            _unlink(root, place)
        with opened_folder(PRIVATE, above=folder) as private:
            delete_in(private, last=LOCK)
        os.rmdir(PRIVATE, dir_fd=folder)
        _unlink(root, TORRENT)


def _places_of(root: Path) -> Iterable[str] | None:
    """The files of a release, by its torrent or by what a hub promised; None without either."""
    try:
        return release_paths(read_metainfo(root / TORRENT)).values()
    except (OSError, FetchError):
        promise = read_promise(root)
        return None if promise is None else [file.place for file in promise.files]


def _unlink(root: Path, place: str) -> None:
    """Delete a regular file of this user's, and the folders on the way that are empty then."""
    with ExitStack() as stack, suppress(FileNotFoundError, NotADirectoryError):
        try:
            folder, name = folder_of(stack, root, place)
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:  # gone, or behind a link
            return
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            os.unlink(name, dir_fd=folder)
    for above in (root / place).relative_to(root).parents[:-1]:
        with suppress(OSError), ExitStack() as stack:
            folder, name = folder_of(stack, root, above.as_posix())
            os.rmdir(name, dir_fd=folder)


def _left(path: Path) -> Iterable[str]:
    """Files and links below a folder that is still there."""
    for folder, folders, names in os.walk(path):
        place = Path(folder)
        links = [name for name in folders if (place / name).is_symlink()]
        yield from ((place / name).relative_to(path).as_posix() for name in (*names, *links))


def _not_ours(path: Path, problem: str) -> UsageError:
    return UsageError(f"{path}: {problem}; grokctl removes what it made", f"ls -la {quoted(path)}")
