"""How a model is stored in another precision: the number of scale groups of each parameter."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import PlacementError, invalid
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, place
from grokctl.model.precision import Precision
from grokctl.model.tensors import TensorSpec, tensor_specs

_DEFAULT_GROUP: Final = 64
"""Inputs per int4 scale: measured in docs/adr/0008."""
_LARGEST_GROUP: Final = 1024


def released_storage(config: GrokConfig) -> Storage:
    """How the release stores a model, by the published shapes; reads no file."""
    groups = {spec.name: spec.scale_groups for spec in tensor_specs(config)}
    return Storage(config=config, precision=Precision.INT8, groups=groups)


def storage_in(
    own: Storage, precision: Precision, mesh: MeshShape, *, group_size: int | None = None
) -> Storage:
    """How the same model is stored in another precision.

    Args:
        own: How it is stored now.
        precision: The new precision.
        mesh: Every device of it must have whole int4 groups.
        group_size: Inputs per int4 scale; by default 64, or the most that the mesh allows.

    Raises:
        PlacementError: The mesh does not allow such groups.
        InvalidValueError: A group size is given for a precision other than int4.
    """
    if group_size is not None and precision is not Precision.INT4:
        raise invalid(
            "group_size",
            group_size,
            f"expected precision int4, found {precision}",
            "--precision int4",
        )
    if precision is Precision.INT8:
        return own
    groups = dict.fromkeys(own.groups, 0)
    if precision is Precision.INT4:
        specs = [spec for spec in tensor_specs(own.config) if spec.is_quantized]
        sizes = dict.fromkeys((spec.name for spec in specs), group_size)
        if group_size is None and own.precision is Precision.INT4:
            sizes = {spec.name: own.weight(spec).width for spec in specs}
        groups |= _int4_groups(own.config, specs, mesh, sizes)
    return Storage(config=own.config, precision=precision, groups=groups)


def _int4_groups(
    config: GrokConfig,
    specs: Sequence[TensorSpec],
    mesh: MeshShape,
    sizes: Mapping[str, int | None],
) -> dict[str, int]:
    """Scale groups of every parameter, such that every device has whole groups of inputs.

    Args:
        config: The model.
        specs: Its quantized parameters.
        mesh: The devices.
        sizes: Inputs per group of each parameter; None for the default.

    Raises:
        PlacementError: The mesh does not allow groups, or none of this size.
    """
    inputs = {}
    for spec in specs:
        low, high = place(spec, scale_groups=0, mesh=mesh, device=0, config=config).weight[-2]
        inputs[spec] = high - low
    groups = {}
    for spec, count in inputs.items():
        if count % 2:
            raise PlacementError(
                f"{spec.name}: expected an even number of inputs on a device, {mesh} has {count}",
                "--precision int8",
            )
        size = sizes[spec.name]
        size = math.gcd(_DEFAULT_GROUP, count) if size is None else size
        if not _divides(size, count):
            common = math.gcd(*inputs.values())
            possible = [group for group in range(2, _LARGEST_GROUP + 1) if _divides(group, common)]
            nearest = min(possible, key=lambda group: (abs(group - size), group), default=None)
            raise PlacementError(
                f"{spec.name}: int4 groups of {size} do not divide {count} inputs of a device",
                "--precision int8" if nearest is None else f"--group-size {nearest}",
            )
        groups[spec.name] = spec.shape[-2] // size
    return groups


def _divides(group: int, inputs: int) -> bool:
    return 2 <= group <= _LARGEST_GROUP and group % 2 == 0 and inputs % group == 0  # noqa: PLR2004
