"""The experts of a run that memory does not hold: some stay, the others pass through buffers."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from grokctl.checkpoint.ready import ReadyCheckpoint
from grokctl.events import Advanced, Finished, Observer, Stage, Started
from grokctl.inference.expert_buffers import Buffer, Part
from grokctl.inference.expert_reader import ExpertReader, Reading
from grokctl.model.parameters import Experts
from grokctl.planning.residence import Residence
from grokctl.text import format_bytes, format_rate, format_seconds

_Key = tuple[int, int]
"""Layer and number of an expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCounts:
    """What streaming came to, since the beginning."""

    experts_chosen: int = 0
    """Experts that steps chose, once for each step and layer."""
    experts_missed: int = 0
    """Of these, experts that were not pinned."""
    disk_bytes: int = 0
    """Bytes of these."""
    waited_s: float = 0.0
    """Seconds in which nothing was computed because an expert was not there yet."""

    def __sub__(self, before: "StreamCounts") -> "StreamCounts":
        return StreamCounts(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )

    @property
    def hit_rate(self) -> float | None:
        """Share of the chosen experts that were in memory; None before any was chosen."""
        return 1 - self.experts_missed / self.experts_chosen if self.experts_chosen else None


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """The device file that experts come from."""

    source: ReadyCheckpoint
    """A checkpoint of one device."""
    reader: ExpertReader
    parts: Callable[[int, int], Sequence[Part]]
    """Where the file has the arrays of an expert, by layer and number."""
    experts_of: Callable[[Buffer, Sequence[Part]], Experts]
    """The arrays of one expert, which lie in a buffer: they show whatever is there."""

    def ask(self, buffer: Buffer, parts: Sequence[Part]) -> Reading:
        """Begin to read parts into a buffer."""
        buffer.spoil(parts)
        return self.reader.ask(buffer.windows(parts))

    def wait(self, reading: Reading) -> None:
        """Wait for what was asked for.

        Raises:
            CorruptCheckpointError: The file is too short.
            HardwareError: The disk fails, or sends nothing.
        """
        with self.source.blaming(0):
            reading.wait()


@dataclass(slots=True)
class _Passing:
    """An expert on its way through a buffer."""

    buffer: Buffer
    reading: Reading


class ExpertStream:
    """Hands steps the experts that they chose, in the order that waits least.

    Args:
        file: Has the experts.
        residence: Which of them stay.
        pinned: Those.
        buffers: For the others.
        load_rate: Bytes a second at which the disk gave what stays.
        observe: Receives progress within a step.
    """

    def __init__(
        self,
        file: ExpertFile,
        residence: Residence,
        *,
        pinned: Mapping[_Key, Experts],
        buffers: Sequence[Buffer],
        load_rate: float,
        observe: Observer,
    ) -> None:
        self.residence = residence
        self.load_rate = load_rate
        self.counts = StreamCounts()
        self.file = file
        """Where experts come from."""
        self._pinned = pinned
        self._free = list(buffers)
        self._passing: dict[_Key, _Passing] = {}
        self._cancelled: list[_Passing] = []
        self._observe = observe
        self._since: StreamCounts | None = None
        """What streaming had come to when the step began that is reported."""
        self._detail = ""
        self.example = file.experts_of(buffers[0], file.parts(0, 0))
        """Some expert, of which only shapes and types matter: all are alike."""

    @property
    def is_direct(self) -> bool:
        """Whether files are read past the page cache."""
        return self.file.reader.is_direct

    @property
    def pages(self) -> str:
        """Where experts are, in a few words."""
        residence = self.residence
        pinned = f"{residence.pinned:,} of {residence.experts:,} experts in memory"
        if residence.counts is not None:
            pinned += " (those that counted texts chose most)"
        how = "past the page cache" if self.is_direct else "by way of the page cache"
        return f"{pinned}, the others read from the disk {how}"

    @property
    def words(self) -> str:
        """Where experts are, and what a token takes, in a line before the first one."""
        missed, rate = self.residence.missed, self.load_rate
        seconds = format_seconds(self.residence.seconds(read_rate=rate, decode_rate=None))
        first = format_seconds(self.residence.swept / rate)
        return (
            f"{self.pages}: about {format_bytes(int(missed))} and {seconds} a token, "
            f"{first} for a prompt, at {format_rate(rate)} (estimate)"
        )

    def experts(
        self, layer: int, chosen: Sequence[int], *, are_next_certain: bool
    ) -> Iterator[tuple[int, Experts]]:
        """Every chosen expert of a layer with its number, each once.

        Those that arrived come first, because that frees their buffers; then those that stay, while
        others are read. An expert may be used until the next one is asked for: then it must have
        been.

        Args:
            layer: The layer.
            chosen: Numbers of experts, all different.
            are_next_certain: Whether the next layer will choose all its experts, so that reading
                need not wait for its router.

        Raises:
            CorruptCheckpointError: The file became shorter.
            HardwareError: The disk fails, or sends nothing.
        """
        staying = deque(number for number in chosen if (layer, number) in self._pinned)
        missing = [number for number in chosen if (layer, number) not in self._pinned]
        self._count(experts_chosen=len(chosen), experts_missed=len(missing))
        for key in [key for key in self._passing if key[0] != layer or key[1] not in missing]:
            self._cancel(key)  # it seemed certain
        wanted = [(layer, number) for number in missing]
        if are_next_certain and layer + 1 < self.residence.config.num_layers:
            following = range(self.residence.config.num_experts)
            wanted += [(layer + 1, n) for n in following if (layer + 1, n) not in self._pinned]
        to_ask = deque(key for key in wanted if key not in self._passing)
        while staying or missing:
            self._ask(to_ask)
            arrived = [n for n in missing if self._has_arrived((layer, n))]
            if not arrived and staying:
                number = staying.popleft()
                yield number, self._pinned[layer, number]
                continue
            number = arrived[0] if arrived else self._first(layer, missing, to_ask)
            yield number, self._arrived((layer, number))
            missing.remove(number)
            self._free.append(self._passing.pop((layer, number)).buffer)
        self._ask(to_ask)
        self._end_layer(layer)

    def abandon(self) -> None:
        """Cancel whatever is being read: the step that asked for it has failed."""
        for key in list(self._passing):
            self._cancel(key)

    @contextmanager
    def reporting(self, tokens: int) -> Iterator[None]:
        """Report the progress of a step of so many tokens, if nothing else is to be seen of it.

        That is a prompt, and the first step of all.
        """
        if tokens == 1 and self.counts.experts_chosen:
            yield
            return
        self._since, self._detail = self.counts, ""
        self._observe(Started(stage=Stage.STREAM, total=self.residence.read(tokens)))
        try:
            yield
        finally:
            self._since = None
        self._observe(Finished(stage=Stage.STREAM))

    def _report(self) -> None:
        """Report what has come, within `reporting`."""
        if self._since is not None:
            done = self.counts.disk_bytes - self._since.disk_bytes
            self._observe(Advanced(stage=Stage.STREAM, done=done, detail=self._detail))

    def _end_layer(self, layer: int) -> None:
        """Report a layer, within `reporting`."""
        if self._since is not None:
            hit = (self.counts - self._since).hit_rate or 0
            layers = self.residence.config.num_layers
            self._detail = f"layer {layer + 1} of {layers}, {hit:.0%} of experts in memory"
            self._report()

    def _count(self, **more: float) -> None:
        now: dict[str, Any] = {name: getattr(self.counts, name) + more[name] for name in more}
        self.counts = replace(self.counts, **now)

    # --- buffers

    def _ask(self, keys: deque[_Key]) -> None:
        """Begin to read experts, as far as there are buffers."""
        for passing in [each for each in self._cancelled if each.reading.has_ended]:
            self._cancelled.remove(passing)
            self._free.append(passing.buffer)
        while self._free and keys:
            key = keys.popleft()
            buffer = self._free.pop()
            reading = self.file.ask(buffer, self.file.parts(*key))
            self._passing[key] = _Passing(buffer, reading)

    def _first(self, layer: int, missing: Sequence[int], to_ask: deque[_Key]) -> int:
        """The missing expert to wait for; one that was asked for."""
        while not (asked := [n for n in missing if (layer, n) in self._passing]):
            with self._waiting():  # all buffers are those of a step that was interrupted
                self._cancelled[0].reading.wait_end()
            self._ask(to_ask)
        return asked[0]

    def _has_arrived(self, key: _Key) -> bool:
        return key in self._passing and self._passing[key].reading.has_ended

    def _arrived(self, key: _Key) -> Experts:
        """The arrays of an expert, once all of it is there."""
        passing, parts = self._passing[key], self.file.parts(*key)
        with self._waiting():
            self.file.wait(passing.reading)
        self._count(disk_bytes=sum(part.nbytes for part in parts))
        self._report()
        return self.file.experts_of(passing.buffer, parts)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._count(waited_s=time.perf_counter() - began)

    def _cancel(self, key: _Key) -> None:
        passing = self._passing.pop(key)
        passing.reading.cancel()
        self._cancelled.append(passing)
