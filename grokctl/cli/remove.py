"""`grokctl remove`."""

import sys
from typing import Annotated

import typer

from grokctl.cli.context import command, home_of
from grokctl.cli.hints import again
from grokctl.cli.options import HomeOption, JsonOption, QuietOption, VerboseOption, kept_names
from grokctl.errors import UsageError


def remove(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="As `grokctl list` shows it.", autocompletion=kept_names
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Delete a release, a ready checkpoint, an export or a cache under home; asks before."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import remove as stage
        from grokctl.screen import remove as screen
        from grokctl.screen.terminal import is_terminal

        kept = stage.find_kept(home_of(home), name)
        if not yes:
            if as_json or not is_terminal(sys.stdin):
                problem = f"{kept.name}: expected --yes where nobody can be asked"
                raise UsageError(problem, again("--yes"))
            if not screen.is_confirmed(console, kept):
                console.note("nothing was removed")
                return
        left = stage.remove(kept)
        screen.removed(console, kept, left)
