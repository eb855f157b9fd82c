"""Checks of disks: space for 318 GB and as much again, type of file system, and speed."""

from collections.abc import Iterator
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis.inventory import (
    Inventory,
    KeptReady,
    KeptRelease,
    largest_file,
    largest_released_file,
    ready_nbytes,
    release_nbytes,
)
from grokctl.machine.disks import file_limit
from grokctl.machine.facts import Disk, Machine
from grokctl.model.config import GROK_1
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.model.precision import Precision
from grokctl.paths import TOKENIZER, quoted
from grokctl.text import format_bytes, format_rate

USUAL: Final = (Precision.INT8, MeshShape(1, 8))
"""The most common checkpoint."""
_SMALLEST: Final = (Precision.INT4, MeshShape(1, MESH_SIZES[-1]))
"""The ready checkpoint with the smallest files."""
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_OF_CONTAINERS: Final = frozenset({"overlay", "overlayfs", "aufs"})
_LONGEST_LOAD_S: Final = 3600
_MOST_NAMED: Final = 5


def home_disk(machine: Machine) -> Disk | None:
    """The disk of ready checkpoints, and of downloads by default."""
    return next((disk for disk in machine.disks if disk.purpose == "home"), None)


def download_disk(machine: Machine) -> Disk | None:
    """The disk of the download."""
    return next(
        (disk for disk in machine.disks if disk.purpose == "destination"), home_disk(machine)
    )


def share_room(one: Disk | None, other: Disk | None) -> bool:
    """Whether two folders are on the same disk, as far as known."""
    if one is None or other is None:
        return False
    return one is other or (one.device is not None and one.device == other.device)


def other_place(disk: Disk | None) -> str:
    """The command to download to another disk."""
    option = "--to" if disk is not None and disk.purpose == "destination" else "--home"
    return f"grokctl fetch {option} DIR"


def reshard_command(precision: Precision, mesh: MeshShape, source: str = "") -> str:
    """The command that reshards a release."""
    shape = f"--devices {mesh.size}" if mesh.expert == 1 else f"--mesh {mesh}"
    stored = "" if precision is Precision.INT8 else f" --precision {precision}"
    return f"grokctl reshard {source}{shape}{stored}"


def checks(
    machine: Machine, inventory: Inventory, wanted: tuple[Precision, MeshShape] = USUAL
) -> Iterator[Check]:
    """All checks of all disks.

    Args:
        machine: Has the disks.
        inventory: The checkpoints under home.
        wanted: The ready checkpoint to make.
    """
    if not machine.disks:
        yield Check("home", Status.SKIP, "not checked")
    for disk in machine.disks:
        yield _place(disk, inventory)
        yield from _kind(disk)
        yield from _lacks(disk)
        yield from _room(disk, machine, inventory, wanted)
        yield from _speed(disk)
    yield from _kept(inventory)


def _place(disk: Disk, inventory: Inventory) -> Check:
    """Whether it can be written to."""
    if disk.is_writable:
        system = f" ({disk.file_system})" if disk.file_system else ""
        return Check(disk.purpose, Status.OK, f"{disk.path}{system} can be written to")
    reason = f" ({disk.error})" if disk.error else ""
    detail = f"{disk.path} cannot be written to{reason}"
    if disk.purpose == "home" and inventory.ready_grok_1:
        detail += ", but its checkpoints can be run"
        return Check(disk.purpose, Status.WARN, detail, "grokctl reshard --devices 8 --out DIR")
    return Check(disk.purpose, Status.FAIL, detail, other_place(disk))


def _kind(disk: Disk) -> Iterator[Check]:
    """Whether the type of file system is suitable."""
    name, system, fix = f"kind of {disk.purpose}", disk.file_system, other_place(disk)
    if (limit := file_limit(disk.file_system)) is not None:
        release, least = largest_released_file(), largest_file(*_SMALLEST)
        detail = (
            f"{system} limits files to {format_bytes(limit)}: the largest released file has "
            f"{format_bytes(release)}, a device file {format_bytes(least)} or more"
        )
        fits = max(release, least) < limit
        yield Check(name, Status.OK if fits else Status.FAIL, detail, "" if fits else fix)
    elif system in _IN_MEMORY:
        detail = f"{system} uses main memory, and is lost on restart"
        yield Check(name, Status.WARN, detail, fix)
    elif disk.is_remote:
        detail = (
            f"{system or 'remote'}: on a network or through FUSE, so a local disk would be faster"
        )
        yield Check(name, Status.WARN, detail, fix)
    elif system in _OF_CONTAINERS:
        detail = f"{system}: files here are deleted with the container"
        yield Check(name, Status.WARN, detail, fix)


def _lacks(disk: Disk) -> Iterator[Check]:
    """Operations that the file system lacks; everything works without them."""
    if not disk.lacks:
        return
    detail = f"{disk.file_system or 'this file system'} has no {', '.join(disk.lacks)}"
    if "locks" in disk.lacks:
        detail += ": start only one fetch into a folder at a time"
    elif "folder syncs" in disk.lacks:
        detail += ": after a power cut, verify what was written last"
    else:
        detail += ", which is good to have, and not needed"
    is_needed = {"locks", "folder syncs"} & set(disk.lacks)
    status = Status.WARN if is_needed else Status.OK
    yield Check(
        f"features of {disk.purpose}", status, detail, other_place(disk) if is_needed else ""
    )


def _room(
    disk: Disk, machine: Machine, inventory: Inventory, wanted: tuple[Precision, MeshShape]
) -> Iterator[Check]:
    """Whether there is space for the download and for the ready checkpoint."""
    name = f"room in {disk.purpose}"
    if disk.free is None:
        yield Check(name, Status.SKIP, "unknown")
        return
    home, target = home_disk(machine), download_disk(machine)
    has_ready = bool(inventory.ready_grok_1)
    download = 0 if has_ready else inventory.to_download
    if disk is not target and not share_room(disk, target):
        download = 0
    ready = (
        0 if has_ready or not (disk is home or share_room(disk, home)) else ready_nbytes(*wanted)
    )
    free = f"{format_bytes(disk.free)} are free"
    parts = [
        f"{format_bytes(nbytes)} {purpose}"
        for nbytes, purpose in ((download, "to download"), (ready, "to reshard"))
        if nbytes
    ]
    needs = " and ".join(parts)
    if download + ready <= disk.free:
        yield Check(name, Status.OK, f"{free}, {needs} fit" if needs else free)
    elif download <= disk.free:
        fix = f"{reshard_command(*wanted)} --out DIR"
        yield Check(name, Status.WARN, f"{free}, expected {needs}", fix)
    else:
        yield Check(name, Status.WARN, f"{free}, expected {needs}", other_place(disk))


def _speed(disk: Disk) -> Iterator[Check]:
    """Its measured speed."""
    name = f"speed of {disk.purpose}"
    rates = [
        f"{verb} {format_rate(rate)}"
        for verb, rate in (("reads", disk.read_rate), ("writes", disk.write_rate))
        if rate
    ]
    if not rates:
        reason = f" ({disk.error})" if disk.error and disk.is_writable else ""
        yield Check(name, Status.SKIP, f"not measured{reason}")
        return
    detail = ", ".join(rates)
    seconds = release_nbytes(GROK_1) / disk.read_rate if disk.read_rate else 0.0
    if seconds > _LONGEST_LOAD_S:
        detail += f": reading {format_bytes(release_nbytes(GROK_1))} takes {about(seconds)}"
        yield Check(name, Status.WARN, detail, other_place(disk))
    else:
        yield Check(name, Status.OK, detail)


def about(seconds: float) -> str:
    """`12 seconds`, `53 minutes`, `8.8 hours`, `3.1 days`."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:  # 89 minutes are more precise than 1.5 hours
            count = seconds / size
            return f"{count:.0f} {unit}" if unit == "minutes" else f"{count:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.1g} seconds"  # noqa: PLR2004


def _kept(inventory: Inventory) -> Iterator[Check]:
    """The checkpoints under home, and whether they are complete."""
    if inventory.error:
        yield Check("checkpoints", Status.WARN, inventory.error, f"ls -ld {quoted(inventory.home)}")
    everything: tuple[KeptRelease | KeptReady, ...] = (*inventory.releases, *inventory.ready)
    damaged = [kept for kept in everything if kept.damage]
    for broken in damaged[:_MOST_NAMED]:
        detail = f"{broken.name} cannot be used: {broken.damage}"
        yield Check("checkpoints", Status.WARN, detail, f"grokctl verify {quoted(broken.root)}")
    mute = [kept for kept in inventory.ready_grok_1 if not kept.has_tokenizer]
    for kept in mute[:_MOST_NAMED]:
        detail = f"{kept.name} has no {TOKENIZER}, so it only accepts token ids"
        yield Check("tokenizer", Status.WARN, detail, f"cp {TOKENIZER} {quoted(kept.root)}")
    names = [kept.name for kept in inventory.ready if kept.is_whole]
    names += [
        kept.name if kept.is_complete else f"{kept.name} (incomplete)"
        for kept in inventory.releases
        if not kept.damage
    ]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    if names:
        detail = f"{', '.join(names[:_MOST_NAMED])}{more}"
        yield Check("checkpoints", Status.OK, detail)
    elif not damaged and not inventory.error:
        yield Check("checkpoints", Status.OK, "none yet")
