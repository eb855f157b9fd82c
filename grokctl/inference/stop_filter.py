"""Stop strings: text that ends a generation, however tokens cut it."""


class StopFilter:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(filter(None, stop))
        self._pending = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string."""
        if self.has_stopped:
            return ""
        self._pending += text
        # the stop string that is complete first, whatever the pieces of text
        matches = [
            (place + len(text), place, text)
            for text in self._stop
            if (place := self._pending.find(text)) >= 0
        ]
        if matches:
            _, place, self.found = min(matches)
            return self._pending[:place]
        keep = max(
            (
                length
                for text in self._stop
                for length in range(min(len(text) - 1, len(self._pending)), 0, -1)
                if self._pending.endswith(text[:length])
            ),
            default=0,
        )
        certain = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(certain) :]
        return certain

    def finish(self) -> str:
        """The text held back: no stop string follows."""
        return "" if self.has_stopped else self._pending
