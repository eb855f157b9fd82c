"""Write the logits of a score to an .npy file that is complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grokctl.errors import invalid


@contextmanager
def logits_file(path: Path | None, shape: tuple[int, int]) -> Iterator[NDArray[np.float32] | None]:
    """An array to fill, mapped to a file that gets its name at the end of the block.

    Args:
        path: Of the file; None yields None.
        shape: `(tokens, vocab)`.

    Raises:
        InvalidValueError: The path is a folder.
        OSError: The file cannot be written, or does not fit. Nothing remains of it.
    """
    if path is None:
        yield None
        return
    if path.is_dir() or not path.name:
        raise invalid("logits", path, "is a folder, expected a file", "--logits logits.npy")
    partial = path.with_name(f".{path.name}.partial")
    try:
        out = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with partial.open("r+b") as file:  # now: a write to a mapping on a full disk kills us
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        yield out
        out.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
