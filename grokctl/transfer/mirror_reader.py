"""Consecutive pieces from one mirror, each proven by its hash, with one request per file."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from urllib.parse import quote

from grokctl.checkpoint.torrent import Metainfo
from grokctl.paths import CKPT, CONFIG
from grokctl.transfer.web import AbsentError, Web, WebError


class WrongBytesError(WebError):
    """A piece does not have the hash that the torrent promises."""


class MirrorReader:
    """Reads consecutive pieces from one mirror."""

    def __init__(
        self, web: Web, url: str, metainfo: Metainfo, places: Mapping[int, str], pieces: range
    ) -> None:
        """Send no request yet.

        Args:
            web: Shared with other threads.
            url: The release on the mirror; ends with a slash.
            metainfo: Holds the hashes of the pieces.
            places: File index -> path below `url`; files that are left out are pads, all zeros.
            pieces: The pieces to read.
        """
        self.file: int | None = None
        """Index of the file that is being read."""
        self._web = web
        self._url = url
        self._metainfo = metainfo
        self._places = places
        self._pieces = pieces

    def read(self, received: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
        """Yield each piece with its bytes as soon as its hash is right, if that is known.

        Args:
            received: Called with the size of each chunk; may wait before more is read.

        Raises:
            WrongBytesError: The mirror sent different bytes.
            WebError: It cannot be read.
        """
        with closing(self._chunks(received)) as stream:
            rest = memoryview(b"")
            for piece in self._pieces:
                # not a list of parts: of a mirror that sends bytes one by one, each is an object
                data, hasher = bytearray(), self._metainfo.hasher()
                while left := self._metainfo.piece_size(piece) - len(data):
                    if not rest:
                        rest = next(stream)
                    part, rest = rest[:left], rest[left:]
                    hasher.update(part)
                    data += part
                is_promised = self._metainfo.promises(piece)
                if is_promised and hasher.digest() != self._metainfo.piece_hash(piece):
                    raise self._mismatch(piece)
                yield piece, bytes(data)

    def _chunks(self, received: Callable[[int], None]) -> Generator[memoryview]:
        for index, start, length in self._ranges():
            self.file = index
            if index not in self._places:
                yield memoryview(bytes(length))
                continue
            url = self._url + quote(self._places[index])
            total = self._metainfo.files[index].length
            with self._web.open_range(url, start, length, total=total) as chunks:
                for chunk in chunks:
                    received(len(chunk))
                    yield memoryview(chunk)

    def _ranges(self) -> list[tuple[int, int, int]]:
        """File index, offset and length of the bytes that the pieces cover, each file once."""
        ranges: list[tuple[int, int, int]] = []
        for piece in self._pieces:
            for file, offset, length in self._metainfo.spans(piece):
                if ranges and ranges[-1][0] == file.index:
                    ranges[-1] = (file.index, ranges[-1][1], ranges[-1][2] + length)
                else:
                    ranges.append((file.index, offset, length))
        return ranges

    def _mismatch(self, piece: int) -> WebError:
        """The error for a bad piece: a small file may differ on the mirror; tensors may not."""
        for file, _, _ in self._metainfo.spans(piece):
            place = self._places.get(file.index, CKPT)
            if not place.startswith(CKPT) and place != CONFIG:
                self.file = file.index
                return AbsentError("has a different version")
        return WrongBytesError("sent wrong bytes")


class Limiter:
    """Makes threads wait so that together they stay below a rate."""

    def __init__(self, stop: threading.Event) -> None:
        self.rate: float | None = None
        """Bytes per second."""
        self._stop = stop
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait(self, nbytes: int) -> None:
        """Wait until the rate allows this many bytes.

        Raises:
            WebError: The download is over.
        """
        rate = self.rate
        if rate is not None:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + nbytes / rate
            self._stop.wait(self._free_at - now)
        if self._stop.is_set():
            raise WebError("was interrupted")
