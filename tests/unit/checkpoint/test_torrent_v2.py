import random
import tempfile
import time
from pathlib import Path

import libtorrent as lt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torrents import (
    PAD,
    bencode,
    entry,
    in_order,
    infohash_of,
    names_in,
    padded_root,
    parse,
    plain_root,
    refusal,
    tree_of,
    v2_info,
    v2_of,
)

from grokctl.checkpoint.release_files import release_paths

KINDS = {"v1": lt.create_torrent.v1_only, "hybrid": None, "v2": lt.create_torrent.v2_only}


def made_by_libtorrent(root: Path, kind: str, piece_length: int) -> bytes:
    flags = [] if KINDS[kind] is None else [KINDS[kind]]
    torrent = lt.create_torrent(lt.list_files(str(root)), piece_length, *flags)
    lt.set_piece_hashes(torrent, str(root.parent))
    return lt.bencode(torrent.generate())


def assert_proves(data: bytes, files: dict[str, bytes]) -> None:
    """The torrent is read as libtorrent reads it, and each piece hashes to what it promises."""
    found, layout = parse(data), lt.load_torrent_buffer(data).ti.layout()
    assert found.infohash == infohash_of(data)
    assert [(file.length, file.offset, file.is_pad) for file in found.files] == [
        (layout.file_size(index), layout.file_offset(index), bool(layout.file_flags(index) & PAD))
        for index in range(layout.num_files())
    ]
    assert {"/".join(file.path): file.length for file in found.files if not file.is_pad} == {
        name: len(content) for name, content in files.items()
    }
    for piece in range(found.num_pieces):
        hasher = found.hasher()
        for file, start, length in found.spans(piece):
            content = bytes(length) if file.is_pad else files["/".join(file.path)]
            part = memoryview(content)[0 if file.is_pad else start :][:length]
            assert len(part) == length
            for cut in range(0, length, 40_000):
                hasher.update(part[cut : cut + 40_000])
        assert hasher.digest() == found.piece_hash(piece)


sizes_near_edges = st.tuples(
    st.sampled_from([0, 1, 16384, 32768, 65536, 81920, 131072]), st.integers(-1, 1)
).map(lambda at: max(0, sum(at)))


@pytest.mark.parametrize("kind", KINDS)
@given(
    sizes=st.lists(sizes_near_edges, min_size=1, max_size=6).filter(any),
    names=st.permutations([f"{folder}{name}" for folder in ("", "d/", "d/e/") for name in "ab"]),
    piece_length=st.sampled_from([16384, 32768, 65536]),
)
@settings(max_examples=40, deadline=None)
def test_every_piece_that_libtorrent_hashed_hashes_to_the_same(kind, sizes, names, piece_length):
    rng = random.Random(1)
    files = {name: rng.randbytes(size) for name, size in zip(names, sizes, strict=False)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "grok-1"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        data = made_by_libtorrent(root, kind, piece_length)

    assert_proves(data, files)


def test_the_same_files_are_read_from_torrents_of_every_version(folder):
    found = {kind: parse(made_by_libtorrent(folder, kind, 32768)) for kind in KINDS}

    assert {kind: metainfo.version for kind, metainfo in found.items()} == {
        "v1": 1,
        "hybrid": 1,
        "v2": 2,
    }
    assert {kind: len(metainfo.infohash) for kind, metainfo in found.items()} == {
        "v1": 40,
        "hybrid": 40,
        "v2": 64,
    }
    assert {frozenset(release_paths(metainfo).values()) for metainfo in found.values()} == {
        frozenset(names_in(folder))
    }


def test_files_of_the_same_content_share_a_piece_layer():
    content = random.Random(1).randbytes(40_000)

    found = parse(v2_of({"a": content, "b": content}))

    hashes = [found.piece_hash(piece) for piece in range(found.num_pieces)]
    assert len(hashes) == 6
    assert hashes[:3] == hashes[3:]


def test_a_v2_torrent_of_one_file_is_named_by_its_name(tmp_path):
    (tmp_path / "tensor00000_000").write_bytes(b"x" * 300)

    data = made_by_libtorrent(tmp_path / "tensor00000_000", "v2", 16384)

    assert_proves(data, {"tensor00000_000": b"x" * 300})


CONTENT = {"a": bytes(range(256)) * 200, "d/b": b"b" * 300, "d/c": b""}


TREE, LAYERS = tree_of(CONTENT)


(ROOT,) = LAYERS


def test_the_torrent_that_the_hostile_ones_are_made_from_is_fine():
    data = bencode(in_order({b"info": v2_info(TREE), b"piece layers": LAYERS}))

    assert_proves(data, CONTENT)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({b"file tree": {}}, id="no-files"),
        pytest.param({b"file tree": []}, id="a-list"),
        pytest.param({b"file tree": b"x"}, id="a-text"),
        pytest.param({b"file tree": TREE | {b"z": 5}}, id="a-file-that-is-a-number"),
        pytest.param({b"file tree": TREE | {b"z": {b"": 5}}}, id="an-entry-that-is-a-number"),
        pytest.param({b"file tree": TREE | {b"z": {b"": {}}}}, id="no-length"),
        pytest.param({b"file tree": TREE | {b"z": {b"": {b"length": b"5"}}}}, id="length-a-text"),
        pytest.param({b"file tree": TREE | {b"z": {b"": {b"length": 5}}}}, id="no-root"),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 5, b"pieces root": bytes(31)}}}},
            id="a-root-of-31-bytes",
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 5, b"pieces root": 7}}}},
            id="root-a-number",
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": -1, b"pieces root": ROOT}}}},
            id="negative-length",
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 2**53, b"pieces root": ROOT}}}},
            id="8-PB",
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 2**40, b"pieces root": ROOT}}}},
            id="too-many-pieces",
        ),
        pytest.param({b"file tree": {b"a": {b"": {b"length": 0}}}}, id="only-empty-files"),
        pytest.param({b"file tree": {b"": {b"length": 0}}}, id="a-file-without-a-name"),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 0}, b"y": {b"": {b"length": 0}}}}},
            id="a-file-and-a-folder",
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 0, b"attr": b"x"}}}}, id="executable"
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 0, b"attr": b"p"}}}}, id="a-pad"
        ),
        pytest.param({b"file tree": TREE | {b"z": {b"": {b"attr": b"l"}}}}, id="a-link"),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 0, b"symlink path": [b"a"]}}}},
            id="a-link-without-attribute",
        ),
        pytest.param(
            {b"file tree": TREE | {b"z": {b"": {b"length": 0, b"attr": 5}}}},
            id="attributes-a-number",
        ),
        pytest.param({b"file tree": TREE | {b"..": {b"": {b"length": 0}}}}, id="parents"),
        pytest.param({b"file tree": TREE | {b"..": {b"z": {b"": {b"length": 0}}}}}, id="above"),
        pytest.param({b"file tree": TREE | {b"a/b": {b"": {b"length": 0}}}}, id="a-slash"),
        pytest.param({b"file tree": TREE | {b"\x1b[2J": {b"": {b"length": 0}}}}, id="escape"),
        pytest.param({b"file tree": TREE | {b"\xff": {b"": {b"length": 0}}}}, id="no-UTF-8"),
        pytest.param({b"file tree": TREE | {b"A": {b"": {b"length": 0}}}}, id="twice-by-case"),
        pytest.param(
            {b"file tree": TREE | {b"A": {b"z": {b"": {b"length": 0}}}}}, id="folder-by-case"
        ),
        pytest.param(
            {b"file tree": {b"%d" % n: {b"": {b"length": 0}} for n in range(10_001)} | TREE},
            id="10004-files",
        ),
        pytest.param({b"piece length": 16384 * 3}, id="48-KiB-pieces"),
        pytest.param({b"piece length": 8192}, id="8-KiB-pieces"),
        pytest.param({b"piece length": 2**29}, id="512-MiB-pieces"),
        pytest.param({b"piece length": 32768}, id="layers-of-other-pieces"),
        pytest.param({b"meta version": 1}, id="version-1"),
        pytest.param({b"meta version": 3}, id="version-3"),
        pytest.param({b"meta version": b"2"}, id="version-a-text"),
        pytest.param({b"meta version": b"\x1b[2J" * 99}, id="version-escapes"),
        pytest.param({b"length": 5}, id="a-v1-length"),
        pytest.param({b"files": [entry(5, b"a")]}, id="a-v1-list"),
        pytest.param({b"pieces": bytes(20)}, id="v1-pieces-of-no-files"),
        pytest.param({b"pieces": 5}, id="v1-pieces-a-number"),
    ],
)
def test_contradicting_v2_metainfo_is_refused(change):
    info = v2_info(TREE) | change

    refusal(bencode({b"info": info, b"piece layers": LAYERS}))


@pytest.mark.parametrize("piece_length", [16384 * 3, 16385, 2**20 - 1])
def test_v2_pieces_of_no_power_of_two_are_refused(piece_length):
    tree, _ = tree_of({"a": b"a" * 300})

    error = refusal(bencode({b"info": v2_info(tree, piece_length)}))

    assert str(piece_length) in str(error)


@pytest.mark.parametrize("missing", [b"file tree", b"meta version", b"name", b"piece length"])
def test_v2_metainfo_that_lacks_something_is_refused(missing):
    info = {key: value for key, value in v2_info(TREE).items() if key != missing}

    refusal(bencode({b"info": info, b"piece layers": LAYERS}))


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param({}, id="missing"),
        pytest.param(5, id="a-number"),
        pytest.param([], id="a-list"),
        pytest.param({ROOT: 5}, id="layer-a-number"),
        pytest.param({ROOT: b""}, id="empty"),
        pytest.param({ROOT: LAYERS[ROOT][:-1]}, id="a-byte-short"),
        pytest.param({ROOT: LAYERS[ROOT][:-32]}, id="a-piece-short"),
        pytest.param({ROOT: LAYERS[ROOT] + bytes(32)}, id="a-piece-long"),
        pytest.param({ROOT: LAYERS[ROOT][:-1] + b"\0"}, id="a-wrong-byte"),
        pytest.param({ROOT: LAYERS[ROOT][32:] + LAYERS[ROOT][:32]}, id="another-order"),
        pytest.param({bytes(32): LAYERS[ROOT]}, id="of-another-file"),
        pytest.param(LAYERS | {bytes(32): b""}, id="one-too-many"),
        pytest.param(LAYERS | {padded_root(b"b" * 300, 1): b""}, id="of-a-small-file"),
    ],
)
def test_piece_layers_that_do_not_lead_to_the_root_are_refused(layers):
    error = refusal(bencode({b"info": v2_info(TREE), b"piece layers": layers}))

    assert "layer" in str(error) or "pieces root" in str(error)


def test_no_piece_layers_at_all_are_refused():
    refusal(bencode({b"info": v2_info(TREE)}))


@given(st.integers(0, len(LAYERS[ROOT]) * 8 - 1))
@settings(deadline=None)
def test_one_flipped_bit_in_a_piece_layer_is_refused(bit):
    layer = bytearray(LAYERS[ROOT])
    layer[bit // 8] ^= 1 << bit % 8

    refusal(bencode({b"info": v2_info(TREE), b"piece layers": {ROOT: bytes(layer)}}))


def test_a_v2_torrent_of_a_million_pieces_is_read_in_good_time():
    nodes = [bytes(31) + b"\1"] * 2**20
    layer = b"".join(nodes)
    leaf = {b"length": 2**34, b"pieces root": plain_root(nodes)}
    before = time.process_time()

    found = parse(
        bencode(
            {b"info": v2_info({b"a": {b"": leaf}}), b"piece layers": {leaf[b"pieces root"]: layer}}
        )
    )

    assert time.process_time() - before < 5
    assert found.num_pieces == 2**20


def test_folders_of_a_v2_file_tree_are_not_followed_forever():
    tree: dict[bytes, object] = {b"a": {b"": {b"length": 0}}}
    for _ in range(30):
        tree = {b"d": tree}

    refusal(bencode({b"info": v2_info(tree)}))
