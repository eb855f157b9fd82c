"""The destination of a reshard: checks, the partial folder, and the final rename."""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from grokctl.checkpoint.frames import SUFFIX
from grokctl.checkpoint.manifest import FileRecord, Manifest, Source, manifest_bytes
from grokctl.checkpoint.ready import SUMS, ReadyCheckpoint
from grokctl.checkpoint.receipt import Receipt, Stamp, stamps_of
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.sums import doubt_of
from grokctl.errors import Damage, DiskFullError, Reason, UsageError, corrupt
from grokctl.integrity.ready_content import altered
from grokctl.os_errors import refusal
from grokctl.paths import CKPT, MANIFEST, PRIVATE, TOKENIZER, fsync_folder, kind_of, quoted
from grokctl.resharding.plan import ReshardPlan
from grokctl.system import optional
from grokctl.text import format_apart

JOURNAL: Final = "journal"
_SYSTEM_FOLDERS: Final = frozenset({"lost+found"})
"""A new file system has these, so a folder with nothing else counts as empty."""
_ELSEWHERE: Final = "--out DIR  # another destination"
_OURS: Final = re.compile(
    rf"device-\d\d-of-\d\d\.safetensors({re.escape(SUFFIX)})?|"
    + "|".join(map(re.escape, (MANIFEST, SUMS, TOKENIZER, JOURNAL, PRIVATE)))
)
"""The files of a ready checkpoint."""


# --- before


def check_destination(plan: ReshardPlan, *, force: bool) -> None:
    """Refuse a destination that this reshard may not replace.

    Raises:
        UsageError: It exists, and either `force` is not set or it is not just a ready checkpoint.
    """
    out = plan.out
    if any(folder.name == CKPT for folder in out.resolve().parents):
        raise UsageError(f"{out}: lies between the tensors of a release", _ELSEWHERE)
    if not os.path.lexists(out) or is_filled(out):
        return
    if out.is_symlink() or kind_of(out) != "ready":
        raise UsageError(f"{out}: exists, and is not a ready checkpoint", _ELSEWHERE)
    if plan.source.root.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: contains the source of this reshard", _ELSEWHERE)
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not (_OURS.fullmatch(name) or _is_beside(name))]
    if foreign:
        raise UsageError(f"{out}: contains {foreign[0]!r}, which grokctl did not write", _ELSEWHERE)
    if not force:
        raise UsageError(f"{out}: exists", "--force  # replaces it; or --out DIR")


def check_space(plan: ReshardPlan, nbytes: int, free: int) -> None:
    """Refuse a reshard that does not fit.

    Raises:
        DiskFullError: Fewer bytes are free than will be written.
    """
    if nbytes > free:
        needed, found = format_apart(nbytes, free)
        raise DiskFullError(
            f"{disk_of(plan.out)}: expected {needed} free, found {found}", _ELSEWHERE
        )


def is_filled(out: Path) -> bool:
    """Whether a reshard writes into an existing folder: an empty one, such as a mounted volume."""
    if out.is_symlink() or not out.is_dir() or (out / MANIFEST).exists():
        return False
    names = [path.name for path in out.iterdir()]
    is_begun = any(_is_partial(name) for name in names)
    return all(_is_beside(name) or (is_begun and _OURS.fullmatch(name)) for name in names)


def disk_of(out: Path) -> Path:
    """The existing folder whose disk will be written."""
    if _is_inside(out):
        return out
    folder = out.parent
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _is_inside(out: Path) -> bool:
    """Whether files are written inside `out`: it is there, and cannot be replaced by a rename."""
    return is_filled(out) or (not out.is_symlink() and os.path.ismount(out))


def _is_beside(name: str) -> bool:
    """Whether a name in a folder does not make it another's."""
    return name in _SYSTEM_FOLDERS or _is_partial(name)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Translate errors of the file system while `out` is made."""
    try:
        yield
    except OSError as error:
        raise refusal(error, out.parent, hint=_ELSEWHERE) from error


# --- the partial folder


def partial_folder(plan: ReshardPlan, stamps: Mapping[Path, Stamp | None]) -> tuple[Path, bool]:
    """The hidden folder that grows beside the destination, or in it if that is a folder already.

    There is one for each source and output. Its name has the same hash after a reboot, and with the
    source mounted at another place.

    Returns:
        The folder, and whether an earlier version began it, which did not look at the times of
        change (ctime) of the source: what it has written so far proves nothing.
    """
    own = _partial_name(plan, [(path.name, s and s.lasting) for path, s in stamps.items()])
    if own.is_dir():
        return own, False
    # version 1 hashed no times of change; version 0, whole paths and devices: until the next mount
    first = _partial_name(plan, [(path.name, s and s.lasting[:-1]) for path, s in stamps.items()])
    zeroth = _partial_name(plan, [(str(path), s) for path, s in stamps.items()])
    earlier = next((folder for folder in (first, zeroth) if folder.is_dir()), None)
    return (own, False) if earlier is None else (earlier, True)


def _partial_name(plan: ReshardPlan, sources: Iterable[object]) -> Path:
    hasher = hashlib.sha256(str(plan.compression).encode())
    for layout in plan.layouts:
        hasher.update(layout.header)
    for source in sources:
        hasher.update(repr(source).encode())
    name = f".{plan.out.name}.{hasher.hexdigest()[:12]}.partial"
    return plan.out / name if _is_inside(plan.out) else plan.out.parent / name


def leftovers(partial: Path, out: Path) -> list[Path]:
    """Hidden folders of other runs with the same destination, or of one killed at its very end."""
    name = glob.escape(out.name)
    if partial.parent == out:
        return sorted(set(out.glob(".*.partial")) - {partial})
    folders = [*out.parent.glob(f".{name}.*.partial"), *out.parent.glob(f".{name}.*.replaced")]
    return sorted(set(folders) - {partial})


def check_unchanged(
    source: Release | ReadyCheckpoint,
    stamps: Mapping[Path, Stamp | None],
    proof: Receipt | None,
    partial: Path,
) -> None:
    """Refuse to publish if the source changed; the partial folder is then deleted.

    Args:
        source: As it is now.
        stamps: Of its files when the reshard began.
        proof: Of a release; its files must also be as they were proven.
        partial: The folder that would be published.

    Raises:
        CorruptCheckpointError: A file of the source changed.
    """
    changed = [path.name for path, stamp in stamps_of(source).items() if stamps.get(path) != stamp]
    if proof is not None:
        changed += sorted(proof.stamps.keys() - proof.untouched(source.root))
    if changed:
        shutil.rmtree(partial)
        command = f"grokctl verify {quoted(source.root)}"
        raise corrupt(changed[0], Reason.ALTERED, "changed while it was read", command)


def refuse_altered(
    source: Release | ReadyCheckpoint, damage: Sequence[Damage], partial: Path
) -> None:
    """Refuse to publish what was made from wrong bytes; the partial folder is then deleted.

    Raises:
        CorruptCheckpointError: A file of the source is damaged.
    """
    for item in damage:
        shutil.rmtree(partial)
        raise corrupt(item.file, item.reason, item.detail, f"grokctl verify {quoted(source.root)}")


# --- the last files, and the name


def origin_of(
    source: Release | ReadyCheckpoint, proof: Receipt | None, *, is_earlier: bool
) -> Source:
    """What a manifest says about its source.

    Args:
        source: Whose files were hashed while they were read, or are covered by the proof.
        proof: Of a release.
        is_earlier: Whether an earlier version has read a part of them.
    """
    if isinstance(source, Release):
        known = None if is_earlier else proof
        return Source(
            name=source.name,
            infohash=known.infohash if known else None,
            proven=known is not None,
            verified_at=known.verified_at if known else None,
            root_of_trust=known.root_of_trust if known else None,
        )
    origin = replace(source.source, precision=source.precision)
    if not is_earlier and doubt_of(source) is None:
        return origin
    return replace(origin, proven=False, verified_at=None, root_of_trust=None)


def write_rest(
    plan: ReshardPlan,
    partial: Path,
    origin: Source,
    records: list[FileRecord],
    errors: Mapping[str, float],
) -> None:
    """Write the tokenizer, the checksums and, last, the manifest.

    Raises:
        CorruptCheckpointError: The tokenizer of a ready checkpoint is not that of its manifest.
    """
    source = plan.source
    if source.tokenizer is not None:
        data = source.tokenizer.read_bytes()
        if isinstance(source, ReadyCheckpoint) and TOKENIZER in source.manifest.records:
            found = altered(source.manifest.records[TOKENIZER], hashlib.sha256(data).hexdigest())
            refuse_altered(source, [found] if found else [], partial)
        _write_synced(partial / TOKENIZER, data)
        records.append(
            FileRecord(name=TOKENIZER, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        )
    manifest = manifest_bytes(
        Manifest(
            storage=plan.storage,
            mesh=plan.mesh,
            source=origin,
            devices=tuple(layout.device for layout in plan.layouts),
            compression=plan.compression,
            errors=errors,
            files=tuple(records),
        )
    )
    sums = [f"{record.sha256}  {record.name}\n" for record in records]
    sums.append(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n")
    _write_synced(partial / SUMS, "".join(sums).encode())
    _write_synced(partial / MANIFEST, manifest)


def _write_synced(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # a planted link is removed, not followed
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        with optional():
            os.fsync(file.fileno())


def take_back(partial: Path) -> None:
    """Continue after a kill during `publish` into a folder: its files are still of this run."""
    out = partial.parent
    if _is_partial(partial.name) and not (out / MANIFEST).exists() and is_filled(out):
        for path in out.iterdir():
            if _OURS.fullmatch(path.name) and not (partial / path.name).exists():
                path.rename(partial / path.name)


def _fill(partial: Path, out: Path) -> None:
    """Move the files into an existing folder; the manifest, last, makes it a checkpoint."""
    (out / MANIFEST).unlink(missing_ok=True)
    for path in out.iterdir():
        if _OURS.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (partial / JOURNAL).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.name == MANIFEST:
            fsync_folder(out)
        path.rename(out / path.name)
    partial.rmdir()
    fsync_folder(out)


def publish(partial: Path, out: Path) -> None:
    """Rename the partial folder; a run that is killed during this can continue."""
    fsync_folder(partial)
    if partial.parent == out:
        _fill(partial, out)
        return
    replaced = partial.with_suffix(".replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    fsync_folder(out.parent)
    (out / JOURNAL).unlink(missing_ok=True)
    if replaced.exists():
        shutil.rmtree(replaced)
