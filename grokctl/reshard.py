"""Plan, then execute, the rewrite of a checkpoint for a mesh: bounded memory, resumable, atomic."""

import errno
import glob
import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final

from grokctl.checkpoint.frames import FRAME, SUFFIX, Compression
from grokctl.checkpoint.layout import DeviceLayout, device_layouts
from grokctl.checkpoint.manifest import FileRecord, Manifest, Source, manifest_bytes
from grokctl.checkpoint.ready import SUMS, ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import Receipt, Stamp
from grokctl.checkpoint.release import Release
from grokctl.checkpoint.storage import storage_in
from grokctl.checkpoint.tensor_source import ReleaseSource, Slices, Storage, TensorSource, extent
from grokctl.errors import DiskFullError, Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, ignore
from grokctl.machine.memory import memory
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.precision import Precision, check_conversion
from grokctl.paths import MANIFEST, TOKENIZER, fsync_folder, kind_of, locked, quoted
from grokctl.resharding.convert import NOTHING, Squares, is_stored_alike
from grokctl.resharding.pipeline import Pipeline, Progress
from grokctl.resharding.slices import cuts_of
from grokctl.resharding.writers import DeviceWriter, Entry, Flusher, Journal, resume

_LARGEST_ARRAY: Final = 2**24
_SMALLEST_ARRAY: Final = 2**20
_MOST_WAITING: Final = 8
_FEWEST_WAITING: Final = 2
"""Finished arrays that wait for their writers, beside those that workers make: a tenth faster with
eight than with two, where there is memory for them."""
_SCRATCH: Final = 16 * 2**20
"""Bytes that a worker needs beside its array: rows as they were read, floats, integers."""
_JOURNAL: Final = "journal"
_OURS: Final = re.compile(
    rf"device-\d\d-of-\d\d\.safetensors({re.escape(SUFFIX)})?|"
    + "|".join(map(re.escape, (MANIFEST, SUMS, TOKENIZER, _JOURNAL)))
)
"""What a ready checkpoint's folder holds."""


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """What a reshard will read and write."""

    source: Release | ReadyCheckpoint
    out: Path
    mesh: MeshShape
    storage: Storage
    layouts: tuple[DeviceLayout, ...]
    """Of the devices whose files are written."""
    compression: Compression | None
    jobs: int
    arrays: int
    """How many there are at a time: made, waiting, or being written."""
    array_nbytes: int
    """Bytes of an array that a worker makes at a time, at most."""

    @cached_property
    def tensors(self) -> TensorSource:
        """The source as what tensors are cut from."""
        return ReleaseSource(self.source) if isinstance(self.source, Release) else self.source

    @property
    def precision(self) -> Precision:
        """How weights will be stored."""
        return self.storage.precision

    @property
    def bytes_out(self) -> int:
        """Bytes of all device files, before compression."""
        return sum(layout.nbytes for layout in self.layouts)

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of the source's tensors that are read."""
        wanted: dict[str, set[Slices]] = {}
        for layout in self.layouts:
            for held in layout.tensors:
                if not held.tensor.is_scales:
                    wanted.setdefault(held.tensor.spec.name, set()).add(held.slices)
        total = 0
        for own in self.tensors.storage.tensors:
            name = own.spec.name
            count = sum(prod(extent(slices)) for slices in wanted[name])
            whole = prod(self.storage.weight(own.spec).shape)
            total += prod(own.shape) * own.dtype.itemsize * count // whole
        return total

    @property
    def peak_bytes(self) -> int:
        """Bytes that reading, converting and writing hold at most."""
        frames = 2 if self.compression else 1
        return self.arrays * self.array_nbytes * frames + self.jobs * _SCRATCH


def plan(
    source: Release | ReadyCheckpoint,
    *,
    mesh: MeshShape,
    out: Path,
    precision: Precision | None = None,
    group_size: int | None = None,
    compression: Compression | None = None,
    devices: frozenset[int] | None = None,
    jobs: int | None = None,
    max_memory: int | None = None,
) -> ReshardPlan:
    """Decide every byte that will be written; touch nothing.

    Args:
        source: Opened, so its structure is sound; ready checkpoints should be streamed.
        mesh: Which devices to cut for.
        out: Folder to publish; must not exist when the plan is executed, unless forced.
        precision: How to store weights; as the source does by default.
        group_size: Inputs that share an int4 scale; by default 64, or what the mesh allows.
        compression: Of the device files.
        devices: Whose files to write; all by default.
        jobs: Worker threads; as many as cores by default.
        max_memory: Bytes for all that is under way; a quarter of free memory by default.

    Raises:
        PlacementError: The model does not divide over the mesh, or the precision cannot be had.
        UsageError: The source holds only a part of the model, or there is no such device.
    """
    if isinstance(source, ReadyCheckpoint):
        source.check_whole()
    tensors = ReleaseSource(source) if isinstance(source, Release) else source
    own = tensors.storage
    wanted = own.precision if precision is None else precision
    check_conversion(own.precision, wanted)
    check_mesh(mesh, own.config)
    storage = storage_in(own, wanted, mesh, group_size=group_size)
    layouts = device_layouts(storage, mesh)
    if devices is not None:
        layouts = tuple(layout for layout in layouts if layout.device in devices)
        if len(layouts) != len(devices) or not devices:
            raise UsageError(
                f"devices {_ranges(devices)} are not all of the {mesh.size} of {mesh}",
                f"--only-devices 0-{mesh.size - 1}",
            )
    threads, arrays, array_nbytes = _threads_and_arrays(layouts, compression, jobs, max_memory)
    return ReshardPlan(
        source=source,
        out=out,
        mesh=mesh,
        storage=storage,
        layouts=layouts,
        compression=compression,
        jobs=threads,
        arrays=arrays,
        array_nbytes=array_nbytes,
    )


def usual_name(
    source: Release | ReadyCheckpoint,
    *,
    mesh: MeshShape,
    precision: Precision | None,
    compression: Compression | None,
) -> str:
    """Name of the folder under home: `NAME-PRECISION-MESH`, with `-zst` if compressed."""
    if isinstance(source, ReadyCheckpoint):
        name, own = source.source.folder, source.precision
    else:
        name, own = source.name, Precision.INT8
    return f"{name}-{precision or own}-{mesh.slug}" + ("-zst" if compression else "")


def _ranges(devices: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(devices)[:8])) or "none"


def _threads_and_arrays(
    layouts: Sequence[DeviceLayout],
    compression: Compression | None,
    jobs: int | None,
    max_memory: int | None,
) -> tuple[int, int, int]:
    """How many threads work, how many arrays there are, and bytes of one: all in the memory."""
    budget = memory().usable // 4 if max_memory is None else max_memory
    copies = 2 if compression else 1
    smallest = FRAME if compression else _SMALLEST_ARRAY
    least = copies * _largest(layouts, smallest)
    room = (budget - _FEWEST_WAITING * least) // (_SCRATCH + least)
    threads = max(1, min(jobs or os.cpu_count() or 1, room))
    rest = budget - threads * _SCRATCH
    waiting = max(_FEWEST_WAITING, min(_MOST_WAITING, rest // (2 * least) - threads))
    share = rest // (copies * (threads + waiting))
    largest = _largest(layouts, max(smallest, min(share, _LARGEST_ARRAY)))
    return threads, threads + waiting, largest


def _largest(layouts: Sequence[DeviceLayout], limit: int) -> int:
    """Bytes of the largest array that is made under a limit."""
    unlike: dict[tuple[object, ...], int] = {}  # layers are alike: one of them tells
    for index, held in enumerate(layouts[0].tensors):
        slices = tuple(layout.tensors[index].slices for layout in layouts)
        unlike.setdefault((held.tensor.dtype, held.tensor.groups, slices), index)
    return max(
        cut.nbytes for index in unlike.values() for cut in cuts_of(layouts, index, limit=limit)
    )


def reshard(
    plan: ReshardPlan,
    *,
    proof: Receipt | None = None,
    force: bool = False,
    observe: Observer = ignore,
) -> ReadyCheckpoint:
    """Write a ready checkpoint; its name appears when every byte of it is on disk, not before.

    Device files grow side by side in a hidden sibling folder, hashed as they are written. A killed
    run goes on behind the last tensor that all of them hold, after hashing again what it keeps.

    Args:
        plan: From `plan`.
        proof: The receipt that covers a release, if there is one; the manifest records it.
        force: Whether to replace a ready checkpoint of the same name.
        observe: Receives progress in bytes written, before compression.

    Raises:
        UsageError: The name is taken, or the destination cannot be written.
        DiskFullError: It does not fit; what was written is kept for the next run.
        CorruptCheckpointError: The source changed under our hands.
    """
    stamps = _stamps(plan.source)
    partial = plan.out.parent / f".{plan.out.name}.{_digest(plan, stamps)[:12]}.partial"
    with _writing(plan):
        check_destination(plan, force=force)
        partial.mkdir(parents=True, exist_ok=True)
        for other in _left_over(partial, plan.out):
            message = "another run left it, or is at work there"
            observe(Noted(message=f"{other}: {message}; to remove it: rm -r {quoted(other)}"))
        busy = UsageError(f"{partial}: another grokctl is writing there")
        with locked(partial, busy=busy, is_folder=True):
            check_destination(plan, force=force)  # another run may have ended just now
            records, errors = _write_devices(plan, partial, observe)
            _write_rest(plan, partial, proof, records, errors)
            _check_unchanged(plan.source, stamps, partial)
            check_destination(plan, force=force)  # somebody may have put something there
            _publish(partial, plan.out)
    return open_ready(plan.out)


def _left_over(partial: Path, out: Path) -> list[Path]:
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
            f"{plan.out}: cannot be written ({error.strerror or error})",
            "--out DIR writes elsewhere",
        ) from error


def _stamps(source: Release | ReadyCheckpoint) -> dict[Path, Stamp | None]:
    """Of every file of the source, by which a change of it shows."""
    if isinstance(source, Release):
        paths = [tensor.path for tensor in source.tensors]
    else:
        paths = [source.root / record.name for record in source.files]
    return {path.resolve(): Stamp.of(path) for path in paths}


def _digest(plan: ReshardPlan, stamps: Mapping[Path, Stamp | None]) -> str:
    """What a partial folder is for: these inputs, this output."""
    hasher = hashlib.sha256(str(plan.compression).encode())
    for layout in plan.layouts:
        hasher.update(layout.header)
    for path, stamp in stamps.items():
        hasher.update(repr((str(path), stamp)).encode())
    return hasher.hexdigest()


def _check_unchanged(
    source: Release | ReadyCheckpoint, stamps: Mapping[Path, Stamp | None], partial: Path
) -> None:
    """Refuse to publish what was cut from files that changed meanwhile.

    Raises:
        CorruptCheckpointError: One did; what was made of it is gone.
    """
    changed = [path for path, stamp in _stamps(source).items() if stamps.get(path) != stamp]
    if changed:
        shutil.rmtree(partial)
        look = f"grokctl verify {quoted(source.root)}"
        name = changed[0].name
        raise corrupt(name, Reason.ALTERED, "changed while it was read", look)


def _write_devices(
    plan: ReshardPlan, partial: Path, observe: Observer
) -> tuple[list[FileRecord], dict[str, float]]:
    """Every device's file, synced, and what converting did to each weight."""
    if plan.compression is None:  # else nobody knows how much it will be
        kept = sum(file.stat().st_size for file in partial.iterdir())
        check_space(plan, plan.bytes_out - kept, shutil.disk_usage(partial).free)
    writers: list[DeviceWriter] = []
    try:
        writers.extend(DeviceWriter(layout, partial, plan.compression) for layout in plan.layouts)
        journal = Journal(partial / _JOURNAL, len(writers))
        observe(Started(stage=Stage.RESHARD, total=plan.bytes_out))
        done = resume(writers, journal, observe)
        count = len(plan.layouts[0].tensors)
        if done:
            observe(Noted(message=f"goes on after {done} of {count} tensors of an interrupted run"))
        _cut_tensors(plan, writers, journal, observe)
        observe(Finished(stage=Stage.RESHARD))
        return [writer.record() for writer in writers], _errors(plan, journal)
    finally:
        for writer in writers:
            writer.close()


def _cut_tensors(
    plan: ReshardPlan, writers: list[DeviceWriter], journal: Journal, observe: Observer
) -> None:
    """Make what the journal does not have yet."""
    done = len(journal.entries)
    written = sum(writer.plain_nbytes for writer in writers)
    squares: dict[str, Squares] = {}
    flusher = Flusher(writers)

    def note(progress: Progress) -> None:
        nonlocal written
        key = progress.tensor.key
        written += progress.nbytes
        squares[key] = squares.get(key, NOTHING) + progress.squares
        observe(Advanced(stage=Stage.RESHARD, done=written, detail=key))
        if progress.marks:
            if not math.isfinite(squares[key].error + squares[key].total):
                raise corrupt(
                    key,
                    Reason.ALTERED,
                    f"holds values that are no numbers, or too large for {plan.precision}",
                    f"grokctl inspect {quoted(plan.source.root)} --stats",
                )
            journal.note(Entry(progress.marks, squares.pop(key)))
            flusher.poke(sum(writer.nbytes for writer in writers))

    tensors = [held.tensor for held in plan.layouts[0].tensors]
    with (
        flusher,
        Pipeline(
            plan.tensors,
            writers,
            compression=plan.compression,
            jobs=plan.jobs,
            arrays=plan.arrays,
            array_nbytes=plan.array_nbytes,
        ) as pipeline,
    ):
        made = set()
        for index in range(done, len(tensors)):
            tensor = tensors[index]
            if tensor.is_scales and tensor.spec in made:
                pipeline.add_scales(tensor)
            else:
                for cut in cuts_of(plan.layouts, index, limit=plan.array_nbytes):
                    for progress in pipeline.add(cut):
                        note(progress)
                if tensor.is_matrix and not is_stored_alike(plan.tensors, tensor):
                    made.add(tensor.spec)
            pipeline.mark(tensor)
        for progress in pipeline.drain():
            note(progress)
        flusher.finish()


def _errors(plan: ReshardPlan, journal: Journal) -> dict[str, float]:
    """Relative root mean square error of every weight that the release quantises."""
    return {
        held.tensor.key: entry.squares.relative_rms
        for held, entry in zip(plan.layouts[0].tensors, journal.entries, strict=True)
        if held.tensor.spec.is_quantized and not held.tensor.is_scales
    }


def _write_rest(
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


def _publish(partial: Path, out: Path) -> None:
    """Give a folder its name; a run that is killed anywhere here goes on where it was."""
    fsync_folder(partial)
    replaced = partial.with_suffix(".replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    fsync_folder(out.parent)
    (out / _JOURNAL).unlink(missing_ok=True)
    if replaced.exists():
        shutil.rmtree(replaced)
