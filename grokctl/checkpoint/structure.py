"""The structure of a release: whether every file has the size, shapes and dtypes of its tensor."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from grokctl.checkpoint.file_sizes import size_damage
from grokctl.checkpoint.pickle_damage import Finding
from grokctl.checkpoint.pickle_writer import Hole, measure
from grokctl.checkpoint.pickles import PickledTensor, find_flip
from grokctl.checkpoint.release_files import (
    file_nbytes,
    is_tensor_file,
    mapped,
    read_config,
    released_payloads,
    scan_file,
)
from grokctl.checkpoint.stored_tensor import StoredTensor
from grokctl.checkpoint.value_stats import OddValues, find_odd
from grokctl.errors import CorruptCheckpointError, Damage, Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit, ignore
from grokctl.model.config import GrokConfig
from grokctl.model.tensors import Axis, TensorSpec, tensor_specs
from grokctl.os_errors import is_absence, located, reason_of, refusal
from grokctl.paths import CKPT, CONFIG
from grokctl.text import format_number

_MOST_NOTES = 4
_HEADERS = 4096
"""Bytes, more than the opcodes of any released file."""
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
            tensors.append(locate(root, spec))
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


def locate(root: Path, spec: TensorSpec) -> StoredTensor:
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
        expected = measure(weight, Hole(tensor.scales.shape, tensor.scales.dtype))
    if size != expected:
        raise _size_error(name, expected=expected, size=size)
    return StoredTensor(spec=spec, path=path, weight=tensor.weight, scales=tensor.scales)


def _compare(name: str, spec: TensorSpec, tensor: PickledTensor) -> None:
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
    more = sorted(name for name in names if is_tensor_file(name) and name not in known)
    if more:
        yield f"describes {len(specs)} tensors, {CKPT} contains {len(more)} more, first {more[0]}"


def _size_error(name: str, *, expected: int, size: int | None) -> CorruptCheckpointError:
    """The error for a file that does not have its size."""
    damage = size_damage(name, expected=expected, size=size)
    assert damage is not None
    return corrupt(name, damage.reason, damage.detail)


def _flip_of(path: Path) -> Finding | None:
    with mapped(path) as buffer:
        return find_flip(buffer)
