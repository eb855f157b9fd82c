"""From a magnet link to the complete, flushed files of a release."""

import errno
import ipaddress
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from grokctl.checkpoint.receipt import read_source, write_source
from grokctl.checkpoint.release import release_paths
from grokctl.checkpoint.torrent import (
    GROK_1_MAGNET,
    Metainfo,
    folder_name,
    parse_magnet,
    parse_metainfo,
    printable,
    read_metainfo,
    trackers_of,
)
from grokctl.errors import DiskFullError, FetchError, GrokctlError, StalledError, UsageError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit, ignore
from grokctl.paths import CKPT, CONFIG, PRIVATE, TOKENIZER, TORRENT, write_atomically
from grokctl.swarm import Endpoint, Network, Snapshot, Swarm, Transfer, info_of, resolve

_GROK_1: Final = "grok-1"
_RESUME: Final = "resume"
_PLAIN: Final = re.compile("[!-~]+")
_TICK_S: Final = 0.25
_SAVE_EVERY_S: Final = 30.0
_SAVE_WITHIN_S: Final = 3.0
_OWN_NAMES: Final = frozenset({"lost+found"})
"""What a folder may hold and still count as empty: a fresh file system has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """How to download.

    Raises:
        UsageError: A value cannot be meant.
    """

    peers: tuple[str, ...] = ()
    """`HOST:PORT` of people who have it; `[ADDRESS]:PORT` for IPv6."""
    trackers: tuple[str, ...] = ()
    """Announce URLs beside the source's own."""
    web_seeds: tuple[str, ...] = ()
    """BEP 19 URLs. Those that a magnet or torrent brings along are dropped."""
    only: tuple[str, ...] = ()
    """Globs on a file's path in the release, or on its last part."""
    max_download: int | None = None
    """Bytes per second."""
    max_upload: int | None = None
    """Bytes per second."""
    connections: int | None = None
    port: int | None = None
    """To listen on; 0 is any free one."""
    bind: str | None = None
    """The only local address to use."""
    proxy: str | None = None
    """`socks5://user:password@host:port` or `http://…`; turns DHT, LSD and incoming off."""
    dht: bool = True
    lsd: bool = True
    seed: bool = False
    """Whether to upload after completion, until interrupted."""
    seed_ratio: float | None = None
    """Upload after completion until this multiple of the wanted bytes was sent."""
    stall_timeout_s: float = 300.0
    recheck: bool = False
    """Hash what lies on disk instead of believing resume data; then fetch only bad pieces."""
    force: bool = False
    """Adopt a non-empty folder that grokctl did not make."""

    def __post_init__(self) -> None:
        self._check_addresses()
        if self.port is not None and not 0 <= self.port < 2**16:
            raise UsageError(f"port {self.port}: expected 0 to 65535")
        for name in ("max_download", "max_upload", "connections", "seed_ratio", "stall_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} {value}: expected more than 0")
        if not all(self.only):
            raise UsageError("only: an empty pattern names no file")

    def _check_addresses(self) -> None:
        for peer in self.peers:
            host, _ = _endpoint(peer)
            if self.proxy is not None and not _is_address(host):
                raise UsageError(f"peer {peer}: a name, expected an address when a proxy is used")
        for url in self.trackers:
            _expect_url("tracker", url, {"http", "https", "udp"})
        for url in self.web_seeds:
            _expect_url("web seed", url, {"http", "https"})
        if self.proxy is not None:
            _expect_url("proxy", self.proxy, {"socks5", "socks5h", "http"}, needs_port=True)
        if self.bind is not None and not _is_address(self.bind):
            raise UsageError(f"bind address {self.bind!r}: expected an IP address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Files that were received, whose pieces matched, and that are on disk."""

    root: Path
    infohash: str
    nbytes: int
    """Bytes of the wanted files."""
    downloaded: int
    """Payload bytes received in this run."""
    seconds: float
    is_complete: bool
    """Whether the whole release is here; False after `only`, unless the rest came before."""
    extras: tuple[str, ...]
    """Files beside the tensors."""


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


_DEFAULTS: Final = FetchOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """What a source says before anybody is asked."""

    source: str
    infohash: str
    name: str
    trackers: tuple[str, ...]
    torrent: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is to be fetched, and where it goes."""

    metainfo: Metainfo
    info: bytes
    trackers: tuple[str, ...]
    places: dict[int, str]
    wanted: frozenset[int]

    @property
    def nbytes(self) -> int:
        return sum(file.length for file in self.metainfo.files if file.index in self.wanted)


def fetch(
    source: str, root: Path, options: FetchOptions = _DEFAULTS, *, observe: Observer = ignore
) -> Fetched:
    """Download a release, or what is missing of it, and hand it to the disk.

    What arrives is proven piece by piece against the infohash. What lies there already is
    believed where resume data claims it; only `recheck`, or `verify`, proves that again. However
    it ends, by Ctrl-C or by an error, the next fetch goes on from there.

    Args:
        source: `grok-1`, a magnet link, or the path of a `.torrent` file.
        root: The release's folder; made if it is not there. Nothing is written outside it.
        options: Peers, limits, choice of files.
        observe: Receives metadata, verify (files that were there), fetch and seed in bytes.

    Raises:
        UsageError: The source is of no known kind, or `only` matches no file.
        StalledError: Nobody sent anything for `stall_timeout_s`.
        DiskFullError: There is no room; found before a byte moves where that is possible.
        FetchError: The torrent is hostile or malformed, or the destination refuses it.
    """
    began = time.monotonic()
    origin = _origin(source)
    _refuse_foreign(root, origin, force=options.force)
    with Swarm(_network(options)) as swarm:
        peers = resolve([_endpoint(peer) for peer in options.peers])
        torrent = _at_hand(origin, root)
        if torrent is None:
            torrent, met = _from_swarm(swarm, origin, peers, options, observe)
            peers = list(dict.fromkeys([*peers, *met]))
        job = _job(torrent, origin, options)
        _prepare(root, job)
        swarm.add(_transfer(job, root, peers, options))
        run = _Run(swarm, origin, job, root, options, observe)
        try:
            last = run.download()
            if options.seed or options.seed_ratio is not None:
                run.seed()
        finally:
            with suppress(OSError):
                _keep(root, swarm.resume_data(timeout_s=_SAVE_WITHIN_S))
    if last.has_everything:
        _remove_parts(root)
    return Fetched(
        root=root,
        infohash=origin.infohash,
        nbytes=job.nbytes,
        downloaded=last.downloaded,
        seconds=time.monotonic() - began,
        is_complete=last.has_everything,
        extras=tuple(place for place in job.places.values() if not place.startswith(f"{CKPT}/")),
    )


def plan(
    source: str, root: Path, options: FetchOptions = _DEFAULTS, *, observe: Observer = ignore
) -> FetchPlan:
    """Say what `fetch` would do; gets only the metadata, and writes nothing.

    Raises:
        GrokctlError: As `fetch` does, but for a lack of space: that is an answer here.
    """
    origin = _origin(source)
    _refuse_foreign(root, origin, force=options.force)
    torrent = _at_hand(origin, root)
    if torrent is None:
        with Swarm(_network(options)) as swarm:
            peers = resolve([_endpoint(peer) for peer in options.peers])
            torrent, _ = _from_swarm(swarm, origin, peers, options, observe)
    job = _job(torrent, origin, options)
    _refuse_links(root, job.places.values())
    return _plan(root, job)


def default_root(source: str, releases: Path) -> Path:
    """Where a source is downloaded to when the user names no place.

    Raises:
        UsageError: The source is of no known kind.
        FetchError: It is malformed.
    """
    origin = _origin(source)
    if origin.infohash == parse_magnet(GROK_1_MAGNET).infohash:
        return releases / _GROK_1
    return releases / folder_name(origin.name, origin.infohash)


@contextmanager
def seeding(
    root: Path, torrent: bytes, *, bind: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[str, int]]:
    """Serve a complete release to those who know the address, and tell nobody else.

    Args:
        root: The release's folder. A damaged piece is noticed when it is asked for, and not sent.
        torrent: Its metainfo; the files lie as `release_paths` has it.
        bind: Address to listen on.
        port: Port to listen on; 0 takes a free one.

    Yields:
        Address and port.

    Raises:
        FetchError: The torrent is malformed, or the port is taken.
    """
    metainfo = parse_metainfo(torrent, source="torrent to seed")
    places = release_paths(metainfo)
    network = Network(bind=bind, port=port, dht=False, lsd=False, shares_addresses=True)
    with Swarm(network) as swarm:
        swarm.add(
            Transfer(
                metainfo=metainfo,
                torrent=torrent,
                root=root,
                places=places,
                wanted=places,
                is_complete=True,
            )
        )
        yield bind, swarm.port(timeout_s=5)


def _endpoint(peer: str) -> Endpoint:
    with suppress(ValueError):
        parts = urlsplit(f"//{peer}")
        if parts.hostname and parts.port and parts.netloc == peer and not parts.username:
            return parts.hostname, parts.port
    raise UsageError(f"peer {peer!r}: expected HOST:PORT", "--peer 203.0.113.7:6881")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _expect_url(what: str, url: str, schemes: set[str], *, needs_port: bool = False) -> None:
    with suppress(ValueError):
        parts = urlsplit(url)
        has_host = parts.hostname and (parts.port or not needs_port)
        if parts.scheme in schemes and has_host and _PLAIN.fullmatch(url):
            return
    port = ":port" if needs_port else ""
    raise UsageError(f"{what} {url!r}: expected {' or '.join(sorted(schemes))}://host{port}")


def _origin(source: str) -> _Origin:
    if source == _GROK_1 or source.startswith("magnet:"):
        magnet = parse_magnet(GROK_1_MAGNET if source == _GROK_1 else source)
        return _Origin(
            source=source,
            infohash=magnet.infohash,
            name=magnet.name,
            trackers=_plain(magnet.trackers),
        )
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"source {printable(source)!r}: expected {_GROK_1}, a magnet link or a .torrent file",
            f"grokctl fetch {_GROK_1}",
        )
    try:
        metainfo, torrent = read_metainfo(path), path.read_bytes()
    except OSError as error:
        raise FetchError(f"{path}: {error.strerror}", f"ls -l {path}") from error
    return _Origin(
        source=source,
        infohash=metainfo.infohash,
        name=metainfo.name,
        trackers=_plain(trackers_of(torrent)),
        torrent=torrent,
    )


def _plain(urls: Iterable[str]) -> tuple[str, ...]:
    """URLs that cannot smuggle a second line into a request."""
    return tuple(url for url in urls if _PLAIN.fullmatch(url))


def _network(options: FetchOptions) -> Network:
    return Network(
        bind=options.bind,
        port=options.port,
        proxy=options.proxy,
        dht=options.dht,
        lsd=options.lsd,
        connections=options.connections,
        shares_addresses=bool(options.peers),
    )


def _refuse_foreign(root: Path, origin: _Origin, *, force: bool) -> None:
    """Leave folders alone that hold something else."""
    if force:
        return
    try:
        is_empty = {entry.name for entry in root.iterdir()} <= _OWN_NAMES
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refused(root, error) from error
    claimed = read_source(root)
    if is_empty or claimed == origin.infohash or _cached(root, origin.infohash) is not None:
        return
    if claimed is not None:
        raise FetchError(
            f"{root}: expected release {origin.infohash}, found {claimed}",
            f"grokctl fetch {shlex.quote(origin.source)} --to {root}-{origin.infohash[:8]}",
        )
    raise FetchError(
        f"{root}: is not empty, and not grokctl's",
        f"grokctl fetch {shlex.quote(origin.source)} --to {root / _GROK_1}",
    )


def _at_hand(origin: _Origin, root: Path) -> bytes | None:
    """The torrent, if it need not be asked for."""
    return origin.torrent or _cached(root, origin.infohash)


def _cached(root: Path, infohash: str) -> bytes | None:
    """The torrent that an earlier fetch left here, if it is the right one."""
    path = root / TORRENT
    try:
        if read_metainfo(path).infohash == infohash:
            return path.read_bytes()
    except (OSError, FetchError):
        pass
    return None


def _from_swarm(
    swarm: Swarm,
    origin: _Origin,
    peers: list[Endpoint],
    options: FetchOptions,
    observe: Observer,
) -> tuple[bytes, list[Endpoint]]:
    """Ask the swarm for metadata; also says which peers answered."""
    observe(Started(stage=Stage.METADATA, unit=Unit.NOTHING))
    trackers = (*origin.trackers, *options.trackers)
    deadline = time.monotonic() + options.stall_timeout_s
    with tempfile.TemporaryDirectory() as folder:
        swarm.ask_for_metadata(origin.infohash, trackers=trackers, peers=peers, folder=Path(folder))
        while (info := swarm.metadata()) is None:
            now = swarm.poll(min(1.0, options.stall_timeout_s))
            detail = f"waiting for metadata: {_several(now.peers, 'peer')}"
            observe(Advanced(stage=Stage.METADATA, detail=detail))
            if time.monotonic() > deadline:
                raise _stalled("metadata", swarm, now, origin, options)
        met = swarm.leave()
    observe(Finished(stage=Stage.METADATA))
    return _torrent(info, trackers), met


def _torrent(info: bytes, trackers: Iterable[str]) -> bytes:
    """Metainfo that holds what the infohash covers, the trackers, and nothing else.

    The info dictionary goes in as it came: encoding it anew could change its hash.
    """
    urls = [b"l%d:%se" % (len(url), url) for url in (text.encode() for text in trackers)]
    announce = b"13:announce-listl" + b"".join(urls) + b"e" if urls else b""
    return b"d" + announce + b"4:info" + info + b"e"


def _job(torrent: bytes, origin: _Origin, options: FetchOptions) -> _Job:
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
    return _Job(
        metainfo=metainfo,
        info=info_of(torrent),
        trackers=tuple(
            dict.fromkeys([*origin.trackers, *_plain(trackers_of(torrent)), *options.trackers])
        ),
        places=places,
        wanted=frozenset(wanted),
    )


def _is_wanted(place: str, only: Collection[str]) -> bool:
    names = (place, place.rpartition("/")[2])
    return not only or any(fnmatchcase(name, glob) for name in names for glob in only)


def _plan(root: Path, job: _Job) -> FetchPlan:
    files = [file for file in job.metainfo.files if not file.is_pad]
    present = sum(
        min(file.length, _allocated(root / job.places[file.index]))
        for file in files
        if file.index in job.wanted
    )
    try:
        free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    except OSError as error:
        raise _refused(root, error) from error
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


def _refuse_links(root: Path, places: Iterable[str]) -> None:
    """Refuse a folder in which a name leads elsewhere: libtorrent follows links and overwrites."""
    folders = {PRIVATE}
    files = {TORRENT, f"{PRIVATE}/{_RESUME}", *places}
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
        raise _refused(path, error) from error
    if not is_kind(mode):
        found = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
        raise FetchError(f"{path}: expected a {kind}, found {found}", f"ls -ld {path}")


def _prepare(root: Path, job: _Job) -> None:
    """Make the folder ready to receive, and refuse before a byte moves what cannot end well."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _refuse_links(root, job.places.values())
        wanted = _plan(root, job)
        if not wanted.fits:
            raise DiskFullError(
                f"{root}: expected {wanted.needed_nbytes:,} bytes free, "
                f"found {wanted.free_nbytes:,}",
                f"df -h {root}",
            )
        write_atomically(root / TORRENT, _torrent(job.info, job.trackers))
        write_source(root, infohash=job.metainfo.infohash)
        for file in job.metainfo.files:
            if file.index in job.wanted:
                _cut(root / job.places[file.index], file.length)
    except OSError as error:
        raise _refused(root, error) from error


def _cut(path: Path, length: int) -> None:
    """Cut off what lies behind the end of a file: libtorrent would leave it there."""
    if path.exists() and path.stat().st_size > length:
        os.truncate(path, length)


def _transfer(job: _Job, root: Path, peers: list[Endpoint], options: FetchOptions) -> Transfer:
    path = root / PRIVATE / _RESUME
    resume = None
    with suppress(OSError):
        resume = path.read_bytes()
        # its claims hold for what lies there now; what is about to come may disprove them
        path.unlink()
    return Transfer(
        metainfo=job.metainfo,
        torrent=_torrent(job.info, ()),
        root=root,
        places=job.places,
        wanted=job.wanted,
        trackers=job.trackers,
        web_seeds=options.web_seeds,
        peers=peers,
        resume=resume,
        trusts_resume=not options.recheck,
        max_download=options.max_download,
        max_upload=options.max_upload,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A transfer that was begun."""

    swarm: Swarm
    origin: _Origin
    job: _Job
    root: Path
    options: FetchOptions
    observe: Observer

    def download(self) -> Snapshot:
        """Wait until every wanted file is whole and on disk."""
        now = self._check()
        if now.done:
            _keep(self.root, self.swarm.resume_data(timeout_s=_SAVE_WITHIN_S))
        self.observe(Started(stage=Stage.FETCH, total=self.job.nbytes, done=now.done))
        moved = saved = time.monotonic()
        downloaded = now.downloaded
        while not now.has_wanted:
            now = self._poll()
            self.observe(Advanced(stage=Stage.FETCH, done=now.done, detail=_pace(now)))
            clock = time.monotonic()
            if now.downloaded > downloaded:
                downloaded, moved = now.downloaded, clock
            elif clock - moved > self.options.stall_timeout_s and not now.has_wanted:
                raise _stalled("payload", self.swarm, now, self.origin, self.options)
            if clock - saved > _SAVE_EVERY_S:
                saved = clock
                self.swarm.ask_for_resume_data()
            _keep(self.root, self.swarm.take_resume_data())
        self.swarm.flush()
        if now.downloaded:
            self._make_durable(now)
        self.observe(Finished(stage=Stage.FETCH))
        return now

    def seed(self) -> None:
        """Give back; Ctrl-C is the ordinary end of it."""
        ratio = self.options.seed_ratio
        goal = None if ratio is None else int(ratio * self.job.nbytes)
        self.observe(Started(stage=Stage.SEED, total=goal or 0))
        try:
            now = self._poll()
            while goal is None or now.uploaded < goal:
                detail = f"{now.upload_rate / 1e6:.1f} MB/s · {_several(now.peers, 'peer')}"
                self.observe(Advanced(stage=Stage.SEED, done=now.uploaded, detail=detail))
                now = self._poll()
        except KeyboardInterrupt:
            self.observe(Noted(message="seeding ended, the download is complete"))
        self.observe(Finished(stage=Stage.SEED))

    def _poll(self) -> Snapshot:
        now = self.swarm.poll(_TICK_S)
        for note in self.swarm.take_notes():
            self.observe(Noted(message=note))
        return now

    def _check(self) -> Snapshot:
        """Wait until libtorrent knows what lies on disk."""
        is_shown = False
        while (now := self._poll()).is_checking:
            if now.is_hashing:
                if not is_shown:
                    self.observe(Started(stage=Stage.VERIFY, total=self.job.nbytes))
                is_shown = True
                done = int(now.checked * self.job.nbytes)
                detail = "checking what is here"
                self.observe(Advanced(stage=Stage.VERIFY, done=done, detail=detail))
        if is_shown:
            self.observe(Finished(stage=Stage.VERIFY))
        return now

    def _make_durable(self, now: Snapshot) -> None:
        """Wait until the disk has what the operating system was given."""
        for index in sorted(self.job.wanted):
            path = self.root / self.job.places[index]
            detail = f"writing {path.name} to disk"
            self.observe(Advanced(stage=Stage.FETCH, done=now.done, detail=detail))
            try:
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                raise _refused(path, error) from error


def _pace(now: Snapshot) -> str:
    speed = f"{now.rate / 1e6:.1f} MB/s" if now.rate else "waiting for peers"
    return f"{speed} · {_crowd(now)}"


def _crowd(now: Snapshot) -> str:
    return f"{_several(now.peers, 'peer')}, {_several(now.seeds, 'seed')}"


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _keep(root: Path, resume: bytes | None) -> None:
    if resume is not None:
        write_atomically(root / PRIVATE / _RESUME, resume)


def _remove_parts(root: Path) -> None:
    """Remove libtorrent's store for pieces of unwanted files, now that none is unwanted."""
    for path in (root / PRIVATE).glob(".*.parts"):
        path.unlink(missing_ok=True)


def _stalled(
    what: str, swarm: Swarm, now: Snapshot, origin: _Origin, options: FetchOptions
) -> StalledError:
    silent = dict.fromkeys((*origin.trackers, *options.trackers), "no answer")
    answers = [
        f"{urlsplit(url).hostname}: {answer}" for url, answer in (silent | swarm.trackers).items()
    ]
    name = printable(origin.name) or origin.infohash
    message = (
        f"swarm of {name}: expected {what}, found none for {options.stall_timeout_s:g} s from "
        f"{_crowd(now)} ({'; '.join(answers) or 'no trackers'})"
    )
    command = f"grokctl fetch {shlex.quote(origin.source)}"
    if options.dht or options.proxy:
        return StalledError(message, f"{command} --stall-timeout 3600 --peer HOST:PORT")
    return StalledError(message, f"{command}  # without --no-dht")


def _refused(path: Path, error: OSError) -> GrokctlError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFullError(f"{path}: {error.strerror}", f"df -h {path}")
    return FetchError(f"{error.filename or path}: {error.strerror}", f"ls -ld {path}")
