"""The model on its devices, a step at a time: its parameters, its cache, and its programs."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.cluster.process_group import Cluster
from grokctl.errors import Reason, UsageError, corrupt
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.inference.compilation import compiling
from grokctl.inference.compiled_steps import Programs, Step, Task
from grokctl.inference.loading import Loader, out_of_memory
from grokctl.model.bucketing import SHORTEST_CHUNK, padded_batch, room
from grokctl.model.cache import Cache, empty_cache
from grokctl.model.parameters import Parameters
from grokctl.model.sizing import Terms
from grokctl.model.step_spec import StepShape

_Key = tuple[int, int, bool]
"""Sequences, tokens of each, and whether the step computes logits of all tokens."""
_KEY_LENGTH: Final = 3
_NOTHING: Final = np.empty(0, np.int32)


class ModelRunner:
    """Runs tokens of sequences that are kept in slots of the cache. Not thread-safe.

    Args:
        loader: The loader of the parameters.
        parameters: The loaded parameters.
        shape: Static facts.
        terms: Context, slots, and types of the cache.
        observe: Receives the steps that are being compiled.
        cluster: The processes whose devices these are, if there are several.
    """

    def __init__(
        self,
        loader: Loader,
        parameters: Parameters,
        shape: StepShape,
        terms: Terms,
        *,
        observe: Observer,
        cluster: Cluster | None = None,
    ) -> None:
        self.compile_s = 0.0
        self._cluster = cluster
        self.chunk, self._past = room(terms.context, platform=shape.platform)
        self._loader = loader
        self._parameters = parameters
        self._shape = shape
        self.slots = terms.slots
        self._cache_dtype = jnp.dtype(terms.cache_dtype)
        self._observe = observe
        self._programs = Programs(loader, parameters, shape)
        self._steps: dict[_Key, Step] = {}
        with compiling(observe):
            self._cache = self._new_cache()
            self._none_read = self._programs.none_read()
        self._experts_read = 0
        self._owner: object = None

    def _new_cache(self) -> Cache:
        with out_of_memory():
            return empty_cache(
                self._shape.config,
                self._shape.mesh,
                slots=self.slots,
                past=self._past,
                dtype=self._cache_dtype,
                zeros=self._loader.zeros,
            )

    def begin(self, owner: object) -> None:
        """Give the cache to an owner; the previous owner's entries are lost."""
        self._owner = owner

    def check(self, owner: object) -> None:
        """Refuse to go on after another owner began.

        Raises:
            UsageError: The cache has another owner.
        """
        if self._owner is not owner:
            raise UsageError("another generation began on this engine, so this one cannot go on")

    def prefill(
        self, slot: int, tokens: Sequence[int], start: int = 0, *, observe: Observer = ignore
    ) -> NDArray[np.float32]:
        """Run the tokens of one sequence, in chunks.

        Args:
            slot: The sequence's slot.
            tokens: At least one; with those before, no more than the context.
            start: Position of the first.
            observe: Receives progress in tokens.

        Returns:
            Logits after the last token, `(vocab,)`.
        """
        logits = np.empty(0, np.float32)
        observe(Started(stage=Stage.PREFILL, total=len(tokens), unit=Unit.TOKENS))
        for low in range(0, len(tokens), self.chunk):
            part = tokens[low : low + self.chunk]
            logits = self._chunk(slot, part, start + low, every=False)[0]
            observe(Advanced(stage=Stage.PREFILL, done=low + len(part)))
        observe(Finished(stage=Stage.PREFILL))
        return logits

    def score(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """Run at most a chunk of tokens in the first slot; logits after each, `(tokens, vocab)`."""
        return self._chunk(0, tokens, start, every=True)

    def decode(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run one token of each of some sequences.

        Args:
            slots: Slot of each sequence, all different.
            tokens: One id of each.
            positions: Position of each token in its sequence.

        Returns:
            Logits after each, `(sequences, vocab)`.
        """
        count = len(slots)
        batch = padded_batch(count)
        rows = [*range(count), *[0] * (batch - count)]  # padding repeats the first
        task = Task(
            tokens=[[tokens[row]] for row in rows],
            slots=[slots[row] for row in rows],
            start=[positions[row] for row in rows],
            count=count,
            select=[0] * batch,
        )
        return self._run((batch, 1, False), task)[:count, 0]

    def _chunk(
        self, slot: int, tokens: Sequence[int], start: int, *, every: bool
    ) -> NDArray[np.float32]:
        length = self.padded(len(tokens))
        padding = [self._shape.config.pad_token] * (length - len(tokens))
        task = Task(
            tokens=[[*tokens, *padding]],
            slots=[slot],
            start=[start],
            count=len(tokens),
            select=[len(tokens) - 1],
        )
        return self._run((1, length, every), task)[0, : len(tokens)]

    def padded(self, length: int) -> int:
        """Length of the padded chunk for `length` tokens."""
        if length == 1:
            return 1
        return min(self.chunk, max(SHORTEST_CHUNK, 1 << (length - 1).bit_length()))

    def step(self, batch: int, length: int, *, every: bool = False) -> Step:
        """The compiled step of a shape; compiled once."""
        key: _Key = (batch, length, every)
        if key not in self._steps:
            self._tell(key)  # so that all processes compile at the same time
            started = time.perf_counter()
            what = "one token" if length == 1 else f"{length} tokens"
            detail = what if batch == 1 else f"{what} of {batch} sequences"
            self._observe(Started(stage=Stage.COMPILE, unit=Unit.NOTHING))
            self._observe(Advanced(stage=Stage.COMPILE, detail=detail))
            with out_of_memory(), compiling(self._observe):
                self._steps[key] = self._programs.step(
                    self._cache, self._none_read, batch=batch, time=length, every=every
                )
            self._observe(Finished(stage=Stage.COMPILE))
            self.compile_s += time.perf_counter() - started
        return self._steps[key]

    def follow(self) -> None:
        """Run the steps of rank 0 until its last; on every other rank."""
        assert self._cluster is not None
        while (order := self._cluster.hear()) is not None:
            facts = np.frombuffer(order, np.int32)
            batch, length, every = map(int, facts[:_KEY_LENGTH])
            step = self.step(batch, length, every=bool(every))
            if len(facts) > _KEY_LENGTH:
                self._execute(step, facts[_KEY_LENGTH:].reshape(batch, -1))

    def _tell(self, key: _Key, packed: NDArray[np.int32] = _NOTHING) -> None:
        """Have the other processes compile a step, and run it if it comes with a task."""
        if self._cluster is not None and self._cluster.rank == 0:
            self._cluster.tell(np.array(key, np.int32).tobytes() + packed.tobytes())

    def _run(self, key: _Key, task: Task) -> NDArray[np.float32]:
        batch, length, every = key
        step, packed = self.step(batch, length, every=every), task.packed()
        self._tell(key, packed)
        return self._execute(step, packed)

    def _execute(self, step: Step, packed: NDArray[np.int32]) -> NDArray[np.float32]:
        computing = nullcontext() if self._cluster is None else self._cluster.computing()
        with out_of_memory(), computing:
            try:
                logits, self._cache, read = step.run(
                    self._parameters, self._cache, packed, self._none_read
                )
                values: NDArray[np.float32] = np.asarray(logits)
                here = sum(int(np.sum(np.asarray(part.data))) for part in read.addressable_shards)
                self._experts_read += here
            except KeyboardInterrupt:
                self._cache = self._new_cache()  # the old one was given away
                self._owner = None
                raise
        if not np.isfinite(values).all():
            raise corrupt(
                "logits",
                Reason.MALFORMED,
                "the model computed values that are not finite: a weight or a scale is not",
                "grokctl verify  # proves the files; grokctl inspect --stats shows values",
            )
        return values

    def clock(self) -> float:
        """Seconds; it stands still while something is compiled."""
        return time.perf_counter() - self.compile_s

    def experts_nbytes(self) -> int:
        """Bytes of experts read since the beginning, on all devices together.

        Assumes that other processes read as many as this one: over many tokens they do.
        """
        config, loader = self._shape.config, self._loader
        # every expert is on as many devices as the mesh has columns
        copies = config.num_layers * config.num_experts * self._shape.mesh.model
        local_copies = copies * len(loader.local) // len(loader.devices)
        return self._experts_read * loader.expert_nbytes // local_copies

    def step_nbytes(self, experts_nbytes: int) -> int:
        """Bytes of all weights that a step read, given the bytes of experts."""
        return self._loader.nbytes - self._loader.expert_nbytes + experts_nbytes
