"""What C++ libraries print, kept off our streams: Gloo writes to stdout, a dying JAX to stderr."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Noise:
    """Takes the place of the process's stderr; Python's own goes on to where it went.

    In memory and not through a pipe: nobody reads while C++ code that holds the interpreter writes.
    """

    def __init__(self) -> None:
        self._kept = os.memfd_create("noise")
        try:
            self._stdout: int | None = os.dup(1)
        except OSError:  # it is closed
            self._stdout = None
        if sys.stderr is not None:
            before = sys.stderr
            before.flush()
            sys.stderr = self._own(before)
            os.dup2(self._kept, 2)
            for handler in logging.getLogger().handlers:  # set up by -v before
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    handler.setStream(sys.stderr)

    @staticmethod
    def _own(stream: TextIO) -> TextIO:
        """The same stream by another descriptor."""
        return os.fdopen(os.dup(2), "w", 1, encoding=stream.encoding, errors="replace")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Take what is written to the process's stdout, too; nobody else may write in here.

        Not for ever, because whoever edits lines at a terminal needs it.
        """
        if self._stdout is not None:
            os.dup2(self._kept, 1)
        try:
            yield
        finally:
            self.be_heard()

    def be_heard(self) -> None:
        """Let stdout be what it was, whoever is in a quiet block."""
        if self._stdout is not None:
            os.dup2(self._stdout, 1)

    def text(self) -> str:
        """The end of all that came."""
        size = os.fstat(self._kept).st_size
        return os.pread(self._kept, 2**20, max(0, size - 2**20)).decode(errors="replace")
