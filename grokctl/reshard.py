"""Plan, then execute, the rewrite of a checkpoint for a mesh: bounded memory, resumable, atomic."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from grokctl.checkpoint.logical import ReleaseSource, Slices, chunks, extent
from grokctl.checkpoint.ready import (
    SUMS,
    DeviceLayout,
    DeviceTensor,
    FileRecord,
    ReadyCheckpoint,
    Source,
    device_layout,
    manifest_bytes,
    open_ready,
)
from grokctl.checkpoint.receipt import Receipt, Stamp
from grokctl.checkpoint.release import Release
from grokctl.errors import DiskFullError, UsageError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, ignore
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.paths import MANIFEST, TOKENIZER, fsync_folder, kind_of

_LARGEST_CHUNK: Final = 64 * 2**20
_SMALLEST_CHUNK: Final = 2**20
_SYNC_EVERY: Final = 2**30
"""Bytes between two points from which a killed run goes on."""
_JOURNAL: Final = "journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """What a reshard will read and write."""

    out: Path
    mesh: MeshShape
    precision: Precision
    layouts: tuple[DeviceLayout, ...]
    bytes_in: int
    jobs: int
    chunk: int
    """Bytes that one worker holds at a time; a transpose needs no second copy."""

    @property
    def bytes_out(self) -> int:
        """Bytes of all device files."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def peak_bytes(self) -> int:
        """Bytes that the workers hold at most, beside mapped pages."""
        largest = max(
            prod(extent(part)) * held.tensor.dtype.itemsize
            for held in self.layouts[0].tensors
            for part in _parts(held, self.chunk)
        )
        return self.jobs * largest


def plan(
    release: Release,
    *,
    mesh: MeshShape,
    out: Path,
    precision: Precision = Precision.INT8,
    jobs: int | None = None,
    max_memory: int | None = None,
) -> ReshardPlan:
    """Decide every byte that will be written; touch nothing.

    Args:
        release: Opened, so its structure is sound.
        mesh: Which devices to cut for.
        out: Folder to publish; must not exist when the plan is executed, unless forced.
        precision: How to store weights.
        jobs: Worker threads; as many as cores, and at most one a device, by default.
        max_memory: Bytes for all workers together; 64 MiB each by default, at least 1 MiB.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    source = ReleaseSource(release)
    layouts = tuple(
        device_layout(source, mesh=mesh, precision=precision, device=device)
        for device in range(mesh.size)
    )
    workers = max(1, min(jobs or os.cpu_count() or 1, mesh.size))
    share = _LARGEST_CHUNK if max_memory is None else max_memory // workers
    return ReshardPlan(
        out=out,
        mesh=mesh,
        precision=precision,
        layouts=layouts,
        bytes_in=release.nbytes,
        jobs=workers,
        chunk=min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, share)),
    )


def reshard(
    release: Release,
    plan: ReshardPlan,
    *,
    proof: Receipt | None = None,
    force: bool = False,
    observe: Observer = ignore,
) -> ReadyCheckpoint:
    """Write a ready checkpoint; its name appears when every byte of it is on disk, not before.

    Device files grow side by side in a hidden sibling folder, hashed as they are written. A killed
    run goes on from its last journal entry, after hashing again what it keeps.

    Args:
        release: What the plan was made for.
        plan: From `plan`.
        proof: The receipt that covers the release, if there is one; the manifest records it.
        force: Whether to replace a ready checkpoint of the same name.
        observe: Receives progress in bytes written.

    Raises:
        UsageError: The name is taken, or the destination cannot be written.
        DiskFullError: It does not fit; what was written is kept for the next run.
        CorruptCheckpointError: The release changed under our hands.
    """
    partial = plan.out.parent / f".{plan.out.name}.{_digest(release, plan)[:12]}.partial"
    with _writing(plan):
        _check_destination(plan, force=force)
        partial.mkdir(parents=True, exist_ok=True)
        with _alone(partial):
            _check_destination(plan, force=force)  # another run may have ended just now
            _check_space(plan, partial)
            records = _write_devices(release, plan, partial, observe)
            _write_rest(release, plan, partial, proof, records)
            _publish(partial, plan.out)
    return open_ready(plan.out)


def _check_destination(plan: ReshardPlan, *, force: bool) -> None:
    out = plan.out
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{out}: exists", "--force replaces it, --out DIR writes elsewhere")
    if kind_of(out) != "ready":
        raise UsageError(f"{out}: exists and is no ready checkpoint, so --force does not apply")


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keep every other grokctl out of a partial folder.

    Raises:
        UsageError: Somebody writes there already.
    """
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(f"{partial}: another grokctl is writing there") from error
    finally:
        os.close(handle)


def _check_space(plan: ReshardPlan, partial: Path) -> None:
    written = sum(file.stat().st_size for file in partial.iterdir())
    free = shutil.disk_usage(partial).free
    if plan.bytes_out - written > free:
        raise DiskFullError(
            f"{plan.out.parent}: {plan.bytes_out - written:,} bytes are needed, {free:,} are free",
            "--out DIR writes elsewhere",
        )


@contextmanager
def _writing(plan: ReshardPlan) -> Iterator[None]:
    """Translate what the file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(
                f"{plan.out.parent}: the disk is full; what was written is kept",
                "free some space and run the same command again: it goes on where it stopped",
            ) from error
        raise UsageError(
            f"{plan.out}: cannot be written ({error.strerror})", "--out DIR writes elsewhere"
        ) from error


def _digest(release: Release, plan: ReshardPlan) -> str:
    """What a partial folder is for: these inputs, this output."""
    hasher = hashlib.sha256()
    for layout in plan.layouts:
        hasher.update(layout.header)
    for tensor in release.tensors:
        hasher.update(repr((str(tensor.path.resolve()), Stamp.of(tensor.path))).encode())
    return hasher.hexdigest()


class _DeviceWriter:
    """One device's file: appended in order, hashed on the way."""

    def __init__(self, layout: DeviceLayout, path: Path, *, chunk: int, tensors_done: int) -> None:
        self.layout = layout
        self.chunk = chunk
        self.hasher = hashlib.sha256()
        keep = layout.tensors[tensors_done - 1].end if tensors_done else 0
        self.file: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        while (position := self.file.tell()) < keep:
            data = self.file.read(min(2**22, keep - position))
            self.hasher.update(data)
        self.file.truncate(keep)
        if keep == 0:
            self.write(layout.header)

    def write(self, data: bytes | memoryview) -> int:
        self.file.write(data)
        self.hasher.update(data)
        return len(data)

    def copy(self, source: ReleaseSource, held: DeviceTensor) -> int:
        """Append one tensor; return its bytes."""
        return sum(
            self.write(source.read(held.tensor, part).reshape(-1).view("u1").data)
            for part in _parts(held, self.chunk)
        )

    def sync(self) -> None:
        self.file.flush()
        os.fdatasync(self.file.fileno())

    def record(self) -> FileRecord:
        return FileRecord(
            name=self.layout.name, nbytes=self.file.tell(), sha256=self.hasher.hexdigest()
        )


def _parts(held: DeviceTensor, limit: int) -> Sequence[Slices]:
    return chunks(held.slices, itemsize=held.tensor.dtype.itemsize, limit=limit)


def _write_devices(
    release: Release, plan: ReshardPlan, partial: Path, observe: Observer
) -> list[FileRecord]:
    source = ReleaseSource(release)
    count = len(plan.layouts[0].tensors)
    done = _tensors_done(partial, plan)
    if done:
        observe(Noted(message=f"goes on after {done} of {count} tensors of an interrupted run"))
    with ThreadPoolExecutor(plan.jobs) as pool:
        writers = list(
            pool.map(
                lambda layout: _DeviceWriter(
                    layout, partial / layout.name, chunk=plan.chunk, tensors_done=done
                ),
                plan.layouts,
            )
        )
        try:
            _copy_tensors(source, plan, partial, writers, done, pool, observe)
            return [writer.record() for writer in writers]
        finally:
            for writer in writers:
                writer.file.close()


def _copy_tensors(
    source: ReleaseSource,
    plan: ReshardPlan,
    partial: Path,
    writers: list[_DeviceWriter],
    done: int,
    pool: ThreadPoolExecutor,
    observe: Observer,
) -> None:
    written = sum(writer.file.tell() for writer in writers)
    synced = written
    observe(Started(stage=Stage.RESHARD, total=plan.bytes_out, done=written))
    for index in range(done, len(plan.layouts[0].tensors)):
        jobs = [
            pool.submit(writer.copy, source, writer.layout.tensors[index]) for writer in writers
        ]
        for job in jobs:
            written += job.result()
            name = writers[0].layout.tensors[index].tensor.key
            observe(Advanced(stage=Stage.RESHARD, done=written, detail=name))
        if written - synced >= _SYNC_EVERY:
            list(pool.map(_DeviceWriter.sync, writers))
            _note_done(partial, index + 1)
            synced = written
    list(pool.map(_DeviceWriter.sync, writers))
    _note_done(partial, len(plan.layouts[0].tensors))
    observe(Finished(stage=Stage.RESHARD))


def _tensors_done(partial: Path, plan: ReshardPlan) -> int:
    """How many tensors every device file holds for certain."""
    try:
        lines = (partial / _JOURNAL).read_bytes().splitlines()
    except OSError:
        return 0
    count = len(plan.layouts[0].tensors)
    noted = [int(line) for line in lines if line.isdigit() and len(line) <= len(str(count))]
    done = max((number for number in noted if number <= count), default=0)
    for layout in plan.layouts:
        path = partial / layout.name
        size = path.stat().st_size if path.is_file() else 0
        while done and size < layout.tensors[done - 1].end:
            done -= 1
    return done


def _note_done(partial: Path, tensors: int) -> None:
    with (partial / _JOURNAL).open("a") as journal:
        journal.write(f"{tensors}\n")
        journal.flush()
        os.fsync(journal.fileno())


def _write_rest(
    release: Release,
    plan: ReshardPlan,
    partial: Path,
    proof: Receipt | None,
    records: list[FileRecord],
) -> None:
    """The tokenizer, the sums, and last the manifest."""
    if release.tokenizer is not None:
        data = release.tokenizer.read_bytes()
        _write_synced(partial / TOKENIZER, data)
        records.append(
            FileRecord(name=TOKENIZER, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        )
    manifest = manifest_bytes(
        ReleaseSource(release),
        plan.layouts,
        mesh=plan.mesh,
        precision=plan.precision,
        origin=Source(
            name=release.name,
            infohash=proof.infohash if proof else None,
            proven=proof is not None,
            verified_at=proof.verified_at if proof else None,
        ),
        files=records,
    )
    sums = [f"{record.sha256}  {record.name}\n" for record in records]
    sums.append(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n")
    _write_synced(partial / SUMS, "".join(sums).encode())
    _write_synced(partial / MANIFEST, manifest)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial: Path, out: Path) -> None:
    (partial / _JOURNAL).unlink(missing_ok=True)
    fsync_folder(partial)
    replaced = None
    if out.exists():
        replaced = partial.with_suffix(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed right here
        out.rename(replaced)
    partial.rename(out)
    fsync_folder(out.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
