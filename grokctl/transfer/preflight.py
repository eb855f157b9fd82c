"""What can be known before a byte moves: room, links, limits, names; and a folder made ready."""

import os
import resource
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from grokctl.checkpoint.receipt import write_source
from grokctl.checks import Check, Status
from grokctl.errors import DiskFullError, FetchError
from grokctl.machine.disks import existing, file_limit, file_system
from grokctl.machine.network import find_certificates
from grokctl.os_errors import refusal
from grokctl.paths import BEGUN, LOCK, PRIVATE, RESUME, TORRENT, quoted, write_atomically
from grokctl.transfer.destination import Job, bare_torrent
from grokctl.transfer.sources import FetchOptions, mirror

_NAMES_S: Final = 3.0
"""Seconds that the addresses of all trackers may take."""
_OWN_FILES: Final = 8
"""Names beside the release's: folders, the torrent, resume data, what is being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """One file of a release that is to come."""

    path: str
    """`/`-separated, below the release."""
    nbytes: int
    is_wanted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """What a fetch would do."""

    name: str
    infohash: str
    files: tuple[PlannedFile, ...]
    wanted_nbytes: int
    present_nbytes: int
    """Disk that wanted files occupy already, whatever their content."""
    free_nbytes: int
    checks: tuple[Check, ...]
    """All of them, also those that are fine."""

    @property
    def needed_nbytes(self) -> int:
        """Disk that is still to be taken."""
        return self.wanted_nbytes - self.present_nbytes

    @property
    def fits(self) -> bool:
        """Whether nothing that was checked stands in the way."""
        return all(check.status is not Status.FAIL for check in self.checks)


def look_ahead(root: Path, job: Job, options: FetchOptions) -> FetchPlan:
    """Say what is to come, and what stands in its way; writes nothing.

    Args:
        root: The release's folder, which need not exist yet.
        job: What is to come.
        options: Whom it would be asked of.

    Raises:
        FetchError: The folder cannot be looked at, or a name in it leads elsewhere.
    """
    _refuse_links(root, job.places.values())
    files = [file for file in job.metainfo.files if not file.is_pad]
    present, free = _present(root, job), _free(root)
    return FetchPlan(
        name=job.metainfo.name,
        infohash=job.metainfo.infohash,
        files=tuple(
            PlannedFile(
                path=job.places[file.index],
                nbytes=file.length,
                is_wanted=file.index in job.wanted,
            )
            for file in files
        ),
        wanted_nbytes=job.nbytes,
        present_nbytes=present,
        free_nbytes=free,
        checks=(
            *_disk_checks(root, job, present=present, free=free),
            *_network_checks(job, options),
        ),
    )


def prepare(root: Path, job: Job) -> None:
    """Make the folder ready to receive, and refuse before a byte moves what cannot end well.

    Raises:
        DiskFullError: Bytes, files or a single file's size have no room.
        FetchError: A name leads elsewhere, or the folder cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _refuse_links(root, job.places.values())
        checks = _disk_checks(root, job, present=_present(root, job), free=_free(root))
        refuse(checks, root)
        write_atomically(root / TORRENT, bare_torrent(job.info, job.trackers, layers=job.layers))
        write_source(root, infohash=job.metainfo.infohash)
        for file in job.metainfo.files:
            if file.index in job.wanted:
                _cut(root / job.places[file.index], file.length)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def refuse(checks: Iterable[Check], root: Path) -> None:
    """Turn the first check that failed into the error that it foretells.

    Raises:
        DiskFullError: Bytes, files or a single file's size have no room.
        FetchError: The folder cannot be written to.
    """
    for check in checks:
        if check.status is Status.FAIL:
            kind = FetchError if check.name == "destination" else DiskFullError
            raise kind(f"{root}: {check.detail}", _HINTS[check.name].format(quoted(root)))


_HINTS: Final = {
    "disk": "df -h {}",
    "files": "df -i {}",
    "file size": "ulimit -f unlimited",
    "destination": "ls -ld {}",
}


def _disk_checks(root: Path, job: Job, *, present: int, free: int) -> list[Check]:
    """Whether the destination can take what is to come."""
    there = _existing(root)
    needed = job.nbytes - present
    checks = [
        _check("disk", needed <= free, f"expected {needed:,} bytes free, found {free:,}"),
    ]
    try:
        system = os.statvfs(there)
    except OSError as error:
        raise refusal(error, there, kind=FetchError) from error
    names = sum(not (root / job.places[index]).exists() for index in job.wanted) + _OWN_FILES
    if system.f_files:  # some file systems make inodes as they go
        what = f"expected {names:,} more files, found room for {system.f_favail:,}"
        checks.append(_check("files", names <= system.f_favail, what))
    largest = max(file.length for file in job.metainfo.files if file.index in job.wanted)
    limit, why = _largest_file(there)
    what = "has no limit"
    if limit is not None:
        what = f"expected files of {largest:,} bytes, found a limit of {limit:,} ({why})"
    checks.append(_check("file size", limit is None or largest <= limit, what))
    may_write = os.access(there, os.W_OK | os.X_OK) and not system.f_flag & os.ST_RDONLY
    what = f"{there} can be written to" if may_write else f"{there} cannot be written to"
    return [*checks, _check("destination", may_write, what)]


def _check(name: str, is_fine: bool, detail: str) -> Check:  # noqa: FBT001 (the verdict)
    return Check(name, Status.OK if is_fine else Status.FAIL, detail)


def _largest_file(there: Path) -> tuple[int | None, str]:
    """The most bytes that a file may have here, and who says so."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        return soft, "ulimit -f"
    try:
        kind = file_system(there)
    except OSError:
        return None, ""
    limit = file_limit(kind)
    return (None, "") if limit is None else (limit - 1, kind)


def _network_checks(job: Job, options: FetchOptions) -> list[Check]:
    """Whether those who are to be asked can be found."""
    bundle = find_certificates()
    is_there = Path(bundle).is_file()
    detail = f"authorities are listed in {bundle}" if is_there else f"{bundle}: no such file"
    checks = [Check("certificates", Status.OK if is_there else Status.WARN, detail)]
    if options.proxy is not None:
        return [*checks, Check("trackers", Status.OK, "are asked through the proxy")]
    named = {
        "tracker": [host for url in job.trackers if (host := urlsplit(url).hostname)],
        "mirror": [
            host for name in options.mirrors if (host := urlsplit(mirror(name).url).hostname)
        ],
    }
    known = _addresses([*named["tracker"], *named["mirror"]])
    for kind, hosts in named.items():
        if not hosts:
            continue
        found = [host for host in hosts if host in known]
        lost = [host for host in hosts if host not in known]
        detail = f"{len(found)} of {len(hosts)} have an address"
        detail += f"; not {', '.join(lost)}" if lost else ""
        checks.append(Check(f"{kind}s", Status.OK if found else Status.WARN, detail))
    return checks


def _addresses(hosts: Sequence[str]) -> set[str]:
    """Which names have an address; all are asked at once, for a few seconds."""
    known: set[str] = set()

    def ask(host: str) -> None:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError):
            return
        known.add(host)

    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in set(hosts)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _NAMES_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return set(known)


def _present(root: Path, job: Job) -> int:
    return sum(
        min(file.length, _allocated(root / job.places[file.index]))
        for file in job.metainfo.files
        if file.index in job.wanted
    )


def _allocated(path: Path) -> int:
    """Bytes on disk: of a sparse file, less than its size."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def _existing(root: Path) -> Path:
    try:
        return existing(root)
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def _free(root: Path) -> int:
    try:
        return shutil.disk_usage(_existing(root)).free
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def _refuse_links(root: Path, places: Iterable[str]) -> None:
    """Refuse a folder in which a name leads elsewhere: libtorrent follows links and overwrites."""
    folders = {PRIVATE}
    files = {TORRENT, f"{PRIVATE}/{RESUME}", f"{PRIVATE}/{BEGUN}", f"{PRIVATE}/{LOCK}", *places}
    for place in files:
        folders.update(str(parent) for parent in Path(place).parents if parent.name)
    for name in sorted(folders):
        _expect_kind(root / name, "folder", stat.S_ISDIR)
    for name in sorted(files):
        _expect_kind(root / name, "file", stat.S_ISREG)
    for parts in (root / PRIVATE).glob(".*.parts"):
        _expect_kind(parts, "file", stat.S_ISREG)


def _expect_kind(path: Path, kind: str, is_kind: Callable[[int], bool]) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise refusal(error, path, kind=FetchError) from error
    if not is_kind(mode):
        found = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
        raise FetchError(f"{path}: expected a {kind}, found {found}", f"ls -ld {quoted(path)}")


def _cut(path: Path, length: int) -> None:
    """Cut off what lies behind the end of a file: libtorrent would leave it there."""
    if path.exists() and path.stat().st_size > length:
        os.truncate(path, length)
