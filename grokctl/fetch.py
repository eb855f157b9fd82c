"""Download a release: from a magnet link to complete files on disk."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from grokctl.checkpoint.adoption import is_adopting
from grokctl.checkpoint.hub_record import INFOHASH_PROOF, HubPromise, read_promise
from grokctl.checkpoint.receipt import read_receipt
from grokctl.checkpoint.release_files import EXTRA, names_of, places_on_disk
from grokctl.checkpoint.torrent import folder_name, parse_metainfo
from grokctl.checkpoint.trust import GROK_1_INFOHASH, read_source
from grokctl.checkpoint.unfinished import forget_unfinished
from grokctl.errors import FetchError, GrokctlError, StalledError, UsageError
from grokctl.events import Noted, Observer, ignore
from grokctl.integrity.room import has_links, measure
from grokctl.paths import CKPT, TOKENIZER, quoted, require_utf8
from grokctl.text import format_bytes
from grokctl.transfer.data_on_disk import proven_on_disk
from grokctl.transfer.destination import (
    FileSelection,
    bare_torrent,
    fetch_lock,
    forget_resume_data,
    is_foreign,
    local_torrent,
    record_progress,
    refuse_foreign,
    remove_parts,
    save_resume_data,
    select_files,
)
from grokctl.transfer.download import SAVE_WITHIN_S, Arrivals, Download, NoArrivals
from grokctl.transfer.exposure import refuse_exposed
from grokctl.transfer.fetched import Contribution, Fetched, Trouble
from grokctl.transfer.hub import Hub
from grokctl.transfer.hub_fetch import (
    HubSource,
    fetch_from_hub,
    find_promise,
    hub_for,
    select_hub_files,
)
from grokctl.transfer.metadata import (
    NoMetadataError,
    metadata_alone,
    network_options,
    receive_metadata,
    resolved_peers,
)
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.partial_files import find_partial
from grokctl.transfer.placed_files import PlacedFiles
from grokctl.transfer.preflight import FetchPlan, make_plan, prepare, refuse_others
from grokctl.transfer.sources import (
    GROK_1,
    Endpoint,
    FetchOptions,
    FetchRequest,
    find_mirror,
    parse_source,
)
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import Claims, NetworkOptions, Snapshot, Transfer
from grokctl.transfer.takeover import files_at_stake, take_stock, writing
from grokctl.transfer.tokenizer import (
    fetch_tokenizer,
    has_tokenizer,
    put_tokenizer,
    read_tokenizer,
    refuse_other,
)
from grokctl.transfer.web import Web

_DEFAULTS: Final = FetchOptions()


def fetch(
    source: str,
    root: Path,
    options: FetchOptions = _DEFAULTS,
    *,
    have: frozenset[int] | None = None,
    arrivals: Arrivals | None = None,
    observe: Observer = ignore,
) -> Fetched:
    """Download a release, or the missing part of it, and sync it to disk.

    Every piece that arrives is proven against the infohash, whatever its source. Data on disk is
    believed if the last fetch claimed it, and hashed otherwise; `verify` proves all of it again.
    After Ctrl-C, an error or a kill, the next fetch continues where this one stopped.

    Where no peer sends the metadata, a hub is asked if there is one (`hub_for`). Its files are
    proven by the hashes that it names, which is not the infohash's proof.

    Args:
        source: `grok-1`, a magnet link, or the path of a `.torrent` file.
        root: The release's folder, created if needed. Nothing is written outside it.
        options: Peers, mirrors, limits, selection of files.
        have: Pieces that were proven just now; all other pieces of the wanted files are fetched.
        arrivals: Works on files while others arrive from the swarm, in the order of the files; it
            never begins if they come from a hub.
        observe: Receives metadata, verify (data on disk), fetch and seed in bytes.

    Raises:
        UsageError: The source is invalid, or `only` matches no file.
        StalledError: Nothing arrived for `stall_timeout_s`.
        DiskFullError: The disk is full; found before a byte moves if possible.
        FetchError: The torrent is hostile or malformed, or the destination cannot be used.
    """
    request, torrent = _open_request(source, root, options)
    tokenizer = _given_tokenizer(request)  # fails before the download, not after it
    try:
        return _fetch_torrent(
            request, torrent, tokenizer, have=have, arrivals=arrivals, observe=observe
        )
    except NoMetadataError as error:
        hub, stall = error.hub, error.stall
    promise = _promise_instead(request, hub, stall, observe)
    fetched = fetch_from_hub(request, hub, promise, observe=observe)
    if tokenizer is None:
        _fetch_tokenizer(request, select_hub_files(promise, options), observe)
    elif options.tokenizer is not None:
        put_tokenizer(root, tokenizer, options.tokenizer, force=options.force)
    return replace(fetched, has_tokenizer=has_tokenizer(root))


def _fetch_torrent(
    request: FetchRequest,
    torrent: bytes | None,
    tokenizer: bytes | None,
    *,
    have: frozenset[int] | None,
    arrivals: Arrivals | None,
    observe: Observer,
) -> Fetched:
    """The same from the swarm, and from mirrors of the torrent's files."""
    began = time.monotonic()
    root, options = request.root, request.options
    with ExitStack() as stack:
        after = stack.enter_context(ExitStack())  # once libtorrent has closed its files
        swarm = stack.enter_context(Swarm(network_options(options)))
        peers = resolved_peers(options)
        if torrent is None:
            torrent, peers = receive_metadata(swarm, request, peers, observe)
        selection = select_files(torrent, request)
        follows = options.force or have is not None or is_adopting(root)
        adopts = is_foreign(request)
        places = selection.places.values()
        is_repair = have is not None
        refuse_exposed(root, places, observe, force=options.force, is_repair=is_repair)
        prepare(root, selection, trust=request.trust, follows=follows, adopts=adopts)
        refuse_exposed(root, places, ignore, force=options.force, is_repair=is_repair)  # now made
        stack.enter_context(fetch_lock(root))
        if tokenizer is None:
            _fetch_tokenizer(request, selection, observe)
        elif TOKENIZER in selection.places.values():
            raise UsageError(
                f"{options.tokenizer}: the torrent contains its own {TOKENIZER}",
                f"grokctl fetch {quoted(request.origin.shown)} --to {quoted(root)}",
            )
        claims = take_stock(request, selection, have, observe, follows=follows)
        with writing(root):
            record_progress(request, selection, claims.have)
        placed = PlacedFiles(root, selection)
        after.callback(placed.close)
        after.callback(placed.remove_empty)
        swarm.add(_transfer(request, selection, peers, claims, is_in_order=arrivals is not None))
        mirrors = _mirrors(stack, selection, options)
        download = Download(
            request=request,
            selection=selection,
            swarm=swarm,
            mirrors=mirrors,
            observe=observe,
            watch=placed.watch,
            counts_rest=have is not None,
            arrivals=arrivals or NoArrivals(),
        )
        uploaded = seed_seconds = None
        try:
            last = download.run()
            seconds = time.monotonic() - began
            placed.check()
            if last.has_everything:
                forget_unfinished(root)
            if options.seed or options.seed_ratio is not None:
                uploaded = download.seed()
                seed_seconds = time.monotonic() - began - seconds
        finally:
            _record_end(download, placed)
        contributions, troubles = _account(swarm, mirrors, last)
    if last.has_everything:
        remove_parts(root)
    if tokenizer is not None and options.tokenizer is not None:
        put_tokenizer(root, tokenizer, options.tokenizer, force=options.force)
    is_proven = _is_proven(root, selection)
    return Fetched(
        source=request.origin.source,
        root=root,
        infohash=request.origin.infohash,
        nbytes=selection.nbytes,
        downloaded=sum(contribution.nbytes for contribution in contributions),
        uploaded=uploaded,
        seconds=seconds,
        seed_seconds=seed_seconds,
        is_complete=last.has_everything,
        is_proven=is_proven,
        proven_by=INFOHASH_PROOF if is_proven else None,
        has_tokenizer=has_tokenizer(root),
        extras=tuple(place for place in places if not place.startswith((f"{CKPT}/", f"{EXTRA}/"))),
        contributions=contributions,
        troubles=troubles,
    )


def plan_fetch(
    source: str, root: Path, options: FetchOptions = _DEFAULTS, *, observe: Observer = ignore
) -> FetchPlan:
    """Plan a `fetch`: receives only the metadata, and writes nothing.

    Raises:
        GrokctlError: As `fetch` does, except for a full disk, which is part of the plan.
    """
    request, torrent = _open_request(source, root, options)
    try:
        selection = select_files(torrent or metadata_alone(request, observe), request)
    except NoMetadataError as error:
        promise = _promise_instead(request, error.hub, error.stall, observe)
        selection = select_hub_files(promise, options)
        refuse_exposed(root, selection.places.values(), observe, force=options.force)
        return make_plan(root, selection, options, infohash=request.origin.infohash)
    adopts = is_adopting(root) or is_foreign(request)
    follows = options.force or adopts
    refuse_exposed(root, selection.places.values(), observe, force=options.force)
    refuse_others(root, selection, follows=follows)
    with writing(root):
        partial = find_partial(root, selection)
        there = partial.selection(root, selection)
        if not (adopts or partial.used or has_links(root, there.places.values())):
            return make_plan(root, selection, options)
        pieces = there.pieces
        proven = proven_on_disk(root, there, pieces, observe, follows=follows)
    missing = [piece for piece in pieces if piece not in proven]
    keeps = files_at_stake(root, selection, missing, is_foreign=adopts and not is_adopting(root))
    room = measure(root, there.metainfo, there.places, missing, keeps=keeps)
    fitting = (len(proven), len(pieces)) if adopts else None
    return make_plan(root, there, options, fitting=fitting, required=room.required)


def refetch(
    root: Path, options: FetchOptions, *, have: frozenset[int], observe: Observer = ignore
) -> Fetched:
    """Fetch damaged ranges of a release that came from a hub again.

    Args:
        root: The release; it has no torrent.
        options: Names the hub, or leaves it to the one that it came from.
        have: Ranges that were proven just now.
        observe: Receives fetch in bytes.

    Raises:
        FetchError: The hub refuses or lies; or the folder was not fetched from one.
    """
    promise, infohash = read_promise(root), read_source(root)
    if promise is None or infohash is None:
        raise FetchError(f"{root}: expected a release from a hub, found no record of one")
    if not any(Hub.at(find_mirror(name).url) for name in options.mirrors):
        options = replace(options, mirrors=(promise.address(promise.url),))
    source = GROK_1 if infohash == GROK_1_INFOHASH else f"magnet:?xt=urn:btih:{infohash}"
    request = FetchRequest(origin=parse_source(source), root=root, options=options)
    hub = hub_for(request)
    assert hub is not None
    return fetch_from_hub(request, hub, promise, have=have, observe=observe)


def default_root(source: str, releases: Path) -> Path:
    """The folder of a download unless the user names one.

    Raises:
        UsageError: The source is invalid.
        FetchError: The source is malformed.
    """
    origin = parse_source(source)
    if origin.tokenizer is not None:
        return releases / GROK_1
    return releases / folder_name(origin.name, origin.infohash)


@contextmanager
def seeding(
    root: Path, torrent: bytes, *, bind: str = "127.0.0.1", port: int = 0
) -> Iterator[tuple[str, int]]:
    """Seed a complete release to peers that know the address; announce it nowhere.

    Args:
        root: The release's folder. A damaged piece is found when it is requested, and not sent.
        torrent: Its metainfo; the files are where `places_on_disk` finds them.
        bind: Address to listen on.
        port: Port to listen on; 0 means any free port.

    Yields:
        Address and port.

    Raises:
        FetchError: The torrent is malformed, or the port is taken.
    """
    metainfo = parse_metainfo(torrent, source="torrent to seed")
    places = places_on_disk(root, metainfo)
    network = NetworkOptions(
        bind=bind, port=port, dht=False, lsd=False, allows_shared_addresses=True
    )
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


def _open_request(
    source: str, root: Path, options: FetchOptions
) -> tuple[FetchRequest, bytes | None]:
    """The checked request, and the torrent if it is on this machine."""
    require_utf8(root, "destination")
    request = FetchRequest(origin=parse_source(source), root=root, options=options)
    refuse_foreign(request)
    return request, local_torrent(request)


def _promise_instead(
    request: FetchRequest, hub: HubSource, stall: StalledError, observe: Observer
) -> HubPromise:
    """What a hub promises, where no peer sends the metadata.

    Raises:
        StalledError: It promises nothing, and nobody named it.
        FetchError: It promises nothing.
    """
    observe(Noted(message=f"no peer sends the torrent; asking the hub, {hub.hub.shown}"))
    options = request.options
    if options.seed or options.seed_ratio is not None:
        observe(Noted(message="nothing will be seeded: that takes the torrent"))
    try:
        return find_promise(request, hub, observe)
    except FetchError as error:
        if hub.name in options.mirrors:
            raise
        observe(Noted(message=str(error)))
        raise stall from error


def _record_end(download: Download, placed: PlacedFiles) -> None:
    """Record how far the download is; nothing of it counts if a file was replaced meanwhile."""
    root = download.request.root
    if placed.is_doubtful or placed.replaced():
        with suppress(OSError):
            forget_resume_data(root)
            record_progress(download.request, download.selection, (), is_final=True)
        return
    with suppress(OSError, RuntimeError):
        download.record(is_final=True)
    with suppress(OSError):
        resume = download.swarm.resume_data(timeout_s=SAVE_WITHIN_S)
        save_resume_data(root, resume, is_final=True)


def _mirrors(stack: ExitStack, selection: FileSelection, options: FetchOptions) -> Mirrors | None:
    if not options.mirrors:
        return None
    web = stack.enter_context(Web(bind=options.bind, proxy=options.proxy))
    mirrors = [find_mirror(name) for name in dict.fromkeys(options.mirrors)]
    names = names_of(selection.metainfo, selection.places)
    return stack.enter_context(Mirrors(mirrors, web, selection.metainfo, names))


def _given_tokenizer(request: FetchRequest) -> bytes | None:
    path = request.options.tokenizer
    if path is None:
        return None
    data = read_tokenizer(path, request.origin.tokenizer)
    refuse_other(request.root, data, path, force=request.options.force)
    return data


def _fetch_tokenizer(request: FetchRequest, selection: FileSelection, observe: Observer) -> None:
    """Download Grok-1's tokenizer, which its torrent may not contain."""
    pinned, options = request.origin.tokenizer, request.options
    in_torrent = TOKENIZER in selection.places.values()
    if pinned is None or in_torrent or has_tokenizer(request.root):
        return
    observe(Noted(message=f"fetching the tokenizer, {format_bytes(pinned.nbytes)}"))
    try:
        with Web(bind=options.bind, proxy=options.proxy) as web:
            fetch_tokenizer(request.root, pinned, web)
    except GrokctlError as error:
        # 2 MB of 318 GB: no reason to stop
        observe(Noted(message=f"continuing without the tokenizer: {error}"))


def _transfer(
    request: FetchRequest,
    selection: FileSelection,
    peers: list[Endpoint],
    claims: Claims,
    *,
    is_in_order: bool,
) -> Transfer:
    options = request.options
    return Transfer(
        metainfo=selection.metainfo,
        torrent=bare_torrent(selection.info, (), layers=selection.layers),
        root=request.root,
        places=selection.places,
        wanted=selection.wanted,
        trackers=selection.trackers,
        web_seeds=options.web_seeds,
        peers=peers,
        claims=claims,
        max_download=options.max_download,
        max_upload=options.max_upload,
        is_in_order=is_in_order,
    )


def _account(
    swarm: Swarm, mirrors: Mirrors | None, last: Snapshot
) -> tuple[tuple[Contribution, ...], tuple[Trouble, ...]]:
    """The bytes of each source, and the sources that failed."""
    states = mirrors.states() if mirrors is not None else []
    contributions = [Contribution("swarm", last.downloaded)]
    contributions += [Contribution(f"mirror {state.name}", state.nbytes) for state in states]
    troubles = [
        Trouble(f"peer {address}", "sent bad data, banned")
        for address in dict.fromkeys(swarm.banned)
    ]
    troubles += [
        Trouble(f"mirror {state.name}", state.trouble + (", dropped" if state.is_dropped else ""))
        for state in states
        if state.trouble
    ]
    return tuple(contributions), tuple(troubles)


def _is_proven(root: Path, selection: FileSelection) -> bool:
    receipt = read_receipt(root)
    return (
        receipt is not None
        and receipt.infohash == selection.metainfo.infohash
        and set(selection.places.values()) <= receipt.untouched(root)
    )
