"""From a magnet link to the complete, flushed files of a release."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.receipt import read_receipt
from grokctl.checkpoint.release import release_paths
from grokctl.checkpoint.torrent import folder_name, parse_metainfo
from grokctl.errors import GrokctlError, UsageError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit, ignore
from grokctl.paths import CKPT, TOKENIZER, quoted
from grokctl.text import format_bytes, format_number
from grokctl.transfer.destination import (
    Job,
    alone,
    bare_torrent,
    choose,
    keep_resume,
    refuse_foreign,
    remove_parts,
    torrent_at_hand,
)
from grokctl.transfer.download import SAVE_WITHIN_S, Download, find_claims, stalled
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.preflight import FetchPlan, look_ahead, prepare
from grokctl.transfer.sources import (
    GROK_1,
    Endpoint,
    FetchOptions,
    Origin,
    endpoint,
    mirror,
    read_source_argument,
    resolve,
)
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Claims, Network, Snapshot, Transfer
from grokctl.transfer.tokenizer import (
    fetch_tokenizer,
    has_tokenizer,
    put_tokenizer,
    read_tokenizer,
    refuse_other,
)
from grokctl.transfer.web import Web

_DEFAULTS: Final = FetchOptions()


@dataclass(frozen=True, slots=True)
class Share:
    """What came from one kind of source in this run."""

    source: str
    """`swarm`, or `mirror` and its name."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """Somebody who sent wrong bytes, too few, or none."""

    source: str
    """`peer` and its address, or `mirror` and its name."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Files that were received, whose pieces matched, and that are on disk."""

    source: str
    """What was asked for."""
    root: Path
    infohash: str
    nbytes: int
    """Bytes of the wanted files."""
    downloaded: int
    """Payload bytes received in this run, wasted ones included."""
    seconds: float
    is_complete: bool
    """Whether the whole release is here; False after `only`, unless the rest came before."""
    is_proven: bool
    """Whether an earlier verification covers every file as it is now; else one is owed."""
    has_tokenizer: bool
    extras: tuple[str, ...]
    """Files beside the tensors."""
    shares: tuple[Share, ...]
    troubles: tuple[Trouble, ...]


def fetch(
    source: str,
    root: Path,
    options: FetchOptions = _DEFAULTS,
    *,
    have: frozenset[int] | None = None,
    observe: Observer = ignore,
) -> Fetched:
    """Download a release, or what is missing of it, and hand it to the disk.

    What arrives is proven piece by piece against the infohash, whoever sent it. What lies there
    already is believed where the last fetch left word of it, and hashed where it did not; only
    `recheck`, or `verify`, proves all of it again. However it ends, by Ctrl-C, by an error or
    killed, the next fetch goes on from there.

    Args:
        source: `grok-1`, a magnet link, or the path of a `.torrent` file.
        root: The release's folder; made if it is not there. Nothing is written outside it.
        options: Peers, mirrors, limits, choice of files.
        have: Pieces that were proven just now; all others of the wanted files are fetched.
        observe: Receives metadata, verify (files that were there), fetch and seed in bytes.

    Raises:
        UsageError: The source is of no known kind, or `only` matches no file.
        StalledError: Nobody sent anything for `stall_timeout_s`.
        DiskFullError: There is no room; found before a byte moves where that is possible.
        FetchError: The torrent is hostile or malformed, or the destination refuses it.
    """
    began = time.monotonic()
    origin, torrent = _look_up(source, root, options)
    given = _given_tokenizer(root, options, origin)  # no reason to wait for bad news
    with ExitStack() as stack:
        swarm = stack.enter_context(Swarm(_network(options)))
        peers = _named_peers(options)
        if torrent is None:
            torrent, peers = _from_swarm(swarm, origin, root, peers, options, observe)
        job = choose(torrent, origin, options)
        prepare(root, job)
        stack.enter_context(alone(root))
        if given is None:
            _fetch_tokenizer(root, job, origin, options, observe)
        elif TOKENIZER in job.places.values():
            raise UsageError(
                f"{options.tokenizer}: the torrent brings its own {TOKENIZER}",
                f"grokctl fetch {quoted(source)} --to {quoted(root)}",
            )
        claims = find_claims(root, job, options, have, observe)
        swarm.add(_transfer(job, root, peers, options, claims))
        mirrors = _mirrors(stack, job, options)
        run = Download(
            swarm=swarm,
            mirrors=mirrors,
            origin=origin,
            job=job,
            root=root,
            options=options,
            observe=observe,
        )
        try:
            last = run.run()
            if options.seed or options.seed_ratio is not None:
                run.seed()
        finally:
            with suppress(OSError):
                keep_resume(root, swarm.resume_data(timeout_s=SAVE_WITHIN_S), is_last=True)
        shares, troubles = _account(swarm, mirrors, last)
    if last.has_everything:
        remove_parts(root)
    if given is not None and options.tokenizer is not None:
        put_tokenizer(root, given, options.tokenizer, force=options.force)
    return Fetched(
        source=source,
        root=root,
        infohash=origin.infohash,
        nbytes=job.nbytes,
        downloaded=sum(share.nbytes for share in shares),
        seconds=time.monotonic() - began,
        is_complete=last.has_everything,
        is_proven=_is_proven(root, job),
        has_tokenizer=has_tokenizer(root),
        extras=tuple(place for place in job.places.values() if not place.startswith(f"{CKPT}/")),
        shares=shares,
        troubles=troubles,
    )


def plan(
    source: str, root: Path, options: FetchOptions = _DEFAULTS, *, observe: Observer = ignore
) -> FetchPlan:
    """Say what `fetch` would do; gets only the metadata, and writes nothing.

    Raises:
        GrokctlError: As `fetch` does, but for a lack of space: that is an answer here.
    """
    origin, torrent = _look_up(source, root, options)
    if torrent is None:
        with Swarm(_network(options)) as swarm:
            peers = _named_peers(options)
            torrent, _ = _from_swarm(swarm, origin, root, peers, options, observe)
    return look_ahead(root, choose(torrent, origin, options), options)


def default_root(source: str, releases: Path) -> Path:
    """Where a source is downloaded to when the user names no place.

    Raises:
        UsageError: The source is of no known kind.
        FetchError: It is malformed.
    """
    origin = read_source_argument(source)
    if origin.tokenizer is not None:
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


def _look_up(source: str, root: Path, options: FetchOptions) -> tuple[Origin, bytes | None]:
    """What is meant, that it may go there, and its torrent unless others must be asked for it."""
    origin = read_source_argument(source)
    refuse_foreign(root, origin, force=options.force)
    return origin, torrent_at_hand(origin, root, options.torrent_file)


def _named_peers(options: FetchOptions) -> list[Endpoint]:
    return resolve([endpoint(peer) for peer in options.peers])


def _network(options: FetchOptions) -> Network:
    return Network(
        bind=options.bind,
        port=options.port,
        proxy=options.proxy,
        dht=options.dht,
        lsd=options.lsd,
        connections=options.connections,
        shares_addresses=bool(options.peers),
        keeps_seeds=bool(options.mirrors),
    )


def _from_swarm(
    swarm: Swarm,
    origin: Origin,
    root: Path,
    peers: list[Endpoint],
    options: FetchOptions,
    observe: Observer,
) -> tuple[bytes, list[Endpoint]]:
    """Ask the swarm for metadata; also says whom to ask next, peers that answered among them."""
    observe(Started(stage=Stage.METADATA, unit=Unit.NOTHING))
    trackers = (*origin.trackers, *options.trackers)
    deadline = time.monotonic() + options.stall_timeout_s
    with tempfile.TemporaryDirectory() as folder:
        swarm.ask_for_metadata(origin.infohash, trackers=trackers, peers=peers, folder=Path(folder))
        while (info := swarm.metadata()) is None:
            now = swarm.poll(min(1.0, options.stall_timeout_s))
            detail = f"waiting for metadata: {format_number(now.peers, 'peer')}"
            observe(Advanced(stage=Stage.METADATA, detail=detail))
            if time.monotonic() > deadline:
                raise stalled("metadata", swarm, now, origin, root, options, [])
        met = swarm.leave()
    observe(Finished(stage=Stage.METADATA))
    return bare_torrent(info, trackers), list(dict.fromkeys([*peers, *met]))


def _mirrors(stack: ExitStack, job: Job, options: FetchOptions) -> Mirrors | None:
    if not options.mirrors:
        return None
    web = stack.enter_context(Web(bind=options.bind, proxy=options.proxy))
    chosen = [mirror(name) for name in dict.fromkeys(options.mirrors)]
    return stack.enter_context(Mirrors(chosen, web, job.metainfo, job.places))


def _given_tokenizer(root: Path, options: FetchOptions, origin: Origin) -> bytes | None:
    if options.tokenizer is None:
        return None
    data = read_tokenizer(options.tokenizer, origin.tokenizer)
    refuse_other(root, data, options.tokenizer, force=options.force)
    return data


def _fetch_tokenizer(
    root: Path, job: Job, origin: Origin, options: FetchOptions, observe: Observer
) -> None:
    """See to it that Grok-1 can take and give text, which its torrent may not."""
    is_coming = TOKENIZER in job.places.values()
    if origin.tokenizer is None or is_coming or has_tokenizer(root):
        return
    observe(Noted(message=f"fetching the tokenizer, {format_bytes(origin.tokenizer.nbytes)}"))
    try:
        with Web(bind=options.bind, proxy=options.proxy) as web:
            fetch_tokenizer(root, origin.tokenizer, web)
    except GrokctlError as error:
        # a few MB beside 318 GB: no reason to stop
        observe(Noted(message=f"the tokenizer is not here yet: {error}"))


def _transfer(
    job: Job, root: Path, peers: list[Endpoint], options: FetchOptions, claims: Claims
) -> Transfer:
    return Transfer(
        metainfo=job.metainfo,
        torrent=bare_torrent(job.info, (), layers=job.layers),
        root=root,
        places=job.places,
        wanted=job.wanted,
        trackers=job.trackers,
        web_seeds=options.web_seeds,
        peers=peers,
        claims=claims,
        max_download=options.max_download,
        max_upload=options.max_upload,
    )


def _account(
    swarm: Swarm, mirrors: Mirrors | None, last: Snapshot
) -> tuple[tuple[Share, ...], tuple[Trouble, ...]]:
    """Who sent how much, and who sent what they should not have."""
    states = mirrors.states() if mirrors is not None else []
    shares = [Share("swarm", last.downloaded)]
    shares += [Share(f"mirror {state.name}", state.nbytes) for state in states]
    troubles = [
        Trouble(f"peer {address}", "sent bad data, banned")
        for address in dict.fromkeys(swarm.banned)
    ]
    troubles += [
        Trouble(f"mirror {state.name}", state.trouble + (", dropped" if state.is_dropped else ""))
        for state in states
        if state.trouble
    ]
    return tuple(shares), tuple(troubles)


def _is_proven(root: Path, job: Job) -> bool:
    receipt = read_receipt(root)
    return (
        receipt is not None
        and receipt.infohash == job.metainfo.infohash
        and set(job.places.values()) <= receipt.untouched(root)
    )
