"""Fetch a release from a hub where no peer sends the torrent, proven by the hashes it names."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

from grokctl.checkpoint.hub_record import HUB_PROOF, HubPromise, hub_release, read_promise
from grokctl.checkpoint.trust import GROK_1_INFOHASH
from grokctl.errors import FetchError
from grokctl.events import Noted, Observer
from grokctl.os_errors import refusal
from grokctl.paths import CKPT
from grokctl.transfer.connection_count import MOST
from grokctl.transfer.destination import (
    FileSelection,
    fetch_lock,
    is_foreign,
    wanted_files,
)
from grokctl.transfer.exposure import refuse_exposed
from grokctl.transfer.fetched import Contribution, Fetched, Trouble
from grokctl.transfer.hub import Hub, ask_hub
from grokctl.transfer.hub_download import HubDownload
from grokctl.transfer.hub_files import HubFiles
from grokctl.transfer.mirrors import Mirrors
from grokctl.transfer.placed_files import PlacedFiles
from grokctl.transfer.preflight import cut_files, prepare
from grokctl.transfer.sources import (
    MIRRORS,
    FetchOptions,
    FetchRequest,
    Mirror,
    find_mirror,
    is_loopback,
)
from grokctl.transfer.tokenizer import has_tokenizer
from grokctl.transfer.web import Web

METADATA_S: Final = 60.0
"""Seconds that peers have for the metadata where the user names a hub."""
AGAIN_S: Final = 10.0
"""The same where a download from a hub has begun."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A hub that a download may turn to."""

    hub: Hub
    name: str
    """As `--mirror` takes it."""


def hub_for(request: FetchRequest) -> HubSource | None:
    """The hub to ask if no peer sends the metadata; None if there is none to ask.

    A hub that the user names is asked for any source. Grok-1's is asked by itself, unless an
    option says whom else to ask.
    """
    options = request.options
    for name in options.mirrors:
        if (hub := Hub.at(find_mirror(name).url)) is not None:
            return HubSource(hub, name)
    says_whom = bool(options.proxy or options.peers or options.torrent_file) or not options.dht
    says_whom |= options.is_local
    if options.hub is None or says_whom or request.origin.infohash != GROK_1_INFOHASH:
        return None
    hub = Hub.at(options.hub)
    is_usual = options.hub == MIRRORS["hf"].url
    return None if hub is None else HubSource(hub, "hf" if is_usual else options.hub)


def metadata_patience(request: FetchRequest) -> float:
    """Seconds that peers have to send the metadata."""
    patience = request.options.stall_timeout_s
    source = hub_for(request)
    if source is None:
        return patience
    if read_promise(request.root) is not None:
        return min(patience, AGAIN_S)
    return min(patience, METADATA_S) if source.name in request.options.mirrors else patience


def find_promise(request: FetchRequest, source: HubSource, observe: Observer) -> HubPromise:
    """The files at a hub: as recorded by a download that has begun, else as it says now.

    Raises:
        FetchError: It refuses, has no such release, or does not answer.
    """
    known = read_promise(request.root)
    if known is not None:
        return known
    options = request.options
    with Web(bind=options.bind, proxy=options.proxy) as web:
        return ask_hub(web, source.hub, patience_s=options.stall_timeout_s, observe=observe)


def select_hub_files(promise: HubPromise, options: FetchOptions) -> FileSelection:
    """The files to download.

    Raises:
        UsageError: The options match no file, or name a layer that the model does not have.
    """
    metainfo = promise.metainfo()
    places = {index: file.place for index, file in promise.by_index(metainfo).items()}
    wanted = wanted_files(places, options)
    return FileSelection(
        metainfo=metainfo, info=b"", layers=b"", trackers=(), places=places, wanted=wanted
    )


def fetch_from_hub(
    request: FetchRequest,
    source: HubSource,
    promise: HubPromise,
    *,
    have: frozenset[int] | None = None,
    observe: Observer,
) -> Fetched:
    """Download a release from a hub, or the missing part of it, and prove it by the hub's hashes.

    Args:
        request: The download.
        source: From `hub_for`.
        promise: From `find_promise`.
        have: Ranges that were proven just now, of a release that came from a hub; all others are
            fetched.
        observe: Receives metadata, verify (data on disk) and fetch in bytes.

    Raises:
        StalledError: Nothing arrived for `stall_timeout_s`.
        DiskFullError: The disk is full.
        FetchError: The hub refuses, lies or lacks a file; or the destination cannot be used.
    """
    began, root = time.monotonic(), request.root
    request = replace(request, options=_continued(request.options, source))
    options = request.options
    _note_trust(promise, source, observe)
    selection = select_hub_files(promise, options)
    if have is not None and (release := hub_release(root)) is not None:
        selection = replace(selection, metainfo=release.metainfo)
    foreign = is_foreign(request)
    places, is_repair = selection.places.values(), have is not None
    refuse_exposed(root, places, observe, force=options.force, is_repair=is_repair)
    follows, infohash = options.force, request.origin.infohash
    prepare(root, selection, infohash=infohash, trust=request.trust, follows=follows)
    with ExitStack() as stack:
        stack.enter_context(fetch_lock(root))
        with _writing(request):
            promise.write(root)
        if not foreign:
            cut_files(root, selection)
        files = stack.enter_context(HubFiles(root, promise, selection))
        placed = PlacedFiles(root, selection)
        stack.callback(placed.close)
        stack.callback(placed.remove_empty)
        if have is None:
            files.look(observe, is_foreign=foreign)
        else:
            files.assume(have)
        web = stack.enter_context(Web(bind=options.bind, proxy=options.proxy))
        mirror = Mirror.at(promise.address(source.hub.url))
        paths = {index: file.path for index, file in promise.by_index(selection.metainfo).items()}
        mirrors = stack.enter_context(
            Mirrors([mirror], web, selection.metainfo, paths, most_workers=MOST)
        )
        download = HubDownload(
            request=request,
            selection=selection,
            files=files,
            mirrors=mirrors,
            placed=placed,
            observe=observe,
            shown=source.hub.shown,
            counts_rest=is_repair,
        )
        download.record()
        try:
            download.run()
            placed.check()
        finally:
            download.record_end()
        with _writing(request):
            is_complete = files.finish(observe)
        (state,) = mirrors.states()
    return Fetched(
        source=request.origin.source,
        root=root,
        infohash=infohash,
        nbytes=selection.nbytes,
        downloaded=state.nbytes,
        uploaded=None,
        seconds=time.monotonic() - began,
        seed_seconds=None,
        is_complete=is_complete,
        is_proven=False,
        proven_by=HUB_PROOF if is_complete and files.is_private else None,
        root_of_trust=promise.trust,
        blobs=promise.blobs,
        has_tokenizer=has_tokenizer(root),
        extras=tuple(place for place in places if not place.startswith(f"{CKPT}/")),
        contributions=(Contribution(f"hub {state.name}", state.nbytes),),
        troubles=(Trouble(f"hub {state.name}", state.trouble),) if state.trouble else (),
    )


def _continued(options: FetchOptions, source: HubSource) -> FetchOptions:
    """The options of the command that continues: it names the hub."""
    others = tuple(name for name in options.mirrors if name != source.name)
    return replace(options, mirrors=(source.name, *others))


def _note_trust(promise: HubPromise, source: HubSource, observe: Observer) -> None:
    """Say what the files are proven by, and who could have changed that on the way."""
    message = f"from {promise.host}: proven by {promise.trust}, not by the infohash"
    address = urlsplit(source.hub.endpoint)
    if address.scheme == "http" and not is_loopback(address.hostname or ""):
        message += "; over http, where anyone on the way can change it"
    observe(Noted(message=message))


@contextmanager
def _writing(request: FetchRequest) -> Iterator[None]:
    """Refusals of the operating system, as errors about the folder."""
    try:
        yield
    except OSError as error:
        raise refusal(error, request.root, kind=FetchError) from error
