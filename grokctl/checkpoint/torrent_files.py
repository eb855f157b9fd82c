"""The files of a torrent: its v1 list, its v2 file tree, and names that are safe on a disk."""

import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grokctl.checkpoint.bencode import MalformedError
from grokctl.checkpoint.hashtree import LEAF, levels_above, root_above
from grokctl.text import printable

V2: Final = 2
"""The version of a torrent without v1 pieces (BEP 52)."""
HUB: Final = 0
"""No torrent: ranges of files that a hub names the hashes of, laid out like the pieces of v2."""
MOST_DEPTH: Final = 16
"""Folders in a path, and lists in lists."""
_MOST_FILES: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TorrentFile:
    """One file of a torrent."""

    index: int
    path: tuple[str, ...]
    """Below the torrent's own folder; every part is a safe file name."""
    length: int
    offset: int
    """In the concatenation of all files, which the pieces divide."""
    is_pad: bool = False
    """Zeros between files (BEP 47), which are not stored."""


def list_files(info: dict[bytes, Any], name: str) -> Iterator[TorrentFile]:
    """The files of a v1 list."""
    if b"length" in info:
        entries: list[Any] = [{**info, b"path": [name.encode()]}]
    else:
        entries = entry_of(info, b"files", list)
    refuse_count(len(entries))
    offset = 0
    for index, entry in enumerate(entries):
        parts = entry_of(entry, b"path", list)
        if not 1 <= len(parts) <= MOST_DEPTH:
            raise MalformedError(f"has a file {len(parts)} folders deep")
        path = tuple(_safe_part(part) for part in parts)
        attributes = _attributes(path, entry)
        length = _length(entry)
        is_pad = b"p" in attributes or path[-1].startswith("_____padding_file_")
        yield TorrentFile(index=index, path=path, length=length, offset=offset, is_pad=is_pad)
        offset += length


@dataclass(frozen=True, slots=True)
class Leaf:
    """One file of a v2 file tree."""

    path: tuple[str, ...]
    length: int
    root: bytes
    """Of its hash tree; empty if the file is."""


def has_tree(info: dict[bytes, Any]) -> bool:
    """Whether there is a v2 file tree, which libtorrent prefers to a v1 list."""
    version = info.get(b"meta version", 1)
    is_there = b"file tree" in info
    if type(version) is not int or version != (V2 if is_there else 1):
        tree = "a" if is_there else "no"
        raise MalformedError(f"has meta version {reprlib.repr(version)} and {tree} v2 file tree")
    return is_there


def tree_leaves(tree: Any, parents: tuple[str, ...]) -> Iterator[Leaf]:
    """The files of a v2 file tree.

    Args:
        tree: The tree, or a folder in it.
        parents: The folders above.

    Raises:
        MalformedError: It is no tree of files, or a file is a link, executable or unsafe by name.
    """
    if not isinstance(tree, dict):
        raise MalformedError("has a v2 file tree that is not a dictionary")
    for name, branch in tree.items():
        path = (*parents, _safe_part(name))
        if not isinstance(branch, dict) or b"" not in branch:
            yield from tree_leaves(branch, path)
        elif len(branch) == 1:
            yield _leaf(path, branch[b""])
        else:
            raise MalformedError(f"{_shown(path)} is both a file and a folder")


def _leaf(path: tuple[str, ...], entry: Any) -> Leaf:
    if b"p" in _attributes(path, entry):
        raise MalformedError("has a pad in its v2 file tree")
    length = _length(entry)
    root = entry_of(entry, b"pieces root", bytes) if length else b""
    if length and len(root) != 32:  # noqa: PLR2004 (SHA-256)
        raise MalformedError(f"{_shown(path)} has a pieces root of {len(root)} bytes")
    return Leaf(path, length, root)


def padded_files(leaves: Iterable[Leaf], piece_length: int) -> Iterator[TorrentFile]:
    """The files of a v2 file tree, each followed by the pad that fills its last piece."""
    index = offset = 0
    for leaf in leaves:
        for path, length, is_pad in (
            (leaf.path, leaf.length, False),
            ((".pad",), -leaf.length % piece_length, True),
        ):
            if length or not is_pad:
                yield TorrentFile(
                    index=index, path=path, length=length, offset=offset, is_pad=is_pad
                )
                index += 1
                offset += length


def tree_hashes(leaves: Sequence[Leaf], layers: Any, piece_length: int) -> bytes:
    """The root of every piece's hash tree, checked against the roots of the files."""
    levels = levels_above(piece_length // LEAF)
    cut = {leaf.root for leaf in leaves if leaf.length > piece_length}
    if not isinstance(layers, dict) or layers.keys() != cut:
        raise MalformedError("has v2 piece layers that do not match its files")
    hashes = bytearray()
    for leaf in leaves:
        if not leaf.length:
            continue
        if leaf.length <= piece_length:
            # the file's own root is that of a smaller tree
            own = levels_above(-(-leaf.length // LEAF))
            hashes += root_above([leaf.root], levels - own, below=own)
            continue
        layer, pieces = layers[leaf.root], -(-leaf.length // piece_length)
        if not isinstance(layer, bytes) or len(layer) != 32 * pieces:
            raise MalformedError(f"{_shown(leaf.path)} has a v2 piece layer of the wrong length")
        nodes = [layer[start : start + 32] for start in range(0, len(layer), 32)]
        if leaf.root != root_above(nodes, levels_above(pieces), below=levels):
            raise MalformedError(
                f"{_shown(leaf.path)} has a v2 piece layer that does not match its root"
            )
        hashes += layer
    return bytes(hashes)


def is_same_list(files: Sequence[TorrentFile], padded: Sequence[TorrentFile]) -> bool:
    """Whether the v1 list and the v2 file tree of a hybrid torrent place every file identically.

    The last pad may be missing, as in torrents by libtorrent 2.0.0 to 2.0.7.
    """

    def placed(several: Sequence[TorrentFile]) -> list[tuple[tuple[str, ...], int, int]]:
        return [
            (file.path, file.length, file.offset if file.length else 0)
            for file in several
            if not file.is_pad
        ]

    totals = {
        padded[-1].offset + padded[-1].length,
        max(file.offset + file.length for file in padded if not file.is_pad),
    }
    return placed(files) == placed(padded) and files[-1].offset + files[-1].length in totals


def _attributes(path: tuple[str, ...], entry: Any) -> bytes:
    """The attributes of a file; refuses links and executables."""
    if not isinstance(entry, dict):
        raise MalformedError("has a file entry that is not a dictionary")
    attributes = entry.get(b"attr", b"")
    if not isinstance(attributes, bytes):
        raise MalformedError("has file attributes that are not text")
    if b"l" in attributes or b"symlink path" in entry:
        raise MalformedError(f"{_shown(path)} is a symbolic link")
    if b"x" in attributes:
        raise MalformedError(f"{_shown(path)} is executable")
    return attributes


def _length(entry: Any) -> int:
    length: int = entry_of(entry, b"length", int)
    if not 0 <= length < 2**53:
        raise MalformedError(f"has a file of {length} bytes")
    return length


def _safe_part(part: object) -> str:
    if not isinstance(part, bytes):
        raise MalformedError("has a file name that is not text")
    text = text_of(part)
    is_safe = (
        len(part) <= 240  # noqa: PLR2004 (file systems allow 255 bytes)
        and text == printable(text, limit=240)
        and text not in {"", ".", ".."}
        and not set(text) & set("/\\")
        and text == text.strip()
    )
    if not is_safe:
        raise MalformedError(f"has the unsafe file name {printable(text)!r}")
    return text


def _shown(path: Sequence[str]) -> str:
    return printable("/".join(path))


def refuse_count(count: int) -> None:
    """Refuse a number of files, pads included, that no release has."""
    if not 1 <= count <= _MOST_FILES:
        raise MalformedError(f"has {count:,} files, expected 1 to {_MOST_FILES:,}")


def refuse_clashes(files: Sequence[TorrentFile]) -> None:
    """Refuse two files that some file system takes for one, or a file with the name of a folder."""
    names = [tuple(part.casefold() for part in file.path) for file in files if not file.is_pad]
    folders = {name[:depth] for name in names for depth in range(1, len(name))}
    if len(set(names)) != len(names) or folders & set(names):
        raise MalformedError("has two files with the same path")


def text_of(data: bytes) -> str:
    """A name of a torrent, which is UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError("has a name that is not UTF-8") from None


def entry_of(values: Any, key: bytes, kind: type) -> Any:
    """An entry of a dictionary, of exactly this type."""
    value = values.get(key) if isinstance(values, dict) else None
    if type(value) is not kind:
        raise MalformedError(f"has no valid {key.decode()}")
    return value
