"""What the processes of a run exchange: facts that must agree, and the orders of rank 0.

Facts go through the key-value store of JAX's coordination service, which rank 0 runs. Orders, which
carry prompts and sampled tokens, go from rank 0 to every other rank on a connection of their own.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import jax

from grokctl.cluster.heartbeat import Heartbeat
from grokctl.cluster.launcher import Launch
from grokctl.cluster.rendezvous import Note
from grokctl.errors import PeerError
from grokctl.system import machine_id

if TYPE_CHECKING:
    from grokctl.cluster.channel import Channel

PATIENCE_S: Final = 2
"""After a connection broke, seconds to wait for the other end's reason in words."""
WAIT_MS: Final = 1000
"""A wait for a message; Ctrl-C is noticed after it."""
PAIR: Final = 2
"""Processes of which each knows the other one's rank."""
_LEAST_S: Final = 5
_PART: Final = 0.75
"""Of the timeout: the rest is for the end."""
_SILENT_S: Final = 3
"""Seconds of waiting for another rank without a note."""
_LATE: Final = "DEADLINE_EXCEEDED"
_DONE: Final = b"done"


class Exchange:
    """Messages between the processes of a run.

    Args:
        launch: This process.
        bound_s: Seconds in which all processes end after one is lost.
        note: Shows what this process waits for, from any thread.
    """

    def __init__(self, launch: Launch, *, bound_s: int, note: Note) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.count = launch.count
        self._bound_s = bound_s
        self._note = note
        self._exchanges = 0
        self._orders: tuple[Channel, ...] = ()
        """On rank 0, the connections to all other ranks; elsewhere, the one to rank 0."""
        self._heard: SimpleQueue[bytes | OSError | PeerError] = SimpleQueue()
        """Orders, as they come, and at last the error that ended them."""
        self._store: Any = None
        """Client of JAX's coordination service; None before this process has joined."""

    @property
    def heartbeat_s(self) -> int:
        """Seconds without a sign of life after which a process counts as lost."""
        return max(_LEAST_S, self._bound_s // 2)

    @property
    def silent_s(self) -> float:
        """Seconds without a message on a connection of orders after which its rank is lost.

        More than those of `heartbeat_s`, because the threads of Python wait for each other.
        """
        return max(_LEAST_S, _PART * self._bound_s)

    # --- facts

    def agree(
        self, stage: str, facts: Mapping[str, object], *, within_s: float | None = None
    ) -> None:
        """Compare facts that must be the same in all processes.

        Args:
            stage: Names the facts in notes about waiting, and in the store.
            facts: Values by names for people.
            within_s: Seconds in which every process must come here; None waits as long as all
                processes live.

        Raises:
            PeerError: A rank has another value, or does not come.
        """
        everyones = self.everyones(stage, facts, within_s=within_s)
        for rank, theirs in enumerate(everyones):
            for name in everyones[0] | theirs:
                first, other = everyones[0].get(name), theirs.get(name)
                if first != other:
                    raise PeerError(f"{name}: rank 0 has {first}, rank {rank} has {other}")

    def everywhere(self, stage: str, *, it_is: bool) -> bool:
        """Whether a condition holds in all processes."""
        return all(facts["it is"] for facts in self.everyones(stage, {"it is": it_is}))

    def machines(self) -> int:
        """Number of machines that the processes run on."""
        return len({str(facts) for facts in self.everyones("machine", {"id": machine_id()})})

    def files(self, stage: str, sums: Mapping[str, str]) -> None:
        """Compare the sums of the files that more than one rank has.

        Raises:
            PeerError: Two files of the same name differ.
        """
        seen: dict[str, tuple[int, str]] = {}
        for rank, theirs in enumerate(self.everyones(stage, sums)):
            for name, digest in theirs.items():
                first, known = seen.setdefault(name, (rank, digest))
                if known != digest:
                    raise PeerError(
                        f"{name}: rank {first} has sha256 {known[:16]}…, rank {rank} {digest[:16]}…"
                    )

    def share(self, value: Mapping[str, Any] | None) -> dict[str, Any]:
        """Rank 0's value, in every process; the others give None."""
        if value is not None:
            self.tell(json.dumps(value).encode())
            return dict(value)
        return _parse((self.hear() or b"").decode(errors="replace"), 0)

    def everyones(
        self, stage: str, facts: Mapping[str, object], *, within_s: float | None = None
    ) -> list[dict[str, Any]]:
        """The facts of every rank, which may differ; every process calls this equally often.

        Args:
            stage: As for `agree`.
            facts: Of this rank.
            within_s: As for `agree`.

        Returns:
            By rank.

        Raises:
            PeerError: A rank does not come, or its facts are no JSON object.
        """
        prefix = self._next_key(stage)
        with self._calling():
            self._store.key_value_set(f"{prefix}/{self.rank}", json.dumps(facts))
        until = None if within_s is None else time.monotonic() + within_s
        ranks = range(self.count)
        return [_parse(self._get(f"{prefix}/{rank}", rank, stage, until), rank) for rank in ranks]

    def _next_key(self, stage: str) -> str:
        self._exchanges += 1
        return f"grokctl/{self._exchanges} {stage}"

    def _get(self, key: str, rank: int, stage: str, until: float | None) -> str:
        patience = time.monotonic() + _SILENT_S
        while True:
            try:
                with self._calling():
                    text: str = self._store.blocking_key_value_get(key, WAIT_MS)
            except _LateError:
                now = time.monotonic()
                if until is not None and now > until:
                    raise PeerError(
                        f"rank {rank}: did not answer within {self._bound_s} s"
                    ) from None
                if now > patience:
                    self._note(f"waiting for rank {rank}: its {stage}")
                    patience = math.inf
            else:
                return text

    # --- orders

    def tell(self, order: bytes) -> None:
        """Send every other rank an order; on rank 0."""
        for channel in self._orders:
            try:
                channel.send(order)
            except OSError as error:
                raise self._lost(error, channel.rank) from error

    def hear(self) -> bytes | None:
        """The next order of rank 0; None after the last."""
        (channel,) = self._orders
        order = self._heard.get()
        if isinstance(order, OSError):
            raise self._lost(order, channel.rank) from order
        if isinstance(order, PeerError):
            raise order
        return None if order == _DONE else order

    def keep_in_touch(self, lose: Callable[[str], None]) -> None:
        """From now on, send and expect signs of life on every connection of orders.

        Args:
            lose: Ends this process, because another rank is silent; gets a sentence about it.
        """
        for channel in self._orders:
            take = self._heard.put if self.rank else partial(_note_false, lose=lose)
            Heartbeat(channel, silent_s=self.silent_s, take=take, lose=lose).start()

    def release(self) -> None:
        """Send the other ranks the last order; on rank 0."""
        self.tell(_DONE)

    # --- failures

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Translate the errors of the coordination service."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if is_late(error):
                raise _LateError from error
            raise self._lost(error) from error

    def _lost(self, error: Exception, rank: int | None = None) -> PeerError:
        """The error after a connection broke; another rank's reason in words comes first."""
        time.sleep(PATIENCE_S)
        if rank is None and self.count == PAIR:
            rank = 1 - self.rank
        if self.count > PAIR:  # JAX names the rank, and ends the process
            time.sleep(self.heartbeat_s)
        lost = "another process" if rank is None else f"rank {rank}"
        return PeerError(f"{lost} was lost: {first_line(error)}")


def _note_false(message: bytes | OSError | PeerError, *, lose: Callable[[str], None]) -> None:
    """On rank 0, which gets no orders: a broken connection is noticed by the next order."""
    if not isinstance(message, OSError):
        lose(str(message) if isinstance(message, PeerError) else "another rank sent an order")


def is_late(error: Exception) -> bool:
    """Whether an error of JAX means that no message has come yet."""
    return _LATE in str(error)


def first_line(error: BaseException) -> str:
    """Of a message, as much as fits a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.partition("\n")[0][:300]


class _LateError(Exception):
    """No message has come yet."""


def _parse(text: str, rank: int) -> dict[str, Any]:
    """Parse a rank's facts."""
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise PeerError(f"rank {rank}: expected a JSON object, found {text[:40]!r}")
    return facts
