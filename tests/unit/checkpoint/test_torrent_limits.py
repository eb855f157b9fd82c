"""Torrents of a size that no release has: refused before anything is made of them."""

import time
from collections.abc import Callable

import pytest
from torrents import bencode, entry, in_order, info_of, parse, refusal, torrent_of, v2_info

from grokctl.checkpoint.bencode import decode
from grokctl.checkpoint.folders import partial_files
from grokctl.checkpoint.torrent import parse_magnet, parse_metainfo, trackers_of
from grokctl.model.config import GROK_1
from grokctl.model.tensors import tensor_specs

TENSOR = entry(5, b"tensor00000_000")
PART = b"a" * 180
LONG = "ß\u3164".encode() * 5_000_000


def long_names() -> bytes:
    deep = [[b"%05d" % file, *[PART] * 14] for file in range(10_000)]
    return torrent_of(TENSOR, *(entry(0, *path) for path in deep))


def long_tree() -> bytes:
    leaf = {b"": {b"length": 0}}
    return bencode(
        {b"info": v2_info({b"%05d" % file + PART: {PART: leaf} for file in range(9000)})}
    )


def many_folders() -> bytes:
    return torrent_of(TENSOR, *(entry(0, b"%d" % file, *[b"a"] * 15) for file in range(9000)))


def trackers(urls: int, length: int) -> bytes:
    tiers = [[b"http://t%d.example/" % url + b"z" * length] for url in range(urls)]
    return bencode({b"announce-list": tiers, b"info": info_of(TENSOR)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(long_names, "bytes of names", id="28-MB-of-names"),
        pytest.param(long_tree, "bytes of names", id="names-in-a-tree"),
        pytest.param(lambda: torrent_of(TENSOR, entry(0, LONG)), "bytes of names", id="one-name"),
        pytest.param(lambda: torrent_of(TENSOR, name=LONG), "has a name of", id="its-own-name"),
        pytest.param(many_folders, "more than 100,000 values", id="folders"),
        pytest.param(lambda: torrent_of(*[TENSOR] * 10_001), "10,001 files", id="files"),
        pytest.param(lambda: trackers(15_000, 2000), "bytes of names", id="28-MB-of-trackers"),
        pytest.param(lambda: trackers(100_000, 1), "more than 100,000 values", id="trackers"),
    ],
)
def test_names_and_trackers_of_megabytes_are_refused_at_once(make: Callable[[], bytes], words):
    data = make()
    before = time.thread_time()

    error = refusal(data)

    assert time.thread_time() - before < 2  # it was 196 s to the end of the dry run
    assert words in str(error)
    assert len(str(error)) < 200
    assert error.hint is not None


def test_grok_1_with_hashes_of_both_versions_and_a_pad_for_each_file_is_far_below_every_limit():
    names = [f"ckpt-0/{spec.file}".encode() for spec in tensor_specs(GROK_1)]
    assert len(names) == 770
    entries, tree = [], {}
    for name in names:
        entries.append(entry(400_000_001, *name.split(b"/"), attr=b"h", md5sum=b"0" * 32))
        entries.append(entry(99, b".pad", b"99", attr=b"p"))
        tree[name[7:]] = {b"": {b"length": 400_000_001, b"pieces root": bytes(32)}}
    info = info_of(TENSOR) | {b"files": entries} | v2_info({b"ckpt-0": tree})
    layers = {b"%032d" % file: bytes(32 * 400) for file in range(len(names))}
    data = bencode(in_order({b"info": info, b"piece layers": layers}))

    found, _ = decode(data, most_depth=16, most_nested=2 * 2**20 // 10)

    assert len(data) > 9_000_000
    assert len(found[b"info"][b"files"]) == 1540


def test_of_many_trackers_the_first_200_are_asked():
    urls = [f"udp://t{number}.example:1" for number in range(500)]
    data = bencode({b"announce-list": [[url.encode()] for url in urls], b"info": info_of(TENSOR)})
    link = "magnet:?xt=urn:btih:" + "0" * 40 + "".join(f"&tr={url}" for url in urls)

    assert trackers_of(data) == parse_magnet(link).trackers == tuple(urls[:200])
    assert trackers_of(trackers(1, 3000)) == ()


def test_a_torrent_is_parsed_once():
    data = torrent_of(TENSOR, entry(7, b"ckpt-0", b"tensor00001_000"))

    assert parse_metainfo(data, source="a") is parse_metainfo(bytes(bytearray(data)), source="b")
    assert parse(torrent_of(TENSOR)).total == 5


def test_files_of_other_programs_are_looked_for_in_folders_that_are_there(tmp_path):
    (tmp_path / "a.part").write_bytes(b"")
    (tmp_path / "a.PART").symlink_to("nothing")
    (tmp_path / "a.tmp").mkdir()

    assert {path.name for path in partial_files(tmp_path, "a")} == {"a.part", "a.PART"}
    assert not list(partial_files(tmp_path / "missing", "a"))
    assert not list(partial_files(tmp_path, "a.part/b"))
