"""A small release with a torrent whose pieces its files share, and ways to damage it."""

import errno
import io
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import Metainfo

PIECE = 16384


SMALL = replace(MINIATURE, num_layers=1, vocab_size=512, emb_size=64, num_q_heads=4, num_kv_heads=2)


# SMALL's gate is file 2, down 3, up 4; norms and router are a few hundred bytes each
GATE, DOWN, UP, NORM = (f"ckpt-0/tensor{index:05d}_000" for index in (2, 3, 4, 9))


@dataclass(frozen=True, eq=False)
class Seeded:
    root: Path
    metainfo: Metainfo

    def files(self) -> dict[str, tuple[int, int]]:
        """Offset and length of each file."""
        return {"/".join(file.path): (file.offset, file.length) for file in self.metainfo.files}

    def piece_mates(self, name: str, offset: int) -> set[str]:
        """The files that share the piece of a byte."""
        piece = (self.files()[name][0] + offset) // PIECE
        return {"/".join(file.path) for file, _, _ in self.metainfo.spans(piece)}

    def pieces_of(self, name: str) -> range:
        (file,) = (file for file in self.metainfo.files if "/".join(file.path) == name)
        return self.metainfo.pieces_of(file)

    def is_payload(self, name: str, offset: int) -> bool:
        """Whether a byte belongs to an array, and not to the pickle around it."""
        return any(low <= offset < high for low, high in payloads(self.root).get(name, ()))

    def piece_range(self, name: str, offset: int) -> tuple[int, int]:
        """The bytes of a file in the piece of one of them."""
        start, length = self.files()[name]
        low = (start + offset) // PIECE * PIECE - start
        return max(0, low), min(length, low + PIECE)


@cache
def payloads(root: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """Where the arrays of each file lie; asked for before anything is damaged."""
    return {
        f"ckpt-0/{tensor.spec.file}": tuple(
            (ref.offset, ref.offset + ref.nbytes)
            for ref in (tensor.weight, tensor.scales)
            if ref is not None
        )
        for tensor in open_release(root).tensors
    }


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def found(verdict):
    return {damage.file: damage for damage in verdict.damage}


def break_disk(monkeypatch, name: str, offset: int) -> None:
    """Let the disk refuse to read a file from some place on."""

    def preadv(handle, buffers, start, flags=0):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.name == Path(name).name and start + len(buffers[0]) > offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(handle, buffers, start, flags)

    read = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)


def refuse(monkeypatch, name: str, code: int) -> None:
    """Let the system refuse to open a file."""

    def refusing(function):
        def opening(path, *arguments, **options):
            if isinstance(path, str | os.PathLike) and Path(path).name == Path(name).name:
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *arguments, **options)

        return opening

    monkeypatch.setattr(os, "open", refusing(os.open))
    monkeypatch.setattr(io, "open", refusing(io.open))


def flip_unseen(path: Path, offset: int) -> None:
    before = path.stat()
    flip(path, offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
