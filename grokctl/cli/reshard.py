"""`grokctl reshard`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grokctl.cli.context import GOES_ON, ReportedError, command, home_of
from grokctl.cli.options import (
    CheckpointArgument,
    DevicesOption,
    HomeOption,
    JsonOption,
    MeshOption,
    QuietOption,
    VerboseOption,
)
from grokctl.errors import GrokctlError, UsageError
from grokctl.model.placement import read_mesh
from grokctl.model.precision import Precision
from grokctl.parse import read_devices, read_size

if TYPE_CHECKING:
    from grokctl.checkpoint.ready import ReadyCheckpoint
    from grokctl.checkpoint.release import Release


def reshard(
    checkpoint: CheckpointArgument = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="int8 and float32 are lossless.", show_default="as it is: int8"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Inputs that share an int4 scale.", show_default="64"
        ),
    ] = None,
    compress: Annotated[
        str | None, typer.Option(metavar="zstd[:LEVEL]", help="Smaller files, slower to load.")
    ] = None,
    only_devices: Annotated[
        str | None, typer.Option(metavar="0-7", help="Write the files of these devices only.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to make.", show_default="ready/NAME-PRECISION-MESH"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do, and how long it would take.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads.", show_default="cores")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="For all that is under way.", show_default="a quarter of free"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Cut a checkpoint into one file a device; goes on where it stopped."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=GOES_ON) as console:
        from grokctl import reshard as stage
        from grokctl.checkpoint.frames import Compression
        from grokctl.checkpoint.ready import open_ready
        from grokctl.checkpoint.receipt import proof_of
        from grokctl.checkpoint.release import open_release
        from grokctl.paths import kind_of
        from grokctl.resharding.estimate import estimate
        from grokctl.resharding.plan import ReshardOptions, plan_reshard, usual_name
        from grokctl.resharding.publish import check_destination, check_space
        from grokctl.screen import reshard as screen
        from grokctl.screen.verify import proof as proof_line
        from grokctl.screen.verify import unhashed

        where = home_of(home)
        root = where.find(checkpoint, ready=checkpoint is not None).absolute()
        compression = None if compress is None else Compression.parse(compress)
        chosen, proof = read_mesh(devices, mesh), None
        source: Release | ReadyCheckpoint
        if kind_of(root) == "ready":
            source = open_ready(root, is_streamed=True)
            chosen = chosen or source.mesh
            known = unhashed(root)
        else:
            with console.observing() as observe:
                source = open_release(root, observe=observe)
            proof = proof_of(source)
            known = proof_line(proof, root)
        if chosen is None:
            raise UsageError("how many devices to cut for is not said", "--devices 8")
        name = usual_name(source, mesh=chosen, precision=precision, compression=compression)
        options = ReshardOptions(
            mesh=chosen,
            out=(out or where.ready / name).absolute(),
            precision=precision,
            group_size=group_size,
            compression=compression,
            devices=read_devices(only_devices),
            jobs=jobs,
            max_memory=read_size(max_memory),
        )
        plan = plan_reshard(source, options)
        if dry_run:
            found = estimate(plan)
            screen.reshard_plan(console, plan, found)
            try:
                check_destination(plan, force=force)
                check_space(plan, found.nbytes, found.free_nbytes)
            except GrokctlError as error:
                raise ReportedError(error) from error
            return
        console.note(known)
        started = time.perf_counter()
        with console.observing() as observe:
            ready = stage.reshard(plan, proof=proof, force=force, observe=observe)
        screen.resharded(
            console, ready, plan, seconds=time.perf_counter() - started, peak_rss=_peak_rss()
        )


def _peak_rss() -> int:
    """Most memory that this process ever held, bytes."""
    import resource

    try:
        # what Linux counts for us alone: `ru_maxrss` begins with the memory of who started us
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
