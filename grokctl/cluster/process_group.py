"""Several processes as one run: how they come together, and end together."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from threading import Timer
from typing import Final

import jax

from grokctl import __version__, interrupts
from grokctl.cluster.ending import Ending, Report
from grokctl.cluster.exchange import Exchange
from grokctl.cluster.launcher import Launch
from grokctl.cluster.rendezvous import Meeting, Note, meet
from grokctl.cluster.tunnel import Tunnel
from grokctl.errors import PeerError, PlacementError
from grokctl.model.placement import MESH_SIZES

_SPARE_S: Final = 15
"""Of the seconds in which all processes must have ended: JAX takes 6 to 8 more than its timeout
where a process does not come."""
_SHUTDOWN_S: Final = 5
_SILENT_S: Final = 3
"""Seconds of waiting for other processes without a note."""
_FULL: Final = "RESOURCE_EXHAUSTED"
"""What JAX calls a device whose memory is full, which is no other process's fault."""


class Cluster(Exchange):
    """This process among those of a run; made by `joined`.

    Rank 0 decides and sends orders; the others carry them out.
    """

    def __init__(
        self, launch: Launch, secret: bytes | None, *, bound_s: int, report: Report, note: Note
    ) -> None:
        super().__init__(launch, bound_s=bound_s, note=note)
        self._secret = secret
        self._ending = Ending(launch, report=report)

    def join(self) -> None:
        """Come together with the other processes.

        Raises:
            PeerError: Rank 0 cannot be reached, its port is taken, or other processes do not come.
                If one is lost at this point, JAX ends the process, and `Ending` reports why.
        """
        others = "rank 0" if self.rank else f"{self.count - 1} more of {self.count} processes"
        note = f"waiting for {others} at {self.launch.address} (at most {self._bound_s} s)"
        silence = Timer(_SILENT_S, self._note, (note,))
        silence.daemon = True
        silence.start()
        try:
            met = meet(self.launch, self._secret, within_s=self._bound_s, note=self._note)
            self._orders = met.orders
            self._initialize(met)
        finally:
            silence.cancel()
        from jax._src import distributed  # noqa: PLC0415 # there is no public way to its messages

        self._store = distributed.global_state.client
        self._ending.watch(self._store)
        versions = {name: version(name) for name in ("jax", "jaxlib")}
        self.agree("program", {"grokctl": __version__, **versions}, within_s=self._bound_s)
        self.keep_in_touch(self._ending.lose)

    def _initialize(self, met: Meeting) -> None:
        self._ending.catch_abort()
        with _closed_to_others():  # gRPC makes the socket of rank 0
            self._initialize_jax(met)

    def _initialize_jax(self, met: Meeting) -> None:
        tunnel = Tunnel(self.rank, met.services, within_s=self._bound_s)
        # JAX would take SIGTERM for a warning, and go on
        jax.config.update("jax_enable_preemption_service", False)
        try:
            # without detection, which would give each process one GPU
            jax.distributed.initialize(
                tunnel.address,
                self.count,
                self.rank,
                coordinator_bind_address=tunnel.address,
                cluster_detection_method="deactivate",
                initialization_timeout=self._bound_s - _SPARE_S,
                heartbeat_timeout_seconds=self.heartbeat_s,
                shutdown_timeout_seconds=_SHUTDOWN_S,
            )
            tunnel.require_own()
        except jax.errors.JaxRuntimeError as error:  # where it does not abort
            raise PeerError(self._ending.last_words("")) from error
        finally:
            tunnel.close_door()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run a computation that all processes take part in.

        Raises:
            PeerError: Another process is gone.
        """
        with self._ending.noise.quiet():
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if _FULL in str(error):
                    raise
                raise self._lost(error) from error

    def before_end(self, act: Callable[[], object]) -> None:
        """Have something done, briefly and from any thread, before the loss of a rank ends this."""
        self._ending.before_loss = act

    def finish(self) -> None:
        """End the run in every process: all is done."""
        self._ending.begin()
        if self.rank == 0:
            self.release()
        self._ending.part()

    def fail(self, error: BaseException) -> None:
        """End the run in every process: the others report what happened here."""
        if isinstance(error, BrokenPipeError) and self._ending.is_joined and self.rank == 0:
            self.finish()  # the reader of the output has enough: no failure
            return
        self._ending.fail(error)

    def noise(self) -> str:
        """The output of C++ libraries, for diagnosis."""
        return self._ending.noise.text()


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """Let this process make files and sockets for this user alone."""
    umask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(umask)


@contextmanager
def joined(
    launch: Launch,
    secret: bytes | None = None,
    *,
    bound_s: int,
    report: Report,
    note: Note,
    verbose: bool,
) -> Iterator[Cluster]:
    """Be one of the processes of a run in here; whatever ends one of them ends all.

    Args:
        launch: This process.
        secret: Of this job; None where the hosts share none.
        bound_s: Seconds in which all processes end after one is lost.
        report: Shows what happened to another process, from any thread, before this one ends.
        note: Shows what this process waits for, from any thread.
        verbose: Whether to write the output of C++ libraries to stderr at the end.

    Raises:
        PlacementError: No mesh has so many processes.
        PeerError: The processes do not come together, or differ.
    """
    if launch.count not in MESH_SIZES:
        sizes = ", ".join(map(str, MESH_SIZES[1:]))
        raise PlacementError(f"{launch.count} processes cannot share a mesh, possible are {sizes}")
    if launch.rank and not launch.is_by_hand:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers send it to all, rank 0 decides
    interrupts.be_abrupt()
    cluster = Cluster(launch, secret, bound_s=bound_s, report=report, note=note)
    try:
        cluster.join()
        yield cluster
    except BaseException as error:
        cluster.fail(error)
        raise
    else:
        cluster.finish()
    finally:
        if verbose and sys.stderr is not None:
            sys.stderr.write(cluster.noise())
