"""Compare the memory that a run needs with the memory that is free."""

import os
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from grokctl.errors import HardwareError
from grokctl.events import Noted, Observer
from grokctl.inference.devices import share_variable
from grokctl.machine.memory import memory
from grokctl.model.memory_share import MEMORY_SHARE, environment_share
from grokctl.model.placement import MESH_SIZES
from grokctl.model.precision import Precision
from grokctl.model.sizing import Needs
from grokctl.text import format_bytes

_SHORTEST_ADVISED: Final = 128
"""Tokens of context: a hint with fewer would help nobody."""


def check_memory(needed: int, *, purpose: str, hint: str | None = None) -> None:
    """Refuse an allocation that cannot fit, before the kernel kills the process for it.

    Args:
        needed: Bytes of main memory.
        purpose: Subject of the error.
        hint: Hint of the error.

    Raises:
        HardwareError: Less memory is available.
    """
    usable = memory().usable
    if needed > usable:
        raise HardwareError(
            f"{purpose} takes {format_bytes(needed)} of memory, {format_bytes(usable)} are free",
            hint,
        )


def note_paging(needed: int, *, observe: Observer) -> None:
    """Note that mapped weights do not all fit into memory, if so.

    Args:
        needed: Bytes of weights, and of cache and workspace beside them.
        observe: Receives the note.
    """
    usable = memory().usable
    if needed > usable:
        sizes = f"{format_bytes(needed)} of weights, {format_bytes(usable)} of free memory"
        what = f"{sizes}: every token reads what does not fit from the disk"
        observe(Noted(message=f"{what}; as one device it streams (grokctl reshard --devices 1)"))


class DeviceMemory(Protocol):
    """The part of `jax.Device` that the check needs."""

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
    """Refuse a run that does not fit, before its weights are read.

    Args:
        devices: This process's devices of the mesh. Accelerators that do not count their memory are
            assumed to have enough.
        needed: Bytes on each device. Weights of a CPU are checked later, when it is known whether
            they are mapped.
        context: Tokens of the cache.
        precision: Precision of the weights, for the hint.
        size: Devices of the mesh, if other processes have some.

    Raises:
        HardwareError: A device has less memory.
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
                hint = f"export {share_variable()}={MEMORY_SHARE}"
            else:
                count = size or len(devices)
                hint = _less(count, needed, context=context, free=free, precision=precision)
            raise HardwareError(
                f"{needed} take {format_bytes(needed.total)} on each device, {device} has "
                f"{format_bytes(free)} free",
                hint,
            )


def _check_main_memory(devices: int, needed: Needs, *, context: int) -> None:
    """Check cache and workspace of virtual devices, which share main memory."""
    cache, workspace = needed.cache * devices, needed.workspace * devices
    fitting = _fitting(context, cache=cache, free=memory().usable - workspace)
    check_memory(
        cache + workspace,
        purpose=f"a context of {context} tokens (cache {format_bytes(cache)}, workspace "
        f"{format_bytes(workspace)})",
        hint=f"--context {fitting}" if fitting else None,
    )


def _less(devices: int, needed: Needs, *, context: int, free: int, precision: Precision) -> str:
    """The cheapest way to need less on each device."""
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
    """Tokens of context that fit; 0 if they are too few to advise."""
    tokens = context * free // cache if cache else 0
    return tokens if tokens >= _SHORTEST_ADVISED else 0


def _unclaimed(device: DeviceMemory, limit: int) -> int:
    """Bytes of a GPU that JAX leaves free because the environment sets a smaller share."""
    share = environment_share(os.environ) or MEMORY_SHARE
    return max(0, int(limit * (MEMORY_SHARE / share - 1))) if device.platform == "gpu" else 0
