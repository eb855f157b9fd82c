"""The model on its devices, a step at a time: its parameters, its cache, and its programs."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.cluster.process_group import Cluster
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit
from grokctl.inference.chunks import Chunk, chunks, joined
from grokctl.inference.compilation import compiling
from grokctl.inference.compiled_steps import Head, Look, Programs, Step, Task, handed_over
from grokctl.inference.expert_loading import Loaded
from grokctl.inference.expert_stream import StreamCounts
from grokctl.inference.generation import PromptScores
from grokctl.inference.loading import Loader, out_of_memory
from grokctl.inference.step_logits import AdjustedRows, StepLogits
from grokctl.inference.streamed_steps import StreamedPrograms, sweep
from grokctl.model.bucketing import padded_batch, room
from grokctl.model.cache import Cache, LayerCache, empty_cache, stored_type
from grokctl.model.parameters import Layer
from grokctl.model.sizing import Terms
from grokctl.model.step_spec import StepShape

_Key = tuple[int, int, Head]
"""Sequences, tokens of each, and what the step computes."""
_Found = list[tuple[Chunk, Any]]
_HEADER: Final = 4
"""Numbers at the beginning of an order."""


class _Order(IntEnum):
    """What rank 0 of a cluster has the others do with it."""

    COMPILE = 0
    RUN = 1
    LARGEST = 2
    """Find the largest of the logits of the last step."""
    GATHER = 3
    """Gather the logits of the last step."""
    CLEAR = 4
    """Clear a slot."""
    COPY = 5
    """Copy a slot."""


class ModelRunner:
    """Runs tokens of sequences that are kept in slots of the cache. Not thread-safe.

    Args:
        loader: The loader of the parameters.
        loaded: The loaded parameters, and the way in for experts that are not.
        shape: Static facts.
        terms: Context, slots, and types of the cache.
        observe: Receives the steps that are being compiled.
        cluster: The processes whose devices these are, if there are several.
    """

    def __init__(
        self,
        loader: Loader,
        loaded: Loaded,
        shape: StepShape,
        terms: Terms,
        *,
        observe: Observer,
        cluster: Cluster | None = None,
    ) -> None:
        self.compile_s = 0.0
        self.stream = stream = loaded.stream
        self._cluster = cluster
        self.longest_chunk, self.past = room(terms.context, platform=shape.platform)
        """Most tokens of a chunk, and positions of a slot."""
        self._loader = loader
        self._parameters = loaded.parameters
        self.shape = shape
        self.slots = terms.slots
        self._cache_dtype = stored_type(jnp.dtype(terms.cache_dtype), platform=shape.platform)
        self._observe = observe
        self._programs = (
            Programs(loader, loaded.parameters, shape)
            if stream is None
            else StreamedPrograms(loader, loaded.parameters, shape, stream=stream)
        )
        self._steps: dict[_Key, Step] = {}
        self._compiled: set[Hashable] = set()
        with compiling(observe):
            self._cache = self._new_cache()
            self._none_read = self._programs.none_read()
        self._experts_read = 0
        self._logits: Any = None
        """Of the last step, on the devices."""

    def _new_cache(self) -> Cache:
        with out_of_memory():
            return empty_cache(
                self.shape.config,
                self.shape.mesh,
                slots=self.slots,
                past=self.past,
                dtype=self._cache_dtype,
                zeros=self._loader.zeros,
            )

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.shape.platform

    # --- steps

    def read(self, slot: int, tokens: Sequence[int], chunk: Chunk) -> None:
        """Run a chunk of a prompt, for its keys and values alone.

        Args:
            slot: The sequence's slot.
            tokens: The prompt.
            chunk: Which of its tokens.
        """
        self._read(slot, tokens, chunk, Head.NONE)

    def read_last(self, slot: int, tokens: Sequence[int], chunk: Chunk) -> StepLogits:
        """Run a chunk of a prompt; logits after its last token, `(1, vocab)`."""
        self._read(slot, tokens, chunk, Head.LAST)
        return self._step_logits(1)

    def read_every(self, slot: int, tokens: Sequence[int], chunk: Chunk) -> NDArray[np.float32]:
        """Run a chunk of a prompt; logits after each token, `(count, vocab)`."""
        found = self._read(slot, tokens, chunk, Head.EVERY)
        return joined((part, np.asarray(logits)[0]) for part, logits in found)

    def score(self, slot: int, tokens: Sequence[int], chunk: Chunk) -> PromptScores:
        """Run a chunk of a prompt, each of whose tokens has a next one; the scores of those."""
        found = self._read(slot, tokens, chunk, Head.SCORES)
        return PromptScores(
            start=chunk.start + 1,
            logprobs=joined((part, np.asarray(each.logprob)) for part, each in found),
            top_ids=joined((part, np.asarray(each.top_ids)) for part, each in found),
            top_logprobs=joined((part, np.asarray(each.top_logprobs)) for part, each in found),
        )

    def read_and_count(self, slot: int, tokens: Sequence[int], chunk: Chunk) -> NDArray[np.int64]:
        """Run a chunk of several tokens of a prompt; how many of them choose each expert.

        For one process: the others of a cluster would not run it.

        Args:
            slot: The sequence's slot.
            tokens: The prompt.
            chunk: Which of its tokens; none of them has run before.

        Returns:
            Counts, `(layers, experts)`.
        """
        assert self._cluster is None
        key = (1, chunk.padded, Head.NONE)
        counts: list[NDArray[np.intp]] = []
        self._step(key)
        self._cache = self._cache or self._new_cache()
        with self._compiling_once(("routes", *key), f"the routing of {chunk.padded} tokens"):
            program = self._programs.routes(self._cache, chunk.padded)

        def look(layer: Layer, cache: LayerCache, hidden: Any, task: Any) -> None:
            chosen = np.asarray(program(layer, cache, hidden, task))[: chunk.count]
            experts = self.shape.config.num_experts
            counts.append(np.bincount(chosen.ravel(), minlength=experts))

        task = self._task(slot, tokens, chunk)
        self._execute(key, task.packed(), task.targets_array(), look=look)
        return np.array(counts, np.int64)

    def decode(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> StepLogits:
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
        self._run((batch, 1, Head.LAST), task)
        return self._step_logits(count)

    def clear(self, slot: int) -> None:
        """Write zeros over the keys and values of a slot."""
        self._tell(_Order.CLEAR, (slot, 0, Head.NONE))
        self._clear(slot)

    def _clear(self, slot: int) -> None:
        self._rewrite("the clearing of a slot", lambda cache: self._programs.cleared(cache, slot))

    def copy(self, source: int, target: int) -> bool:
        """Write the keys and values of a slot over those of another; True, when that is done."""
        self._tell(_Order.COPY, (source, target, Head.NONE))
        self._copy(source, target)
        return True

    def _copy(self, source: int, target: int) -> None:
        programs = self._programs
        self._rewrite("the copy of a slot", lambda cache: programs.copied(cache, source, target))

    def _rewrite(self, what: str, write: Callable[[Cache], Cache]) -> None:
        """Change the cache, which is lost if that fails."""
        cache, self._cache = self._cache or self._new_cache(), ()
        with self._compiling_once(what, what), self._computing():
            self._cache = write(cache)

    def _step_logits(self, rows: int) -> StepLogits:
        return StepLogits(
            self,
            rows=rows,
            padded=padded_batch(rows),
            vocab_size=self.shape.config.vocab_size,
            is_on_device=self.shape.draws_on_device,
        )

    def _read(self, slot: int, tokens: Sequence[int], chunk: Chunk, head: Head) -> _Found:
        """Run a chunk of a prompt, or several; what the head of each computes."""
        parts = self._parts(chunk, head)
        tasks = [self._task(slot, tokens, part, own) for part, own in parts]
        if len(parts) == 1:
            return [(chunk, self._run((1, chunk.padded, head), tasks[0]))]
        steps = [self._step((1, part.padded, own)) for part, own in parts]
        given = [(task.packed(), task.targets_array()) for task in tasks]
        results = self._ran(
            lambda cache: sweep(steps, self._parameters, cache, given, self._none_read)
        )
        self._logits = results[-1] if head is Head.LAST else None
        return [(part, result) for (part, _), result in zip(parts, results, strict=True)]

    def _parts(self, chunk: Chunk, head: Head) -> list[tuple[Chunk, Head]]:
        """The chunks that run for one, each with its head; several where experts are streamed."""
        if chunk.padded <= self.longest_chunk:
            return [(chunk, head)]
        parts = chunks(chunk.start, chunk.end, longest=self.longest_chunk, past=self.past)
        others = Head.NONE if head is Head.LAST else head
        return [(part, head if part.end == chunk.end else others) for part in parts]

    def _task(self, slot: int, tokens: Sequence[int], chunk: Chunk, head: Head = Head.NONE) -> Task:
        """A chunk of a prompt, filled up with padding."""
        assert chunk.start + chunk.padded <= self.past  # else XLA writes over other tokens
        padding = [self.shape.config.pad_token] * (chunk.padded - chunk.count)
        targets = [*tokens[chunk.start + 1 : chunk.end + 1], *padding]
        return Task(
            tokens=[[*tokens[chunk.start : chunk.end], *padding]],
            slots=[slot],
            start=[chunk.start],
            count=chunk.count,
            select=[chunk.count - 1],
            targets=targets if head is Head.SCORES else (),
        )

    # --- programs

    def chunk_step(self, chunk: Chunk, head: Head) -> Step:
        """The compiled step of a chunk, or of the last of several; each compiled once."""
        return [self._step((1, part.padded, own)) for part, own in self._parts(chunk, head)][-1]

    def decode_step(self, sequences: int) -> Step:
        """The compiled step that decodes so many sequences; compiled once."""
        return self._step((padded_batch(sequences), 1, Head.LAST))

    def _step(self, key: _Key) -> Step:
        batch, length, head = key
        if key not in self._steps:
            self._tell(_Order.COMPILE, key)  # so that all processes compile at the same time
            what = "one token" if length == 1 else f"{length} tokens"
            detail = what if batch == 1 else f"{what} of {batch} sequences"
            with self._compiling_once(key, detail):
                self._cache = self._cache or self._new_cache()
                self._steps[key] = self._programs.step(
                    self._cache, self._none_read, batch=batch, time=length, head=head
                )
                if head is Head.LAST and self.shape.draws_on_device:
                    self._programs.largest(batch, 0)
                    self._compiled.add(("largest", batch, 0))
        return self._steps[key]

    @contextmanager
    def _compiling_once(self, key: Hashable, detail: str) -> Iterator[None]:
        """Report a compilation, and stop the clock meanwhile, the first time that a key comes."""
        if key in self._compiled:
            with out_of_memory():
                yield
            return
        started = time.perf_counter()
        self._observe(Started(stage=Stage.COMPILE, unit=Unit.NOTHING))
        self._observe(Advanced(stage=Stage.COMPILE, detail=detail))
        with out_of_memory(), compiling(self._observe):
            yield
        self._compiled.add(key)
        self._observe(Finished(stage=Stage.COMPILE))
        self.compile_s += time.perf_counter() - started

    def _run(self, key: _Key, task: Task) -> Any:
        self._step(key)
        packed, targets = task.packed(), task.targets_array()
        self._tell(_Order.RUN, key, packed, targets)
        return self._execute(key, packed, targets)

    def _execute(
        self,
        key: _Key,
        packed: NDArray[np.int32],
        targets: NDArray[np.int32],
        look: Look | None = None,
    ) -> Any:
        step, none = self._steps[key], self._none_read
        result = self._ran(
            lambda cache: step.run(self._parameters, cache, packed, targets, none, look=look)
        )
        self._logits = result if key[2] is Head.LAST else None
        return result

    def _ran(self, run: Callable[[Cache], tuple[Any, Cache, Any]]) -> Any:
        """What steps compute, given the cache, which is lost if they fail."""
        with out_of_memory(), self._computing():
            self._cache = self._cache or self._new_cache()
            try:
                result, self._cache, read = run(self._cache)
                here = sum(int(np.sum(np.asarray(part.data))) for part in read.addressable_shards)
                self._experts_read += here
            except BaseException:
                self._cache = ()  # it was given away
                raise
        return result

    def _computing(self) -> Any:
        return nullcontext() if self._cluster is None else self._cluster.computing()

    # --- logits of the last step

    def logits_on_host(self, batch: int) -> NDArray[np.float32]:
        """Bring the logits of the last step to the host, `(batch, vocab)`."""
        if self._loader.is_shared:
            self._tell(_Order.GATHER, (batch, 0, Head.LAST))
            return self._gather(batch)
        with out_of_memory(), self._computing():
            return np.asarray(self._logits)[:, 0]

    def _gather(self, batch: int) -> NDArray[np.float32]:
        with self._compiling_once(("gather", batch), "the gathering of logits"):
            program = self._programs.gather(batch)
        with out_of_memory(), self._computing():
            return np.asarray(program(self._logits))[:, 0]

    @property
    def candidates(self) -> int:
        """Largest logits of a row that each device lists."""
        return self._programs.candidates

    def largest_logits(self, rows: AdjustedRows) -> NDArray[np.int32]:
        """Find the largest logits of each row of the last step.

        Args:
            rows: Temperatures and adjustments of every row, padding included.

        Returns:
            What `model/candidates.largest` has found, `(devices, rows, columns)`.
        """
        batch, adjusted = rows.ids.shape
        self._tell(_Order.LARGEST, (batch, adjusted, Head.LAST), *rows.packed())
        return self._largest(rows)

    def _largest(self, rows: AdjustedRows) -> NDArray[np.int32]:
        key = ("largest", *rows.ids.shape)
        with self._compiling_once(key, f"the draw of {rows.ids.shape[0]} tokens"):
            program = self._programs.largest(*rows.ids.shape)
        given = [handed_over(array, self._programs.shared) for array in rows.arrays()]
        with out_of_memory(), self._computing():
            return np.asarray(program(self._logits, *given))

    # --- the other processes of a cluster

    def follow(self) -> None:
        """Run the steps of rank 0 until its last; on every other rank."""
        assert self._cluster is not None
        while (order := self._cluster.hear()) is not None:
            facts = np.frombuffer(order, np.int32)
            number, batch, length, head = map(int, facts[:_HEADER])
            self._obey(_Order(number), (batch, length, Head(head)), facts[_HEADER:])

    def _obey(self, order: _Order, key: _Key, facts: NDArray[np.int32]) -> None:
        batch, length, head = key
        match order:
            case _Order.COMPILE:
                self._step(key)
            case _Order.RUN:
                cut = len(facts) - (length if head is Head.SCORES else 0)
                packed, targets = facts[:cut].reshape(batch, -1), facts[cut:]
                self._step(key)
                self._execute(key, packed, targets.reshape(1, -1) if targets.size else targets)
            case _Order.LARGEST:
                self._largest(AdjustedRows.unpacked(facts, rows=batch))
            case _Order.GATHER:
                self._gather(batch)
            case _Order.CLEAR:
                self._clear(batch)
            case _Order.COPY:
                self._copy(batch, length)

    def _tell(self, order: _Order, key: _Key, *arrays: NDArray[np.int32]) -> None:
        """Have the other processes do the same."""
        if self._cluster is not None and self._cluster.rank == 0:
            header = np.array([order, *key], np.int32)
            self._cluster.tell(b"".join(array.tobytes() for array in (header, *arrays)))

    # --- measurements

    def clock(self) -> float:
        """Seconds; it stands still while something is compiled."""
        return time.perf_counter() - self.compile_s

    def experts_nbytes(self) -> int:
        """Bytes of experts read since the beginning, on all devices together.

        Assumes that other processes read as many as this one: over many tokens they do.
        """
        config, loader = self.shape.config, self._loader
        # every expert is on as many devices as the mesh has columns
        copies = config.num_layers * config.num_experts * self.shape.mesh.model
        local_copies = copies * len(loader.local) // len(loader.devices)
        return self._experts_read * loader.expert_nbytes // local_copies

    def streamed(self) -> StreamCounts:
        """What streaming experts came to since the beginning; zeros if all are in memory."""
        return StreamCounts() if self.stream is None else self.stream.counts

    def step_nbytes(self, experts_nbytes: int) -> int:
        """Bytes of all weights that a step read, given the bytes of experts."""
        return self._loader.nbytes - self._loader.expert_nbytes + experts_nbytes
