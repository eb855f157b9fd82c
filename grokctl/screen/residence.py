"""Print what more memory changes where experts are streamed from the disk."""

from collections.abc import Sequence
from typing import Final

from grokctl.model.precision import Precision
from grokctl.planning.plans import Hardware, Plan
from grokctl.planning.residence import Residence
from grokctl.screen.console import Console
from grokctl.text import format_bytes, format_rate, format_seconds

_DISKS: Final = (3.5e9, 7e9, 14e9)
"""Bytes a second of NVMe disks of three generations, where none was measured."""
_SHOWN: Final = (Precision.INT8, Precision.INT4)


def more_memory(console: Console, plans: Sequence[Plan], hardware: Hardware) -> None:
    """Print what stays and how long a token takes, with this memory and with more.

    Args:
        console: Prints it.
        plans: For this hardware; nothing is printed unless a token of int8 waits for the disk.
        hardware: A CPU.
    """
    streamed = {plan.precision: plan for plan in plans if plan.residence is not None}
    shown = [streamed[precision] for precision in _SHOWN if precision in streamed]
    first = shown[0].residence if shown else None
    if first is None:
        return
    rates = [hardware.read_rate] if hardware.read_rate else list(_DISKS)
    columns = {"memory": [format_bytes(memory) for memory, _ in _rooms(first)]}
    for plan in shown:
        assert plan.residence is not None
        rooms = [(memory, _in(plan.residence, memory)) for memory, _ in _rooms(first)]
        name = plan.precision
        columns[f"{name}: stay"] = [_stay(residence) for _, residence in rooms]
        columns[f"{name}: a token"] = [_missed(residence) for _, residence in rooms]
        columns[f"{name}: seconds"] = [
            _seconds(residence, plan, hardware, rates) for _, residence in rooms
        ]
    disks = " / ".join(format_rate(rate) for rate in rates)
    count = f"{first.experts:,} experts"
    console.table(
        f"what more memory changes: which of {count} stay, and what a token reads at {disks}",
        tuple(columns),
        list(zip(*columns.values(), strict=True)),
        right=tuple(columns),
    )


def _rooms(residence: Residence) -> list[tuple[int, Residence | None]]:
    """This memory, and more."""
    return [(residence.memory, residence), *residence.larger()]


def _in(residence: Residence, memory: int) -> Residence | None:
    return residence if memory == residence.memory else residence.with_memory(memory)


def _stay(residence: Residence | None) -> str:
    if residence is None:
        return "all"
    return (
        f"lacks {format_bytes(residence.missing)}" if residence.missing else str(residence.pinned)
    )


def _missed(residence: Residence | None) -> str:
    if residence is None:
        return "0 B"
    return "" if residence.missing else format_bytes(int(residence.missed))


def _seconds(
    residence: Residence | None, plan: Plan, hardware: Hardware, rates: Sequence[float]
) -> str:
    """`18.8 s / 9.4 s / 4.7 s`; empty if it is unknown."""
    if residence is None:
        is_known = hardware.decode_rate is not None and plan.step is not None
        return format_seconds(plan.step.total_s) if plan.step and is_known else ""
    if residence.missing:
        return ""
    each = (residence.seconds(read_rate=rate, decode_rate=hardware.decode_rate) for rate in rates)
    return " / ".join(map(format_seconds, each))
