import time

import pytest
from torrents import HASH, bencode, entry, info_of, parse, refusal, torrent_of

from grokctl.checkpoint.torrent import (
    folder_name,
    read_metainfo,
    trackers_of,
)
from grokctl.errors import FetchError


@pytest.mark.parametrize(
    "path",
    [
        pytest.param([b"..", b"..", b"etc", b"passwd"], id="parents"),
        pytest.param([b"../../etc/passwd"], id="parents-in-one"),
        pytest.param([b"/etc/passwd"], id="absolute"),
        pytest.param([b"..\\..\\x"], id="backslashes"),
        pytest.param([b"a", b"..", b"b"], id="parent-inside"),
        pytest.param([b"."], id="dot"),
        pytest.param([b"a", b"."], id="dot-inside"),
        pytest.param([b"a", b""], id="empty-last"),
        pytest.param([b"", b"a"], id="empty-first"),
        pytest.param([b"a\x1b[2Jb"], id="escape"),
        pytest.param([b"a\nb"], id="newline"),
        pytest.param([b"a\rb"], id="carriage-return"),
        pytest.param([b"a\0b"], id="nul"),
        pytest.param([b"a\x7fb"], id="delete"),
        pytest.param(["a\u202egpj.exe".encode()], id="right-to-left"),
        pytest.param(["a\u200bb".encode()], id="zero-width"),
        pytest.param(["a\u2028b".encode()], id="line-separator"),
        pytest.param(["a\u0085b".encode()], id="c1-control"),
        pytest.param(["\ue000".encode()], id="private-use"),
        pytest.param([b"\xff\xfe"], id="no-utf-8"),
        pytest.param([b"\xed\xa0\x80"], id="surrogate"),
        pytest.param([b"\xc0\xaf"], id="overlong-slash"),
        pytest.param([b"a" * 300], id="300-characters"),
        pytest.param(["\u00e9".encode() * 121], id="242-bytes"),
        pytest.param([b" a"], id="leading-space"),
        pytest.param([b"a "], id="trailing-space"),
        pytest.param([b" "], id="only-space"),
        pytest.param([], id="no-parts"),
        pytest.param([b"a"] * 101, id="101-folders"),
        pytest.param([7], id="a-number"),
        pytest.param([[b"a"]], id="a-list"),
    ],
)
def test_a_hostile_file_name_is_refused(path):
    refusal(torrent_of(entry(5, b"tensor00000_000"), entry(5, *path)))


@pytest.mark.parametrize("name", [b"..", b".", b"", b"/etc", b"a/b", b"a\\b", b"a\0", b"\xff"])
def test_a_hostile_name_of_a_single_file_is_refused(name):
    info = {b"length": 5, b"name": name, b"piece length": 16384, b"pieces": bytes(20)}

    refusal(bencode({b"info": info}))


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param([[b"a"], [b"a"]], id="twice"),
        pytest.param([[b"a"], [b"A"]], id="by-case"),
        pytest.param([["stra\u00dfe".encode()], [b"STRASSE"]], id="by-case-folding"),
        pytest.param([[b"d", b"a"], [b"D", b"a"]], id="in-folders-by-case"),
        pytest.param([[b"a"], [b"a", b"b"]], id="file-and-folder"),
        pytest.param([[b"a", b"b"], [b"a"]], id="folder-and-file"),
        pytest.param([[b"a", b"b", b"c"], [b"A"]], id="folder-and-file-by-case"),
    ],
)
def test_two_files_for_one_name_are_refused(paths):
    error = refusal(torrent_of(*(entry(5, *path) for path in paths)))

    assert "two files with the same path" in str(error)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(entry(0, b"a", attr=b"l", symlink_path=[b"/", b"etc"]), id="absolute"),
        pytest.param(entry(0, b"a", attr=b"l", symlink_path=[b"..", b".."]), id="parents"),
        pytest.param(entry(0, b"a", attr=b"l", symlink_path=[b"tensor00000_000"]), id="inside"),
        pytest.param(entry(0, b"a", attr=b"hl"), id="without-target"),
        pytest.param(entry(0, b"a", symlink_path=[b"b"]), id="without-attribute"),
        pytest.param(entry(0, b"a", attr=b"pl", symlink_path=[b"b"]), id="disguised-as-pad"),
    ],
)
def test_a_symbolic_link_is_refused(file):
    error = refusal(torrent_of(entry(5, b"tensor00000_000"), file))

    assert "symbolic link" in str(error)


@pytest.mark.parametrize("attributes", [b"x", b"hx", b"xp"])
def test_an_executable_is_refused(attributes):
    error = refusal(torrent_of(entry(5, b"a", attr=attributes)))

    assert "executable" in str(error)


def test_a_hidden_file_with_a_harmless_name_is_accepted():
    found = parse(torrent_of(entry(5, b".gitattributes", attr=b"h")))

    assert found.files[0].path == (".gitattributes",)


@pytest.mark.parametrize(
    "name", ["..", "/etc", "../../etc", "a\nb", "", ".hidden", "-rf", "a" * 65]
)
def test_a_hostile_folder_name_gives_way_to_the_infohash(name):
    assert folder_name(name, HASH) == HASH[:16]
    assert folder_name("grok-1", HASH) == "grok-1"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({b"piece length": 0}, id="piece-length-0"),
        pytest.param({b"piece length": -16384}, id="piece-length-negative"),
        pytest.param({b"piece length": 1}, id="piece-length-1"),
        pytest.param({b"piece length": 100}, id="piece-length-100"),
        pytest.param({b"piece length": 16383}, id="piece-length-below-16-KiB"),
        pytest.param({b"piece length": 2**30}, id="piece-length-1-GiB"),
        pytest.param({b"piece length": 2**62}, id="piece-length-2-to-the-62"),
        pytest.param({b"piece length": b"16384"}, id="piece-length-a-text"),
        pytest.param({b"pieces": b""}, id="no-hash"),
        pytest.param({b"pieces": bytes(19)}, id="19-bytes"),
        pytest.param({b"pieces": bytes(21)}, id="21-bytes"),
        pytest.param({b"pieces": bytes(40)}, id="one-hash-too-many"),
        pytest.param({b"pieces": []}, id="hashes-a-list"),
        pytest.param({b"name": 5}, id="name-a-number"),
        pytest.param({b"name": [b"x"]}, id="name-a-list"),
        pytest.param({b"name": b"\xff"}, id="name-no-UTF-8"),
        pytest.param({b"files": []}, id="no-files"),
        pytest.param({b"files": {}}, id="files-a-dictionary"),
        pytest.param({b"files": [b"x"]}, id="a-file-that-is-a-text"),
        pytest.param({b"files": [{b"path": [b"a"]}]}, id="no-length"),
        pytest.param({b"files": [{b"length": 5}]}, id="no-path"),
        pytest.param({b"files": [{b"length": b"5", b"path": [b"a"]}]}, id="length-a-text"),
        pytest.param({b"files": [{b"length": 5, b"path": b"a"}]}, id="path-a-text"),
        pytest.param({b"files": [entry(-5, b"a"), entry(10, b"b")]}, id="negative-length"),
        pytest.param({b"files": [entry(2**53, b"a")]}, id="8-PB"),
        pytest.param({b"files": [entry(2**62, b"a"), entry(2**62, b"b")]}, id="overflow"),
        pytest.param({b"files": [entry(0, b"a")], b"pieces": b""}, id="only-empty-files"),
        pytest.param({b"files": [entry(5, b"a", attr=1)]}, id="attributes-a-number"),
        pytest.param({b"files": [entry(1, b"%d" % n) for n in range(10_001)]}, id="10001-files"),
    ],
)
def test_contradicting_metainfo_is_refused(change):
    refusal(bencode({b"info": info_of(entry(5, b"a")) | change}))


@pytest.mark.parametrize("pieces", [2**20 + 1, 1_600_000])
def test_more_pieces_than_any_release_has_are_refused(pieces):
    data = torrent_of(entry(pieces * 16384, b"a"))
    before = time.thread_time()

    refusal(data)

    assert time.thread_time() - before < 5


def test_a_claim_of_ten_million_pieces_is_refused():
    refusal(torrent_of(entry(10_000_000 * 16384, b"a"), pieces=bytes(20)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"e", id="an-end"),
        pytest.param(b"le", id="a-list"),
        pytest.param(b"i5e", id="a-number"),
        pytest.param(b"de", id="an-empty-dictionary"),
        pytest.param(b"d4:infoe", id="a-key-without-value"),
        pytest.param(b"d4:info4:texte", id="info-a-text"),
        pytest.param(b"di4e4:texte", id="a-key-that-is-a-number"),
        pytest.param(b"d4:infodee", id="an-empty-info"),
        pytest.param(b"<html>404</html>", id="a-web-page"),
        pytest.param(b"magnet:?xt=urn:btih:" + b"a" * 40, id="a-magnet"),
        pytest.param(b"l" * 100_000, id="deep-lists"),
        pytest.param(b"d1:a" * 100_000, id="deep-dictionaries"),
        pytest.param(b"d1:a" + b"l" * 40 + b"e" * 40 + b"e", id="40-lists-deep"),
        pytest.param(b"d1:a99999999999999999999:xe", id="a-text-of-20-digits"),
        pytest.param(b"d1:a9999999999:xe", id="a-text-of-10-GB"),
        pytest.param(b"d1:a2147483648:xe", id="a-text-of-2-GiB"),
        pytest.param(b"d1:a01:xe", id="a-length-with-a-zero"),
        pytest.param(b"d1:a-1:xe", id="a-negative-text"),
        pytest.param(b"d1:ai05ee", id="a-number-with-a-zero"),
        pytest.param(b"d1:ai-0ee", id="minus-zero"),
        pytest.param(b"d1:ai-ee", id="only-a-minus"),
        pytest.param(b"d1:aiee", id="no-digits"),
        pytest.param(b"d1:ai 5ee", id="a-space"),
        pytest.param(b"d1:ai+5ee", id="a-plus"),
        pytest.param(b"d1:ai1_000ee", id="an-underscore"),
        pytest.param(b"d1:ai" + b"9" * 5000 + b"ee", id="5000-digits"),
        pytest.param(b"d1:ai5.0ee", id="a-fraction"),
        pytest.param("d1:ai\u0665ee".encode(), id="arabic-digits"),
    ],
)
def test_what_is_no_torrent_is_refused(data):
    refusal(data)


def test_a_torrent_cut_anywhere_is_refused():
    whole = torrent_of(entry(5, b"a"), entry(20000, b"d", b"c"))
    for length in range(len(whole)):
        refusal(whole[:length])

    refusal(whole + b"x")
    refusal(whole + whole)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(
            torrent_of(entry(5, b"a"))[:-1] + b"4:info" + bencode(info_of(entry(6, b"b"))) + b"e",
            id="info",
        ),
        pytest.param(
            b"d4:info" + bencode(info_of(entry(5, b"a")))[:-1] + b"4:name1:xee", id="name"
        ),
        pytest.param(
            b"d1:x1:a1:x1:b4:info" + bencode(info_of(entry(5, b"a"))) + b"e", id="unknown"
        ),
    ],
)
def test_a_key_that_stands_twice_is_refused(data):
    error = refusal(data)

    assert "duplicate key" in str(error)


@pytest.mark.parametrize("filler", [b"0:", b"le", b"de", b"i0e"])
def test_a_torrent_of_millions_of_tiny_values_is_refused_in_good_time(filler):
    # a release has about ten thousand values, a hostile file of the size allowed sixteen million
    data = b"d1:al" + filler * (16 * 2**20 // len(filler)) + b"ee"
    before = time.thread_time()

    refusal(data)

    assert time.thread_time() - before < 10


def test_a_file_too_large_for_a_torrent_is_not_read(tmp_path):
    path = tmp_path / "huge.torrent"
    with path.open("wb") as file:
        file.truncate(2**40)

    with pytest.raises(FetchError, match="at most 33,554,432 bytes"):
        read_metainfo(path)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"d13:announce-listi5e4:infodee", id="tiers-a-number"),
        pytest.param(b"d13:announce-list1:x4:infodee", id="tiers-a-text"),
        pytest.param(b"d13:announce-listl1:xe4:infodee", id="a-tier-that-is-a-text"),
        pytest.param(b"d13:announce-listlli5eee4:infodee", id="a-url-that-is-a-number"),
        pytest.param(b"d8:announcei5e4:infodee", id="announce-a-number"),
        pytest.param(b"d8:announce9:http://[a4:infodee", id="announce-no-address"),
        pytest.param(b"d8:announce12:http://\xff\xfe\xfd.x4:infodee", id="announce-no-UTF-8"),
        pytest.param(b"d8:announce11:file:///etc4:infodee", id="announce-a-file"),
        pytest.param(b"d8:announce19:javascript:alert(1)4:infodee", id="announce-a-script"),
    ],
)
def test_a_hostile_announce_never_breaks_and_never_gives_another_scheme(data):
    urls = trackers_of(data)

    assert all(url.startswith(("http://", "https://", "udp://")) for url in urls)


def test_trackers_of_no_torrent_are_a_fetch_error():
    with pytest.raises(FetchError):
        trackers_of(b"d8:announce")
