"""The modes of the terminal, given back as they were where a process is ended from outside."""

import os
import sys
import termios
from contextlib import suppress
from typing import Any


def modes() -> list[Any] | None:
    """Of the terminal that this process reads, if there is one."""
    try:
        return termios.tcgetattr(0)
    except (termios.error, OSError):
        return None


def restore(before: list[Any] | None) -> None:
    """Give it back as it was: who edits a line there has it without echo."""
    if before is None or before == modes():
        return
    with suppress(OSError):  # it is nobody's, as under a test
        if os.tcgetpgrp(0) != os.getpgrp():
            return  # somebody else changed it, and we would be stopped
    with suppress(termios.error):
        termios.tcsetattr(0, termios.TCSANOW, before)
    if sys.stderr is not None:
        sys.stderr.write("\n")
