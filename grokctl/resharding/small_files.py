"""The files beside the tensors: the tokenizer, SHA256SUMS and, last, the manifest."""

import hashlib
from collections.abc import Iterable

from grokctl.checkpoint.manifest import FileRecord, Source
from grokctl.checkpoint.published import Checkpoint
from grokctl.checkpoint.ready import SUMS
from grokctl.checkpoint.release import Release
from grokctl.errors import Damage, Reason
from grokctl.integrity.ready_content import altered
from grokctl.linked_files import read_linked
from grokctl.paths import LARGEST_TOKENIZER, TOKENIZER
from grokctl.resharding.partial import PartialFolder
from grokctl.resharding.publish import refuse_altered


def write_small(partial: PartialFolder, name: str, data: bytes, mode: int = 0o666) -> FileRecord:
    """Write a whole file; returns its entry in the manifest."""
    partial.write(name, data, mode)
    return FileRecord(name=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_tokenizer(source: Checkpoint, origin: Source, partial: PartialFolder) -> list[FileRecord]:
    """Copy the tokenizer of a source.

    Args:
        source: The checkpoint that is read.
        origin: What the manifest will say about it.
        partial: The folder that grows.

    Returns:
        Its entry in the manifest, if there is one.

    Raises:
        CorruptCheckpointError: The tokenizer of a ready checkpoint is not that of its manifest.
    """
    if source.tokenizer is None:
        return []
    data, mode = read_linked(source.tokenizer, source.root, most=LARGEST_TOKENIZER)
    if not isinstance(source, Release):
        record = source.records.get(TOKENIZER)
        found = altered(record, hashlib.sha256(data).hexdigest()) if record else None
        if record is None and origin.proven:  # `origin_of` has seen none
            found = Damage(TOKENIZER, Reason.ALTERED, "appeared while it was read")
        refuse_altered(source, [found] if found else [], partial)
    return [write_small(partial, TOKENIZER, data, mode)]


def write_manifest(partial: PartialFolder, records: Iterable[FileRecord], manifest: bytes) -> str:
    """Write the checksums and, last, the manifest; returns the sha256 of that."""
    name = partial.kind.manifest
    manifest_sha256 = hashlib.sha256(manifest).hexdigest()
    sums = [f"{record.sha256}  {record.name}\n" for record in records]
    sums.append(f"{manifest_sha256}  {name}\n")
    partial.write(SUMS, "".join(sums).encode())
    partial.write(name, manifest)
    return manifest_sha256
