"""Destinations of a fetch in which other users could lead libtorrent to files elsewhere."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from grokctl.errors import FetchError
from grokctl.events import Noted, Observer
from grokctl.machine.disks import existing, file_system
from grokctl.os_errors import refusal
from grokctl.ownership import exposures, why_exposed
from grokctl.paths import CKPT, PRIVATE, quoted

_WITHOUT_RIGHTS: Final = frozenset(
    {"9p", "cifs", "drvfs", "exfat", "fuseblk", "msdos", "ntfs", "ntfs3", "smb3", "vfat"}
)
"""File systems of Windows and its shares: the rights that they show are the same for every file."""
_DANGER = "can replace what is fetched, and make the fetch overwrite files of yours elsewhere"


def refuse_exposed(
    root: Path,
    places: Iterable[str],
    observe: Observer,
    *,
    force: bool,
    is_repair: bool = False,
) -> None:
    """Refuse a destination whose folders other users can replace while libtorrent writes to them.

    It opens files by their paths. A folder that a group shares is noted, and so are folders above
    that belong to others, such as those of a project.

    Args:
        root: The release, which need not be there yet.
        places: Its files.
        observe: Receives the note.
        force: Whether to go on with a note.
        is_repair: Whether `verify` does it, which takes no force.

    Raises:
        FetchError: All users can write to a folder on the way, which has no sticky bit, or the
            release or a folder in it belongs to another user. Not on file systems without rights.
    """
    inside = {PRIVATE, CKPT, *(place.split("/")[0] for place in places if "/" in place)}
    own = Path(os.path.realpath(root))
    try:
        # something in a folder: its sticky bit then counts
        ways = [exposures(root / name / "file", is_made=True) for name in sorted(inside)]
        found = {place: (status, problem) for way in ways for place, status, problem in way}
    except OSError as error:
        raise refusal(error, root, kind=FetchError) from error
    for place, (status, problem) in found.items():
        is_open = status.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH
        is_open &= not stat.S_ISLNK(status.st_mode)
        is_foreign = problem.startswith("belongs to") and place.is_relative_to(own)
        has_rights = not force and file_system(existing(place)) not in _WITHOUT_RIGHTS
        if (is_open or is_foreign) and has_rights:
            message = f"{place} {problem}: other users {_DANGER}"
            raise FetchError(message, _hint(place, status, is_repair=is_repair))
    for place, (status, problem) in found.items():
        message = f"{place} {problem}: other users {_DANGER}"
        if problem.startswith("can be written by") and status.st_uid == os.geteuid():
            message += f"; if the folder is yours alone: chmod go-w {quoted(place)}"
        observe(Noted(message=message))
        return
    if root.exists() and (doubt := why_exposed(root)) is not None:
        observe(Noted(message=f"{doubt}: other users can replace what is fetched"))


def _hint(place: Path, status: os.stat_result, *, is_repair: bool) -> str:
    """How to close a folder of this user's, or to go on in that of another."""
    if status.st_uid == os.geteuid():
        mark = "" if is_repair else "  # or --force, where nobody else works"
        return f"chmod o-w {quoted(place)}{mark}"
    if is_repair:
        return f"ls -ld {quoted(place)}  # who can write there?"
    return "--force  # goes on; or --to, a folder of your own"
