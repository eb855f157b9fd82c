"""Format bytes, rates, numbers and times for people, and make strangers' text printable."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any, Final

from grokctl.events import Unit

_MINUTE, _SMALL, _LEAST = 60, 10, 0.001
_UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: controls, directions, surrogates, unassigned, line separators."""

_KEPT: Final = frozenset("\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2")
"""Controls and format characters of usual text: lines, joiners, and signs that Arabic draws."""


def format_bytes(count: float) -> str:
    """`1.5 GB`; decimal units, as for disks and networks."""
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def format_exact(count: int) -> str:
    """`1,611,137,347 bytes`: where every byte counts, such as the size of a file."""
    return "1 byte" if count == 1 else f"{count:,} bytes"


def format_apart(*counts: int) -> tuple[str, ...]:
    """Sizes to compare: `7.3 MB` each, or exact if different ones would read alike."""
    texts = tuple(map(format_bytes, counts))
    return texts if len(set(texts)) == len(set(counts)) else tuple(map(format_exact, counts))


def format_rate(count: float) -> str:
    """`1.5 GB/s`."""
    return f"{format_bytes(count)}/s"


def format_count(count: float, unit: Unit) -> str:
    """`1.5 GB` or `1,200 tokens`."""
    if unit is Unit.BYTES:
        return format_bytes(count)
    return f"{count:,.0f} {unit.removesuffix('s') if count == 1 else unit}"


def format_number(count: int, noun: str) -> str:
    """`1 peer` or `3 peers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3:20` or `2:03:20`."""
    if 0 < seconds < _LEAST:
        return f"<{_LEAST} s"
    if seconds < _MINUTE:
        return f"{seconds:.2g} s" if seconds < _SMALL else f"{seconds:.0f} s"
    return format_clock(seconds)


def format_clock(seconds: float) -> str:
    """`0:07`, `3:20` or `2:03:20`: a clock that runs."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_speed(rate: float) -> str:
    """`1,234`, `12.3` or `0.12`: a rate in two or three digits."""
    if 0 < rate < _LEAST:
        return f"<{_LEAST}"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"  # noqa: PLR2004


def to_json(values: Any) -> str:
    """JSON in one line, with null for a number that JSON cannot write: NaN and infinities."""
    return json.dumps(_finite(values), allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def printable(text: str, *, limit: int = 120) -> str:
    """A stranger's text for one line: no control or direction characters, and not too long."""
    clean = "".join(
        "?" if unicodedata.category(character) in _UNPRINTABLE else character for character in text
    )
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def harmless(text: str) -> str:
    """Text without what a terminal would obey or hide: control codes, directions, tags.

    The joiners of emojis and of Persian words stay, and so do the format characters that are seen.
    """
    return "".join(c for c in text if unicodedata.category(c) not in {"Cc", "Cf"} or c in _KEPT)
