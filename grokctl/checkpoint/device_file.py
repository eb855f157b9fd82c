"""One device file of a ready checkpoint: any bytes of it, mapped, read or decompressed."""

import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint.frames import Unpacker
from grokctl.checkpoint.layout import ALIGNMENT, DeviceLayout, DeviceTensor
from grokctl.checkpoint.manifest import FileRecord
from grokctl.checkpoint.mapped_files import map_to_read
from grokctl.checkpoint.rows import is_narrow, read_apart, read_into
from grokctl.model.placement import Slice
from grokctl.system import Reading, announce, optional


class DeviceFile:
    """An open device file with the expected header; safe among threads."""

    def __init__(
        self,
        path: Path,
        record: FileRecord,
        layout: DeviceLayout,
        *,
        owner: str,
        is_mapped: bool,
        unpacker: Unpacker,
    ) -> None:
        """Open it.

        Args:
            path: The file.
            record: Its entry in the manifest.
            layout: Its tensors.
            owner: Device and mesh, for errors.
            is_mapped: Whether plain bytes are views of the mapped file, whose pages then count as
                this process's memory; otherwise they are read.
            unpacker: Decompresses frames.

        Raises:
            ValueError: It is not the file that the manifest describes.
            OSError: It cannot be opened.
        """
        self._frames = record.frames
        self._unpacker = unpacker
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)
        self._mapped = self._map(path) if is_mapped and record.frames is None else None
        if self.data(0, len(layout.header)).tobytes() != layout.header:
            raise ValueError(f"the header is not that of {owner}")

    def _map(self, path: Path) -> mmap.mmap | None:
        with optional():  # some file systems have no mappings: then it is read
            memory = map_to_read(self._handle, path)
            # a walk through weights touches each page once: large ones are found faster
            with suppress(OSError, AttributeError):  # not Linux, or without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            return memory
        return None

    def data(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the safetensors file.

        Raises:
            ValueError: A frame does not match the manifest.
            OSError: It cannot be read, or ends early.
        """
        if self._mapped is not None:
            return np.frombuffer(self._mapped, np.uint8, count=nbytes, offset=start)
        out = _aligned(nbytes)
        self.read_into(out, start)
        return out

    def columns(self, item: DeviceTensor, rows: Slice, columns: Slice) -> NDArray[Any] | None:
        """Few columns of a tensor, without the bytes between them.

        Args:
            item: The tensor, with the place of its part.
            rows: Of the part, with all axes but the last taken together.
            columns: Of the last axis.

        Returns:
            `(rows, columns)`; None if whole rows are as good: of a mapped file, or in frames, or
            because many columns are wanted.

        Raises:
            OSError: It cannot be read, or ends early.
        """
        length, dtype = item.slices[-1][1] - item.slices[-1][0], item.tensor.dtype
        if self._mapped is not None or self._frames is not None or not is_narrow(columns, length):
            return None
        out: NDArray[Any] = np.empty((rows[1] - rows[0], columns[1] - columns[0]), dtype)
        start = item.offset + (rows[0] * length + columns[0]) * dtype.itemsize
        read_apart(out.view(np.uint8), self._handle, start, length * dtype.itemsize)
        return out

    def expect(self, start: int, nbytes: int) -> None:
        """Have the kernel fetch bytes that will be read soon."""
        if self._frames is None:
            announce(self._handle, Reading.SOON, offset=start, nbytes=nbytes)

    def read_into(self, memory: NDArray[np.uint8], start: int) -> None:
        """Fill memory with bytes of the safetensors file.

        Raises:
            ValueError: A frame does not match the manifest.
            OSError: It cannot be read, or ends early.
        """
        if self._frames is not None:
            self._unpacker.into(memory, self._handle, self._frames, start)
        else:
            read_into(memory, self._handle, start)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    """Memory that JAX on the CPU can use without a copy."""
    room: NDArray[np.uint8] = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    return room[begin : begin + nbytes]
