"""The source of a download and its options, parsed and checked."""

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
    parse_metainfo,
    torrent_bytes,
    trackers_of,
)
from grokctl.checkpoint.trust import (
    GROK_1_INFOHASH,
    GROK_1_TOKENIZER_SHA256,
    TYPED,
    torrent_file,
)
from grokctl.errors import FetchError, UsageError, invalid
from grokctl.os_errors import reason_of, refusal
from grokctl.paths import TORRENT, expanded
from grokctl.text import printable, shown_host, shown_url


@dataclass(frozen=True, slots=True)
class Mirror:
    """A folder on the web that holds a release's files under their own names."""

    name: str
    url: str
    """Ends with a slash; `ckpt-0/tensor00000_000` follows."""

    @classmethod
    def at(cls, url: str) -> Self:
        """A mirror named after its host."""
        parts = urlsplit(url)
        name = shown_host(parts.hostname or "")
        return cls(f"{name}:{parts.port}" if parts.port else name or shown_url(url), url)


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file on the web with a known hash."""

    url: str
    nbytes: int
    sha256: str

    def refuse_other(self, data: bytes | bytearray, name: str) -> None:
        """Refuse any other content.

        Raises:
            FetchError: The data has a different hash.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != self.sha256:
            raise FetchError(
                f"{name}: expected {self.nbytes:,} bytes with sha256 {self.sha256}, "
                f"found {len(data):,} with {sha256}"
            )


GROK_1: Final = "grok-1"
"""The built-in source."""
_HUB_FOLDER: Final = "/xai-org/grok-1/resolve/main/"
MIRRORS: Final = {"hf": Mirror("hf", f"https://huggingface.co{_HUB_FOLDER}")}
"""Built-in mirrors. Every piece from them is proven against the infohash."""
GROK_1_TOKENIZER: Final = PinnedFile(
    url=(
        "https://raw.githubusercontent.com/xai-org/grok-1/"
        "7050ed204b8206bb8645c7b7bbef7252f79561b0/tokenizer.model"
    ),
    nbytes=2_229_219,
    sha256=GROK_1_TOKENIZER_SHA256,
)
"""As published with the reference code; the magnet's torrent may not contain it."""
Endpoint = tuple[str, int]
"""Host or address, and port."""
_PLAIN: Final = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Options of a download.

    Raises:
        InvalidValueError: A value is invalid.
    """

    peers: tuple[str, ...] = ()
    """`HOST:PORT` of peers that have the files; `[ADDRESS]:PORT` for IPv6."""
    trackers: tuple[str, ...] = ()
    """Announce URLs in addition to the source's own."""
    web_seeds: tuple[str, ...] = ()
    """BEP 19 URLs. Web seeds in a magnet or torrent are dropped."""
    mirrors: tuple[str, ...] = ()
    """`hf`, or the http address of a folder that holds `ckpt-0`."""
    hub: str | None = None
    """Address of Grok-1's folder at a hub, to be asked where no peer sends the metadata."""
    torrent_file: Path | None = None
    """The source's torrent, when no peer sends the metadata."""
    tokenizer: Path | None = None
    """A `tokenizer.model` to use instead of downloading Grok-1's."""
    only: tuple[str, ...] = ()
    """Globs on a file's path in the release, or on its last part."""
    layers: frozenset[int] | None = None
    """Decoder layers to download, in addition to the matches of `only`."""
    max_download: int | None = None
    """Bytes per second."""
    max_upload: int | None = None
    """Bytes per second."""
    connections: int | None = None
    """Peers at a time, at most."""
    port: int | None = None
    """To listen on; 0 means any free port."""
    bind: str | None = None
    """The only local address to use."""
    proxy: str | None = None
    """`socks5://user:password@host:port` or `http://…`; disables DHT, LSD and listening."""
    dht: bool = True
    lsd: bool = True
    source_trackers: bool = True
    """Whether to ask the source's own trackers. Those of `trackers` are asked in any case."""
    seed: bool = False
    """Whether to upload after completion, until interrupted."""
    seed_ratio: float | None = None
    """Upload after completion until this multiple of the wanted bytes has been sent."""
    stall_timeout_s: float = 300.0
    force: bool = False
    """Adopt a non-empty folder that grokctl did not create."""

    def __post_init__(self) -> None:
        self._check_addresses()
        if self.port is not None and not 0 <= self.port < 2**16:
            raise invalid("port", self.port, "expected 0 to 65535")
        for name in ("max_download", "max_upload", "connections", "seed_ratio", "stall_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise invalid(name, value, "expected more than 0")
        if not all(self.only):
            raise invalid("only", "", "expected a pattern that is not empty")

    @property
    def is_local(self) -> bool:
        """Whether it can reach nothing but this machine."""
        return is_loopback(self.bind or "") and self.proxy is None

    @property
    def has_no_udp(self) -> bool:
        """Whether all traffic goes through a proxy that carries TCP alone."""
        return self.proxy is not None and urlsplit(self.proxy.strip()).scheme.lower() == "http"

    def asked(self, source: Iterable[str]) -> tuple[str, ...]:
        """The trackers to ask: of the source, as far as allowed and reachable, and our own.

        No UDP goes through an HTTP proxy: a look at such a tracker's name would be all that it
        gets, from here.
        """
        urls = source if self.source_trackers else ()
        reachable = (
            url
            for url in urls
            if (not self.is_local or is_loopback(urlsplit(url).hostname or ""))
            and not (self.has_no_udp and _is_udp(url))
        )
        return tuple(dict.fromkeys([*reachable, *self.trackers]))

    def _check_addresses(self) -> None:
        for peer in self.peers:
            host, _ = parse_endpoint(peer)
            if self.proxy is not None and not _is_address(host):
                raise invalid("peer", peer, "expected an IP address, because a proxy is used")
        for url in self.trackers:
            schemes = {"http", "https"} if self.has_no_udp else {"http", "https", "udp"}
            _expect_url("tracker", url, schemes)
        for url in self.web_seeds:
            _expect_url("web_seed", url, {"http", "https"})
        for name in self.mirrors:
            if name not in MIRRORS:
                _expect_url("mirror", name, {"http", "https"}, or_one_of=MIRRORS)
                if set(name) & set("?#"):
                    raise invalid("mirror", shown_url(name), "expected a folder, without ? and #")
        if self.proxy is not None:
            _expect_url("proxy", self.proxy, {"socks5", "socks5h", "http"}, needs_port=True)
        if self.bind is not None and not _is_address(self.bind):
            raise invalid("bind", self.bind, "expected an IP address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A source as the user named it, parsed; nothing was requested from it yet."""

    source: str
    infohash: str
    name: str
    trackers: tuple[str, ...]
    torrent: bytes | None = None
    trust: str = TYPED
    """The root of trust, in words."""
    v2_infohash: str = ""
    """The second infohash of a magnet link, which the metadata must have as well."""

    @property
    def shown(self) -> str:
        """The source for messages and hints, without credentials."""
        return shown_url(self.source) if self.torrent is None else self.source

    @property
    def tokenizer(self) -> PinnedFile | None:
        """The tokenizer of the release, if it is known: Grok-1's."""
        return GROK_1_TOKENIZER if self.infohash == GROK_1_INFOHASH else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """A download as the user asked for it."""

    origin: Origin
    root: Path
    """The release's folder."""
    options: FetchOptions

    @property
    def trackers(self) -> tuple[str, ...]:
        """Announce URLs to ask, of the source and of the options."""
        return self.options.asked(self.origin.trackers)

    @property
    def trust(self) -> str | None:
        """The root of trust that the user named; None for the torrent that lies in the folder."""
        own = self.root / TORRENT
        is_file = self.origin.torrent is not None and own.is_file()
        is_own = is_file and expanded(self.origin.source).samefile(own)
        return None if is_own else self.origin.trust


def parse_source(source: str) -> Origin:
    """Read `grok-1`, a magnet link or the path of a `.torrent` file.

    Raises:
        UsageError: It is none of these.
        FetchError: It is malformed.
    """
    if source == GROK_1 or source.startswith("magnet:"):
        magnet = parse_magnet(GROK_1_MAGNET if source == GROK_1 else source)
        if len(magnet.infohash) != len(GROK_1_INFOHASH):
            raise FetchError(
                f"magnet link {printable(shown_url(source))!r}: has only a v2 infohash, and peers "
                "send no piece hashes for those",
                "grokctl fetch FILE.torrent",
            )
        return Origin(
            source=source,
            infohash=magnet.infohash,
            name=magnet.name,
            trackers=plain_urls(magnet.trackers),
            v2_infohash=magnet.v2_infohash,
        )
    path = expanded(source)
    if not path.is_file():
        raise UsageError(
            f"source {printable(shown_url(source))!r}: expected {GROK_1}, a magnet link or a "
            ".torrent file",
            f"grokctl fetch {GROK_1}",
        )
    try:
        torrent = torrent_bytes(path)
        metainfo = parse_metainfo(torrent, source=path.name)
    except OSError as error:
        raise refusal(error, path, kind=FetchError) from error
    return Origin(
        source=source,
        infohash=metainfo.infohash,
        name=metainfo.name,
        trackers=plain_urls(trackers_of(torrent)),
        torrent=torrent,
        trust=torrent_file(path, torrent),
    )


def parse_endpoint(peer: str) -> Endpoint:
    """Read `HOST:PORT`, or `[ADDRESS]:PORT` for IPv6.

    Raises:
        InvalidValueError: It is something else.
    """
    with suppress(ValueError):
        parts = urlsplit(f"//{peer}")
        if parts.hostname and parts.port and parts.netloc == peer and not parts.username:
            return parts.hostname, parts.port
    raise invalid("peer", shown_url(peer), "expected HOST:PORT", "--peer 203.0.113.7:6881")


def find_mirror(name: str) -> Mirror:
    """A built-in mirror by its name, or the mirror at an address."""
    return MIRRORS.get(name) or Mirror.at(name if name.endswith("/") else f"{name}/")


def hub_mirror(endpoint: str) -> str | None:
    """The folder of Grok-1 at another address of the hub; None if that is no address."""
    try:
        _expect_url("mirror", endpoint, {"http", "https"})
    except UsageError:
        return None
    parts = urlsplit(endpoint)
    return None if parts.query or parts.fragment else f"{endpoint}{_HUB_FOLDER}"


def resolve(peers: Sequence[Endpoint]) -> list[Endpoint]:
    """The IP addresses of peers.

    Raises:
        FetchError: A host name does not resolve.
    """
    endpoints = []
    for host, port in peers:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise FetchError(f"peer {host}:{port}: {reason_of(error)}") from error
        except UnicodeError as error:
            raise FetchError(f"peer {host}:{port}: is not a valid host name") from error
        endpoints += [(str(address[0]), port) for *_, address in answers]
    return list(dict.fromkeys(endpoints))


def plain_urls(urls: Iterable[str]) -> tuple[str, ...]:
    """URLs that cannot smuggle a second line into a request."""
    return tuple(url for url in urls if _PLAIN.fullmatch(url))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_udp(url: str) -> bool:
    return urlsplit(url.strip()).scheme.lower() == "udp"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _expect_url(
    field: str,
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
    problem = f"expected {names}{' or '.join(sorted(schemes))}://host{port}"
    raise invalid(field, shown_url(url), problem)
