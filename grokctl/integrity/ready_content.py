"""Hash the files of a published folder that its receipt does not cover; compare the hashes."""

from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.published import Published
from grokctl.checkpoint.ready_receipt import (
    continued,
    hashed_before,
    proven_by,
    read_ready_receipt,
    receipt_now,
)
from grokctl.checkpoint.receipt import Receipt, unread_receipt
from grokctl.errors import Damage, Reason
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.integrity.content_check import note_receipt
from grokctl.integrity.file_hashing import FileHashing
from grokctl.os_errors import is_absence, located, reason_of

_PROGRESS_EVERY_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyContent:
    """What hashing the files of a ready checkpoint has shown."""

    damage: dict[str, Damage]
    """By file."""
    hashed: int
    """Bytes that were hashed now."""
    spared: int
    """Files that were not: the receipt covers them, and they are unchanged since."""
    since: str | None
    """When the first of those was hashed."""
    receipt: Receipt
    """Of all files that are good."""


def check_content(
    checkpoint: Published,
    records: Sequence[FileRecord],
    damaged: Collection[str],
    *,
    rehash: bool,
    jobs: int,
    observe: Observer,
) -> ReadyContent:
    """Hash files that the receipt does not cover; a new one covers all that are good.

    Args:
        checkpoint: From its manifest.
        records: The files whose sizes are right, with their sha256.
        damaged: Other files.
        rehash: Whether to ignore the receipt.
        jobs: Threads.
        observe: Receives progress in bytes.

    Raises:
        OSError: The machine refuses to read a file.
    """
    root = checkpoint.root
    if not rehash and (reason := unread_receipt(root)) is not None:
        observe(Noted(message=f"{reason}; hashing every file"))
    names = [record.name for record in records]
    saved = read_ready_receipt(checkpoint)
    receipt = None if rehash else saved
    before = hashed_before(checkpoint, receipt).intersection(names)
    name = checkpoint.manifest_name
    fresh = receipt_now(root, checkpoint.manifest_sha256, names, manifest=name)
    note_receipt(receipt, before, fresh.stamps, total=len(names), observe=observe)
    left = [record for record in records if record.name not in before]
    damage, hashed = altered_files(root, left, jobs=jobs, observe=observe)
    bad = {*damaged, *damage}
    still = fresh.untouched(root)  # what changed meanwhile may have other bytes now
    good = {name: stamp for name, stamp in fresh.stamps.items() if name in still - bad}
    trust = proven_by(checkpoint, saved)
    covering = continued(checkpoint, receipt, before, good, root_of_trust=trust)
    since = receipt.since if receipt is not None and before else None
    return ReadyContent(
        damage=damage, hashed=hashed, spared=len(before), since=since, receipt=covering
    )


def altered_files(
    root: Path, records: Sequence[FileRecord], *, jobs: int, observe: Observer
) -> tuple[dict[str, Damage], int]:
    """Hash files whose sizes are right.

    Args:
        root: The ready checkpoint.
        records: Its files, with their sha256.
        jobs: Threads.
        observe: Receives progress in bytes.

    Returns:
        The damage by file, and the bytes that were hashed.

    Raises:
        OSError: The machine refuses to read a file.
    """
    damage: dict[str, Damage] = {}
    hashing = FileHashing(root)
    observe(Started(stage=Stage.VERIFY, total=sum(record.nbytes for record in records)))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = {
                pool.submit(hashing.sha256, record.name, record.nbytes): record
                for record in records
            }
            while waiting:
                done, _ = wait(waiting, timeout=_PROGRESS_EVERY_S, return_when=FIRST_COMPLETED)
                observe(Advanced(stage=Stage.VERIFY, done=hashing.done))
                for future in done:
                    record = waiting.pop(future)
                    item = _damage_to(root, record, future)
                    if item is not None:
                        damage[record.name] = item
        finally:
            hashing.is_cancelled.set()
            pool.shutdown(cancel_futures=True)
    observe(Finished(stage=Stage.VERIFY))
    return damage, hashing.done


def _damage_to(root: Path, record: FileRecord, hashed: Future[str]) -> Damage | None:
    try:
        return altered(record, hashed.result())
    except OSError as error:
        return unreadable(root, record, error)


def unreadable(root: Path, record: FileRecord, error: OSError) -> Damage:
    """The damage to a file that cannot be read as far as its record says.

    Raises:
        OSError: The machine refuses to read it, which says nothing about the file.
    """
    if not is_absence(error):
        raise located(error, root / record.name) from error
    return Damage(record.name, Reason.UNREADABLE, reason_of(error), ((0, record.nbytes),))


def altered(record: FileRecord, sha256: str) -> Damage | None:
    """The damage to a file with another hash than its record's; None if it has that."""
    if sha256 == record.sha256:
        return None
    detail = f"expected sha256 {record.sha256[:16]}…, found {sha256[:16]}…"
    return Damage(record.name, Reason.ALTERED, detail, ((0, record.nbytes),))
