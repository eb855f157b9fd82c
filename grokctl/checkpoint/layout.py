"""The layout of device files: which tensor is where in the file of each device of a mesh."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Final

import numpy as np

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, Storage, extent
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.tensors import Axis

FORMAT: Final = "grokctl-ready"
ALIGNMENT: Final = 64
"""Bytes; JAX on the CPU uses arrays at such addresses without a copy."""
CODES: Final[Mapping[np.dtype[Any], str]] = {
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    BFLOAT16: "BF16",
    np.dtype("<f4"): "F32",
}
"""The dtype codes of safetensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTensor:
    """One tensor in a device's file."""

    tensor: LogicalTensor
    slices: Slices
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(extent(self.slices)) * self.tensor.dtype.itemsize

    @property
    def end(self) -> int:
        """Offset of the next tensor, or the end of the file."""
        return self.offset + self.nbytes

    def one_of(self, index: int) -> tuple[int, int]:
        """Offset and bytes of one index of the first axis, such as an expert."""
        nbytes = self.nbytes // extent(self.slices)[0]
        return self.offset + index * nbytes, nbytes


@dataclass(frozen=True, kw_only=True)
class DeviceLayout:
    """The tensors of a device file and their offsets, before compression."""

    device: int
    name: str
    """File name, without the suffix of compressed files."""
    header: bytes
    """The safetensors header with its length prefix, padded to align the tensors."""
    tensors: tuple[DeviceTensor, ...]
    """In the order of their offsets."""

    @property
    def number(self) -> int:
        """The device: every device has one file."""
        return self.device

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each tensor ends."""
        return tuple(item.end for item in self.tensors)

    @cached_property
    def slices(self) -> Mapping[str, Slices]:
        """The part of each tensor that is in the file, by key."""
        return {item.tensor.key: item.slices for item in self.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.tensors[-1].end


def _device_layout(storage: Storage, *, mesh: MeshShape, device: int) -> DeviceLayout:
    """Lay out a device file: the same bytes for the same weights, whatever the source.

    Tensors whose size keeps the next one aligned come first, the others last, both in the order
    of the release: safetensors files have no holes.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    check_mesh(mesh, storage.config)
    parts = [(tensor, tensor.slices(mesh, device, storage.config)) for tensor in storage.tensors]
    parts.sort(key=lambda item: prod(extent(item[1])) * item[0].dtype.itemsize % ALIGNMENT != 0)
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "mesh": str(mesh),
            "device": str(device),
            "precision": str(storage.precision),
        }
    }
    begin = 0
    for tensor, slices in parts:
        shape = extent(slices)
        end = begin + prod(shape) * tensor.dtype.itemsize
        entries[tensor.key] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return DeviceLayout(
        device=device,
        name=f"device-{device:02d}-of-{mesh.size:02d}.safetensors",
        header=header,
        tensors=tuple(
            DeviceTensor(
                tensor=tensor,
                slices=slices,
                offset=len(header) + entries[tensor.key]["data_offsets"][0],
            )
            for tensor, slices in parts
        ),
    )


def device_layouts(storage: Storage, mesh: MeshShape) -> tuple[DeviceLayout, ...]:
    """The layout of every device file.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    return tuple(_device_layout(storage, mesh=mesh, device=device) for device in range(mesh.size))


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """Bytes of weights on one device."""

    nbytes: int
    experts: int
    """Bytes of experts among them."""
    read: int
    """Bytes that decoding one token of one sequence reads: all weights (the embedding is also the
    head), but only the experts that a token selects. Where experts are distributed over devices,
    this is the average, so that the sum is right; a token whose experts are all on one device
    takes longer there."""


def device_weights(storage: Storage, mesh: MeshShape) -> tuple[DeviceWeights, ...]:
    """The weights of each device: the sizes of its layout, but fast, as layers are alike.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    check_mesh(mesh, storage.config)
    first: dict[tuple[Any, ...], LogicalTensor] = {}
    times: Counter[tuple[Any, ...]] = Counter()
    for tensor in storage.tensors:
        kind = (*tensor.spec.axes, tensor.precision, tensor.groups, tensor.is_scales)
        first.setdefault(kind, tensor)
        times[kind] += 1
    selected = storage.config.num_selected_experts
    weights = []
    for device in range(mesh.size):
        nbytes = experts = 0
        for kind, tensor in first.items():
            part = prod(extent(tensor.slices(mesh, device, storage.config)))
            part *= times[kind] * tensor.dtype.itemsize
            nbytes += part
            experts += part if Axis.EXPERTS in tensor.spec.axes else 0
        read = nbytes - experts + experts * selected // storage.config.num_experts
        weights.append(DeviceWeights(nbytes, experts, read))
    return tuple(weights)


def weight_bytes(storage: Storage, mesh: MeshShape) -> tuple[int, ...]:
    """Bytes of tensors on each device: its file without the header.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    return tuple(weights.nbytes for weights in device_weights(storage, mesh))


def bytes_per_token(storage: Storage, mesh: MeshShape) -> tuple[int, ...]:
    """Bytes that each device reads to decode one token of one sequence; see `DeviceWeights`.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    return tuple(weights.read for weights in device_weights(storage, mesh))
