"""Format bytes, rates, numbers and times for people, and make strangers' text printable."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any, Final
from urllib.parse import unquote

from grokctl.events import Unit

_MINUTE, _SMALL, _LEAST = 60, 10, 0.001
_UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: controls, directions, surrogates, unassigned, line separators."""
_REST: Final = r"([^/?#]*)([^?#]*)(.*)"
_URL_PARTS: Final = re.compile(
    # a password may have any character
    rf"([A-Za-z][A-Za-z0-9+.-]*://)([^:/]*:.*@|[^/]*@)?{_REST}",
    re.DOTALL,
)
_LOGIN_PARTS: Final = re.compile(rf"()([^:/]+:.*@){_REST}", re.DOTALL)
_PASSKEY: Final = re.compile(r"(?=.*[0-9])[\w~%+=-]{10,}|(?=.*[a-z])(?=.*[A-Z])[\w~%+=-]{20,}")
"""A part of a path that no person has named."""
_VALUE: Final = re.compile(r"([?&;=#])[^?&;=#]+(?=[&;#]|$)")

_QUOTED: Final = re.compile(r"""(?<!\w)(?:"[^"]*"|'[^']*')""")
"""A word in the quotes of a shell, and no apostrophe."""

_BREAKS: Final = frozenset("\n\t")
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


def to_copy(text: str) -> str:
    r"""A text with a command, such as a hint: each quoted name in it is seen, and right if pasted.

    A quoted word with line breaks, or with characters that `harmless` would take out, gets the
    quotes of bash and zsh that name them by their bytes: `rm $'a\342\200\256b'`.
    """

    def visible(match: re.Match[str]) -> str:
        word = match[0]
        is_shown = harmless(word) == word and not _BREAKS.intersection(word)
        if is_shown or word.startswith('"'):
            return word
        return "$'" + "".join(map(_visible, word[1:-1])) + "'"

    return harmless(_QUOTED.sub(visible, text))


def _visible(character: str) -> str:
    if character == "\\":
        return "\\\\"
    is_shown = harmless(character) and character not in _BREAKS
    if is_shown and unicodedata.category(character) != "Cs":
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


def shown_url(url: str) -> str:
    """A URL without what lets its bearer in: user, password, passkeys in the path, query values.

    It hides too much rather than too little, and takes what is no valid URL as well. Of a magnet
    link, it leaves out the trackers that have such a part: the rest can still be pasted.
    """
    if url.startswith("magnet:"):
        head, mark, query = url.partition("?")
        fields = (field for field in query.split("&") if not has_secret(_tracker_in(field)))
        return head + mark + "&".join(fields)
    parts = _URL_PARTS.fullmatch(url) or _LOGIN_PARTS.fullmatch(url)
    if parts is None:
        return url  # the path of a file, say
    scheme, login, host, path, values = parts.groups("")
    shown = "/".join("…" if _PASSKEY.fullmatch(part) else part for part in path.split("/"))
    return scheme + ("…@" if login else "") + host + shown + _VALUE.sub(r"\1…", values)


def has_secret(url: str) -> bool:
    """Whether a URL has a part that should not be shown, or kept where others can read it."""
    return shown_url(url) != url


def _tracker_in(field: str) -> str:
    """The tracker of a magnet link's field; empty if the field is another."""
    name, _, value = field.partition("=")
    return unquote(value) if re.fullmatch(r"tr(\.[0-9]+)?", name) else ""
