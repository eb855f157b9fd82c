"""A small release that nobody seeds, whole and for each test to damage."""

import shutil
from pathlib import Path

import pytest
from damaging import PIECE, SMALL, Seeded

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Seeded:
    root = tmp_path_factory.mktemp("pristine") / "small"
    files = write_miniature(root, SMALL, tokenizer=False)
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    metainfo = parse_metainfo(torrent, source="small")
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=metainfo.infohash, trust=TYPED)
    return Seeded(root, metainfo)


@pytest.fixture
def seeded(pristine, tmp_path) -> Seeded:
    """A copy that a test may damage."""
    return Seeded(shutil.copytree(pristine.root, tmp_path / "small"), pristine.metainfo)


@pytest.fixture
def root(seeded) -> Path:
    return seeded.root
