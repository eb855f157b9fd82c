"""Values that go into a swarm session, and the progress that comes out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grokctl.checkpoint.torrent import Metainfo
from grokctl.transfer.sources import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """How a session may use the network."""

    bind: str | None = None
    """The only local address to listen on and to connect from."""
    port: int | None = None
    """The only port to listen on; 0 means any free port, None prefers 6881."""
    proxy: str | None = None
    """`socks5://` or `http://` URL; all traffic goes through it, and nothing listens."""
    dht: bool = True
    lsd: bool = True
    connections: int | None = None
    """Peers at a time, at most."""
    allows_shared_addresses: bool = False
    """Whether several peers may have the same address."""
    keeps_seeders: bool = False
    """Whether to stay connected to seeders while mirrors bring everything: mirrors may fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Which parts of a torrent are on disk, by resume data or by a check."""

    have: frozenset[int] = frozenset()
    """Complete pieces."""
    unfinished: Mapping[int, list[bool]] = field(default_factory=dict)
    """Incomplete piece -> which of its blocks of 16 KiB are on disk."""
    uploaded: int = 0
    """Payload bytes sent in earlier sessions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A torrent to download or to seed, with our own path for each of its files."""

    metainfo: Metainfo
    torrent: bytes
    """Parsed as `metainfo`; trackers, web seeds and peers in it are ignored."""
    root: Path
    places: Mapping[int, str]
    """File index -> path below `root`; the torrent's own names are never used."""
    wanted: Collection[int]
    """Indices of the files to download."""
    trackers: Sequence[str] = ()
    web_seeds: Sequence[str] = ()
    peers: Sequence[Endpoint] = ()
    claims: Claims = field(default_factory=Claims)
    """Data on disk; libtorrent believes this and hashes nothing."""
    is_in_order: bool = False
    """Download the pieces in the order of the files, and what is no tensor first."""
    is_complete: bool = False
    """Seed only: trust every file until a peer requests a piece of it."""
    max_download: int | None = None
    """Bytes per second."""
    max_upload: int | None = None
    """Bytes per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The progress of a session at one moment."""

    done: int = 0
    """Wanted bytes on disk, in complete blocks."""
    downloaded: int = 0
    """Payload bytes received in this session, including wasted ones."""
    uploaded: int = 0
    """Payload bytes sent, in this and in earlier sessions."""
    rate: int = 0
    """Payload bytes received per second."""
    upload_rate: int = 0
    """Payload bytes sent per second."""
    peers: int = 0
    seeders: int = 0
    is_checking: bool = False
    """Whether libtorrent is still checking the files."""
    has_wanted: bool = False
    """Whether every wanted file is complete."""
    has_everything: bool = False
    """Whether every file is complete."""
