"""The tensors of an export, and the pieces that they are made of."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.blocks import BLOCK, Q4_0, Q8_0, to_q4_0, turn
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.gguf import TensorType
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.quantization import rounded, to_int8_groups
from grokctl.checkpoint.tensor_source import LogicalTensor, TensorSource, extent
from grokctl.model.placement import Slice
from grokctl.model.precision import Precision
from grokctl.resharding.convert import Region, Squares, convert, is_stored_alike, sum_of_squares
from grokctl.resharding.output import Frame, PieceResult, frames_of

_WORD: Final = 8
"""Outputs that are turned at a time: ranges of them begin at multiples."""
_WIDE: Final = 2056
"""Outputs of a piece at most: fewer would be read in many short parts, and with more the rows that
are turned at a time would be so few that each output gets few bytes of each."""
_TALL: Final = 2**22
"""Bytes of those rows."""
_ROWS: Final = 2**18
"""Values of an embedding that are converted at a time."""
_PACKED: Final = {TensorType.Q8_0: Q8_0, TensorType.Q4_0: Q4_0}
_PLAIN: Final = {TensorType.F32: np.dtype("<f4"), TensorType.BF16: BFLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportTensor:
    """One tensor in a file of another engine: `(*lead, outputs, inputs)`."""

    name: str
    """In the file."""
    tensor: LogicalTensor
    """What it is made of: in the orientation of the release, converted to the precision that holds
    its values. Of one that is no matrix, float32."""
    type: TensorType
    lead: tuple[int, ...] | None = None
    """The only matrix of a stack that it has: an expert; None for all."""
    shifts: tuple[int, ...] = ()
    """The powers of two by which the scales of each matrix are multiplied; empty for none."""

    @property
    def matrices(self) -> list[tuple[int, ...]]:
        """The indices of its matrices, in order."""
        stack = self.tensor.spec.shape[:-2]
        return list(np.ndindex(stack)) if self.lead is None else [self.lead]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        shape = self.tensor.spec.shape
        if not self.tensor.is_matrix:
            return shape
        stack = shape[:-2] if self.lead is None else ()
        return (*stack, shape[-1], shape[-2])

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row in the file: of one output, or of one token of the embedding."""
        values, nbytes = self.type.block
        return self.shape[-1] // values * nbytes

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.shape[:-1]) * self.row_nbytes

    def pieces(self, file: int, *, padding: int, limit: int) -> Iterator["ExportPiece"]:
        """Its pieces in order: whole rows of one matrix each.

        Args:
            file: The number of its file.
            padding: Zeros behind it.
            limit: Bytes of a piece; more if one row, or eight of a matrix, are larger.
        """
        is_matrix, shape = self.tensor.is_matrix, self.shape
        matrices = self.matrices if is_matrix else [()]
        count = shape[-2] if len(shape) > 1 else 1
        unit = _WORD if is_matrix else 1
        step = max(unit, (limit - padding) // self.row_nbytes // unit * unit)
        if is_matrix:
            step = min(step, _WIDE)
        for matrix in matrices:
            for low in range(0, count, step):
                high = min(low + step, count)
                is_last = matrix == matrices[-1] and high == count
                yield ExportPiece(
                    tensor=self,
                    file=file,
                    matrix=matrix,
                    rows=(low, high),
                    padding=padding if is_last else 0,
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPiece:
    """Rows of one matrix, as they lie in a file."""

    tensor: ExportTensor
    file: int
    matrix: tuple[int, ...]
    """Its index among those of the parameter; empty if there is only one."""
    rows: Slice
    """In the file: outputs of a matrix, tokens of the embedding."""
    padding: int

    @property
    def key(self) -> str:
        """The name of its tensor."""
        return self.tensor.name

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return (self.rows[1] - self.rows[0]) * self.tensor.row_nbytes + self.padding

    @property
    def files(self) -> Collection[int]:
        """The number of its file."""
        return (self.file,)

    def frames(
        self, memory: memoryview, compression: Compression | None
    ) -> Mapping[int, list[Frame]]:
        """The file gets all of it."""
        return {self.file: frames_of(memory, len(memory), compression)}

    def make(self, source: TensorSource, memory: NDArray[np.uint8]) -> PieceResult:
        """Fill its memory; see `Piece`."""
        end = self.nbytes - self.padding
        memory[end:] = 0
        own = memory[:end]
        with np.errstate(all="ignore"):  # values that are not finite show in the sums
            if not self.tensor.tensor.is_matrix:
                return PieceResult(self._copy(source, own))
            if self.tensor.type in _PACKED:
                return PieceResult(self._pack(source, own))
            return PieceResult(self._widen(source, own))

    def _region(self, *, align: int = 1) -> Region:
        tensor = self.tensor.tensor
        rows = tensor.shape[-2]
        return Region(
            tensor=tensor,
            lead=self.matrix,
            rows=(0, rows),
            outputs=self.rows,
            align=align,
            copied=_TALL,
        )

    def _widen(self, source: TensorSource, memory: NDArray[np.uint8]) -> Squares:
        """A matrix of floats, turned."""
        tensor = self.tensor
        bits = f"u{_PLAIN[tensor.type].itemsize}"  # a dtype of which numpy can view words
        out = memory.view(bits).reshape(self.rows[1] - self.rows[0], -1)

        def put(done: Slice, block: NDArray[Any]) -> None:
            turn(block.view(bits), out[:, slice(*done)])

        return convert(source, self._region(), put)

    def _pack(self, source: TensorSource, memory: NDArray[np.uint8]) -> Squares:
        """A matrix of codes in blocks, each with its scale."""
        tensor, kind = self.tensor.tensor, self.tensor.type
        per_row = 2 if kind is TensorType.Q4_0 else 1
        blocks = memory.view(_PACKED[kind]).reshape(self.rows[1] - self.rows[0], -1)
        height = BLOCK // per_row

        def put(done: Slice, rows: NDArray[Any]) -> None:
            codes = to_q4_0(rows) if kind is TensorType.Q4_0 else rows
            turn(codes, blocks["codes"][:, done[0] // height : done[1] // height])

        scales = np.empty((tensor.groups, len(blocks)), BFLOAT16)
        made = None if is_stored_alike(source, tensor) else scales
        squares = convert(source, self._region(align=height), put, scales=made)
        if made is None:
            stack = tuple((index, index + 1) for index in self.matrix)
            part = (*stack, (0, tensor.groups), self.rows)
            stored = source.read(source.storage.scales(tensor.spec), part)
            scales = stored.reshape(scales.shape)
        shifts = self.tensor.shifts
        shift = shifts[self.tensor.matrices.index(self.matrix)] if shifts else 0
        halves = to_float16(scales, shift, is_checked=made is None)
        blocks["scale"] = np.repeat(halves.T, blocks.shape[1] // tensor.groups, axis=1)
        if made is not None and (halves.astype(np.float32) != scales.astype(np.float32)).any():
            return self._measured(source, blocks)
        return squares

    def _measured(self, source: TensorSource, blocks: NDArray[Any]) -> Squares:
        """The error of codes whose scales float16 cannot hold, from the values themselves."""
        spec = self.tensor.tensor.spec
        wide = LogicalTensor(spec=spec, precision=Precision.FLOAT32, groups=0)
        region = Region(
            tensor=wide, lead=self.matrix, rows=(0, spec.shape[-2]), outputs=self.rows, align=BLOCK
        )
        found = [0.0, 0.0]

        def compare(done: Slice, values: NDArray[Any]) -> None:
            part = blocks[:, done[0] // BLOCK : done[1] // BLOCK]
            codes = np.concatenate([part["codes"] & 15, part["codes"] >> 4], axis=2)
            stored = (codes.astype(np.float32) - 8) * part["scale"].astype(np.float32)[:, :, None]
            found[0] += sum_of_squares(stored.reshape(len(part), -1) - values.T)
            found[1] += sum_of_squares(values)

        convert(source, region, compare)
        return Squares(*found)

    def _copy(self, source: TensorSource, memory: NDArray[np.uint8]) -> Squares:
        """Rows of the embedding, or a norm."""
        tensor = self.tensor.tensor
        width = tensor.spec.shape[-1]
        rows = self.rows if len(tensor.spec.shape) > 1 else (0, 1)
        squares = Squares()
        step = max(1, _ROWS // width)
        for low in range(*rows, step):
            high = min(low + step, rows[1])
            slices = ((low, high), (0, width)) if len(tensor.spec.shape) > 1 else ((0, width),)
            values = source.read(tensor, slices).reshape(high - low, width)
            start = (low - rows[0]) * self.tensor.row_nbytes
            part = memory[start : start + (high - low) * self.tensor.row_nbytes]
            squares += _store(values, part, self.tensor.type)
        assert tensor.precision is Precision.FLOAT32
        assert extent((rows,))[0] * self.tensor.row_nbytes == memory.size
        return squares


def _store(values: NDArray[np.float32], memory: NDArray[np.uint8], kind: TensorType) -> Squares:
    """Write float32 rows in another type; returns the rounding error."""
    if kind is TensorType.F32:
        memory.view("<f4").reshape(values.shape)[...] = values
        return Squares(0.0, sum_of_squares(values))
    if kind is TensorType.BF16:
        stored = rounded(np.ascontiguousarray(values))
        memory.view(BFLOAT16).reshape(values.shape)[...] = stored
        back = stored.astype(np.float32)
    else:
        assert kind is TensorType.Q8_0
        codes, scales = to_int8_groups(values.T, BLOCK)
        blocks = memory.view(Q8_0).reshape(len(values), -1)
        blocks["codes"] = codes.T.reshape(*blocks.shape, BLOCK)
        blocks["scale"] = scales.T
        back = (blocks["codes"] * blocks["scale"].astype(np.float32)[:, :, None]).reshape(
            values.shape
        )
    return Squares(sum_of_squares(back - values), sum_of_squares(values))


def to_float16(scales: NDArray[Any], shift: int, *, is_checked: bool) -> NDArray[np.float16]:
    """bfloat16 scales times a power of two, in float16.

    Args:
        scales: In any shape.
        shift: The exponent.
        is_checked: Whether those that float16 does not hold are of zeros only; they become 0, also
            where float32 does not hold the product.
    """
    wide = np.ldexp(scales.astype(np.float32), shift)
    halves = wide.astype(np.float16)
    if is_checked:
        halves[(halves.astype(np.float32) != wide) | ~np.isfinite(wide)] = 0
    return halves


def block_groups(inputs: int, groups: int) -> bool:
    """Whether scale groups consist of whole blocks."""
    return groups > 0 and math.gcd(inputs // groups, BLOCK) == BLOCK
