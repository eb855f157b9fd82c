"""`grokctl verify`."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import ReportedError, command, found_checkpoint, home_of
from grokctl.cli.environment import certificates_named, mirrors_named
from grokctl.cli.hints import again
from grokctl.cli.options import (
    BindOption,
    CheckpointArgument,
    HomeOption,
    JobsOption,
    JsonOption,
    MirrorOption,
    NoDhtOption,
    NoLsdOption,
    NoTrackersOption,
    PeerOption,
    PortOption,
    ProxyOption,
    QuietOption,
    StallOption,
    TrackerOption,
    VerboseOption,
    WebSeedOption,
    path_of,
)
from grokctl.errors import GrokctlError, UsageError


def verify(
    checkpoint: CheckpointArgument = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Check the structure only; proves no content.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Fetch damaged pieces again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --repair: print what it would fetch.")
    ] = False,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Hash every file, unchanged ones included.")
    ] = False,
    torrent_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=path_of,
            help="Torrent to prove any folder with; kept under home.",
        ),
    ] = None,
    jobs: JobsOption = None,
    peer: PeerOption = None,
    mirror: MirrorOption = None,
    web_seed: WebSeedOption = None,
    tracker: TrackerOption = None,
    port: PortOption = None,
    bind: BindOption = None,
    proxy: ProxyOption = None,
    no_dht: NoDhtOption = False,
    no_lsd: NoLsdOption = False,
    no_trackers: NoTrackersOption = False,
    stall_timeout: StallOption = 300.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Prove every byte of a checkpoint; list all damage, and repair it on request."""
    with (
        command(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        ExitStack() as stack,
    ):
        from grokctl import verify as stage
        from grokctl.checkpoint.proving import root_to_prove, root_to_repair
        from grokctl.checkpoint.rehearsal import rehearsed
        from grokctl.screen import verify as screen

        if quick and repair:
            raise UsageError(
                "--quick --repair: expected one of them; --quick does not look for bad pieces",
                again(without=("--quick",)),
            )
        if dry_run and not repair:
            raise UsageError("--dry-run: expected --repair", again("--repair"))
        own = where = home_of(home)
        if dry_run:
            where = stack.enter_context(rehearsed(own))
        takes_ready = checkpoint is not None or not (
            (repair or torrent_file) and where.kept_releases()
        )
        found = found_checkpoint(
            console,
            where,
            checkpoint,
            ready=takes_ready,
            exports=True,
            in_any_folder=torrent_file is not None,
        )
        console.places.add(found.root.absolute(), found.shown.absolute())
        mends = repair and not dry_run
        root = root_to_prove(where, found, torrent_file, is_repaired=mends, is_dry=dry_run)
        root = root.absolute()
        if root != found.root.absolute():
            console.places.add(root, found.shown.absolute())
            if not dry_run:
                kept = f"the torrent and its proof are kept under {where.root}"
                console.note(f"{found.shown}: {kept}")
        started = time.perf_counter()
        with console.observing() as observe:
            verdict = stage.verify(
                root, quick=quick, rehash=rehash, keeps=not dry_run, jobs=jobs, observe=observe
            )
        remedy = screen.Remedy()
        if verdict.damage and dry_run:
            from grokctl.repair import plan_repair

            place = root_to_repair(own, found)
            remedy = screen.Remedy(plan=plan_repair(root, verdict, place=place))
        elif verdict.damage and repair:
            from grokctl.repair import repair as repair_stage
            from grokctl.transfer.sources import FetchOptions

            options = FetchOptions(
                peers=tuple(peer or ()),
                mirrors=mirrors_named(mirror),
                web_seeds=tuple(web_seed or ()),
                trackers=tuple(tracker or ()),
                port=port,
                bind=bind,
                proxy=proxy,
                dht=not no_dht,
                lsd=not no_lsd,
                source_trackers=not no_trackers,
                stall_timeout_s=stall_timeout,
            )
            with console.observing() as observe, certificates_named():
                repaired = repair_stage(root, verdict, options, jobs=jobs, observe=observe)
            verdict = repaired.verdict
            remedy = screen.Remedy(fetched=repaired.fetched)
        seconds = time.perf_counter() - started
        screen.verdict(
            console, found.shown.absolute(), verdict, remedy, quick=quick, seconds=seconds
        )
        try:
            if remedy.plan is not None:
                from grokctl.integrity.room import refuse_full

                shown = found.shown.absolute()
                refuse_full(shown, remedy.plan.required_bytes, remedy.plan.free_bytes)
            stage.raise_for(verdict, root)
        except GrokctlError as error:
            raise ReportedError(error) from error
