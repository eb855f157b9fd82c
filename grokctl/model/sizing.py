"""How many bytes a run takes on each device: arithmetic, no arrays, and no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from grokctl.model.bucketing import (
    BLOCK,
    TOP_LOGPROBS,
    layers_together,
    padded_batch,
    position_block,
    room,
    rows_of_a_run,
    score_width,
)
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.tensors import SHARDS
from grokctl.text import format_bytes

_FLOAT32: Final = 4
_BFLOAT16: Final = 2
"""Bytes."""
_LIBRARY: Final = 2**25
"""Workspace of cuBLAS, which XLA uses for products that it runs faster."""
_STORED: Final[Mapping[Precision, int]] = {
    Precision.INT8: 1,
    Precision.BFLOAT16: 2,
    Precision.FLOAT32: 4,
    Precision.INT4: 1,
}
"""Bytes of a stored weight; of int4, the half is rounded up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a model is to run: everything that decides the size of its cache and of its steps."""

    context: int
    """Positions of each slot."""
    compute: Compute
    """Type of operands, and of keys and values."""
    slots: int = 1
    """Sequences that the cache has room for at a time."""
    kv: KvType = KvType.COMPUTE
    """Whether keys and values are codes instead."""

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """Type of keys and values in the cache."""
        if self.kv is KvType.INT8:
            return np.dtype(np.int8)
        is_wide = self.compute is Compute.FLOAT32
        return np.dtype(np.float32 if is_wide else ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that one device of a mesh needs."""

    weights: int
    """Weights of the device with the most."""
    cache: int
    """Keys and values of all slots at the whole context."""
    workspace: int
    """Activations, logits and temporaries of the largest step."""

    @property
    def total(self) -> int:
        """Sum of all three."""
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = {"weights": self.weights, "cache": self.cache, "workspace": self.workspace}
        sizes = [f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items()]
        return f"{', '.join(sizes[:-1])} and {sizes[-1]}"


def needs(
    config: GrokConfig,
    mesh: MeshShape,
    terms: Terms,
    *,
    weights: int,
    precision: Precision,
    platform: str,
) -> Needs:
    """Bytes that a device of a mesh needs.

    Args:
        config: The model.
        mesh: The mesh that it is split over.
        terms: Context, types and slots.
        weights: Bytes of weights on the device with the most.
        precision: Precision of the weights.
        platform: `cpu`, `gpu` or `tpu`.
    """
    past = room(terms.context, platform=platform)[1]
    return Needs(
        weights=weights,
        cache=cache_bytes(config, mesh, slots=terms.slots, past=past, dtype=terms.cache_dtype),
        workspace=workspace_bytes(config, mesh, terms, precision=precision, platform=platform),
    )


def kv_heads_per_device(config: GrokConfig, mesh: MeshShape) -> int:
    """Key heads on a device: at least one, even if several devices share it."""
    return max(1, config.num_kv_heads // mesh.model)


def cache_bytes(
    config: GrokConfig, mesh: MeshShape, *, slots: int, past: int, dtype: np.dtype[Any]
) -> int:
    """Bytes of key-value cache on each device."""
    entry = config.key_size * dtype.itemsize
    if dtype == np.int8:
        entry += _FLOAT32  # its scale
    return 2 * config.num_layers * slots * kv_heads_per_device(config, mesh) * past * entry


def workspace_bytes(
    config: GrokConfig, mesh: MeshShape, terms: Terms, *, precision: Precision, platform: str
) -> int:
    """Bytes of activations, logits and temporaries of the largest step.

    It includes arguments and results that are neither weights nor cache. On accelerators there is
    room beside for a library's workspace, and for trying forms of products: see `_Step.trying`.
    """
    found = program_bytes(config, mesh, terms, precision=precision, platform=platform)
    if platform == "cpu":
        return found
    steps = _steps(config, mesh, terms, precision=precision, platform=platform)
    return max(found, *(step.trying for step in steps)) + _LIBRARY


def program_bytes(
    config: GrokConfig, mesh: MeshShape, terms: Terms, *, precision: Precision, platform: str
) -> int:
    """Bytes that the largest program takes, beside weights and cache.

    Programs run one after the other, and each reuses the memory of the one before, so this is the
    most that one program takes: one that embeds, runs layers, is the head or scores, for a chunk of
    a prompt or for a token in every slot.

    tests/integration/inference/test_sizing.py compares it with XLA's reports, and `make gpu-forms`
    does so for GPUs.
    """
    steps = _steps(config, mesh, terms, precision=precision, platform=platform)
    return max(
        nbytes for step in steps for nbytes in (step.embed, step.layers, step.head, step.scores)
    )


def _steps(
    config: GrokConfig, mesh: MeshShape, terms: Terms, *, precision: Precision, platform: str
) -> "tuple[_Step, ...]":
    """The largest steps: a chunk of a prompt, and a token in every slot."""
    longest, _ = room(terms.context, platform=platform)
    operands = {_FLOAT32 if terms.compute is Compute.FLOAT32 else _BFLOAT16}
    if platform == "cpu":
        operands.add(_FLOAT32)  # of a CPU that does not multiply bfloat16, whatever this one does
    return tuple(
        _Step(
            config=config,
            mesh=mesh,
            tokens=batch * time,
            batch=batch,
            platform=platform,
            operand=operand,
            kept=terms.cache_dtype.itemsize,
            precision=precision,
        )
        for batch, time in ((1, longest), (padded_batch(terms.slots), 1))
        for operand in operands
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step of some shape, on one device; all values are bytes unless they say otherwise.

    Arrays that `model/forward.py` keeps in float32 count as such, whatever the operands are.
    """

    config: GrokConfig
    mesh: MeshShape
    tokens: int
    """Number of tokens, of all sequences together."""
    batch: int
    """Number of sequences."""
    platform: str
    operand: int
    """Bytes of one operand of a matrix product."""
    kept: int
    """Bytes of one number of the cache."""
    precision: Precision

    @property
    def is_cpu(self) -> bool:
        """Whether weights are dequantised a block at a time."""
        return self.platform == "cpu"

    @property
    def embed(self) -> int:
        """This device's rows, and their sum over devices, the result; a GPU adds up in place."""
        return 2 * self._hidden if self.is_cpu else self._hidden

    @property
    def head(self) -> int:
        """Logits of all tokens, as `score` wants them, and what they are computed from.

        A CPU has them twice; elsewhere vectors are operands of another type, too.
        """
        logits = self.tokens * self._vocab * _FLOAT32
        if self.is_cpu:
            return 2 * (self._hidden + logits)
        return self._hidden + logits + self._operands

    @property
    def trying(self) -> int:
        """The head's product with buffers of its own, on a GPU.

        XLA tries forms of it so while it compiles (`GpuProfiler` in openxla/xla), when nothing else
        runs. No other product is as large.
        """
        return self._hidden + self._vocab * (self.config.emb_size + self.tokens) * _FLOAT32

    @property
    def scores(self) -> int:
        """Logits of a block of the vocabulary twice, and what is kept of every block.

        On a CPU beside the rows of the embedding that they come from.
        """
        embed = self.config.emb_size
        width = score_width(self.tokens, vocab=self._vocab, embed=embed)
        logits = self.tokens * width * _FLOAT32
        kept = self._vocab // width * self.tokens * 2 * TOP_LOGPROBS * _FLOAT32
        if not self.is_cpu:
            return self._hidden + self._operands + 2 * logits + kept
        if width == self._vocab:
            return 2 * (self._hidden + logits)
        return 2 * (self._hidden + logits) + width * embed * _FLOAT32 + kept

    @property
    def layers(self) -> int:
        """What goes in and comes out, and the larger of a layer's two blocks.

        On accelerators XLA fills in the zeros to which experts and attention add before the first
        layer begins, for all layers of the program; those of one layer are counted in its blocks.
        """
        largest = max(self._attention, self._experts)
        if self.is_cpu:
            return 2 * self._hidden + largest
        time = self.tokens // self.batch
        together = layers_together(self.platform, batch=self.batch, time=time)
        others = min(together, self.config.num_layers) - 1
        zeros = others * (self._hidden + self._queries)
        return 2 * self._hidden + zeros + largest

    @property
    def _vocab(self) -> int:
        """Rows of the embedding on this device: no bytes."""
        return self.config.vocab_size // self.mesh.model

    @property
    def _operands(self) -> int:
        """One vector for each token, as operands of a product, if that is another type."""
        return self.tokens * self.config.emb_size * self.operand if self.operand < _FLOAT32 else 0

    @property
    def _hidden(self) -> int:
        """One vector for each token."""
        return self.tokens * self.config.emb_size * _FLOAT32

    @property
    def _queries(self) -> int:
        """Queries of this device's heads; attention returns as many vectors."""
        return self.tokens * self.config.q_size // self.mesh.model * _FLOAT32

    @property
    def _attention(self) -> int:
        return max(self._projecting, self._looking)

    @property
    def _projecting(self) -> int:
        """Normed and mixed vectors, queries before and after rotation, and the weights.

        On accelerators the most is the product for the output: the two parts of operands that are
        split, for every group of scales apart, and their sum.
        """
        inputs, heads = self.config.emb_size, self.config.q_size // self.mesh.model
        keys = kv_heads_per_device(self.config, self.mesh) * self.config.key_size
        if self.is_cpu:
            split_outputs = ((inputs, heads), (inputs, keys), (inputs, keys))
            blocks = self._blocks(split_outputs, (heads, inputs), tokens=self.tokens)
            return 2 * self._hidden + 2 * self._queries + blocks
        parts = 2 if self.operand < _FLOAT32 else 1
        sums = 1 if self._apart == 1 else parts
        return (parts * self._apart + sums) * self._hidden

    @property
    def _looking(self) -> int:
        """Queries, sums and their summands, a block of positions, and its logits twice."""
        heads = self.config.num_q_heads // self.mesh.model
        block = position_block(self.tokens * heads, platform=self.platform)
        looked = self.tokens * heads * block * _FLOAT32
        seen = self.batch * kv_heads_per_device(self.config, self.mesh)
        seen *= block * self.config.key_size
        return self._hidden + 3 * self._queries + 2 * looked + seen * (2 * _FLOAT32 + self.kept)

    @property
    def _experts(self) -> int:
        """Normed vectors and sum; the tokens of a run, wider within an expert; and its weight."""
        run = rows_of_a_run(
            self.tokens, config=self.config, platform=self.platform, operand=self.operand
        )
        inputs, columns = self.config.emb_size, self.config.ffn_size // self.mesh.model
        rows, wide = run * inputs * _FLOAT32, run * columns * _FLOAT32
        if self.is_cpu:
            block = self._blocks(2 * ((inputs, columns),), (columns, inputs), tokens=run)
            if self.precision is Precision.INT4:  # low and high nibbles apart
                half = block // 2
                block += min(half, 2 * wide) + (half if self.operand < _FLOAT32 else 0)
            return 2 * self._hidden + 2 * rows + 3 * wide + block
        # the weights of an expert cut out of their stacks; of int4 dequantised, one at a time
        weights = 3 * inputs * columns * _STORED[self.precision]
        if self.precision is Precision.INT4:
            weights = weights // 2 + inputs * columns * self.operand
        products = rows if self._apart == 1 else (1 + self._apart) * rows  # and their sum
        return 2 * self._hidden + weights + products + run * columns * self.operand

    def _blocks(
        self,
        split_outputs: tuple[tuple[int, int], ...],
        split_inputs: tuple[int, int],
        *,
        tokens: int,
    ) -> int:
        """Blocks of weights, inputs by outputs, that a CPU dequantises for the same tokens.

        One after the other, unless a block is the whole weight: that is in no loop, so it may be
        made before it is needed.
        """
        groups = self._groups if self.precision is Precision.INT8 else 1
        largest = together = 0
        for inputs, outputs, count in (
            *[(*shape, 1) for shape in split_outputs],
            (*split_inputs, groups),
        ):
            rows = min(inputs // count, max(tokens, BLOCK // (self.operand * outputs)))
            if rows == inputs:
                together += rows * outputs * self.operand
            else:  # with the part of the tokens that it multiplies
                largest = max(largest, rows * (outputs + tokens) * self.operand)
        return max(largest, together)

    @property
    def _apart(self) -> int:
        """Groups of scales whose sums accelerators keep apart: int4 has too many."""
        return self._groups if self.precision is Precision.INT8 else 1

    @property
    def _groups(self) -> int:
        """Scale rows, as in the release, of a weight whose inputs are split."""
        return max(1, SHARDS // self.mesh.model)
