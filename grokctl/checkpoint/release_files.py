"""The files of a release: the place, size and arrays of each."""

import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from grokctl.checkpoint.mapped_files import map_to_read
from grokctl.checkpoint.pickle_writer import Hole, measure
from grokctl.checkpoint.pickles import BFLOAT16, PickledTensor, scan
from grokctl.checkpoint.torrent import Metainfo, read_metainfo
from grokctl.checkpoint.torrent_files import TorrentFile
from grokctl.errors import FetchError, Reason, corrupt
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import TensorSpec, tensor_specs
from grokctl.paths import CKPT, CONFIG, MANIFEST, PRIVATE, TOKENIZER, TORRENT
from grokctl.text import printable

EXTRA = f"{PRIVATE}/extra"
"""The folder of a torrent's files that a program might run or obey: each has a number as its name.

They cannot be left out: their bytes share pieces with tensors, which would stay unproven.
"""
_DOCUMENT = re.compile(
    r"[A-Za-z0-9][\w .+-]*\.(md|txt|rst|pdf|png|jpe?g|csv|bib|cff|model|vocab|sha256|sha1|md5|asc)"
    r"|(?-i:[A-Z][A-Z0-9_-]+)"
    r"|([a-z]+_)?(config|tokenizer|params|vocab|special_tokens_map)\.json"
    r"|[\w.-]+\.index\.json",
    re.IGNORECASE,
)
"""Names of files to read; code, settings of programs and hidden files have others."""
_OBEYED = re.compile(
    r"build|workspace|module|cmakelists\.txt|(requirements|constraints)[\w.-]*\.txt|(agents|claude|gemini|skill)\.md",
    re.IGNORECASE,
)
"""Names of documents that programs obey."""
_FOLDER = re.compile(r"[A-Za-z0-9][\w .+-]*")
_OWN = frozenset({PRIVATE, TORRENT, MANIFEST, CKPT})
LARGEST_EXTRA = 64 * 2**20
_TENSOR_FILE = re.compile(r"tensor[0-9]{5}_[0-9]{3}")


def is_tensor_file(name: str) -> bool:
    """Whether a file has the name of a tensor's."""
    return _TENSOR_FILE.fullmatch(name) is not None


def read_config(root: Path) -> GrokConfig:
    """The model of a release: from `config.json`, or Grok-1 if there is none.

    Raises:
        CorruptCheckpointError: There is one, and it is no file or not a model's.
    """
    path = root / CONFIG
    if path.is_file():
        return GrokConfig.read(path)
    if path.is_symlink():
        raise corrupt(CONFIG, Reason.UNREADABLE, "is a symbolic link to no file")
    if os.path.lexists(path):
        raise corrupt(CONFIG, Reason.UNREADABLE, "is not a regular file")
    return GROK_1


def released_payloads(spec: TensorSpec) -> tuple[Hole, Hole | None]:
    """Shapes and dtypes of the weight and the scales in a tensor's file."""
    if not spec.is_quantized:
        return Hole(spec.shape, np.dtype("<f4")), None
    return Hole(spec.shape, np.dtype("i1")), Hole(spec.scales_shape, BFLOAT16)


@cache
def file_nbytes(spec: TensorSpec) -> int:
    """Exact size of a tensor's file, from its shape alone."""
    return measure(*released_payloads(spec))


def release_paths(metainfo: Metainfo) -> dict[int, str]:
    """The place of each file of a torrent in a release.

    The folder names of a torrent do not matter: tensors are recognized by their own names, and
    placed in `ckpt-0`. Every other file is proven like the rest, and never opened. A document keeps
    its path; anything that a program might run or obey gets a number in `EXTRA`.

    Returns:
        File index -> `/`-separated path below the release; pads are left out.

    Raises:
        FetchError: There is no tensor, two files have the same place, a file other than a tensor
            is larger than 64 MB, or a file has the name of one of grokctl's own files.
    """
    places: dict[int, str] = {}
    for file in metainfo.files:
        if not file.is_pad:
            places[file.index] = _place(file)
    names = [name.casefold() for name in names_of(metainfo, places).values()]
    folders = {name[:end] for name in names for end in range(len(name)) if name[end] == "/"}
    if not any(place.startswith(f"{CKPT}/") for place in places.values()):
        torrent = f"torrent {printable(metainfo.name)!r}"
        raise FetchError(f"{torrent}: expected tensorNNNNN_000 files, found none")
    if len(set(names)) != len(names) or folders & set(names):
        torrent = f"torrent {printable(metainfo.name)!r}"
        raise FetchError(f"{torrent}: has two files for the same place in a release")
    return places


def _place(file: TorrentFile) -> str:
    if is_tensor_file(file.path[-1]):
        return f"{CKPT}/{file.path[-1]}"
    place = "/".join(file.path)
    own = {PRIVATE, TORRENT, MANIFEST} if file.path[0] == CKPT and len(file.path) > 1 else _OWN
    if file.path[0].casefold() in own:
        raise FetchError(f"torrent file {place!r}: has the name of one of grokctl's own files")
    if file.length > LARGEST_EXTRA:
        raise FetchError(
            f"torrent file {place!r}: expected a tensor or at most {LARGEST_EXTRA:,} bytes, "
            f"found {file.length:,}"
        )
    return place if is_document(file.path) else f"{EXTRA}/{file.index}"


def is_document(path: tuple[str, ...]) -> bool:
    """Whether a file of a torrent may keep its name: no program runs it or obeys it."""
    name = path[-1]
    is_visible = all(_FOLDER.fullmatch(folder) for folder in path[:-1])
    return is_visible and bool(_DOCUMENT.fullmatch(name)) and not _OBEYED.fullmatch(name)


def names_of(metainfo: Metainfo, places: Mapping[int, str]) -> dict[int, str]:
    """The same places with the torrent's own names for what has a number."""
    own = {file.index: "/".join(file.path) for file in metainfo.files}
    return {
        index: own[index] if place.startswith(f"{EXTRA}/") else place
        for index, place in places.items()
    }


def places_on_disk(root: Path, metainfo: Metainfo) -> dict[int, str]:
    """The places of `release_paths`, or names where other programs and earlier versions put files.

    Only to read: a file that has its own name is taken if there is none with its number.
    """
    places = release_paths(metainfo)
    for index, name in names_of(metainfo, places).items():
        if name != places[index] and not os.path.lexists(root / places[index]):
            places[index] = name if (root / name).is_file() else places[index]
    return places


def files_of(root: Path, config: GrokConfig) -> tuple[str, ...]:
    """The files of a release: those of its torrent; without one, those that a run reads.

    Args:
        root: The release.
        config: Of its model.
    """
    try:
        return tuple(places_on_disk(root, read_metainfo(root / TORRENT)).values())
    except (FetchError, OSError):
        others = (name for name in (CONFIG, TOKENIZER) if (root / name).is_file())
        return (*(f"{CKPT}/{spec.file}" for spec in tensor_specs(config)), *others)


def scan_file(root: Path, name: str) -> PickledTensor:
    """Find the arrays in one tensor file; see `pickles.scan`.

    Args:
        root: The release.
        name: Path below it, `/`-separated.

    Raises:
        UnsafePickleError: It contains more than a tensor.
        CorruptCheckpointError: It is malformed, or not a regular file.
        OSError: It cannot be read.
    """
    path = root / name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise corrupt(name, Reason.UNREADABLE, "is not a regular file")
    if status.st_size == 0:
        return scan(b"", file=name)
    with mapped(path) as buffer:
        return scan(buffer, file=name)


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes, mapped in the block."""
    with memoryview(map_file(path)) as buffer:
        yield buffer


def map_file(path: Path) -> mmap.mmap:
    """Map a file to read it."""
    with path.open("rb") as file:
        return map_to_read(file.fileno(), path)
