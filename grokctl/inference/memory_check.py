"""Hold the memory that a run needs against what is there."""

import os
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from grokctl.errors import HardwareError
from grokctl.events import Noted, Observer
from grokctl.inference.devices import share_variable
from grokctl.machine.memory import memory
from grokctl.model.memory_share import MEMORY_SHARE, told_share
from grokctl.model.placement import MESH_SIZES
from grokctl.model.precision import Precision
from grokctl.model.sizing import Needs
from grokctl.text import format_bytes

_SHORTEST_ADVISED: Final = 128
"""Tokens of context: a hint with fewer would help nobody."""


def check_memory(needed: int, *, purpose: str, hint: str | None = None) -> None:
    """Refuse what cannot fit before the kernel has to kill it.

    Args:
        needed: Bytes of main memory.
        purpose: What they are for, for the error.
        hint: What to do then.

    Raises:
        HardwareError: Less is available.
    """
    usable = memory().usable
    if needed > usable:
        raise HardwareError(
            f"{purpose} takes {format_bytes(needed)} of memory, {format_bytes(usable)} are free",
            hint,
        )


def note_paging(needed: int, *, observe: Observer) -> None:
    """Say so where mapped weights do not all fit into memory.

    Args:
        needed: Bytes of weights, and of what must lie beside them.
        observe: Told.
    """
    usable = memory().usable
    if needed > usable:
        sizes = f"{format_bytes(needed)} of weights, {format_bytes(usable)} of free memory"
        observe(Noted(message=f"{sizes}: every token reads what does not fit from the disk"))


class DeviceMemory(Protocol):
    """What is asked of a device: `jax.Device` has it."""

    platform: str

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name, such as `bytes_limit`, where the platform counts them."""
        ...


def check_room(
    devices: Sequence[DeviceMemory],
    needed: Needs,
    *,
    context: int,
    precision: Precision = Precision.INT8,
    size: int | None = None,
) -> None:
    """Refuse what does not fit before any of it is read.

    Args:
        devices: Of the mesh, as far as they are this process's. Accelerators that do not count
            their memory are taken to have enough.
        needed: By each of them. Weights of a CPU are looked at when it is known whether they are
            mapped.
        context: Tokens that the cache is for.
        precision: Of the weights, for the hint.
        size: Devices of the mesh, if not all are this process's.

    Raises:
        HardwareError: One has less than that.
    """
    if devices[0].platform == "cpu":
        _check_main_memory(len(devices), needed, context=context)
        return
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            continue
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        if needed.total > free:
            if needed.total - free < _unclaimed(device, stats["bytes_limit"]):
                hint = f"{share_variable()}={MEMORY_SHARE} grokctl run …"
            else:
                count = size or len(devices)
                hint = _less(count, needed, context=context, free=free, precision=precision)
            raise HardwareError(
                f"{needed} take {format_bytes(needed.total)} on each device, {device} has "
                f"{format_bytes(free)} free",
                hint,
            )


def _check_main_memory(devices: int, needed: Needs, *, context: int) -> None:
    """Virtual devices share it, and nothing of this is mapped."""
    cache, workspace = needed.cache * devices, needed.workspace * devices
    fitting = _fitting(context, cache=cache, free=memory().usable - workspace)
    check_memory(
        cache + workspace,
        purpose=f"a context of {context} tokens (cache {format_bytes(cache)}, workspace "
        f"{format_bytes(workspace)})",
        hint=f"--context {fitting}" if fitting else None,
    )


def _less(devices: int, needed: Needs, *, context: int, free: int, precision: Precision) -> str:
    """How to need less on each device, what costs least first."""
    beside = needed.cache + needed.workspace
    fitting = _fitting(context, cache=needed.cache, free=free - needed.weights - needed.workspace)
    if fitting:
        return f"--context {fitting}"
    larger = (size for size in MESH_SIZES if size > devices)
    for size in larger:
        if needed.weights * devices // size + beside <= free:
            return f"--devices {size}"
    return "grokctl doctor" if precision is Precision.INT4 else "grokctl reshard --precision int4"


def _fitting(context: int, *, cache: int, free: int) -> int:
    """Tokens of context for which there is room; 0 if that is too few to help anybody."""
    tokens = context * free // cache if cache else 0
    return tokens if tokens >= _SHORTEST_ADVISED else 0


def _unclaimed(device: DeviceMemory, limit: int) -> int:
    """Bytes of a GPU that JAX leaves alone because it was told to take so little."""
    told = told_share(os.environ) or MEMORY_SHARE
    return max(0, int(limit * (MEMORY_SHARE / told - 1))) if device.platform == "gpu" else 0
