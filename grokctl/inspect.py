"""List the tensors of a checkpoint: name, shape, size, dtype, and statistics of the values."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from threading import Event

from grokctl.checkpoint.export_headers import tensors_in
from grokctl.checkpoint.export_manifest import Export, open_export
from grokctl.checkpoint.gguf_model import gguf_name
from grokctl.checkpoint.hub_record import INFOHASH_PROOF
from grokctl.checkpoint.pickle_objects import ArrayRef
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.receipt import proof_of
from grokctl.checkpoint.refusal import read_refusal
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.release_files import file_nbytes
from grokctl.checkpoint.stored_tensor import StoredTensor
from grokctl.checkpoint.sums import proof_kind
from grokctl.checkpoint.tensor_source import LogicalTensor, extent
from grokctl.checkpoint.value_stats import Part, StoredValues, ValueStats
from grokctl.errors import Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Observer, Stage, Started, ignore
from grokctl.integrity.provenance import describe_proof, describe_unhashed
from grokctl.model.config import GrokConfig
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.os_errors import is_absence, located, reason_of, refusal
from grokctl.paths import EXPORT_MANIFEST, kind_of, quoted
from grokctl.system import usable_cores

_AHEAD = 4
"""Parts queued per worker."""
_MOST_JOBS = 64
_HEAD = "lm_head.weight"
"""In Hugging Face's layout, a copy of the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """One stored tensor."""

    index: int | None
    """Its index in the release; None elsewhere."""
    file: str
    name: str
    kind: str
    """The part of the model: embedding, attention, experts, router or norms."""
    shape: tuple[int, ...]
    """As stored, inputs before outputs; of packed int4, the shape of its values."""
    dtype: str
    scale_groups: int
    """Scale groups along the inputs; 0 without scales."""
    parameters: int
    """Parameters of the model; scales do not count."""
    nbytes: int
    """Bytes of the file in a release, of the tensor elsewhere; in a ready checkpoint, on all its
    devices."""
    stats: ValueStats | None = None
    """Statistics of its values, if requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """The sum over the tensors of one kind."""

    kind: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The tensors of a checkpoint."""

    root: Path
    kind: str
    config: GrokConfig
    rows: tuple[TensorRow, ...]
    total_nbytes: int
    """Bytes of the whole checkpoint, whatever the pattern."""
    proven_by: str | None
    """`infohash` if every byte that a run reads is proven, and unchanged since; `hub sha256` if it
    only has the hash that a hub names; else None. Of a ready checkpoint: whether its source was;
    its files are not hashed here."""
    provenance: str
    """The same in one line for people."""

    @property
    def is_proven(self) -> bool:
        """Whether the infohash proves it."""
        return self.proven_by == INFOHASH_PROOF

    @property
    def totals(self) -> tuple[Total, ...]:
        """The sums by kind, in order of appearance."""
        return tuple(
            Total(
                kind=kind,
                tensors=len(rows),
                parameters=sum(row.parameters for row in rows),
                nbytes=sum(row.nbytes for row in rows),
            )
            for kind in dict.fromkeys(row.kind for row in self.rows)
            if (rows := [row for row in self.rows if row.kind == kind])
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row, and the place of its values."""

    row: TensorRow
    values: tuple[StoredValues, ...]


def inspect(
    root: Path,
    *,
    pattern: str | None = None,
    stats: bool = False,
    jobs: int | None = None,
    observe: Observer = ignore,
) -> Inspection:
    """Describe a checkpoint; proves nothing about its content.

    Args:
        root: A release, a ready checkpoint or an export.
        pattern: Glob on tensor names or file names; all tensors by default.
        stats: Also read every value of these tensors, in bounded memory.
        jobs: Threads that read; one per core by default.
        observe: Receives progress in files, then in bytes.

    Raises:
        CorruptCheckpointError: The structure is damaged, or a file cannot be read.
        UsageError: There is no checkpoint, or nothing matches.
    """
    kind = kind_of(root)
    if kind == "export":
        if stats:
            message = (
                f"{root}: expected a release or a ready checkpoint for --stats, found an export"
            )
            raise UsageError(message, f"grokctl inspect {quoted(root)}")
        export = open_export(root)
        config, entries, total = export.manifest.config, _of_export(export), export.nbytes
        proven_by = proof_kind(export, is_hashed=False)
        provenance = describe_unhashed(export)
    elif kind == "ready":
        checkpoint = open_ready(root)
        config, entries, total = checkpoint.config, _of_ready(checkpoint), checkpoint.nbytes
        proven_by = proof_kind(checkpoint, is_hashed=False)
        provenance = describe_unhashed(checkpoint)
    else:
        release = open_release(root, observe=observe)
        config, total = release.config, release.nbytes
        entries = [_of_release(tensor) for tensor in release.tensors]
        proof = proof_of(release)
        proven_by = None if proof.best is None else proof.best.proven_by
        provenance = describe_proof(proof, root)
    chosen = [
        entry
        for entry in entries
        if pattern is None
        or fnmatchcase(entry.row.name, pattern)
        or fnmatchcase(entry.row.file, pattern)
    ]
    if not chosen:
        raise UsageError(
            f"--tensor {pattern!r}: no tensor or file has such a name", "--tensor 'layers.0.*'"
        )
    rows = [entry.row for entry in chosen]
    if stats:
        workers = min(jobs or usable_cores(), _MOST_JOBS)
        stats_of_rows = _stats(root, [entry.values for entry in chosen], workers, observe)
        rows = [replace(row, stats=own) for row, own in zip(rows, stats_of_rows, strict=True)]
    return Inspection(
        root=root,
        kind=kind or "release",
        config=config,
        rows=tuple(rows),
        total_nbytes=total,
        proven_by=None if read_refusal(root) is not None else proven_by,
        provenance=provenance,
    )


def _kind(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    parts = name.split(".")
    part = parts[2] if parts[0] == "layers" else parts[0]
    return {"moe": "experts", "final_norm": "norms"}.get(part, part)


def _of_release(tensor: StoredTensor) -> _Entry:
    spec = tensor.spec
    row = TensorRow(
        index=spec.index,
        file=spec.file,
        name=spec.name,
        kind=_kind(spec.name),
        shape=tensor.weight.shape,
        dtype=str(tensor.weight.dtype),
        scale_groups=tensor.scales.shape[-2] if tensor.scales else 0,
        parameters=prod(spec.shape),
        nbytes=file_nbytes(spec),
    )
    return _Entry(row, (StoredValues(path=tensor.path, array=tensor.weight, scales=tensor.scales),))


def _of_ready(checkpoint: ReadyCheckpoint) -> list[_Entry]:
    devices = len(checkpoint.manifest.devices)
    # the same on every device
    nbytes = {item.tensor.key: item.nbytes for item in checkpoint.layouts[0].tensors}
    names = [checkpoint.manifest.record_of(device).name for device in checkpoint.manifest.devices]
    files = names[0] if devices == 1 else f"{names[0]} … {names[-1].split('-')[1]}"
    values = _stored_in(checkpoint)
    return [
        _Entry(
            TensorRow(
                index=None,
                file=files,
                name=tensor.key,
                kind=_kind(tensor.key),
                shape=tensor.spec.shape if _is_packed(tensor) else tensor.shape,
                dtype="int4" if _is_packed(tensor) else str(tensor.dtype),
                scale_groups=tensor.groups,
                parameters=0 if tensor.is_scales else prod(tensor.spec.shape),
                nbytes=nbytes[tensor.key] * devices,
            ),
            tuple(values[tensor.key]),
        )
        for tensor in checkpoint.storage.tensors
    ]


def _of_export(export: Export) -> list[_Entry]:
    """The tensors of an export, by the names that they have there."""
    kinds = {gguf_name(spec): _kind(spec.name) for spec in tensor_specs(export.manifest.config)}
    entries = []
    for file in sorted(export.records):
        for tensor in tensors_in(export.root / file):
            row = TensorRow(
                index=None,
                file=file,
                name=tensor.name,
                kind=kinds.get(tensor.name) or _kind_of_torch(tensor.name),
                shape=tensor.shape,
                dtype=tensor.dtype,
                scale_groups=0,
                parameters=0 if tensor.name == _HEAD else prod(tensor.shape),  # a copy
                nbytes=tensor.nbytes,
            )
            entries.append(_Entry(row, ()))
    if not entries:
        raise corrupt(EXPORT_MANIFEST, Reason.MALFORMED, "names no file with tensors")
    return entries


def _kind_of_torch(name: str) -> str:
    """The part of the model that a tensor of Hugging Face's layout belongs to."""
    for word, kind in (
        ("norm", "norms"),
        ("self_attn", "attention"),
        ("experts", "experts"),
        ("moe.gate", "router"),
    ):
        if word in name:
            return kind
    return "embedding"


def _is_packed(tensor: LogicalTensor) -> bool:
    return tensor.precision is Precision.INT4 and not tensor.is_scales


def _stored_in(checkpoint: ReadyCheckpoint) -> dict[str, list[StoredValues]]:
    """The place of each tensor's values; parts that several devices have count once."""
    values: dict[str, list[StoredValues]] = {}
    seen = set()
    for device in checkpoint.manifest.devices:
        layout = checkpoint.layouts[device]
        checkpoint.data(device, 0, len(layout.header))  # opening the file compares its header
        refs = {
            item.tensor.key: ArrayRef(
                offset=item.offset, shape=extent(item.slices), dtype=item.tensor.dtype
            )
            for item in layout.tensors
        }
        for item in layout.tensors:
            if (item.tensor.key, item.slices) in seen:
                continue
            seen.add((item.tensor.key, item.slices))
            has_scales = item.tensor.groups and not item.tensor.is_scales
            values.setdefault(item.tensor.key, []).append(
                StoredValues(
                    path=checkpoint.root / checkpoint.manifest.record_of(device).name,
                    array=refs[item.tensor.key],
                    scales=refs[f"{item.tensor.spec.name}.scales"] if has_scales else None,
                    read=None if checkpoint.is_mapped else partial(checkpoint.data, device),
                )
            )
    return values


def _stats(
    root: Path, tensors: Sequence[Sequence[StoredValues]], jobs: int, observe: Observer
) -> list[ValueStats]:
    """Read every value of every tensor in threads; combine statistics in a fixed order."""
    parts = (
        (index, part)
        for index, tensor in enumerate(tensors)
        for values in tensor
        for part in values.parts()
    )
    stats = [ValueStats()] * len(tensors)
    total, done = sum(values.array.nbytes for tensor in tensors for values in tensor), 0
    observe(Started(stage=Stage.VALUES, total=total))
    for index, part, own in _stats_of_parts(root, parts, jobs):
        stats[index] += own
        done += part.nbytes
        observe(Advanced(stage=Stage.VALUES, done=done))
    observe(Finished(stage=Stage.VALUES))
    return stats


def _stats_of_parts(
    root: Path, parts: Iterable[tuple[int, Part]], jobs: int
) -> Iterator[tuple[int, Part, ValueStats]]:
    """Statistics in the order of the parts, with a bounded number of parts in memory."""
    is_cancelled = Event()

    def read(part: Part) -> ValueStats:
        if is_cancelled.is_set():
            return ValueStats()
        try:
            return part.stats()
        except OSError as error:
            if not is_absence(error):
                raise refusal(located(error, part.of.path)) from error
            name = part.of.path.relative_to(root).as_posix()
            raise corrupt(name, Reason.UNREADABLE, reason_of(error)) from error

    waiting: deque[tuple[int, Part, Future[ValueStats]]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for index, part in parts:
                waiting.append((index, part, pool.submit(read, part)))
                if len(waiting) >= _AHEAD * jobs:
                    first, its, future = waiting.popleft()
                    yield first, its, future.result()
            for first, its, future in waiting:
                yield first, its, future.result()
        finally:
            is_cancelled.set()
