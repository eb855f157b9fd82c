import hashlib
import os
import stat

import libtorrent as lt
import pytest
from torrents import bencode, entry, info_of, names_in, parse

from grokctl.checkpoint.torrent import (
    build_metainfo,
    trackers_of,
    write_torrent,
)


@pytest.mark.parametrize("piece_length", [16384, 32768, 2**20])
def test_a_torrent_promises_the_hashes_of_the_concatenated_files(folder, piece_length):
    names = names_in(folder)
    whole = b"".join((folder / name).read_bytes() for name in names)

    found = parse(build_metainfo(folder, names, name="grok-1", piece_length=piece_length))

    assert ["/".join(file.path) for file in found.files] == names
    assert [file.length for file in found.files] == [
        (folder / name).stat().st_size for name in names
    ]
    assert [found.piece_hash(piece) for piece in range(found.num_pieces)] == [
        hashlib.sha1(whole[start : start + piece_length]).digest()
        for start in range(0, len(whole), piece_length)
    ]
    assert (found.name, found.piece_length, found.total) == ("grok-1", piece_length, len(whole))


def test_libtorrent_finds_the_same_infohash_and_files(folder):
    data = build_metainfo(folder, names_in(folder), name="grok-1", piece_length=16384)

    ours, theirs = parse(data), lt.load_torrent_buffer(data)

    layout = theirs.ti.layout()
    assert ours.infohash == str(theirs.info_hashes.v1)
    assert [(f"grok-1/{'/'.join(file.path)}", file.length, file.offset) for file in ours.files] == [
        (layout.file_path(index), layout.file_size(index), layout.file_offset(index))
        for index in range(layout.num_files())
    ]


def test_trackers_are_written_and_read_again(folder):
    trackers = ["http://tracker.example/announce", "udp://tracker.example:6969"]

    data = build_metainfo(folder, names_in(folder), name="t", piece_length=16384, trackers=trackers)

    assert trackers_of(data) == tuple(trackers)
    assert [str(url) for url in lt.load_torrent_buffer(data).trackers] == trackers
    assert trackers_of(build_metainfo(folder, names_in(folder), name="t", piece_length=16384)) == ()


def test_the_infohash_is_that_of_the_bytes_as_they_stand():
    backwards = dict(reversed(info_of(entry(5, b"a")).items()))
    data = bencode({b"comment": b"x", b"info": backwards, b"zzz": [1, [2]]})

    found = parse(data)

    assert found.infohash == hashlib.sha1(bencode(backwards)).hexdigest()
    assert found.infohash == str(lt.load_torrent_buffer(data).info_hashes.v1)


def test_a_torrent_of_one_file_is_named_by_its_name():
    info = {b"length": 5, b"name": b"tensor00000_000", b"piece length": 16384, b"pieces": bytes(20)}

    found = parse(bencode({b"info": info}))

    assert [(file.path, file.length) for file in found.files] == [(("tensor00000_000",), 5)]


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        pytest.param({}, 0o644, id="none"),
        pytest.param({b"announce": b"http://tracker/announce"}, 0o644, id="public"),
        pytest.param({b"announce": b"http://tracker/0a1b2c3d4e5f6071/announce"}, 0o600, id="path"),
        pytest.param(
            {b"announce-list": [[b"udp://tracker:1"], [b"http://tracker/?passkey=x"]]},
            0o600,
            id="query",
        ),
        pytest.param({b"url-list": b"http://me:opensesame@seed/"}, 0o600, id="web-seed"),
    ],
)
def test_a_torrent_with_a_passkey_is_for_its_user_alone(tmp_path, values, mode):
    path, data = tmp_path / "release.torrent", bencode(values | {b"info": {}})
    path.write_bytes(b"before")

    before = os.umask(0o022)
    try:
        write_torrent(path, data)
    finally:
        os.umask(before)

    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == mode
