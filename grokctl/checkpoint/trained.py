"""The trained miniature that ships with grokctl: a release, its torrent, and what pins them."""

from pathlib import Path
from typing import Final

from grokctl.checkpoint.torrent import Metainfo, parse_metainfo
from grokctl.os_errors import located

_DATA: Final = Path(__file__).parents[1] / "data"
TRAINED: Final = _DATA / "miniature"
"""The release; data/README.md has its origin and licence."""
TORRENT: Final = _DATA / "miniature.torrent"
UNSEEN: Final = """\
A program often has to wait for a slow disk or a busy network. If it reads one file after
the other, most of its time is lost. Threads help: while one of them waits for its data, the
next can already look at what has arrived. The number of threads is best kept small, because
each of them needs memory of its own, and too many requests at the same moment make every
single one slower.

When a file cannot be opened, the function raises an error which says its name and the
reason. The caller decides what to do: it may try again later, use a default value, or stop.
Whatever it does, files that were opened before must be closed, and the with statement takes
care of that. A value of None means that there is no limit.
"""
"""A text of our own that training did not see, in the manner of Python's documentation."""


def copy_trained(root: Path) -> list[str]:
    """Copy the release into a new folder; modes are not copied, since a package may be read-only.

    Returns:
        The files, `/`-separated and relative to `root`.

    Raises:
        OSError: The system refuses a file, which is named.
    """
    paths = [path for path in TRAINED.rglob("*") if path.is_file()]
    files = sorted(path.relative_to(TRAINED).as_posix() for path in paths)
    for name in files:
        content, place = (TRAINED / name).read_bytes(), root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.write_bytes(content)
        except OSError as error:
            raise located(error, place) from error
    return files


def read_torrent() -> tuple[bytes, Metainfo]:
    """The torrent of the release, and what it says."""
    torrent = TORRENT.read_bytes()
    return torrent, parse_metainfo(torrent, source=TORRENT.name)
