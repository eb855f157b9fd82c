"""Compiled programs of a step: one that embeds, one for any layer, one for the head."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grokctl.loading import Loader
from grokctl.model import forward
from grokctl.model.forward import MODEL_AXIS
from grokctl.model.parameters import Cache, Layer, LayerCache, Parameters
from grokctl.model.step import StepShape

_EVERYWHERE = PartitionSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of one length, compiled."""

    embed: Any
    layers: tuple[Any, ...]
    """The same program many times, unless layers are stored differently."""
    head: Any
    shared: NamedSharding

    def run(
        self,
        parameters: Parameters,
        cache: Cache,
        tokens: list[int],
        start: int,
        *,
        select: int | None,
    ) -> tuple[jax.Array, Cache]:
        """Run it.

        Args:
            parameters: What it was compiled for.
            cache: Is given away.
            tokens: With padding.
            start: Position of the first.
            select: Which token's logits are wanted; None for those of all.

        Returns:
            Logits `(1, chosen, vocab)`, and the extended cache.
        """
        begin = self._ids([start])
        hidden = self.embed(parameters.embedding, self._ids([tokens]))
        extended = []
        for program, layer, held in zip(self.layers, parameters.layers, cache, strict=True):
            hidden, longer = program(layer, held, hidden, begin)
            extended.append(longer)
        chosen = [] if select is None else [self._ids([select])]
        logits: jax.Array = self.head(parameters.embedding, parameters.final_norm, hidden, *chosen)
        return logits, tuple(extended)

    def _ids(self, values: list[Any]) -> jax.Array:
        ids: jax.Array = jax.device_put(np.array(values, np.int32), self.shared)
        return ids


@dataclass(frozen=True, slots=True)
class Programs:
    """Compiles steps over loaded parameters.

    A layer is a program of its own that is called for each, because compiling all of them as one
    takes as many times as long (docs/adr/0003). None is compiled twice.
    """

    loader: Loader
    parameters: Parameters
    shape: StepShape
    _compiled: dict[Hashable, Any] = field(default_factory=dict)

    def step(self, cache: Cache, length: int, *, every: bool) -> Step:
        """A step of a length, whose logits are all wanted or only one token's."""
        return Step(
            embed=self._embed(length),
            layers=tuple(
                self._layer(layer, held, length)
                for layer, held in zip(self.parameters.layers, cache, strict=True)
            ),
            head=self._head(length, every=every),
            shared=self._shared,
        )

    def _embed(self, length: int) -> Any:
        def embed(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
            return forward.embed(embedding[0], tokens, shape=self.shape)

        held = (self.parameters.embedding,)
        return self._program("embed", embed, held, [self._ids(1, length)], _EVERYWHERE)

    def _layer(self, layer: Layer, cache: LayerCache, length: int) -> Any:
        def run(
            layer: Layer, cache: LayerCache, hidden: jax.Array, start: jax.Array
        ) -> tuple[jax.Array, LayerCache]:
            layer, cache = jax.tree.map(lambda leaf: leaf[0], (layer, cache))
            hidden, cache = forward.decoder_layer(layer, cache, hidden, start, shape=self.shape)
            return hidden, jax.tree.map(lambda leaf: leaf[None], cache)

        outputs = (_EVERYWHERE, self.loader.per_device)
        arguments = [self._hidden(length), self._ids(1)]
        return self._program("layer", run, (layer, cache), arguments, outputs, donate=1)

    def _head(self, length: int, *, every: bool) -> Any:
        def head(
            embedding: jax.Array,
            final_norm: jax.Array,
            hidden: jax.Array,
            select: jax.Array | None = None,
        ) -> jax.Array:
            norm = final_norm[0]
            return forward.head(embedding[0], norm, hidden, select, shape=self.shape)

        arguments = [self._hidden(length), *([] if every else [self._ids(1)])]
        held = (self.parameters.embedding, self.parameters.final_norm)
        return self._program("head", head, held, arguments, PartitionSpec(None, None, MODEL_AXIS))

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

    def _ids(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._shared)

    def _hidden(self, length: int) -> jax.ShapeDtypeStruct:
        shape = (1, length, self.shape.config.emb_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._shared)
