"""`grokctl list`."""

from grokctl.cli.context import command, home_of
from grokctl.cli.options import HomeOption, JsonOption, QuietOption, VerboseOption


def list_(
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """List what is under home, with its size and its proof. Reads no weights."""
    with command(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl.list import list_kept
        from grokctl.screen import list as screen

        where = home_of(home)
        screen.listing(console, where, list_kept(where))
