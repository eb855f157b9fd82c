"""End every command soon after Ctrl-C or SIGTERM, with exit code 130."""

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
"""Seconds that a command has to end by itself. Saving resume data takes up to 3."""
_AGAIN_S: Final = 0.05
_NUDGE: Final = signal.SIGURG
"""Has no effect but to end a blocked system call, such as one that readline began just after the
interrupt."""


_arrived: Final = threading.Event()
_abrupt: Final = threading.Event()


def has_arrived() -> bool:
    """Whether a signal arrived. C code may turn the `KeyboardInterrupt` into a `SystemError`."""
    return _arrived.is_set()


def install() -> None:
    """Turn SIGINT and SIGTERM into `KeyboardInterrupt`, and make sure that the process ends.

    Python delivers signals between two bytecodes, so a long call into XLA blocks them. An
    interrupt raised in a callback that must not raise is printed and dropped. Hence a watchdog
    thread that ends the process if the command does not, and a hook that raises again.
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


class StopRequest:
    """Whether Ctrl-C has requested that a block ends."""

    def __init__(self) -> None:
        self.is_made = False


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C into a request that the block ends, in its own time.

    An interrupt between any two bytecodes would break off work on the devices. SIGTERM and a
    second Ctrl-C raise `KeyboardInterrupt` as usual. The end of the block drops the request.
    """
    stop = StopRequest()

    def request(number: int, frame: object) -> None:
        if stop.is_made:
            _raise(number, frame)
        stop.is_made = True

    _watchdog.spare(1)
    before = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    except BaseException:
        _watchdog.spare(0)
        raise
    finally:
        signal.signal(signal.SIGINT, before)  # a pending Ctrl-C is delivered before this
    _watchdog.forget()


@contextmanager
def handled(act: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call a function in this block, which ends the process in its own time.

    Nothing ends it for want of an end, as elsewhere: the function has to, for signal after signal.
    """

    def handle(number: int, frame: object) -> None:
        del number, frame
        act()

    with _watchdog.asleep():
        before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def forgive() -> None:
    """Continue after a `KeyboardInterrupt` that was handled.

    Raises:
        KeyboardInterrupt: SIGTERM caused it, which always ends the process.
    """
    if not _watchdog.forget():
        raise KeyboardInterrupt
    _arrived.clear()


def leave(code: int = ExitCode.INTERRUPTED) -> NoReturn:
    """End the process without cleanup, in which XLA's threads crash or wait for others."""
    flush()
    os._exit(code)


def is_abrupt() -> bool:
    """Whether this process must always end with `leave`."""
    return _abrupt.is_set()


def be_abrupt() -> None:
    """Always end with `leave` from now on: JAX would wait for processes that may be gone."""
    _abrupt.set()


def flush() -> None:
    """Flush stdout and stderr; drop silently what nobody can read."""
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
            # from a timer: raised here it would be dropped again
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            hook(event)

    return unraisable


class _Watchdog:
    """Ends the process if it does not end by itself after a signal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: int | None = None
        self._spared = 0
        self._seen = 0
        self._is_final = False
        self._due: float | None = None
        self._is_asleep = False

    def watch(self, reader: int) -> None:
        """Read the numbers of arriving signals, and wait for the process to end."""
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
            if not readable:  # else the byte may be that of the last nudge
                signal.pthread_kill(main, _NUDGE)
        os.write(2, b"interrupted\n")
        leave()

    def spare(self, count: int) -> None:
        """Let this many Ctrl-C pass without ending the process."""
        with self._lock:
            self._spared = count

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Let all signals pass that arrive in this block."""
        self._fall_asleep(it_does=True)
        try:
            yield
        finally:
            self._fall_asleep(it_does=False)

    def _fall_asleep(self, *, it_does: bool) -> None:
        with self._lock:
            self._read()
            self._is_asleep = it_does

    def forget(self) -> bool:
        """Drop every Ctrl-C until now, unread ones included; False after a SIGTERM."""
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
        if self._is_asleep:
            return
        self._seen += numbers.count(signal.SIGINT)
        self._is_final |= signal.SIGTERM in numbers
        if self._due is None and (self._is_final or self._seen > self._spared):
            self._due = time.monotonic() + _PATIENCE_S


_watchdog: Final = _Watchdog()
