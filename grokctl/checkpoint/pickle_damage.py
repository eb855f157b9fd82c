"""What happened to a tensor's file that is no tensor: in words, and with advice."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from grokctl.errors import Reason
from grokctl.text import format_number, printable

_Buffer = bytes | memoryview

_BLOCK: Final = 2**20
_MOST_ZEROS: Final = 64 * _BLOCK
"""Bytes from the end that are searched for zeros, if the opcodes end in zeros."""
_MOST_PLACES: Final = 320
"""Bytes in which a flipped bit is searched; a released pickle has about 260 beside its payloads."""
_SHOWN: Final = 24

_OTHER_FILES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "is a ZIP archive, such as PyTorch writes"),
    (b"GGUF", "is a GGUF file"),
    (b"\x1f\x8b", "is compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
    (b"\xfd7zXZ\0", "is compressed with xz"),
    (b"\x93NUMPY", "is a file of numpy.save"),
    (b"\x89HDF\r\n", "is an HDF5 file"),
    (b"<?xml", "is an XML document, such as a server's error"),
    (b"d8:announce", "is a torrent"),
    (b"d4:info", "is a torrent"),
)
_LIST: Final = "ls -l {file}"
_LOOK: Final = "head -c 400 {file}"
_UNFINISHED: Final = f"{_LIST}  # let the program that began this file finish it, or copy it again"
_COPY_AGAIN: Final = "sha256sum {file}  # compare it with its source, and copy it again"
_LFS: Final = b"version https://git-lfs.github.com/"
_PAGES: Final = (b"<!doctype html", b"<html", b"<head", b"<body")


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a file is no tensor."""

    reason: Reason
    detail: str
    advice: str = ""
    """A command without a torrent, with `{file}` and `{root}` for their quoted paths."""
    ranges: tuple[tuple[int, int], ...] = ()


def other_file(buffer: _Buffer) -> Finding | None:
    """The kind of a file that begins in another way than every tensor; None if it is unknown."""
    head = bytes(buffer[:1024])
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    whole = ((0, len(buffer)),)
    if text.startswith(_LFS):
        detail = "is a Git LFS pointer, not the file that it points to"
        return Finding(Reason.MALFORMED, detail, "git -C {root} lfs pull", whole)
    if text[:64].lower().startswith(_PAGES):
        detail = "is an HTML page, such as a login or an error page"
        return Finding(Reason.MALFORMED, detail, f"{_LOOK}  # download the file again", whole)
    for magic, detail in _OTHER_FILES:
        if text.startswith(magic) or head.startswith(magic):
            return Finding(Reason.MALFORMED, detail, f"{_LIST}  # replace it by the tensor", whole)
    if not head.strip(b"\0"):
        detail = "begins with zeros, like a file that was never written"
        return Finding(Reason.MALFORMED, detail, _UNFINISHED)
    shown = text[: 4 * _SHOWN]
    if shown and all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in shown):  # noqa: PLR2004
        begin = printable(" ".join(shown.decode("ascii").split()), limit=_SHOWN)
        detail = f"is text, it begins with {begin!r}"
        return Finding(Reason.MALFORMED, detail, f"{_LOOK}  # download the file again", whole)
    return None


def zero_tail(buffer: _Buffer, position: int) -> Finding | None:
    """Zeros from a place in a pickle to the end of its file.

    Args:
        buffer: The file.
        position: Of the last opcode that was read.
    """
    if position < len(buffer) and buffer[position]:
        position += 1  # its argument is zeros
    if position >= len(buffer) or any(
        bytes(buffer[low : low + _BLOCK]).strip(b"\0")
        for low in range(position, len(buffer), _BLOCK)
    ):
        return None
    low = position
    stop = max(0, low - _MOST_ZEROS)
    while low > stop:
        block = bytes(buffer[max(stop, low - _BLOCK) : low])
        written = len(block.rstrip(b"\0"))
        low -= len(block) - written
        if written:
            break
    count = len(buffer) - low
    at_least = "at least " if low == stop and stop else ""
    tail = f"{at_least}{format_number(count, 'byte')} {'is zero' if count == 1 else 'are zeros'}"
    detail = f"was not written to its end: the last {tail}"
    return Finding(Reason.MALFORMED, detail, _UNFINISHED, ((low, len(buffer)),))


def flipped_bit(places: Iterable[int], is_tensor: Callable[[int, int], bool]) -> Finding | None:
    """The one bit that makes a file a tensor, if there is one.

    Args:
        places: Bytes that were read as opcodes and their arguments, ascending.
        is_tensor: Whether the file is a tensor with the byte at a place XORed with a mask.
    """
    read = list(places)
    if len(read) > _MOST_PLACES:
        return None
    for place in reversed(read):  # the reader stops at the flip, or soon after it
        for bit in range(8):
            if is_tensor(place, 1 << bit):
                detail = f"byte {place:,} has a flipped bit"
                return Finding(Reason.MALFORMED, detail, _COPY_AGAIN, ((place, place + 1),))
    return None
