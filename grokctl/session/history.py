"""The history of typed lines: a private file of bounded size; failures to use it are ignored."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from grokctl.own_files import ForeignFileError, why_not_own
from grokctl.ownership import is_own, links_on
from grokctl.paths import create_beside

_MOST_LINES: Final = 1000
_MOST_BYTES: Final = 2**20
"""Bytes read of the file; a longer one is cut to its last lines."""
_LONGEST_LINE: Final = 10_000
_MODE: Final = 0o600


class History:
    """Lines in a file; empty where it cannot be read.

    Each line is appended when it is entered, so neither a crash nor a second terminal loses any.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[str]:
        """The last lines; a file with twice as many is cut to them."""
        try:
            if not self._path.is_file():
                return []
            with os.fdopen(self._open(os.O_RDONLY), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _MOST_BYTES))
                if size > _MOST_BYTES:
                    file.readline()  # the rest of a line
                lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return []
        valid = [line for line in lines if line.isprintable() and len(line) <= _LONGEST_LINE]
        last = valid[-_MOST_LINES:]
        if size > _MOST_BYTES or len(lines) > 2 * _MOST_LINES:
            self._cut(last)
        return last

    def add(self, line: str) -> None:
        """Append a line; line ends in a pasted text become spaces."""
        line = " ".join(line.split("\n"))
        if not line.strip() or not line.isprintable() or len(line) > _LONGEST_LINE:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._open(os.O_WRONLY | os.O_CREAT | os.O_APPEND), [line])

    def _open(self, flags: int) -> int:
        """Open it, unless it is no file, is another user's or has another name.

        A guess could plant it, and who reads a pipe would read the lines.

        Raises:
            OSError: It is, or it cannot be opened.
        """
        if not all(is_own(link) for _, link in links_on(self._path)):
            raise ForeignFileError("is another user's link", self._path)
        handle = os.open(self._path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, _MODE)
        status = os.fstat(handle)
        is_regular = stat.S_ISREG(status.st_mode)
        problem = why_not_own(status) if is_regular else "is not a regular file"
        if problem is None:
            return handle
        os.close(handle)
        raise ForeignFileError(problem, self._path)

    def _cut(self, lines: list[str]) -> None:
        with suppress(OSError):
            place = self._path.resolve()  # the history may be a link
            file, partial = create_beside(place, _MODE)
            try:
                self._write(file, lines)
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)

    @staticmethod
    def _write(file: int, lines: list[str]) -> None:
        try:
            status = os.fstat(file)
            if stat.S_IMODE(status.st_mode) != _MODE:
                with suppress(OSError):  # some file systems have no modes
                    os.fchmod(file, _MODE)
            os.write(file, "".join(f"{line}\n" for line in lines).encode())
        finally:
            os.close(file)


def edit_lines(readline: Any, history: History, complete: Callable[[str, str], list[str]]) -> None:
    """Give `input` a history, and completion by Tab.

    Args:
        readline: The module, built with GNU readline or libedit.
        history: Of earlier sessions.
        complete: Returns the completions for a line and its last word.
    """
    for line in history.read():
        readline.add_history(line)

    def completion(word: str, number: int) -> str | None:
        words = complete(readline.get_line_buffer(), word)
        return words[number] if number < len(words) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completion)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
