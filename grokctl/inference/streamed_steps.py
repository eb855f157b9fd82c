"""Compiled programs of a step whose experts are streamed: a layer before them, one, and after."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.inference.compiled_steps import (
    EVERYWHERE,
    Head,
    Look,
    Programs,
    Step,
    count_of,
    handed_over,
    positions_of,
)
from grokctl.inference.expert_stream import ExpertStream
from grokctl.model import experts as mixture
from grokctl.model import forward
from grokctl.model.cache import Cache, LayerCache
from grokctl.model.parameters import Experts, Layer, Norms, Parameters

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
        (hidden,), cache, read = _run_layers(
            [_Part(self, hidden, task)], layers, cache, read, look=look
        )
        return hidden, cache, read

    def head_of(self, parameters: Parameters, hidden: jax.Array, given: jax.Array) -> Any:
        """What the head computes, of a task or of targets; None without a head."""
        if self.head is None:
            return None
        return self.head(parameters.embedding, parameters.final_norm, hidden, given)


@dataclass(slots=True)
class _Part:
    """Tokens that go through the layers together with others."""

    step: StreamedStep
    hidden: jax.Array
    task: jax.Array

    @property
    def tokens(self) -> int:
        """Of all sequences, without padding."""
        return count_of(self.task)


def sweep(
    steps: Sequence[Step],
    parameters: Parameters,
    cache: Cache,
    tasks: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
    read: jax.Array,
) -> tuple[list[Any], Cache, jax.Array]:
    """Run consecutive chunks of a prompt layer by layer, so that each expert is read once for all.

    The same as one chunk after the other, bit for bit.

    Args:
        steps: Of each chunk; all of them streamed.
        parameters: The parameters that the steps were compiled for.
        cache: Given away.
        tasks: Of each chunk, packed, with targets as in `Step.run`.
        read: As in `Step.run`.

    Returns:
        What each head computes, the extended cache, and experts read.
    """
    shared = steps[0].shared
    parts = []
    for step, (packed, _) in zip(steps, tasks, strict=True):
        assert isinstance(step, StreamedStep)
        task = handed_over(packed, shared)
        parts.append(_Part(step, step.embed(parameters.embedding, task), task))
    hidden, cache, read = _run_layers(parts, parameters.layers, cache, read)
    results = []
    for part, output, (_, targets) in zip(parts, hidden, tasks, strict=True):
        given = handed_over(targets, shared) if targets.size else part.task
        results.append(part.step.head_of(parameters, output, given))
    return results, cache, read


def _run_layers(
    parts: Sequence[_Part],
    layers: tuple[Layer, ...],
    cache: Cache,
    read: jax.Array,
    *,
    look: Look | None = None,
) -> tuple[list[jax.Array], Cache, jax.Array]:
    """Run all layers; what comes out of each part, the extended cache, and experts read."""
    stream, is_prompt = parts[0].step.stream, parts[0].step.is_prompt
    tokens = sum(part.tokens for part in parts)
    extended: list[LayerCache] = []
    try:
        with stream.reporting(tokens if is_prompt else 1):
            for number, layer in enumerate(layers):
                if look is not None:
                    look(layer, cache[number], parts[0].hidden, parts[0].task)
                longer, read = _run_layer(number, parts, (layer, cache[number], read))
                extended.append(longer)
    except BaseException:
        stream.abandon()
        raise
    return [part.hidden for part in parts], tuple(extended), read


def _run_layer(
    number: int, parts: Sequence[_Part], given: tuple[Layer, LayerCache, jax.Array]
) -> tuple[LayerCache, jax.Array]:
    """Run a layer: all parts up to the experts, then one expert after the other, then the rest."""
    first, (layer, cache, read) = parts[0].step, given
    stream, inputs, totals, choices = first.stream, [], [], []
    for part in parts:
        before = part.step.layers[number]
        part.hidden, (rows, routed, total), cache, read = before(
            layer, cache, read, part.hidden, part.task
        )
        inputs.append((rows, *routed))
        totals.append(total)
        # on the host: the layer is waited for here
        choices.append(frozenset(np.unique(np.asarray(routed[1])).tolist()))
    chosen = sorted(frozenset().union(*choices) & set(range(stream.residence.config.num_experts)))
    tokens = sum(part.tokens for part in parts)
    are_certain = first.is_prompt and tokens >= _ALL_ARE_CHOSEN
    for one, expert in stream.experts(number, chosen, are_next_certain=are_certain):
        which = handed_over(np.array(one, np.int32), first.shared)
        for index, part in enumerate(parts):
            if one in choices[index]:
                totals[index] = part.step.add(expert, which, *inputs[index], totals[index])
        jax.block_until_ready(totals)  # before another expert lies there
    for part, total in zip(parts, totals, strict=True):
        part.hidden = part.step.after(layer.norms, part.hidden, total)
    return cache, read


@dataclass(frozen=True, slots=True)
class StreamedPrograms(Programs):
    """Compiles steps over parameters without experts, which a stream has."""

    stream: ExpertStream = field(kw_only=True)

    def step(
        self, cache: Cache, read: jax.Array, *, batch: int, time: int, head: Head
    ) -> StreamedStep:
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
