"""Prove and reshard a release while it arrives, on threads of their own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final

from grokctl.checkpoint.hub_record import trusted_hashes
from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.checkpoint.release_files import read_config
from grokctl.errors import CorruptCheckpointError
from grokctl.events import Advanced, Event, Finished, Observer, Stage, Started
from grokctl.integrity.trailing_check import ArrivalEndedError, ArrivingCheck
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.paths import CONFIG
from grokctl.reshard import reshard
from grokctl.resharding.arriving_source import ArrivingSource, OtherScalesError, expected_release
from grokctl.resharding.plan import ReshardOptions, ReshardPlan, plan_reshard, usual_name
from grokctl.resharding.publish import destination
from grokctl.transfer.destination import FileSelection
from grokctl.verify import AS_PROMISED, raise_for, verify, verifying_arrivals

_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The ready checkpoint to make."""

    root: Path
    """The release."""
    folder: Path
    """Of ready checkpoints."""
    mesh: MeshShape
    precision: Precision | None
    """None keeps the released integers."""


class Overlap:
    """What goes on while a release arrives: `fetch` tells it what is there."""

    def __init__(self, target: Target) -> None:
        """Begin nothing yet.

        Args:
            target: What to make.
        """
        self._target = target
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._check: ArrivingCheck | None = None
        self._thread: Thread | None = None
        self._ready: ReadyCheckpoint | None = None
        self._trouble: BaseException | None = None
        self._hashed = -1
        self._cut = 0

    # --- told by the fetch, on its thread

    def begin(self, selection: FileSelection) -> None:
        """See `Arrivals`."""
        metainfo = trusted_hashes(self._target.root)
        if metainfo is not None and metainfo.infohash == selection.metainfo.infohash:
            self._start(verifying_arrivals(self._target.root, metainfo))

    def arrived(self, have: Sequence[bool]) -> None:
        """See `Arrivals`."""
        if self._check is not None:
            self._check.arrived(have)

    def relayed(self, observe: Observer) -> Observer:
        """An observer of the fetch that passes on what goes on beside it, and its failures."""

        def relay(event: Event) -> None:
            observe(event)
            self._pass_on(observe)

        return relay

    # --- after it

    def finish(self, observe: Observer) -> ReadyCheckpoint | None:
        """Wait for the rest, once every file is there.

        Returns:
            None if there was nothing to do beside the fetch.

        Raises:
            GrokctlError: As `verify` and `reshard` do.
        """
        if self._check is None:
            return None
        self._wait(observe)
        if self._trouble is not None:  # it gave up on a file that was late
            if not isinstance(self._trouble, ArrivalEndedError):
                return None
            self._trouble = None
            metainfo = self._check.check.metainfo
            self._start(verifying_arrivals(self._target.root, metainfo))
            self._wait(observe)
        if isinstance(self._trouble, ArrivalEndedError):  # not late: damaged
            raise_for(verify(self._target.root, observe=observe), self._target.root)
        return self._ready

    def close(self) -> None:
        """End the threads, whatever they do."""
        if self._check is not None and self._thread is not None:
            self._check.end()
            self._thread.join()

    def _wait(self, observe: Observer) -> None:
        assert self._check is not None
        assert self._thread is not None
        self._check.fetched()
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            self._pass_on(observe)
        self._pass_on(observe)

    def _pass_on(self, observe: Observer) -> None:
        """Report what goes on, on the caller's thread."""
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                break
            if isinstance(event, Advanced) and event.stage is Stage.RESHARD:
                self._cut = event.done
            observe(event)
        check = self._check
        if check is not None and check.check.hashed != self._hashed:
            if self._hashed < 0:
                observe(Started(stage=Stage.VERIFY, total=check.total))
            self._hashed = check.check.hashed
            observe(Advanced(stage=Stage.VERIFY, done=self._hashed, detail="of what has arrived"))
            if self._hashed == check.total:
                observe(Finished(stage=Stage.VERIFY))
        if check is not None and check.awaited is not None and self._cut:
            waits = f"waits for {Path(check.awaited).name}"
            observe(Advanced(stage=Stage.RESHARD, done=self._cut, detail=waits))
        trouble = self._trouble
        if isinstance(trouble, CorruptCheckpointError):  # a file is proven before it is opened
            trouble.hint = trouble.hint or AS_PROMISED
        if trouble is not None and not isinstance(trouble, ArrivalEndedError | OtherScalesError):
            raise trouble

    # --- on a thread of its own

    def _start(self, check: ArrivingCheck) -> None:
        self._check, self._hashed, self._cut = check, -1, 0
        self._thread = Thread(target=self._run, args=(check,), name="up")
        self._thread.start()

    def _run(self, check: ArrivingCheck) -> None:
        try:
            plan = self._plan(check)
            if plan is not None:
                self._ready = reshard(plan, check=check, observe=self._events.put)
        except BaseException as error:  # noqa: BLE001 (raised again on the caller's thread)
            self._trouble = error

    def _plan(self, check: ArrivingCheck) -> ReshardPlan | None:
        """The plan; None if it can only be made once everything is there, or is made already."""
        target = self._target
        if CONFIG in check.check.files:
            check.await_arrival(CONFIG)
        try:
            config = read_config(target.root)
        except CorruptCheckpointError:  # `verify` says it better
            return None
        release = expected_release(target.root, config)
        name = usual_name(release, mesh=target.mesh, precision=target.precision, compression=None)
        out = destination(target.folder / name)
        if os.path.lexists(out):
            return None
        options = ReshardOptions(mesh=target.mesh, out=out, precision=target.precision)
        source = ArrivingSource(release, check.await_proof)
        return replace(plan_reshard(release, options), opened=source)
