"""Releases and ready checkpoints under home, listed without opening a tensor."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Final, TypeVar

from grokctl.checkpoint.layout import DeviceLayout, device_layouts
from grokctl.checkpoint.ready import missing_files, read_manifest
from grokctl.checkpoint.release_files import file_nbytes, read_config
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.errors import GrokctlError, UsageError
from grokctl.machine.waiting import Waiting
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.os_errors import reason_of
from grokctl.paths import BEGUN, CKPT, PRIVATE, TOKENIZER, UNFINISHED, Home, default_home, kind_of

_T = TypeVar("_T")
_BLOCK: Final = 512
"""The unit of `st_blocks`, on every file system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRelease:
    """A release, possibly incomplete."""

    name: str
    root: Path
    is_grok_1: bool = False
    nbytes: int = 0
    """Bytes of its files on disk."""
    missing_nbytes: int = 0
    """Bytes that are missing."""
    is_complete: bool = False
    """Whether every file has its size and no download is in progress; proves no content."""
    damage: str = ""
    """Why it cannot be used; empty if nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptReady:
    """A ready checkpoint, by its manifest."""

    name: str
    root: Path
    is_grok_1: bool = False
    precision: Precision | None = None
    """None if the manifest cannot be read."""
    mesh: MeshShape | None = None
    nbytes: int = 0
    is_whole: bool = False
    """Whether the file of every device exists, with its size."""
    is_mapped: bool = True
    """Whether weights can be read as they are needed: the files are not compressed."""
    has_tokenizer: bool = True
    """Whether it accepts text, and not only token ids."""
    damage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The checkpoints under home."""

    home: Path
    is_default: bool = True
    """Whether it is the default home."""
    releases: tuple[KeptRelease, ...] = ()
    ready: tuple[KeptReady, ...] = ()
    error: str = ""
    """Why home could not be searched."""

    @property
    def grok_1(self) -> KeptRelease | None:
        """The most complete release of Grok-1."""
        usable = [kept for kept in self.releases if kept.is_grok_1 and not kept.damage]
        return max(usable, key=lambda kept: (kept.is_complete, kept.nbytes), default=None)

    @property
    def ready_grok_1(self) -> tuple[KeptReady, ...]:
        """Complete ready checkpoints of Grok-1."""
        return tuple(kept for kept in self.ready if kept.is_grok_1 and kept.is_whole)

    @property
    def lossless(self) -> KeptReady | None:
        """A ready checkpoint of Grok-1 that can be resharded to any mesh and precision."""
        lossless = (kept for kept in self.ready_grok_1 if kept.precision is Precision.INT8)
        return next(lossless, None)

    @property
    def to_download(self) -> int:
        """Bytes of Grok-1 that must be downloaded before a reshard."""
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
    """List the checkpoints under home, damaged ones included.

    Reads the manifest of every ready checkpoint, and the size of every file.

    Args:
        home: The folder to search.
        timeout_s: Seconds to wait for its disk.
    """
    error = f"{home.root}: was not searched within {timeout_s:.0f} s"
    silent = Inventory(home=home.root, is_default=_is_default(home), error=error)
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
    """The checkpoints of one kind in a folder, by name."""
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        errors.append(f"{folder}: {reason_of(error)}")
        return []
    return [look(path) for path in entries if _is_kind(path, kind, errors)]


def _is_kind(path: Path, kind: str, errors: list[str]) -> bool:
    try:
        return kind_of(path) == kind
    except OSError as error:
        errors.append(f"{path}: {reason_of(error)}")
        return False


def _release(root: Path) -> KeptRelease:
    kept = KeptRelease(name=root.name, root=root)
    try:
        config = read_config(root)
        has_begun = (root / PRIVATE / BEGUN).exists() or (root / PRIVATE / UNFINISHED).exists()
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
        is_complete=not has_begun and all(wanted == size for wanted, size, _ in sizes),
    )


def _sizes(root: Path, config: GrokConfig) -> Iterator[tuple[int, int, int]]:
    """For every file: its expected size, actual size, and bytes on disk."""
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
    """Whether it is the default home."""
    try:
        return home.root == default_home()
    except UsageError:
        return False
