"""From a magnet link to text from Grok-1, on the hardware you have."""

import sys

__version__ = "0.1.0"


def _starts_as_module() -> bool:
    """Whether Python is about to run `python -m grokctl`, and no other module that imports us."""
    if sys.argv[:1] != ["-m"]:
        return False
    name = sys.orig_argv[-len(sys.argv)]  # behind it are the arguments
    return name == "grokctl" or (name.startswith("-") and name.endswith("mgrokctl"))


if _starts_as_module() and not sys.flags.safe_path:
    # as with `python -P`: a folder that we are started in may hold a stranger's typer.py
    del sys.path[0]
