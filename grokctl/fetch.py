"""From a magnet link to the complete, flushed files of a release."""

import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from grokctl.checkpoint.release import release_paths
from grokctl.checkpoint.torrent import (
    GROK_1_MAGNET,
    folder_name,
    parse_magnet,
    parse_metainfo,
    printable,
)
from grokctl.destination import (
    RESUME,
    FetchPlan,
    Job,
    bare_torrent,
    choose,
    keep_resume,
    prepare,
    refuse_foreign,
    refuse_links,
    refused,
    remove_parts,
    space_plan,
    torrent_at_hand,
)
from grokctl.errors import StalledError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit, ignore
from grokctl.paths import CKPT, PRIVATE
from grokctl.sources import GROK_1, Endpoint, FetchOptions, Origin, endpoint, read_source_argument
from grokctl.swarm import Network, Snapshot, Swarm, Transfer, resolve

_TICK_S: Final = 0.25
_SAVE_EVERY_S: Final = 30.0
_SAVE_WITHIN_S: Final = 3.0
_DEFAULTS: Final = FetchOptions()


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
    origin = read_source_argument(source)
    refuse_foreign(root, origin, force=options.force)
    with Swarm(_network(options)) as swarm:
        peers = resolve([endpoint(peer) for peer in options.peers])
        torrent = torrent_at_hand(origin, root)
        if torrent is None:
            torrent, met = _from_swarm(swarm, origin, peers, options, observe)
            peers = list(dict.fromkeys([*peers, *met]))
        job = choose(torrent, origin, options)
        prepare(root, job)
        swarm.add(_transfer(job, root, peers, options))
        run = _Run(swarm, origin, job, root, options, observe)
        try:
            last = run.download()
            if options.seed or options.seed_ratio is not None:
                run.seed()
        finally:
            with suppress(OSError):
                keep_resume(root, swarm.resume_data(timeout_s=_SAVE_WITHIN_S))
    if last.has_everything:
        remove_parts(root)
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
    origin = read_source_argument(source)
    refuse_foreign(root, origin, force=options.force)
    torrent = torrent_at_hand(origin, root)
    if torrent is None:
        with Swarm(_network(options)) as swarm:
            peers = resolve([endpoint(peer) for peer in options.peers])
            torrent, _ = _from_swarm(swarm, origin, peers, options, observe)
    job = choose(torrent, origin, options)
    refuse_links(root, job.places.values())
    return space_plan(root, job)


def default_root(source: str, releases: Path) -> Path:
    """Where a source is downloaded to when the user names no place.

    Raises:
        UsageError: The source is of no known kind.
        FetchError: It is malformed.
    """
    origin = read_source_argument(source)
    if origin.infohash == parse_magnet(GROK_1_MAGNET).infohash:
        return releases / GROK_1
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


def _from_swarm(
    swarm: Swarm,
    origin: Origin,
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
    return bare_torrent(info, trackers), met


def _transfer(job: Job, root: Path, peers: list[Endpoint], options: FetchOptions) -> Transfer:
    path = root / PRIVATE / RESUME
    resume = None
    with suppress(OSError):
        resume = path.read_bytes()
        # its claims hold for what lies there now; what is about to come may disprove them
        path.unlink()
    return Transfer(
        metainfo=job.metainfo,
        torrent=bare_torrent(job.info, ()),
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
    origin: Origin
    job: Job
    root: Path
    options: FetchOptions
    observe: Observer

    def download(self) -> Snapshot:
        """Wait until every wanted file is whole and on disk."""
        now = self._check()
        if now.done:
            keep_resume(self.root, self.swarm.resume_data(timeout_s=_SAVE_WITHIN_S))
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
            keep_resume(self.root, self.swarm.take_resume_data())
        self.swarm.flush()
        if now.downloaded:
            self._make_durable(now)
        self.observe(Finished(stage=Stage.FETCH))
        return now

    def seed(self) -> None:
        """Give back; Ctrl-C is the ordinary end of it."""
        ratio = self.options.seed_ratio
        goal = None if ratio is None else int(ratio * self.job.nbytes)
        try:
            self.observe(Started(stage=Stage.SEED, total=goal or 0))
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
                raise refused(path, error) from error


def _pace(now: Snapshot) -> str:
    speed = f"{now.rate / 1e6:.1f} MB/s" if now.rate else "waiting for peers"
    return f"{speed} · {_crowd(now)}"


def _crowd(now: Snapshot) -> str:
    return f"{_several(now.peers, 'peer')}, {_several(now.seeds, 'seed')}"


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _stalled(
    what: str, swarm: Swarm, now: Snapshot, origin: Origin, options: FetchOptions
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
