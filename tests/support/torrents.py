"""Torrents by hand: bencoding, file trees and metainfo, right and wrong."""

import hashlib
import unicodedata
from pathlib import Path

import libtorrent as lt
import pytest

from grokctl.checkpoint.torrent import (
    Metainfo,
    parse_metainfo,
)
from grokctl.errors import FetchError

SYMLINK, EXECUTABLE, PAD = 8, 4, 1
"""File flags as libtorrent has them."""


HASH = "0123456789abcdef0123456789abcdef01234567"


HASH_V2 = "0123456789abcdef" * 4


def bencode(value: object) -> bytes:
    """Encode in the order given, so that wrong orders and repeated keys can be written."""
    match value:
        case int():
            return b"i%de" % value
        case bytes():
            return b"%d:%b" % (len(value), value)
        case list():
            return b"l" + b"".join(map(bencode, value)) + b"e"
        case dict():
            return b"d" + b"".join(bencode(k) + bencode(v) for k, v in value.items()) + b"e"
    raise TypeError(value)


def in_order(value: object) -> object:
    """With the keys of dictionaries sorted, as libtorrent wants them in v2 torrents."""
    match value:
        case dict():
            return {key: in_order(value[key]) for key in sorted(value)}
        case list():
            return [in_order(item) for item in value]
        case _:
            return value


def entry(length: int, *path: bytes, **more: object) -> dict[bytes, object]:
    return {
        b"length": length,
        b"path": list(path),
        **{key.replace("_", " ").encode(): value for key, value in more.items()},
    }


def info_of(*files: dict[bytes, object], **more: object) -> dict[bytes, object]:
    """An info dictionary that promises nothing about its content, with the right hash count."""
    total = sum(max(0, file[b"length"]) for file in files)
    info = {
        b"files": list(files),
        b"name": b"grok-1",
        b"piece length": 16384,
        b"pieces": bytes(20 * -(-total // 16384)),
    }
    return info | {key.replace("_", " ").encode(): value for key, value in more.items()}


def torrent_of(*files: dict[bytes, object], **more: object) -> bytes:
    return bencode({b"info": info_of(*files, **more)})


def parse(data: bytes) -> Metainfo:
    return parse_metainfo(data, source="x.torrent")


def is_one_clean_line(text: str) -> bool:
    """No control, format or direction character, and nothing that begins a line."""
    kinds = {unicodedata.category(character) for character in text}
    return not any(kind[0] == "C" or kind in {"Zl", "Zp"} for kind in kinds)


def refusal(data: bytes) -> FetchError:
    with pytest.raises(FetchError) as caught:
        parse(data)
    assert is_one_clean_line(str(caught.value))
    assert len(str(caught.value)) < 500
    return caught.value


def names_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def plain_root(leaves: list[bytes]) -> bytes:
    """The root of a tree of as many leaves as a power of two."""
    while len(leaves) > 1:
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        leaves = [hashlib.sha256(left + right).digest() for left, right in pairs]
    return leaves[0]


def padded_root(data: bytes, leaves: int) -> bytes:
    """The root over 16 KiB leaves, with zero hashes in place of those that are not there."""
    parts = [data[start : start + 16384] for start in range(0, len(data), 16384)]
    found = [hashlib.sha256(part).digest() for part in parts]
    return plain_root(found + [bytes(32)] * (leaves - len(found)))


def width(count: int) -> int:
    """The power of two that so many nodes fit in."""
    return 1 << (count - 1).bit_length()


def tree_of(
    files: dict[str, bytes], piece_length: int = 16384
) -> tuple[dict[bytes, object], dict[bytes, bytes]]:
    """The v2 file tree of some files, and their piece layers."""
    tree: dict[bytes, object] = {}
    layers: dict[bytes, bytes] = {}
    for name, data in files.items():
        *folders, last = name.encode().split(b"/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        leaf: dict[bytes, object] = {b"length": len(data)}
        if data:
            root = leaf[b"pieces root"] = padded_root(data, width(-(-len(data) // 16384)))
            if len(data) > piece_length:
                layers[root] = b"".join(
                    padded_root(data[start : start + piece_length], piece_length // 16384)
                    for start in range(0, len(data), piece_length)
                )
        branch[last] = {b"": leaf}
    return tree, layers


def v2_info(tree: dict[bytes, object], piece_length: int = 16384) -> dict[bytes, object]:
    return {
        b"file tree": tree,
        b"meta version": 2,
        b"name": b"grok-1",
        b"piece length": piece_length,
    }


def v2_of(files: dict[str, bytes], piece_length: int = 16384) -> bytes:
    tree, layers = tree_of(files, piece_length)
    return bencode(in_order({b"info": v2_info(tree, piece_length), b"piece layers": layers}))


def infohash_of(data: bytes) -> str:
    """The infohash as libtorrent has it: of v1 wherever there is one."""
    hashes = lt.load_torrent_buffer(data).info_hashes
    return str(hashes.v1 if hashes.has_v1() else hashes.v2)
