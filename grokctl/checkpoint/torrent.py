"""Torrents and magnet links as values: metainfo, and pieces <-> files; no libtorrent."""

import base64
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from grokctl.checkpoint.bencode import MalformedError, decode, encode
from grokctl.checkpoint.hashtree import Hasher, TreeHasher
from grokctl.checkpoint.torrent_files import (
    HUB,
    MOST_DEPTH,
    V2,
    TorrentFile,
    entry_of,
    has_tree,
    is_same_list,
    list_files,
    padded_files,
    refuse_clashes,
    refuse_count,
    text_of,
    tree_hashes,
    tree_leaves,
)
from grokctl.errors import FetchError
from grokctl.os_errors import TooLargeError
from grokctl.paths import read_limited, write_atomically
from grokctl.text import has_secret, printable, shown_url

GROK_1_MAGNET: Final = (
    "magnet:?xt=urn:btih:5f96d43576e3d386c9ba65b883210a393b68210e&dn=grok-1"
    "&tr=https%3A%2F%2Facademictorrents.com%2Fannounce.php"
    "&tr=udp%3A%2F%2Ftracker.coppersurfer.tk%3A6969"
    "&tr=udp%3A%2F%2Ftracker.opentrackr.org%3A1337%2Fannounce"
)
"""As published with the reference code; its infohash is the root of trust."""

_MOST_METAINFO = 32 * 2**20
_MOST_PIECES = 2**20
_MOST_TRACKERS = 200
_LONGEST_NAME, _LONGEST_TRACKER = 1000, 2000
_SMALLEST_PIECE, _LARGEST_PIECE = 2**14, 2**28
_V1_DIGITS = 40
_TRACKER_SCHEMES = frozenset({"http", "https", "udp"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Metainfo:
    """The files and hashes of a torrent: v1 pieces or, without those, v2 hash trees (BEP 52).

    In v2 every file begins with a new piece. The pads between files are listed like files, as
    libtorrent counts them too, but no piece covers them.
    """

    version: int = 1
    """`V2` for a torrent without v1 pieces; a hybrid torrent is proven by its v1 pieces. `HUB` for
    the files of a hub, whose pieces are ranges with plain SHA-256 hashes."""
    infohash: str
    """The hash of the info dictionary in hexadecimal: SHA-1, or SHA-256 in v2. Of a hub, the
    SHA-256 of what it promises."""
    name: str
    piece_length: int
    piece_hashes: bytes
    """SHA-1 of every piece, 20 bytes each; in v2 the root of its hash tree, 32 bytes. Of a hub,
    SHA-256; zeros for a range whose hash nobody knows yet."""
    files: tuple[TorrentFile, ...]

    @property
    def total(self) -> int:
        """Bytes of all files, pads included."""
        last = self.files[-1]
        return last.offset + last.length

    @property
    def num_pieces(self) -> int:
        """The number of pieces."""
        return len(self.piece_hashes) // self._hash_nbytes

    @property
    def _hash_nbytes(self) -> int:
        return 32 if self._is_aligned else 20

    @property
    def _is_aligned(self) -> bool:
        """Whether every file begins with a new piece."""
        return self.version in {V2, HUB}

    def piece_hash(self, piece: int) -> bytes:
        """The hash of a piece, to compare with the digest of a `hasher`."""
        start = self._hash_nbytes * piece
        return self.piece_hashes[start : start + self._hash_nbytes]

    def promises(self, piece: int) -> bool:
        """Whether the hash of a piece is known before it arrives: always, but for a hub."""
        return self.version != HUB or any(self.piece_hash(piece))

    def hasher(self) -> Hasher:
        """Begin the hash of a piece."""
        if self.version == V2:
            return TreeHasher(self.piece_length)
        if self.version == HUB:
            return hashlib.sha256()
        return hashlib.sha1(usedforsecurity=False)

    def piece_size(self, piece: int) -> int:
        """Bytes of a piece: the last one is shorter; in v2, the last one of every file."""
        start = piece * self.piece_length
        end = self.total
        if self._is_aligned:
            file = self.files[self._file_at(start)]
            end = file.offset + file.length
        return min(self.piece_length, end - start)

    def spans(self, piece: int) -> list[tuple[TorrentFile, int, int]]:
        """The bytes that a piece covers: `(file, offset in the file, length)`, none empty."""
        start = piece * self.piece_length
        end = start + self.piece_size(piece)
        spans = []
        for file in islice(self.files, self._file_at(start), None):
            if file.offset >= end:
                break
            low, high = max(start, file.offset), min(end, file.offset + file.length)
            if low < high:
                spans.append((file, low - file.offset, high - low))
        return spans

    def pieces_of(self, file: TorrentFile) -> range:
        """The pieces that touch a file."""
        if file.length == 0 or (file.is_pad and self._is_aligned):
            return range(0)
        first = file.offset // self.piece_length
        return range(first, (file.offset + file.length - 1) // self.piece_length + 1)

    def _file_at(self, start: int) -> int:
        """Index of the file that contains a byte."""
        return bisect_right(self.files, start, key=lambda file: file.offset) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnet:
    """A magnet link without the parts that an untrusted link may not set: peers and web seeds."""

    infohash: str
    """40 hexadecimal digits, or 64 without a v1 infohash."""
    name: str
    """For display; never a path."""
    trackers: tuple[str, ...]
    v2_infohash: str = ""
    """The second infohash of a hybrid torrent; empty if the link has only one."""

    def __str__(self) -> str:
        names = f"&dn={quote(self.name)}" if self.name else ""
        trackers = "".join(f"&tr={quote(url, safe='')}" for url in self.trackers)
        topic = "btih:" if len(self.infohash) == _V1_DIGITS else "btmh:1220"
        second = f"&xt=urn:btmh:1220{self.v2_infohash}" if self.v2_infohash else ""
        return f"magnet:?xt=urn:{topic}{self.infohash}{second}{names}{trackers}"


def parse_magnet(link: str) -> Magnet:
    """Read an untrusted magnet link.

    Peers (`x.pe`) and web seeds (`ws`) in it are dropped: the author of the link could make this
    machine connect to any host. The user can name them with `--peer` and `--web-seed`.

    Of a hybrid torrent, the v1 infohash names it, and its metadata must have the v2 one as well.

    Raises:
        FetchError: It does not have exactly one infohash.
    """
    try:
        parts = urlsplit(link)
        values = parse_qsl(parts.query, max_num_fields=1000) if parts.scheme == "magnet" else []
    except ValueError:
        values = []
    topics = [value for key, value in values if key == "xt"]
    first = [infohash for topic in topics if (infohash := _v1_infohash(topic))]
    second = [infohash for topic in topics if (infohash := _v2_infohash(topic))]
    infohashes = first or second
    if len(infohashes) != 1 or len(second) > 1:
        raise FetchError(
            f"magnet link {printable(shown_url(link))!r}: expected one BitTorrent infohash, "
            f"found {max(len(infohashes), len(second)) or 'none'}",
            "grokctl fetch 'magnet:?xt=urn:btih:…'  # in quotes, because of the &",
        )
    return Magnet(
        infohash=infohashes[0],
        name=printable(next((value for key, value in values if key == "dn"), "")),
        trackers=_trackers(value for key, value in values if key == "tr"),
        v2_infohash="".join(second) if first else "",
    )


def _trackers(urls: Iterable[str]) -> tuple[str, ...]:
    """The first announce URLs whose scheme is http, https or udp: each is looked up and asked."""
    return tuple(islice(dict.fromkeys(filter(_is_tracker, urls)), _MOST_TRACKERS))


def _is_tracker(url: str) -> bool:
    if len(url) > _LONGEST_TRACKER:
        return False
    try:
        parts = urlsplit(url)
        return bool(
            re.fullmatch("[!-~]+", url) and parts.scheme in _TRACKER_SCHEMES and parts.hostname
        )
    except ValueError:
        return False


def _v1_infohash(topic: str) -> str:
    """The v1 infohash of a magnet's exact topic in hexadecimal; empty for any other topic."""
    if match := re.fullmatch(r"urn:btih:([0-9a-fA-F]{40})", topic):
        return match[1].lower()
    if match := re.fullmatch(r"urn:btih:([A-Za-z2-7]{32})", topic):
        return base64.b32decode(match[1].upper()).hex()
    return ""


def _v2_infohash(topic: str) -> str:
    match = re.fullmatch(r"urn:btmh:1220([0-9a-fA-F]{64})", topic)
    return match[1].lower() if match else ""


def folder_name(name: str, infohash: str) -> str:
    """A safe folder name for a download: its own name if that is safe, else from the infohash."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) else infohash[:16]


def read_metainfo(path: Path) -> Metainfo:
    """Read a `.torrent` file; see `parse_metainfo`."""
    return parse_metainfo(torrent_bytes(path), source=path.name)


def torrent_bytes(path: Path) -> bytes:
    """The bytes of a `.torrent` file.

    Raises:
        FetchError: It is too large for a torrent.
        OSError: It cannot be read.
    """
    try:
        return read_limited(path, _MOST_METAINFO)
    except TooLargeError as error:
        raise FetchError(f"{path.name}: no torrent, {error.strerror}") from error


def parse_metainfo(data: bytes, *, source: str) -> Metainfo:
    """Read untrusted metainfo.

    Args:
        data: A bencoded torrent.
        source: Name for errors.

    Raises:
        FetchError: It is malformed, contradicts itself, is larger than any release, has no hash
            for some piece, or contains a link, an executable or a path that leaves its folder.
    """
    try:
        return _parsed(data)
    except MalformedError as error:
        raise _invalid(source, error) from error


def build_metainfo(
    root: Path, files: Sequence[str], *, name: str, piece_length: int, trackers: Sequence[str] = ()
) -> bytes:
    """Make a v1 torrent of existing files.

    Args:
        root: The folder that the file names are relative to.
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
    return encode(top)


def trackers_of(data: bytes) -> tuple[str, ...]:
    """The announce URLs of a torrent whose scheme is http, https or udp, 200 at most."""
    try:
        top, _ = _decoded(data)
    except MalformedError as error:
        raise _invalid("torrent", error) from error
    tiers = top.get(b"announce-list")
    tiers = tiers if isinstance(tiers, list) else []
    urls = [top.get(b"announce")]
    urls += [url for tier in tiers if isinstance(tier, list) for url in tier]
    texts = [url.decode("utf-8", "replace") for url in urls if isinstance(url, bytes)]
    return _trackers(texts)


def write_torrent(path: Path, data: bytes) -> None:
    """Keep a torrent; for this user alone, if a tracker or a web seed in it has a passkey.

    Raises:
        OSError: It cannot be written.
    """
    try:
        top, _ = _decoded(data)
    except MalformedError:
        top = {}
    others = [top.get(key) for key in (b"announce", b"announce-list", b"url-list", b"httpseeds")]
    is_private = any(has_secret(text) for text in _texts(others))
    write_atomically(path, data, mode=0o600 if is_private else 0o666)


def _texts(value: object) -> Iterator[str]:
    """The texts of a bencoded value, at any depth."""
    if isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def raw_values(data: bytes) -> dict[bytes, bytes]:
    """The raw values of a torrent's top level: encoding them again could change them.

    Raises:
        FetchError: It is not a torrent.
    """
    try:
        _, spans = _decoded(data)
    except MalformedError as error:
        raise _invalid("torrent", error) from error
    return {key: data[start:end] for key, (start, end) in spans.items()}


@lru_cache(maxsize=1)
def _decoded(data: bytes) -> tuple[dict[bytes, Any], dict[bytes, tuple[int, int]]]:
    """A torrent's values, kept because several functions look at the same torrent."""
    return decode(data, most_depth=MOST_DEPTH)


@lru_cache(maxsize=1)
def _parsed(data: bytes) -> Metainfo:
    """The last torrent, kept: a fetch comes from the source to its files by way of several."""
    top, spans = _decoded(data)
    info = entry_of(top, b"info", dict)
    start, end = spans[b"info"]
    return _metainfo(info, data[start:end], top.get(b"piece layers", {}))


def _invalid(source: str, error: MalformedError) -> FetchError:
    hint = "grokctl fetch grok-1  # its magnet link is built in"
    return FetchError(f"{source}: invalid torrent: {error}", hint)


def _metainfo(info: dict[bytes, Any], raw: bytes, layers: Any) -> Metainfo:
    name = text_of(entry_of(info, b"name", bytes))
    if len(name) > _LONGEST_NAME:
        raise MalformedError(f"has a name of {len(name):,} characters")
    piece_length = entry_of(info, b"piece length", int)
    if not _SMALLEST_PIECE <= piece_length <= _LARGEST_PIECE:
        raise MalformedError(f"has pieces of {piece_length} bytes")
    is_tree = has_tree(info)
    if is_tree and piece_length.bit_count() != 1:
        raise MalformedError(f"has v2 pieces of {piece_length} bytes, which is not a power of two")
    leaves = list(tree_leaves(info[b"file tree"], ())) if is_tree else []
    padded = tuple(padded_files(leaves, piece_length))
    if is_tree and b"pieces" not in info:
        if b"length" in info or b"files" in info:
            raise MalformedError("has v1 files without v1 pieces")
        _refuse_sizes(padded, piece_length)
        return Metainfo(
            version=V2,
            infohash=hashlib.sha256(raw).hexdigest(),
            name=name,
            piece_length=piece_length,
            piece_hashes=tree_hashes(leaves, layers, piece_length),
            files=padded,
        )
    hashes = entry_of(info, b"pieces", bytes)
    if b"length" in info and b"files" in info:
        raise MalformedError("has both a length and a list of files")
    files = tuple(list_files(info, name))
    wanted = _refuse_sizes(files, piece_length)
    if len(hashes) != 20 * wanted:
        raise MalformedError(f"has {len(hashes) / 20:g} piece hashes for {wanted} pieces")
    if is_tree and not (padded and is_same_list(files, padded)):
        raise MalformedError("has different files in its v2 file tree and its v1 list")
    return Metainfo(
        infohash=hashlib.sha1(raw, usedforsecurity=False).hexdigest(),
        name=name,
        piece_length=piece_length,
        piece_hashes=hashes,
        files=files,
    )


def _refuse_sizes(files: Sequence[TorrentFile], piece_length: int) -> int:
    """Refuse sizes that no release has; return the number of pieces."""
    refuse_count(len(files))
    total = files[-1].offset + files[-1].length
    pieces = -(-total // piece_length)
    if not 1 <= pieces <= _MOST_PIECES:
        raise MalformedError(f"has {pieces} pieces")
    refuse_clashes(files)
    return pieces
