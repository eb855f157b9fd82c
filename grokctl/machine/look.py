"""Inspect this machine: probes that may wait run at once, the measurement of memory alone."""

import os
import resource
import sys
from pathlib import Path
from typing import Final

from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.machine.accelerators import JaxProbe, probe_driver
from grokctl.machine.disks import probe_disks
from grokctl.machine.environment import software, surroundings
from grokctl.machine.facts import Machine
from grokctl.machine.host import cpu, probe_bytes
from grokctl.machine.kernel import probe_kernel
from grokctl.machine.limits import (
    ENOUGH_THREADS,
    limit_of,
    startable_threads,
    thread_limits,
)
from grokctl.machine.memory import memory
from grokctl.machine.network import network
from grokctl.machine.nodes import nodes
from grokctl.paths import Home

_DRIVER_S: Final = 2.0
"""Seconds for the driver before JAX allocates GPU memory, which would count as used."""


def look(
    home: Path,
    destination: Path | None,
    *,
    timeout_s: float = 20.0,
    is_measured: bool = True,
    observe: Observer = ignore,
) -> Machine:
    """Inspect this machine; anything that fails is a fact, not an error.

    Args:
        home: The folder of checkpoints.
        destination: The folder of a download, if it is elsewhere.
        timeout_s: Seconds to wait for each probe.
        is_measured: Whether to measure memory and disks, which takes two seconds.
        observe: Receives the names of the running probes.
    """
    folders = [("home", home)]
    if destination is not None:
        folders.append(("destination", destination))
    observe(Started(stage=Stage.LOOK, unit=Unit.NOTHING))

    observe(Advanced(stage=Stage.LOOK, detail="memory, NVIDIA driver"))
    driver = probe_driver(timeout_s=timeout_s)
    room = memory()
    processor = cpu(
        available=room.usable if is_measured else None
    )  # before other probes disturb it

    driver.wait(_DRIVER_S)
    observe(Advanced(stage=Stage.LOOK, detail="disks, JAX"))
    with JaxProbe(timeout_s=timeout_s) as jax_probe:
        disks = probe_disks(folders, tries=is_measured, timeout_s=timeout_s)
        environment = surroundings(os.environ)
        programs = software()
        net = network(os.environ, timeout_s=timeout_s)
        probed_disks = tuple(disks())
        observe(Advanced(stage=Stage.LOOK, detail="NVIDIA driver"))
        nvml = driver.answer()
        observe(Advanced(stage=Stage.LOOK, detail="JAX"))
        jax = jax_probe.report()
    kernel = None
    if not jax.accelerators:
        observe(Advanced(stage=Stage.LOOK, detail="kernel of the CPU"))
        nbytes = probe_bytes(memory().usable if is_measured else None)
        can_compile = probed_disks[0].is_writable  # and answers
        kernel = probe_kernel(Home(home).native_cache if can_compile else None, nbytes=nbytes)
    observe(Finished(stage=Stage.LOOK))

    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    return Machine(
        nvml=nvml,
        jax=jax,
        cpu=processor,
        memory=room,
        disks=probed_disks,
        software=programs,
        surroundings=environment,
        network=net,
        open_files=soft,
        open_files_most=hard,
        address_space=limit_of(resource.RLIMIT_AS),
        data_segment=limit_of(resource.RLIMIT_DATA),
        threads=startable_threads(ENOUGH_THREADS),
        thread_limits=tuple(thread_limits()),
        locked_memory=limit_of(resource.RLIMIT_MEMLOCK),
        kernel=kernel,
        nodes=nodes(),
    )


def _limit(value: int) -> int:
    return sys.maxsize if value == resource.RLIM_INFINITY else value
