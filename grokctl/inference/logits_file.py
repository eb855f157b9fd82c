"""Write the logits of a score to an .npy file that is complete or absent, or into a device."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from grokctl.events import Noted, Observer, ignore
from grokctl.os_errors import located
from grokctl.outputs import create_output, find_output, replace_output
from grokctl.system import optional

Logits = NDArray[np.float32]


@contextmanager
def logits_file(
    path: Path | None, shape: tuple[int, int], *, observe: Observer = ignore
) -> Iterator[Logits | None]:
    """An array to fill, written to a file at the end of the block.

    Args:
        path: Of the file; None yields None. Links are followed. A device or a pipe receives the
            bytes; a regular file is replaced.
        shape: `(tokens, vocab)`.
        observe: Is told that a pipe has no reader, for which the block then waits.

    Raises:
        InvalidValueError: The path is a folder, or anything else that cannot receive a file.
        OSError: The file cannot be written, or does not fit. Nothing remains of it.
    """
    if path is None:
        yield None
        return
    place, is_regular = find_output(path, "logits", "logits.npy")
    with _mapped(place, shape) if is_regular else _streamed(place, shape, observe) as out:
        yield out


@contextmanager
def _mapped(place: Path, shape: tuple[int, int]) -> Iterator[Logits]:
    """Mapped to a new file, which gets its name at the end."""
    handle, partial = create_output(place)
    try:
        try:
            with os.fdopen(handle, "r+b") as file:
                out = _array_in(file, shape)
        except OSError as error:
            raise located(error, place) from error
        yield out
        out.flush()
        replace_output(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def _array_in(file: BinaryIO, shape: tuple[int, int]) -> "np.memmap[Any, np.dtype[np.float32]]":
    """An array mapped to an empty file, behind its header."""
    descr = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    start = file.tell()
    with optional():  # now: a write to a mapping on a full disk kills us
        file.flush()
        os.posix_fallocate(file.fileno(), 0, start + 4 * shape[0] * shape[1])
    return np.memmap(file, np.float32, "r+", start, shape)


@contextmanager
def _streamed(place: Path, shape: tuple[int, int], observe: Observer) -> Iterator[Logits]:
    """In memory, and written at the end."""
    with os.fdopen(_open_device(place, observe), "wb") as file:  # now: a refusal costs no work
        out = np.zeros(shape, np.float32)
        yield out
        header = np.lib.format.header_data_from_array_1_0(out)
        try:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(out.data)
            file.flush()
        except OSError as error:
            raise located(error, place) from error


def _open_device(place: Path, observe: Observer) -> int:
    """Open a device or a pipe, and say so before waiting for a reader."""
    try:
        handle = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        observe(Noted(message=f"{place}: nobody reads this pipe; waiting for a reader"))
        return os.open(place, os.O_WRONLY | os.O_CLOEXEC)
    os.set_blocking(handle, True)
    return handle
