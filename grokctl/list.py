"""List what is under home: releases, ready checkpoints, exports, and caches."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from grokctl.checkpoint.export_manifest import read_export
from grokctl.checkpoint.ready import read_manifest
from grokctl.checkpoint.receipt import proof_of_files
from grokctl.checkpoint.refusal import read_refusal
from grokctl.checkpoint.release_files import read_config
from grokctl.checkpoint.sums import proof_kind
from grokctl.checkpoint.unfinished import read_unfinished
from grokctl.errors import GrokctlError
from grokctl.model.placement import MeshShape
from grokctl.model.tensors import tensor_specs
from grokctl.paths import (
    CKPT,
    CONFIG,
    EXPORT_MANIFEST,
    MANIFEST,
    PRIVATE,
    TOKENIZER,
    Home,
    folders_in,
    kind_of,
)

_BLOCK: Final = 512
"""Bytes of `st_blocks`."""
_OWN: Final = frozenset({MANIFEST, EXPORT_MANIFEST})
"""Files that a listing itself reads, so that their times say nothing."""


class Kind(StrEnum):
    """What lies under home."""

    RELEASE = "release"
    LINKS = "links"
    """To a release elsewhere, with its proof."""
    READY = "ready"
    EXPORT = "export"
    PARTIAL = "partial"
    """A reshard or an export that was interrupted, and that the same command continues."""
    CACHE = "cache"


class State(StrEnum):
    """How much of it is there."""

    COMPLETE = "complete"
    UNFINISHED = "unfinished"
    """Its download, or its reshard, is not complete."""
    DAMAGED = "damaged"
    """The last verification found damage, or the manifest is not readable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One thing under home."""

    name: str
    """Below home, as `remove` takes it: `ready/grok-1-int8-8`."""
    kind: Kind
    path: Path
    link: Path | None = None
    """The folder that it is a link to; None if it is a folder itself."""
    nbytes: int = 0
    """That it takes on the disk; what it only links to is not counted."""
    last_use: str | None = None
    """When one of its files was read or written last, as the file system records it, which may be
    a day late; ISO 8601, UTC. None without files."""
    state: State = State.COMPLETE
    mesh: MeshShape | None = None
    precision: str | None = None
    """Of the weights; of an export, their type."""
    proven_by: str | None = None
    """`infohash`, `hub sha256`, or None: by receipts and stamps alone."""


def list_kept(home: Home) -> tuple[Kept, ...]:
    """Everything under home that takes room, by kind and name. Reads manifests, and hashes nothing.

    Args:
        home: The folder of all checkpoints.

    Raises:
        OSError: The machine refuses to look at a folder.
    """
    return tuple(_described(kept) for kept in _found(home))


def _found(home: Home) -> Iterator[Kept]:
    """What there is, by its place alone."""
    for path in _folders(home.releases):
        yield _kept(home, path, Kind.RELEASE)
    for above in _folders(home.adopted):
        for path in _folders(above):
            yield _kept(home, path, Kind.LINKS)
    for folder, kind in ((home.ready, Kind.READY), (home.exports, Kind.EXPORT)):
        for path in _folders(folder):
            is_partial = path.name.startswith(".") and path.name.endswith(".partial")
            yield _kept(home, path, Kind.PARTIAL if is_partial else kind)
    for path in (home.xla_cache, home.native_cache, home.routing):
        if path.is_dir():
            yield _kept(home, path, Kind.CACHE)


def _folders(path: Path) -> list[Path]:
    """In order; none of a folder that others have closed to us."""
    with suppress(PermissionError):
        return sorted(folders_in(path))
    return []


def _kept(home: Home, path: Path, kind: Kind) -> Kept:
    nbytes, used = _usage(path)
    return Kept(
        name=path.relative_to(home.root).as_posix(),
        kind=kind,
        path=path,
        link=path.readlink() if path.is_symlink() else None,
        nbytes=0 if path.is_symlink() else nbytes,
        last_use=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(used)) if used else None,
    )


def _usage(path: Path) -> tuple[int, float]:
    """Bytes on the disk, and the last time that a file was read or written; 0 without files."""
    nbytes, used = 0, 0.0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 (half a million files)
            except OSError:  # it has gone, or is closed to us
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            nbytes += min(status.st_size, status.st_blocks * _BLOCK)
            if name not in _OWN and os.path.basename(folder) != PRIVATE:  # noqa: PTH119
                used = max(used, status.st_atime, status.st_mtime)
    return nbytes, used


def _described(kept: Kept) -> Kept:
    """The same with what its records say."""
    try:
        match kept.kind:
            case Kind.RELEASE | Kind.LINKS:
                return _release(kept)
            case Kind.READY if kind_of(kept.path) == "ready":
                return _ready(kept)
            case Kind.EXPORT if kind_of(kept.path) == "export":
                return _export(kept)
            case Kind.CACHE:
                return kept
            case _:
                return replace(kept, state=State.UNFINISHED)
    except (GrokctlError, OSError):  # `verify` says why
        return replace(kept, state=State.DAMAGED)


def _release(kept: Kept) -> Kept:
    root = kept.path
    if read_unfinished(root) is not None or not (root / CKPT).is_dir():
        return replace(kept, state=State.UNFINISHED)
    used = {f"{CKPT}/{spec.file}" for spec in tensor_specs(read_config(root))}
    used |= {name for name in (CONFIG, TOKENIZER) if (root / name).exists()}
    proof = proof_of_files(root, used).best
    return _judged(kept, None if proof is None else proof.proven_by)


def _ready(kept: Kept) -> Kept:
    ready = read_manifest(kept.path, is_checked=False)
    kept = replace(kept, mesh=ready.mesh, precision=ready.precision)
    return _judged(kept, proof_kind(ready, is_hashed=False))


def _export(kept: Kept) -> Kept:
    export = read_export(kept.path)
    kept = replace(kept, precision=export.manifest.type)
    return _judged(kept, proof_kind(export, is_hashed=False))


def _judged(kept: Kept, proven_by: str | None) -> Kept:
    if read_refusal(kept.path) is not None:
        return replace(kept, state=State.DAMAGED)
    return replace(kept, proven_by=proven_by)
