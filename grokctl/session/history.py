"""What was typed before: a file of lines, private and bounded, that need not be writable."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

_MOST_LINES: Final = 1000
_MOST_BYTES: Final = 2**20
"""Of a file that is read; a longer one is cut to its last lines."""
_LONGEST_LINE: Final = 10_000
_MODE: Final = 0o600


class History:
    """Lines in a file; where it cannot be read or written, there are none, and nothing is said.

    Every line is written when it is typed, so that neither a crash nor a second terminal loses any.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[str]:
        """The last lines; a file that has grown to twice as many is cut to them."""
        try:
            if not self._path.is_file():
                return []
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _MOST_BYTES))
                if size > _MOST_BYTES:
                    file.readline()  # the rest of a line
                found = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return []
        good = [line for line in found if line.isprintable() and len(line) <= _LONGEST_LINE]
        kept = good[-_MOST_LINES:]
        if size > _MOST_BYTES or len(found) > 2 * _MOST_LINES:
            self._cut(kept)
        return kept

    def add(self, line: str) -> None:
        """Write a line at the end; one that was pasted with line ends becomes one line."""
        line = " ".join(line.split("\n"))
        if not line.strip() or not line.isprintable() or len(line) > _LONGEST_LINE:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._path, os.O_APPEND | os.O_NONBLOCK, [line])

    def _cut(self, lines: list[str]) -> None:
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            self._write(partial, os.O_TRUNC, lines)
            partial.replace(self._path)

    @staticmethod
    def _write(path: Path, flags: int, lines: list[str]) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | flags, _MODE)
        try:
            if stat.S_IMODE(os.fstat(file).st_mode) != _MODE:
                os.fchmod(file, _MODE)
            os.write(file, "".join(f"{line}\n" for line in lines).encode())
        finally:
            os.close(file)


def edit_lines(readline: Any, history: History, complete: Callable[[str, str], list[str]]) -> None:
    """Give `input` a history, and completions by Tab.

    Args:
        readline: The module, of either library.
        history: What to begin with.
        complete: Gives what may come for a line and its last word.
    """
    for line in history.read():
        readline.add_history(line)

    def completion(word: str, number: int) -> str | None:
        found = complete(readline.get_line_buffer(), word)
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completion)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
