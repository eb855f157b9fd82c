"""A check of content that trails what reads the files: their pages are in memory then."""

from bisect import bisect_left
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


class TrailingCheck:
    """The check of a release on threads of its own, as a context manager that ends them."""

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
        self._check = check
        self._notes = notes
        self._conclude = conclude
        self._pieces = check.pieces
        self._changed = Condition()
        self._reached = 0
        """Pieces before this one may be read."""
        self._begun = 0
        """Pieces that were let through."""
        self._is_ended = False
        self._trouble: BaseException | None = None
        self._thread = Thread(target=self._run, args=(jobs,), name="verify")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        self._thread.join()

    def wait_for(self, piece: int) -> bool:
        """Wait until the reader is past a piece; False once this has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or piece < self._reached)
            self._begun += 1
            self._changed.notify_all()
            return not self._is_ended

    def include_all(self) -> None:
        """Every file is hashed anyway."""

    def follow(self, done: int, total: int, observe: Observer) -> None:
        """See `SourceCheck`."""
        metainfo = self._check.metainfo
        reached = (metainfo.total * done // total - _BEHIND) // metainfo.piece_length
        self._open(reached)
        farthest = _FARTHEST // metainfo.piece_length
        self._catch_up(done, observe, at_most=farthest)

    def finish(self, total: int, observe: Observer) -> Sequence[Damage]:
        """See `SourceCheck`; no damage to return, because it is raised."""
        self._open(self._check.metainfo.num_pieces)
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            observe(Advanced(stage=Stage.RESHARD, done=total, detail="hashing the source"))
        self._notes.drain(observe)
        if self._trouble is not None:
            raise self._trouble
        self.receipt = self._conclude(observe)
        return ()

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

    def _run(self, jobs: int) -> None:
        try:
            self._check.run(jobs, gate=self)
        except BaseException as error:  # noqa: BLE001 (raised again by `finish`)
            self._trouble = error
