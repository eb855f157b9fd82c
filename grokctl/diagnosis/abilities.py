"""What can be done with Grok-1 on this machine: download, reshard, run, and the commands."""

from typing import Final

from grokctl.checks import Status
from grokctl.diagnosis.accelerators import CHECKS as ACCELERATORS
from grokctl.diagnosis.accelerators import IMAGINED, idle
from grokctl.diagnosis.disks import (
    USUAL,
    about,
    download_disk,
    home_disk,
    other_place,
    reshard_command,
    share_room,
)
from grokctl.diagnosis.inventory import (
    Inventory,
    KeptReady,
    largest_file,
    ready_nbytes,
    release_nbytes,
)
from grokctl.diagnosis.outlook import Ability, Prospect, run_elsewhere
from grokctl.machine.disks import file_limit
from grokctl.machine.facts import Disk, Found, Machine
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.paths import quoted
from grokctl.planning.plans import Plan
from grokctl.text import format_bytes

_RATES: Final = (10e6, 100e6)
"""Bytes a second of common networks."""


def download(machine: Machine, inventory: Inventory, best: Plan | None) -> Ability:
    """Whether the release can be downloaded, if it is needed."""
    name, disk, kept = "download", download_disk(machine), inventory.grok_1
    command = f"grokctl fetch{_to(disk)}{_home(inventory)}"
    ready = fitting(inventory, best) or inventory.lossless
    if ready is not None:
        detail = f"not needed: {ready.name} is ready"
        return Ability(name=name, status=Status.SKIP, detail=detail)
    if kept is not None and kept.is_complete:
        detail = f"done: {format_bytes(release_nbytes(GROK_1))} in {kept.root}"
        check = f"grokctl verify {quoted(kept.root)}"
        return Ability(name=name, status=Status.SKIP, detail=detail, command=check)
    left = inventory.to_download
    if disk is None or disk.free is None:
        detail = f"{format_bytes(left)}; free space is unknown"
        return Ability(name=name, status=Status.SKIP, detail=detail, command=command)
    if not disk.is_writable:
        detail = f"no: {disk.path} cannot be written to"
        return Ability(name=name, status=Status.FAIL, detail=detail, command=other_place(disk))
    if disk.free < left:
        detail = f"no: expected {format_bytes(left)} free, found {format_bytes(disk.free)}"
        return Ability(name=name, status=Status.FAIL, detail=detail, command=other_place(disk))
    rates = [min(rate, disk.write_rate or rate) for rate in _RATES]
    times = " or ".join(
        f"{about(left / rate)} at {rate / 1e6:.0f} MB/s" for rate in dict.fromkeys(rates)
    )
    started = "" if kept is None or not kept.nbytes else ", the rest is on disk"
    detail = f"yes: {format_bytes(left)}{started}; {times}"
    return Ability(name=name, status=Status.OK, detail=detail, command=command)


def reshard(machine: Machine, inventory: Inventory, best: Plan | None) -> Ability:
    """Whether the release can be resharded for the best plan, and how long that takes."""
    name = "reshard"
    precision, mesh = (best.precision, best.mesh) if best is not None else USUAL
    disk, target = home_disk(machine), download_disk(machine)
    command = reshard_command(precision, mesh, _source(target, inventory)) + _home(inventory)
    ready = fitting(inventory, best)
    if ready is not None:
        detail = f"done: {ready.name}, {format_bytes(ready.nbytes)}"
        return Ability(name=name, status=Status.SKIP, detail=detail)
    nbytes = ready_nbytes(precision, mesh)
    if disk is None or disk.free is None:
        detail = f"{format_bytes(nbytes)}; free space is unknown"
        return Ability(name=name, status=Status.SKIP, detail=detail, command=command)
    other = f"{command} --out DIR"
    problem = _no_room(disk, target, inventory, precision, mesh)
    if not _can_download(target, inventory.to_download):
        problem = "the download comes first, and does not fit"
        other = f"{reshard_command(precision, mesh)} --home DIR"
    if problem:
        return Ability(name=name, status=Status.FAIL, detail=f"no: {problem}", command=other)
    time = _reshard_time(disk, target, nbytes)
    after = " after the download" if inventory.to_download else ""
    output = f"{format_bytes(nbytes)} at {precision} for {mesh}"
    return Ability(
        name=name, status=Status.OK, detail=f"yes{after}, {time}: {output}", command=command
    )


def _can_download(disk: Disk | None, left: int) -> bool:
    """Whether the rest of the release fits on the disk."""
    return not left or (disk is not None and disk.is_writable and (disk.free or 0) >= left)


def _no_room(
    disk: Disk, target: Disk | None, inventory: Inventory, precision: Precision, mesh: MeshShape
) -> str:
    """Why device files cannot be written; empty if they can."""
    if not disk.is_writable:
        return f"{disk.path} cannot be written to"
    nbytes, largest = ready_nbytes(precision, mesh), largest_file(precision, mesh)
    limit = file_limit(disk.file_system)
    if limit is not None and largest >= limit:
        return (
            f"a device file has {format_bytes(largest)}, {disk.file_system} limits files to"
            f" {format_bytes(limit)}"
        )
    left = inventory.to_download if share_room(disk, target) else 0
    also = " in addition to the download" if left else ""
    free = max(0, (disk.free or 0) - left)
    if free < nbytes:
        return f"expected {format_bytes(nbytes)} free{also}, found {format_bytes(free)}"
    return ""


def _reshard_time(disk: Disk, target: Disk | None, nbytes: int) -> str:
    """The time of a reshard: reading and writing overlap, unless they share a disk."""
    if not disk.write_rate or target is None or not target.read_rate:
        return "time unknown before the download (--dry-run measures it)"
    reading, writing = release_nbytes(GROK_1) / target.read_rate, nbytes / disk.write_rate
    is_shared = share_room(disk, target)
    seconds = reading + writing if is_shared else max(reading, writing)
    return f"about {about(seconds)} at the speed of the disk{'' if is_shared else 's'}"


def run(machine: Machine, inventory: Inventory, prospect: Prospect, cut: Ability) -> Ability:
    """Whether the model can be run, how fast, and what is missing if not.

    Args:
        machine: This machine.
        inventory: The checkpoints under home.
        prospect: The best plan.
        cut: Whether the release can be resharded for it.
    """
    ability, best = run_elsewhere(prospect), prospect.best
    command = f"{ability.command}{_home(inventory)}" if best is not None else ability.command
    would = ability.detail.removeprefix("yes, ").removeprefix("yes: ")
    if machine.jax.found in {Found.FAILED, Found.ABSENT} or idle(machine):
        detail = f"no: JAX must be fixed first; then {would}"
        return Ability(name="run", status=Status.FAIL, detail=detail, command=_fix_of_jax(machine))
    if best is None or fitting(inventory, best) is not None or cut.status is not Status.FAIL:
        return Ability(name="run", status=ability.status, detail=ability.detail, command=command)
    has_weights = inventory.grok_1 is not None and inventory.grok_1.is_complete
    if has_weights and not best.is_paged:
        detail = f"{ability.detail}; from the release, resharded at every start"
        return Ability(name="run", status=Status.WARN, detail=detail, command=command)
    detail = f"no: the weights do not fit on the disk; with enough space, {would}"
    return Ability(name="run", status=Status.FAIL, detail=detail, command=IMAGINED)


def _fix_of_jax(machine: Machine) -> str:
    """The command that makes JAX use the accelerators."""
    made = (check for look in ACCELERATORS for check in look(machine))
    return next((check.fix for check in made if check.status is Status.FAIL and check.fix), "")


def fitting(inventory: Inventory, best: Plan | None) -> KeptReady | None:
    """The ready checkpoint for a plan, if there is one; preferably of the same mesh."""
    if best is None:
        return None
    usable = [
        kept
        for kept in inventory.ready_grok_1
        if kept.precision is best.precision and (kept.is_mapped or not best.is_paged)
    ]
    return min(usable, key=lambda kept: (kept.mesh != best.mesh, kept.name), default=None)


def _source(target: Disk | None, inventory: Inventory) -> str:
    """The CHECKPOINT argument of a reshard; empty if it finds the source by itself."""
    kept, lossless = inventory.grok_1, inventory.lossless
    if kept is not None and kept.is_complete:
        is_alone = len(inventory.releases) == 1 and not inventory.ready
        return "" if is_alone else f"{quoted(kept.root)} "
    if lossless is not None:
        return f"{quoted(lossless.root)} "
    if target is not None and target.purpose == "destination":
        return f"{quoted(target.path)} "
    is_alone = not inventory.ready and all(item == kept for item in inventory.releases)
    if is_alone:
        return ""
    return f"{quoted(inventory.home / 'releases' / 'grok-1' if kept is None else kept.root)} "


def _home(inventory: Inventory | None) -> str:
    if inventory is None or inventory.is_default:
        return ""
    return f" --home {quoted(inventory.home)}"


def _to(disk: Disk | None) -> str:
    is_elsewhere = disk is not None and disk.purpose == "destination"
    return f" --to {quoted(disk.path)}" if disk is not None and is_elsewhere else ""
