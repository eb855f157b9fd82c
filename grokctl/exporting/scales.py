"""Whether the scales of a model fit float16 exactly, and what is done where they do not.

float16 holds a bfloat16 exactly if it is 0 or of a magnitude between 2^-17 and 65,280. All scales
are read before anything is written. Where one does not fit, in this order:

1. If all integers of its group are 0, it means nothing: it becomes 0.
2. Both matrices of a pair are multiplied by opposite powers of two, which changes no result and
   rounds nothing: values and the output projection, an expert's up and down, queries and keys.
3. The tensor is written as float32, which holds integer times scale exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.quantization import unpacked
from grokctl.checkpoint.tensor_source import LogicalTensor, TensorSource
from grokctl.errors import Reason, corrupt
from grokctl.model.precision import Precision

PARTNERS: Final = {
    "attention.value": "attention.out",
    "moe.up": "moe.down",
    "attention.query": "attention.key",
}
"""Weights that can be multiplied by a power of two if their partner is divided by it."""
_SMALLEST_BIT: Final = -24
"""The exponent of float16's smallest number: a multiple of it below 2^16 is exact, if its
significant bits are at most eleven; bfloat16 has eight."""
_LARGEST: Final = 16
"""Magnitudes below two to this power, of eight significant bits, are at most 65,280."""
_ROWS: Final = 2**20
"""Integers that are read at a time."""
Range = tuple[int, int]
"""The least and the largest exponent of a power of two by which all scales become exact."""
_ANY: Final = (-(10**6), 10**6)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedScales:
    """How scales are written in float16."""

    checked: int = 0
    """Scales that were read."""
    misfits: int = 0
    """Scales among them that float16 does not hold."""
    shifts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Weights that are folded: the exponent for each of their matrices, by parameter."""
    float32: frozenset[str] = frozenset()
    """Parameters that are written as float32."""


def fit_scales(source: TensorSource, tensors: Sequence[LogicalTensor]) -> FittedScales:
    """Read all scales, and decide how they are written.

    Args:
        source: Has the scales.
        tensors: Weights with scales, stored as the source has them.

    Raises:
        CorruptCheckpointError: A scale is not finite, or the source changed.
    """
    ranges: dict[str, list[Range]] = {}
    checked = misfits = 0
    for tensor in tensors:
        scales = _scales(source, tensor)
        checked += scales.size
        misfits += int(_misfits(scales).sum())
        ranges[tensor.spec.name] = [
            _range_of_live(source, tensor, matrix, own)
            for matrix, own in zip(np.ndindex(tensor.spec.shape[:-2]), scales, strict=True)
        ]
    shifts, float32 = _folds(ranges)
    return FittedScales(checked=checked, misfits=misfits, shifts=shifts, float32=float32)


def _scales(source: TensorSource, tensor: LogicalTensor) -> NDArray[np.float32]:
    """All scales of a weight, `(matrices, groups, outputs)`."""
    own = source.storage.scales(tensor.spec)
    stored = source.read(own, tuple((0, length) for length in own.shape))
    scales: NDArray[np.float32] = stored.astype(np.float32).reshape(-1, *own.shape[-2:])
    if not np.isfinite(scales).all():
        raise corrupt(own.key, Reason.MALFORMED, "has scales that are not finite")
    return scales


def _misfits(scales: NDArray[np.float32]) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        wrong: NDArray[np.bool_] = scales.astype(np.float16).astype(np.float32) != scales
    return wrong


def _range(scales: NDArray[np.float32]) -> Range:
    """The powers of two by which these scales, of eight significant bits each, become exact."""
    values = np.abs(scales[scales != 0])
    if not values.size:
        return _ANY
    fractions, exponents = np.frexp(values)
    bits = np.ldexp(fractions, 8).astype(np.int32)
    lowest = exponents - 8 + np.log2(bits & -bits).astype(np.int32)
    return _SMALLEST_BIT - int(lowest.min()), _LARGEST - int(exponents.max())


def _range_of_live(
    source: TensorSource,
    tensor: LogicalTensor,
    matrix: tuple[int, ...],
    scales: NDArray[np.float32],
) -> Range:
    """The same of a matrix, without the scales whose integers are all 0, if one does not fit."""
    if not _misfits(scales).any():
        return _range(scales)
    return _range(np.where(_is_live(source, tensor, matrix), scales, np.float32(0)))


def _is_live(
    source: TensorSource, tensor: LogicalTensor, matrix: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Which groups of a matrix have an integer other than 0, `(groups, outputs)`."""
    outputs = tensor.spec.shape[-1]
    live = np.zeros((tensor.groups, outputs), np.bool_)
    height = tensor.shape[-2] // tensor.groups
    step = max(1, _ROWS // outputs)
    with source.reading(tensor, matrix, (0, outputs)) as read:
        for group in range(tensor.groups):
            end = (group + 1) * height
            for low in range(group * height, end, step):
                rows: NDArray[Any] = read(low, min(low + step, end))
                if tensor.precision is Precision.INT4:
                    rows = unpacked(np.ascontiguousarray(rows))
                live[group] |= rows.any(axis=0)
    return live


def _folds(
    ranges: Mapping[str, Sequence[Range]],
) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """The exponents of weights that are folded, and the weights that are written as float32."""
    misfits = {name for name, own in ranges.items() if not all(map(_has_zero, own))}
    shifts: dict[str, tuple[int, ...]] = {}
    for first in sorted(ranges):
        layer, _, slot = first.rpartition(".")
        layer, _, module = layer.rpartition(".")
        partner = PARTNERS.get(f"{module}.{slot}")
        second = f"{layer}.{partner}"
        if partner is None or second not in ranges or misfits.isdisjoint({first, second}):
            continue
        both = [
            _smallest((max(a[0], -b[1]), min(a[1], -b[0])))
            for a, b in zip(ranges[first], ranges[second], strict=True)
        ]
        exponents = [one for one in both if one is not None]
        if len(exponents) == len(both):
            shifts[first] = tuple(exponents)
            shifts[second] = tuple(-one for one in exponents)
    return shifts, frozenset(misfits - shifts.keys())


def _has_zero(own: Range) -> bool:
    return own[0] <= 0 <= own[1]


def _smallest(both: Range) -> int | None:
    """The exponent nearest to 0 in a range; None if that is empty."""
    low, high = both
    if low > high:
        return None
    return min(max(0, low), high)
