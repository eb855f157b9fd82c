"""`grokctl fetch`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from grokctl.cli.context import RESUMES, ReportedError, command, home_of
from grokctl.cli.environment import certificates_named, hub_to_try, mirrors_named
from grokctl.cli.hints import again
from grokctl.cli.options import (
    BindOption,
    HomeOption,
    JsonOption,
    MaxDownloadOption,
    MirrorOption,
    NoDhtOption,
    NoLsdOption,
    NoMirrorOption,
    NoTrackersOption,
    PeerOption,
    PortOption,
    ProxyOption,
    QuietOption,
    ToOption,
    TrackerOption,
    VerboseOption,
    WebSeedOption,
    path_of,
)
from grokctl.errors import GrokctlError, UsageError
from grokctl.parse import read_ranges, read_size
from grokctl.paths import CKPT

_THREADS: Final = 16
"""Of libtorrent, of mirrors, and for hashes of what is on disk."""
_FILES: Final = 64
"""Open files and connections without which no peer can be reached."""
_STALL_S: Final = 300.0
_PLAN_WITHIN_S: Final = 60.0
"""Seconds that a plan waits for the metadata."""


def fetch(
    source: Annotated[
        str, typer.Argument(help="grok-1, a magnet link (quoted), or a .torrent file.")
    ] = "grok-1",
    to: ToOption = None,
    peer: PeerOption = None,
    mirror: MirrorOption = None,
    no_mirror: NoMirrorOption = False,
    web_seed: WebSeedOption = None,
    tracker: TrackerOption = None,
    torrent_file: Annotated[
        Path | None,
        typer.Option(
            parser=path_of, metavar="FILE", help="Torrent file, if no peer sends the metadata."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=path_of, metavar="FILE", help="A tokenizer.model to use.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Fetch only these files, such as 'tensor0000*'."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="0-3,7", help="Fetch only these layers.")
    ] = None,
    max_download: MaxDownloadOption = None,
    max_upload: Annotated[
        str | None, typer.Option(metavar="RATE", help="Upload limit per second, such as 500kB.")
    ] = None,
    connections: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of peers.")
    ] = None,
    port: PortOption = None,
    bind: BindOption = None,
    proxy: ProxyOption = None,
    no_dht: NoDhtOption = False,
    no_lsd: NoLsdOption = False,
    no_trackers: NoTrackersOption = False,
    seed: Annotated[bool, typer.Option("--seed", help="Upload afterwards, until Ctrl-C.")] = False,
    seed_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Upload afterwards, X times the size.")
    ] = None,
    stall_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Fail after S seconds without data.",
            show_default="300, with --dry-run 60",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Use files in the folder that grokctl did not make.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Download a release from its swarm or a mirror; resumes after an interruption."""
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=RESUMES) as console,
        certificates_named(),
    ):
        from grokctl import fetch as stage
        from grokctl.checkpoint.proving import root_to_seed
        from grokctl.machine.limits import require_files, require_threads
        from grokctl.screen import fetch as screen
        from grokctl.transfer.preflight import raise_failed
        from grokctl.transfer.sources import FetchOptions, parse_source

        require_threads(_THREADS)
        require_files(_FILES)
        if mirror and no_mirror:
            problem = "--mirror, --no-mirror: expected one of them"
            raise UsageError(problem, again(without=("--no-mirror",)))
        patience = _PLAN_WITHIN_S if dry_run else _STALL_S
        options = FetchOptions(
            peers=tuple(peer or ()),
            mirrors=mirrors_named(mirror),
            hub=None if no_mirror else hub_to_try(),
            web_seeds=tuple(web_seed or ()),
            trackers=tuple(tracker or ()),
            torrent_file=torrent_file,
            tokenizer=tokenizer,
            only=tuple(only or ()),
            layers=read_ranges(layers, "--layers", "0-3,7"),
            max_download=read_size(max_download, "--max-download", unit="MB"),
            max_upload=read_size(max_upload, "--max-upload", unit="MB"),
            connections=connections,
            port=port,
            bind=bind,
            proxy=proxy,
            dht=not no_dht,
            lsd=not no_lsd,
            source_trackers=not no_trackers,
            seed=seed,
            seed_ratio=seed_ratio,
            stall_timeout_s=patience if stall_timeout is None else stall_timeout,
            force=force,
        )
        where = home_of(home)
        root = (to or stage.default_root(source, where.releases)).absolute()
        is_seeded = force and (seed or seed_ratio is not None)
        kept = root_to_seed(where, root, parse_source(source).torrent, is_seeded=is_seeded)
        if kept != root:
            why = (
                "its tensors are behind a link"
                if is_seeded and (root / CKPT).is_symlink()
                else "cannot be written"
            )
            console.note(f"{root}: {why}; the proof is kept under {where.root}")
            console.places.add(kept, root)
            root, options = kept, replace(options, force=True)
        if dry_run:
            with console.observing() as observe:
                plan = stage.plan_fetch(source, root, options, observe=observe)
            screen.fetch_plan(console, plan, root)
            try:
                raise_failed(plan.checks, root)
            except GrokctlError as error:
                raise ReportedError(error) from error
            return
        with console.observing() as observe:
            result = stage.fetch(source, root, options, observe=observe)
        screen.fetched(console, result)
