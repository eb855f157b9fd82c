"""`grokctl demo`."""

from pathlib import Path
from typing import Annotated

import typer

from grokctl.cli.context import ReportedError, command
from grokctl.cli.environment import jax_prepared
from grokctl.cli.options import JsonOption, QuietOption, VerboseOption, path_of
from grokctl.errors import GrokctlError


def demo(
    keep: Annotated[
        Path | None,
        typer.Option(parser=path_of, metavar="DIR", help="Keep all files in this new folder."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run every command on a miniature, from magnet link to text on 8, 4 and 16 devices."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console, jax_prepared():
        from grokctl import demo as stage
        from grokctl.screen import demo as screen

        with console.observing() as observe:
            result = stage.demo(keep, observe=observe)
        screen.demonstration(console, result, keep)
        try:
            stage.raise_for(result)
        except GrokctlError as error:
            raise ReportedError(error) from error
