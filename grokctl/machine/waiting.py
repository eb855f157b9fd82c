"""Questions that may never be answered, asked in threads that nobody has to wait for."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_Answer = TypeVar("_Answer")


class Waiting(Generic[_Answer]):
    """A question that is being asked: a driver or a network disk may take it and never return.

    The thread dies with the process. What it raises is raised where the answer is asked for.
    """

    def __init__(self, ask: Callable[[], _Answer], *, timeout_s: float, otherwise: _Answer) -> None:
        """Begin to ask.

        Args:
            ask: Run in a thread.
            timeout_s: Seconds from now.
            otherwise: The answer if there is none by then.
        """
        self._otherwise = otherwise
        self._deadline = time.monotonic() + timeout_s
        self._answers: list[_Answer] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True)
        self._has_thread = True
        try:
            self._thread.start()
        except RuntimeError:  # no more threads are allowed: whoever asks has to wait
            self._has_thread = False
            self._run(ask)

    def _run(self, ask: Callable[[], _Answer]) -> None:
        try:
            self._answers.append(ask())
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that asked)
            self._errors.append(error)

    def wait(self, seconds: float) -> None:
        """Give it some time before something else is begun."""
        if self._has_thread:
            self._thread.join(max(0.0, min(seconds, self._deadline - time.monotonic())))

    def answer(self) -> _Answer:
        """What came back, waited for until its time is over."""
        self.wait(threading.TIMEOUT_MAX)
        if self._errors:
            raise self._errors[0]
        return self._answers[0] if self._answers else self._otherwise
