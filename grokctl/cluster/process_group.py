"""Several processes as one run: how they come together, agree, are told what to do, and end."""

import ctypes
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from threading import Event, Lock, Thread, Timer
from typing import Any, Final, NoReturn

import jax

from grokctl import __version__, interrupts
from grokctl.cluster import terminal
from grokctl.cluster.launcher import Launch
from grokctl.cluster.native_output import Noise
from grokctl.cluster.rendezvous import meet
from grokctl.errors import ExitCode, GrokctlError, PeerError, PlacementError
from grokctl.model.placement import MESH_SIZES

_SPARE_S: Final = 15
"""Of the seconds after which all have ended, those for what JAX takes longer than it is told where
not all processes come: 6 to 8."""
_LEAST_S: Final = 5
_PARTING_S: Final = 5
"""How long rank 0, through which all messages go, waits until the others have heard the last."""
_ECHO_S: Final = 0.2
"""And until they have heard that it knows."""
_PATIENCE_S: Final = 2
"""How long who finds a connection broken waits for the reason of the one at its other end."""
_SILENT_S: Final = 3
"""How long it waits for others before it says so."""
_WAIT_MS: Final = 1000
"""A wait for a message, after which Ctrl-C is heard."""
_LATE: Final = "DEADLINE_EXCEEDED"
_FULL: Final = "RESOURCE_EXHAUSTED"
"""What JAX calls a device whose memory is full, which is no other process's fault."""
_PAIR: Final = 2
"""Processes of which the other one is always the one that is missed."""
_KEPT: Final = 64
"""Orders that are not deleted yet: more than any process can be behind."""
_FAILED: Final = "grokctl/failed"
_DONE: Final = b"done"
_NO_HEAD: Final = "rank 0 was lost"
_LOST: Final = re.compile(r"stopped sending heartbeats\):\s*(?:/job:\S*?task:)?([0-9]+)")
"""How JAX names ranks that it lost, on stderr and nowhere else."""
_WHY: Final = re.compile(r"absl::Status: (.+)")
"""How it says everything else; behind that are addresses of functions."""

Report = Callable[[GrokctlError], None]
"""Says what ended a run."""
Note = Callable[[str], None]
"""Says what it waits for."""


class Cluster:
    """This process among those of a run; made by `joined`.

    Rank 0 decides and tells; the others do as they are told. What they tell each other goes through
    the key-value store of JAX's own coordination service, which rank 0 runs.
    """

    def __init__(self, launch: Launch, *, bound_s: int, report: Report, note: Note) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.count = launch.count
        self._bound_s = bound_s
        self._report = report
        self._note = note
        self._noise = Noise()
        self._modes = terminal.modes()
        self._is_over = Event()
        """Nothing that happens to other processes is a failure any more."""
        self._is_joined = False
        self._code: int = ExitCode.OK
        """What this process is about to end with, once that is known."""
        self._ending = Lock()
        self._orders = self._exchanges = 0
        self._client: Any = None
        self._aborted: Any = None

    @property
    def heartbeat_s(self) -> int:
        """Seconds without a sign of life after which a process is lost."""
        return max(_LEAST_S, self._bound_s // 2)

    def join(self) -> None:
        """Come together with the others.

        Raises:
            PeerError: Rank 0 cannot be reached, its port is taken, or others do not come. Where
                one is lost then, JAX ends the process, and it is said in words.
        """
        waited_for = "rank 0" if self.rank else f"{self.count - 1} more of {self.count} processes"
        note = f"waiting for {waited_for} at {self.launch.address} (at most {self._bound_s} s)"
        silence = Timer(_SILENT_S, self._note, (note,))
        silence.daemon = True
        silence.start()
        try:
            meet(self.launch, within_s=self._bound_s)
            self._initialize()
        finally:
            silence.cancel()
        from jax._src import distributed  # noqa: PLC0415 # there is no public way to its messages

        self._client = distributed.global_state.client
        self._is_joined = True
        Thread(target=self._watch, daemon=True).start()
        versions = {name: version(name) for name in ("jax", "jaxlib")}
        self.agree("program", {"grokctl": __version__, **versions}, within_s=self._bound_s)

    def _initialize(self) -> None:
        self._catch_abort()
        # it would take SIGTERM for a warning, and go on
        jax.config.update("jax_enable_preemption_service", False)
        try:
            # nothing is left to be detected: JAX would give each process one GPU
            jax.distributed.initialize(
                self.launch.address,
                self.count,
                self.rank,
                cluster_detection_method="deactivate",
                initialization_timeout=self._bound_s - _SPARE_S,
                heartbeat_timeout_seconds=self.heartbeat_s,
                shutdown_timeout_seconds=_LEAST_S,
            )
        except jax.errors.JaxRuntimeError as error:  # where it does not abort
            raise PeerError(self._last_words("")) from error

    # --- agreeing

    def agree(
        self, stage: str, facts: Mapping[str, object], *, within_s: float | None = None
    ) -> None:
        """Compare what should be the same everywhere.

        Args:
            stage: Which of a rank's things they are about; for notes about waiting, and for
                whoever looks into the store.
            facts: By their names, for people.
            within_s: Seconds in which everybody comes here; None where that may take as long as it
                takes, and only who dies is missed.

        Raises:
            PeerError: A rank has something else, or does not come.
        """
        told = self._exchange(stage, facts, within_s=within_s)
        for rank, theirs in enumerate(told):
            for name in told[0] | theirs:
                first, other = told[0].get(name), theirs.get(name)
                if first != other:
                    raise PeerError(f"{name}: rank 0 has {first}, rank {rank} has {other}")

    def everywhere(self, stage: str, *, it_is: bool) -> bool:
        """Whether something is so in all processes."""
        return all(told["it is"] for told in self._exchange(stage, {"it is": it_is}))

    def files(self, stage: str, sums: Mapping[str, str]) -> None:
        """Compare the sums of those files that more than one rank has.

        Raises:
            PeerError: Two files of a name are not the same.
        """
        seen: dict[str, tuple[int, str]] = {}
        for rank, theirs in enumerate(self._exchange(stage, sums)):
            for name, digest in theirs.items():
                first, known = seen.setdefault(name, (rank, digest))
                if known != digest:
                    raise PeerError(
                        f"{name}: rank {first} has sha256 {known[:16]}…, rank {rank} {digest[:16]}…"
                    )

    def _exchange(
        self, stage: str, facts: Mapping[str, object], *, within_s: float | None = None
    ) -> list[dict[str, Any]]:
        """What every rank says; all come here as often."""
        about = self._about(stage)
        with self._calling():
            self._client.key_value_set(f"{about}/{self.rank}", json.dumps(facts))
        until = None if within_s is None else time.monotonic() + within_s
        ranks = range(self.count)
        return [_read(self._get(f"{about}/{rank}", rank, stage, until), rank) for rank in ranks]

    def _about(self, stage: str) -> str:
        self._exchanges += 1
        return f"grokctl/{self._exchanges} {stage}"

    def share(self, stage: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
        """What rank 0 has, in every process; the others give None."""
        key = self._about(stage)
        if value is not None:
            with self._calling():
                self._client.key_value_set(key, json.dumps(value))
            return dict(value)
        return _read(self._get(key, 0, stage, None), 0)

    def _get(self, key: str, rank: int, stage: str, until: float | None) -> str:
        patience = time.monotonic() + _SILENT_S
        while True:
            try:
                with self._calling():
                    found: str = self._client.blocking_key_value_get(key, _WAIT_MS)
            except _LateError:
                now = time.monotonic()
                if until is not None and now > until:
                    raise PeerError(
                        f"rank {rank}: did not answer within {self._bound_s} s"
                    ) from None
                if now > patience:
                    self._note(f"waiting for rank {rank}: its {stage}")
                    patience = math.inf
            else:
                return found

    # --- orders

    def tell(self, order: bytes) -> None:
        """Have every other rank do something; of rank 0."""
        with self._calling():
            self._client.key_value_set_bytes(f"grokctl/order/{self._orders}", order)
            if self._orders >= _KEPT:
                self._client.key_value_delete(f"grokctl/order/{self._orders - _KEPT}")
        self._orders += 1

    def hear(self) -> bytes | None:
        """The next order of rank 0; None when all is done."""
        key = f"grokctl/order/{self._orders}"
        while True:
            try:
                with self._calling():
                    order: bytes = self._client.blocking_key_value_get_bytes(key, _WAIT_MS)
            except _LateError:
                continue
            self._orders += 1
            return None if order == _DONE else order

    def release(self) -> None:
        """Let the others know that there are no more orders; of rank 0."""
        self.tell(_DONE)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute together with the others in here.

        Raises:
            PeerError: One of them is gone.
        """
        with self._noise.quiet():
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if _FULL in str(error):
                    raise
                raise self._missed(error) from error

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Talk to the coordination service in here."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if _LATE in str(error):
                raise _LateError from error
            raise self._missed(error) from error

    def _missed(self, error: Exception) -> PeerError:
        """Who is gone, where a connection broke; whoever failed in words is heard first."""
        time.sleep(_PATIENCE_S)
        if self.count > _PAIR:  # JAX names who it was, and ends the process
            time.sleep(self.heartbeat_s)
            return PeerError(f"another process was lost: {_first_line(error)}")
        return PeerError(f"rank {1 - self.rank} was lost: {_first_line(error)}")

    # --- ending

    def finish(self) -> None:
        """End the run in every process: all is done."""
        self._ending.acquire()
        self._is_over.set()  # first: what is lost from now on spoils no result that was printed
        if self.rank == 0:
            self.release()
        self._part()

    def fail(self, error: BaseException) -> None:
        """End the run in every process: the others say what happened here."""
        if isinstance(error, BrokenPipeError) and self._is_joined and self.rank == 0:
            self.finish()  # whoever read our output has enough: no failure of anybody
            return
        self._ending.acquire()  # unless another thread is at it: it is said once
        self._code = error.exit_code if isinstance(error, GrokctlError) else ExitCode.BUG
        if isinstance(error, KeyboardInterrupt):
            self._code = ExitCode.INTERRUPTED
        self._is_over.set()
        if self._client is None or _NO_HEAD in str(error):
            return
        said = _first_line(error)
        if isinstance(error, KeyboardInterrupt):
            said = "was interrupted"
        elif isinstance(error, OSError):
            said = error.strerror or said
        elif not isinstance(error, GrokctlError):
            said = f"{type(error).__name__}: {said}"
        if not isinstance(error, PeerError) and not re.match("rank [0-9]+: ", said):
            said = f"rank {self.rank}: {said}"
        with suppress(jax.errors.JaxRuntimeError):  # who was first is heard
            self._client.key_value_set(_FAILED, said)
        self._part()

    def _part(self) -> None:
        """Be gone; rank 0 lets the others go first."""
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"grokctl/gone/{self.rank}", "")
            until = time.monotonic() + _PARTING_S
            for rank in range(self.count if self.rank == 0 else 0):
                left = max(1, int(1000 * (until - time.monotonic())))
                self._client.blocking_key_value_get(f"grokctl/gone/{rank}", left)
            if self.rank == 0:
                time.sleep(_ECHO_S)

    def _watch(self) -> None:
        """Hear in a thread of its own that another rank failed: this one may wait for it."""
        while not self._is_over.is_set():
            try:
                said = self._client.blocking_key_value_get(_FAILED, 10 * _WAIT_MS)
            except jax.errors.JaxRuntimeError as error:
                if _LATE in str(error):
                    continue
                time.sleep(_PATIENCE_S)
                said = _NO_HEAD
            if not self._is_over.is_set():
                self._end(said)

    def _end(self, said: str) -> NoReturn:
        """End this process from outside of what it does."""
        self._ending.acquire()  # for ever: it is said once
        self._code = PeerError.exit_code
        self._is_over.set()
        self._speak(said)
        if said != _NO_HEAD:
            self._part()
        interrupts.leave(PeerError.exit_code)

    def _speak(self, said: str) -> None:
        """Say what ends this process, whatever it does."""
        self._noise.be_heard()
        terminal.restore(self._modes)
        self._report(PeerError(said))

    def _catch_abort(self) -> None:
        """Say in a sentence why JAX ends the process, which it does from a thread of its own."""

        def aborted(_number: int) -> None:
            self._ending.acquire(timeout=_PARTING_S)  # who ends already may say why
            if self._is_over.is_set():
                interrupts.leave(self._code)
            self._speak(self._last_words(self._noise.text()))
            interrupts.leave(PeerError.exit_code)

        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # must live as long as we
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), self._aborted)

    def _last_words(self, text: str) -> str:
        """What JAX's stack trace is about."""
        if not self._is_joined:
            lost = f"rank {1 - self.rank}" if self.count == _PAIR else "another process"
            return f"{lost} was lost as soon as all had come to {self.launch.address}"
        named = _LOST.findall(text)
        if named:
            return f"rank {named[-1]} was lost: it stopped answering"
        if self.rank:
            return _NO_HEAD
        why = _WHY.findall(text)
        return f"JAX ended the process: {why[-1][:300] if why else 'it does not say why'}"

    def noise(self) -> str:
        """What C++ libraries wrote, for those who look for what is wrong."""
        return self._noise.text()


class _LateError(Exception):
    """Nobody has said anything yet."""


@contextmanager
def joined(
    launch: Launch, *, bound_s: int, report: Report, note: Note, verbose: bool
) -> Iterator[Cluster]:
    """Be one of the processes of a run in here; whatever ends it ends all of them.

    Args:
        launch: Who this process is.
        bound_s: Seconds in which all have ended where one is lost.
        report: Says what happened to others, from any thread, before the process ends.
        note: Says what it waits for, from any thread.
        verbose: Whether to write at the end what C++ libraries had to say.

    Raises:
        PlacementError: So many processes cannot share a mesh.
        PeerError: The processes do not come together, or are not about the same.
    """
    if launch.count not in MESH_SIZES:
        sizes = ", ".join(map(str, MESH_SIZES[1:]))
        raise PlacementError(f"{launch.count} processes cannot share a mesh, possible are {sizes}")
    if launch.rank and not launch.is_by_hand:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers send it to all, rank 0 decides
    interrupts.be_abrupt()
    cluster = Cluster(launch, bound_s=bound_s, report=report, note=note)
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


def _read(said: str, rank: int) -> dict[str, Any]:
    """What a rank said."""
    try:
        told = json.loads(said)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise PeerError(f"rank {rank}: said what is no object of JSON ({said[:40]!r})")
    return told


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
