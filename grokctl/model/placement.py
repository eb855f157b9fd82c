"""The slices of tensors on each device of a mesh: pure arithmetic, no arrays."""

import re
from dataclasses import dataclass
from typing import Self

from grokctl.errors import PlacementError, invalid
from grokctl.model.config import GrokConfig
from grokctl.model.tensors import Axis, TensorSpec

MESH_SIZES = (1, 2, 4, 8, 16)
"""How many devices a mesh may have."""

Slice = tuple[int, int]
"""Half open: first and one past the last."""


@dataclass(frozen=True, slots=True, order=True)
class MeshShape:
    """Devices in a rectangle; device `e * model + m` is at `(e, m)`."""

    expert: int
    """Groups of devices that share out the experts and repeat everything else."""
    model: int
    """Devices that share out heads, feed-forward columns and the vocabulary."""

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.expert * self.model

    def coordinates(self, device: int) -> tuple[int, int]:
        """Place of a device: `(expert, model)`."""
        return divmod(device, self.model)

    def __str__(self) -> str:
        return (
            f"model={self.model}"
            if self.expert == 1
            else f"expert={self.expert},model={self.model}"
        )

    @property
    def slug(self) -> str:
        """For folder names: `8` or `2x8`."""
        return f"{self.model}" if self.expert == 1 else f"{self.expert}x{self.model}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `model=8` or `expert=2,model=8`.

        Raises:
            InvalidValueError: The text has another form.
        """
        match = re.fullmatch(r"(?:expert=([0-9]{1,3}), *)?model=([0-9]{1,3})", text.strip(" "))
        if match is None:
            raise invalid("mesh", text, "expected the form expert=2,model=8", "--mesh model=8")
        return cls(int(match[1] or 1), int(match[2]))


@dataclass(frozen=True, slots=True)
class Placed:
    """A device's slices of a tensor, in the coordinates of the release."""

    weight: tuple[Slice, ...]
    """A slice for each axis of `spec.shape`."""
    scales: tuple[Slice, ...] | None
    """A slice for each axis of the scales; the row axis may repeat on several devices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight slice."""
        return tuple(stop - start for start, stop in self.weight)


def check_mesh(mesh: MeshShape, config: GrokConfig) -> None:
    """Refuse a mesh that cannot hold a model.

    Raises:
        PlacementError: The mesh has an impossible size, or a dimension of the model does not divide
            over it; the hint names the nearest mesh that works.
    """
    problem = _problem(mesh, config)
    if problem is None:
        return
    working = [
        candidate
        for size in MESH_SIZES
        for expert in MESH_SIZES
        if size % expert == 0
        and _problem(candidate := MeshShape(expert, size // expert), config) is None
    ]
    nearest = min(
        working,
        key=lambda other: (abs(other.size - mesh.size), other.expert, -other.model),
        default=None,
    )
    hint = None if nearest is None else f"--devices {nearest.size} --mesh {nearest}"
    raise PlacementError(f"mesh {mesh} cannot hold this model: {problem}", hint)


def mesh_for(devices: int, config: GrokConfig) -> MeshShape:
    """The default mesh: all devices on the `model` axis.

    Raises:
        PlacementError: See `check_mesh`.
    """
    mesh = MeshShape(1, devices)
    check_mesh(mesh, config)
    return mesh


def _problem(mesh: MeshShape, config: GrokConfig) -> str | None:
    if mesh.size not in MESH_SIZES or mesh.expert not in MESH_SIZES:
        sizes = ", ".join(map(str, MESH_SIZES))
        return f"it has {mesh.size} devices, possible are {sizes}"
    for whole, name, parts in (
        (config.num_experts, "experts", mesh.expert),
        (config.num_q_heads, "query heads", mesh.model),
        (config.ffn_size, "feed-forward columns", mesh.model),
        (config.vocab_size, "vocabulary entries", mesh.model),
    ):
        if whole % parts:
            return f"{whole} {name} do not divide by {parts}"
    kv = config.num_kv_heads
    if kv % mesh.model and mesh.model % kv:
        return f"{kv} key-value heads and {mesh.model} devices do not divide either way"
    if mesh.model > kv and (config.num_q_heads // kv) % (mesh.model // kv):
        return f"{config.num_q_heads // kv} query heads a key head over {mesh.model // kv} devices"
    return None


def place(
    spec: TensorSpec, *, scale_groups: int, mesh: MeshShape, device: int, config: GrokConfig
) -> Placed:
    """A device's part of a tensor.

    Args:
        spec: The parameter.
        scale_groups: Scale rows in the release; 0 without scales.
        mesh: A mesh that passed `check_mesh`.
        device: 0 to `mesh.size - 1`.
        config: The model.

    Raises:
        PlacementError: The scale rows do not line up with the split of the inputs.
    """
    weight = tuple(
        _axis_slice(axis, length, mesh, device, config)
        for axis, length in zip(spec.axes, spec.shape, strict=True)
    )
    if scale_groups == 0:
        return Placed(weight, None)
    rows = _scale_rows(spec, scale_groups, weight[-2])
    return Placed(weight, (*weight[:-2], rows, weight[-1]))


def _axis_slice(axis: Axis, length: int, mesh: MeshShape, device: int, config: GrokConfig) -> Slice:
    expert, model = mesh.coordinates(device)
    match axis:
        case Axis.EMBED | Axis.ROUTES:
            return (0, length)
        case Axis.EXPERTS:
            return _part(length, mesh.expert, expert)
        case Axis.KV_HEADS if mesh.model > config.num_kv_heads:
            # several devices share a key head: device m holds head m // copies
            copies = mesh.model // config.num_kv_heads
            return _part(length, config.num_kv_heads, model // copies)
        case Axis.KV_HEADS | Axis.Q_HEADS | Axis.FFN | Axis.VOCAB:
            return _part(length, mesh.model, model)


def _part(length: int, parts: int, index: int) -> Slice:
    size = length // parts
    return (index * size, (index + 1) * size)


def _scale_rows(spec: TensorSpec, groups: int, inputs: Slice) -> Slice:
    """Scale rows for a range of inputs: whole groups, or the one group that the range lies in."""
    size = spec.shape[-2] // groups
    start, stop = inputs
    first, last = start // size, (stop - 1) // size
    if first != last and (start % size or stop % size):
        raise PlacementError(
            f"{spec.name}: inputs {start} to {stop} cut its {groups} scale groups of {size}"
        )
    return (first, last + 1)


def read_mesh(devices: int | None, mesh: str | None) -> MeshShape | None:
    """The mesh for `--devices` and `--mesh`; None without both.

    Raises:
        InvalidValueError: The mesh is malformed, or has another number of devices.
    """
    if mesh is None:
        return None if devices is None else MeshShape(1, devices)
    shape = MeshShape.parse(mesh)
    if devices not in {None, shape.size}:
        hint = f"--devices {shape.size} --mesh {shape}"
        raise invalid("mesh", mesh, f"expected {devices} devices, found {shape.size}", hint)
    return shape
