"""The files of a download from a hub: ranges that are written, and files that are proven."""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Final, Self

from grokctl.checkpoint.hub_record import (
    HUB_PROOF,
    RANGES,
    HubFile,
    HubPromise,
    entry,
    journal_of,
    read_ranges,
)
from grokctl.checkpoint.receipt import Receipt, Stamp, now, read_receipt
from grokctl.errors import FetchError
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started
from grokctl.integrity.promised_file import ReadFile, read_promised
from grokctl.os_errors import reason_of, refusal
from grokctl.own_files import folder_of, open_own
from grokctl.ownership import exposed_files
from grokctl.paths import quoted, write_atomically
from grokctl.system import usable_cores
from grokctl.transfer.destination import FileSelection

_MOST_JOBS: Final = 8
_SAVE_EVERY_S: Final = 5.0
_AT_ONCE: Final = 4
"""Ranges of a wrong file that are fetched again at a time, until one of them differs."""


@dataclass(slots=True, kw_only=True)
class _State:
    """One wanted file."""

    file: HubFile
    pieces: range
    missing: set[int]
    suspects: list[int] = field(default_factory=list)
    """Ranges that were read back as they arrived, in a file that has another hash."""
    is_doubted: bool = False
    """Whether the whole of it had the wrong hash, although every range was as it arrived."""
    has_changed: bool = False
    """Whether one of them differed when it was fetched again."""
    found: str = ""
    """The wrong hash."""
    handle: int | None = None
    reading: "Future[ReadFile] | None" = None
    stamp: Stamp | None = None
    """From before the reading."""


class HubFiles:
    """The wanted files on disk, as a context manager.

    A file is proven by its whole hash, which is read back from the disk once all of it is there.
    The hashes of its ranges show which of them to fetch again.
    """

    def __init__(self, root: Path, promise: HubPromise, selection: FileSelection) -> None:
        """Look at nothing yet.

        Args:
            root: The release, prepared and locked.
            promise: Of the hub.
            selection: The files to download, whose metainfo is the promise's.
        """
        self.root = root
        self.selection = selection
        self.metainfo = selection.metainfo
        self._promise = promise
        of_release = {
            index: _State(file=file, pieces=pieces, missing=set(pieces))
            for index, file in promise.by_index(self.metainfo).items()
            for pieces in (self.metainfo.pieces_of(self.metainfo.files[index]),)
        }
        self._states = {index: of_release[index] for index in sorted(selection.wanted)}
        self._others = [state for index, state in of_release.items() if index not in self._states]
        """Files that are not wanted, and may be there since an earlier fetch."""
        self._of_piece = {piece: state for state in self._states.values() for piece in state.pieces}
        self.hashes = bytearray(read_ranges(root, promise))
        """SHA-256 of every range that is on disk, as it arrived."""
        self.proven: dict[str, Stamp] = {}
        """Place of a wanted file that has the hub's hash -> its stamp then."""
        self._proven_before: dict[str, Stamp] = {}
        """The same of other files."""
        self._earlier = read_receipt(root)
        self._saved_at = time.monotonic()
        self._is_saved = True
        self.is_private = True
        """Whether nobody else can change a file, as far as was looked."""
        self._cancelled = Event()
        self._pool = ThreadPoolExecutor(min(usable_cores(), _MOST_JOBS))
        self._journal: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cancelled.set()
        self._pool.shutdown(cancel_futures=True)
        for state in self._states.values():
            self._close(state)
        if self._journal is not None:
            os.close(self._journal)

    @property
    def is_complete(self) -> bool:
        """Whether every wanted file is proven."""
        return len(self.proven) == len(self._states)

    @property
    def done(self) -> int:
        """Bytes of the wanted files that are on disk."""
        return sum(map(self._done, self._states.values()))

    def _done(self, state: _State) -> int:
        missing = len(state.missing) * self.metainfo.piece_length
        if state.missing and state.pieces[-1] in state.missing:
            missing -= self.metainfo.piece_length - self.metainfo.piece_size(state.pieces[-1])
        return state.file.nbytes - missing

    def have(self) -> Iterator[int]:
        """Ranges that are on disk."""
        for state in (*self._states.values(), *self._others):
            yield from (piece for piece in state.pieces if piece not in state.missing)

    def left(self) -> list[int]:
        """Ranges to fetch, ascending; of a file with the wrong hash, a few at a time."""
        missing = {piece for state in self._states.values() for piece in state.missing}
        for state in self._states.values():
            if state.reading is None:
                missing.update(state.suspects[:_AT_ONCE])
        return sorted(missing)

    def wants(self, piece: int) -> bool:
        """Whether a range is to be fetched now."""
        state = self._of_piece[piece]
        is_suspect = state.reading is None and piece in state.suspects[:_AT_ONCE]
        return piece in state.missing or is_suspect

    # --- what is there already

    def look(self, observe: Observer, *, is_foreign: bool) -> None:
        """Find what need not be fetched: by the receipt, or by a look at every byte.

        Args:
            observe: Receives verify in bytes.
            is_foreign: Whether files are those of others, which are never written to.

        Raises:
            FetchError: A file of others differs from what the hub names, or cannot be read.
        """
        self._trust_receipt()
        present = [state for state in self._states.values() if self._is_there(state)]
        total, done = sum(state.file.nbytes for state in present), 0
        if not present:
            return
        observe(Started(stage=Stage.VERIFY, total=total))
        for state in present:
            state.reading = self._read(state)
        for state in present:
            done += state.file.nbytes
            self._compare(state, self._result(state), is_foreign=is_foreign)
            observe(Advanced(stage=Stage.VERIFY, done=done, detail="checking data on disk"))
        observe(Finished(stage=Stage.VERIFY))

    def assume(self, have: frozenset[int]) -> None:
        """Believe the ranges that were proven just now; all others are fetched again."""
        self.hashes[:] = self.metainfo.piece_hashes
        self._trust_receipt()
        for state in self._states.values():
            state.missing.difference_update(have)

    def _trust_receipt(self) -> None:
        """Files that were proven, are unchanged since, and have known ranges."""
        saved = self._earlier
        if saved is None or saved.infohash != self._promise.digest:
            return
        untouched = saved.untouched(self.root)
        for states, proven in (
            (self._states.values(), self.proven),
            (self._others, self._proven_before),
        ):
            for state in states:
                place = state.file.place
                if place in untouched and all(any(self._hash(piece)) for piece in state.pieces):
                    proven[place] = saved.stamps[place]
                    state.missing.clear()

    def _is_there(self, state: _State) -> bool:
        """Whether there is something to read of a file that is not proven."""
        if state.file.place in self.proven:
            return False
        stamp = Stamp.of(self.root / state.file.place)
        return stamp is not None and (stamp.size > 0 or state.file.nbytes == 0)

    def _compare(self, state: _State, read: ReadFile, *, is_foreign: bool) -> None:
        """Take over the ranges on disk that are as they arrived, or all of a right file."""
        if read.is_good:
            state.missing.clear()
            self._keep(state, read)
            return
        if is_foreign:
            path, expected = self.root / state.file.place, state.file.sha256 or state.file.blob
            message = f"{path}: expected {expected} as the hub names it, found {read.found}"
            raise FetchError(message, f"mv {quoted(path)} {quoted(f'{path}.other')}")
        for piece, sha256 in zip(state.pieces, read.ranges, strict=True):
            if sha256 == self._hash(piece):
                state.missing.discard(piece)
        if not state.missing:  # killed before this came out
            state.found = read.found
            self._doubt(state)

    # --- what arrives

    def write(self, piece: int, data: bytes, sha256: bytes) -> None:
        """Write a range to its file, and to the journal.

        Raises:
            DiskFullError: There is no room.
            FetchError: The file cannot be written, or leads elsewhere.
        """
        state = self._of_piece[piece]
        if piece in state.suspects:
            state.suspects.remove(piece)
            if sha256 == self._hash(piece):
                return
            state.has_changed = True
            state.missing.add(piece)
        if piece not in state.missing:
            return  # it came twice
        (span,) = self.metainfo.spans(piece)
        path = self.root / state.file.place
        try:
            view, offset = memoryview(data), span[1]
            while view:
                count = os.pwrite(self._opened(state), view, offset)
                view, offset = view[count:], offset + count
            self.hashes[32 * piece : 32 * piece + 32] = sha256
            os.write(self._opened_journal(), entry(piece, sha256))
        except OSError as error:
            raise refusal(error, path, kind=FetchError) from error
        state.missing.discard(piece)

    def prove(self, observe: Observer) -> None:
        """Begin to read complete files back, and take the results; waits for nothing.

        Raises:
            FetchError: A file has another hash than the hub names, also fetched twice.
        """
        for state in self._states.values():
            if state.missing or state.file.place in self.proven:
                continue
            if state.reading is not None:
                if state.reading.done():
                    self._conclude(state, self._result(state), observe)
            elif state.has_changed or not state.is_doubted:
                state.has_changed = False
                self._close(state)
                state.reading = self._read(state)
            elif not state.suspects:
                raise self._wrong(state)
        if not self._is_saved and time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save(observe)

    def _conclude(self, state: _State, read: ReadFile, observe: Observer) -> None:
        file = state.file
        if read.is_good:
            self._keep(state, read)
            return
        altered = {
            piece
            for piece, sha256 in zip(state.pieces, read.ranges, strict=True)
            if sha256 != self._hash(piece)
        }
        if altered:
            observe(Noted(message=f"{file.place}: changed on the disk; fetching that again"))
            state.missing |= altered
            return
        state.found = read.found
        if not state.is_doubted:
            message = f"{file.place}: other bytes than the hub's hash; fetching its ranges again"
            observe(Noted(message=message))
            self._doubt(state)

    def _doubt(self, state: _State) -> None:
        state.is_doubted = True
        state.suspects = list(state.pieces)

    def _wrong(self, state: _State) -> FetchError:
        file = state.file
        message = f"{file.place}: expected {'sha256' if file.sha256 else 'git blob'} "
        message += f"{file.sha256 or file.blob}, found {state.found}"
        message += f"; {self._promise.host} sent the same bytes twice"
        return FetchError(message, "grokctl fetch --mirror URL  # another hub")

    def _keep(self, state: _State, read: ReadFile) -> None:
        for piece, sha256 in zip(state.pieces, read.ranges, strict=True):
            self.hashes[32 * piece : 32 * piece + 32] = sha256
        state.suspects.clear()
        stamp = Stamp.of(self.root / state.file.place)
        if stamp is not None and stamp == state.stamp:  # else it is read again
            self.proven[state.file.place] = stamp
            self._is_saved = False

    # --- what is kept

    def save(self, observe: Observer) -> None:
        """Write the receipt of all files that are proven by now."""
        self._saved_at, self._is_saved = time.monotonic(), True
        proven = self.proven | self._proven_before
        exposed = exposed_files(self.root, sorted(proven))
        self.is_private = not exposed
        stamps = {name: stamp for name, stamp in proven.items() if name not in exposed}
        earlier = self._earlier
        if earlier is not None and earlier.infohash != self._promise.digest:
            earlier = None
        times = {
            name: earlier.proven_at(name)
            for name, stamp in stamps.items()
            if earlier is not None and earlier.stamps.get(name) == stamp
        }
        receipt = Receipt(
            infohash=self._promise.digest,
            verified_at=now(),
            stamps=stamps,
            earlier=times,
            is_complete=len(stamps) == len(self._promise.files),
            root_of_trust=self._promise.trust,
            proven_by=HUB_PROOF,
        )
        try:
            receipt.write(self.root)
        except OSError as error:
            observe(Noted(message=f"receipt: cannot be written ({reason_of(error)})"))

    def finish(self, observe: Observer) -> bool:
        """Keep the hashes of the ranges if the whole release is proven.

        Returns:
            Whether it is.

        Raises:
            OSError: The folder cannot be written.
        """
        self.save(observe)
        if len(self.proven) + len(self._proven_before) < len(self._promise.files):
            return False
        journal = journal_of(self._promise, bytes(self.hashes))
        write_atomically(self.root / RANGES, journal)
        sha256 = hashlib.sha256(journal).hexdigest()
        self._promise.write(self.root, ranges_sha256=sha256)
        return True

    # --- files and threads

    def _hash(self, piece: int) -> bytes:
        return bytes(self.hashes[32 * piece : 32 * piece + 32])

    def _read(self, state: _State) -> "Future[ReadFile]":
        length = self.metainfo.piece_length
        state.stamp = Stamp.of(self.root / state.file.place)
        return self._pool.submit(
            read_promised, self.root, state.file, length, self._cancelled, sync=True
        )

    def _result(self, state: _State) -> ReadFile:
        assert state.reading is not None
        reading, state.reading = state.reading, None
        try:
            return reading.result()
        except OSError as error:
            raise refusal(error, self.root / state.file.place, kind=FetchError) from error

    def _opened(self, state: _State) -> int:
        if state.handle is None:
            with ExitStack() as stack:
                folder, name = folder_of(stack, self.root, state.file.place)
                path = self.root / state.file.place
                state.handle = open_own(name, folder, path, flags=os.O_RDWR)
        return state.handle

    def _close(self, state: _State) -> None:
        if state.handle is not None:
            os.close(state.handle)
            state.handle = None

    def _opened_journal(self) -> int:
        if self._journal is None:
            path = self.root / RANGES
            write_atomically(path, journal_of(self._promise, bytes(self.hashes)))
            with ExitStack() as stack:
                folder, name = folder_of(stack, self.root, RANGES)
                self._journal = open_own(name, folder, path, flags=os.O_WRONLY | os.O_APPEND)
        return self._journal
