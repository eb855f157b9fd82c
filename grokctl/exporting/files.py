"""The files of an export: which tensors each has, and every offset in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from grokctl.checkpoint.tensor_source import Slices
from grokctl.errors import invalid
from grokctl.exporting.tensors import ExportTensor
from grokctl.text import format_bytes


@dataclass(frozen=True, kw_only=True)
class ExportFile:
    """A file that is planned to the last byte."""

    number: int
    name: str
    header: bytes
    sizes: tuple[int, ...]
    """Bytes in it of every tensor of the plan, with padding; 0 of those in other files."""
    slices: Mapping[str, Slices] = field(default_factory=dict)
    """Empty: no scales are made apart from their weights."""

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where each tensor of the plan ends: that of the one before if it is in another file."""
        return tuple(accumulate(self.sizes, initial=len(self.header)))[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.ends[-1]


def distributed(
    tensors: Sequence[ExportTensor], padded: Callable[[ExportTensor], int], split: int | None
) -> list[list[ExportTensor]]:
    """The tensors of each file, in order, such that no file has more than `split` bytes of them.

    Raises:
        InvalidValueError: A tensor is larger than that.
    """
    if split is None:
        return [list(tensors)]
    files: list[list[ExportTensor]] = []
    room = -1
    for tensor in tensors:
        nbytes = padded(tensor)
        if nbytes > split:
            expected = f"expected at least {format_bytes(nbytes)}, the size of {tensor.name}"
            raise invalid("split", format_bytes(split), expected, "--split 48GB")
        if nbytes > room:
            files.append([])
            room = split
        files[-1].append(tensor)
        room -= nbytes
    return files


def numbered(prefix: str, number: int, count: int, suffix: str) -> str:
    """The name of one file of several, as engines expect it: `PREFIX-00001-of-00009.gguf`."""
    return f"{prefix}-{number + 1:05d}-of-{count:05d}{suffix}"
