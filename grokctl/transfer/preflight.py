"""Checks of space, links, limits and host names before a byte moves; makes the folder ready."""

import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from grokctl.checkpoint.adoption import begin_adoption, is_adopting
from grokctl.checkpoint.file_sizes import regular_size
from grokctl.checkpoint.torrent import write_torrent
from grokctl.checkpoint.trust import write_source
from grokctl.checks import Check, Status
from grokctl.errors import DiskFullError, FetchError
from grokctl.integrity.backup import begun_nbytes
from grokctl.machine.disks import existing, largest_file
from grokctl.machine.network import certificates
from grokctl.os_errors import is_absence, refusal
from grokctl.paths import ADOPTION, BEGUN, CKPT, LOCK, PRIVATE, RESUME, TORRENT, quoted
from grokctl.text import format_apart, shown_host
from grokctl.transfer.destination import FileSelection, bare_torrent
from grokctl.transfer.partial_files import candidates
from grokctl.transfer.sources import FetchOptions, find_mirror

_RESOLVE_S: Final = 3.0
"""Seconds for the addresses of all trackers and mirrors."""
_SHOWN_HOSTS: Final = 5
_OWN_FILES: Final = 8
"""Inodes in addition to the release's: folders, the torrent, resume data, temporary files."""
_HINTS: Final = {
    "disk": "df -h {}",
    "files": "df -i {}",
    "file size": "ulimit -f unlimited",
    "destination": "ls -ld {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file of the release to download."""

    path: str
    """`/`-separated, below the release."""
    nbytes: int
    is_wanted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """The files and the checks of a fetch."""

    name: str
    infohash: str
    files: tuple[PlannedFile, ...]
    wanted_nbytes: int
    present_nbytes: int
    """Disk space that wanted files already use, whatever they contain."""
    free_nbytes: int
    fitting: tuple[int, int] | None
    """Pieces on disk that are proven, of all; None unless a folder is to be adopted."""
    checks: tuple[Check, ...]
    """All of them, whatever their status."""

    @property
    def fits(self) -> bool:
        """Whether no check failed."""
        return all(check.status is not Status.FAIL for check in self.checks)


def make_plan(
    root: Path,
    selection: FileSelection,
    options: FetchOptions,
    *,
    infohash: str | None = None,
    fitting: tuple[int, int] | None = None,
    required: int = 0,
) -> FetchPlan:
    """Run every check; writes nothing.

    Args:
        root: The release's folder, which need not exist yet.
        selection: The files to download.
        options: Names mirrors and the proxy.
        infohash: As the user requested it; None for that of the torrent.
        fitting: Pieces on disk that are proven, of all.
        required: Bytes that must be free for copies and the download, if files were hashed.

    Raises:
        FetchError: The folder cannot be read, or a name in it leads elsewhere.
    """
    refuse_others(root, selection, follows=options.force or is_adopting(root))
    files = [file for file in selection.metainfo.files if not file.is_pad]
    present, free = _present_nbytes(root, selection), _free_nbytes(root)
    return FetchPlan(
        name=selection.metainfo.name,
        infohash=infohash or selection.metainfo.infohash,
        files=tuple(
            PlannedFile(
                path=selection.places[file.index],
                nbytes=file.length,
                is_wanted=file.index in selection.wanted,
            )
            for file in files
        ),
        wanted_nbytes=selection.nbytes,
        present_nbytes=present,
        free_nbytes=free,
        fitting=fitting,
        checks=(
            *_disk_checks(root, selection, present=present, free=free, required=required),
            *_network_checks(selection, options),
        ),
    )


def prepare(
    root: Path,
    selection: FileSelection,
    *,
    infohash: str | None = None,
    trust: str | None = None,
    follows: bool = False,
    adopts: bool = False,
) -> None:
    """Make the folder ready, and refuse before a byte moves a download that cannot succeed.

    Args:
        root: The release's folder.
        selection: The files to download; a hub's have no torrent to keep.
        infohash: As the user requested it; None for that of the torrent.
        trust: The root of trust of the torrent; None keeps what is known.
        follows: Whether files may be links, which are read and never written to.
        adopts: Whether the files in it are those of others.

    Raises:
        DiskFullError: There is too little space, or too few inodes, or a file is too large.
        FetchError: A name leads elsewhere, or the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        refuse_others(root, selection, follows=follows)
        present, free = _present_nbytes(root, selection), _free_nbytes(root)
        raise_failed(_disk_checks(root, selection, present=present, free=free), root)
        if adopts:  # before the folder looks like ours
            begin_adoption(root, selection.metainfo)
        if selection.info:
            torrent = bare_torrent(selection.info, selection.trackers, layers=selection.layers)
            write_torrent(root / TORRENT, torrent)
        write_source(root, infohash=infohash or selection.metainfo.infohash, trust=trust)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def refuse_others(root: Path, selection: FileSelection, *, follows: bool) -> None:
    """Refuse what is no file, or cannot be read, where the files of a release belong.

    Args:
        root: The release's folder.
        selection: The files to download.
        follows: Whether files may be links, which are read and never written to.

    Raises:
        FetchError: There is such a thing.
    """
    _refuse_links(root, _lengths(selection), follows=follows)
    _refuse_unreadable(root, selection, follows=follows)


def cut_files(root: Path, selection: FileSelection) -> None:
    """Cut off bytes beyond the end of each file: libtorrent would leave them.

    Raises:
        FetchError: A file cannot be written.
    """
    try:
        for file in selection.metainfo.files:
            if file.index in selection.wanted:
                _truncate(root / selection.places[file.index], file.length)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def raise_failed(checks: Iterable[Check], root: Path) -> None:
    """Raise the error of the first failed check.

    Raises:
        DiskFullError: There is too little space, or too few inodes, or a file is too large.
        FetchError: The folder cannot be written.
    """
    for check in checks:
        if check.status is Status.FAIL:
            kind = FetchError if check.name == "destination" else DiskFullError
            raise kind(f"{root}: {check.detail}", _HINTS[check.name].format(quoted(root)))


def _disk_checks(
    root: Path, selection: FileSelection, *, present: int, free: int, required: int = 0
) -> list[Check]:
    """Whether the destination can hold the wanted files."""
    folder = _existing(root)
    required = max(required, selection.nbytes - present)
    needed, found = format_apart(required, free)
    checks = [_check("disk", required <= free, f"expected {needed} free, found {found}")]
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise refusal(error, folder, kind=FetchError) from error
    wanted = [selection.places[index] for index in selection.wanted]
    inodes = sum(not (root / place).exists() for place in wanted) + _OWN_FILES
    if status.f_files:  # some file systems create inodes as needed
        detail = f"expected room for {inodes:,} more files, found {status.f_favail:,}"
        checks.append(_check("files", inodes <= status.f_favail, detail))
    largest = max(
        file.length for file in selection.metainfo.files if file.index in selection.wanted
    )
    limit, origin = largest_file(folder)
    detail = "no limit"
    if limit is not None:
        needed, found = format_apart(largest, limit)
        detail = f"expected files of {needed}, found a limit of {found} ({origin})"
    checks.append(_check("file size", limit is None or largest <= limit, detail))
    is_writable = os.access(folder, os.W_OK | os.X_OK) and not status.f_flag & os.ST_RDONLY
    verb = "can" if is_writable else "cannot"
    detail = f"{folder} {verb} be written to"
    return [*checks, _check("destination", is_writable, detail)]


def _check(name: str, is_fine: bool, detail: str) -> Check:  # noqa: FBT001 (the verdict)
    return Check(name, Status.OK if is_fine else Status.FAIL, detail)


def _network_checks(selection: FileSelection, options: FetchOptions) -> list[Check]:
    """Whether trackers and mirrors can be reached by name."""
    bundle = certificates(os.environ)
    has_bundle = Path(bundle).is_file()
    detail = f"authorities in {bundle}" if has_bundle else f"{bundle}: no such file"
    checks = [Check("certificates", Status.OK if has_bundle else Status.WARN, detail)]
    if options.proxy is not None:
        return [*checks, Check("trackers", Status.OK, "contacted through the proxy")]
    urls = {
        "trackers": list(selection.trackers),
        "mirrors": [find_mirror(name).url for name in options.mirrors],
    }
    hosts = {
        name: [host for url in several if (host := urlsplit(url).hostname)]
        for name, several in urls.items()
    }
    resolved = _resolved({host for several in hosts.values() for host in several})
    for name, several in hosts.items():
        if not several:
            continue
        failed = [host for host in several if host not in resolved]
        detail = f"{len(several) - len(failed)} of {len(several)} host names resolve"
        detail += f"; not {_shown_hosts(failed)}" if failed else ""
        status = Status.WARN if len(failed) == len(several) else Status.OK
        checks.append(Check(name, status, detail))
    return checks


def _shown_hosts(hosts: Sequence[str]) -> str:
    rest = len(hosts) - _SHOWN_HOSTS
    shown = ", ".join(map(shown_host, hosts[:_SHOWN_HOSTS]))
    return f"{shown} and {rest} more" if rest > 0 else shown


def _resolved(hosts: Iterable[str]) -> set[str]:
    """The host names that have an address; all are looked up at once, for a few seconds."""
    resolved: set[str] = set()

    def look_up(host: str) -> None:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError):
            return
        resolved.add(host)

    threads = [threading.Thread(target=look_up, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _RESOLVE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return set(resolved)


def _present_nbytes(root: Path, selection: FileSelection) -> int:
    """Disk space that the wanted files already use, under other programs' names too."""
    partial = candidates(root, selection)
    return sum(
        min(
            file.length,
            max(
                map(_allocated, (root / selection.places[file.index], *partial.get(file.index, ())))
            ),
        )
        for file in selection.metainfo.files
        if file.index in selection.wanted
    )


def _allocated(path: Path) -> int:
    """Bytes on disk; less than the size of a sparse file."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _existing(root: Path) -> Path:
    try:
        return existing(root)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def _free_nbytes(root: Path) -> int:
    try:
        return shutil.disk_usage(_existing(root)).free + begun_nbytes(root)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def _lengths(selection: FileSelection) -> dict[str, int]:
    files = selection.metainfo.files
    return {selection.places[file.index]: file.length for file in files if not file.is_pad}


def _refuse_links(root: Path, places: Mapping[str, int], *, follows: bool) -> None:
    """Refuse links and other special files: libtorrent follows links and overwrites targets.

    Args:
        root: The release's folder.
        places: Its files, and the bytes of each.
        follows: Whether these may be links to files of their size.
    """
    folders = {PRIVATE}
    own = (f"{PRIVATE}/{name}" for name in (RESUME, BEGUN, ADOPTION, LOCK))
    files = {TORRENT, *own, *places}
    for place in files:
        folders.update(str(parent) for parent in Path(place).parents if parent.name)
    for name in sorted(folders):
        _expect_type(root / name, "folder", stat.S_ISDIR)
    for name in sorted(files):
        is_link = follows and name in places and (root / name).is_symlink()
        if is_link and regular_size(root / name) == places[name]:
            continue
        _expect_type(root / name, "file", stat.S_ISREG)
    for parts in (root / PRIVATE).glob(".*.parts"):
        _expect_type(parts, "file", stat.S_ISREG)
        if (count := parts.stat().st_nlink) > 1:  # libtorrent writes into it
            message = f"{parts}: expected a file of one name, found {count} (hard links)"
            raise FetchError(message, f"rm {quoted(parts)}")


def _refuse_unreadable(root: Path, selection: FileSelection, *, follows: bool) -> None:
    """Refuse files that the machine does not let us read: they are not to be fetched again."""
    flags = os.O_RDONLY | os.O_CLOEXEC | (0 if follows else os.O_NOFOLLOW)
    for index in selection.wanted:
        path = root / selection.places[index]
        try:
            os.close(os.open(path, flags))
        except OSError as error:
            if not is_absence(error):
                raise refusal(error, path, kind=FetchError) from error


def _expect_type(path: Path, noun: str, is_type: Callable[[int], bool]) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise refusal(error, path, kind=FetchError) from error
    if not is_type(mode):
        other = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
        hint = f"ls -ld {quoted(path)}"
        is_kept = (path.parent / TORRENT).is_file()
        if (
            other == "a symbolic link" and path.name == CKPT and is_kept
        ):  # its files are replaced under home
            hint = f"grokctl verify {quoted(path.parent)} --repair"
        raise FetchError(f"{path}: expected a {noun}, found {other}", hint)


def _truncate(path: Path, length: int) -> None:
    """Cut off bytes beyond the end of a file; a link of either kind stays as it is."""
    if not path.exists() or path.is_symlink():
        return
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if status.st_size > length and status.st_nlink == 1:
            os.ftruncate(handle, length)
    finally:
        os.close(handle)
