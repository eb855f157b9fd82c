"""Torrents and magnets as values: metainfo, pieces <-> files, safe names. Needs no libtorrent."""

import base64
import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from grokctl.errors import FetchError

GROK_1_MAGNET: Final = (
    "magnet:?xt=urn:btih:5f96d43576e3d386c9ba65b883210a393b68210e&dn=grok-1"
    "&tr=https%3A%2F%2Facademictorrents.com%2Fannounce.php"
    "&tr=udp%3A%2F%2Ftracker.coppersurfer.tk%3A6969"
    "&tr=udp%3A%2F%2Ftracker.opentrackr.org%3A1337%2Fannounce"
)
"""As published with the reference code; its infohash is the root of trust."""

_MOST_METAINFO = 32 * 2**20
_MOST_PIECES = 2**20
_MOST_FILES = 10_000
_MOST_DEPTH = 16
_SMALLEST_PIECE, _LARGEST_PIECE = 2**14, 2**28
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_MOST_VALUES = 250_000
_TRACKER_SCHEMES = frozenset({"http", "https", "udp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TorrentFile:
    """One file of a torrent."""

    index: int
    path: tuple[str, ...]
    """Below the torrent's own folder; every part is a harmless file name."""
    length: int
    offset: int
    """In the concatenation of all files, which the pieces cut."""
    is_pad: bool = False
    """Zeros between files (BEP 47), stored nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metainfo:
    """What a torrent promises."""

    infohash: str
    """40 hexadecimal digits: SHA-1 of the info dictionary."""
    name: str
    piece_length: int
    piece_hashes: bytes
    """SHA-1 of every piece, 20 bytes each."""
    files: tuple[TorrentFile, ...]

    @property
    def total(self) -> int:
        """Bytes of all files, pads included."""
        last = self.files[-1]
        return last.offset + last.length

    @property
    def num_pieces(self) -> int:
        """How many pieces cut `total`."""
        return len(self.piece_hashes) // 20

    def piece_hash(self, piece: int) -> bytes:
        """The promised SHA-1 of a piece."""
        return self.piece_hashes[20 * piece : 20 * piece + 20]

    def piece_size(self, piece: int) -> int:
        """Bytes of a piece: the last one is shorter."""
        return min(self.piece_length, self.total - piece * self.piece_length)

    def spans(self, piece: int) -> list[tuple[TorrentFile, int, int]]:
        """Which bytes a piece covers: `(file, offset in the file, length)`, none empty."""
        start = piece * self.piece_length
        end = start + self.piece_size(piece)
        first = bisect_right(self.files, start, key=lambda file: file.offset) - 1
        found = []
        for file in self.files[first:]:
            if file.offset >= end:
                break
            low, high = max(start, file.offset), min(end, file.offset + file.length)
            if low < high:
                found.append((file, low - file.offset, high - low))
        return found

    def pieces_of(self, file: TorrentFile) -> range:
        """Which pieces touch a file."""
        if file.length == 0:
            return range(0)
        first = file.offset // self.piece_length
        return range(first, (file.offset + file.length - 1) // self.piece_length + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnet:
    """A magnet link, stripped of what a stranger may not decide: peers and web seeds."""

    infohash: str
    name: str
    """For people to read; never a path."""
    trackers: tuple[str, ...]

    def __str__(self) -> str:
        names = f"&dn={quote(self.name)}" if self.name else ""
        trackers = "".join(f"&tr={quote(url, safe='')}" for url in self.trackers)
        return f"magnet:?xt=urn:btih:{self.infohash}{names}{trackers}"


def parse_magnet(link: str) -> Magnet:
    """Read an untrusted magnet link.

    Peers (`x.pe`) and web seeds (`ws`) in it are dropped: they would make this machine connect
    wherever the link's author likes. Name them with `--peer` and `--web-seed` instead.

    Raises:
        FetchError: It has no BitTorrent v1 infohash.
    """
    try:
        parts = urlsplit(link)
        values = parse_qsl(parts.query, max_num_fields=1000) if parts.scheme == "magnet" else []
    except ValueError:
        values = []
    found = [_infohash(value) for key, value in values if key == "xt"]
    found = [infohash for infohash in found if infohash]
    if len(found) != 1:
        raise FetchError(
            f"magnet link {printable(link)!r} names {len(found) or 'no'} BitTorrent infohashes",
            "grokctl fetch 'magnet:?xt=urn:btih:…' (quote it: & means something to the shell)",
        )
    return Magnet(
        infohash=found[0],
        name=printable(next((value for key, value in values if key == "dn"), "")),
        trackers=tuple(value for key, value in values if key == "tr" and _is_tracker(value)),
    )


def _is_tracker(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(
            re.fullmatch("[!-~]+", url) and parts.scheme in _TRACKER_SCHEMES and parts.hostname
        )
    except ValueError:
        return False


def _infohash(topic: str) -> str:
    """The infohash of a magnet's exact topic in hexadecimal; empty if it is of another kind."""
    if match := re.fullmatch(r"urn:btih:([0-9a-fA-F]{40})", topic):
        return match[1].lower()
    if match := re.fullmatch(r"urn:btih:([A-Za-z2-7]{32})", topic):
        return base64.b32decode(match[1].upper()).hex()
    return ""


def printable(text: str, *, limit: int = 120) -> str:
    """A stranger's text without control or direction characters, and not too long."""
    clean = "".join(
        "?" if unicodedata.category(character) in _UNPRINTABLE else character for character in text
    )
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def folder_name(name: str, infohash: str) -> str:
    """A harmless folder name for a download: the stranger's own if it is one."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) else infohash[:16]


def read_metainfo(path: Path) -> Metainfo:
    """Read a `.torrent` file; see `parse_metainfo`."""
    if path.stat().st_size > _MOST_METAINFO:
        raise FetchError(f"{path.name}: {path.stat().st_size} bytes is too large for a torrent")
    return parse_metainfo(path.read_bytes(), source=path.name)


def parse_metainfo(data: bytes, *, source: str) -> Metainfo:
    """Read untrusted metainfo.

    Args:
        data: A bencoded torrent.
        source: Name for errors.

    Raises:
        FetchError: It is malformed, contradicts itself, is larger than any release, has no v1
            pieces, or names a link, an executable or a path that leaves its folder.
    """
    try:
        top, spans = _decode(data)
        info = _entry(top, b"info", dict)
        start, end = spans[b"info"]
        return _metainfo(info, hashlib.sha1(data[start:end], usedforsecurity=False).hexdigest())
    except _MalformedError as error:
        raise FetchError(f"{source}: {error}, so it is no torrent to download") from error


def build_metainfo(
    root: Path, files: Sequence[str], *, name: str, piece_length: int, trackers: Sequence[str] = ()
) -> bytes:
    """Make a v1 torrent of existing files.

    Args:
        root: Folder that the file names are relative to.
        files: `/`-separated names, in the order of the torrent.
        name: The torrent's own folder name.
        piece_length: Bytes, a power of two.
        trackers: Announce URLs.

    Returns:
        Bencoded metainfo.
    """
    hashes, piece = bytearray(), hashlib.sha1(usedforsecurity=False)
    room = piece_length
    entries = []
    for file in files:
        with (root / file).open("rb") as stream:
            length = 0
            while chunk := stream.read(room):
                piece.update(chunk)
                length += len(chunk)
                room -= len(chunk)
                if room == 0:
                    hashes += piece.digest()
                    piece, room = hashlib.sha1(usedforsecurity=False), piece_length
        entries.append({b"length": length, b"path": [part.encode() for part in file.split("/")]})
    if room < piece_length:
        hashes += piece.digest()
    info = {
        b"files": entries,
        b"name": name.encode(),
        b"piece length": piece_length,
        b"pieces": bytes(hashes),
    }
    top: dict[bytes, Any] = {b"info": info}
    if trackers:
        top[b"announce"] = trackers[0].encode()
        top[b"announce-list"] = [[url.encode()] for url in trackers]
    return b"".join(_encode(top))


def trackers_of(data: bytes) -> tuple[str, ...]:
    """The announce URLs of a torrent whose scheme is http, https or udp."""
    try:
        top, _ = _decode(data)
    except _MalformedError as error:
        raise FetchError(f"torrent {error}") from error
    tiers = top.get(b"announce-list")
    tiers = tiers if isinstance(tiers, list) else []
    urls = [top.get(b"announce")]
    urls += [url for tier in tiers if isinstance(tier, list) for url in tier]
    texts = [url.decode("utf-8", "replace") for url in urls if isinstance(url, bytes)]
    return tuple(dict.fromkeys(filter(_is_tracker, texts)))


class _MalformedError(Exception):
    pass


def _metainfo(info: dict[bytes, Any], infohash: str) -> Metainfo:
    name = _text(_entry(info, b"name", bytes))
    piece_length = _entry(info, b"piece length", int)
    if b"pieces" not in info:
        raise _MalformedError("has no v1 pieces")
    hashes = _entry(info, b"pieces", bytes)
    if not _SMALLEST_PIECE <= piece_length <= _LARGEST_PIECE:
        raise _MalformedError(f"has pieces of {piece_length} bytes")
    if b"length" in info and b"files" in info:
        raise _MalformedError("is of one file and of several")
    _refuse_hidden(info.get(b"file tree"))
    files = tuple(_files(info, name))
    total = sum(file.length for file in files)
    wanted = -(-total // piece_length)
    if total == 0 or len(hashes) != 20 * wanted or wanted > _MOST_PIECES:
        raise _MalformedError(f"has {len(hashes) / 20:g} piece hashes for {wanted} pieces")
    _refuse_clashes(files)
    return Metainfo(
        infohash=infohash,
        name=name,
        piece_length=piece_length,
        piece_hashes=hashes,
        files=files,
    )


def _files(info: dict[bytes, Any], name: str) -> Iterator[TorrentFile]:
    if b"length" in info:
        entries: list[Any] = [{**info, b"path": [name.encode()]}]
    else:
        entries = _entry(info, b"files", list)
    if not 1 <= len(entries) <= _MOST_FILES:
        raise _MalformedError(f"has {len(entries)} files")
    offset = 0
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _MalformedError("has a file that is no dictionary")
        length = _entry(entry, b"length", int)
        parts = _entry(entry, b"path", list)
        if not 0 <= length < 2**53 or not 1 <= len(parts) <= _MOST_DEPTH:
            raise _MalformedError(f"has a file of {length} bytes, {len(parts)} folders deep")
        attributes = entry.get(b"attr", b"")
        if not isinstance(attributes, bytes):
            raise _MalformedError("has file attributes that are no text")
        path = tuple(_safe_part(part) for part in parts)
        is_pad = b"p" in attributes or path[-1].startswith("_____padding_file_")
        if b"l" in attributes or b"symlink path" in entry:
            raise _MalformedError(f"{'/'.join(path)} is a symbolic link")
        if b"x" in attributes:
            raise _MalformedError(f"{'/'.join(path)} is executable")
        yield TorrentFile(index=index, path=path, length=length, offset=offset, is_pad=is_pad)
        offset += length


def _refuse_hidden(tree: object) -> None:
    """Refuse links and executables in a v2 file tree: libtorrent follows it where there is one."""
    if not isinstance(tree, dict):
        return
    attributes = tree.get(b"attr")
    if b"symlink path" in tree or (isinstance(attributes, bytes) and set(attributes) & set(b"lx")):
        raise _MalformedError("has a symbolic link or an executable in its v2 file tree")
    for branch in tree.values():
        _refuse_hidden(branch)


def _safe_part(part: object) -> str:
    if not isinstance(part, bytes):
        raise _MalformedError("has a file name that is no text")
    text = _text(part)
    harmless = (
        text == printable(text, limit=10_000)
        and text not in {"", ".", ".."}
        and not set(text) & set("/\\")
        and len(part) <= 240  # noqa: PLR2004 (file systems allow 255 bytes)
        and text == text.strip()
    )
    if not harmless:
        raise _MalformedError(f"has the file name {printable(text)!r}")
    return text


def _refuse_clashes(files: Sequence[TorrentFile]) -> None:
    names = [tuple(part.casefold() for part in file.path) for file in files if not file.is_pad]
    folders = {name[:depth] for name in names for depth in range(1, len(name))}
    if len(set(names)) != len(names) or folders & set(names):
        raise _MalformedError("names a file twice")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _MalformedError("has a name that is no UTF-8") from None


def _entry(values: Any, key: bytes, kind: type) -> Any:
    value = values.get(key) if isinstance(values, dict) else None
    if type(value) is not kind:
        raise _MalformedError(f"has no {key.decode()} or one of the wrong type")
    return value


def _encode(value: object) -> Iterator[bytes]:
    match value:
        case bytes():
            yield b"%d:%s" % (len(value), value)
        case int():
            yield b"i%de" % value
        case list():
            yield b"l"
            for item in value:
                yield from _encode(item)
            yield b"e"
        case dict():
            yield b"d"
            for key in sorted(value):
                yield from _encode(key)
                yield from _encode(value[key])
            yield b"e"
        case _:
            raise TypeError(value)


def _decode(data: bytes) -> tuple[dict[bytes, Any], dict[bytes, tuple[int, int]]]:
    """Decode a bencoded dictionary, strictly, and tell where each of its values lies."""
    decoder = _Decoder(data)
    top = decoder.value(0)
    if not isinstance(top, dict) or decoder.position != len(data):
        raise _MalformedError("is no bencoded dictionary")
    return top, decoder.top_spans


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.values = 0
        self.top_spans: dict[bytes, tuple[int, int]] = {}

    def value(self, depth: int) -> Any:
        self.values += 1
        if self.values > _MOST_VALUES:
            raise _MalformedError(f"has more than {_MOST_VALUES} values")
        if depth > _MOST_DEPTH:
            raise _MalformedError("is nested too deeply")
        match self.data[self.position : self.position + 1]:
            case b"i":
                return self.integer()
            case b"l":
                return self.list(depth)
            case b"d":
                return self.dictionary(depth)
            case _:
                return self.string()

    def integer(self) -> int:
        match = re.compile(rb"i(0|-?[1-9][0-9]{0,18})e").match(self.data, self.position)
        if match is None:
            raise _MalformedError(f"has a bad number at byte {self.position}")
        self.position = match.end()
        return int(match[1])

    def string(self) -> bytes:
        match = re.compile(rb"(0|[1-9][0-9]{0,9}):").match(self.data, self.position)
        if match is None or match.end() + int(match[1]) > len(self.data):
            raise _MalformedError(f"has a bad string at byte {self.position}")
        self.position = match.end() + int(match[1])
        return self.data[match.end() : self.position]

    def list(self, depth: int) -> list[Any]:
        self.position += 1
        items = []
        while not self.at_end():
            items.append(self.value(depth + 1))
        return items

    def dictionary(self, depth: int) -> dict[bytes, Any]:
        self.position += 1
        values: dict[bytes, Any] = {}
        while not self.at_end():
            key = self.string()
            if key in values:
                raise _MalformedError("has a key twice")
            start = self.position
            values[key] = self.value(depth + 1)
            if depth == 0:
                self.top_spans[key] = (start, self.position)
        return values

    def at_end(self) -> bool:
        if self.position >= len(self.data):
            raise _MalformedError("ends early")
        if self.data[self.position : self.position + 1] == b"e":
            self.position += 1
            return True
        return False
