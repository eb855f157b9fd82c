"""`grokctl demo`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import command
from grokctl.cli.options import JsonOption, QuietOption, VerboseOption
from grokctl.errors import ExitCode, UsageError


def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Leave everything in this new folder.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """The whole pipeline on a miniature: magnet, verify, reshard for 8, 4 and 16, run."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl.demo import demo as stage
        from grokctl.screen import demo as screen

        if keep is not None:
            if keep.exists():
                raise UsageError(f"{keep}: exists", "--keep a-new-folder")
            with console.observing() as observe:
                found = stage(keep, observe=observe)
        else:
            with (
                tempfile.TemporaryDirectory(prefix="grokctl-demo-") as folder,
                console.observing() as observe,
            ):
                found = stage(Path(folder), observe=observe)
        screen.demonstration(console, found, keep)
        if not found.agrees:
            raise typer.Exit(ExitCode.BUG)
