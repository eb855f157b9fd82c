"""Ctrl-C and SIGTERM end every command, soon, with exit code 130."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from grokctl.errors import ExitCode

_PATIENCE_S: Final = 4.5
"""Seconds that a command has to end by itself; saving resume data takes up to 3."""
_AGAIN_S: Final = 0.05
_NUDGE: Final = signal.SIGURG
"""Does nothing, but ends a system call that began just after the interrupt: readline's are such."""


_arrived: Final = threading.Event()
_abrupt: Final = threading.Event()


def has_arrived() -> bool:
    """Whether a signal came: C code may turn the interrupt it raised into a `SystemError`."""
    return _arrived.is_set()


def install() -> None:
    """Turn SIGINT and SIGTERM into `KeyboardInterrupt`, and see to it that it is obeyed.

    Python delivers signals between two bytecodes, so a long call into XLA is deaf to them, and
    an interrupt raised in a callback that may not raise is printed and forgotten. Hence a watchdog
    thread that ends the process when the command does not, and a hook that tries again.
    """
    signal.signal(signal.SIGTERM, _raise)
    signal.signal(signal.SIGINT, _raise)
    signal.signal(_NUDGE, _do_nothing)
    sys.unraisablehook = _again(sys.unraisablehook)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watchdog.watch, args=(reader,), daemon=True).start()


class Asked:
    """Whether Ctrl-C asked a block to end."""

    def __init__(self) -> None:
        self.to_end = False


@contextmanager
def deferred() -> Iterator[Asked]:
    """Let a first Ctrl-C only ask the block to end, which may take its time; a second one ends it.

    An interrupt between any two bytecodes would tear up what is under way on the devices. SIGTERM
    and the second Ctrl-C raise `KeyboardInterrupt` as ever. The block's end forgets what was asked.
    """
    asked = Asked()

    def ask(number: int, frame: object) -> None:
        if asked.to_end:
            _raise(number, frame)
        asked.to_end = True

    _watchdog.spare(1)
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    except BaseException:
        _watchdog.spare(0)
        raise
    finally:
        signal.signal(signal.SIGINT, before)  # what is pending still asks, before it changes
    _watchdog.forget()


def forgive() -> None:
    """Go on after a `KeyboardInterrupt` that has done all it should.

    Raises:
        KeyboardInterrupt: It was SIGTERM's, after which nothing goes on.
    """
    if not _watchdog.forget():
        raise KeyboardInterrupt
    _arrived.clear()


def leave(code: int = ExitCode.INTERRUPTED) -> NoReturn:
    """End a process without the clean-up, in which XLA's threads crash or wait for others."""
    flush()
    os._exit(code)


def is_abrupt() -> bool:
    """Whether this process must end like that, however it ends."""
    return _abrupt.is_set()


def be_abrupt() -> None:
    """End like that from now on: JAX would wait for other processes, which may be gone."""
    _abrupt.set()


def flush() -> None:
    """Write out what is buffered; where nobody can read it, forget it without a word."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _raise(number: int, frame: object) -> None:
    del number, frame
    _arrived.set()
    raise KeyboardInterrupt


def _do_nothing(number: int, frame: object) -> None:
    del number, frame


def _again(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    def unraisable(event: Any) -> None:
        if event.exc_type is KeyboardInterrupt:
            # not from here, where it would be forgotten once more
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            hook(event)

    return unraisable


class _Watchdog:
    """Ends a process that was told to end and does not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: int | None = None
        self._spared = 0
        self._seen = 0
        self._is_final = False
        self._due: float | None = None

    def watch(self, reader: int) -> None:
        """Read the numbers of signals as they come, and wait for what comes of them."""
        self._reader, main = reader, threading.main_thread().ident or 0
        while True:
            wait = None if self._due is None else _AGAIN_S
            readable, _, _ = select.select([reader], [], [], wait)
            with self._lock:
                self._read()
                if self._due is None:
                    continue
                if time.monotonic() >= self._due:
                    break
            if not readable:  # what it read may be the last nudge
                signal.pthread_kill(main, _NUDGE)
        os.write(2, b"interrupted\n")
        leave()

    def spare(self, count: int) -> None:
        """Take this many Ctrl-C for no order to end."""
        with self._lock:
            self._spared = count

    def forget(self) -> bool:
        """Forget every Ctrl-C until now, also those not yet read; false if there was a SIGTERM."""
        with self._lock:
            self._read()
            if not self._is_final:
                self._due = None
            self._seen = self._spared = 0
            return not self._is_final

    def _read(self) -> None:
        if self._reader is None:
            return
        try:
            numbers = os.read(self._reader, 4096)
        except BlockingIOError:
            return
        self._seen += numbers.count(signal.SIGINT)
        self._is_final |= signal.SIGTERM in numbers
        if self._due is None and (self._is_final or self._seen > self._spared):
            self._due = time.monotonic() + _PATIENCE_S


_watchdog: Final = _Watchdog()
