"""What ready checkpoints and exports have in common: a manifest with the sha256 of every file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from grokctl.checkpoint.manifest import FileRecord, Source
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.tensor_source import ReleaseSource, TensorSource
from grokctl.model.precision import Precision
from grokctl.paths import quoted


class Published(Protocol):
    """A folder that grokctl made of a checkpoint."""

    @property
    def root(self) -> Path:
        """The folder."""
        ...

    @property
    def verb(self) -> str:
        """The command that makes such a folder."""
        ...

    @property
    def manifest_name(self) -> str:
        """The name of its manifest."""
        ...

    @property
    def manifest_sha256(self) -> str:
        """Of the manifest's bytes, as they were read."""
        ...

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """Every file except the manifest and the checksums, by name."""
        ...

    @property
    def source(self) -> Source:
        """The checkpoint that it was made from."""
        ...

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if there is one."""
        ...


class PublishedTensors(Published, TensorSource, Protocol):
    """A published folder whose tensors can be read: a ready checkpoint, or an export in GGUF."""

    @property
    def name(self) -> str:
        """The folder's name."""
        ...

    @property
    def precision(self) -> Precision:
        """The precision of its weights."""
        ...

    @property
    def tensor_files(self) -> tuple[FileRecord, ...]:
        """The files with tensors that it has."""
        ...

    @property
    def opened(self) -> frozenset[str]:
        """The names of the files from which something was read."""
        ...


Checkpoint = Release | PublishedTensors
"""What can be resharded and exported."""


def tensors_of(checkpoint: Checkpoint) -> TensorSource:
    """A checkpoint as a source of tensors."""
    return ReleaseSource(checkpoint) if isinstance(checkpoint, Release) else checkpoint


def on_its_source(checkpoint: Release | Published) -> str | None:
    """The hint for what a checkpoint no longer has: the command again on what it was made from."""
    if isinstance(checkpoint, Release):
        return None
    return f"CHECKPOINT {quoted(checkpoint.source.folder)}  # what it was made from"
