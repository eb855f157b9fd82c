"""Checks of disks: room for 318 GB and as much again, and what kind of disk it is."""

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
"""What most people will make."""
_SMALLEST: Final = (Precision.INT4, MeshShape(1, MESH_SIZES[-1]))
"""Of all ready checkpoints, the one with the smallest files."""
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_OF_CONTAINERS: Final = frozenset({"overlay", "overlayfs", "aufs"})
_LONGEST_LOAD_S: Final = 3600
_MOST_NAMED: Final = 5


def home_disk(machine: Machine) -> Disk | None:
    """Where ready checkpoints go, and downloads unless they are told otherwise."""
    return next((disk for disk in machine.disks if disk.purpose == "home"), None)


def download_disk(machine: Machine) -> Disk | None:
    """Where the download goes."""
    return next(
        (disk for disk in machine.disks if disk.purpose == "destination"), home_disk(machine)
    )


def share_room(one: Disk | None, other: Disk | None) -> bool:
    """Whether two folders lie on one disk, as far as can be told."""
    if one is None or other is None:
        return False
    return one is other or (one.device is not None and one.device == other.device)


def other_place(disk: Disk | None) -> str:
    """How to download to another disk than this one."""
    option = "--to" if disk is not None and disk.purpose == "destination" else "--home"
    return f"grokctl fetch {option} DIR"


def reshard_command(precision: Precision, mesh: MeshShape, source: str = "") -> str:
    """The line that cuts a release."""
    shape = f"--devices {mesh.size}" if mesh.expert == 1 else f"--mesh {mesh}"
    kind = "" if precision is Precision.INT8 else f" --precision {precision}"
    return f"grokctl reshard {source}{shape}{kind}"


def checks(
    machine: Machine, inventory: Inventory, wanted: tuple[Precision, MeshShape] = USUAL
) -> Iterator[Check]:
    """Everything about every disk.

    Args:
        machine: Whose disks.
        inventory: What lies under home.
        wanted: What would be made.
    """
    if not machine.disks:
        yield Check("home", Status.SKIP, "was not looked at")
    for disk in machine.disks:
        yield _place(disk, inventory)
        yield from _kind(disk)
        yield from _room(disk, machine, inventory, wanted)
        yield from _speed(disk)
    yield from _kept(inventory)


def _place(disk: Disk, inventory: Inventory) -> Check:
    """Whether it can be written to."""
    if disk.is_writable:
        system = f" ({disk.file_system})" if disk.file_system else ""
        return Check(disk.purpose, Status.OK, f"{disk.path}{system} can be written to")
    why = f" ({disk.error})" if disk.error else ""
    detail = f"{disk.path} cannot be written to{why}"
    if disk.purpose == "home" and inventory.ready_grok_1:
        detail += ", what is in it can be run"
        return Check(disk.purpose, Status.WARN, detail, "grokctl reshard --devices 8 --out DIR")
    return Check(disk.purpose, Status.FAIL, detail, other_place(disk))


def _kind(disk: Disk) -> Iterator[Check]:
    """Whether the file system is one for this."""
    name, kind, fix = f"kind of {disk.purpose}", disk.file_system, other_place(disk)
    if (limit := file_limit(disk.file_system)) is not None:
        release, least = largest_released_file(), largest_file(*_SMALLEST)
        detail = (
            f"{kind} ends files at {format_bytes(limit)}: the largest of the release has "
            f"{format_bytes(release)}, those of a device {format_bytes(least)} or more"
        )
        is_all = max(release, least) < limit
        yield Check(name, Status.OK if is_all else Status.FAIL, detail, "" if is_all else fix)
    elif kind in _IN_MEMORY:
        detail = f"{kind} takes main memory, and is empty after a restart"
        yield Check(name, Status.WARN, detail, fix)
    elif disk.is_remote:
        detail = (
            f"{kind or 'not of this machine'}: reached over a network or through FUSE, "
            "so a local disk loads faster"
        )
        yield Check(name, Status.WARN, detail, fix)
    elif kind in _OF_CONTAINERS:
        detail = f"{kind}: what is written here goes when the container does"
        yield Check(name, Status.WARN, detail, fix)


def _room(
    disk: Disk, machine: Machine, inventory: Inventory, made: tuple[Precision, MeshShape]
) -> Iterator[Check]:
    """Whether there is room for what is to come here."""
    name = f"room in {disk.purpose}"
    if disk.free is None:
        yield Check(name, Status.SKIP, "is not known")
        return
    home, there = home_disk(machine), download_disk(machine)
    has_ready = bool(inventory.ready_grok_1)
    download = 0 if has_ready else inventory.to_download
    if disk is not there and not share_room(disk, there):
        download = 0
    ready = 0 if has_ready or not (disk is home or share_room(disk, home)) else ready_nbytes(*made)
    free = f"{format_bytes(disk.free)} are free"
    parts = [
        f"{format_bytes(nbytes)} {what}"
        for nbytes, what in ((download, "to download"), (ready, "to reshard"))
        if nbytes
    ]
    wanted = " and ".join(parts)
    if download + ready <= disk.free:
        yield Check(name, Status.OK, f"{free}, {wanted} fit" if wanted else free)
    elif download <= disk.free:
        fix = f"{reshard_command(*made)} --out DIR"
        yield Check(name, Status.WARN, f"{free}, expected {wanted}", fix)
    else:
        yield Check(name, Status.WARN, f"{free}, expected {wanted}", other_place(disk))


def _speed(disk: Disk) -> Iterator[Check]:
    """How fast it is, where that was measured."""
    name = f"speed of {disk.purpose}"
    rates = [
        f"{verb} {format_rate(rate)}"
        for verb, rate in (("reads", disk.read_rate), ("writes", disk.write_rate))
        if rate
    ]
    if not rates:
        why = f" ({disk.error})" if disk.error and disk.is_writable else ""
        yield Check(name, Status.SKIP, f"was not measured{why}")
        return
    detail = ", ".join(rates)
    seconds = release_nbytes(GROK_1) / disk.read_rate if disk.read_rate else 0.0
    if seconds > _LONGEST_LOAD_S:
        detail += f": to read {format_bytes(release_nbytes(GROK_1))} takes {about(seconds)}"
        yield Check(name, Status.WARN, detail, other_place(disk))
    else:
        yield Check(name, Status.OK, detail)


def about(seconds: float) -> str:
    """`12 seconds`, `53 minutes`, `8.8 hours`, `3.1 days`."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:  # 89 minutes say more than 1.5 hours
            count = seconds / size
            return f"{count:.0f} {unit}" if unit == "minutes" else f"{count:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.1g} seconds"  # noqa: PLR2004


def _kept(inventory: Inventory) -> Iterator[Check]:
    """What is there already, and whether it is whole."""
    if inventory.error:
        yield Check("checkpoints", Status.WARN, inventory.error, f"ls -ld {quoted(inventory.home)}")
    everything: tuple[KeptRelease | KeptReady, ...] = (*inventory.releases, *inventory.ready)
    damaged = [kept for kept in everything if kept.damage]
    for broken in damaged[:_MOST_NAMED]:
        detail = f"{broken.name} cannot be used: {broken.damage}"
        yield Check("checkpoints", Status.WARN, detail, f"grokctl verify {quoted(broken.root)}")
    mute = [kept for kept in inventory.ready_grok_1 if not kept.has_tokenizer]
    for kept in mute[:_MOST_NAMED]:
        detail = f"{kept.name} has no {TOKENIZER}, so it takes no text"
        yield Check("tokenizer", Status.WARN, detail, f"cp {TOKENIZER} {quoted(kept.root)}")
    names = [kept.name for kept in inventory.ready if kept.is_whole]
    names += [
        kept.name if kept.is_complete else f"{kept.name} (not all of it)"
        for kept in inventory.releases
        if not kept.damage
    ]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    if names:
        detail = f"{', '.join(names[:_MOST_NAMED])}{more}"
        yield Check("checkpoints", Status.OK, detail)
    elif not damaged and not inventory.error:
        yield Check("checkpoints", Status.OK, "none yet")
