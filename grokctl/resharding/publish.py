"""The destination of a reshard: checks, the partial folder, and the final rename."""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from grokctl.checkpoint.frames import SUFFIX
from grokctl.checkpoint.manifest import FileRecord, Manifest, Source, manifest_bytes
from grokctl.checkpoint.ready import SUMS, ReadyCheckpoint
from grokctl.checkpoint.receipt import Receipt, Stamp
from grokctl.checkpoint.release import Release
from grokctl.errors import DiskFullError, Reason, UsageError, corrupt
from grokctl.os_errors import refusal
from grokctl.paths import (
    CKPT,
    LARGEST_TOKENIZER,
    MANIFEST,
    PRIVATE,
    TOKENIZER,
    fsync_folder,
    kind_of,
    quoted,
    read_limited,
)
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


def partial_folder(plan: ReshardPlan, stamps: Mapping[Path, Stamp | None]) -> Path:
    """The hidden folder that grows beside the destination, or in it if that is a folder already.

    There is one for each source and output. Its name has the same hash after a reboot, and with the
    source mounted at another place.
    """
    folder = _partial_name(plan, [(path.name, s and s.lasting) for path, s in stamps.items()])
    earlier = _partial_name(plan, [(str(path), s) for path, s in stamps.items()])
    # version 0 hashed whole paths and stamps, so its folder is found until the next mount
    return earlier if earlier.is_dir() and not folder.is_dir() else folder


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


def stamps_of(source: Release | ReadyCheckpoint) -> dict[Path, Stamp | None]:
    """The stamps of all files of the source, to detect changes."""
    if isinstance(source, Release):
        paths = [tensor.path for tensor in source.tensors]
    else:
        paths = [source.root / record.name for record in source.files]
    return {path.resolve(): Stamp.of(path) for path in paths}


def check_unchanged(
    source: Release | ReadyCheckpoint, stamps: Mapping[Path, Stamp | None], partial: Path
) -> None:
    """Refuse to publish if the source changed; the partial folder is then deleted.

    Raises:
        CorruptCheckpointError: A file of the source changed.
    """
    changed = [path for path, stamp in stamps_of(source).items() if stamps.get(path) != stamp]
    if changed:
        shutil.rmtree(partial)
        command = f"grokctl verify {quoted(source.root)}"
        raise corrupt(changed[0].name, Reason.ALTERED, "changed while it was read", command)


# --- the last files, and the name


def write_rest(
    plan: ReshardPlan,
    partial: Path,
    proof: Receipt | None,
    records: list[FileRecord],
    errors: Mapping[str, float],
) -> None:
    """Write the tokenizer, the checksums and, last, the manifest."""
    source = plan.source
    if source.tokenizer is not None:
        data = read_limited(source.tokenizer, LARGEST_TOKENIZER)
        _write_synced(partial / TOKENIZER, data)
        records.append(
            FileRecord(name=TOKENIZER, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        )
    if isinstance(source, Release):
        origin = Source(
            name=source.name,
            infohash=proof.infohash if proof else None,
            proven=proof is not None,
            verified_at=proof.verified_at if proof else None,
        )
    else:
        origin = replace(source.source, precision=source.precision)
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
