"""Compiled programs of a step whose experts are streamed: a layer before them, one, and after."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from grokctl.inference.compiled_steps import (
    EVERYWHERE,
    Head,
    Look,
    Programs,
    Step,
    handed_over,
    positions_of,
)
from grokctl.inference.expert_stream import ExpertStream
from grokctl.model import experts as mixture
from grokctl.model import forward
from grokctl.model.cache import Cache, LayerCache
from grokctl.model.parameters import Experts, Layer, Norms

_ALL_ARE_CHOSEN: Final = 64
"""Tokens from which every expert of a layer is chosen but in one of a million cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedStep(Step):
    """A step of one shape, compiled, that is told by each layer which experts it needs.

    `layers` has the programs up to the experts.
    """

    add: Any
    """Adds one expert of any layer."""
    after: Any
    """What follows the experts of any layer."""
    tokens: int
    """Of all sequences."""
    is_prompt: bool
    stream: ExpertStream

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
        stream, swept = self.stream, self.stream.residence.swept
        extended: list[LayerCache] = []
        try:
            with stream.reporting(swept) if self.is_prompt else nullcontext():
                for number, before in enumerate(self.layers):
                    if look is not None:
                        look(layers[number], cache[number], hidden, task)
                    hidden, longer, read = self._run_layer(
                        number, before, (layers[number], cache[number], read), hidden, task
                    )
                    extended.append(longer)
        except BaseException:
            stream.abandon()
            raise
        return hidden, tuple(extended), read

    def _run_layer(
        self,
        number: int,
        before: Any,
        given: tuple[Layer, LayerCache, jax.Array],
        hidden: jax.Array,
        task: jax.Array,
    ) -> tuple[jax.Array, LayerCache, jax.Array]:
        layer = given[0]
        hidden, (rows, routed, total), longer, read = before(*given, hidden, task)
        chosen = np.unique(np.asarray(routed[1]))  # on the host: the layer is waited for here
        numbers = chosen[chosen < self.stream.residence.config.num_experts].tolist()
        are_certain = self.is_prompt and self.tokens >= _ALL_ARE_CHOSEN
        for one, expert in self.stream.experts(number, numbers, are_next_certain=are_certain):
            which = handed_over(np.array(one, np.int32), self.shared)
            total = self.add(expert, which, rows, *routed, total)
            total.block_until_ready()  # before another expert lies there
        return self.after(layer.norms, hidden, total), longer, read


@dataclass(frozen=True, slots=True)
class StreamedPrograms(Programs):
    """Compiles steps over parameters without experts, which a stream has."""

    stream: ExpertStream = field(kw_only=True)

    def step(self, cache: Cache, read: jax.Array, *, batch: int, time: int, head: Head) -> Step:
        """A step of a shape."""
        layers = self.parameters.layers
        return StreamedStep(
            embed=self._embed(batch, time),
            layers=tuple(
                self._before(layer, before, read, batch, time)
                for layer, before in zip(layers, cache, strict=True)
            ),
            head=self._head(head, batch, time),
            together=1,
            shared=self.shared,
            one_at_a_time=False,
            add=self._add(batch * time),
            after=self._after(layers[0].norms, batch, time),
            tokens=batch * time,
            is_prompt=time > 1,
            stream=self.stream,
        )

    def _before(
        self, layer: Layer, cache: LayerCache, read: jax.Array, batch: int, time: int
    ) -> Any:
        def before(
            layer: Layer, cache: LayerCache, read: jax.Array, hidden: jax.Array, task: jax.Array
        ) -> Any:
            layer = jax.tree.map(lambda leaf: leaf[0], layer)
            positions = positions_of(task)
            hidden, normed, cache = forward.before_experts(
                layer, cache, hidden, positions, shape=self.shape
            )
            rows = normed.reshape(-1, normed.shape[-1])
            routed, read_now = mixture.routed_here(
                layer.router,
                rows,
                positions.count,
                num_experts=self.shape.config.num_experts,
                shape=self.shape,
            )
            return hidden, (rows, routed, jnp.zeros_like(rows)), cache, read + read_now

        own = self.loader.per_device
        outputs = (EVERYWHERE, EVERYWHERE, own, own)
        arguments = [self._hidden(batch, time), self._task(batch, time)]
        return self._program(
            "before experts", before, (layer, cache, read), arguments, outputs, donate=1
        )

    def _add(self, tokens: int) -> Any:
        def add(
            expert: Experts,
            number: jax.Array,
            rows: jax.Array,
            gates: jax.Array,
            local: jax.Array,
            total: jax.Array,
        ) -> jax.Array:
            expert = jax.tree.map(lambda leaf: leaf[0], expert)
            return mixture.add_expert(expert, number, rows, (gates, local), total, shape=self.shape)

        config = self.shape.config
        selected = (tokens, config.num_selected_experts)
        rows = self._struct((tokens, config.emb_size), jnp.float32)
        arguments = [
            self._struct((), jnp.int32),
            rows,
            self._struct(selected, jnp.float32),
            self._struct(selected, jnp.int32),
            rows,
        ]
        return self._program("add expert", add, (self.stream.example,), arguments, EVERYWHERE)

    def _after(self, norms: Norms, batch: int, time: int) -> Any:
        def after(norms: Norms, hidden: jax.Array, total: jax.Array) -> jax.Array:
            norms = jax.tree.map(lambda leaf: leaf[0], norms)
            return forward.after_experts(
                norms, hidden, total.reshape(hidden.shape), shape=self.shape
            )

        hidden = self._hidden(batch, time)
        total = self._struct((batch * time, hidden.shape[-1]), jnp.float32)
        return self._program("after experts", after, (norms,), [hidden, total], EVERYWHERE)
