"""`grokctl verify`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grokctl.cli.context import ReportedError, command, home_of
from grokctl.cli.options import (
    BindOption,
    CheckpointArgument,
    HomeOption,
    JsonOption,
    MirrorOption,
    NoDhtOption,
    NoLsdOption,
    PeerOption,
    PortOption,
    ProxyOption,
    QuietOption,
    StallOption,
    TrackerOption,
    VerboseOption,
    WebSeedOption,
)
from grokctl.errors import GrokctlError, UsageError
from grokctl.paths import kind_of

if TYPE_CHECKING:
    from grokctl.fetch import Fetched
    from grokctl.screen.console import Console
    from grokctl.transfer.sources import FetchOptions
    from grokctl.verify import Verdict


def verify(
    checkpoint: CheckpointArgument = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the structure; proves no content.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch damaged pieces again; nothing else changes.")
    ] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Believe no earlier receipt.")] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads.", show_default="cores")
    ] = None,
    peer: PeerOption = None,
    mirror: MirrorOption = None,
    web_seed: WebSeedOption = None,
    tracker: TrackerOption = None,
    port: PortOption = None,
    bind: BindOption = None,
    proxy: ProxyOption = None,
    no_dht: NoDhtOption = False,
    no_lsd: NoLsdOption = False,
    stall_timeout: StallOption = 300.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Prove every byte against the torrent; list all damage, and mend it if asked to."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl.screen import verify as screen
        from grokctl.verify import raise_for

        if quick and repair:
            raise UsageError(
                "--quick --repair: expected one of them; a quick look finds no bad pieces",
                "grokctl verify --repair",
            )
        root = home_of(home).find(checkpoint).absolute()
        started = time.perf_counter()

        verdict, fetched = _verify(console, root, quick=quick, rehash=rehash, jobs=jobs), None
        if verdict.damage and repair:
            from grokctl.transfer.sources import FetchOptions

            options = FetchOptions(
                peers=tuple(peer or ()),
                mirrors=tuple(mirror or ()),
                web_seeds=tuple(web_seed or ()),
                trackers=tuple(tracker or ()),
                port=port,
                bind=bind,
                proxy=proxy,
                dht=not no_dht,
                lsd=not no_lsd,
                stall_timeout_s=stall_timeout,
            )
            verdict, fetched = _repair(console, root, verdict, options, jobs=jobs)
        seconds = time.perf_counter() - started
        screen.verdict(console, root, verdict, fetched, quick=quick, seconds=seconds)
        try:
            raise_for(verdict, root)
        except GrokctlError as error:
            raise ReportedError(error) from error


def _verify(
    console: "Console", root: Path, *, quick: bool, rehash: bool, jobs: int | None
) -> "Verdict":
    from grokctl import verify as stage

    with console.observing() as observe:
        if kind_of(root) == "ready":
            from grokctl.checkpoint.ready import read_manifest

            return stage.verify_ready(read_manifest(root), quick=quick, jobs=jobs, observe=observe)
        return stage.verify(root, quick=quick, rehash=rehash, jobs=jobs, observe=observe)


def _repair(
    console: "Console", root: Path, verdict: "Verdict", options: "FetchOptions", *, jobs: int | None
) -> tuple["Verdict", "Fetched"]:
    """Fetch the bad pieces, and look again; the originals are kept until that look is good."""
    from grokctl.checkpoint.receipt import trusted_metainfo
    from grokctl.checkpoint.release import release_paths
    from grokctl.fetch import fetch
    from grokctl.integrity.backup import forget, set_aside
    from grokctl.paths import TORRENT

    many = f"{len(verdict.damage)} files are damaged"
    if verdict.remedy is not None:
        raise UsageError(f"{root}: {many}; a ready checkpoint is cut again", verdict.remedy)
    metainfo = trusted_metainfo(root)
    if metainfo is None:
        raise UsageError(f"{root}: {many}, and no {TORRENT} to fetch them by", "grokctl fetch")
    for damage in verdict.damage:
        console.note(f"damaged: {damage}")
    places = release_paths(metainfo)
    with console.observing() as observe:
        aside = set_aside(root, metainfo, places, verdict.bad_pieces, observe=observe)
    have = frozenset(range(metainfo.num_pieces)) - verdict.bad_pieces
    after = verdict
    try:
        with console.observing() as observe:
            fetched = fetch(str(root / TORRENT), root, options, have=have, observe=observe)
        # what the first look proved has a receipt; only what was mended is hashed again
        after = _verify(console, root, quick=False, rehash=False, jobs=jobs)
    finally:
        if aside is not None and after.damage:
            console.note(f"what the repair overwrote is kept in {aside}")
    if not after.damage:
        forget(root)
    return after, fetched
