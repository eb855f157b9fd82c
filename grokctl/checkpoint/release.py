"""A release on disk: which file is which tensor, read as views of the mapped files."""

import mmap
import re
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grokctl.checkpoint import pickles
from grokctl.checkpoint.pickles import ArrayRef, Hole
from grokctl.checkpoint.torrent import Metainfo, TorrentFile, printable
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    FetchError,
    GrokctlError,
    Reason,
    UnsafePickleError,
    UsageError,
)
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit, ignore
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import TensorSpec, tensor_specs
from grokctl.paths import CKPT, CONFIG, MANIFEST, PRIVATE, TOKENIZER, TORRENT

_OWN = frozenset({PRIVATE, TORRENT, MANIFEST, CKPT})
_LARGEST_EXTRA = 64 * 2**20
_TENSOR_FILE = re.compile(r"tensor[0-9]{5}_[0-9]{3}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One parameter and the file it lies in; holds no data and no open file."""

    spec: TensorSpec
    path: Path
    weight: ArrayRef
    """float32 or int8 `(*lead, inputs, outputs)`."""
    scales: ArrayRef | None
    """bfloat16 `(*lead, groups, outputs)`."""

    def map(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Map the file and return its weight and scales as read-only views.

        Nothing is copied and nothing read before it is touched; the mapping lives as long as the
        views do. Payloads begin at odd offsets, so the views may be unaligned.
        """
        name = f"{CKPT}/{self.spec.file}"
        try:
            mapped = _map(self.path)
            weight = _view(mapped, self.weight)
            return weight, None if self.scales is None else _view(mapped, self.scales)
        except (OSError, ValueError) as error:
            raise _damaged(name, Reason.ALTERED, "changed since it was looked at") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A release whose every file has the structure it should have."""

    root: Path
    config: GrokConfig
    tensors: tuple[StoredTensor, ...]
    """In the order of the release."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def tokenizer(self) -> Path | None:
        """The sentencepiece model, if it is there."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(file_nbytes(tensor.spec) for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a look at every file's structure found."""

    config: GrokConfig
    tensors: tuple[StoredTensor, ...]
    damage: tuple[Damage, ...]


def open_release(root: Path, *, observe: Observer = ignore) -> Release:
    """Look at the structure of every file of a release; prove nothing about its content.

    Args:
        root: The folder that holds `ckpt-0`.
        observe: Receives progress in files.

    Raises:
        UnsafePickleError: A file asks for more than a tensor needs. Nothing was executed.
        CorruptCheckpointError: Files are missing, short, long or of the wrong shape. All of them
            are listed.
        UsageError: There is no release here.
    """
    found = survey(root, observe=observe)
    if found.damage:
        raise damage_error(found.damage, checked=len(tensor_specs(found.config)), root=root)
    return Release(root=root, config=found.config, tensors=found.tensors)


def survey(root: Path, *, observe: Observer = ignore) -> Survey:
    """Look at the structure of every file, also after the first damaged one.

    Raises:
        CorruptCheckpointError: `config.json` is malformed.
        UsageError: There is no release here.
    """
    if not (root / CKPT).is_dir():
        raise UsageError(f"{root}: holds no {CKPT} folder, so no release", "grokctl fetch")
    config = read_config(root)
    specs = tensor_specs(config)
    tensors: list[StoredTensor] = []
    damage: list[Damage] = []
    observe(Started(stage=Stage.STRUCTURE, total=len(specs), unit=Unit.FILES))
    for done, spec in enumerate(specs, start=1):
        try:
            tensors.append(_locate(root, spec))
        except CorruptCheckpointError as error:
            damage.extend(error.damage)
        observe(Advanced(stage=Stage.STRUCTURE, done=done))
    observe(Finished(stage=Stage.STRUCTURE))
    return Survey(config=config, tensors=tuple(tensors), damage=tuple(damage))


def read_config(root: Path) -> GrokConfig:
    """The model that a release holds: `config.json`, or Grok-1 where there is none."""
    path = root / CONFIG
    return GrokConfig.read(path) if path.is_file() else GROK_1


def damage_error(damage: Sequence[Damage], *, checked: int, root: Path) -> GrokctlError:
    """One error for all damaged files; an unsafe one decides its class and exit code."""
    unsafe = [item for item in damage if item.reason is Reason.UNSAFE]
    first = (unsafe or damage)[0]
    if unsafe:
        message = f"{len(unsafe)} of {checked} files are unsafe pickles, first {first}"
        return UnsafePickleError(
            message,
            f"nothing was executed; rm {shlex.quote(str(root / first.file))} and fetch it again",
            tuple(damage),
        )
    message = f"{len(damage)} of {checked} files are damaged, first {first}"
    hint = (
        f"grokctl verify {shlex.quote(str(root))} --repair" if (root / TORRENT).is_file() else None
    )
    return CorruptCheckpointError(message, hint, tuple(damage))


def released_payloads(spec: TensorSpec) -> tuple[Hole, Hole | None]:
    """Shapes and dtypes of the weight and the scales that a file of the release holds."""
    if not spec.is_quantized:
        return Hole(spec.shape, np.dtype("<f4")), None
    return Hole(spec.shape, np.dtype("i1")), Hole(spec.scales_shape, pickles.BFLOAT16)


@cache
def file_nbytes(spec: TensorSpec) -> int:
    """Exact size of a tensor's file, from its shape alone."""
    return pickles.measure(*released_payloads(spec))


def release_paths(metainfo: Metainfo) -> dict[int, str]:
    """Where the files of a torrent go in a release.

    A torrent may call its folders as it likes; tensors are known by their own names and land in
    `ckpt-0`. Every other file keeps its name, is proven like the rest, and never opened.

    Returns:
        File index -> `/`-separated path below the release; pads are left out.

    Raises:
        FetchError: There is no tensor, two files have one place, or a file is larger than 64 MB
            without being a tensor or wants a place that is grokctl's own.
    """
    places: dict[int, str] = {}
    for file in metainfo.files:
        if not file.is_pad:
            places[file.index] = _place(file)
    names = [place.casefold() for place in places.values()]
    folders = {name[:end] for name in names for end in range(len(name)) if name[end] == "/"}
    if not any(place.startswith(f"{CKPT}/") for place in places.values()):
        raise FetchError(f"torrent {printable(metainfo.name)!r} holds no tensorNNNNN_000 file")
    if len(set(names)) != len(names) or folders & set(names):
        raise FetchError(f"torrent {printable(metainfo.name)!r} has two files for one place")
    return places


def _place(file: TorrentFile) -> str:
    if _TENSOR_FILE.fullmatch(file.path[-1]):
        return f"{CKPT}/{file.path[-1]}"
    place = "/".join(file.path)
    own = {PRIVATE, TORRENT, MANIFEST} if file.path[0] == CKPT and len(file.path) > 1 else _OWN
    if file.path[0].casefold() in own:
        raise FetchError(f"torrent file {place!r} wants a place that is grokctl's own")
    if file.length > _LARGEST_EXTRA:
        raise FetchError(f"torrent file {place!r} is no tensor and has {file.length} bytes")
    return place


def scan_file(root: Path, name: str) -> pickles.PickledTensor:
    """Find the arrays in one tensor file; see `pickles.scan`.

    Args:
        root: The release.
        name: Path below it, `/`-separated.

    Raises:
        UnsafePickleError: It asks for more than a tensor needs.
        CorruptCheckpointError: It is malformed, or no regular file.
        OSError: It cannot be read.
    """
    path = root / name
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _damaged(name, Reason.UNREADABLE, "is no regular file")
    if status.st_size == 0:
        return pickles.scan(b"", file=name)
    mapped = _map(path)
    with memoryview(mapped) as buffer:
        return pickles.scan(buffer, file=name)


def _locate(root: Path, spec: TensorSpec) -> StoredTensor:
    """Scan one file and compare it with its specification."""
    name = f"{CKPT}/{spec.file}"
    path = root / name
    expected = file_nbytes(spec)
    size = 0
    try:
        size = path.stat().st_size
        tensor = scan_file(root, name)
    except FileNotFoundError:
        raise _damaged(name, Reason.MISSING, f"expected {expected} bytes") from None
    except OSError as error:
        raise _damaged(name, Reason.UNREADABLE, error.strerror or str(error)) from error
    except CorruptCheckpointError as error:
        (damage,) = error.damage
        if damage.reason not in {Reason.SHORT, Reason.LONG}:
            raise
        if size != expected:
            reason = Reason.SHORT if size < expected else Reason.LONG
            raise _damaged(name, reason, f"expected {expected} bytes, found {size}") from error
        raise _damaged(name, Reason.MALFORMED, damage.detail) from error
    _compare(name, spec, tensor)
    return StoredTensor(spec=spec, path=path, weight=tensor.weight, scales=tensor.scales)


def _compare(name: str, spec: TensorSpec, found: pickles.PickledTensor) -> None:
    weight, _ = released_payloads(spec)
    if found.weight.shape != weight.shape or found.weight.dtype != weight.dtype:
        raise _damaged(
            name,
            Reason.MALFORMED,
            f"expected {weight.shape} {weight.dtype}, "
            f"found {found.weight.shape} {found.weight.dtype}",
        )
    if found.scales is None:
        return
    # The number of scale rows is the release's to say, as long as the inputs divide into them.
    *lead, inputs, outputs = spec.shape
    shape = found.scales.shape
    fits = len(shape) == len(spec.shape) and (*lead, outputs) == (*shape[:-2], shape[-1])
    if not fits or inputs % shape[-2]:
        raise _damaged(
            name, Reason.MALFORMED, f"expected scales {spec.scales_shape}, found {shape}"
        )


def _damaged(name: str, reason: Reason, detail: str) -> CorruptCheckpointError:
    damage = Damage(name, reason, detail)
    return CorruptCheckpointError(str(damage), None, (damage,))


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(mapped: mmap.mmap, ref: ArrayRef) -> NDArray[Any]:
    count = ref.nbytes // ref.dtype.itemsize
    flat: NDArray[Any] = np.frombuffer(mapped, dtype=ref.dtype, count=count, offset=ref.offset)
    return flat.reshape(ref.shape)
