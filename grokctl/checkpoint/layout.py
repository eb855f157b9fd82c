"""Device files as arithmetic: which tensor lies where in which file of a mesh."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.tensor_source import LogicalTensor, Slices, Storage, extent
from grokctl.model.placement import MeshShape, check_mesh
from grokctl.model.tensors import Axis

FORMAT: Final = "grokctl-ready"
ALIGNMENT: Final = 64
"""Bytes; JAX maps arrays on the CPU without a copy from such addresses."""
CODES: Final[Mapping[np.dtype[Any], str]] = {
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    BFLOAT16: "BF16",
    np.dtype("<f4"): "F32",
}
"""What safetensors calls the types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTensor:
    """One tensor in a device's file."""

    tensor: LogicalTensor
    slices: Slices
    offset: int
    """In the file, bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(extent(self.slices)) * self.tensor.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next tensor begins, or the file ends."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayout:
    """What a device's file holds, and where; of a compressed one, of what it decompresses to."""

    device: int
    name: str
    """Without a suffix for compression."""
    header: bytes
    """The safetensors header with its length, padded so that tensors are aligned."""
    tensors: tuple[DeviceTensor, ...]
    """By offset."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.tensors[-1].end


def device_layout(storage: Storage, *, mesh: MeshShape, device: int) -> DeviceLayout:
    """Lay out a device's file: the same bytes for the same weights, whatever they are cut from.

    Tensors whose size keeps the next one aligned come first, each group in the order of the
    release: safetensors files have no holes.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    check_mesh(mesh, storage.config)
    cut = [(tensor, tensor.slices(mesh, device, storage.config)) for tensor in storage.tensors]
    cut.sort(key=lambda item: prod(extent(item[1])) * item[0].dtype.itemsize % ALIGNMENT != 0)
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "mesh": str(mesh),
            "device": str(device),
            "precision": str(storage.precision),
        }
    }
    begin = 0
    for tensor, slices in cut:
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
            for tensor, slices in cut
        ),
    )


def device_layouts(storage: Storage, mesh: MeshShape) -> tuple[DeviceLayout, ...]:
    """Every device's file.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    return tuple(device_layout(storage, mesh=mesh, device=device) for device in range(mesh.size))


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of tensors that one device holds."""

    nbytes: int
    experts: int
    """Of those, of experts."""
    read: int
    """For one token of one stream: everything, the embedding being the head too, but of experts
    only as many as a token chooses. Where devices share out the experts, this is the average, so
    that the sum is right; a token whose experts all lie on one device keeps that one longer."""


def shares(storage: Storage, mesh: MeshShape) -> tuple[Share, ...]:
    """What each device holds, as `device_layout` would say, but at once: layers are alike.

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
    chosen, of = storage.config.num_selected_experts, storage.config.num_experts
    found = []
    for device in range(mesh.size):
        nbytes = experts = 0
        for kind, tensor in first.items():
            held = prod(extent(tensor.slices(mesh, device, storage.config)))
            held *= times[kind] * tensor.dtype.itemsize
            nbytes += held
            experts += held if Axis.EXPERTS in tensor.spec.axes else 0
        found.append(Share(nbytes, experts, nbytes - experts + experts * chosen // of))
    return tuple(found)


def weight_bytes(storage: Storage, mesh: MeshShape) -> tuple[int, ...]:
    """Bytes of tensors for each device: what its file holds behind the header.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    return tuple(share.nbytes for share in shares(storage, mesh))


def bytes_per_token(storage: Storage, mesh: MeshShape) -> tuple[int, ...]:
    """Bytes of weights that each device reads to decode one token of one stream; see `Share`.

    Raises:
        PlacementError: The model does not divide over the mesh.
    """
    return tuple(share.read for share in shares(storage, mesh))
