"""Signs of life on the connections of orders, on which nothing else may come for hours."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Final

from grokctl.cluster.channel import Channel
from grokctl.errors import PeerError

BEAT: Final = b""
"""A message that is no order."""
_MOST_APART_S: Final = 5.0
_BEATS: Final = 9
"""Beats that may be lost."""


class Heartbeat:
    """The signs of life of both ends of a connection.

    They come from threads of their own, so that a process which loads or compiles for long, or
    waits for a person, is heard; and no firewall on the way forgets the connection.

    Args:
        channel: To another rank; nothing else receives from it.
        silent_s: Seconds without a message after which the other rank is lost.
        take: Gets every order, and at last the error of a broken connection or a false message.
        lose: Ends this process, because the other rank is silent; gets a sentence about it.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        silent_s: float,
        take: Callable[[bytes | OSError | PeerError], None],
        lose: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._silent_s = silent_s
        self._apart_s = min(_MOST_APART_S, silent_s / _BEATS)
        self._take = take
        self._lose = lose

    def start(self) -> None:
        """Begin to send and to receive."""
        for work in (self._send, self._receive):
            Thread(target=work, daemon=True).start()

    def _send(self) -> None:
        with suppress(OSError):  # the other thread notices
            while True:
                self._channel.send(BEAT)
                time.sleep(self._apart_s)

    def _receive(self) -> None:
        try:
            while (message := self._next()) is not None:
                if message != BEAT:
                    self._take(message)
        except (OSError, PeerError) as error:
            self._take(error)
            return
        whole = f"nothing came from it for {self._silent_s:.0f} s"
        self._take(TimeoutError(whole))
        self._lose(f"rank {self._channel.rank} was lost: {whole}")

    def _next(self) -> bytes | None:
        """The next message; None if the other rank is silent."""
        until = time.monotonic() + self._silent_s
        while True:
            with suppress(TimeoutError):
                # not all at once: what came while this thread could not run counts
                is_last = time.monotonic() > until
                return self._channel.receive(0 if is_last else self._apart_s)
            if is_last:
                return None
