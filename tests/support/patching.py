"""Code for a process of its own that changes grokctl first: a name that is gone fails loudly."""

from typing import Final

PATCH: Final = """\
import importlib

def patch(place, new):
    \"\"\"Set `package.module:NAME` or `…:Class.name`, below grokctl, to `new(old)`.\"\"\"
    module, _, path = place.partition(":")
    owner = importlib.import_module(f"grokctl.{module}")
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, new(getattr(owner, name)))

"""
MAIN: Final = "\nfrom grokctl.cli.app import main; main()"


def patched(code: str) -> str:
    """The command line as a process runs it with `-c`, after some code that may call `patch`."""
    return f"{PATCH}{code}{MAIN}"
