"""The folder of a download: selected files, ownership, and resume data."""

import hashlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from grokctl.checkpoint.folders import holds_tensors, release_folder
from grokctl.checkpoint.release_files import names_of, release_paths
from grokctl.checkpoint.torrent import (
    Metainfo,
    folder_name,
    parse_metainfo,
    raw_values,
    torrent_bytes,
    trackers_of,
)
from grokctl.checkpoint.torrent_files import V2
from grokctl.checkpoint.trust import read_source
from grokctl.checkpoint.unfinished import Unfinished, forget_unfinished, read_unfinished
from grokctl.errors import FetchError, invalid
from grokctl.model.tensors import layer_files, num_layers_of
from grokctl.os_errors import TooLargeError, refusal
from grokctl.paths import (
    BEGUN,
    CKPT,
    CONFIG,
    LOCK,
    PRIVATE,
    RESUME,
    TOKENIZER,
    TORRENT,
    delete_record,
    locked,
    quoted,
    read_limited,
    rename_record,
    write_atomically,
)
from grokctl.text import has_secret, printable, shown_url
from grokctl.transfer.sources import FetchOptions, FetchRequest, parse_source, plain_urls

_LARGEST_RESUME: Final = 64 * 2**20
"""Bytes of resume data; that of Grok-1 has less than one million."""
_SYSTEM_FOLDERS: Final = frozenset({"lost+found"})
"""A new file system has these, so a folder with nothing else counts as empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSelection:
    """A torrent, the files to download from it, and a place for each of them."""

    metainfo: Metainfo
    info: bytes
    """The raw info dictionary: all that the infohash covers."""
    layers: bytes
    """The raw piece layers of a torrent without v1 pieces; empty for any other."""
    trackers: tuple[str, ...]
    places: dict[int, str]
    """File index -> path in the release, of all files."""
    wanted: frozenset[int]
    """Indices of the selected files."""

    @property
    def nbytes(self) -> int:
        """Bytes of the selected files."""
        return sum(file.length for file in self.metainfo.files if file.index in self.wanted)

    @property
    def pieces(self) -> list[int]:
        """Pieces that touch the selected files, ascending."""
        files = (file for file in self.metainfo.files if file.index in self.wanted)
        return sorted({piece for file in files for piece in self.metainfo.pieces_of(file)})


def select_files(torrent: bytes, request: FetchRequest) -> FileSelection:
    """Select the files to download, and give each file its place in the release.

    Raises:
        FetchError: It is not the torrent of the infohash, or not that of a release.
        UsageError: The options match no file, or name a layer that the model does not have.
    """
    origin, options = request.origin, request.options
    name = printable(origin.name) or origin.infohash
    metainfo = parse_metainfo(torrent, source=name)
    if metainfo.infohash != origin.infohash:
        raise FetchError(f"{name}: expected infohash {origin.infohash}, found {metainfo.infohash}")
    raw = raw_values(torrent)
    second = hashlib.sha256(raw[b"info"]).hexdigest()
    if origin.v2_infohash not in {"", second}:
        raise FetchError(f"{name}: expected v2 infohash {origin.v2_infohash}, found {second}")
    places = release_paths(metainfo)
    return FileSelection(
        metainfo=metainfo,
        info=raw[b"info"],
        layers=raw.get(b"piece layers", b"") if metainfo.version == V2 else b"",
        trackers=options.asked([*origin.trackers, *plain_urls(trackers_of(torrent))]),
        places=places,
        wanted=wanted_files(names_of(metainfo, places), options),
    )


def wanted_files(names: Mapping[int, str], options: FetchOptions) -> frozenset[int]:
    """The files that the options select.

    Args:
        names: File index -> name in the release.
        options: Names the files; without any, all are wanted.

    Raises:
        UsageError: They match none, or name a layer that the model does not have.
    """
    wanted = _wanted(names, options.only, options.layers)
    if not wanted:
        first, *_ = names.values()
        globs, problem = ", ".join(options.only), f"matches none of {len(names)} files"
        raise invalid("only", globs, problem, f"--only {first}")
    # small, and needed to read any tensor
    wanted |= {index for index, name in names.items() if name in {CONFIG, TOKENIZER}}
    return frozenset(wanted)


def _wanted(
    places: Mapping[int, str], only: tuple[str, ...], layers: frozenset[int] | None
) -> set[int]:
    if not only and layers is None:
        return set(places)
    wanted = {
        index
        for index, place in places.items()
        for name in (place, place.rpartition("/")[2])
        if any(fnmatchcase(name, glob) for glob in only)
    }
    if layers is not None:
        num_tensors = sum(place.startswith(f"{CKPT}/tensor") for place in places.values())
        try:
            files = layer_files(num_tensors, layers)
        except ValueError as error:
            largest = max(num_layers_of(num_tensors) - 1, 0)
            hint = f"--layers 0-{largest}" if largest else "--layers 0"
            raise invalid("layers", max(layers), str(error), hint) from error
        wanted |= {
            index for index, place in places.items() if place.removeprefix(f"{CKPT}/") in files
        }
    return wanted


def bare_torrent(info: bytes, trackers: Iterable[str], *, layers: bytes = b"") -> bytes:
    """Metainfo of the parts that the infohash covers and the trackers, and nothing else.

    Args:
        info: The raw info dictionary: encoding it again could change its hash.
        trackers: Announce URLs.
        layers: The raw piece layers of a torrent without v1 pieces.
    """
    urls = [b"l%d:%se" % (len(url), url) for url in (text.encode() for text in trackers)]
    announce = b"13:announce-listl" + b"".join(urls) + b"e" if urls else b""
    piece_layers = b"12:piece layers" + layers if layers else b""
    return b"d" + announce + b"4:info" + info + piece_layers + b"e"


def refuse_foreign(request: FetchRequest) -> None:
    """Refuse a folder with other files.

    Raises:
        FetchError: The folder is not empty, and not of this release.
    """
    origin, root = request.origin, request.root
    if request.options.force:
        _refuse_other_shape(request)
        return
    claimed = read_source(root)
    if (
        _is_empty(root)
        or claimed == origin.infohash
        or _cached_torrent(root, origin.infohash) is not None
    ):
        return
    words = [origin.shown, *chosen_options(request.options)]
    command = f"grokctl fetch {shlex.join(words)} --to"
    if claimed is not None:
        other = root.with_name(f"{root.name}-{origin.infohash[:8]}")
        message = f"{root}: expected release {origin.infohash}, found {claimed}"
        raise FetchError(message, f"{command} {quoted(other)}")
    folder = release_folder(root)
    if folder is not None:
        message = f"{root}: contains a {CKPT} that grokctl did not fetch"
        advice = f"{command} {quoted(folder.root)} --force  # adopts it, and keeps what differs"
        if folder.root != root or not folder.is_usual:
            message = f"{root}: contains a release in {folder.tensors}"
        if not folder.is_usual:
            advice = f"grokctl verify {quoted(root)} --torrent-file FILE --repair"
        raise FetchError(message, advice)
    inside = root / folder_name(origin.name, origin.infohash)
    message = f"{root}: expected an empty folder or a release, found other files"
    raise FetchError(message, f"{command} {quoted(inside)}")


def _refuse_other_shape(request: FetchRequest) -> None:
    """Refuse a release whose tensors a fetch would not find: it would fetch all of them again.

    Raises:
        FetchError: It is one.
    """
    origin, root = request.origin, request.root
    if read_source(root) == origin.infohash:
        return
    folder = release_folder(root)
    if folder is None or not holds_tensors(folder.tensors):
        return
    is_link = folder.tensors.is_symlink()
    if folder.is_usual and not is_link and folder.root.resolve() == root.resolve():
        return
    command = f"grokctl verify {quoted(root)} --torrent-file"
    if folder.is_usual and not is_link:
        command = f"grokctl fetch {quoted(origin.shown)} --to {quoted(folder.root)}"
        advice = f"{command} --force  # adopts it, and keeps what differs"
    else:
        file = "FILE" if origin.torrent is None else quoted(origin.shown)
        advice = f"{command} {file} --repair  # fetches what is missing, and keeps it under home"
    how = ", a symbolic link" if is_link else ""
    message = f"{root}: expected its tensors in {root / CKPT}, found them in {folder.tensors}{how}"
    raise FetchError(message, advice)


def is_foreign(request: FetchRequest) -> bool:
    """Whether a folder that is not empty is to be adopted: grokctl did not begin it.

    Raises:
        FetchError: The folder cannot be read.
    """
    root = request.root
    return read_source(root) != request.origin.infohash and not _is_empty(root, PRIVATE)


def _is_empty(root: Path, *others: str) -> bool:
    """Whether a folder is missing, or holds nothing of anybody's but these names."""
    try:
        return all(
            # a kill during our first writes leaves `.release.torrent.…`
            entry.name in {*_SYSTEM_FOLDERS, *others} or entry.name.startswith(f".{TORRENT}.")
            for entry in root.iterdir()
        )
    except FileNotFoundError:
        return True
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error


def local_torrent(request: FetchRequest) -> bytes | None:
    """The torrent, if it is on this machine; None if peers must send its metadata.

    Raises:
        UsageError: The given file does not exist.
        FetchError: The given file is not a torrent, or not the source's.
    """
    origin, given = request.origin, request.options.torrent_file
    if given is None:
        return origin.torrent or _cached_torrent(request.root, origin.infohash)
    if not given.is_file():
        raise invalid("torrent_file", given, "no such file", f"ls -l {quoted(given)}")
    parsed = parse_source(str(given))
    if parsed.infohash != origin.infohash:
        name = printable(origin.name) or origin.shown
        raise FetchError(
            f"{given}: expected infohash {origin.infohash} of {name}, found {parsed.infohash}",
            f"grokctl fetch {quoted(given)}",
        )
    return parsed.torrent


def _cached_torrent(root: Path, infohash: str) -> bytes | None:
    """The torrent that an earlier fetch wrote, if it has this infohash."""
    path = root / TORRENT
    if not path.is_file():  # reading a pipe would block
        return None
    try:
        torrent = torrent_bytes(path)
        if parse_metainfo(torrent, source=path.name).infohash == infohash:
            return torrent
    except (OSError, FetchError):
        pass
    return None


@contextmanager
def fetch_lock(root: Path) -> Iterator[None]:
    """Keep other processes from fetching into a folder.

    Raises:
        FetchError: Another process is fetching into it.
    """
    path = root / PRIVATE / LOCK
    busy = FetchError(f"{root}: another grokctl is fetching into it", f"fuser -v {quoted(path)}")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, busy=busy))
        except OSError as error:
            raise refusal(error, path, kind=FetchError) from error
        yield


def save_resume_data(root: Path, resume: bytes | None, *, is_final: bool = False) -> None:
    """Write resume data for the next fetch, for this user alone: it names trackers and peers.

    Args:
        root: The release.
        resume: From libtorrent; None changes nothing.
        is_final: Whether nothing is written to the files after this. Only then can the blocks of
            incomplete pieces be trusted: a later block may replace an earlier one.
    """
    if resume is None:
        return
    if is_final:
        write_atomically(root / PRIVATE / RESUME, resume, mode=0o600)
        delete_record(root / PRIVATE / BEGUN)
    else:
        write_atomically(root / PRIVATE / BEGUN, resume, mode=0o600)


def take_resume_data(root: Path) -> tuple[bytes, bool]:
    """The resume data of an earlier fetch, and whether it was written at the very end."""
    final, begun = root / PRIVATE / RESUME, root / PRIVATE / BEGUN
    with suppress(OSError):
        rename_record(final, BEGUN)
        return _resume_data(begun), True
    with suppress(OSError):
        return _resume_data(begun), False
    return b"", False


def _resume_data(path: Path) -> bytes:
    try:
        return read_limited(path, _LARGEST_RESUME)
    except TooLargeError as error:
        raise refusal(error, kind=FetchError, hint=f"rm {quoted(path)}") from error


def forget_resume_data(root: Path) -> None:
    """Delete all claims: the files are about to be replaced."""
    for name in (RESUME, BEGUN):
        delete_record(root / PRIVATE / name)


def record_progress(
    request: FetchRequest,
    selection: FileSelection,
    have: Iterable[int],
    *,
    is_final: bool = False,
) -> None:
    """Record how much of a release is on disk, and how to continue; or that all of it is.

    Args:
        request: The download.
        selection: The files to download; once these are complete, the others are what is missing.
        have: Pieces on disk.
        is_final: Whether the fetch ends.

    Raises:
        OSError: The folder cannot be written.
    """
    metainfo, there = selection.metainfo, frozenset(have)
    nbytes = sum(map(metainfo.piece_size, range(metainfo.num_pieces)))
    done = sum(map(metainfo.piece_size, there))
    if done >= nbytes:
        forget_unfinished(request.root)
        return
    source, options = request.origin.shown, tuple(typed_options(request.options))
    if not there.issuperset(selection.pieces):
        options += tuple(_selected(request.options))
    if request.origin.torrent is not None:
        source = str(Path(source).absolute())
        is_repair = source == str((request.root / TORRENT).absolute())
        earlier = read_unfinished(request.root) if is_repair else None
        if earlier is not None:  # the fetch that was begun is the one to continue
            source, options = earlier.source, earlier.options
    Unfinished(
        source=source,
        options=options,
        have=done,
        nbytes=nbytes,
        is_final=is_final,
    ).write(request.root)


def typed_options(options: FetchOptions) -> Iterator[str]:
    """The options that tell where the bytes come from, without credentials.

    A proxy stays even so, with a mark where its password was: a command without it would go past
    the proxy, and this one is refused until the password is there.
    """
    for option, values in (
        ("--peer", options.peers),
        ("--tracker", options.trackers),
        ("--web-seed", options.web_seeds),
        ("--mirror", options.mirrors),
        ("--bind", (options.bind,)),
        ("--port", (options.port,)),
        ("--proxy", (options.proxy,)),
        ("--torrent-file", (options.torrent_file and options.torrent_file.absolute(),)),
        ("--tokenizer", (options.tokenizer and options.tokenizer.absolute(),)),
        ("--max-download", _with_unit(options.max_download)),
        ("--max-upload", _with_unit(options.max_upload)),
        ("--connections", (options.connections,)),
    ):
        for value in values:
            is_url = option in {"--tracker", "--web-seed", "--mirror"}
            if option == "--proxy" and value is not None:
                yield from (option, shown_url(str(value)))
            elif value is not None and not (is_url and has_secret(str(value))):
                yield from (option, str(value))
    yield from ["--no-dht"] * (not options.dht)
    yield from ["--no-lsd"] * (not options.lsd)
    yield from ["--no-trackers"] * (not options.source_trackers)


def chosen_options(options: FetchOptions) -> Iterator[str]:
    """The options of a fetch, without credentials: where from, and which files."""
    yield from typed_options(options)
    yield from _selected(options)


def _with_unit(rate: float | None) -> tuple[str, ...]:
    """A rate as the command line takes any: a small number without a unit is refused."""
    return () if rate is None else (f"{rate:.0f}B",)


def _selected(options: FetchOptions) -> Iterator[str]:
    """The options that select files."""
    for glob in options.only:
        yield from ("--only", glob)
    if options.layers is not None:
        yield from ("--layers", ",".join(map(str, sorted(options.layers))))


def remove_parts(root: Path) -> None:
    """Delete libtorrent's part files for pieces of unwanted files, once every file is complete."""
    for path in (root / PRIVATE).glob(".*.parts"):
        delete_record(path)
