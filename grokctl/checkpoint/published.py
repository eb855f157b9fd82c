"""What ready checkpoints and exports have in common: a manifest with the sha256 of every file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from grokctl.checkpoint.manifest import FileRecord, Source


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
