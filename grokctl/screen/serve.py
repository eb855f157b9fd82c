"""Print what a server serves, and where: a line for people, or a JSON object for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from grokctl.text import format_bytes, format_number

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.screen.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a server that has loaded serves, and where."""

    url: str
    model: str
    slots: int
    context: int
    slot_nbytes: int
    """Of the cache, for one sequence, on all devices together."""
    is_local: bool
    """Whether this machine alone reaches it."""
    has_key: bool
    load_s: float
    compile_s: float


def ready(console: Console, values: Ready) -> None:
    """Print that requests are answered from now on."""
    if console.as_json:
        console.emit(asdict(values))
        return
    slots = format_number(values.slots, "slot")
    room = f"{slots} of {values.context:,} tokens ({format_bytes(values.slot_nbytes)} each)"
    console.note(f"ready: {values.url} · {values.model} · {room} · {_who(values)}", always=True)


def _who(values: Ready) -> str:
    """Who can ask, in words."""
    if values.has_key:
        return "with the key only"
    return (
        "no key: only this machine can reach it" if values.is_local else "no key: anybody may ask"
    )


def ended(console: Console, cut_off: int) -> None:
    """Print how a server ended."""
    if cut_off:
        console.note(f"ended: {format_number(cut_off, 'completion')} had not, and got an error")
    else:
        console.note("ended")
