"""Look at this machine: every probe that may wait at once, and the one that measures alone."""

import os
import resource
import sys
from pathlib import Path
from typing import Final

from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.machine.accelerators import AskingJax, asking_driver
from grokctl.machine.disks import asking_disks
from grokctl.machine.environment import software, surroundings
from grokctl.machine.facts import Machine
from grokctl.machine.host import cpu
from grokctl.machine.memory import memory
from grokctl.machine.network import network

_DRIVER_S: Final = 2.0
"""Seconds that the driver has before JAX takes memory of its GPUs, and it counts that as used."""


def look(
    home: Path,
    destination: Path | None,
    *,
    timeout_s: float = 20.0,
    is_measured: bool = True,
    observe: Observer = ignore,
) -> Machine:
    """Find out what this machine is; whatever it is, that is an answer and no error.

    Args:
        home: Where checkpoints are kept.
        destination: Where one would be written, if that is elsewhere.
        timeout_s: How long anything that does not answer is waited for.
        is_measured: Whether memory and disks are tried, which takes two seconds.
        observe: Told what is waited for.
    """
    folders = [("home", home)]
    if destination is not None:
        folders.append(("destination", destination))
    observe(Started(stage=Stage.LOOK, unit=Unit.NOTHING))

    observe(Advanced(stage=Stage.LOOK, detail="memory, NVIDIA driver"))
    driver = asking_driver(timeout_s=timeout_s)
    room = memory()
    processor = cpu(available=room.usable if is_measured else None)  # before others disturb it

    driver.wait(_DRIVER_S)
    observe(Advanced(stage=Stage.LOOK, detail="disks, JAX"))
    with AskingJax(timeout_s=timeout_s) as asking:
        disks = asking_disks(folders, tries=is_measured, timeout_s=timeout_s)
        told = surroundings(os.environ)
        programs = software()
        net = network(os.environ, timeout_s=timeout_s)
        found = tuple(disks())
        observe(Advanced(stage=Stage.LOOK, detail="NVIDIA driver"))
        nvml = driver.answer()
        observe(Advanced(stage=Stage.LOOK, detail="JAX"))
        jax = asking.report()
    observe(Finished(stage=Stage.LOOK))

    soft, hard = (_limit(number) for number in resource.getrlimit(resource.RLIMIT_NOFILE))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    return Machine(
        nvml=nvml,
        jax=jax,
        cpu=processor,
        memory=room,
        disks=found,
        software=programs,
        surroundings=told,
        network=net,
        open_files=soft,
        open_files_most=hard,
        address_space=None if space == resource.RLIM_INFINITY else space,
    )


def _limit(number: int) -> int:
    return sys.maxsize if number == resource.RLIM_INFINITY else number
