"""Where a download goes: what is chosen, what must not be touched, and whether there is room."""

import errno
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from grokctl.checkpoint.receipt import read_source, write_source
from grokctl.checkpoint.release import release_paths
from grokctl.checkpoint.torrent import (
    Metainfo,
    parse_metainfo,
    printable,
    read_metainfo,
    trackers_of,
)
from grokctl.errors import DiskFullError, FetchError, GrokctlError, UsageError
from grokctl.paths import CONFIG, PRIVATE, TOKENIZER, TORRENT, write_atomically
from grokctl.sources import GROK_1, FetchOptions, Origin, plain
from grokctl.swarm import info_of

RESUME: Final = "resume"
"""libtorrent's resume data, in the release's private folder."""
_OWN_NAMES: Final = frozenset({"lost+found"})
"""What a folder may hold and still count as empty: a fresh file system has it."""


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

    @property
    def needed_nbytes(self) -> int:
        """Disk that is still to be taken."""
        return self.wanted_nbytes - self.present_nbytes

    @property
    def fits(self) -> bool:
        """Whether the destination has room for what is missing."""
        return self.needed_nbytes <= self.free_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be fetched, and where it goes."""

    metainfo: Metainfo
    info: bytes
    trackers: tuple[str, ...]
    places: dict[int, str]
    wanted: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Bytes of the wanted files."""
        return sum(file.length for file in self.metainfo.files if file.index in self.wanted)


def choose(torrent: bytes, origin: Origin, options: FetchOptions) -> Job:
    """Decide by our own rules what is fetched and where it goes."""
    name = printable(origin.name) or origin.infohash
    metainfo = parse_metainfo(torrent, source=name)
    if metainfo.infohash != origin.infohash:
        raise FetchError(f"{name}: expected infohash {origin.infohash}, found {metainfo.infohash}")
    places = release_paths(metainfo)
    wanted = {index for index, place in places.items() if _is_wanted(place, options.only)}
    if not wanted:
        first, *_ = places.values()
        raise UsageError(
            f"only {', '.join(options.only)}: matches none of {len(places)} files",
            f"--only {first}",
        )
    # small, and without them nobody knows what the tensors are
    wanted |= {index for index, place in places.items() if place in {CONFIG, TOKENIZER}}
    return Job(
        metainfo=metainfo,
        info=info_of(torrent),
        trackers=tuple(
            dict.fromkeys([*origin.trackers, *plain(trackers_of(torrent)), *options.trackers])
        ),
        places=places,
        wanted=frozenset(wanted),
    )


def _is_wanted(place: str, only: Collection[str]) -> bool:
    names = (place, place.rpartition("/")[2])
    return not only or any(fnmatchcase(name, glob) for name in names for glob in only)


def bare_torrent(info: bytes, trackers: Iterable[str]) -> bytes:
    """Metainfo that holds what the infohash covers, the trackers, and nothing else.

    The info dictionary goes in as it came: encoding it anew could change its hash.
    """
    urls = [b"l%d:%se" % (len(url), url) for url in (text.encode() for text in trackers)]
    announce = b"13:announce-listl" + b"".join(urls) + b"e" if urls else b""
    return b"d" + announce + b"4:info" + info + b"e"


def refuse_foreign(root: Path, origin: Origin, *, force: bool) -> None:
    """Leave folders alone that hold something else."""
    if force:
        return
    try:
        is_empty = {entry.name for entry in root.iterdir()} <= _OWN_NAMES
    except FileNotFoundError:
        return
    except OSError as error:
        raise refused(root, error) from error
    claimed = read_source(root)
    if is_empty or claimed == origin.infohash or cached_torrent(root, origin.infohash) is not None:
        return
    if claimed is not None:
        raise FetchError(
            f"{root}: expected release {origin.infohash}, found {claimed}",
            f"grokctl fetch {shlex.quote(origin.source)} --to {root}-{origin.infohash[:8]}",
        )
    raise FetchError(
        f"{root}: is not empty, and not grokctl's",
        f"grokctl fetch {shlex.quote(origin.source)} --to {root / GROK_1}",
    )


def torrent_at_hand(origin: Origin, root: Path) -> bytes | None:
    """The torrent, if it need not be asked for."""
    return origin.torrent or cached_torrent(root, origin.infohash)


def cached_torrent(root: Path, infohash: str) -> bytes | None:
    """The torrent that an earlier fetch left here, if it is the right one."""
    path = root / TORRENT
    try:
        if read_metainfo(path).infohash == infohash:
            return path.read_bytes()
    except (OSError, FetchError):
        pass
    return None


def space_plan(root: Path, job: Job) -> FetchPlan:
    """Say what is to come, and whether it fits."""
    files = [file for file in job.metainfo.files if not file.is_pad]
    present = sum(
        min(file.length, _allocated(root / job.places[file.index]))
        for file in files
        if file.index in job.wanted
    )
    try:
        free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    except OSError as error:
        raise refused(root, error) from error
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
    )


def _allocated(path: Path) -> int:
    """Bytes on disk: of a sparse file, less than its size."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def refuse_links(root: Path, places: Iterable[str]) -> None:
    """Refuse a folder in which a name leads elsewhere: libtorrent follows links and overwrites."""
    folders = {PRIVATE}
    files = {TORRENT, f"{PRIVATE}/{RESUME}", *places}
    for place in files:
        folders.update(str(parent) for parent in Path(place).parents if parent.name)
    for name in sorted(folders):
        _expect_kind(root / name, "folder", stat.S_ISDIR)
    for name in sorted(files):
        _expect_kind(root / name, "file", stat.S_ISREG)


def _expect_kind(path: Path, kind: str, is_kind: Callable[[int], bool]) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise refused(path, error) from error
    if not is_kind(mode):
        found = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
        raise FetchError(f"{path}: expected a {kind}, found {found}", f"ls -ld {path}")


def prepare(root: Path, job: Job) -> None:
    """Make the folder ready to receive, and refuse before a byte moves what cannot end well."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        refuse_links(root, job.places.values())
        wanted = space_plan(root, job)
        if not wanted.fits:
            raise DiskFullError(
                f"{root}: expected {wanted.needed_nbytes:,} bytes free, "
                f"found {wanted.free_nbytes:,}",
                f"df -h {root}",
            )
        write_atomically(root / TORRENT, bare_torrent(job.info, job.trackers))
        write_source(root, infohash=job.metainfo.infohash)
        for file in job.metainfo.files:
            if file.index in job.wanted:
                _cut(root / job.places[file.index], file.length)
    except OSError as error:
        raise refused(root, error) from error


def _cut(path: Path, length: int) -> None:
    """Cut off what lies behind the end of a file: libtorrent would leave it there."""
    if path.exists() and path.stat().st_size > length:
        os.truncate(path, length)


def keep_resume(root: Path, resume: bytes | None) -> None:
    """Write resume data where the next fetch looks for it."""
    if resume is not None:
        write_atomically(root / PRIVATE / RESUME, resume)


def remove_parts(root: Path) -> None:
    """Remove libtorrent's store for pieces of unwanted files, now that none is unwanted."""
    for path in (root / PRIVATE).glob(".*.parts"):
        path.unlink(missing_ok=True)


def refused(path: Path, error: OSError) -> GrokctlError:
    """What the operating system refused, as the error that users meet."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFullError(f"{path}: {error.strerror}", f"df -h {path}")
    return FetchError(f"{error.filename or path}: {error.strerror}", f"ls -ld {path}")
