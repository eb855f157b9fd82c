"""How a process of a run ends, and with it all the others."""

import ctypes
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any, Final, NoReturn

import jax

from grokctl import interrupts
from grokctl.cluster import terminal
from grokctl.cluster.exchange import PAIR, PATIENCE_S, WAIT_MS, first_line, is_late
from grokctl.cluster.launcher import Launch
from grokctl.cluster.native_output import Noise
from grokctl.errors import ExitCode, GrokctlError, PeerError

_PARTING_S: Final = 5
"""Seconds that rank 0, through which all messages go, waits until the others have read the last."""
_ECHO_S: Final = 0.2
"""Seconds until they have read that it knows."""
_FAILED: Final = "grokctl/failed"
_NO_HEAD: Final = "rank 0 was lost"
_LOST: Final = re.compile(r"stopped sending heartbeats\):\s*(?:/job:\S*?task:)?([0-9]+)")
"""How JAX names the ranks that it lost, on stderr and nowhere else."""
_WHY: Final = re.compile(r"absl::Status: (.+)")
"""How JAX begins every other reason; addresses of functions follow."""

Report = Callable[[GrokctlError], None]
"""Shows the error that ended a run."""


def _nothing() -> None:
    """Nobody is to be told."""


class Ending:
    """The end of this process. Whichever thread begins it first reports it; no other does.

    Args:
        launch: This process.
        report: Shows what happened to another process, from any thread.
    """

    def __init__(self, launch: Launch, *, report: Report) -> None:
        self.noise = Noise()
        self._launch = launch
        self._report = report
        self._modes = terminal.modes()
        self._has_begun = Lock()
        self._is_over = Event()
        """From here on, the loss of another process is no failure."""
        self._code: int = ExitCode.OK
        """The exit code, once it is known."""
        self._store: Any = None
        self._abort_handler: Any = None
        self.before_loss: Callable[[], object] = _nothing
        """Called, from any thread, before this process ends because another one has."""

    @property
    def is_joined(self) -> bool:
        """Whether all processes have met."""
        return self._store is not None

    def watch(self, store: Any) -> None:
        """From now on, end this process when another rank fails.

        Args:
            store: Client of JAX's coordination service.
        """
        self._store = store
        Thread(target=self._watch, daemon=True).start()

    def begin(self, code: int = ExitCode.OK) -> None:
        """Begin to end: what happens to other processes from now on spoils no printed result."""
        self._has_begun.acquire()  # never released: a second thread must not report
        self._code = code
        self._is_over.set()

    def fail(self, error: BaseException) -> None:
        """End the run in every process: the others report this error."""
        if isinstance(error.__cause__, RuntimeError) and self._store is not None:
            time.sleep(2 * PATIENCE_S)  # JAX may fail for want of a rank: the watch names that one
        code = error.exit_code if isinstance(error, GrokctlError) else ExitCode.BUG
        self.begin(ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else code)
        if self._store is None or _NO_HEAD in str(error):
            return
        with suppress(jax.errors.JaxRuntimeError):  # another rank failed before
            self._store.key_value_set(_FAILED, self._sentence(error))
        self.part()

    def _sentence(self, error: BaseException) -> str:
        """The error, for the other ranks to report."""
        sentence = first_line(error)
        if isinstance(error, KeyboardInterrupt):
            sentence = "was interrupted"
        elif isinstance(error, OSError):
            sentence = error.strerror or sentence
        elif not isinstance(error, GrokctlError):
            sentence = f"{type(error).__name__}: {sentence}"
        if isinstance(error, PeerError) or re.match("rank [0-9]+: ", sentence):
            return sentence
        return f"rank {self._launch.rank}: {sentence}"

    def part(self) -> None:
        """Leave the coordination service; rank 0, which runs it, leaves last."""
        with suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"grokctl/gone/{self._launch.rank}", "")
            if self._launch.rank:
                return
            until = time.monotonic() + _PARTING_S
            for rank in range(self._launch.count):
                left = max(1, int(1000 * (until - time.monotonic())))
                self._store.blocking_key_value_get(f"grokctl/gone/{rank}", left)
            time.sleep(_ECHO_S)

    def _watch(self) -> None:
        """Wait in a thread of its own for another rank's failure: this one may wait for that."""
        while not self._is_over.is_set():
            try:
                reason = self._store.blocking_key_value_get(_FAILED, 10 * WAIT_MS)
            except jax.errors.JaxRuntimeError as error:
                if is_late(error):
                    continue
                time.sleep(PATIENCE_S)
                reason = _NO_HEAD
            if not self._is_over.is_set():
                self._leave(reason)

    def lose(self, reason: str) -> None:
        """End this process from a thread that is not its own, because another rank is silent.

        JAX may still reach that rank, which then ends with the same reason.
        """
        if self._is_over.is_set():
            return
        self.begin(PeerError.exit_code)
        with suppress(jax.errors.JaxRuntimeError):  # another rank failed before
            self._store.key_value_set(_FAILED, f"rank {self._launch.rank}: {reason}")
        self._speak(reason)
        self.part()
        interrupts.leave(PeerError.exit_code)

    def _leave(self, reason: str) -> NoReturn:
        """End this process from a thread that is not its own."""
        self.begin(PeerError.exit_code)
        self._speak(reason)
        if reason != _NO_HEAD:
            self.part()
        interrupts.leave(PeerError.exit_code)

    def _speak(self, reason: str) -> None:
        """Report why this process ends, in the middle of whatever it does."""
        self.before_loss()
        self.noise.be_heard()
        terminal.restore(self._modes)
        self._report(PeerError(reason))

    def catch_abort(self) -> None:
        """Report in a sentence why JAX aborts the process, which it does from its own thread."""

        def aborted(_number: int) -> None:
            self._has_begun.acquire(timeout=_PARTING_S)  # another thread may be reporting
            if self._is_over.is_set():
                interrupts.leave(self._code)
            self._speak(self.last_words(self.noise.text()))
            interrupts.leave(PeerError.exit_code)

        # kept, because C calls it as long as the process lives
        self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), self._abort_handler)

    def last_words(self, text: str) -> str:
        """The reason in JAX's stack trace, as a sentence."""
        launch = self._launch
        if not self.is_joined:
            lost = f"rank {1 - launch.rank}" if launch.count == PAIR else "another process"
            return f"{lost} was lost as soon as all had come to {launch.address}"
        named = _LOST.findall(text)
        if named:
            return f"rank {named[-1]} was lost: it stopped answering"
        if launch.rank:
            return _NO_HEAD
        why = _WHY.findall(text)
        return f"JAX ended the process: {why[-1][:300] if why else 'it does not say why'}"
