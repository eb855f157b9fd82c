"""What a fetch leaves for the next one."""

import os
import time

import pytest
from torrents import bencode, entry, parse, torrent_of
from users import mode_of

from grokctl.transfer.destination import save_resume_data, take_resume_data
from grokctl.transfer.resume_data import read_claims
from grokctl.transfer.swarm_types import Claims

METAINFO = parse(torrent_of(entry(100_000, b"tensor00000_000")))


def resume_of(**more: object) -> bytes:
    values = {
        b"file-format": b"libtorrent resume file",
        b"file-version": 1,
        b"info-hash": bytes.fromhex(METAINFO.infohash),
        b"pieces": bytes([1, 0, 0, 0, 0, 0, 0]),
    }
    return bencode(values | {key.encode(): value for key, value in more.items()})


@pytest.mark.parametrize("is_final", [False, True])
@pytest.mark.parametrize("before", [None, 0o644])
def test_trackers_and_peers_are_read_by_nobody_else(tmp_path, is_final, before):
    (tmp_path / ".grokctl").mkdir()
    path = tmp_path / ".grokctl" / ("resume" if is_final else "resume.begun")
    if before is not None:  # by an earlier version
        path.touch(before)
    umask = os.umask(0)
    try:
        save_resume_data(tmp_path, b"passkey", is_final=is_final)
    finally:
        os.umask(umask)

    assert mode_of(path) == 0o600
    assert take_resume_data(tmp_path) == (b"passkey", is_final)


def test_the_blocks_of_incomplete_pieces_are_claimed():
    resume = resume_of(unfinished=[{b"bitmask": b"\x80", b"piece": 3}])

    claims = read_claims(resume, METAINFO, {})

    assert claims.have == {0}
    assert {piece: blocks[0] for piece, blocks in claims.unfinished.items()} == {3: True}
    assert read_claims(resume, METAINFO, {0: 20_000}).unfinished == {}  # the file ends before it


@pytest.mark.parametrize(
    "masks",
    [
        pytest.param([b"\xff" * 60_000] * 100, id="in-many-pieces"),
        pytest.param([b"\xff" * 5_000_000], id="in-one"),
        pytest.param([b""] * 100_000, id="of-none"),
    ],
)
def test_millions_of_blocks_of_incomplete_pieces_claim_nothing(masks):
    entries = [{b"bitmask": mask, b"piece": piece % 7} for piece, mask in enumerate(masks)]
    resume = resume_of(unfinished=entries)
    before = time.thread_time()

    assert read_claims(resume, METAINFO, {}) == Claims()

    assert time.thread_time() - before < 2  # 61 MB of them were 26 s and 8 GB
