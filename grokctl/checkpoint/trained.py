"""The trained miniature that ships with grokctl: a release, its torrent, and what pins them."""

import pydoc_data.topics
import shutil
from pathlib import Path
from typing import Final

from grokctl.checkpoint.torrent import Metainfo, parse_metainfo

_DATA: Final = Path(__file__).parents[1] / "data"
TRAINED: Final = _DATA / "miniature"
"""The release; data/README.md has its origin and licence."""
TORRENT: Final = _DATA / "miniature.torrent"
HELD_OUT_TOPIC: Final = "context-managers"
"""A topic of Python's documentation that training did not see."""


def copy_trained(root: Path) -> list[str]:
    """Copy the release into a new folder.

    Returns:
        The files, `/`-separated and relative to `root`.
    """
    shutil.copytree(TRAINED, root, copy_function=shutil.copyfile)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def read_torrent() -> tuple[bytes, Metainfo]:
    """The torrent of the release, and what it says."""
    torrent = TORRENT.read_bytes()
    return torrent, parse_metainfo(torrent, source=TORRENT.name)


def held_out_text() -> str:
    """A text of Python's documentation that training did not see."""
    return str(pydoc_data.topics.topics[HELD_OUT_TOPIC]).strip()
