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
_GONE: Final = "…"
_FILE: Final = re.compile(r"(?:\.{0,2}/(?!/)|~[\w-]*/).*|[^@?#;:\\]+\.torrent", re.DOTALL)
"""The path of a file, which is shown as it is."""
_HOSTS: Final = re.compile(r"[A-Za-z0-9.*-]+(?:,[A-Za-z0-9.*-]+)+")
"""Hosts that need no proxy."""
_SCHEME: Final = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]{2,}")
_ADDRESS: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT: Final = re.compile(r":[0-9]{0,5}|")
_MOST_RUNS, _MOST_DIGITS, _MOST_HOST_DIGITS, _LONGEST_WORD = 3, 4, 6, 24
_UNREADABLE: Final = re.compile(r"(?i:[^aeiouy0-9._-]{5})|[A-Z]{2}|[a-z]{15}")
"""In a path, parts of words that no person has chosen: no vowels, capitals, too long."""
_TOPIC: Final = re.compile(r"urn:[a-z0-9]{1,8}:[A-Za-z0-9]{0,80}")
_TITLE: Final = re.compile(r"[\w.()+ -]{0,200}")

_QUOTED: Final = re.compile(r"""(?<!\w)(?:"[^"]*"|'[^']*')""")
"""A word in the quotes of a shell, and no apostrophe."""

_BREAKS: Final = frozenset("\n\t")
_IGNORED: Final = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
"""What nobody sees: Default_Ignorable_Code_Point (Unicode, DerivedCoreProperties), and the braille
pattern without dots."""
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
    """A stranger's text for one line: nothing invisible, no controls, and not too long."""
    clean = _IGNORED.sub("?", text[: limit + 1])  # each character stays one
    if not clean.isprintable():  # slow, and rare: one look at each character
        clean = "".join("?" if unicodedata.category(c) in _UNPRINTABLE else c for c in clean)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def harmless(text: str) -> str:
    """Text without what a terminal would obey or hide: control codes, directions, tags.

    The joiners and variants of emojis and of Persian words stay, and so do fillers, which stand for
    letters or spaces, and the format characters that are seen.
    """
    return "".join(c for c in text if unicodedata.category(c) not in {"Cc", "Cf"} or c in _KEPT)


def to_copy(text: str) -> str:
    r"""A text with a command, such as a hint: each quoted name in it is seen, and right if pasted.

    A quoted word with line breaks, or with characters that nobody sees, gets the
    quotes of bash and zsh that name them by their bytes: `rm $'a\342\200\256b'`.
    """

    def visible(match: re.Match[str]) -> str:
        word = match[0]
        is_plain = harmless(word) == word and not _BREAKS.intersection(word)
        is_shown = is_plain and _IGNORED.search(word) is None
        if is_shown or word.startswith('"'):
            return word
        return "$'" + "".join(map(_visible, word[1:-1])) + "'"

    return harmless(_QUOTED.sub(visible, text))


def _visible(character: str) -> str:
    if character == "\\":
        return "\\\\"
    is_shown = harmless(character) and character not in _BREAKS
    is_shown = is_shown and _IGNORED.match(character) is None
    if is_shown and unicodedata.category(character) != "Cs":
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode(errors="surrogateescape"))


def shown_url(url: str) -> str:
    """A URL without what lets its bearer in: user, password, passkeys wherever they stand.

    Only what is known to be harmless is shown: scheme, host and port, plain words of the path and
    of the names in a query. It takes what is no valid URL as well; the path of a file that begins
    with `/`, `./` or `~/`, or ends with `.torrent`, is shown as it is. Of a magnet link, it leaves
    out the fields and trackers that may have a secret: the rest can still be pasted.
    """
    text = url.strip()
    if text[:7].lower() == "magnet:":
        return _shown_magnet(text)
    if _FILE.fullmatch(text) or _HOSTS.fullmatch(text):
        return url
    match = _SCHEME.match(text)
    scheme = match[0] if match else ""
    host, path = _split(text[len(scheme) :], r"[/\\?#]")
    if "@" in path:  # all of it may be the password of a user
        return scheme + _GONE
    login, _, host = host.rpartition("@")
    path, fragment = _split(path, "#")
    path, query = _split(path, r"\?")
    parts = re.split(r"([/\\])", path)
    return "".join(
        (
            scheme,
            f"{_GONE}@" if login or "@" in text else "",
            _shown_host(host),
            *(part if part in {"/", "\\"} else _shown_part(part) for part in parts),
            *(map(_shown_field, re.split("([?&;])", query))),
            f"#{_GONE}" if len(fragment) > 1 else fragment,
        )
    )


def shown_host(host: str) -> str:
    """The host of a URL without labels that may be a passkey."""
    return host if ":" in host else _shown_host(host)


def has_secret(url: str) -> bool:
    """Whether a URL has a part that should not be shown, or kept where others can read it."""
    return shown_url(url) != url.strip()


def _split(text: str, mark: str) -> tuple[str, str]:
    """What is before a mark, and the rest with it."""
    match = re.search(mark, text)
    place = match.start() if match else len(text)
    return text[:place], text[place:]


def _shown_host(host: str) -> str:
    """A host and its port; what is no name or address may be anything."""
    match = _ADDRESS.match(host)
    name, port = (match[0], host[match.end() :]) if match else _split(host, ":")
    if not _PORT.fullmatch(port):
        return _GONE
    if match is None:
        labels = (
            label if _is_word(label, _MOST_HOST_DIGITS) else _GONE for label in name.split(".")
        )
        name = ".".join(labels)
    return name + port


def _shown_part(part: str) -> str:
    """A part of a path, if it is a plain word such as `announce.php` or `grok-1`."""
    word, mark, rest = part.partition(";")
    is_plain = _is_word(word, _MOST_DIGITS) and not _UNREADABLE.search(word)
    return (word if is_plain else _GONE) + mark + (_GONE if rest else "")


def _shown_field(field: str) -> str:
    """A field of a query, with its name at most; or a mark between fields."""
    if field in {"", "?", "&", ";"}:
        return field
    name, mark, value = field.partition("=")
    is_plain = value and name.replace("_", "").isalpha() and _is_word(name, 0)
    return f"{name}{mark}{_GONE}" if is_plain else _GONE


def _is_word(text: str, most_digits: int) -> bool:
    """Whether a person may have named it: short words of one case, and few digits."""
    if len(text) > _LONGEST_WORD or not re.fullmatch(r"[A-Za-z0-9._-]*", text):
        return False
    if sum(map(str.isdigit, text)) > most_digits:
        return False
    return all(_is_plain(word) for word in re.split("[._-]", text))


def _is_plain(word: str) -> bool:
    capital = re.fullmatch("[A-Z][a-z]+", word)
    runs = [word] if capital else re.findall("[a-z]+|[A-Z]+|[0-9]+", word)
    kinds = {"A" if run.isupper() else "a" for run in runs if not run.isdigit()}
    return len(runs) <= _MOST_RUNS and len(kinds) <= 1


def _shown_magnet(link: str) -> str:
    """A magnet link with the fields that show what is fetched, and trackers without a secret."""
    head, mark, query = link.partition("?")
    fields = re.split("[&;]", query.partition("#")[0])
    kept = "&".join(field for field in fields if _is_harmless(field))
    return (head if head.lower() == "magnet:" else f"magnet:{_GONE}") + mark + kept


def _is_harmless(field: str) -> bool:
    name, _, value = field.partition("=")
    text = unquote(value)
    match name:
        case "xt":
            return bool(_TOPIC.fullmatch(value))
        case "dn":
            return bool(_TITLE.fullmatch(text))
        case "xl":
            return value.isdigit()
        case _:
            is_tracker = bool(re.fullmatch(r"tr(\.[0-9]+)?", name))
            return is_tracker and "://" in text and not has_secret(text)
