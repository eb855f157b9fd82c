"""Compressed device files: consecutive zstd frames, each of which decompresses alone.

`zstd -d` of such a file is the plain safetensors file. The manifest lists the frames, so that a
reader decompresses only the ones it needs, in parallel.
"""

import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import Final, Self

import numpy as np
import zstandard
from numpy.typing import NDArray

from grokctl.errors import invalid
from grokctl.system import usable_cores

SUFFIX: Final = ".zst"
FRAME: Final = 2**20
"""Decompressed bytes of a frame at most, unless one row of a tensor is larger: enough for the full
compression ratio, few enough that every core has its own frames and a reader wastes little."""
LARGEST_FRAME: Final = 2**25
"""Decompressed bytes that an untrusted manifest may declare. We write 16 MiB at most, for int4
groups of 1,024 inputs."""
_KEPT: Final = 2**26
"""Bytes of decompressed frames in the cache: those of two threads for sixteen device files."""
_DEFAULT_LEVEL: Final = 3
_HIGHEST_LEVEL: Final = 19


@dataclass(frozen=True, slots=True)
class Compression:
    """The compression of device files."""

    level: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `zstd` or `zstd:LEVEL`.

        Raises:
            InvalidValueError: It is something else.
        """
        match = re.fullmatch(r"zstd(?::([0-9]{1,2}))?", text.strip())
        level = int(match[1] or _DEFAULT_LEVEL) if match else 0
        if not 1 <= level <= _HIGHEST_LEVEL:
            raise invalid(
                "compress",
                text,
                f"expected zstd or zstd:1 to zstd:{_HIGHEST_LEVEL}",
                "--compress zstd",
            )
        return cls(level)

    def __str__(self) -> str:
        return f"zstd:{self.level}"


_of_thread = threading.local()


def compress(data: bytes | memoryview, compression: Compression) -> bytes:
    """One frame with the size and a checksum of its content."""
    kept: dict[int, zstandard.ZstdCompressor] = _of_thread.__dict__.setdefault("compressors", {})
    compressor = kept.get(compression.level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=compression.level, write_checksum=True)
        kept[compression.level] = compressor
    return compressor.compress(data)


@dataclass(frozen=True)
class Frames:
    """The frames of a file."""

    sizes: tuple[tuple[int, int], ...]
    """Bytes of each frame: decompressed, and compressed."""

    @cached_property
    def plain_starts(self) -> tuple[int, ...]:
        """Offset of each frame in the decompressed content, and the length of that."""
        return tuple(accumulate((plain for plain, _ in self.sizes), initial=0))

    @cached_property
    def packed_starts(self) -> tuple[int, ...]:
        """Offset of each frame in the file, and the length of that."""
        return tuple(accumulate((packed for _, packed in self.sizes), initial=0))

    def within(self, start: int, stop: int) -> range:
        """Frames that overlap the decompressed content from `start` to `stop`."""
        return range(
            bisect_right(self.plain_starts, start) - 1,
            bisect_right(self.plain_starts, max(start, stop - 1)),
        )


class Unpacker:
    """Decompresses parts of files, one frame per thread at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="zstd")
        self._cache: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        """Frames of which only a part was read: the next reader often wants the rest."""
        self._lock = Lock()

    def into(self, out: NDArray[np.uint8], handle: int, frames: Frames, start: int) -> None:
        """Fill `out` with the content of an open file from `start` on.

        Raises:
            ValueError: A frame does not match the manifest.
            OSError: The file cannot be read.
        """
        jobs = [
            self._pool.submit(self._copy, out, handle, frames, start, index)
            for index in frames.within(start, start + out.size)
        ]
        for job in jobs:
            job.result()

    def _copy(
        self, out: NDArray[np.uint8], handle: int, frames: Frames, start: int, index: int
    ) -> None:
        begin, end = frames.plain_starts[index : index + 2]
        low, high = max(begin, start), min(end, start + out.size)
        is_whole = (low, high) == (begin, end)
        content = unpack(handle, frames, index) if is_whole else self._frame(handle, frames, index)
        part = np.frombuffer(content, np.uint8, count=high - low, offset=low - begin)
        out[low - start : high - start] = part

    def _frame(self, handle: int, frames: Frames, index: int) -> bytes:
        """One frame, from the cache or into it."""
        key = (handle, index)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        content = unpack(handle, frames, index)
        with self._lock:
            self._cache[key] = content
            while sum(map(len, self._cache.values())) > _KEPT:
                self._cache.popitem(last=False)
        return content


def unpack(handle: int, frames: Frames, index: int) -> bytes:
    """One frame of an open file, decompressed.

    Raises:
        ValueError: It does not match the manifest.
        OSError: The file cannot be read.
    """
    plain, packed = frames.sizes[index]
    data = os.pread(handle, packed, frames.packed_starts[index])
    try:
        # the library trusts the size in the frame, which is untrusted data
        if zstandard.get_frame_parameters(data).content_size != plain:
            raise ValueError(f"frame {index} does not decompress to {plain} bytes")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"frame {index} is damaged ({error})") from error
