"""The modes of the terminal, restored when a process is ended from outside."""

import os
import sys
import termios
from contextlib import suppress
from typing import Any


def modes() -> list[Any] | None:
    """Modes of the terminal that this process reads, if it reads one."""
    try:
        return termios.tcgetattr(0)
    except (termios.error, OSError):
        return None


def restore(before: list[Any] | None) -> None:
    """Restore modes: while a line is edited, the terminal does not echo."""
    if before is None or before == modes():
        return
    with suppress(OSError):  # no process owns the terminal, as under a test
        if os.tcgetpgrp(0) != os.getpgrp():
            return  # another process changed it, and the kernel would stop this one
    with suppress(termios.error):
        termios.tcsetattr(0, termios.TCSANOW, before)
    if sys.stderr is not None:
        sys.stderr.write("\n")
