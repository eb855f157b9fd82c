"""Output of C++ libraries, kept off our streams: Gloo writes to stdout, a dying JAX to stderr."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Noise:
    """Replaces the process's stderr by a file in memory; Python's own stderr stays as it was.

    Not by a pipe: no thread could read it while C++ code that holds the interpreter writes.
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
        """Take output to the process's stdout too; Python must not write to it in here.

        Only in here, because editing lines at a terminal needs the real stdout.
        """
        if self._stdout is not None:
            os.dup2(self._kept, 1)
        try:
            yield
        finally:
            self.be_heard()

    def be_heard(self) -> None:
        """Restore stdout, even inside of a quiet block."""
        if self._stdout is not None:
            os.dup2(self._stdout, 1)

    def text(self) -> str:
        """The end of the output."""
        size = os.fstat(self._kept).st_size
        return os.pread(self._kept, 2**20, max(0, size - 2**20)).decode(errors="replace")
