"""The destination of a reshard: what may be there, the partial folder, the final rename."""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
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
from grokctl.paths import MANIFEST, TOKENIZER, fsync_folder, kind_of, quoted
from grokctl.resharding.plan import ReshardPlan

JOURNAL: Final = "journal"

_OURS: Final = re.compile(
    rf"device-\d\d-of-\d\d\.safetensors({re.escape(SUFFIX)})?|"
    + "|".join(map(re.escape, (MANIFEST, SUMS, TOKENIZER, JOURNAL)))
)
"""What a ready checkpoint's folder holds."""


def left_over(partial: Path, out: Path) -> list[Path]:
    """Hidden folders of other runs to the same name, or of one that was killed at its very end."""
    name = glob.escape(out.name)
    found = [*out.parent.glob(f".{name}.*.partial"), *out.parent.glob(f".{name}.*.replaced")]
    return sorted(set(found) - {partial})


def check_destination(plan: ReshardPlan, *, force: bool) -> None:
    """Refuse to write where something is that this may not replace.

    Raises:
        UsageError: The name is taken, and not forced or not by a ready checkpoint alone.
    """
    out = plan.out
    elsewhere = "--out DIR writes elsewhere"
    if not os.path.lexists(out):
        return
    if out.is_symlink() or kind_of(out) != "ready":
        raise UsageError(
            f"{out}: exists and is no ready checkpoint, so nothing replaces it", elsewhere
        )
    if plan.source.root.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: is or holds what would be cut", elsewhere)
    foreign = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise UsageError(
            f"{out}: holds {foreign[0]!r}, which is not grokctl's, so nothing replaces it",
            elsewhere,
        )
    if not force:
        raise UsageError(f"{out}: exists", f"--force replaces it, {elsewhere}")


def check_space(plan: ReshardPlan, nbytes: int, free: int) -> None:
    """Refuse what does not fit.

    Raises:
        DiskFullError: Fewer bytes are free than will be written.
    """
    if nbytes > free:
        raise DiskFullError(
            f"{plan.out.parent}: {nbytes:,} bytes are needed, {free:,} are free",
            "--out DIR writes elsewhere",
        )


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Translate what the file system refuses while `out` is made."""
    try:
        yield
    except OSError as error:
        raise refusal(error, out.parent, hint="--out DIR writes elsewhere") from error


def stamps_of(source: Release | ReadyCheckpoint) -> dict[Path, Stamp | None]:
    """Of every file of the source, by which a change of it shows."""
    if isinstance(source, Release):
        paths = [tensor.path for tensor in source.tensors]
    else:
        paths = [source.root / record.name for record in source.files]
    return {path.resolve(): Stamp.of(path) for path in paths}


def digest(plan: ReshardPlan, stamps: Mapping[Path, Stamp | None]) -> str:
    """What a partial folder is for: these inputs, this output."""
    hasher = hashlib.sha256(str(plan.compression).encode())
    for layout in plan.layouts:
        hasher.update(layout.header)
    for path, stamp in stamps.items():
        hasher.update(repr((str(path), stamp)).encode())
    return hasher.hexdigest()


def check_unchanged(
    source: Release | ReadyCheckpoint, stamps: Mapping[Path, Stamp | None], partial: Path
) -> None:
    """Refuse to publish what was cut from files that changed meanwhile.

    Raises:
        CorruptCheckpointError: One did; what was made of it is gone.
    """
    changed = [path for path, stamp in stamps_of(source).items() if stamps.get(path) != stamp]
    if changed:
        shutil.rmtree(partial)
        look = f"grokctl verify {quoted(source.root)}"
        name = changed[0].name
        raise corrupt(name, Reason.ALTERED, "changed while it was read", look)


def write_rest(
    plan: ReshardPlan,
    partial: Path,
    proof: Receipt | None,
    records: list[FileRecord],
    errors: Mapping[str, float],
) -> None:
    """The tokenizer, the sums, and last the manifest."""
    source = plan.source
    if source.tokenizer is not None:
        data = source.tokenizer.read_bytes()
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
    path.unlink(missing_ok=True)  # and whatever it may link to stays as it is
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, out: Path) -> None:
    """Give a folder its name; a run that is killed anywhere here goes on where it was."""
    fsync_folder(partial)
    replaced = partial.with_suffix(".replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    fsync_folder(out.parent)
    (out / JOURNAL).unlink(missing_ok=True)
    if replaced.exists():
        shutil.rmtree(replaced)
