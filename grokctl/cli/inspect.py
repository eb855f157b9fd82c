"""`grokctl inspect`."""

from typing import Annotated

import typer

from grokctl.cli.context import command, found_checkpoint, home_of
from grokctl.cli.options import (
    CheckpointArgument,
    HomeOption,
    JobsOption,
    JsonOption,
    QuietOption,
    VerboseOption,
)


def inspect(
    checkpoint: CheckpointArgument = None,
    tensor: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="List single tensors, such as '*.moe.gate' or '*'."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read all values: range, rms, use of int8.")
    ] = False,
    jobs: JobsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """List the tensors of a checkpoint. Reads few bytes without --stats."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import inspect as stage
        from grokctl.screen import inspect as screen

        found = found_checkpoint(console, home_of(home), checkpoint, exports=True)
        root = found.root.absolute()
        with console.observing() as observe:
            result = stage.inspect(root, pattern=tensor, stats=stats, jobs=jobs, observe=observe)
        screen.inspection(console, result, one_by_one=tensor is not None)
