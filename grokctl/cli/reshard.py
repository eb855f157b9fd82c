"""`grokctl reshard`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grokctl.cli.context import RESUMES, ReportedError, command, found_checkpoint, home_of
from grokctl.cli.hints import again
from grokctl.cli.options import (
    CheckpointArgument,
    DevicesOption,
    HomeOption,
    JobsOption,
    JsonOption,
    MeshOption,
    QuietOption,
    VerboseOption,
    dtype_of,
    path_of,
)
from grokctl.errors import GrokctlError, UsageError
from grokctl.model.placement import read_mesh
from grokctl.model.precision import Precision
from grokctl.parse import read_ranges, read_size
from grokctl.paths import Home

if TYPE_CHECKING:
    from grokctl.screen.console import Console


def reshard(
    checkpoint: CheckpointArgument = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            parser=dtype_of(Precision),
            metavar="TYPE",
            help="int8, int4, bf16 or float32; int8 and float32 are lossless.",
            show_default="the source's: int8",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Inputs per int4 scale.", show_default="64"),
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(metavar="zstd[:LEVEL]", help="Compress: smaller files that load slower."),
    ] = None,
    only_devices: Annotated[
        str | None, typer.Option(metavar="0-7", help="Write the files of these devices only.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_of,
            metavar="DIR",
            help="New folder.",
            show_default="ready/NAME-PRECISION-MESH",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan only, and estimate its time.")
    ] = False,
    jobs: JobsOption = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for buffers.", show_default="a quarter of the free memory"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove every byte of a release while it is read.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Write a checkpoint as one file for each device; resumes after an interruption."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=RESUMES) as console:
        from grokctl import reshard as stage
        from grokctl.checkpoint.frames import Compression
        from grokctl.checkpoint.release import Release
        from grokctl.checkpoint.sums import proof_kind
        from grokctl.machine.memory import peak_rss
        from grokctl.resharding.estimate import estimate
        from grokctl.resharding.request import ReshardRequest, check_feasible, plan_request
        from grokctl.screen import reshard as screen
        from grokctl.verify import verifying

        where = home_of(home)
        request = ReshardRequest(
            root=_source(console, where, checkpoint),
            folder=where.ready,
            out=out,
            mesh=read_mesh(devices, mesh),
            precision=precision,
            group_size=group_size,
            compression=None if compress is None else Compression.parse(compress),
            devices=read_ranges(only_devices, "--only-devices", "0-7"),
            jobs=jobs,
            max_memory=read_size(max_memory, "--max-memory", unit="GB"),
        )
        with console.observing() as observe:
            planned = plan_request(request, observe=observe)
        plan = planned.plan
        if dry_run:
            estimated = estimate(plan)
            screen.reshard_plan(console, plan, estimated)
            try:
                check_feasible(plan, estimated, force=force)
            except GrokctlError as error:
                raise ReportedError(error) from error
            return
        console.note(planned.provenance)
        started = time.perf_counter()
        with console.observing() as observe:
            is_to_prove = verify and planned.proof is None and isinstance(plan.source, Release)
            check = verifying(request.root, jobs=jobs, observe=observe) if is_to_prove else None
            ready = stage.reshard(
                plan, proof=planned.proof, check=check, force=force, observe=observe
            )
        seconds = time.perf_counter() - started
        screen.resharded(
            console,
            ready,
            plan,
            proven_by=proof_kind(ready),
            seconds=seconds,
            peak_rss=peak_rss(),
        )


def _source(console: "Console", home: Home, checkpoint: str | None) -> Path:
    """The checkpoint to reshard: without a name a release, which loses nothing."""
    try:
        is_named = checkpoint is not None
        found = found_checkpoint(console, home, checkpoint, ready=is_named, exports=is_named)
    except UsageError as error:
        ready = home.ready_checkpoints() if checkpoint is None else []
        if ready and not home.kept_releases():
            error.hint = again(ready[-1].name)
        raise
    return found.root.absolute()
