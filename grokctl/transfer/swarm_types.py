"""What a swarm needs to know, and what it reports: values only."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grokctl.checkpoint.torrent import Metainfo
from grokctl.transfer.sources import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a session may do on the network."""

    bind: str | None = None
    """The only local address to listen on and to connect from."""
    port: int | None = None
    """The only port to listen on; 0 takes any free one, None prefers 6881."""
    proxy: str | None = None
    """`socks5://` or `http://` URL; with one, nothing listens and nothing goes around it."""
    dht: bool = True
    lsd: bool = True
    connections: int | None = None
    shares_addresses: bool = False
    """Whether several peers behind one address are welcome."""
    keeps_seeds: bool = False
    """Whether seeds are kept while nothing is wanted of them: mirrors may fail, and then it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What resume data says, or somebody has found out, about what lies on disk."""

    have: frozenset[int] = frozenset()
    """Pieces that are whole."""
    unfinished: Mapping[int, list[bool]] = field(default_factory=dict)
    """Blocks of 16 KiB that are here of pieces that are not whole."""
    uploaded: int = 0
    """Payload bytes sent in earlier sessions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A torrent to download to, or serve from, the places that grokctl chose."""

    metainfo: Metainfo
    torrent: bytes
    """What `metainfo` was read from; peers, trackers and web seeds in it are not used."""
    root: Path
    places: Mapping[int, str]
    """File index -> path below `root`; the torrent's own names are never used."""
    wanted: Collection[int]
    """Indices of the files to download."""
    trackers: Sequence[str] = ()
    web_seeds: Sequence[str] = ()
    peers: Sequence[Endpoint] = ()
    claims: Claims = field(default_factory=Claims)
    """What lies there already: it is believed, nothing is hashed."""
    is_complete: bool = False
    """Serve only: believe that every file is whole until a peer asks for a piece."""
    max_download: int | None = None
    """Bytes per second."""
    max_upload: int | None = None
    """Bytes per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """How far a session has come."""

    done: int = 0
    """Wanted bytes that are here, in whole blocks."""
    downloaded: int = 0
    """Payload bytes received in this session, wasted ones included."""
    uploaded: int = 0
    """Payload bytes sent, in this session and those before it."""
    rate: int = 0
    """Payload bytes received per second."""
    upload_rate: int = 0
    """Payload bytes sent per second."""
    peers: int = 0
    seeds: int = 0
    is_checking: bool = False
    """Whether libtorrent still looks at the files."""
    has_wanted: bool = False
    """Whether every wanted file is here."""
    has_everything: bool = False
