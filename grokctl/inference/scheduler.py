"""Many prompts on one model: a sequence that ends makes room for the next at once."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit
from grokctl.inference.generation import BatchStats, Generation
from grokctl.inference.model_runner import ModelRunner
from grokctl.inference.sequence import Sequence


@dataclass(slots=True, eq=False)
class _Active:
    """A sequence in its slot of the cache."""

    index: int
    sequence: Sequence
    slot: int
    read: int = 0
    """Tokens of its prompt that have run."""
    since: float = 0.0
    """Time of its first token."""

    @property
    def generation(self) -> Generation:
        return self.sequence.generation


class Batch:
    """Continuous batching; iterate over it once, then read the statistics.

    Every turn runs a chunk of the prompts that are next, where slots are free for them, and one
    token of every sequence whose prompt was read: neither a long prompt nor a long answer holds the
    others up.

    Args:
        runner: Runs the model, and has the slots.
        sequences: The prompts to continue.
        stats: Filled in as sequences run.
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
        self._free = list(reversed(range(runner.slots)))
        self._reading: _Active | None = None
        self._running: list[_Active] = []
        self._observe = observe

    def __iter__(self) -> Iterator[tuple[int, Generation]]:
        """Index and generation of each prompt, as it ends."""
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
            for active in ended:
                if (read := active.generation.stats.first_token_s) > 0:
                    active.generation.stats.prefill_tokens_per_s = active.read / read
                self.stats.prompt_tokens += active.generation.prompt_tokens
                self.stats.prefilled += active.read
                self.stats.tokens += len(active.generation.ids)
                yield active.index, active.generation
        self._observe(Finished(stage=Stage.DECODE))

    def _detail(self) -> str:
        return f"{len(self._running)} running, {self.stats.decode_tokens_per_s:.1f} tokens/s"

    def _read(self) -> list[_Active]:
        """Run at most a chunk of tokens of waiting prompts; sequences that ended with that."""
        ended, left = [], self._runner.chunk
        while left > 0:
            if self._reading is None and self._waiting and self._free:
                self._reading = _Active(*self._waiting.popleft(), self._free.pop())
            active = self._reading
            if active is None:
                break
            begun = self._runner.clock()
            left -= self._read_on(active)
            spent = self._runner.clock() - begun
            self.stats.prefill_s += spent
            active.generation.stats.first_token_s += spent
            if active.sequence.is_over:
                self._reading = None
                self._free.append(active.slot)
                ended.append(active)
            elif active.sequence.sampled:
                self._reading, active.since = None, self._runner.clock()
                self._running.append(active)
        return ended

    def _read_on(self, active: _Active) -> int:
        """Run a chunk of a prompt, and choose a token after its last; number of tokens run."""
        sequence = active.sequence
        if sequence.limit == 0:
            sequence.finish()
            return 0
        part = sequence.request.prompt[active.read : active.read + self._runner.chunk]
        logits = self._runner.prefill(active.slot, part, active.read)
        active.read += len(part)
        if active.read == active.generation.prompt_tokens:
            sequence.take(logits)
        return len(part)

    def _step(self) -> list[_Active]:
        """Run one token of every running sequence; sequences that ended with it."""
        running = self._running
        if not running:
            return []
        begun, read = self._runner.clock(), self._runner.experts_nbytes()
        logits = self._runner.decode(
            [active.slot for active in running],
            [active.sequence.last for active in running],
            [active.sequence.position for active in running],
        )
        for active, row in zip(running, logits, strict=True):
            active.sequence.take(row)
        now = self._runner.clock()
        self.stats.decode_s += now - begun
        self.stats.steps += 1
        self.stats.decoded += len(running)
        self.stats.bytes_read += self._runner.step_nbytes(self._runner.experts_nbytes() - read)
        ended = [active for active in running if active.sequence.is_over]
        self._running = [active for active in running if not active.sequence.is_over]
        for active in ended:
            self._free.append(active.slot)
            made = active.sequence.sampled - 1
            active.generation.stats.decode_tokens_per_s = made / (now - active.since)
        return ended
