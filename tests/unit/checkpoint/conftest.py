"""Files for torrents."""

import random
from pathlib import Path

import libtorrent as lt
import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files around the edges of 16 KiB pieces."""
    root = tmp_path / "files"
    rng = random.Random(1)
    for index, length in enumerate([16383, 1, 0, 16384, 16385, 0, 5, 40000, 0]):
        path = root / f"ckpt-0/tensor{index:05d}_000"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(length))
    (root / "tokenizer.model").write_bytes(rng.randbytes(77))
    return root


@pytest.fixture
def hybrid(tmp_path: Path) -> bytes:
    root = tmp_path / "grok-1"
    root.mkdir()
    (root / "tensor00000_000").write_bytes(bytes(50_000))
    (root / "tensor00001_000").write_bytes(bytes(300))
    torrent = lt.create_torrent(lt.list_files(str(root)), 16384)
    lt.set_piece_hashes(torrent, str(tmp_path))
    return lt.bencode(torrent.generate())
