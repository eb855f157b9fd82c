"""Pieces read from a mirror, each proven by its hash, in as few requests as there are files."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from urllib.parse import quote

from grokctl.checkpoint.torrent import Metainfo
from grokctl.paths import CKPT, CONFIG
from grokctl.transfer.web import AbsentError, Web, WebError


class WrongBytesError(WebError):
    """A piece does not hash to what the torrent promised."""


class Reader:
    """Some pieces in a row from one mirror."""

    def __init__(
        self, web: Web, url: str, metainfo: Metainfo, places: Mapping[int, str], pieces: range
    ) -> None:
        """Ask for nothing yet.

        Args:
            web: Shared with other threads.
            url: Where the mirror has the release; ends with a slash.
            metainfo: What the pieces must be.
            places: File index -> path below `url`; what has none is a pad, all zeros.
            pieces: What is to be read.
        """
        self.file: int | None = None
        """Index of the file that is being read."""
        self._web = web
        self._url = url
        self._metainfo = metainfo
        self._places = places
        self._pieces = pieces

    def read(self, received: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
        """Each piece with its bytes, as soon as its hash is right.

        Args:
            received: Is told how many bytes have come, and may wait before more are read.

        Raises:
            WrongBytesError: The mirror holds something else.
            WebError: It cannot be read.
        """
        with closing(self._chunks(received)) as stream:
            rest = memoryview(b"")
            for piece in self._pieces:
                parts, left, hasher = [], self._metainfo.piece_size(piece), self._metainfo.hasher()
                while left:
                    if not rest:
                        rest = next(stream)
                    part, rest = rest[:left], rest[left:]
                    hasher.update(part)
                    parts.append(part)
                    left -= len(part)
                if hasher.digest() != self._metainfo.piece_hash(piece):
                    raise self._mismatch(piece)
                yield piece, b"".join(parts)

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
        """File index, offset and length of what the pieces cover, each file once."""
        found: list[tuple[int, int, int]] = []
        for piece in self._pieces:
            for file, offset, length in self._metainfo.spans(piece):
                if found and found[-1][0] == file.index:
                    found[-1] = (file.index, found[-1][1], found[-1][2] + length)
                else:
                    found.append((file.index, offset, length))
        return found

    def _mismatch(self, piece: int) -> WebError:
        """Who is to blame: the mirror, unless it may hold another edition of a small file."""
        for file, _, _ in self._metainfo.spans(piece):
            place = self._places.get(file.index, CKPT)
            if not place.startswith(CKPT) and place != CONFIG:
                self.file = file.index
                return AbsentError("holds another edition")
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
        """Wait until so many bytes may have been received.

        Raises:
            WebError: Everything ends.
        """
        rate = self.rate
        if rate is not None:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + nbytes / rate
            self._stop.wait(self._free_at - now)
        if self._stop.is_set():
            raise WebError("was interrupted")
