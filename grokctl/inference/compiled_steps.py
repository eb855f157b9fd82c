"""Compiled programs of a step: the embedding, a few layers at a time, and the head."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from grokctl.inference.loading import Loader
from grokctl.model import forward
from grokctl.model.bucketing import layers_together
from grokctl.model.cache import Cache, LayerCache, Positions
from grokctl.model.forward import MODEL_AXIS
from grokctl.model.parameters import Layer, Parameters
from grokctl.model.step_spec import StepShape

_EVERYWHERE = PartitionSpec()
_FACTS: Final = 4
"""Columns of a packed task before the tokens: slot, start, select, count."""


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
    """Token of each sequence whose logits are computed, unless all are."""

    def packed(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The task as one array: every array that is handed over takes time."""
        facts = zip(self.slots, self.start, self.select, self.tokens, strict=True)
        rows = [(slot, start, chosen, self.count, *ids) for slot, start, chosen, ids in facts]
        return np.array(rows, np.int32)


def _positions(task: Int[Array, "batch columns"]) -> Positions:
    return Positions(slots=task[:, 0], start=task[:, 1], count=task[0, 3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of one shape, compiled."""

    embed: Any
    layers: tuple[Any, ...]
    """The same program many times, unless layers are stored differently."""
    head: Any
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
        read: jax.Array,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Run a task.

        Args:
            parameters: The parameters that the step was compiled for.
            cache: Given away.
            packed: A packed task of the shape that the step was compiled for.
            read: Number of experts that each device has read; this step's are added.

        Returns:
            Logits `(batch, chosen, vocab)`, the extended cache, and experts read.
        """
        # each process for its own devices: device_put would compare the values of all processes
        task = jax.make_array_from_callback(packed.shape, self.shared, lambda part: packed[part])
        hidden = self._ended(self.embed(parameters.embedding, task))
        extended: list[LayerCache] = []
        for number, program in enumerate(self.layers):
            part = slice(number * self.together, (number + 1) * self.together)
            hidden, longer, read = program(parameters.layers[part], cache[part], read, hidden, task)
            extended += longer
            self._ended(hidden)
        logits: jax.Array = self.head(parameters.embedding, parameters.final_norm, hidden, task)
        return logits, tuple(extended), read

    def _ended(self, hidden: jax.Array) -> jax.Array:
        return hidden.block_until_ready() if self.one_at_a_time else hidden


@dataclass(frozen=True, slots=True)
class Programs:
    """Compiles steps over loaded parameters.

    A program has a few layers, and is called until all have run: one program of all layers would
    take many times as long to compile (docs/adr/0009). No program is compiled twice.
    """

    loader: Loader
    parameters: Parameters
    shape: StepShape
    _compiled: dict[Hashable, Any] = field(default_factory=dict)

    def step(self, cache: Cache, read: jax.Array, *, batch: int, time: int, every: bool) -> Step:
        """A step of a shape, with logits of every token or of one token of each sequence."""
        together = layers_together(self.shape.platform)
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
            head=self._head(batch, time, every=every),
            together=together,
            shared=self._shared,
            one_at_a_time=self.shape.platform == "cpu" and self.shape.mesh.size > 1,
        )

    def none_read(self) -> jax.Array:
        """The count of experts read, at 0."""
        return self.loader.zeros((), jnp.dtype(jnp.int32))

    def _embed(self, batch: int, time: int) -> Any:
        def embed(embedding: jax.Array, task: jax.Array) -> jax.Array:
            return forward.embed(embedding[0], task[:, _FACTS:], shape=self.shape)

        per_device = (self.parameters.embedding,)
        return self._program("embed", embed, per_device, [self._task(batch, time)], _EVERYWHERE)

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
                layers, cache, hidden, _positions(task), shape=self.shape
            )
            return hidden, cache, read + read_now

        outputs = (_EVERYWHERE, self.loader.per_device, self.loader.per_device)
        arguments = [self._hidden(batch, time), self._task(batch, time)]
        return self._program("layers", run, per_device, arguments, outputs, donate=1)

    def _head(self, batch: int, time: int, *, every: bool) -> Any:
        def head(
            embedding: jax.Array, final_norm: jax.Array, hidden: jax.Array, task: jax.Array
        ) -> jax.Array:
            chosen = None if every else task[:, 2]
            logits = forward.head(embedding[0], final_norm[0], hidden, chosen, shape=self.shape)
            if self.loader.is_shared:  # a process sees only its own devices' part
                logits = jax.lax.all_gather(logits, MODEL_AXIS, axis=2, tiled=True)
            return logits

        arguments = [self._hidden(batch, time), self._task(batch, time)]
        per_device = (self.parameters.embedding, self.parameters.final_norm)
        split = PartitionSpec(None, None, MODEL_AXIS)
        outputs = _EVERYWHERE if self.loader.is_shared else split
        return self._program(f"head, every={every}", head, per_device, arguments, outputs)

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
                    *[_EVERYWHERE] * len(arguments),
                ),
                out_specs=outputs,
                check_vma=False,
            )
            jitted = jax.jit(mapped, donate_argnums=donate)
            self._compiled[key] = jitted.lower(*per_device, *arguments).compile()
        return self._compiled[key]

    @property
    def _shared(self) -> NamedSharding:
        return NamedSharding(self.loader.jax_mesh, _EVERYWHERE)

    def _task(self, batch: int, time: int) -> jax.ShapeDtypeStruct:
        shape = (batch, _FACTS + time)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._shared)

    def _hidden(self, batch: int, time: int) -> jax.ShapeDtypeStruct:
        shape = (batch, time, self.shape.config.emb_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._shared)
