"""What lies under home: releases and ready checkpoints, by a look that opens no tensor."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Final, TypeVar

from grokctl.checkpoint.layout import DeviceLayout, device_layouts
from grokctl.checkpoint.ready import missing_files, read_manifest
from grokctl.checkpoint.release import file_nbytes, read_config
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.errors import GrokctlError, UsageError
from grokctl.machine.waiting import Waiting
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.os_errors import reason_of
from grokctl.paths import BEGUN, CKPT, PRIVATE, TOKENIZER, Home, default_home, kind_of

_T = TypeVar("_T")
_BLOCK: Final = 512
"""Bytes that `st_blocks` counts in, whatever the file system's own are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRelease:
    """A release, or what there is of one."""

    name: str
    root: Path
    is_grok_1: bool = False
    nbytes: int = 0
    """That lie on the disk, of those that belong to it."""
    missing_nbytes: int = 0
    """That are still to come."""
    is_complete: bool = False
    """Whether every file has its size, and no download is under way; proves no content."""
    damage: str = ""
    """Why it cannot be used, if it was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptReady:
    """A ready checkpoint, as its manifest tells of it."""

    name: str
    root: Path
    is_grok_1: bool = False
    precision: Precision | None = None
    """None where the manifest cannot be read."""
    mesh: MeshShape | None = None
    nbytes: int = 0
    is_whole: bool = False
    """Whether every device's file is here, with its size."""
    is_mapped: bool = True
    """Whether weights can be read from its files as they are needed: they are not compressed."""
    has_tokenizer: bool = True
    """Whether it takes text, and not only token ids."""
    damage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What lies under home."""

    home: Path
    is_default: bool = True
    """Whether commands find it without being told."""
    releases: tuple[KeptRelease, ...] = ()
    ready: tuple[KeptReady, ...] = ()
    error: str = ""
    """Why home could not be looked at."""

    @property
    def grok_1(self) -> KeptRelease | None:
        """The release of Grok-1 of which there is most."""
        found = [kept for kept in self.releases if kept.is_grok_1 and not kept.damage]
        return max(found, key=lambda kept: (kept.is_complete, kept.nbytes), default=None)

    @property
    def ready_grok_1(self) -> tuple[KeptReady, ...]:
        """Ready checkpoints of Grok-1 that can be run."""
        return tuple(kept for kept in self.ready if kept.is_grok_1 and kept.is_whole)

    @property
    def lossless(self) -> KeptReady | None:
        """A ready checkpoint of Grok-1 that can be cut for every mesh and precision."""
        found = (kept for kept in self.ready_grok_1 if kept.precision is Precision.INT8)
        return next(found, None)

    @property
    def to_download(self) -> int:
        """Bytes of Grok-1 that are still to come, for a reshard that is not done."""
        if self.lossless is not None:
            return 0
        if self.grok_1 is None:
            return release_nbytes(GROK_1)
        return 0 if self.grok_1.is_complete else self.grok_1.missing_nbytes


@cache
def release_nbytes(config: GrokConfig) -> int:
    """Bytes of all tensor files of a release."""
    return sum(file_nbytes(spec) for spec in tensor_specs(config))


@cache
def ready_nbytes(precision: Precision, mesh: MeshShape) -> int:
    """Bytes of all device files of Grok-1.

    Raises:
        PlacementError: It does not divide over the mesh.
    """
    return sum(layout.nbytes for layout in _layouts(precision, mesh))


@cache
def largest_file(precision: Precision, mesh: MeshShape) -> int:
    """Bytes of the largest device file of Grok-1.

    Raises:
        PlacementError: It does not divide over the mesh.
    """
    return max(layout.nbytes for layout in _layouts(precision, mesh))


@cache
def largest_released_file() -> int:
    """Bytes of the largest file of Grok-1's release."""
    return max(map(file_nbytes, tensor_specs(GROK_1)))


def _layouts(precision: Precision, mesh: MeshShape) -> tuple[DeviceLayout, ...]:
    return device_layouts(storage_in(released_storage(GROK_1), precision, mesh), mesh)


def take_stock(home: Home, *, timeout_s: float = 20.0) -> Inventory:
    """Look at what lies under home; a damaged checkpoint is listed as one, and none is opened.

    Reads a manifest for every ready checkpoint, and asks for the size of every file.

    Args:
        home: Where to look.
        timeout_s: A disk that hangs is left alone after so many seconds.
    """
    why = f"{home.root}: was not looked through in {timeout_s:.0f} s"
    silent = Inventory(home=home.root, is_default=_is_default(home), error=why)
    look = partial(_take_stock, home, is_default=silent.is_default)
    return Waiting(look, timeout_s=timeout_s, default=silent).answer()


def _take_stock(home: Home, *, is_default: bool) -> Inventory:
    errors: list[str] = []
    releases = _each(home.releases, "release", _release, errors)
    ready = _each(home.ready, "ready", _ready, errors)
    return Inventory(
        home=home.root,
        is_default=is_default,
        releases=tuple(releases),
        ready=tuple(ready),
        error="; ".join(errors),
    )


def _each(folder: Path, kind: str, look: Callable[[Path], _T], errors: list[str]) -> list[_T]:
    """What a look at every checkpoint of a kind found, by name."""
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        errors.append(f"{folder}: {reason_of(error)}")
        return []
    return [look(path) for path in entries if kind_of(path) == kind]


def _release(root: Path) -> KeptRelease:
    kept = KeptRelease(name=root.name, root=root)
    try:
        config = read_config(root)
        has_begun = (root / PRIVATE / BEGUN).exists()
        sizes = list(_sizes(root, config))
    except (GrokctlError, OSError) as error:
        return replace(kept, damage=_reason(error))
    expected = release_nbytes(config)
    present = sum(min(wanted, on_disk) for wanted, _, on_disk in sizes)
    return replace(
        kept,
        is_grok_1=config == GROK_1,
        nbytes=present,
        missing_nbytes=expected - present,
        is_complete=not has_begun and all(wanted == found for wanted, found, _ in sizes),
    )


def _sizes(root: Path, config: GrokConfig) -> Iterator[tuple[int, int, int]]:
    """Of every file: the bytes that it should have, has, and takes on the disk."""
    for spec in tensor_specs(config):
        size = blocks = 0
        with suppress(OSError):
            status = (root / CKPT / spec.file).stat()
            size, blocks = status.st_size, status.st_blocks
        yield file_nbytes(spec), size, blocks * _BLOCK


def _ready(root: Path) -> KeptReady:
    kept = KeptReady(name=root.name, root=root)
    try:
        checkpoint = read_manifest(root)
        kept = replace(
            kept,
            is_grok_1=checkpoint.config == GROK_1,
            precision=checkpoint.precision,
            mesh=checkpoint.mesh,
            nbytes=checkpoint.nbytes,
            is_mapped=checkpoint.manifest.compression is None,
            has_tokenizer=(root / TOKENIZER).is_file(),
        )
        missing = next(iter(missing_files(checkpoint)), None)
    except (GrokctlError, OSError) as error:
        return replace(kept, damage=_reason(error))
    if missing is not None:
        return replace(kept, damage=str(missing))
    return replace(kept, is_whole=checkpoint.is_whole)


def _reason(error: GrokctlError | OSError) -> str:
    return reason_of(error) if isinstance(error, OSError) else str(error)


def _is_default(home: Home) -> bool:
    """Whether commands find it without being told."""
    try:
        return home.root == default_home()
    except UsageError:
        return False
