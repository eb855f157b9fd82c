"""Compressed device files: zstd frames one after the other, each of which decompresses alone.

`zstd -d` of such a file is the plain safetensors file; the manifest says where each frame begins,
so that a reader takes the ones it needs, several at a time.
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

from grokctl.errors import UsageError
from grokctl.system import usable_cores

SUFFIX: Final = ".zst"
FRAME: Final = 2**20
"""Bytes that a frame decompresses to at most, unless one row of a tensor is larger: enough for
the full ratio, few enough that every core has frames of its own and a reader wastes little."""
LARGEST_FRAME: Final = 2**25
"""Bytes that a manifest may ask for: it is a stranger's. We write 16 MiB at most, of int4 groups of
1,024 inputs."""
_KEPT: Final = 2**26
"""Bytes of decompressed frames that are kept: two threads' of sixteen devices' files, and more."""
_DEFAULT_LEVEL: Final = 3
_HIGHEST_LEVEL: Final = 19


@dataclass(frozen=True, slots=True)
class Compression:
    """How device files are compressed."""

    level: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `zstd` or `zstd:LEVEL`.

        Raises:
            UsageError: It is something else.
        """
        match = re.fullmatch(r"zstd(?::([0-9]{1,2}))?", text.strip())
        level = int(match[1] or _DEFAULT_LEVEL) if match else 0
        if not 1 <= level <= _HIGHEST_LEVEL:
            raise UsageError(
                f"compression {text[:60]!r} is not zstd or zstd:1 to zstd:{_HIGHEST_LEVEL}",
                "--compress zstd",
            )
        return cls(level)

    def __str__(self) -> str:
        return f"zstd:{self.level}"


_of_thread = threading.local()


def compress(data: bytes | memoryview, compression: Compression) -> bytes:
    """One frame that says how long its content is, and carries a checksum of it."""
    kept: dict[int, zstandard.ZstdCompressor] = _of_thread.__dict__.setdefault("compressors", {})
    compressor = kept.get(compression.level)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(level=compression.level, write_checksum=True)
        kept[compression.level] = compressor
    return compressor.compress(data)


@dataclass(frozen=True)
class Frames:
    """Where the frames of a file begin, compressed and not."""

    sizes: tuple[tuple[int, int], ...]
    """Bytes of each frame: decompressed, and in the file."""

    @cached_property
    def plain_starts(self) -> tuple[int, ...]:
        """Where each frame's content begins; then the whole content's length."""
        return tuple(accumulate((plain for plain, _ in self.sizes), initial=0))

    @cached_property
    def packed_starts(self) -> tuple[int, ...]:
        """Where each frame begins in the file; then the file's length."""
        return tuple(accumulate((packed for _, packed in self.sizes), initial=0))

    def within(self, start: int, stop: int) -> range:
        """Frames that hold some of the content from `start` to `stop`."""
        return range(
            bisect_right(self.plain_starts, start) - 1,
            bisect_right(self.plain_starts, max(start, stop - 1)),
        )


class Unpacker:
    """Decompresses parts of files, a frame a thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="zstd")
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        """Frames of which only a part was wanted: the next reader often wants the rest."""
        self._lock = Lock()

    def into(self, out: NDArray[np.uint8], handle: int, frames: Frames, start: int) -> None:
        """Fill `out` with the content of an open file from `start` on.

        Raises:
            ValueError: A frame is not what the manifest says.
            OSError: The file cannot be read.
        """
        jobs = [
            self._pool.submit(self._copy, out, handle, frames, start, number)
            for number in frames.within(start, start + out.size)
        ]
        for job in jobs:
            job.result()

    def _copy(
        self, out: NDArray[np.uint8], handle: int, frames: Frames, start: int, number: int
    ) -> None:
        begin, end = frames.plain_starts[number : number + 2]
        low, high = max(begin, start), min(end, start + out.size)
        is_whole = (low, high) == (begin, end)
        content = (
            unpack(handle, frames, number) if is_whole else self._frame(handle, frames, number)
        )
        some = np.frombuffer(content, np.uint8, count=high - low, offset=low - begin)
        out[low - start : high - start] = some

    def _frame(self, handle: int, frames: Frames, number: int) -> bytes:
        key = (handle, number)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        content = unpack(handle, frames, number)
        with self._lock:
            self._kept[key] = content
            while sum(map(len, self._kept.values())) > _KEPT:
                self._kept.popitem(last=False)
        return content


def unpack(handle: int, frames: Frames, number: int) -> bytes:
    """One frame of an open file, decompressed.

    Raises:
        ValueError: It is not what the manifest says.
        OSError: The file cannot be read.
    """
    plain, packed = frames.sizes[number]
    data = os.pread(handle, packed, frames.packed_starts[number])
    try:
        # the library trusts a frame's own size, and a stranger may have written it
        if zstandard.get_frame_parameters(data).content_size != plain:
            raise ValueError(f"frame {number} does not hold {plain} bytes")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"frame {number} is damaged ({error})") from error
