"""The manifest of an export: what was written, what it lost, and what it came from."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from grokctl import __version__
from grokctl.checkpoint.file_sizes import file_damage, regular_size
from grokctl.checkpoint.manifest import UNTRUSTED, FileRecord, Source, source_of, source_values
from grokctl.errors import CorruptCheckpointError, Damage, Reason, UsageError, corrupt
from grokctl.model.config import GrokConfig
from grokctl.os_errors import TooLargeError
from grokctl.paths import EXPORT_MANIFEST, TOKENIZER, quoted, read_limited
from grokctl.text import printable

FORMAT: Final = "grokctl-export"
_VERSION: Final = 1
_LARGEST: Final = 8 * 2**20
"""Bytes of a manifest."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """The contents of an export."""

    format: str
    """`gguf` or `hf`."""
    type: str
    """The type of the weights that the release quantizes."""
    embedding: str
    """The type of the embedding."""
    config: GrokConfig
    source: Source
    errors: Mapping[str, float]
    """Relative root mean square error against the source of each tensor that was rounded."""
    folded: tuple[str, ...] = ()
    """Parameters whose scales were multiplied by powers of two."""
    float32: tuple[str, ...] = ()
    """Parameters that the release quantizes and that are float32 here."""
    files: tuple[FileRecord, ...] = field(default=())

    @property
    def is_lossless(self) -> bool:
        """Whether no value was rounded."""
        return not self.errors

    @cached_property
    def records(self) -> Mapping[str, FileRecord]:
        """The files by name."""
        return {record.name: record for record in self.files}


@dataclass(frozen=True)
class Export:
    """An export in which every file exists and has its size."""

    root: Path
    manifest: ExportManifest
    manifest_sha256: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def verb(self) -> str:
        """The command that makes such a folder."""
        return "export"

    @property
    def manifest_name(self) -> str:
        """The name of its manifest."""
        return EXPORT_MANIFEST

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """Every file except the manifest and the checksums, by name."""
        return self.manifest.records

    @property
    def source(self) -> Source:
        """The checkpoint that it was made from."""
        return self.manifest.source

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(record.nbytes for record in self.manifest.files)

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if there is one."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None


def export_manifest_bytes(manifest: ExportManifest) -> bytes:
    """A manifest as JSON; its presence makes the folder an export."""
    values = {
        "format": FORMAT,
        "version": _VERSION,
        "created_by": f"grokctl {__version__}",
        "source": source_values(manifest.source),
        "config": manifest.config.to_dict(),
        "kind": manifest.format,
        "type": manifest.type,
        "embedding": manifest.embedding,
        "lossless": manifest.is_lossless,
        "relative_rms_error": dict(manifest.errors),
        "folded": manifest.folded,
        "float32": manifest.float32,
        "files": [
            {"name": file.name, "bytes": file.nbytes, "sha256": file.sha256}
            for file in manifest.files
        ],
    }
    return json.dumps(values, indent=1).encode() + b"\n"


def parse_export_manifest(data: bytes) -> ExportManifest:
    """Read a manifest that anybody may have written.

    Raises:
        CorruptCheckpointError: It is malformed, or of another version.
    """
    try:
        return _parse(json.loads(data.decode()))
    except UNTRUSTED as error:
        raise _malformed(f"is not a manifest ({type(error).__name__}: {error})") from error


def _parse(values: Any) -> ExportManifest:
    if values["format"] != FORMAT or values["version"] != _VERSION:
        actual = f"{values['format']} version {values['version']}"
        raise _malformed(f"expected {FORMAT} version {_VERSION}, found {actual}")
    errors = {printable(str(key)): float(one) for key, one in values["relative_rms_error"].items()}
    if not all(0 <= error < math.inf for error in errors.values()):
        raise _malformed("has a relative error that is no number from 0 on")
    files = tuple(map(_record, values["files"]))
    if len({file.name for file in files}) < len(files):
        raise _malformed("has a file twice")
    return ExportManifest(
        format=printable(str(values["kind"])),
        type=printable(str(values["type"])),
        embedding=printable(str(values["embedding"])),
        config=_config(values["config"]),
        source=source_of(values["source"]),
        errors=errors,
        folded=_names(values["folded"]),
        float32=_names(values["float32"]),
        files=files,
    )


def _config(values: Any) -> GrokConfig:
    try:
        return GrokConfig.from_dict(values, file=EXPORT_MANIFEST)
    except CorruptCheckpointError as error:  # of a number that is out of bounds
        raise _malformed(error.damage[0].detail) from error


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise _malformed(f"expected a list of names, found {values!r}")
    return tuple(printable(str(name), limit=255) for name in values)


def _record(entry: Any) -> FileRecord:
    name, digest, nbytes = str(entry["name"]), str(entry["sha256"]), entry["bytes"]
    if not _NAME.fullmatch(name) or name == EXPORT_MANIFEST:
        raise _malformed(f"has the invalid file name {name!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or type(nbytes) is not int or nbytes < 0:
        raise _malformed(f"{name} has no valid size and sha256")
    return FileRecord(name=name, nbytes=nbytes, sha256=digest)


def _malformed(detail: str) -> CorruptCheckpointError:
    return corrupt(EXPORT_MANIFEST, Reason.MALFORMED, printable(detail, limit=300))


def read_export(root: Path) -> Export:
    """Read the manifest of an export, and none of the files in it.

    Raises:
        CorruptCheckpointError: It is malformed or of another version.
        UsageError: The folder is no export.
    """
    path = root / EXPORT_MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{root}: expected an export, found no {EXPORT_MANIFEST}",
            "grokctl export --format gguf",
        )
    try:
        data = read_limited(path, _LARGEST)
    except TooLargeError as error:
        raise _malformed(f"{error.strerror}") from error
    return Export(root, parse_export_manifest(data), sha256(data).hexdigest())


def missing_of_export(export: Export) -> list[Damage]:
    """Files of the manifest that are missing or have the wrong size."""
    found = []
    for name, record in sorted(export.manifest.records.items()):
        size = regular_size(export.root / name)
        damage = file_damage(export.root, name, expected=record.nbytes, size=size)
        if damage is not None:
            found.append(damage)
    return found


def export_again(export: Export) -> str:
    """The command that makes an export again, beside it: exports are never replaced."""
    manifest = export.manifest
    options = {  # of an untrusted manifest
        "--format": manifest.format,
        "--type": manifest.type,
        "--embedding": manifest.embedding,
        "--out": f"{export.root}-again",
    }
    words = [f"{option} {quoted(value)}" for option, value in options.items()]
    return " ".join([f"grokctl export {quoted(export.source.folder)}", *words])


def open_export(root: Path) -> Export:
    """Read a manifest, and check that every file in it exists and has its size.

    Raises:
        CorruptCheckpointError: The manifest is malformed, or a file is missing or has another size.
        UsageError: The folder is no export.
    """
    export = read_export(root)
    for damage in missing_of_export(export):
        raise corrupt(damage.file, damage.reason, damage.detail, export_again(export))
    return export
