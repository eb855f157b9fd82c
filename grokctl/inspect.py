"""List the tensors of a checkpoint: names, shapes, sizes and how they are stored."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from grokctl.checkpoint.logical import logical_tensors
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.release import file_nbytes, open_release
from grokctl.errors import UsageError
from grokctl.events import Observer, ignore
from grokctl.model.config import GrokConfig
from grokctl.paths import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One stored tensor."""

    file: str
    name: str
    shape: tuple[int, ...]
    """As stored: inputs before outputs in a release, outputs first in a ready checkpoint."""
    dtype: str
    scale_groups: int
    """Rows of scales along the inputs; 0 without scales."""
    nbytes: int
    """Of the file in a release, of the tensor on all devices in a ready checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a checkpoint holds."""

    root: Path
    kind: str
    config: GrokConfig
    rows: tuple[Row, ...]
    total_nbytes: int
    """Of the whole checkpoint, whatever was asked for."""


def inspect(root: Path, *, pattern: str | None = None, observe: Observer = ignore) -> Inspection:
    """Describe a checkpoint from its headers; reads no weights, proves nothing.

    Args:
        root: A release or a ready checkpoint.
        pattern: Glob on tensor names or file names; all tensors by default.
        observe: Receives progress in files.

    Raises:
        CorruptCheckpointError: The structure is not sound.
        UsageError: There is no checkpoint, or nothing matches.
    """
    if kind_of(root) == "ready":
        checkpoint = open_ready(root)
        config, rows, total = checkpoint.config, _ready_rows(checkpoint), checkpoint.nbytes
    else:
        release = open_release(root, observe=observe)
        config, total = release.config, release.nbytes
        rows = [
            Row(
                file=tensor.spec.file,
                name=tensor.spec.name,
                shape=tensor.weight.shape,
                dtype=str(tensor.weight.dtype),
                scale_groups=tensor.scales.shape[-2] if tensor.scales else 0,
                nbytes=file_nbytes(tensor.spec),
            )
            for tensor in release.tensors
        ]
    chosen = tuple(
        row
        for row in rows
        if pattern is None or fnmatchcase(row.name, pattern) or fnmatchcase(row.file, pattern)
    )
    if not chosen:
        raise UsageError(f"no tensor matches {pattern!r}", "--tensor 'layers.0.*'")
    return Inspection(
        root=root,
        kind=kind_of(root) or "release",
        config=config,
        rows=chosen,
        total_nbytes=total,
    )


def _ready_rows(checkpoint: ReadyCheckpoint) -> list[Row]:
    devices = range(checkpoint.mesh.size)
    held = {
        item.tensor.key: item.nbytes for item in checkpoint.layouts[0].tensors
    }  # every device holds equally much
    first, last = checkpoint.layouts[0].name, checkpoint.layouts[-1].name
    files = first if len(devices) == 1 else f"{first} … {last.split('-')[1]}"
    return [
        Row(
            file=files,
            name=tensor.key,
            shape=tensor.shape,
            dtype=str(tensor.dtype),
            scale_groups=tensor.groups,
            nbytes=held[tensor.key] * len(devices),
        )
        for tensor in logical_tensors(checkpoint)
    ]
