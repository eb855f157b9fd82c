"""Many prompts on one model: whoever ends makes room for the next at once."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit
from grokctl.inference.generation import BatchStats, Generation
from grokctl.inference.model_runner import ModelRunner
from grokctl.inference.sequence import Sequence


@dataclass(slots=True, eq=False)
class _Stream:
    """A sequence in its slot of the cache."""

    index: int
    sequence: Sequence
    slot: int
    read: int = 0
    """Tokens of its prompt that were run."""
    since: float = 0.0
    """When its first token was there."""

    @property
    def generation(self) -> Generation:
        return self.sequence.generation


class Batch:
    """Continuous batching; iterate over it once, then read the statistics.

    Every turn runs a chunk of the prompts that are next, where slots are free for them, and one
    token of every sequence whose prompt was read: neither a long prompt nor a long answer holds the
    others.

    Args:
        runner: Runs the model, and has the slots.
        sequences: What is to be done.
        stats: Of all together; filled in while it goes on.
        observe: Receives progress in prompts.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sequences: list[Sequence],
        *,
        stats: BatchStats,
        observe: Observer,
    ) -> None:
        self.stats = stats
        self._runner = runner
        self._waiting = deque(enumerate(sequences))
        self._free = list(reversed(range(runner.streams)))
        self._reading: _Stream | None = None
        self._running: list[_Stream] = []
        self._observe = observe

    def __iter__(self) -> Iterator[tuple[int, Generation]]:
        """Numbers of prompts and what they came to, as each one ends."""
        done = 0
        self._observe(Started(stage=Stage.DECODE, total=len(self._waiting), unit=Unit.PROMPTS))
        if not (self._reading or self._running):
            self._runner.begin(self)
        while self._waiting or self._reading or self._running:
            self._runner.check(self)
            begun, compiled = self._runner.clock(), self._runner.compile_s
            ended = [*self._read(), *self._step()]
            self.stats.seconds += self._runner.clock() - begun
            self.stats.compile_s += self._runner.compile_s - compiled
            done += len(ended)
            self._observe(Advanced(stage=Stage.DECODE, done=done, detail=self._detail()))
            for stream in ended:
                if (read := stream.generation.stats.first_token_s) > 0:
                    stream.generation.stats.prefill_tokens_per_s = stream.read / read
                self.stats.prompt_tokens += stream.generation.prompt_tokens
                self.stats.prefilled += stream.read
                self.stats.tokens += len(stream.generation.ids)
                yield stream.index, stream.generation
        self._observe(Finished(stage=Stage.DECODE))

    def _detail(self) -> str:
        return f"{len(self._running)} running, {self.stats.decode_tokens_per_s:.1f} tokens/s"

    def _read(self) -> list[_Stream]:
        """Run prompts that are next, as many tokens as a chunk has; who ended with that."""
        ended, left = [], self._runner.chunk
        while left > 0:
            if self._reading is None and self._waiting and self._free:
                self._reading = _Stream(*self._waiting.popleft(), self._free.pop())
            stream = self._reading
            if stream is None:
                break
            begun = self._runner.clock()
            left -= self._read_on(stream)
            spent = self._runner.clock() - begun
            self.stats.prefill_s += spent
            stream.generation.stats.first_token_s += spent
            if stream.sequence.is_over:
                self._reading = None
                self._free.append(stream.slot)
                ended.append(stream)
            elif stream.sequence.sampled:
                self._reading, stream.since = None, self._runner.clock()
                self._running.append(stream)
        return ended

    def _read_on(self, stream: _Stream) -> int:
        """Run a chunk of a prompt, and choose a token after the last; how many tokens that were."""
        sequence = stream.sequence
        if sequence.limit == 0:
            sequence.finish()
            return 0
        part = sequence.request.prompt[stream.read : stream.read + self._runner.chunk]
        logits = self._runner.prefill(stream.slot, part, stream.read)
        stream.read += len(part)
        if stream.read == stream.generation.prompt_tokens:
            sequence.take(logits)
        return len(part)

    def _step(self) -> list[_Stream]:
        """Run one token of every sequence that is under way; who ended with it."""
        running = self._running
        if not running:
            return []
        begun, read = self._runner.clock(), self._runner.experts_nbytes()
        logits = self._runner.decode(
            [stream.slot for stream in running],
            [stream.sequence.last for stream in running],
            [stream.sequence.position for stream in running],
        )
        for stream, row in zip(running, logits, strict=True):
            stream.sequence.take(row)
        now = self._runner.clock()
        self.stats.decode_s += now - begun
        self.stats.steps += 1
        self.stats.decoded += len(running)
        self.stats.bytes_read += self._runner.step_nbytes(self._runner.experts_nbytes() - read)
        ended = [stream for stream in running if stream.sequence.is_over]
        self._running = [stream for stream in running if not stream.sequence.is_over]
        for stream in ended:
            self._free.append(stream.slot)
            made = stream.sequence.sampled - 1
            stream.generation.stats.decode_tokens_per_s = made / (now - stream.since)
        return ended
