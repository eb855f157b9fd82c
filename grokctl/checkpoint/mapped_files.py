"""Map files to read them; a file that is cut meanwhile ends the process with a sentence.

A read beyond the end of a mapped file is a signal, SIGBUS, in whatever thread and library it
happens, and nothing can go on after it. Python's own handlers run too late: the read comes first.
"""

import ctypes
import mmap
import os
import signal
import weakref
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Final

from grokctl.errors import ExitCode
from grokctl.paths import quoted
from grokctl.text import harmless, to_copy

_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int)
_mapped: Final[dict[int, tuple[Path, int, str, str]]] = {}
"""Files that are mapped now, their sizes when they were, and how a terminal may show both them and
the command that looks at them: it is too late to think of that when a signal has come."""
_numbers: Final = count()


def map_to_read(handle: int, path: Path) -> mmap.mmap:
    """Map a whole file.

    Args:
        handle: Its descriptor, which may be closed afterwards.
        path: Of the file, for the sentence.

    Raises:
        ValueError: It is empty.
        OSError: Its file system has no mappings.
    """
    memory = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    number = next(_numbers)
    hint = to_copy(f"grokctl verify {quoted(path.parent)}")
    _mapped[number] = path, len(memory), harmless(str(path)), hint
    weakref.finalize(memory, _mapped.pop, number, None)
    catch_bus_errors()
    return memory


def _end(_signal: int) -> None:
    """Say which file is shorter than it was, and end the process."""
    for path, nbytes, shown, hint in list(_mapped.values()):
        try:
            size = path.stat().st_size
        except OSError:
            continue
        if size < nbytes:
            message = f"{shown}: expected {nbytes:,} bytes, found {size:,}: it was cut while in use"
            _write(f"error: {message}\nhint: {hint}\n")
            os._exit(ExitCode.CORRUPT)
    _write("error: this machine: bus error: memory or a disk fails\nhint: dmesg | tail\n")
    os._exit(ExitCode.HARDWARE)


def _write(text: str) -> None:
    os.write(2, text.encode(errors="replace"))


_end_in_c: Callable[[int], None] = _HANDLER(_end)
"""Kept here: the C library has nothing but its address."""


@cache
def catch_bus_errors() -> None:
    """Let the C library name the file that was cut, unless something else handles the signal."""
    if signal.getsignal(signal.SIGBUS) is signal.SIG_DFL:
        library = ctypes.CDLL(None)
        library.signal.restype = ctypes.c_void_p
        library.signal(int(signal.SIGBUS), _end_in_c)
