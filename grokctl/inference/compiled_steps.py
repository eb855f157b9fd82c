"""Compiled programs of a step: one that embeds, one for any few layers, one for the head."""

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
"""Columns before the tokens of what a step is told: slot, start, which token, how many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Tokens to run: the next ones of some sequences."""

    tokens: Sequence[Sequence[int]]
    """Equally many of each sequence, with padding."""
    slots: Sequence[int]
    """Where in the cache each sequence is kept."""
    start: Sequence[int]
    """Position of each one's first token."""
    count: int
    """How many tokens are no padding."""
    select: Sequence[int]
    """Which token of each has its logits computed, unless all have."""

    def packed(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """All of it in one array, because every array that is handed over takes its time."""
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
    """Layers that a program runs."""
    shared: NamedSharding
    one_at_a_time: bool
    """Whether a program must end before the next is called: sums over virtual CPU devices need a
    thread of each, and programs under way together can hold each other's for ever."""

    def run(
        self,
        parameters: Parameters,
        cache: Cache,
        packed: np.ndarray[Any, np.dtype[np.int32]],
        read: jax.Array,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Run it.

        Args:
            parameters: What it was compiled for.
            cache: Is given away.
            packed: A task of the shape that it was compiled for.
            read: Experts that each device read before, to which those of this step are added.

        Returns:
            Logits `(batch, chosen, vocab)`, the extended cache, and experts read.
        """
        # by every process for its own devices: device_put would compare those of all processes
        told = jax.make_array_from_callback(packed.shape, self.shared, lambda part: packed[part])
        hidden = self._ended(self.embed(parameters.embedding, told))
        extended: list[LayerCache] = []
        for number, program in enumerate(self.layers):
            some = slice(number * self.together, (number + 1) * self.together)
            hidden, longer, read = program(parameters.layers[some], cache[some], read, hidden, told)
            extended += longer
            self._ended(hidden)
        logits: jax.Array = self.head(parameters.embedding, parameters.final_norm, hidden, told)
        return logits, tuple(extended), read

    def _ended(self, hidden: jax.Array) -> jax.Array:
        return hidden.block_until_ready() if self.one_at_a_time else hidden


@dataclass(frozen=True, slots=True)
class Programs:
    """Compiles steps over loaded parameters.

    Few layers are a program of their own that is called until all have run, because compiling all
    as one takes as many times as long (docs/adr/0009). None is compiled twice.
    """

    loader: Loader
    parameters: Parameters
    shape: StepShape
    _compiled: dict[Hashable, Any] = field(default_factory=dict)

    def step(self, cache: Cache, read: jax.Array, *, batch: int, time: int, every: bool) -> Step:
        """A step of a shape, whose logits are all wanted or only one token's of each sequence."""
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
        """Experts read, before anything was."""
        return self.loader.zeros((), jnp.dtype(jnp.int32))

    def _embed(self, batch: int, time: int) -> Any:
        def embed(embedding: jax.Array, task: jax.Array) -> jax.Array:
            return forward.embed(embedding[0], task[:, _FACTS:], shape=self.shape)

        held = (self.parameters.embedding,)
        return self._program("embed", embed, held, [self._task(batch, time)], _EVERYWHERE)

    def _layers(
        self, held: tuple[tuple[Layer, ...], Cache, jax.Array], batch: int, time: int
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
        return self._program("layers", run, held, arguments, outputs, donate=1)

    def _head(self, batch: int, time: int, *, every: bool) -> Any:
        def head(
            embedding: jax.Array, final_norm: jax.Array, hidden: jax.Array, task: jax.Array
        ) -> jax.Array:
            chosen = None if every else task[:, 2]
            logits = forward.head(embedding[0], final_norm[0], hidden, chosen, shape=self.shape)
            if self.loader.is_shared:  # a process sees only what its own devices have
                logits = jax.lax.all_gather(logits, MODEL_AXIS, axis=2, tiled=True)
            return logits

        arguments = [self._hidden(batch, time), self._task(batch, time)]
        held = (self.parameters.embedding, self.parameters.final_norm)
        split = PartitionSpec(None, None, MODEL_AXIS)
        outputs = _EVERYWHERE if self.loader.is_shared else split
        return self._program(f"head, every={every}", head, held, arguments, outputs)

    def _program(
        self,
        name: str,
        function: Callable[..., Any],
        held: tuple[Any, ...],
        arguments: list[jax.ShapeDtypeStruct],
        outputs: Any,
        *,
        donate: int | None = None,
    ) -> Any:
        """The compiled program of a function over what devices hold and arguments they share."""
        kinds = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((held, arguments)))
        key = (name, kinds)
        if key not in self._compiled:
            mapped = jax.shard_map(
                function,
                mesh=self.loader.jax_mesh,
                in_specs=(*[self.loader.per_device] * len(held), *[_EVERYWHERE] * len(arguments)),
                out_specs=outputs,
                check_vma=False,
            )
            jitted = jax.jit(mapped, donate_argnums=donate)
            self._compiled[key] = jitted.lower(*held, *arguments).compile()
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
