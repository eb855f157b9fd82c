"""The shapes that a release has on other people's disks, and words for what is no release."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grokctl.checkpoint.release_files import is_tensor_file
from grokctl.paths import CKPT, CONFIG, TOKENIZER

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
)
"""Suffixes of files that other programs have not downloaded to their end."""
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
            yield self.root.parent / place

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
    if _holds_tensors(path):
        whole = path.absolute()
        if whole.name == CKPT:
            return ReleaseFolder(whole.parent, whole)
        root = whole.parent if whole.name == _FIRST_HUB else whole
        return ReleaseFolder(root, whole, is_usual=False)
    if _holds_tensors(path / _FIRST_HUB):
        return ReleaseFolder(path, path / _FIRST_HUB, is_usual=False)
    return _below(path)


def _below(path: Path) -> ReleaseFolder | None:
    """The only release in a clone of the reference repository or in a folder of the hub's cache."""
    repository = path / "checkpoints"
    if (repository / CKPT).is_dir():
        is_usual = (repository / TOKENIZER).is_file() or not (path / TOKENIZER).is_file()
        return ReleaseFolder(repository, repository / CKPT, is_usual)
    snapshots = path / "snapshots"
    if snapshots.is_dir():
        found = [entry for entry in snapshots.iterdir() if (entry / CKPT).is_dir()]
        if len(found) == 1:
            return ReleaseFolder(found[0], found[0] / CKPT)
    return None


def partial_files(path: Path) -> Iterator[Path]:
    """Files beside a missing one that another program has not downloaded to their end."""
    for suffix in PARTIAL_SUFFIXES:
        beside = path.with_name(path.name + suffix)
        if beside.is_file() and not beside.is_symlink():
            yield beside


def words_for(path: Path) -> str | None:
    """What a file or folder is that is no checkpoint; None if there is no such file."""
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:
            head = file.read(16)
            for magic, words in _MAGICS:
                if head.startswith(magic):
                    return words
        return _ENDINGS.get(path.suffix.lower(), "a file")
    if path.is_dir():
        with suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                ending = _ENDINGS.get(Path(entry.name).suffix.lower())
                if ending is not None and not entry.name.endswith((".model", ".bin")):
                    return f"a folder with {ending} ({entry.name})"
        return "a folder"
    return None


def _holds_tensors(path: Path) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        return any(is_tensor_file(entry.name) for entry in entries)
    return False
