"""`grokctl inspect`."""

from typing import TYPE_CHECKING, Annotated

import typer

from grokctl.cli.context import (
    command,
    found_checkpoint,
    home_of,
    name_as_typed,
    require_checkpoint,
)
from grokctl.cli.environment import jax_prepared
from grokctl.cli.hints import again
from grokctl.cli.options import (
    CheckpointArgument,
    HomeOption,
    JobsOption,
    JsonOption,
    QuietOption,
    VerboseOption,
)
from grokctl.errors import UsageError
from grokctl.parse import read_stdin

if TYPE_CHECKING:
    from grokctl.paths import Home
    from grokctl.screen.console import Console


def inspect(
    checkpoint: CheckpointArgument = None,
    tensor: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="List single tensors, such as '*.moe.gate' or '*'."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read all values: range, rms, use of int8.")
    ] = False,
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Run this text, and count which experts it uses; - reads stdin.",
        ),
    ] = None,
    jobs: JobsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """List the tensors of a checkpoint. Reads few bytes without --stats."""
    if routing is not None:
        with command(as_json=as_json, quiet=quiet, verbose=verbose) as console, jax_prepared():
            _refuse_beside_routing(tensor, stats=stats)
            _count_experts(console, home_of(home), checkpoint, routing)
        return
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import inspect as stage
        from grokctl.screen import inspect as screen

        found = found_checkpoint(console, home_of(home), checkpoint, exports=True)
        root = found.root.absolute()
        with console.observing() as observe:
            result = stage.inspect(root, pattern=tensor, stats=stats, jobs=jobs, observe=observe)
        screen.inspection(console, result, one_by_one=tensor is not None)


def _refuse_beside_routing(tensor: str | None, *, stats: bool) -> None:
    name = "--stats" if stats else "--tensor" if tensor is not None else None
    if name is not None:
        raise UsageError(f"expected --routing or {name}, found both", again(without=(name,)))


def _count_experts(console: "Console", home: "Home", checkpoint: str | None, text: str) -> None:
    from grokctl.inference.routing import count_experts, keep, kept_at
    from grokctl.screen import routing as screen
    from grokctl.session.job import JobRequest, open_job

    require_checkpoint(home, checkpoint)
    name_as_typed(console, home, checkpoint)
    content = read_stdin() if text == "-" else text
    with console.observing() as observe:
        job = open_job(JobRequest(home=home, checkpoint=checkpoint), observe=observe)
        tokens = job.plan.encode(content)
        result = count_experts(job.start(observe), tokens, observe=observe)
    path = kept_at(home.routing, job.source)
    screen.routing(console, job.name, result, keep(path, result), path)
