"""Compiled programs of a step: the embedding, a few layers at a time, and a head."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from grokctl.inference.loading import Loader
from grokctl.model import candidates, forward, scores
from grokctl.model.axes import MODEL_AXIS
from grokctl.model.bucketing import layers_together
from grokctl.model.cache import Cache, LayerCache, Positions
from grokctl.model.parameters import Layer, Parameters
from grokctl.model.step_spec import StepShape

EVERYWHERE = PartitionSpec()
_SPLIT = PartitionSpec(None, None, MODEL_AXIS)
_CANDIDATES: Final = 1024
"""Largest logits that all devices list together: 95% of the probability are hardly ever in more."""
_FEWEST_CANDIDATES: Final = 128
_FOR_EACH_SHARD = PartitionSpec(MODEL_AXIS)
_FACTS: Final = 4
"""Columns of a packed task before the tokens: slot, start, select, count."""


class Head(IntEnum):
    """What a step computes from the last layer's output."""

    NONE = 0
    """Nothing: only the cache is extended."""
    LAST = 1
    """The logits after one token of each sequence, left on the devices."""
    EVERY = 2
    """The logits after every token, for the host."""
    SCORES = 3
    """The log-probabilities of given tokens, and of the likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Tokens to run: the next ones of some sequences."""

    tokens: Sequence[Sequence[int]]
    """As many of each sequence, padding included."""
    slots: Sequence[int]
    """Slot of each sequence."""
    start: Sequence[int]
    """Position of each sequence's first token."""
    count: int
    """Tokens without padding."""
    select: Sequence[int]
    """Token of each sequence for `Head.LAST`."""
    targets: Sequence[int] = ()
    """As many as tokens: the one after each, for `Head.SCORES` of one sequence."""

    def packed(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The task as one array: every array that is handed over takes time."""
        facts = zip(self.slots, self.start, self.select, self.tokens, strict=True)
        rows = [(slot, start, chosen, self.count, *ids) for slot, start, chosen, ids in facts]
        return np.array(rows, np.int32)

    def targets_array(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The targets as `Step.run` takes them: `(1, time)`, or `(0,)` without any."""
        return np.array([self.targets] if self.targets else [], np.int32)


def positions_of(task: Int[Array, "batch columns"]) -> Positions:
    """Of the tokens of a packed task."""
    return Positions(slots=task[:, 0], start=task[:, 1], count=task[0, 3])


def count_of(task: jax.Array) -> int:
    """Tokens of a packed task, without padding."""
    return int(np.asarray(task)[0, 3])


Look = Callable[[Layer, LayerCache, jax.Array, jax.Array], None]
"""Sees a layer, its part of the cache, its input and the task before the layer runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of one shape, compiled."""

    embed: Any
    layers: tuple[Any, ...]
    """The same program many times, unless layers are stored differently."""
    head: Any
    """None for `Head.NONE`."""
    together: int
    """Layers in a program."""
    shared: NamedSharding
    one_at_a_time: bool
    """Whether each program must end before the next begins: sums over virtual CPU devices need a
    thread of each device, and programs that run together can block each other for ever."""

    def run(
        self,
        parameters: Parameters,
        cache: Cache,
        packed: np.ndarray[Any, np.dtype[np.int32]],
        targets: np.ndarray[Any, np.dtype[np.int32]],
        read: jax.Array,
        *,
        look: Look | None = None,
    ) -> tuple[Any, Cache, jax.Array]:
        """Run a task.

        Args:
            parameters: The parameters that the step was compiled for.
            cache: Given away.
            packed: A packed task of the shape that the step was compiled for.
            targets: Of the task, `(1, time)`, for `Head.SCORES`; `(0,)` for others.
            read: Number of experts that each device has read; this step's are added.
            look: Called for every layer, where each is a program of its own.

        Returns:
            What the head computes, the extended cache, and experts read.
        """
        task = handed_over(packed, self.shared)
        hidden = self._ended(self.embed(parameters.embedding, task))
        hidden, cache, read = self._run_layers(
            parameters.layers, cache, read, hidden, task, look=look
        )
        result = None
        if self.head is not None:
            given = [handed_over(targets, self.shared)] if targets.size else [task]
            result = self.head(parameters.embedding, parameters.final_norm, hidden, *given)
        return result, cache, read

    def _run_layers(
        self,
        layers: tuple[Layer, ...],
        cache: Cache,
        read: jax.Array,
        hidden: jax.Array,
        task: jax.Array,
        *,
        look: Look | None = None,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Run all layers; what comes out, the extended cache, and experts read."""
        extended: list[LayerCache] = []
        for number, program in enumerate(self.layers):
            part = slice(number * self.together, (number + 1) * self.together)
            if look is not None:
                assert self.together == 1
                look(layers[number], cache[number], hidden, task)
            hidden, longer, read = program(layers[part], cache[part], read, hidden, task)
            extended += longer
            self._ended(hidden)
        return hidden, tuple(extended), read

    def _ended(self, hidden: jax.Array) -> jax.Array:
        return hidden.block_until_ready() if self.one_at_a_time else hidden


def handed_over(array: np.ndarray[Any, Any], shared: NamedSharding) -> jax.Array:
    """An array of the host on every device: `device_put` would compare it between processes."""
    return jax.make_array_from_callback(array.shape, shared, lambda part: array[part])


@dataclass(frozen=True, slots=True)
class Programs:
    """Compiles steps over loaded parameters.

    A program has one layer, and is called until all have run: a program of all layers takes many
    times as long to compile (docs/adr/0009), and is made only where accelerators decode
    (docs/adr/0013). No program is compiled twice.
    """

    loader: Loader
    parameters: Parameters
    shape: StepShape
    _compiled: dict[Hashable, Any] = field(default_factory=dict)

    def step(self, cache: Cache, read: jax.Array, *, batch: int, time: int, head: Head) -> Step:
        """A step of a shape."""
        together = layers_together(self.shape.platform, batch=batch, time=time)
        layers = self.parameters.layers
        starts = range(0, len(layers), together)
        return Step(
            embed=self._embed(batch, time),
            layers=tuple(
                self._layers(
                    (layers[low : low + together], cache[low : low + together], read), batch, time
                )
                for low in starts
            ),
            head=self._head(head, batch, time),
            together=together,
            shared=self.shared,
            one_at_a_time=self.loader.devices[0].platform == "cpu" and self.shape.mesh.size > 1,
        )

    def none_read(self) -> jax.Array:
        """The count of experts read, at 0."""
        return self.loader.zeros((), jnp.dtype(jnp.int32))

    def _embed(self, batch: int, time: int) -> Any:
        def embed(embedding: jax.Array, task: jax.Array) -> jax.Array:
            return forward.embed(embedding[0], task[:, _FACTS:], shape=self.shape)

        per_device = (self.parameters.embedding,)
        return self._program("embed", embed, per_device, [self._task(batch, time)], EVERYWHERE)

    def _layers(
        self, per_device: tuple[tuple[Layer, ...], Cache, jax.Array], batch: int, time: int
    ) -> Any:
        def run(
            layers: tuple[Layer, ...],
            cache: Cache,
            read: jax.Array,
            hidden: jax.Array,
            task: jax.Array,
        ) -> tuple[jax.Array, Cache, jax.Array]:
            layers = jax.tree.map(lambda leaf: leaf[0], layers)
            hidden, cache, read_now = forward.decoder_layers(
                layers, cache, hidden, positions_of(task), shape=self.shape
            )
            return hidden, cache, read + read_now

        outputs = (EVERYWHERE, self.loader.per_device, self.loader.per_device)
        arguments = [self._hidden(batch, time), self._task(batch, time)]
        return self._program("layers", run, per_device, arguments, outputs, donate=1)

    def routes(self, cache: Cache, time: int) -> Any:
        """The program that finds the experts that tokens of a sequence choose in a layer.

        It is called with a layer and its part of the cache, which stays as it is.
        """

        def chosen(
            layer: Layer, cache: LayerCache, hidden: jax.Array, task: jax.Array
        ) -> jax.Array:
            layer = jax.tree.map(lambda leaf: leaf[0], layer)
            positions = positions_of(task)
            return forward.chosen_experts(layer, cache, hidden, positions, shape=self.shape)

        per_device = (self.parameters.layers[0], cache[0])
        arguments = [self._hidden(1, time), self._task(1, time)]
        return self._program("routes", chosen, per_device, arguments, EVERYWHERE)

    def _head(self, kind: Head, batch: int, time: int) -> Any:
        shape, is_shared = self.shape, self.loader.is_shared

        def last(
            embedding: jax.Array, final_norm: jax.Array, hidden: jax.Array, task: jax.Array
        ) -> jax.Array:
            return forward.head(embedding[0], final_norm[0], hidden, task[:, 2], shape=shape)

        def every(
            embedding: jax.Array, final_norm: jax.Array, hidden: jax.Array, task: jax.Array
        ) -> jax.Array:
            del task
            logits = forward.head(embedding[0], final_norm[0], hidden, None, shape=shape)
            return _gathered(logits) if is_shared else logits

        def scored(
            embedding: jax.Array, final_norm: jax.Array, hidden: jax.Array, targets: jax.Array
        ) -> scores.Scores:
            return scores.scores(embedding[0], final_norm[0], hidden, targets, shape=shape)

        if kind is Head.NONE:
            return None
        function, outputs = {
            Head.LAST: (last, _SPLIT),
            Head.EVERY: (every, EVERYWHERE if is_shared else _SPLIT),
            Head.SCORES: (scored, EVERYWHERE),
        }[kind]
        given = self._targets(time) if kind is Head.SCORES else self._task(batch, time)
        per_device = (self.parameters.embedding, self.parameters.final_norm)
        arguments = [self._hidden(batch, time), given]
        return self._program(f"head {kind}", function, per_device, arguments, outputs)

    def largest(self, batch: int, adjusted: int) -> Any:
        """The program that finds each row's largest logits: see `model/candidates`.

        Args:
            batch: Rows.
            adjusted: Logits of each row that are changed before.
        """

        def largest(
            logits: jax.Array, temperatures: jax.Array, ids: jax.Array, values: jax.Array
        ) -> jax.Array:
            found = candidates.largest(
                logits[:, 0], temperatures, ids, values, count=self.candidates
            )
            if self.loader.is_shared:  # a process sees only its own devices' part
                return jnp.asarray(jax.lax.all_gather(found, MODEL_AXIS))
            return found[None]

        arguments = [
            self._logits(batch),
            self._struct((batch,), jnp.float32),
            self._struct((batch, adjusted), jnp.int32),
            self._struct((batch, adjusted), jnp.float32),
        ]
        outputs = EVERYWHERE if self.loader.is_shared else _FOR_EACH_SHARD
        return self._program("largest", largest, (), arguments, outputs)

    def cleared(self, cache: Cache, slot: int) -> Cache:
        """The cache, which is given away, with zeros in one slot.

        Values that are not finite would spoil later sequences there: a weight of 0 does not hide
        them.
        """
        return self._rewritten(
            "cleared", lambda leaf, slots: leaf.at[:, slots[0]].set(0), cache, slot
        )

    def copied(self, cache: Cache, source: int, target: int) -> Cache:
        """The cache, which is given away, with one slot written over another."""

        def copy(leaf: jax.Array, slots: jax.Array) -> jax.Array:
            return leaf.at[:, slots[1]].set(leaf[:, slots[0]])

        return self._rewritten("copied", copy, cache, source, target)

    def _rewritten(
        self,
        name: str,
        write: Callable[[jax.Array, jax.Array], jax.Array],
        cache: Cache,
        *slots: int,
    ) -> Cache:
        def rewrite(cache: Cache, slots: jax.Array) -> Any:
            return jax.tree.map(lambda leaf: write(leaf, slots), cache)

        numbers = handed_over(np.array(slots, np.int32), self.shared)
        arguments = [self._struct(numbers.shape, jnp.int32)]
        program = self._program(
            name, rewrite, (cache,), arguments, self.loader.per_device, donate=0
        )
        after: Cache = program(cache, numbers)
        return after

    def gather(self, batch: int) -> Any:
        """The program that brings whole rows of logits to every process."""
        return self._program("gather", _gathered, (), [self._logits(batch)], EVERYWHERE)

    def _program(
        self,
        name: str,
        function: Callable[..., Any],
        per_device: tuple[Any, ...],
        arguments: list[jax.ShapeDtypeStruct],
        outputs: Any,
        *,
        donate: int | None = None,
    ) -> Any:
        """The compiled program of a function of arrays per device and of shared arguments."""
        signature = tuple(
            (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((per_device, arguments))
        )
        key = (name, signature)
        if key not in self._compiled:
            mapped = jax.shard_map(
                function,
                mesh=self.loader.jax_mesh,
                in_specs=(
                    *[self.loader.per_device] * len(per_device),
                    *[leaf.sharding.spec for leaf in arguments],
                ),
                out_specs=outputs,
                check_vma=False,
            )
            jitted = jax.jit(mapped, donate_argnums=donate)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
                lowered = jitted.lower(*per_device, *arguments)
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    @property
    def candidates(self) -> int:
        """Largest logits of a row that each device lists."""
        return max(_FEWEST_CANDIDATES, _CANDIDATES // self.shape.mesh.model)

    @property
    def shared(self) -> NamedSharding:
        """Of arrays that every device has whole."""
        return NamedSharding(self.loader.jax_mesh, EVERYWHERE)

    def _task(self, batch: int, time: int) -> jax.ShapeDtypeStruct:
        return self._struct((batch, _FACTS + time), jnp.int32)

    def _targets(self, time: int) -> jax.ShapeDtypeStruct:
        return self._struct((1, time), jnp.int32)

    def _hidden(self, batch: int, time: int) -> jax.ShapeDtypeStruct:
        return self._struct((batch, time, self.shape.config.emb_size), jnp.float32)

    def _logits(self, batch: int) -> jax.ShapeDtypeStruct:
        return self._struct((batch, 1, self.shape.config.vocab_size), jnp.float32, _SPLIT)

    def _struct(
        self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec = EVERYWHERE
    ) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.loader.jax_mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _gathered(logits: jax.Array) -> jax.Array:
    return jnp.asarray(jax.lax.all_gather(logits, MODEL_AXIS, axis=2, tiled=True))
