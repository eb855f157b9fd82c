"""Ctrl-C and SIGTERM end every command, soon, with exit code 130."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, NoReturn

from grokctl.errors import ExitCode

_PATIENCE_S: Final = 4.5
"""Seconds that a command has to end by itself; saving resume data takes up to 3."""
_AGAIN_S: Final = 0.05


_arrived: Final = threading.Event()


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
    sys.unraisablehook = _again(sys.unraisablehook)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def leave() -> NoReturn:
    """End an interrupted process without the clean-up in which XLA's threads crash."""
    flush()
    os._exit(ExitCode.INTERRUPTED)


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


def _watch(reader: int) -> None:
    while (number := os.read(reader, 1)) and number[0] not in {signal.SIGINT, signal.SIGTERM}:
        pass
    threading.Event().wait(_PATIENCE_S)
    os.write(2, b"interrupted\n")
    leave()
