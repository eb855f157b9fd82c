"""What the pickle machine builds: symbols of the objects that a file describes."""

from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayRef:
    """The place of an array in its file: C order, little endian."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class by its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Payload:
    """A place in the file, in bytes."""

    offset: int
    length: int


@dataclass(slots=True, eq=False)
class Dtype:
    """A dtype of numpy; its state comes later."""

    code: str
    is_built: bool = False


@dataclass(slots=True, eq=False)
class Array:
    """An array of numpy; its state comes later."""

    ref: ArrayRef | None = None


@dataclass(slots=True, eq=False)
class Quantized:
    """A `QuantizedWeight8bit`; its arrays come later."""

    parts: dict[str, ArrayRef] = field(default_factory=dict)


class _Mark:
    pass


MARK: Final = _Mark()


def twin_of(value: Any, twins: dict[int, Any]) -> Any:
    """A copy of a value, as far as later opcodes may change it.

    Args:
        value: On the stack or in the memo of a pickle machine.
        twins: Copies so far, by the id of their value: the same value twice has one copy.
    """
    kind = type(value)
    if kind not in _CHANGEABLE:
        return value
    if id(value) in twins:
        return twins[id(value)]
    twin: Any
    if kind is Dtype:
        twin = Dtype(value.code, value.is_built)
    elif kind is Array:
        twin = Array(value.ref)
    elif kind is Quantized:
        twin = Quantized(value.parts)  # replaced as a whole
    elif kind is tuple:
        twin = tuple([twin_of(part, twins) for part in value])
    else:
        twin = twins[id(value)] = {}  # known before its values, which may hold it
        twin.update({key: twin_of(part, twins) for key, part in value.items()})
    twins[id(value)] = twin
    return twin


_CHANGEABLE: Final = frozenset({Dtype, Array, Quantized, dict, tuple})
