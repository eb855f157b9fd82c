"""Calls that may never return, in threads that need not be waited for."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_Answer = TypeVar("_Answer")


class Waiting(Generic[_Answer]):
    """A call in a thread of its own: a driver or a network disk may never return from it.

    The thread dies with the process. Its exception is raised by `answer`.
    """

    def __init__(self, call: Callable[[], _Answer], *, timeout_s: float, default: _Answer) -> None:
        """Begin the call.

        Args:
            call: Run in a thread.
            timeout_s: Seconds from now.
            default: The answer if the call has not returned by then.
        """
        self._default = default
        self._deadline = time.monotonic() + timeout_s
        self._answers: list[_Answer] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._has_thread = True
        try:
            self._thread.start()
        except RuntimeError:  # the limit of threads is reached: call it here, and wait
            self._has_thread = False
            self._run(call)

    def _run(self, call: Callable[[], _Answer]) -> None:
        try:
            self._answers.append(call())
        except BaseException as error:  # noqa: BLE001 (raised again by `answer`)
            self._errors.append(error)

    def wait(self, seconds: float) -> None:
        """Wait for the call, at most this long."""
        if self._has_thread:
            self._thread.join(max(0.0, min(seconds, self._deadline - time.monotonic())))

    def answer(self) -> _Answer:
        """The result of the call, or the default after the timeout."""
        self.wait(threading.TIMEOUT_MAX)
        if self._errors:
            raise self._errors[0]
        return self._answers[0] if self._answers else self._default
