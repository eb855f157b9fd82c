"""Bytes, rates, numbers and times as people read them."""

from __future__ import annotations

import unicodedata
from typing import Final

from grokctl.events import Unit

_MINUTE, _SMALL = 60, 10
_UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_bytes(count: float) -> str:
    """Decimal units, as disks and networks are sold."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_rate(count: float) -> str:
    """Bytes per second."""
    return f"{format_bytes(count)}/s"


def format_count(count: float, unit: Unit) -> str:
    """A number with its unit."""
    if unit is Unit.BYTES:
        return format_bytes(count)
    return f"{count:,.0f} {unit.removesuffix('s') if count == 1 else unit}"


def format_number(count: int, noun: str) -> str:
    """`1 peer`, `3 peers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3:20` or `2:03:20`."""
    if seconds < _MINUTE:
        return f"{seconds:.2g} s" if seconds < _SMALL else f"{seconds:.0f} s"
    return format_clock(seconds)


def format_clock(seconds: float) -> str:
    """`0:07`, `3:20` or `2:03:20`: for times that run."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_pace(rate: float) -> str:
    """A rate in about three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"  # noqa: PLR2004


_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str, *, limit: int = 120) -> str:
    """A stranger's text without control or direction characters, and not too long."""
    clean = "".join(
        "?" if unicodedata.category(character) in _UNPRINTABLE else character for character in text
    )
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def harmless(text: str) -> str:
    """Text without control codes, which a terminal would obey."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
