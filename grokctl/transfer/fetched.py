"""The result of a download: what arrived, from whom, and what proves it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Contribution:
    """Bytes from one source in this run."""

    source: str
    """`swarm`, or `mirror` and its name."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """A peer or mirror that sent wrong bytes, or failed."""

    source: str
    """`peer` and its address, or `mirror` and its name."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Files that arrived, matched their piece hashes, and are on disk."""

    source: str
    """As the user named it."""
    root: Path
    infohash: str
    nbytes: int
    """Bytes of the wanted files."""
    downloaded: int
    """Payload bytes received in this run, including wasted ones."""
    uploaded: int | None
    """Payload bytes sent while seeding; None if it did not seed."""
    seconds: float
    """Until every wanted file was complete, without seeding."""
    seed_seconds: float | None
    """While it seeded; None if it did not."""
    is_complete: bool
    """Whether the release is complete; False after `only`, unless the rest came earlier."""
    is_proven: bool
    """Whether an earlier verification covers every file as it is now; if not, run `verify`."""
    proven_by: str | None = None
    """`infohash` if it is proven; `hub sha256` if every file has the hash that a hub names."""
    root_of_trust: str | None = None
    """Of a hub's hashes, in words."""
    blobs: tuple[str, ...] = ()
    """Small files from a hub, for which it names the SHA-1 of a git blob and no sha256."""
    has_tokenizer: bool
    extras: tuple[str, ...]
    """Files other than tensors."""
    contributions: tuple[Contribution, ...]
    troubles: tuple[Trouble, ...]
