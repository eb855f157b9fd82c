"""Checks of content beside other work on the files: what trails it, and what goes before it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Condition, Thread
from typing import Final, Self

from grokctl.checkpoint.receipt import Receipt
from grokctl.errors import Damage
from grokctl.events import Advanced, Event, Noted, Observer, Stage
from grokctl.integrity.content_check import ContentCheck

_BEHIND: Final = 32 * 2**20
"""Bytes that the check stays behind: it must not read what the reader has not."""
_FARTHEST: Final = 2**30
"""Bytes that it may fall behind: memory keeps the pages so long. Then the reader waits."""
_POLL_S: Final = 0.1
_MOST_LOOKS: Final = 100
"""At a piece that has arrived, and is not on its way to the disk any more after this."""


class Notes:
    """Keeps notes of another thread until they may be observed."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Noted] = SimpleQueue()

    def __call__(self, event: Event) -> None:
        """Keep an event if it is a note."""
        if isinstance(event, Noted):
            self._queue.put(event)

    def drain(self, observe: Observer) -> None:
        """Pass on what was kept."""
        while True:
            try:
                observe(self._queue.get_nowait())
            except Empty:
                return


class ArrivalEndedError(Exception):
    """Files that were waited for will not arrive, or are not as promised."""


class _CheckThread:
    """The check of a release on threads of its own, as a context manager that ends them."""

    identity: str | None = None
    """What the content is known by before all of it is there; None if it is there."""

    def __init__(
        self,
        check: ContentCheck,
        notes: Notes,
        conclude: Callable[[Observer], Receipt | None],
        *,
        jobs: int,
    ) -> None:
        """Start no thread yet.

        Args:
            check: Of the release's content; its observer is `notes`.
            notes: What it says.
            conclude: Raises if the check found damage; returns the receipt, if all is proven.
            jobs: Threads.
        """
        self.receipt: Receipt | None = None
        self.check = check
        self._notes = notes
        self._conclude = conclude
        self._changed = Condition()
        self._is_ended = False
        self._trouble: BaseException | None = None
        self._thread = Thread(target=self._run, args=(jobs,), name="verify")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._thread.join()

    def end(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def include_all(self) -> None:
        """Every file is hashed anyway."""

    def wait_for(self, piece: int) -> bool:
        """See `PieceGate`."""
        raise NotImplementedError

    def is_early(self, piece: int) -> bool:  # noqa: ARG002 (what lies there has arrived)
        """See `PieceGate`."""
        return False

    def finish(self, total: int, observe: Observer) -> Sequence[Damage]:
        """See `SourceCheck`; no damage to return, because it is raised."""
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            observe(Advanced(stage=Stage.RESHARD, done=total, detail="hashing the source"))
        self._notes.drain(observe)
        if self._trouble is not None:
            raise self._trouble
        self.receipt = self._conclude(observe)
        return ()

    def _run(self, jobs: int) -> None:
        try:
            self.check.run(jobs, gate=self)
        except BaseException as error:  # noqa: BLE001 (raised again by `finish`)
            self._trouble = error
        finally:
            with self._changed:
                self._changed.notify_all()


class TrailingCheck(_CheckThread):
    """Hashes what another reads, behind it."""

    def __init__(
        self,
        check: ContentCheck,
        notes: Notes,
        conclude: Callable[[Observer], Receipt | None],
        *,
        jobs: int,
    ) -> None:
        """Start no thread yet; see `_CheckThread`."""
        super().__init__(check, notes, conclude, jobs=jobs)
        self._pieces = check.pieces
        self._reached = 0
        """Pieces before this one may be read."""
        self._begun = 0
        """Pieces that were let through."""

    def wait_for(self, piece: int) -> bool:
        """Wait until the reader is past a piece; False once this has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or piece < self._reached)
            self._begun += 1
            self._changed.notify_all()
            return not self._is_ended

    def follow(self, done: int, total: int, observe: Observer) -> None:
        """See `SourceCheck`."""
        metainfo = self.check.metainfo
        reached = (metainfo.total * done // total - _BEHIND) // metainfo.piece_length
        self._open(reached)
        farthest = _FARTHEST // metainfo.piece_length
        self._catch_up(done, observe, at_most=farthest)

    def finish(self, total: int, observe: Observer) -> Sequence[Damage]:
        """See `SourceCheck`; no damage to return, because it is raised."""
        self._open(self.check.metainfo.num_pieces)
        return super().finish(total, observe)

    def _open(self, reached: int) -> None:
        with self._changed:
            self._reached = max(self._reached, reached)
            self._changed.notify_all()

    def _catch_up(self, done: int, observe: Observer, *, at_most: int) -> None:
        """Wait until at most so many pieces that may be read are not."""
        self._notes.drain(observe)
        while self._thread.is_alive():
            with self._changed:
                if bisect_left(self._pieces, self._reached) - self._begun <= at_most:
                    return
                self._changed.wait(_POLL_S)
            observe(Advanced(stage=Stage.RESHARD, done=done, detail="hashing the source"))


class ArrivingCheck(_CheckThread):
    """Hashes files as they become complete; what reads them waits until they are proven."""

    def __init__(
        self,
        check: ContentCheck,
        notes: Notes,
        conclude: Callable[[Observer], Receipt | None],
        *,
        jobs: int,
    ) -> None:
        """Start no thread yet; see `_CheckThread`."""
        super().__init__(check, notes, conclude, jobs=jobs)
        self.identity = check.metainfo.infohash
        self.total = sum(map(check.metainfo.piece_size, check.pieces))
        """Bytes that will be hashed."""
        self.awaited: str | None = None
        """The file that a reader waits for."""
        self._here = set(check.trusted)
        """Files that are complete."""
        self._proven = set(check.trusted)
        self._looks: Counter[int] = Counter()
        """Piece -> how often it was read too early."""
        self._is_fetched = False
        check.when_proven = self._prove

    def arrived(self, have: Sequence[bool]) -> None:
        """Tell which pieces are on the disk."""
        check = self.check
        for name in check.files.keys() - self._here:
            if all(have[piece] for piece in check.metainfo.pieces_of(check.files[name])):
                check.look_again(name)
                with self._changed:
                    self._here.add(name)
                    self._changed.notify_all()

    def fetched(self) -> None:
        """Every file is there, and nobody writes to any of them."""
        self.arrived([True] * self.check.metainfo.num_pieces)
        with self._changed:
            self._is_fetched = True
            self._changed.notify_all()

    def await_arrival(self, name: str) -> None:
        """Wait until a file is complete, which proves little.

        Raises:
            ArrivalEndedError: It will not be.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or name in self._here)
        if self._is_ended:
            raise ArrivalEndedError

    def await_proof(self, name: str) -> None:
        """Wait until a file is proven.

        Raises:
            ArrivalEndedError: It will not be, or another is damaged.
        """
        if name in self._proven:
            return
        self.awaited = name
        with self._changed:
            self._changed.wait_for(lambda: name in self._proven or self._is_hopeless())
        self.awaited = None
        if name not in self._proven:
            raise ArrivalEndedError

    def wait_for(self, piece: int) -> bool:
        """Wait until the files of a piece are complete; False once this has ended."""
        names = set(self.check.names_of(piece))
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or names <= self._here)
        return not self._is_ended

    def is_early(self, piece: int) -> bool:
        """Whether a piece that has arrived is perhaps still on its way to the disk."""
        self._looks[piece] += 1
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended, _POLL_S)
            return not (self._is_ended or self._is_fetched) and self._looks[piece] < _MOST_LOOKS

    def follow(self, done: int, total: int, observe: Observer) -> None:
        """What is read was hashed before."""

    def finish(self, total: int, observe: Observer) -> Sequence[Damage]:
        """See `SourceCheck`; waits for the end of the fetch, too."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or self._is_fetched)
        if self._is_ended:
            raise ArrivalEndedError
        return super().finish(total, observe)

    def _is_hopeless(self) -> bool:
        return self._is_ended or bool(self.check.bad) or not self._thread.is_alive()

    def _prove(self, name: str) -> None:
        with self._changed:
            self._proven.add(name)
            self._changed.notify_all()
