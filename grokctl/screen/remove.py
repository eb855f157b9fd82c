"""Ask before something under home is removed, and print what was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grokctl.paths import quoted
from grokctl.screen.console import show
from grokctl.text import format_bytes, format_number

if TYPE_CHECKING:  # a screen imports no stage
    from collections.abc import Sequence

    from grokctl.list import Kept
    from grokctl.screen.console import Console

_SHOWN = 4
"""Files that are left, by name."""
_YES = frozenset({"y", "yes"})


def is_confirmed(console: Console, kept: Kept) -> bool:
    """Whether the user wants it gone; anything but yes is no."""
    answer = console.ask(f"remove {kept.path} ({format_bytes(kept.nbytes)})? [y/N] ")
    return answer is not None and answer.strip().casefold() in _YES


def removed(console: Console, kept: Kept, left: Sequence[str]) -> None:
    """Print what was removed, and what stays because grokctl did not make it."""
    names = ", ".join(left[:_SHOWN]) + (", …" if len(left) > _SHOWN else "")
    show(
        console,
        {"removed": kept.name, "kind": kept.kind, "bytes": kept.nbytes, "left": list(left)},
        f"removed {kept.name}",
        [
            ("freed", format_bytes(kept.nbytes)),
            *([("left", f"{format_number(len(left), 'file')} of others: {names}")] if left else []),
            *([("to see them", f"ls -la {quoted(kept.path)}")] if left else []),
        ],
        brief=f"removed {kept.name}",
    )
