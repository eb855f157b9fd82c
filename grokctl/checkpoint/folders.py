"""The shapes that a release has on other people's disks, and words for what is no release."""

import base64
import errno
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from grokctl.checkpoint.release_files import is_tensor_file
from grokctl.ownership import why_exposed
from grokctl.paths import ADOPTED, CKPT, CONFIG, TOKENIZER, kind_of, read_limited
from grokctl.text import printable

PARTIAL_SUFFIXES: Final = (
    ".!qB",
    ".!ut",
    ".!bt",
    ".bt!",
    ".part",
    ".partial",
    ".incomplete",
    ".tmp",
    ".crdownload",
    ".download",
    ".opdownload",
    ".filepart",
    ".aria2",
    ".bc!",
    ".td",
    ".xltd",
)
"""Suffixes of files that other programs have not downloaded to their end."""
_PARTIAL_FORMS: Final = tuple(
    dict.fromkeys(
        chain.from_iterable((text, text.lower(), text.upper()) for text in PARTIAL_SUFFIXES)
    )
)
TAR: Final = "a tar archive"
_TAR: Final = b"ustar"
_TAR_AT: Final = 257
_SPECIAL: Final = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISCHR, "a device"),
)
_LONGEST_TARGET: Final = 100
_LONGEST_REFERENCE: Final = 200
_MOST_FOLDERS: Final = 100
"""Entries of a folder that are looked at for releases."""
_HUB_DOWNLOADS: Final = (".cache", "huggingface", "download")
"""Where the hub's client keeps what it has not downloaded to its end, in the release."""
_FIRST_HUB: Final = "ckpt"
"""The tensors' folder in the first upload to the hub."""
_MAGICS: Final = (
    (b"GGUF", "a GGUF file, the format of llama.cpp"),
    (b"\x93NUMPY", "a numpy array"),
    (b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"d8:announce", "a torrent"),
    (b"d7:comment", "a torrent"),
    (b"d4:info", "a torrent"),
)
_ENDINGS: Final = {
    ".gguf": "a GGUF file, the format of llama.cpp",
    ".safetensors": "a safetensors file",
    ".torrent": "a torrent",
    ".tar": TAR,
    ".bin": "a PyTorch checkpoint",
    ".pt": "a PyTorch checkpoint",
    ".pth": "a PyTorch checkpoint",
    ".onnx": "an ONNX model",
    ".model": "a tokenizer",
}


@dataclass(frozen=True, slots=True)
class ReleaseFolder:
    """Where somebody keeps a release."""

    root: Path
    """Holds `config.json` and the tokenizer, if there are any."""
    tensors: Path
    """Holds the tensors."""
    is_usual: bool = True
    """Whether the tensors lie in `ckpt-0` below the root, as grokctl has them."""

    def sources(self, place: str) -> Iterator[Path]:
        """Where a file of the release may lie.

        Args:
            place: Its path in a release.
        """
        folder, _, name = place.rpartition("/")
        if folder == CKPT:
            yield self.tensors / name
            return
        yield self.root / place
        if not self.is_usual:
            yield self.tensors / place
            above = self.root.parent / place
            # what others can put there is no part of a release that they cannot change
            if why_exposed(above) is None or why_exposed(self.root) is not None:
                yield above

    def small_files(self) -> Iterator[str]:
        """The files other than tensors that a run reads, if they are there."""
        for name in (CONFIG, TOKENIZER):
            if any(source.is_file() for source in self.sources(name)):
                yield name


def release_folder(path: Path) -> ReleaseFolder | None:
    """The release at a path, whatever tool put it there; None if there is none.

    Raises:
        OSError: The machine refuses to look.
    """
    if path.is_file() and is_tensor_file(path.name):
        path = path.absolute().parent
    if not path.is_dir():
        return None
    if (path / CKPT).is_dir():
        return ReleaseFolder(path, path / CKPT)
    if holds_tensors(path):
        whole = path.absolute()
        if whole.name == CKPT:
            return ReleaseFolder(whole.parent, whole)
        root = whole.parent if whole.name == _FIRST_HUB else whole
        return ReleaseFolder(root, whole, is_usual=False)
    if holds_tensors(path / _FIRST_HUB):
        return ReleaseFolder(path, path / _FIRST_HUB, is_usual=False)
    return _below(path)


def _below(path: Path) -> ReleaseFolder | None:
    """The only release in a clone of the reference repository, or in the hub's cache."""
    if (found := _in_repository(path)) is not None:
        return found
    models = [_in_repository(entry) for entry in _folders(path, "models--")]
    releases = [found for found in models if found is not None]
    return releases[0] if len(releases) == 1 else None


def _in_repository(path: Path) -> ReleaseFolder | None:
    """The release in a clone of the reference repository or in a folder of the hub's cache."""
    repository = path / "checkpoints"
    if (repository / CKPT).is_dir():
        is_usual = (repository / TOKENIZER).is_file() or not (path / TOKENIZER).is_file()
        return ReleaseFolder(repository, repository / CKPT, is_usual)
    found = [entry for entry in _folders(path / "snapshots") if (entry / CKPT).is_dir()]
    if len(found) > 1:
        found = [entry for entry in found if entry.name == _main_of(path)]
    return ReleaseFolder(found[0], found[0] / CKPT) if len(found) == 1 else None


def _main_of(cached: Path) -> str | None:
    """The snapshot that the main branch of a repository in the hub's cache refers to."""
    with suppress(OSError):
        return (
            read_limited(cached / "refs" / "main", _LONGEST_REFERENCE)
            .decode("ascii", "replace")
            .strip()
        )
    return None


def releases_in(path: Path) -> list[Path]:
    """Checkpoints in a folder of several, such as home, below a folder or two."""
    found = []
    for folder in (path, *_folders(path)):
        for entry in _folders(folder):
            with suppress(OSError):
                is_release = kind_of(entry) is not None or release_folder(entry) is not None
                if is_release and folder not in found:
                    found.append(entry)
    return found


def _folders(path: Path, prefix: str = "") -> list[Path]:
    """The folders in a folder, by name; none if it cannot be listed."""
    with suppress(OSError):
        entries = sorted(path.iterdir())[:_MOST_FOLDERS]
        return [entry for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]
    return []


def is_of_links(root: Path) -> bool:
    """Whether a release is a folder of links under home."""
    key = root.absolute().parent
    return key.parent.name == ADOPTED and re.fullmatch("[0-9a-f]{12}", key.name) is not None


def partial_files(root: Path, place: str) -> Iterator[Path]:
    """Files for a missing one that another program has not downloaded to their end.

    Args:
        root: The release.
        place: Of the missing file in it.
    """
    path = root / place
    if path.parent.is_dir():
        for ending in _PARTIAL_FORMS:
            beside = f"{path}{ending}"
            with suppress(FileNotFoundError):
                mode = os.lstat(beside).st_mode  # torrents may have thousands of files
                if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                    yield Path(beside)
    folder = root
    for name in (*_HUB_DOWNLOADS, *Path(place).parent.parts):
        folder /= name
        if folder.is_symlink() or not folder.is_dir():
            return
    for name in (path.name, _name_in_downloads(path.name)):
        yield from sorted(folder.glob(f"{glob.escape(name)}.*.incomplete"))


def _name_in_downloads(name: str) -> str:
    """The name that the hub's client gives a file until it is complete."""
    digest = hashlib.sha1(f"{name}.metadata".encode(), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(digest).decode()


def words_for(path: Path) -> str | None:
    """What a file or folder is that is no checkpoint; None if there is no such file."""
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:
            head = file.read(_TAR_AT + len(_TAR))
            for magic, words in _MAGICS:
                if head.startswith(magic):
                    return words
            if head[_TAR_AT:] == _TAR:
                return TAR
        return _ENDINGS.get(path.suffix.lower(), "a file")
    if path.is_dir():
        with suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                ending = _ENDINGS.get(Path(entry.name).suffix.lower())
                if ending is not None and not entry.name.endswith((".model", ".bin")):
                    return f"a folder with {ending} ({entry.name})"
        return "a folder"
    return _special(path)


def _special(path: Path) -> str | None:
    """What has a name, and is neither a file nor a folder; None if nothing has it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            return None
        if error.errno == errno.ELOOP:
            return "a loop of links"
        return f"a link to nothing ({printable(str(path.readlink()), limit=_LONGEST_TARGET)})"
    return next((words for is_type, words in _SPECIAL if is_type(mode)), "something else")


def holds_tensors(path: Path) -> bool:
    """Whether files in a folder have the names of tensors."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        return any(is_tensor_file(entry.name) for entry in entries)
    return False
