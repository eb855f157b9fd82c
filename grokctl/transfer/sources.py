"""What a download is told: where it comes from, and how to get it."""

import hashlib
import ipaddress
import re
import socket
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from grokctl.checkpoint.torrent import (
    GROK_1_MAGNET,
    parse_magnet,
    read_metainfo,
    trackers_of,
)
from grokctl.errors import FetchError, UsageError
from grokctl.os_errors import refusal
from grokctl.text import printable


@dataclass(frozen=True, slots=True)
class Mirror:
    """A place on the web that holds a release's files under their own names."""

    name: str
    url: str
    """Ends with a slash; `ckpt-0/tensor00000_000` follows."""

    @classmethod
    def at(cls, url: str) -> Self:
        """A mirror that is known by its address."""
        parts = urlsplit(url)
        return cls(f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or url, url)


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file on the web whose content is known beforehand."""

    url: str
    nbytes: int
    sha256: str

    def refuse_other(self, data: bytes | bytearray, name: str) -> None:
        """Take no other content for it.

        Raises:
            FetchError: The data is something else.
        """
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise FetchError(
                f"{name}: expected {self.nbytes:,} bytes with sha256 {self.sha256}, "
                f"found {len(data):,} with {found}"
            )


GROK_1: Final = "grok-1"
"""The source that is built in."""
MIRRORS: Final = {"hf": Mirror("hf", "https://huggingface.co/xai-org/grok-1/resolve/main/")}
"""Mirrors that are built in. What they send is proven against the infohash, piece by piece."""
GROK_1_TOKENIZER: Final = PinnedFile(
    url=(
        "https://raw.githubusercontent.com/xai-org/grok-1/"
        "7050ed204b8206bb8645c7b7bbef7252f79561b0/tokenizer.model"
    ),
    nbytes=2_229_219,
    sha256="5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f",
)
"""As published with the reference code; the magnet's torrent is not known to hold it."""
Endpoint = tuple[str, int]
"""Host or address, and port."""
_GROK_1_INFOHASH: Final = parse_magnet(GROK_1_MAGNET).infohash
_PLAIN: Final = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """How to download.

    Raises:
        UsageError: A value cannot be meant.
    """

    peers: tuple[str, ...] = ()
    """`HOST:PORT` of people who have it; `[ADDRESS]:PORT` for IPv6."""
    trackers: tuple[str, ...] = ()
    """Announce URLs beside the source's own."""
    web_seeds: tuple[str, ...] = ()
    """BEP 19 URLs. Those that a magnet or torrent brings along are dropped."""
    mirrors: tuple[str, ...] = ()
    """`hf`, or the http address of a folder that holds `ckpt-0`."""
    torrent_file: Path | None = None
    """The torrent, where the swarm cannot be asked for it; it must be the one that is meant."""
    tokenizer: Path | None = None
    """A `tokenizer.model` to put beside `ckpt-0`, instead of fetching Grok-1's."""
    only: tuple[str, ...] = ()
    """Globs on a file's path in the release, or on its last part."""
    layers: frozenset[int] | None = None
    """Decoder layers whose tensors are wanted, beside what `only` matches."""
    max_download: int | None = None
    """Bytes per second."""
    max_upload: int | None = None
    """Bytes per second."""
    connections: int | None = None
    port: int | None = None
    """To listen on; 0 is any free one."""
    bind: str | None = None
    """The only local address to use."""
    proxy: str | None = None
    """`socks5://user:password@host:port` or `http://…`; turns DHT, LSD and incoming off."""
    dht: bool = True
    lsd: bool = True
    seed: bool = False
    """Whether to upload after completion, until interrupted."""
    seed_ratio: float | None = None
    """Upload after completion until this multiple of the wanted bytes was sent."""
    stall_timeout_s: float = 300.0
    recheck: bool = False
    """Hash what lies on disk instead of believing resume data; then fetch only bad pieces."""
    force: bool = False
    """Adopt a non-empty folder that grokctl did not make."""

    def __post_init__(self) -> None:
        self._check_addresses()
        if self.port is not None and not 0 <= self.port < 2**16:
            raise UsageError(f"port {self.port}: expected 0 to 65535")
        for name in ("max_download", "max_upload", "connections", "seed_ratio", "stall_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} {value}: expected more than 0")
        if not all(self.only):
            raise UsageError("only: an empty pattern names no file")

    def _check_addresses(self) -> None:
        for peer in self.peers:
            host, _ = endpoint(peer)
            if self.proxy is not None and not _is_address(host):
                raise UsageError(f"peer {peer}: a name, expected an address when a proxy is used")
        for url in self.trackers:
            _expect_url("tracker", url, {"http", "https", "udp"})
        for url in self.web_seeds:
            _expect_url("web seed", url, {"http", "https"})
        for name in self.mirrors:
            if name not in MIRRORS:
                _expect_url("mirror", name, {"http", "https"}, or_one_of=MIRRORS)
                if set(name) & set("?#"):
                    raise UsageError(f"mirror {name!r}: expected a folder, without ? and #")
        if self.proxy is not None:
            _expect_url("proxy", self.proxy, {"socks5", "socks5h", "http"}, needs_port=True)
        if self.bind is not None and not _is_address(self.bind):
            raise UsageError(f"bind address {self.bind!r}: expected an IP address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a source says before anybody is asked."""

    source: str
    infohash: str
    name: str
    trackers: tuple[str, ...]
    torrent: bytes | None = None

    @property
    def tokenizer(self) -> PinnedFile | None:
        """The tokenizer that belongs to it, where that is known: Grok-1's."""
        return GROK_1_TOKENIZER if self.infohash == _GROK_1_INFOHASH else None


def endpoint(peer: str) -> Endpoint:
    """Read `HOST:PORT`, or `[ADDRESS]:PORT` for IPv6.

    Raises:
        UsageError: It is something else.
    """
    with suppress(ValueError):
        parts = urlsplit(f"//{peer}")
        if parts.hostname and parts.port and parts.netloc == peer and not parts.username:
            return parts.hostname, parts.port
    raise UsageError(f"peer {peer!r}: expected HOST:PORT", "--peer 203.0.113.7:6881")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def mirror(name: str) -> Mirror:
    """The mirror that is built in under a name, or lies at an address."""
    return MIRRORS.get(name) or Mirror.at(name if name.endswith("/") else f"{name}/")


def _expect_url(
    what: str,
    url: str,
    schemes: set[str],
    *,
    needs_port: bool = False,
    or_one_of: Collection[str] = (),
) -> None:
    with suppress(ValueError):
        parts = urlsplit(url)
        has_host = parts.hostname and (parts.port or not needs_port)
        if parts.scheme in schemes and has_host and _PLAIN.fullmatch(url):
            return
    port = ":port" if needs_port else ""
    names = "".join(f"{name} or " for name in or_one_of)
    raise UsageError(f"{what} {url!r}: expected {names}{' or '.join(sorted(schemes))}://host{port}")


def read_source_argument(source: str) -> Origin:
    """Read `grok-1`, a magnet link or the path of a `.torrent` file.

    Raises:
        UsageError: It is none of these.
        FetchError: It is malformed.
    """
    if source == GROK_1 or source.startswith("magnet:"):
        magnet = parse_magnet(GROK_1_MAGNET if source == GROK_1 else source)
        if len(magnet.infohash) != len(_GROK_1_INFOHASH):
            raise FetchError(
                f"magnet link {printable(source)!r}: has only a v2 infohash, and peers send no "
                "piece hashes for that",
                "grokctl fetch FILE.torrent",
            )
        return Origin(
            source=source,
            infohash=magnet.infohash,
            name=magnet.name,
            trackers=plain(magnet.trackers),
        )
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"source {printable(source)!r}: expected {GROK_1}, a magnet link or a .torrent file",
            f"grokctl fetch {GROK_1}",
        )
    try:
        metainfo, torrent = read_metainfo(path), path.read_bytes()
    except OSError as error:
        raise refusal(error, path, kind=FetchError) from error
    return Origin(
        source=source,
        infohash=metainfo.infohash,
        name=metainfo.name,
        trackers=plain(trackers_of(torrent)),
        torrent=torrent,
    )


def plain(urls: Iterable[str]) -> tuple[str, ...]:
    """URLs that cannot smuggle a second line into a request."""
    return tuple(url for url in urls if _PLAIN.fullmatch(url))


def resolve(peers: Sequence[Endpoint]) -> list[Endpoint]:
    """Addresses of named peers.

    Raises:
        FetchError: A name has none.
    """
    found = []
    for host, port in peers:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "no computer has such a name"
            raise FetchError(f"peer {host}:{port}: {reason}") from error
        found += [(str(address[0]), port) for *_, address in answers]
    return list(dict.fromkeys(found))
