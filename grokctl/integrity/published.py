"""Verify what grokctl made of a checkpoint: hashes, sums, and the headers of its files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from grokctl.checkpoint.export_headers import tensors_in
from grokctl.checkpoint.export_manifest import Export, export_again, missing_of_export
from grokctl.checkpoint.published import Published
from grokctl.checkpoint.ready import ReadyCheckpoint, missing_files, reshard_again
from grokctl.checkpoint.ready_receipt import keep_ready_receipt
from grokctl.checkpoint.sums import doubt_of, exposure_of, proof_kind, read_sums
from grokctl.errors import CorruptCheckpointError, Damage
from grokctl.events import Observer, ignore
from grokctl.integrity.ready_content import check_content
from grokctl.integrity.verdict import Verdict, remember, threads_of


def verify_ready(
    checkpoint: ReadyCheckpoint,
    *,
    quick: bool = False,
    rehash: bool = False,
    keeps: bool = True,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Verdict:
    """Hash every file of a ready checkpoint against its manifest, and that against SHA256SUMS.

    Whoever makes a file can make the sums that fit it: that a file is one of the manifest's mesh,
    its header shows, which no command reads another way.
    Files that its receipt covers and that are unchanged since are not hashed again.

    Args:
        checkpoint: From its manifest; its files may be damaged or missing.
        quick: Check only that they exist and have their sizes, and the manifest's own line.
        rehash: Ignore the receipt.
        keeps: Whether the result is kept in the folder.
        jobs: Hashing threads; one per core by default.
        observe: Receives progress in bytes.
    """
    source = replace(checkpoint, is_streamed=True)
    headers = {
        checkpoint.manifest.record_of(device).name: device for device in checkpoint.manifest.devices
    }
    made = _Made(
        folder=checkpoint,
        missing=list(missing_files(checkpoint)),
        again=reshard_again(checkpoint),
        headers=list(headers),
        check_header=lambda name: source.check_header(headers[name]),
    )
    return _verify(made, quick=quick, rehash=rehash, keeps=keeps, jobs=jobs, observe=observe)


def verify_export(
    export: Export,
    *,
    quick: bool = False,
    rehash: bool = False,
    keeps: bool = True,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Verdict:
    """The same of an export, whose headers describe exactly the bytes of their files.

    Args:
        export: From its manifest; its files may be damaged or missing.
        quick: As of `verify_ready`.
        rehash: As of `verify_ready`.
        keeps: As of `verify_ready`.
        jobs: As of `verify_ready`.
        observe: As of `verify_ready`.
    """
    made = _Made(
        folder=export,
        missing=missing_of_export(export),
        again=export_again(export),
        headers=sorted(export.records),
        check_header=lambda name: tensors_in(export.root / name),
    )
    return _verify(made, quick=quick, rehash=rehash, keeps=keeps, jobs=jobs, observe=observe)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A folder that was made of a checkpoint."""

    folder: Published
    missing: Sequence[Damage]
    """Files that are not there, or of another size."""
    again: str
    """The command that makes it again."""
    headers: Sequence[str]
    """Files that have a header."""
    check_header: Callable[[str], object]
    """Refuses a file with a header that no command would read."""


def _verify(
    made: _Made, *, quick: bool, rehash: bool, keeps: bool, jobs: int | None, observe: Observer
) -> Verdict:
    """See `verify_ready`."""
    checkpoint = made.folder
    damage = {item.file: item for item in made.missing}
    sums = read_sums(checkpoint)
    damage = {item.file: item for item in sums.damage} | damage
    own = checkpoint.records.values()
    records = [record for record in (*own, *sums.others) if record.name not in damage]
    content = None
    if not quick:
        content = check_content(
            checkpoint, records, damage, rehash=rehash, jobs=threads_of(jobs), observe=observe
        )
        if keeps:
            name = checkpoint.manifest_name
            keep_ready_receipt(checkpoint.root, content.receipt, observe, manifest=name)
        damage |= content.damage
        damage |= _foreign_headers(made, damage)
    doubt = None if quick else doubt_of(checkpoint)
    is_good = not quick and not damage
    kind = proof_kind(checkpoint) if is_good else None
    verdict = Verdict(
        name=checkpoint.root.resolve().name,
        files=len(own),
        nbytes=sum(record.nbytes for record in own),
        hashed=content.hashed if content else 0,
        damage=tuple(damage[name] for name in sorted(damage)),
        verified=None,
        is_proven=is_good and doubt is None,
        proven_by=kind,
        doubt=doubt,
        is_exposed=doubt is not None and doubt == exposure_of(checkpoint),
        root_of_trust=content.receipt.root_of_trust if content and kind else None,
        spared=content.spared if content else 0,
        since=content.since if content else None,
        remedy=made.again,
    )
    if keeps and not quick:
        remember(checkpoint.root, verdict, observe)
    return verdict


def _foreign_headers(made: _Made, damaged: Mapping[str, Damage]) -> dict[str, Damage]:
    """Files of a right hash with a header that no command would read, by name."""
    found = {}
    for name in made.headers:
        if name not in damaged:
            try:
                made.check_header(name)
            except CorruptCheckpointError as error:
                found[name] = error.damage[0]
    return found
