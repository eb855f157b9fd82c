"""Code for a process of its own that changes grokctl first: a name that is gone fails loudly."""

import ast
from typing import Final

PRELUDE: Final = '''\
import importlib, time

def patch(place, new):
    """Set `package.module:NAME` or `…:Class.name`, below grokctl, to `new(old)`."""
    module, _, path = place.partition(":")
    owner = importlib.import_module(f"grokctl.{module}" if module else "grokctl")
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, new(getattr(owner, name)))

def delayed(seconds):
    """What `patch` takes for a function that sleeps before each call."""
    return lambda old: lambda *args, **options: time.sleep(seconds) or old(*args, **options)

'''
MAIN: Final = "\nfrom grokctl.cli.app import main; main()"


def patched(code: str) -> str:
    """The command line as a process runs it with `-c`, after some code that may call `patch`.

    Raises:
        ValueError: The code sets an attribute of grokctl by itself, so that nobody would notice
            when the name moves.
    """
    tree = ast.parse(code)
    ours = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "grokctl"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            base = ast.unparse(node).split(".")[0]
            if base in ours:
                msg = f"{ast.unparse(node)} is set without patch()"
                raise ValueError(msg)
    return f"{PRELUDE}{code}{MAIN}"
