"""A release on disk: the file of each tensor, checked by its structure and read as mapped views."""

import mmap
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint import pickles
from grokctl.checkpoint.file_sizes import size_damage
from grokctl.checkpoint.pickle_damage import Finding
from grokctl.checkpoint.pickles import ArrayRef, Hole
from grokctl.checkpoint.rows import Rows, opened
from grokctl.checkpoint.torrent import Metainfo, TorrentFile
from grokctl.checkpoint.unfinished import refuse_unfinished
from grokctl.checkpoint.value_stats import OddValues, find_odd
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    FetchError,
    GrokctlError,
    Reason,
    UnsafePickleError,
    UsageError,
    corrupt,
    worst,
)
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit, ignore
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import Axis, TensorSpec, tensor_specs
from grokctl.os_errors import is_absence, located, reason_of, refusal
from grokctl.paths import CKPT, CONFIG, MANIFEST, PRIVATE, TOKENIZER, TORRENT, quoted
from grokctl.text import format_number, printable

_OWN = frozenset({PRIVATE, TORRENT, MANIFEST, CKPT})
_MOST_NOTES = 4
_LARGEST_EXTRA = 64 * 2**20
_HEADERS = 4096
"""Bytes, more than the opcodes of any released file."""
_TENSOR_FILE = re.compile(r"tensor[0-9]{5}_[0-9]{3}")
_SIZES = {
    Axis.VOCAB: "vocab_size",
    Axis.EMBED: "emb_size",
    Axis.FFN: "the width of an expert",
    Axis.Q_HEADS: "num_q_heads times key_size",
    Axis.KV_HEADS: "num_kv_heads times key_size",
    Axis.EXPERTS: "num_experts",
    Axis.ROUTES: "num_experts",
}
"""The size of each axis, by its name in `config.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One parameter and its file; holds no data and no open file."""

    spec: TensorSpec
    path: Path
    weight: ArrayRef
    """float32 or int8 `(*lead, inputs, outputs)`."""
    scales: ArrayRef | None
    """bfloat16 `(*lead, groups, outputs)`."""

    def map(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Map the file and return its weight and scales as read-only views.

        Nothing is copied, and pages are read on first use; the mapping lives as long as the views.
        Payloads begin at odd offsets, so the views may be unaligned.
        """
        name = f"{CKPT}/{self.spec.file}"
        try:
            mapped = _map(self.path)
            weight = _view(mapped, self.weight)
            return weight, None if self.scales is None else _view(mapped, self.scales)
        except OSError as error:
            raise self._changed(error) from error
        except ValueError as error:
            raise corrupt(name, Reason.ALTERED, "changed since it was opened") from error

    @contextmanager
    def opened(self) -> Iterator[Rows]:
        """Open the file to read rows of its weight; all axes except the last are one.

        Raises:
            CorruptCheckpointError: The file changed since it was scanned.
        """
        try:
            with opened(self.path, self.weight) as rows:
                yield rows
        except OSError as error:
            raise self._changed(error) from error

    def _changed(self, error: OSError) -> GrokctlError:
        """The file that was scanned is gone or short now, or the machine refuses to read it."""
        if not is_absence(error):
            return refusal(located(error, self.path))
        name = f"{CKPT}/{self.spec.file}"
        return corrupt(name, Reason.ALTERED, "changed since it was opened")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A release in which every file has the expected structure."""

    root: Path
    config: GrokConfig
    tensors: tuple[StoredTensor, ...]
    """In the order of the release."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if there is one."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(file_nbytes(tensor.spec) for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class OddTensor:
    """Unusual values in one file: a fact about it, and no damage if the file is proven."""

    file: str
    """Path in the release."""
    array: str
    """Such as `layers.0.moe.gate.scales`."""
    values: OddValues

    def __str__(self) -> str:
        index = ", ".join(map(str, self.values.index))
        return f"{self.array}: {self.values}, first [{index}] = {self.values.value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The structure of every file of a release."""

    config: GrokConfig
    tensors: tuple[StoredTensor, ...]
    damage: tuple[Damage, ...]
    odd: tuple[OddTensor, ...] = ()
    """Unusual values in scales, norms and routers."""


def open_release(root: Path, *, observe: Observer = ignore) -> Release:
    """Check the structure of every file of a release; see `survey`.

    Args:
        root: The folder that holds `ckpt-0`.
        observe: Receives progress in files.

    Raises:
        UnsafePickleError: A file names another global than a tensor does. Nothing was executed.
        CorruptCheckpointError: Its download is not complete; or files are missing, short, long or
            of the wrong shape, and all of them are listed.
        UsageError: The folder is not a release.
    """
    refuse_unfinished(root)
    structure = survey(root, observe=observe)
    if structure.damage:
        num_files = len(tensor_specs(structure.config))
        raise damage_error(structure.damage, checked=num_files, root=root)
    return Release(root=root, config=structure.config, tensors=structure.tensors)


def survey(root: Path, *, observe: Observer = ignore) -> Survey:
    """Check the structure of every file, and continue after the first damaged one.

    Every tensor's file must exist, and be a pickle of the expected size, shapes and dtypes. Its
    scales, norms and routers are read for unusual values, which are facts and not damage: a
    release may have them. This reads 140 MB of Grok-1's 318 GB, and proves nothing.

    Raises:
        CorruptCheckpointError: `config.json` is malformed.
        UsageError: The folder is not a release.
    """
    if not (root / CKPT).is_dir():
        raise UsageError(f"{root}: expected a release, found no {CKPT} folder", "grokctl fetch")
    config = read_config(root)
    specs = tensor_specs(config)
    tensors: list[StoredTensor] = []
    damage: list[Damage] = []
    odd: list[OddTensor] = []
    observe(Started(stage=Stage.STRUCTURE, total=len(specs), unit=Unit.FILES))
    _read_ahead(root, specs)
    for done, spec in enumerate(specs, start=1):
        try:
            tensors.append(_locate(root, spec))
            odd.extend(_odd_values(tensors[-1]))
        except CorruptCheckpointError as error:
            damage.extend(error.damage)
        observe(Advanced(stage=Stage.STRUCTURE, done=done))
    observe(Finished(stage=Stage.STRUCTURE))
    if (root / CONFIG).is_file():
        damage = _blame_config(root, specs, damage)
    for note in _notes(odd):
        observe(note)
    return Survey(config=config, tensors=tuple(tensors), damage=tuple(damage), odd=tuple(odd))


def read_config(root: Path) -> GrokConfig:
    """The model of a release: from `config.json`, or Grok-1 if there is none."""
    path = root / CONFIG
    return GrokConfig.read(path) if path.is_file() else GROK_1


def damage_error(damage: Sequence[Damage], *, checked: int, root: Path) -> GrokctlError:
    """One error for all damaged files; of the class of an unsafe pickle, if there is one."""
    unsafe = [item for item in damage if item.reason is Reason.UNSAFE]
    first = worst(damage)
    hint = _advice(root, first)
    if unsafe:
        message = f"{len(unsafe)} of {checked} files are unsafe pickles, first {first}"
        return UnsafePickleError(message, f"{hint}  # nothing was executed", tuple(damage))
    message = f"{len(damage)} of {checked} files are damaged, first {first}"
    return CorruptCheckpointError(message, hint, tuple(damage))


def _advice(root: Path, damage: Damage) -> str | None:
    """The command that mends a release: never one that deletes bytes which may be good."""
    if (root / TORRENT).is_file():
        return f"grokctl verify {quoted(root)} --repair"
    file = quoted(root / damage.file)
    if damage.reason is Reason.UNSAFE:
        return f"ls -l {file}"
    if damage.reason in {Reason.SHORT, Reason.LONG} and not damage.advice:
        return f"ls -l {file}  # copy it again from its source"
    return damage.advice.format(file=file, root=quoted(root)) or None


def released_payloads(spec: TensorSpec) -> tuple[Hole, Hole | None]:
    """Shapes and dtypes of the weight and the scales in a tensor's file."""
    if not spec.is_quantized:
        return Hole(spec.shape, np.dtype("<f4")), None
    return Hole(spec.shape, np.dtype("i1")), Hole(spec.scales_shape, pickles.BFLOAT16)


@cache
def file_nbytes(spec: TensorSpec) -> int:
    """Exact size of a tensor's file, from its shape alone."""
    return pickles.measure(*released_payloads(spec))


def release_paths(metainfo: Metainfo) -> dict[int, str]:
    """The place of each file of a torrent in a release.

    The folder names of a torrent do not matter: tensors are recognized by their own names, and
    placed in `ckpt-0`. Every other file keeps its path, is proven like the rest, and never opened.

    Returns:
        File index -> `/`-separated path below the release; pads are left out.

    Raises:
        FetchError: There is no tensor, two files have the same place, a file other than a tensor
            is larger than 64 MB, or a file has the name of one of grokctl's own files.
    """
    places: dict[int, str] = {}
    for file in metainfo.files:
        if not file.is_pad:
            places[file.index] = _place(file)
    names = [place.casefold() for place in places.values()]
    folders = {name[:end] for name in names for end in range(len(name)) if name[end] == "/"}
    if not any(place.startswith(f"{CKPT}/") for place in places.values()):
        torrent = f"torrent {printable(metainfo.name)!r}"
        raise FetchError(f"{torrent}: expected tensorNNNNN_000 files, found none")
    if len(set(names)) != len(names) or folders & set(names):
        torrent = f"torrent {printable(metainfo.name)!r}"
        raise FetchError(f"{torrent}: has two files for the same place in a release")
    return places


def _place(file: TorrentFile) -> str:
    if _TENSOR_FILE.fullmatch(file.path[-1]):
        return f"{CKPT}/{file.path[-1]}"
    place = "/".join(file.path)
    own = {PRIVATE, TORRENT, MANIFEST} if file.path[0] == CKPT and len(file.path) > 1 else _OWN
    if file.path[0].casefold() in own:
        raise FetchError(f"torrent file {place!r}: has the name of one of grokctl's own files")
    if file.length > _LARGEST_EXTRA:
        raise FetchError(
            f"torrent file {place!r}: expected a tensor or at most {_LARGEST_EXTRA:,} bytes, "
            f"found {file.length:,}"
        )
    return place


def scan_file(root: Path, name: str) -> pickles.PickledTensor:
    """Find the arrays in one tensor file; see `pickles.scan`.

    Args:
        root: The release.
        name: Path below it, `/`-separated.

    Raises:
        UnsafePickleError: It contains more than a tensor.
        CorruptCheckpointError: It is malformed, or not a regular file.
        OSError: It cannot be read.
    """
    path = root / name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise corrupt(name, Reason.UNREADABLE, "is not a regular file")
    if status.st_size == 0:
        return pickles.scan(b"", file=name)
    with _mapped(path) as buffer:
        return pickles.scan(buffer, file=name)


def _read_ahead(root: Path, specs: Sequence[TensorSpec]) -> None:
    """Request all that a survey reads at once: file by file, a cold disk is ten times slower."""
    for spec in specs:
        weight, scales = released_payloads(spec)
        checked = scales or weight
        values = 0 if Axis.VOCAB in spec.axes else prod(checked.shape) * checked.dtype.itemsize
        wanted = _HEADERS + values
        with suppress(OSError):  # reported when the file is scanned
            handle = os.open(root / CKPT / spec.file, os.O_RDONLY | os.O_NONBLOCK)
            try:
                tail = max(0, os.fstat(handle).st_size - wanted)
                os.posix_fadvise(handle, 0, _HEADERS, os.POSIX_FADV_WILLNEED)
                os.posix_fadvise(handle, tail, wanted, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)


def _locate(root: Path, spec: TensorSpec) -> StoredTensor:
    """Scan one file and compare it with its specification.

    Raises:
        CorruptCheckpointError: It is missing, short, long or malformed.
        UsageError: The machine refuses to read it.
    """
    name = f"{CKPT}/{spec.file}"
    path = root / name
    expected = file_nbytes(spec)
    size = 0
    try:
        size = path.stat().st_size
        tensor = scan_file(root, name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _size_error(name, expected=expected, size=None) from error
    except OSError as error:
        raise refusal(located(error, path)) from error
    except CorruptCheckpointError as error:
        (damage,) = error.damage
        if damage.reason not in {Reason.SHORT, Reason.LONG}:
            raise
        if size != expected:
            raise _size_error(name, expected=expected, size=size) from error
        flip = _flip_of(path)
        detail = damage.detail if flip is None else f"{damage.detail}; {flip.detail}"
        ranges, advice = (flip.ranges, flip.advice) if flip else ((), "")
        raise corrupt(name, Reason.MALFORMED, detail, ranges=ranges, advice=advice) from error
    _compare(name, spec, tensor)
    if tensor.scales is not None:
        weight, _ = released_payloads(spec)
        expected = pickles.measure(weight, Hole(tensor.scales.shape, tensor.scales.dtype))
    if size != expected:
        raise _size_error(name, expected=expected, size=size)
    return StoredTensor(spec=spec, path=path, weight=tensor.weight, scales=tensor.scales)


def _compare(name: str, spec: TensorSpec, tensor: pickles.PickledTensor) -> None:
    """Refuse shapes and dtypes that differ from the specification."""
    weight, _ = released_payloads(spec)
    if tensor.weight.shape != weight.shape or tensor.weight.dtype != weight.dtype:
        raise corrupt(
            name,
            Reason.MALFORMED,
            f"expected {weight.shape} {weight.dtype}, "
            f"found {tensor.weight.shape} {tensor.weight.dtype}",
        )
    if tensor.scales is None:
        return
    # the release may have any number of scale groups that divides the inputs
    *lead, inputs, outputs = spec.shape
    shape = tensor.scales.shape
    fits = len(shape) == len(spec.shape) and (*lead, outputs) == (*shape[:-2], shape[-1])
    if not fits or inputs % shape[-2]:
        raise corrupt(name, Reason.MALFORMED, f"expected scales {spec.scales_shape}, found {shape}")


def _odd_values(tensor: StoredTensor) -> Iterator[OddTensor]:
    """Unusual values in the scales of a file, or in its norm or router."""
    spec, scales = tensor.spec, tensor.scales
    if Axis.VOCAB in spec.axes:
        return  # 3 GB, and a part of it would show nothing
    file = f"{CKPT}/{spec.file}"
    with _reading(tensor.path, file):
        odd = find_odd(
            tensor.path,
            scales or tensor.weight,
            is_scales=scales is not None,
            is_norm=len(spec.shape) == 1,
        )
    if odd is not None:
        yield OddTensor(
            file=file, array=f"{spec.name}.{'scales' if scales else 'weight'}", values=odd
        )


def _notes(odd: Sequence[OddTensor]) -> Iterator[Noted]:
    """The first unusual values, and the number of the other files with some."""
    for item in odd[:_MOST_NOTES]:
        yield Noted(message=f"{item.file}: {item}")
    more = len(odd) - _MOST_NOTES
    if more > 0:
        yield Noted(message=f"unusual values in {format_number(more, 'more file')}")


@contextmanager
def _reading(path: Path, file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_absence(error):
            raise refusal(located(error, path)) from error
        raise corrupt(file, Reason.UNREADABLE, reason_of(error)) from error


def _blame_config(root: Path, specs: Sequence[TensorSpec], damage: list[Damage]) -> list[Damage]:
    """If most files agree with each other and not with `config.json`, blame `config.json`."""
    by_file = {item.file: item.reason for item in damage}
    configured: dict[str, int] = {}
    sizes: dict[str, Counter[int]] = {}
    others: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for spec in specs:
        name = f"{CKPT}/{spec.file}"
        labels, shape = tuple(_SIZES[axis] for axis in spec.axes), spec.shape
        configured.update(zip(labels, shape, strict=True))
        if by_file.get(name) is Reason.MALFORMED:
            shape = _shape_of(root, name)
        elif name in by_file:
            continue
        if shape != spec.shape:
            others[name] = labels, shape
        for label, size in zip(labels, shape, strict=False):
            sizes.setdefault(label, Counter())[size] += 1
    most = {label: counts.most_common(1)[0] for label, counts in sizes.items()}
    agreed = {label: size for label, (size, n) in most.items() if 2 * n > sizes[label].total()}
    explained = {
        name
        for name, (labels, shape) in others.items()
        if shape == tuple(agreed.get(label) for label in labels)
    }
    details = [
        f"{label} is {configured[label]}, the tensors have {size}"
        for label, size in agreed.items()
        if size != configured[label]
    ]
    details += _extra_tensors(root, specs)
    blame = [Damage(CONFIG, Reason.MALFORMED, "; ".join(details))] if details else []
    return blame + [item for item in damage if item.file not in explained]


def _shape_of(root: Path, name: str) -> tuple[int, ...]:
    try:
        return scan_file(root, name).weight.shape
    except (CorruptCheckpointError, OSError):
        return ()


def _extra_tensors(root: Path, specs: Sequence[TensorSpec]) -> Iterator[str]:
    known = {spec.file for spec in specs}
    names = (path.name for path in (root / CKPT).iterdir())
    more = sorted(name for name in names if _TENSOR_FILE.fullmatch(name) and name not in known)
    if more:
        yield f"describes {len(specs)} tensors, {CKPT} contains {len(more)} more, first {more[0]}"


def _size_error(name: str, *, expected: int, size: int | None) -> CorruptCheckpointError:
    """The error for a file that does not have its size."""
    damage = size_damage(name, expected=expected, size=size)
    assert damage is not None
    return corrupt(name, damage.reason, damage.detail)


def _flip_of(path: Path) -> Finding | None:
    with _mapped(path) as buffer:
        return pickles.find_flip(buffer)


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with memoryview(_map(path)) as buffer:
        yield buffer


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(mapped: mmap.mmap, ref: ArrayRef) -> NDArray[Any]:
    count = ref.nbytes // ref.dtype.itemsize
    flat: NDArray[Any] = np.frombuffer(mapped, dtype=ref.dtype, count=count, offset=ref.offset)
    return flat.reshape(ref.shape)
