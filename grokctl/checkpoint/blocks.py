"""Rows of inputs as rows of outputs: the orientation and the blocks of GGUF, and back.

A release, and a ready checkpoint, have `(inputs, outputs)`; GGUF and PyTorch have `(outputs,
inputs)`. Turning single bytes in numpy makes 54 MB/s on one core. As 64-bit words in tiles that
stay in the L2 cache, it makes ten times that.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 32
"""Inputs of one output that share a scale."""
Q8_0: Final = np.dtype([("scale", "<f2"), ("codes", "i1", BLOCK)])
"""`value = scale * code`."""
Q4_0: Final = np.dtype([("scale", "<f2"), ("codes", "u1", BLOCK // 2)])
"""`value = scale * (code - 8)`; byte j has input j in its low nibble, and input j + 16 above."""
_WORD: Final = 8
_ROWS: Final = 256
_STRIP: Final = 2**18
"""Bytes of some words of all rows that are turned at a time: they stay in the cache."""


def turn(rows: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the transpose of a matrix.

    Args:
        rows: `(rows, columns)` of 1, 2 or 4 bytes; the columns of a row are contiguous.
        out: `(columns, *shape)` with as many elements as rows in the shape, in any strides.
    """
    dtype, (count, columns) = rows.dtype, rows.shape
    per_word = _WORD // dtype.itemsize
    whole = columns // per_word * per_word
    inner = out.shape[1:]
    words = rows[:, :whole].view(np.uint64)
    step = max(1, _STRIP // (_WORD * count))
    for left in range(0, words.shape[1], step):
        strip = words[:, left : left + step]
        turned = np.empty(strip.shape[::-1], np.uint64)
        for top in range(0, count, _ROWS):
            turned[:, top : top + _ROWS] = strip[top : top + _ROWS].T
        parts = turned.view(dtype).reshape(-1, count, per_word)
        first, end = left * per_word, left * per_word + len(parts) * per_word
        for place in range(per_word):
            out[first + place : end : per_word] = parts[:, :, place].reshape(-1, *inner)
    if whole < columns:
        out[whole:] = rows[:, whole:].T.reshape(-1, *inner)


def turned_back(columns: NDArray[Any]) -> NDArray[Any]:
    """The transpose, contiguous.

    Args:
        columns: `(columns, rows)` of 1, 2 or 4 bytes, in any strides.
    """
    rows = np.empty(columns.shape[::-1], columns.dtype)
    turn(np.ascontiguousarray(columns), rows)
    return rows


def codes_turned_back(codes: NDArray[Any]) -> NDArray[Any]:
    """The codes of blocks as rows of inputs, contiguous.

    Args:
        codes: `(outputs, blocks, bytes of a block)`, in any strides but for the last axis.
    """
    outputs, count, height = codes.shape
    rows = np.empty((count * height, outputs), codes.dtype)
    for number in range(count):
        turn(codes[:, number], rows[number * height : (number + 1) * height])
    return rows


def to_q4_0(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Regroup the nibbles of int4 as the ready format has them.

    Args:
        codes: `(inputs / 2, outputs)`: inputs 2r and 2r + 1 in the low and high nibbles of row r.

    Returns:
        The same shape: 16 rows for each block of 32 inputs, with inputs j and j + 16 in row j.
    """
    blocks = codes.reshape(-1, 2, BLOCK // 4, codes.shape[1])
    first, second = blocks[:, 0], blocks[:, 1]
    out = np.empty((len(blocks), BLOCK // 4, 2, codes.shape[1]), np.uint8)
    out[:, :, 0] = (first & 15) | (second << 4)
    out[:, :, 1] = (first >> 4) | (second & 0xF0)
    return out.reshape(codes.shape)


def from_q4_0(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `to_q4_0`."""
    blocks = codes.reshape(-1, BLOCK // 4, 2, codes.shape[1])
    even, odd = blocks[:, :, 0], blocks[:, :, 1]
    out = np.empty((len(blocks), 2, BLOCK // 4, codes.shape[1]), np.uint8)
    out[:, 0] = (even & 15) | (odd << 4)
    out[:, 1] = (even >> 4) | (odd & 0xF0)
    return out.reshape(codes.shape)
