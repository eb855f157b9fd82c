"""A release on disk in which every file has the structure of its tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grokctl.checkpoint.folders import is_of_links
from grokctl.checkpoint.release_files import file_nbytes, files_of, read_config
from grokctl.checkpoint.stored_tensor import StoredTensor
from grokctl.checkpoint.structure import survey
from grokctl.checkpoint.unfinished import refuse_unfinished
from grokctl.errors import (
    CorruptCheckpointError,
    Damage,
    GrokctlError,
    Reason,
    UnsafePickleError,
    count_of,
    worst,
)
from grokctl.events import Observer, ignore
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.paths import TOKENIZER, TORRENT, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A release in which every file has the expected structure."""

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
        """The sentencepiece model, if there is one."""
        path = self.root / TOKENIZER
        return path if path.is_file() else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(file_nbytes(tensor.spec) for tensor in self.tensors)


def open_release(root: Path, *, observe: Observer = ignore) -> Release:
    """Check the structure of every file of a release; see `survey`.

    Args:
        root: The folder that holds `ckpt-0`.
        observe: Receives progress in files.

    Raises:
        UnsafePickleError: A file names another global than a tensor does. Nothing was executed.
        CorruptCheckpointError: Its download is not complete; or files are missing, short, long or
            of the wrong shape, and all of them are listed.
        UsageError: The folder is not a release.
    """
    refuse_unfinished(root)
    structure = survey(root, observe=observe)
    if structure.damage:
        num_files = len(files_of(root, structure.config))
        raise damage_error(structure.damage, checked=num_files, root=root)
    return Release(root=root, config=structure.config, tensors=structure.tensors)


def damage_error(damage: Sequence[Damage], *, checked: int, root: Path) -> GrokctlError:
    """One error for all damaged files; of the class of an unsafe pickle, if there is one."""
    unsafe = [item for item in damage if item.reason is Reason.UNSAFE]
    first = worst(damage)
    hint = _advice(root, first)
    if unsafe:
        kind = "is an unsafe pickle" if len(unsafe) == 1 else "are unsafe pickles"
        message = f"{len(unsafe)} of {checked} files {kind}, first {first}"
        return UnsafePickleError(message, f"{hint}  # nothing was executed", tuple(damage))
    message = f"{count_of(damage, checked)}, first {first}"
    return CorruptCheckpointError(message, hint, tuple(damage))


def _advice(root: Path, damage: Damage) -> str | None:
    """The command that mends a release: never one that deletes bytes which may be good."""
    if (root / TORRENT).is_file():
        return f"grokctl verify {quoted(root)} --repair"
    file = quoted(root / damage.file)
    if damage.reason is Reason.MISSING and is_of_links(root):  # a fetch fills no links
        return f"grokctl verify {quoted(root)} --torrent-file FILE.torrent --repair"
    if damage.reason is Reason.MISSING:
        source = "" if read_config(root) == GROK_1 else " FILE.torrent"
        return f"grokctl fetch{source} --to {quoted(root)} --force  # keeps what is there"
    if damage.reason is Reason.UNSAFE:
        return f"ls -l {file}"
    if damage.reason in {Reason.SHORT, Reason.LONG} and not damage.advice:
        return f"ls -l {file}  # copy it again from its source"
    return damage.advice.format(file=file, root=quoted(root)) or None
