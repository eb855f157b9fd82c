"""A miniature release, served on the loopback interface by a second libtorrent session."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.torrent import Metainfo, build_metainfo, parse_metainfo
from grokctl.fetch import FetchOptions, seeding

_SMALL = replace(MINIATURE, num_layers=1, emb_size=64, num_q_heads=4, num_kv_heads=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededRelease:
    """A release and everything that one needs to fetch it."""

    root: Path
    files: tuple[str, ...]
    torrent: bytes
    metainfo: Metainfo
    peer: str

    @property
    def magnet(self) -> str:
        return f"magnet:?xt=urn:btih:{self.metainfo.infohash}&dn=small"

    def options(self, **changes: Any) -> FetchOptions:
        """Fetch from this peer and look nowhere else."""
        return FetchOptions(**{**LOOPBACK, "peers": (self.peer,), **changes})

    def assert_arrived(self, root: Path, *, files: tuple[str, ...] | None = None) -> None:
        """Every file lies in its place and is the same to the byte, and nothing else does."""
        expected = set(self.files if files is None else files)
        found = {
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.is_file() and path.relative_to(root).parts[0] != ".grokctl"
        }
        assert found == expected | {"release.torrent"}
        for name in expected:
            assert (root / name).read_bytes() == (self.root / name).read_bytes(), name


LOOPBACK = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False, "stall_timeout_s": 20}


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeededRelease]:
    root = tmp_path_factory.mktemp("seeded") / "small"
    files = write_miniature(root, _SMALL, tokenizer=False)
    torrent = build_metainfo(root, files, name="another folder", piece_length=16384)

    with seeding(root, torrent) as (host, port):
        yield SeededRelease(
            root=root,
            files=tuple(files),
            torrent=torrent,
            metainfo=parse_metainfo(torrent, source="small"),
            peer=f"{host}:{port}",
        )


@pytest.fixture
def torrent_file(swarm: SeededRelease, tmp_path: Path) -> Path:
    """The torrent of the seeded release, as a user keeps it."""
    path = tmp_path / "given.torrent"
    path.write_bytes(swarm.torrent)
    return path


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder with a file that somebody would like to see overwritten."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "secret").write_bytes(b"precious")
    return folder
