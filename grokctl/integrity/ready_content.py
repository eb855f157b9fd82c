"""Hash the files of a ready checkpoint, and compare them with its manifest."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

from grokctl.checkpoint.manifest import FileRecord
from grokctl.errors import Damage, Reason
from grokctl.events import Advanced, Finished, Observer, Stage, Started
from grokctl.integrity.file_hashing import FileHashing
from grokctl.os_errors import is_absence, located, reason_of

_PROGRESS_EVERY_S: Final = 0.1


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
        if not is_absence(error):
            raise located(error, root / record.name) from error
        return Damage(record.name, Reason.UNREADABLE, reason_of(error), ((0, record.nbytes),))


def altered(record: FileRecord, sha256: str) -> Damage | None:
    """The damage to a file with another hash than its record's; None if it has that."""
    if sha256 == record.sha256:
        return None
    detail = f"expected sha256 {record.sha256[:16]}…, found {sha256[:16]}…"
    return Damage(record.name, Reason.ALTERED, detail, ((0, record.nbytes),))
