"""How the same model is stored in another precision: which scales every parameter has then."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from grokctl.checkpoint.tensor_source import Storage
from grokctl.errors import PlacementError, UsageError
from grokctl.model.config import GrokConfig
from grokctl.model.placement import MeshShape, place
from grokctl.model.precision import Precision
from grokctl.model.tensors import TensorSpec, tensor_specs

DEFAULT_GROUP: Final = 64
"""Inputs that share an int4 scale: measured in docs/adr/0008."""
LARGEST_GROUP: Final = 1024


def released_storage(config: GrokConfig) -> Storage:
    """How the release stores a model, as far as is published: no file is asked."""
    groups = {spec.name: spec.scale_groups for spec in tensor_specs(config)}
    return Storage(config=config, precision=Precision.INT8, groups=groups)


def storage_in(
    own: Storage, precision: Precision, mesh: MeshShape, *, group_size: int | None = None
) -> Storage:
    """How the same model is stored in another precision.

    Args:
        own: How it is stored now.
        precision: How it is to be stored.
        mesh: Whose every device must have whole int4 groups.
        group_size: Inputs that share an int4 scale; by default 64, or what the mesh allows.

    Raises:
        PlacementError: The mesh has no such groups.
        UsageError: A group size is given for another precision.
    """
    if group_size is not None and precision is not Precision.INT4:
        raise UsageError(
            f"group size {group_size} is for int4, not {precision}", "--precision int4"
        )
    if precision is Precision.INT8:
        return own
    groups = dict.fromkeys(own.groups, 0)
    if precision is Precision.INT4:
        specs = [spec for spec in tensor_specs(own.config) if spec.is_quantized]
        asked = dict.fromkeys((spec.name for spec in specs), group_size)
        if group_size is None and own.precision is Precision.INT4:
            asked = {spec.name: own.weight(spec).width for spec in specs}
        groups |= _int4_groups(own.config, specs, mesh, asked)
    return Storage(config=own.config, precision=precision, groups=groups)


def _int4_groups(
    config: GrokConfig,
    specs: Sequence[TensorSpec],
    mesh: MeshShape,
    asked: Mapping[str, int | None],
) -> dict[str, int]:
    """Scale rows of every parameter, so that every device has whole groups of inputs.

    Raises:
        PlacementError: There are none, or not of the size that was asked for.
    """
    inputs = {}
    for spec in specs:
        low, high = place(spec, scale_groups=0, mesh=mesh, device=0, config=config).weight[-2]
        inputs[spec] = high - low
    groups = {}
    for spec, count in inputs.items():
        if count % 2:
            raise PlacementError(
                f"{spec.name}: int4 needs an even number of inputs on a device, {mesh} has {count}",
                "--precision int8",
            )
        size = asked[spec.name]
        size = math.gcd(DEFAULT_GROUP, count) if size is None else size
        if not _divides(size, count):
            common = math.gcd(*inputs.values())
            possible = [
                number for number in range(2, LARGEST_GROUP + 1) if _divides(number, common)
            ]
            nearest = min(possible, key=lambda number: (abs(number - size), number), default=None)
            raise PlacementError(
                f"{spec.name}: int4 groups of {size} inputs do not divide the {count} of a device",
                "--precision int8" if nearest is None else f"--group-size {nearest}",
            )
        groups[spec.name] = spec.shape[-2] // size
    return groups


def _divides(group: int, inputs: int) -> bool:
    return 2 <= group <= LARGEST_GROUP and group % 2 == 0 and inputs % group == 0  # noqa: PLR2004
