"""Folders of grokctl's own in texts for people, by the names that the user knows."""

import re
from pathlib import Path

from grokctl.paths import quoted


class KnownPlaces:
    """What each of grokctl's own folders stands for."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def add(self, place: Path, shown: Path) -> None:
        """Name a folder as the user knows it; the last name counts.

        Args:
            place: A folder of grokctl's own.
            shown: What it stands for.
        """
        if place != shown:
            self._shown[str(place)] = str(shown)

    def named(self, text: str, *, is_command: bool = False) -> str:
        """A text with the folders that the user knows, quoted where they are part of a command.

        Args:
            text: A note, an error, or a hint.
            is_command: Whether all of it is a command.
        """
        for place, shown in self._shown.items():
            pattern = rf"(grokctl \w+ )?('?){re.escape(place)}(?![\w.-])((?:/[\w.+-]*\w)*)\2"

            def known(match: re.Match[str], shown: str = shown) -> str:
                path = shown + match[3]
                is_word = is_command or match[1] or match[2]
                return (match[1] or "") + (quoted(path) if is_word else path)

            text = re.sub(pattern, known, text)
        return text
