"""Where a download goes: which files are chosen, whose folder it is, and what is kept in it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from grokctl.checkpoint.receipt import read_source
from grokctl.checkpoint.release import release_paths
from grokctl.checkpoint.torrent import (
    V2,
    Metainfo,
    folder_name,
    parse_metainfo,
    raw_values,
    read_metainfo,
    trackers_of,
)
from grokctl.errors import FetchError, UsageError
from grokctl.model.tensors import layer_files
from grokctl.os_errors import refusal
from grokctl.paths import (
    BEGUN,
    CKPT,
    CONFIG,
    LOCK,
    PRIVATE,
    RESUME,
    TOKENIZER,
    TORRENT,
    locked,
    quoted,
    write_atomically,
)
from grokctl.text import printable
from grokctl.transfer.sources import FetchOptions, Origin, plain, read_source_argument

_OWN_NAMES: Final = frozenset({"lost+found"})
"""What a folder may hold and still count as empty, beside what a kill leaves of our first write:
a fresh file system has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be fetched, and where it goes."""

    metainfo: Metainfo
    info: bytes
    """The raw info dictionary, all that the infohash covers."""
    layers: bytes
    """The raw piece layers that a torrent without v1 pieces needs; else nothing."""
    trackers: tuple[str, ...]
    places: dict[int, str]
    wanted: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Bytes of the wanted files."""
        return sum(file.length for file in self.metainfo.files if file.index in self.wanted)

    @property
    def pieces(self) -> list[int]:
        """Pieces that the wanted files lie in, ascending."""
        files = (file for file in self.metainfo.files if file.index in self.wanted)
        return sorted({piece for file in files for piece in self.metainfo.pieces_of(file)})


def choose(torrent: bytes, origin: Origin, options: FetchOptions) -> Job:
    """Decide by our own rules what is fetched and where it goes."""
    name = printable(origin.name) or origin.infohash
    metainfo = parse_metainfo(torrent, source=name)
    if metainfo.infohash != origin.infohash:
        raise FetchError(f"{name}: expected infohash {origin.infohash}, found {metainfo.infohash}")
    places = release_paths(metainfo)
    wanted = _wanted(places, options)
    if not wanted:
        first, *_ = places.values()
        raise UsageError(
            f"only {', '.join(options.only)}: matches none of {len(places)} files",
            f"--only {first}",
        )
    # small, and without them nobody knows what the tensors are
    wanted |= {index for index, place in places.items() if place in {CONFIG, TOKENIZER}}
    raw = raw_values(torrent)
    return Job(
        metainfo=metainfo,
        info=raw[b"info"],
        layers=raw.get(b"piece layers", b"") if metainfo.version == V2 else b"",
        trackers=tuple(
            dict.fromkeys([*origin.trackers, *plain(trackers_of(torrent)), *options.trackers])
        ),
        places=places,
        wanted=frozenset(wanted),
    )


def _wanted(places: Mapping[int, str], options: FetchOptions) -> set[int]:
    if not options.only and options.layers is None:
        return set(places)
    wanted = {
        index
        for index, place in places.items()
        for name in (place, place.rpartition("/")[2])
        if any(fnmatchcase(name, glob) for glob in options.only)
    }
    if options.layers is not None:
        num_tensors = sum(place.startswith(f"{CKPT}/tensor") for place in places.values())
        try:
            files = layer_files(num_tensors, options.layers)
        except ValueError as error:
            raise UsageError(f"layers: {error}", "--layers 0-3") from error
        wanted |= {
            index for index, place in places.items() if place.removeprefix(f"{CKPT}/") in files
        }
    return wanted


def bare_torrent(info: bytes, trackers: Iterable[str], *, layers: bytes = b"") -> bytes:
    """Metainfo that holds what the infohash covers, the trackers, and nothing else.

    Args:
        info: The info dictionary as it came: encoding it anew could change its hash.
        trackers: Announce URLs.
        layers: The piece layers as they came, of a torrent without v1 pieces.
    """
    urls = [b"l%d:%se" % (len(url), url) for url in (text.encode() for text in trackers)]
    announce = b"13:announce-listl" + b"".join(urls) + b"e" if urls else b""
    beside = b"12:piece layers" + layers if layers else b""
    return b"d" + announce + b"4:info" + info + beside + b"e"


def refuse_foreign(root: Path, origin: Origin, *, force: bool) -> None:
    """Leave folders alone that hold something else."""
    if force:
        return
    try:
        is_empty = all(
            entry.name in _OWN_NAMES or entry.name.startswith(f".{TORRENT}.")
            for entry in root.iterdir()
        )
    except FileNotFoundError:
        return
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error
    claimed = read_source(root)
    if is_empty or claimed == origin.infohash or cached_torrent(root, origin.infohash) is not None:
        return
    command = f"grokctl fetch {quoted(origin.source)} --to"
    if claimed is not None:
        other = root.with_name(f"{root.name}-{origin.infohash[:8]}")
        message = f"{root}: expected release {origin.infohash}, found {claimed}"
        raise FetchError(message, f"{command} {quoted(other)}")
    if (root / CKPT).is_dir():
        message = f"{root}: holds a {CKPT} that grokctl did not fetch"
        raise FetchError(message, f"{command} {quoted(root)} --force  # to adopt it")
    inside = root / folder_name(origin.name, origin.infohash)
    raise FetchError(f"{root}: is not empty, and not grokctl's", f"{command} {quoted(inside)}")


def torrent_at_hand(origin: Origin, root: Path, given: Path | None) -> bytes | None:
    """The torrent, if it need not be asked for.

    Raises:
        FetchError: The file that was given is no torrent, or another one.
    """
    if given is not None:
        if not given.is_file():
            raise UsageError(f"torrent file {given}: no such file", f"ls -l {quoted(given)}")
        found = read_source_argument(str(given))
        if found.infohash != origin.infohash:
            name = printable(origin.name) or origin.source
            raise FetchError(
                f"{given}: expected infohash {origin.infohash} of {name}, found {found.infohash}",
                f"grokctl fetch {quoted(given)}",
            )
        return found.torrent
    return origin.torrent or cached_torrent(root, origin.infohash)


def cached_torrent(root: Path, infohash: str) -> bytes | None:
    """The torrent that an earlier fetch left here, if it is the right one."""
    path = root / TORRENT
    if not path.is_file():  # a pipe would make us wait
        return None
    try:
        if read_metainfo(path).infohash == infohash:
            return path.read_bytes()
    except (OSError, FetchError):
        pass
    return None


def keep_resume(root: Path, resume: bytes | None, *, is_last: bool = False) -> None:
    """Write resume data where the next fetch looks for it.

    Args:
        root: The release.
        resume: What libtorrent says; None changes nothing.
        is_last: Whether nothing was written since. Only then is what it says about pieces that
            are not whole worth anything: a block may have been replaced by another.
    """
    if resume is None:
        return
    if is_last:
        write_atomically(root / PRIVATE / RESUME, resume)
        (root / PRIVATE / BEGUN).unlink(missing_ok=True)
    else:
        write_atomically(root / PRIVATE / BEGUN, resume)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Let nobody else fetch into a folder meanwhile.

    Raises:
        FetchError: Somebody does.
    """
    path = root / PRIVATE / LOCK
    busy = FetchError(f"{root}: another grokctl is fetching into it", f"fuser -v {quoted(path)}")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, busy=busy))
        except OSError as error:
            raise refusal(error, path, kind=FetchError) from error
        yield


def take_resume(root: Path) -> tuple[bytes, bool]:
    """What an earlier fetch left, and whether it could do so at its very end."""
    last, begun = root / PRIVATE / RESUME, root / PRIVATE / BEGUN
    with suppress(OSError):
        last.replace(begun)
        return begun.read_bytes(), True
    with suppress(OSError):
        return begun.read_bytes(), False
    return b"", False


def forget_resume(root: Path) -> None:
    """Withdraw all claims: what lies here is about to be looked at, or replaced."""
    for name in (RESUME, BEGUN):
        (root / PRIVATE / name).unlink(missing_ok=True)


def remove_parts(root: Path) -> None:
    """Remove libtorrent's store for pieces of unwanted files, now that none is unwanted."""
    for path in (root / PRIVATE).glob(".*.parts"):
        path.unlink(missing_ok=True)
