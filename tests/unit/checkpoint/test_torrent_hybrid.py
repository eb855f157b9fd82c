import re

import libtorrent as lt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torrents import (
    EXECUTABLE,
    PAD,
    SYMLINK,
    bencode,
    entry,
    in_order,
    info_of,
    infohash_of,
    parse,
    refusal,
    torrent_of,
    tree_of,
    v2_info,
    v2_of,
)

from grokctl.checkpoint.release_files import release_paths
from grokctl.errors import FetchError


def hybrid_info(files: dict[str, bytes]) -> dict[bytes, object]:
    tree, _ = tree_of(files)
    entries: list[dict[bytes, object]] = []
    for name, data in files.items():
        entries.append(entry(len(data), *name.encode().split(b"/")))
        if pad := -len(data) % 16384:
            entries.append(entry(pad, b".pad", b"%d" % pad, attr=b"p"))
    return info_of(*entries) | v2_info(tree)


def hybrid_of(files: dict[str, bytes]) -> bytes:
    return bencode(in_order({b"info": hybrid_info(files)}))


def flags_of(data: bytes) -> list[int]:
    layout = lt.load_torrent_buffer(data).ti.layout()
    return [int(layout.file_flags(index)) for index in range(layout.num_files())]


def test_a_hybrid_torrent_is_read_by_its_v1_pieces_with_pads_set_aside(hybrid):
    found = parse(hybrid)

    assert found.infohash == str(lt.load_torrent_buffer(hybrid).info_hashes.v1)
    assert [file.is_pad for file in found.files] == [False, True, False, True]
    assert release_paths(found) == {0: "ckpt-0/tensor00000_000", 2: "ckpt-0/tensor00001_000"}


def test_an_executable_that_only_the_v2_file_tree_names_is_refused(hybrid):
    plain, marked = b"d6:lengthi300e11:pieces root", b"d4:attr1:x6:lengthi300e11:pieces root"
    data = hybrid.replace(plain, marked)
    assert EXECUTABLE in flags_of(data), "the attack is no attack"

    error = refusal(data)

    assert "executable" in str(error)


def test_a_link_that_only_the_v2_file_tree_names_is_refused():
    leaf = {b"": {b"length": 16384, b"pieces root": bytes(range(32))}}
    link = {b"": {b"attr": b"l", b"symlink path": [b"c"]}}
    info = info_of(
        entry(16384, b"a"),
        entry(0, b"b"),
        entry(16384, b"c"),
        meta_version=2,
        file_tree={b"a": leaf, b"b": link, b"c": leaf},
    )
    data = bencode({b"info": dict(sorted(info.items()))})
    assert SYMLINK in flags_of(data), "the attack is no attack"

    error = refusal(data)

    assert "link" in str(error)


HYBRID = {"a": b"a" * 20_000, "d/b": b"", "d/c": b"c" * 300}


def test_a_hybrid_torrent_with_or_without_its_last_pad_is_read():
    whole = hybrid_info(HYBRID)
    cut = whole | {b"files": whole[b"files"][:-1]}

    torrents = [bencode(in_order({b"info": info})) for info in (whole, cut)]

    found = [parse(data) for data in torrents]

    assert [file.is_pad for file in found[0].files] == [False, True, False, False, True]
    assert found[1].files == found[0].files[:-1]
    assert [metainfo.infohash for metainfo in found] == list(map(infohash_of, torrents))


def test_a_hybrid_torrent_of_one_file_needs_no_pad():
    tree, _ = tree_of({"grok-1": b"x" * 300})
    info = {b"length": 300, b"pieces": bytes(20)} | v2_info(tree)

    found = parse(bencode({b"info": info}))

    assert [(file.path, file.length) for file in found.files] == [(("grok-1",), 300)]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(HYBRID | {"a": b"a" * 20_001}, id="another-size"),
        pytest.param(HYBRID | {"d/c": b""}, id="an-empty-file"),
        pytest.param(HYBRID | {"e": b""}, id="one-more"),
        pytest.param({"a": HYBRID["a"], "d/c": HYBRID["d/c"]}, id="one-less"),
        pytest.param({"b": HYBRID["a"], "d/b": b"", "d/c": HYBRID["d/c"]}, id="another-name"),
        pytest.param({"a": HYBRID["a"], "e/b": b"", "d/c": HYBRID["d/c"]}, id="another-folder"),
        pytest.param({"d/b": b"", "d/c": HYBRID["d/c"], "a": HYBRID["a"]}, id="another-order"),
        pytest.param({}, id="no-files"),
    ],
)
def test_a_hybrid_torrent_whose_halves_name_other_files_is_refused(files):
    tree, _ = tree_of(files)

    error = refusal(bencode({b"info": hybrid_info(HYBRID) | {b"file tree": tree}}))

    assert "v2 file tree" in str(error)


@pytest.mark.parametrize(
    "pads",
    [
        pytest.param([], id="none"),
        pytest.param([12767, 16084], id="a-byte-short"),
        pytest.param([12769, 16084], id="a-byte-long"),
        pytest.param([12767, 16085], id="a-byte-in-the-other"),
        pytest.param([12768, 16083], id="the-last-a-byte-short"),
        pytest.param([12768, 16084 + 16384], id="the-last-a-piece-long"),
    ],
)
def test_a_hybrid_torrent_whose_pads_do_not_fill_its_pieces_is_refused(pads):
    files = [entry(20_000, b"a"), entry(0, b"d", b"b"), entry(300, b"d", b"c")]
    for place, pad in zip((3, 1), reversed(pads), strict=False):
        files.insert(place, entry(pad, b".pad", b"x", attr=b"p"))
    tree, _ = tree_of(HYBRID)

    error = refusal(bencode({b"info": info_of(*files) | v2_info(tree)}))

    assert "v2 file tree" in str(error)


def test_a_file_list_beside_a_single_length_is_refused():
    hidden = [entry(5, b"tensor00000_000"), entry(4, b".grokctl", b"receipt.json", attr=b"x")]
    data = torrent_of(*hidden, length=9, name=b"tensor00000_000")
    assert flags_of(data) == [0, EXECUTABLE], "the attack is no attack"

    refusal(data)


def test_padding_by_name_is_padding_as_it_is_for_libtorrent():
    data = torrent_of(
        entry(5, b"tensor00000_000"), entry(9, b"_____padding_file_0_if_you_see_this")
    )

    found = parse(data)

    assert [file.is_pad for file in found.files] == [bool(f & PAD) for f in flags_of(data)]


def assert_agrees_with_libtorrent(data: bytes) -> None:
    """What both accept, both see alike: nothing can be smuggled past the one by the other."""
    try:
        ours = parse(data)
        theirs = lt.load_torrent_buffer(data)
    except (FetchError, RuntimeError):
        return
    layout = theirs.ti.layout()
    assert ours.infohash == infohash_of(data)
    assert ours.piece_length == theirs.ti.piece_length()
    assert [(file.length, PAD if file.is_pad else 0) for file in ours.files] == [
        (layout.file_size(index), int(layout.file_flags(index)) & (SYMLINK | EXECUTABLE | PAD))
        for index in range(layout.num_files())
    ]


TEMPLATES = [
    torrent_of(entry(5, b"a"), entry(0, b"d", b"b"), entry(20000, b"d", b"c", attr=b"p")),
    bencode({b"info": info_of(entry(7, b"x")) | {b"attr": b"h", b"private": 1}}),
    bencode({b"info": {b"length": 5, b"name": b"t", b"piece length": 16384, b"pieces": bytes(20)}}),
    v2_of({"a": bytes(5), "d/b": b"", "d/c": bytes(40000)}),
    hybrid_of({"a": bytes(5), "d/b": b"", "d/c": bytes(40000)}),
]


@given(st.sampled_from(TEMPLATES), st.randoms(use_true_random=False), st.integers(1, 5))
@settings(max_examples=400, deadline=None)
def test_a_mutated_torrent_is_refused_or_read_as_libtorrent_does(template, rng, edits):
    data = bytearray(template)
    tokens = re.findall(rb"\d+:[a-z ]+|i-?\d+e|[dle]", template)
    for _ in range(edits):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.choice(b"0123456789deil:-px\xff")
            case 1:
                data[place:place] = rng.choice(tokens)
            case 2:
                del data[place : place + rng.randrange(1, 9)]
            case _:
                old, new = rng.choice(tokens), rng.choice(tokens)
                data = bytearray(bytes(data).replace(old, new, 1))
        data = data or bytearray(b"d")

    assert_agrees_with_libtorrent(bytes(data))
