"""Headers of safetensors files that anybody may have written: names, types, shapes and places."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from grokctl.checkpoint.file_sizes import regular_size
from grokctl.checkpoint.manifest import UNTRUSTED
from grokctl.errors import CorruptCheckpointError, Reason, corrupt
from grokctl.text import printable

_LARGEST: Final = 16 * 2**20
"""Bytes of a header."""
_SIZES: Final = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
"""Bytes of an element by the codes of its types."""
_MOST_AXES: Final = 8


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_safetensors(path: Path) -> tuple[HeaderTensor, ...]:
    """Read the header of a file, and none of its data.

    Returns:
        The tensors in the order of their data.

    Raises:
        CorruptCheckpointError: It is no safetensors file, or its tensors are not exactly its data.
        OSError: It cannot be read.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size is None or length > min(_LARGEST, size - 8):
            raise _malformed(path, "is no safetensors file")
        text = file.read(length)
    try:
        tensors, end = _parse(json.loads(text.decode()))
    except UNTRUSTED as error:
        raise _malformed(path, f"has no header ({type(error).__name__}: {error})") from error
    if 8 + length + end != size:
        raise _malformed(path, f"expected {8 + length + end:,} bytes, found {size:,}")
    return tensors


def _parse(values: Any) -> tuple[tuple[HeaderTensor, ...], int]:
    """The tensors, and where their data end."""
    values.pop("__metadata__", None)
    entries = sorted(values.items(), key=lambda entry: tuple(map(int, entry[1]["data_offsets"])))
    tensors, place = [], 0
    for name, entry in entries:
        shape = tuple(entry["shape"])
        if len(shape) > _MOST_AXES or not all(type(one) is int and one >= 0 for one in shape):
            raise ValueError(shape)
        nbytes = prod(shape) * _SIZES[entry["dtype"]]
        offsets = entry["data_offsets"]
        if offsets != [place, place + nbytes] or not all(type(one) is int for one in offsets):
            raise ValueError(offsets)
        place += nbytes
        tensors.append(HeaderTensor(printable(name, limit=255), entry["dtype"], shape, nbytes))
    return tuple(tensors), place


def _malformed(path: Path, detail: str) -> CorruptCheckpointError:
    name = printable(path.name, limit=255)
    return corrupt(name, Reason.MALFORMED, printable(detail, limit=300))
