"""Who can change a file: this user and root only, as ssh asks of its keys, or others as well."""

import errno
import grp
import os
import pwd
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

MOST_LINKS: Final = 40
"""Links that are followed in one path, as by the kernel."""
_ACL: Final = "system.posix_acl_access"
_ACL_USER, _ACL_OWN_GROUP, _ACL_GROUP, _ACL_MASK = 0x02, 0x04, 0x08, 0x10
_ACL_WRITE: Final = 0x02
_MOUNTS: Final = Path("/proc/self/mountinfo")
_SERVER: Final = re.compile(r"^fuse\S* .*[ ,]user_id=([0-9]{1,10})")
"""The type and options of a file system; see proc_pid_mountinfo(5) and mount.fuse3(8)."""


def why_exposed(path: Path) -> str | None:
    """The way in which another user could change a file or folder, or could have planted it.

    A file is this user's own where it, every folder above it and every link on the way belong to
    this user or to root, and nobody else can write to them. A folder with the sticky bit, such as
    /tmp, is safe above others, but not itself. A folder that a group can write to is safe if the
    group is this user's own, which is named after the user, or root's, and has no other user.

    A file system that another user serves (FUSE) shows whatever owners, modes and times that user
    likes: nothing on it is this user's own.

    In a container whose users are not mapped, folders above may belong to nobody: root's own seem
    to. The file itself may not.

    Args:
        path: A file or folder; one that is not there yet is judged by the folders above it.

    Returns:
        One clause with the place, such as `/scratch/x can be written by others`; None if only this
        user and root can change it.
    """
    return _exposure(path, {}, {})


def exposed_files(root: Path, names: Iterable[str]) -> dict[str, str]:
    """The files that another user could change or exchange, each with `why_exposed`.

    Times and inodes show nothing about these: a page of a mapped file that was dirty already can be
    changed without a new time, and a folder can be exchanged for another.

    Args:
        root: A folder.
        names: Of files below it. Every folder and link is looked at once for all of them.
    """
    seen: dict[Path, os.stat_result] = {}
    servers: dict[int, str | None] = {}
    found = {name: _exposure(root / name, seen, servers) for name in names}
    return {name: reason for name, reason in found.items() if reason is not None}


def _exposure(
    path: Path, seen: dict[Path, os.stat_result], servers: dict[int, str | None]
) -> str | None:
    """The same; folders, links and file systems that were seen are not looked at again."""
    try:
        found = exposures(path, seen, servers)
        return next((f"{place} {problem}" for place, _, problem in found), None)
    except OSError as error:
        return f"{error.filename or path} cannot be looked at ({error.strerror or error})"


def exposures(
    path: Path,
    seen: dict[Path, os.stat_result] | None = None,
    servers: dict[int, str | None] | None = None,
    *,
    is_made: bool = False,
) -> Iterator[tuple[Path, os.stat_result, str]]:
    """Every place on the way to a file or folder, and itself, that another user can change.

    Args:
        path: The file or folder.
        seen: Folders and links that need not be looked at again.
        servers: The same of file systems, by device.
        is_made: Whether this user makes what is missing: others cannot rename it in a folder with
            the sticky bit.

    Yields:
        The place, its status, and the words of `why_exposed` for it.

    Raises:
        OSError: One cannot be looked at.
    """
    whole = path.absolute()  # keeps `..`, which may come after a link
    steps = list(_steps(whole, {} if seen is None else seen))
    servers = {} if servers is None else servers
    for number, (place, status) in enumerate(steps, 1):
        is_above = number < len(steps) or is_made
        if status.st_dev not in servers:
            servers[status.st_dev] = _served(status.st_dev)
        problem = servers[status.st_dev] or _foreign(status, is_above=is_above)
        if problem is None and not stat.S_ISLNK(status.st_mode):
            is_sticky = is_above and bool(status.st_mode & stat.S_ISVTX)
            problem = None if is_sticky else can_be_written(place, status)
        if problem is not None:
            yield place, status, problem


def first_exposure(root: Path, names: Iterable[str]) -> str | None:
    """`why_exposed` of the first of several files that another user could change, in their order.

    Args:
        root: A folder.
        names: Of files below it.
    """
    return next(iter(exposed_files(root, names).values()), None)


def links_on(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every symbolic link on the way to the end of a path, and its status, in the kernel's order.

    Raises:
        OSError: They form a loop, or cannot be looked at.
    """
    for place, status in _steps(path.absolute(), {}):
        if stat.S_ISLNK(status.st_mode):
            yield place, status


def is_own(status: os.stat_result) -> bool:
    """Whether a file, folder or link belongs to this user or to root."""
    return status.st_uid in {0, os.geteuid()}


def _steps(path: Path, seen: dict[Path, os.stat_result]) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link on the way to a path, and at last the path; ends where nothing is."""
    place, rest, links = Path(path.anchor), list(path.parts[:0:-1]), 0
    yield place, place.lstat()
    while rest:
        part = rest.pop()
        if part == "..":
            place = place.parent
            continue
        step = place / part
        status = seen.get(step)
        if status is None:
            try:
                status = step.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return
            seen[step] = status
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            place = step
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, "too many links: symbolic links form a loop", str(path))
        target = step.readlink()
        rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        if target.is_absolute():
            place = Path(target.anchor)


def _foreign(status: os.stat_result, *, is_above: bool) -> str | None:
    """Words for another owner; None for this user and root."""
    if is_own(status) or (is_above and status.st_uid == _unmapped()):
        return None
    return f"belongs to {_name_of_user(status.st_uid)}"


def _served(device: int) -> str | None:
    """Words for another user whose program is a file system (FUSE); None if there is none.

    Args:
        device: The number of the file system.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):  # not Linux
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            mount, _, system = line.partition(" - ")
            match = _SERVER.search(system)
            if mount.split(" ")[2:3] == [number] and match is not None:
                user = int(match[1])
                if user not in {0, os.geteuid(), _unmapped()}:
                    return f"is on a file system that {_name_of_user(user)} serves (FUSE)"
    return None


def can_be_written(place: Path, status: os.stat_result) -> str | None:
    """Words for others who can write to a file or folder itself; None if there are none.

    Args:
        place: The file or folder.
        status: Of it.
    """
    if status.st_mode & stat.S_IWOTH:
        return "can be written by others"
    if not status.st_mode & stat.S_IWGRP:
        return None  # also with an access control list: this bit is its mask
    users, groups = {status.st_uid}, {status.st_gid}
    with suppress(OSError, AttributeError):  # no lists on this file system, or in this system
        users, groups = _writers(os.getxattr(place, _ACL), status)
    for user in sorted(users - {0, os.geteuid(), status.st_uid}):
        return f"can be written by {_name_of_user(user)}"
    for group in sorted(groups):
        if not _is_own_group(group, os.geteuid()):
            return f"can be written by group {_name_of_group(group)}"
    return None


def _writers(data: bytes, status: os.stat_result) -> tuple[set[int], set[int]]:
    """The users and groups that an access control list lets write."""
    entries = list(struct.iter_unpack("<HHI", data[4:])) if len(data) % 8 == 4 else []  # noqa: PLR2004 (a version, then entries)
    mask = next((rights for tag, rights, _ in entries if tag == _ACL_MASK), _ACL_WRITE)
    writing = [(tag, name) for tag, rights, name in entries if rights & mask & _ACL_WRITE]
    users = {name for tag, name in writing if tag == _ACL_USER}
    groups = {name for tag, name in writing if tag == _ACL_GROUP}
    if any(tag == _ACL_OWN_GROUP for tag, _ in writing):
        groups.add(status.st_gid)
    return users, groups


@cache
def _is_own_group(group: int, user: int) -> bool:
    """Whether a group is a user's own.

    The name decides as well, because a directory service need not list the users of a group.
    """
    try:
        name, entry = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    own = {user, 0}
    members = {_number_of(member) for member in entry.gr_mem}
    members |= {one.pw_uid for one in pwd.getpwall() if one.pw_gid == group}
    return (entry.gr_name == name or group == 0) and members <= own


def _number_of(user: str) -> int:
    """A user's number; -1 if there is no such user."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return -1


@cache
def _unmapped() -> int | None:
    """The user who stands for all that this container does not know; None if it knows root."""
    try:
        text = Path("/proc/self/uid_map").read_text()
        rows = [tuple(map(int, line.split())) for line in text.splitlines()]
        if sum(count for _, _, count in rows) >= 2**16:  # a whole system, or all of its users
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


def _name_of_user(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _name_of_group(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)
