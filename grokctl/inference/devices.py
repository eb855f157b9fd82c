"""This machine's devices for a mesh, their memory, and its bandwidth."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Final

import jax
import numpy as np

from grokctl.errors import HardwareError
from grokctl.events import Noted, Observer, ignore
from grokctl.machine.facts import Accelerator
from grokctl.machine.host import bandwidth, cpu
from grokctl.model.memory_share import SHARE_VARIABLES
from grokctl.model.placement import MESH_SIZES
from grokctl.system import usable_cores

_CPU_DEVICES: Final = "JAX_NUM_CPU_DEVICES"
_PROBE_BYTES: Final = 2**28
_PROBE_ROUNDS: Final = 3
_PROBE_CALLS: Final = 16
"""Reads in flight on an accelerator: starting one takes as long as it runs."""


def find_devices(count: int, *, processes: int = 1, observe: Observer = ignore) -> list[jax.Device]:
    """The devices for a mesh: this machine's accelerators, or else virtual CPU devices.

    Must run before any other use of JAX, which fixes the number of CPU devices.

    Args:
        count: Devices of the mesh.
        processes: Processes that have equally many devices each. The devices of several come in the
            order of processes, and virtual devices never replace missing ones.
        observe: Receives a note if virtual devices replace missing ones.

    Raises:
        HardwareError: JAX was already started with fewer CPU devices, or a process has too few.
    """
    own = count // processes
    try:
        if jax.config.jax_num_cpu_devices < own:  # type: ignore[attr-defined]  # set at run time
            jax.config.update("jax_num_cpu_devices", own)
    except RuntimeError:
        pass  # JAX is running, with the devices that it has
    devices = jax.devices()
    if processes > 1:
        return _of_each(devices, own, processes)
    if devices[0].platform != "cpu" and len(devices) >= count:
        return devices[:count]
    cpus = jax.devices("cpu")
    if len(cpus) < count:
        is_set = bool(os.environ.get(_CPU_DEVICES))
        raise HardwareError(
            f"JAX runs with {len(cpus)} CPU devices, the mesh needs {count}",
            f"unset {_CPU_DEVICES}" if is_set else f"export {_CPU_DEVICES}={count}",
        )
    if devices[0].platform != "cpu":
        few = f"{len(devices)} {devices[0].device_kind}"
        observe(Noted(message=f"{few} for a mesh of {count}: runs on virtual CPU devices"))
    elif count > 1:
        cores = usable_cores()
        observe(Noted(message=f"runs on {count} virtual CPU devices over {cores} cores"))
    return cpus[:count]


def _of_each(devices: Sequence[jax.Device], own: int, processes: int) -> list[jax.Device]:
    """`own` devices of every process, in the order of processes.

    Raises:
        HardwareError: A process has fewer.
    """
    chosen = []
    for rank in range(processes):
        theirs = [device for device in devices if device.process_index == rank]
        if len(theirs) < own:
            raise HardwareError(
                f"rank {rank}: has {len(theirs)} devices, the mesh needs {own} of each of "
                f"{processes} processes"
            )
        chosen += sorted(theirs, key=lambda device: device.id)[:own]
    return chosen


def accelerators(processes: int = 1) -> tuple[Accelerator, ...]:
    """JAX's default devices of one kind; none if that is the CPU. Only this process's, of several.

    Starts JAX with as many CPU devices as the largest mesh has, unless the user set a number: the
    mesh is often chosen by this result, and unused devices cost nothing.

    Raises:
        HardwareError: JAX does not start.
    """
    with suppress(RuntimeError):  # JAX is running
        if jax.config.jax_num_cpu_devices < 1:  # type: ignore[attr-defined]  # set at run time
            jax.config.update("jax_num_cpu_devices", max(MESH_SIZES) // processes)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter if the plugin is missing
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # set at run time
        why = str(error).partition("\n")[0][:200] or f"nothing to compute on in {platforms!r}"
        hint = "unset JAX_PLATFORMS" if platforms else "grokctl doctor"
        raise HardwareError(f"JAX does not start: {why}", hint) from error
    if devices[0].platform == "cpu":
        return ()
    if processes > 1:  # JAX knows only the memory of its own process's devices
        devices = jax.local_devices()
    alike = takewhile(lambda device: device.device_kind == devices[0].device_kind, devices)
    return tuple(map(_accelerator, alike))


def _accelerator(device: jax.Device) -> Accelerator:
    """A device, with as much of its memory as JAX may take."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    capability = getattr(device, "compute_capability", "")
    return Accelerator(
        name=device.device_kind,
        platform=device.platform,
        memory=limit,
        free=None if limit is None else limit - stats.get("bytes_in_use", 0),
        compute_capability=_version(str(capability)),
    )


def _version(text: str) -> tuple[int, int] | None:
    """`9.0` as numbers; None for any other form, such as `gfx942`."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def share_variable() -> str:
    """The environment variable to set: JAX refuses to start with both."""
    return next((name for name in SHARE_VARIABLES if os.environ.get(name)), SHARE_VARIABLES[0])


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by itself: up to three times as fast as float32."""
    return cpu().has_fast_bfloat16


def memory_bandwidth(devices: list[jax.Device]) -> float:
    """Bytes a second that can be read from the memory of all devices together, measured now.

    Takes a quarter of a second on the CPU: every core reads a part of an array that fits no cache.
    Assumes that the memory of other processes is as fast.
    """
    if devices[0].platform == "cpu":
        return bandwidth() * len({device.process_index for device in devices})
    own = [device for device in devices if device.process_index == jax.process_index()]
    return sum(map(_device_bandwidth, own)) * len(devices) / len(own)


def _device_bandwidth(device: jax.Device) -> float:
    data = jax.device_put(np.ones(_PROBE_BYTES // 4, np.float32), device)
    read = jax.jit(lambda x: x.max())
    read(data).block_until_ready()
    best = 0.0
    for _ in range(_PROBE_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([read(data) for _ in range(_PROBE_CALLS)])
        best = max(best, _PROBE_CALLS * _PROBE_BYTES / (time.perf_counter() - start))
    return best
