"""Random small models: any sizes, any scale rows, any mesh that can hold them, any precision."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from grokctl.checkpoint.manifest import Source
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import LogicalTensor, RowReader, Slices, Storage, index_of
from grokctl.errors import PlacementError
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MESH_SIZES, MeshShape, Slice, check_mesh
from grokctl.model.precision import Precision
from grokctl.model.tensors import Axis, TensorSpec, tensor_specs

TINY = GrokConfig(
    vocab_size=48,
    pad_token=0,
    eos_token=2,
    sequence_len=16,
    embedding_multiplier_scale=1.0,
    output_multiplier_scale=1.0,
    emb_size=96,
    widening_factor=2,
    key_size=4,
    num_q_heads=16,
    num_kv_heads=8,
    num_layers=1,
    attn_output_multiplier=1.0,
    num_experts=2,
    num_selected_experts=1,
)
"""A layer of 128 columns and 64 queries: meshes of 1 to 16 devices hold it, in any precision."""
MESHES = tuple(
    MeshShape(expert, size // expert)
    for size in MESH_SIZES
    for expert in MESH_SIZES
    if expert <= size
)


@st.composite
def models(draw: st.DrawFn) -> GrokConfig:
    """Sizes of a model that some mesh can hold; now and then one that nearly none can."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    return replace(
        TINY,
        vocab_size=draw(st.sampled_from([3, 16, 48, 50])),
        emb_size=2 * draw(st.integers(1, 30)),
        widening_factor=draw(st.integers(1, 6)),
        key_size=2 * draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        num_q_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 6])),
        num_layers=draw(st.integers(1, 2)),
        num_experts=draw(st.integers(1, 8)),
    )


@st.composite
def meshes(draw: st.DrawFn, config: GrokConfig) -> MeshShape:
    """A mesh that can hold a model: every one of a single device can."""
    return draw(st.sampled_from([mesh for mesh in MESHES if can_hold(mesh, config)]))


def can_hold(mesh: MeshShape, config: GrokConfig) -> bool:
    try:
        check_mesh(mesh, config)
    except PlacementError:
        return False
    return True


def inputs_of(spec: TensorSpec, mesh: MeshShape) -> int:
    """How many inputs of a quantised weight a device has."""
    return spec.shape[-2] // (mesh.model if spec.axes[-2] in {Axis.FFN, Axis.Q_HEADS} else 1)


@st.composite
def storages(draw: st.DrawFn, config: GrokConfig, mesh: MeshShape, precision: Precision) -> Storage:
    """How a model is stored for a mesh: any groups that leave no device a part of one."""
    groups = dict.fromkeys((spec.name for spec in tensor_specs(config)), 0)
    for spec in tensor_specs(config):
        if not spec.is_quantized:
            continue
        own = inputs_of(spec, mesh)
        if precision is Precision.INT4:
            sizes = [size for size in range(2, 1025, 2) if own % size == 0]
            assume(sizes)
            groups[spec.name] = spec.shape[-2] // draw(st.sampled_from(sizes))
        elif precision is Precision.INT8:
            # whole groups on every device, or whole devices in every group
            parts = spec.shape[-2] // own
            rows = [n for n in range(1, parts + 1) if parts % n == 0]
            rows += [parts * n for n in range(1, 9) if own % n == 0]
            groups[spec.name] = draw(st.sampled_from(rows))
    return Storage(config=config, precision=precision, groups=groups)


@dataclass
class Arrays:
    """A source of random arrays in memory, stored in any way."""

    storage: Storage
    seed: int = 0
    reads: list[tuple[str, Slices]] = field(default_factory=list)
    """Everything that was asked for."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.arrays: dict[str, NDArray[Any]] = {}
        for tensor in self.storage.tensors:
            shape = tensor.shape
            if tensor.is_scales:
                values = rng.uniform(0.5, 2, shape).astype(BFLOAT16)
            elif tensor.precision is Precision.INT8:
                values = rng.integers(-127, 128, shape, dtype=np.int8)
            elif tensor.precision is Precision.INT4:
                low, high = rng.integers(1, 16, (2, *shape), dtype=np.uint8)
                values = low | high << 4
            else:
                values = rng.standard_normal(shape, dtype=np.float32).astype(tensor.dtype)
            self.arrays[tensor.key] = values

    @property
    def config(self) -> GrokConfig:
        return self.storage.config

    @property
    def source(self) -> Source:
        return Source(name="drawn", infohash=None, proven=False, verified_at=None)

    def read(self, tensor: LogicalTensor, slices: Slices) -> NDArray[Any]:
        self.reads.append((tensor.key, slices))
        return self.arrays[tensor.key][index_of(slices)]

    @contextmanager
    def reading(
        self, tensor: LogicalTensor, lead: tuple[int, ...], outputs: Slice
    ) -> Iterator[RowReader]:
        stack = tuple((number, number + 1) for number in lead)
        count = outputs[1] - outputs[0]
        yield lambda low, high: self.read(tensor, (*stack, (low, high), outputs)).reshape(-1, count)

    def values(self, spec: TensorSpec) -> NDArray[np.float32]:
        """What a parameter means, `(*lead, inputs, outputs)`."""
        weight = self.storage.weight(spec)
        scales = self.arrays.get(f"{spec.name}.scales")
        return plain_values(weight, self.arrays[weight.key], scales)


def plain_values(
    tensor: LogicalTensor, stored: NDArray[Any], scales: NDArray[Any] | None
) -> NDArray[np.float32]:
    """What a stored weight, or a part of one with its own scales, means: the slow, obvious way."""
    if tensor.precision is Precision.INT4 and tensor.is_matrix:
        low, high = (stored & 15).astype(np.int8) - 8, (stored >> 4).astype(np.int8) - 8
        *lead, rows, outputs = stored.shape
        stored = np.stack([low, high], axis=-2).reshape(*lead, 2 * rows, outputs)
    wide = stored.astype(np.float32)
    if scales is None:
        return wide
    repeats = wide.shape[-2] // scales.shape[-2]
    return wide * np.repeat(scales.astype(np.float32), repeats, axis=-2)


def put_together(
    storage: Storage, mesh: MeshShape, parts: Mapping[tuple[str, int], NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Whole tensors from what devices hold: every element once, replicas equal to the bit."""
    found = {}
    for tensor in storage.tensors:
        bits = f"u{tensor.dtype.itemsize}"
        whole, times = np.zeros(tensor.shape, bits), np.zeros(tensor.shape, np.int32)
        seen: set[Slices] = set()
        for device in range(mesh.size):
            slices = tensor.slices(mesh, device, storage.config)
            place, part = index_of(slices), parts[tensor.key, device].view(bits)
            if slices in seen:
                np.testing.assert_array_equal(whole[place], part)
            else:
                whole[place] = part
                times[place] += 1
            seen.add(slices)
        assert (times == 1).all(), tensor.key
        found[tensor.key] = whole.view(tensor.dtype)
    return found
