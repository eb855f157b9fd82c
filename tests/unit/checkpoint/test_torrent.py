import base64
import hashlib
import random
import re
import tempfile
import time
import unicodedata
from itertools import accumulate
from pathlib import Path

import libtorrent as lt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.release import release_paths
from grokctl.checkpoint.torrent import (
    GROK_1_MAGNET,
    Metainfo,
    TorrentFile,
    build_metainfo,
    folder_name,
    parse_magnet,
    parse_metainfo,
    read_metainfo,
    trackers_of,
)
from grokctl.errors import FetchError
from grokctl.text import printable

SYMLINK, EXECUTABLE, PAD = 8, 4, 1
"""File flags as libtorrent has them."""
HASH = "0123456789abcdef0123456789abcdef01234567"
HASH_V2 = "0123456789abcdef" * 4
XT_V2 = f"magnet:?xt=urn:btmh:1220{HASH_V2}"
XT = f"magnet:?xt=urn:btih:{HASH}"


def bencode(value: object) -> bytes:
    """Encode in the order given, so that wrong orders and repeated keys can be written."""
    match value:
        case int():
            return b"i%de" % value
        case bytes():
            return b"%d:%b" % (len(value), value)
        case list():
            return b"l" + b"".join(map(bencode, value)) + b"e"
        case dict():
            return b"d" + b"".join(bencode(k) + bencode(v) for k, v in value.items()) + b"e"
    raise TypeError(value)


def in_order(value: object) -> object:
    """With the keys of dictionaries sorted, as libtorrent wants them in v2 torrents."""
    match value:
        case dict():
            return {key: in_order(value[key]) for key in sorted(value)}
        case list():
            return [in_order(item) for item in value]
        case _:
            return value


def entry(length: int, *path: bytes, **more: object) -> dict[bytes, object]:
    return {
        b"length": length,
        b"path": list(path),
        **{key.replace("_", " ").encode(): value for key, value in more.items()},
    }


def info_of(*files: dict[bytes, object], **more: object) -> dict[bytes, object]:
    """An info dictionary that promises nothing about its content, with the right hash count."""
    total = sum(max(0, file[b"length"]) for file in files)
    info = {
        b"files": list(files),
        b"name": b"grok-1",
        b"piece length": 16384,
        b"pieces": bytes(20 * -(-total // 16384)),
    }
    return info | {key.replace("_", " ").encode(): value for key, value in more.items()}


def torrent_of(*files: dict[bytes, object], **more: object) -> bytes:
    return bencode({b"info": info_of(*files, **more)})


def parse(data: bytes) -> Metainfo:
    return parse_metainfo(data, source="x.torrent")


def is_one_clean_line(text: str) -> bool:
    """No control, format or direction character, and nothing that begins a line."""
    kinds = {unicodedata.category(character) for character in text}
    return not any(kind[0] == "C" or kind in {"Zl", "Zp"} for kind in kinds)


def refusal(data: bytes) -> FetchError:
    with pytest.raises(FetchError) as caught:
        parse(data)
    assert is_one_clean_line(str(caught.value))
    assert len(str(caught.value)) < 500
    return caught.value


def metainfo_of(lengths: list[int], piece_length: int) -> Metainfo:
    """Metainfo of any geometry."""
    offsets = list(accumulate(lengths, initial=0))
    files = tuple(
        TorrentFile(index=index, path=(f"f{index}",), length=length, offset=offset)
        for index, (length, offset) in enumerate(zip(lengths, offsets, strict=False))
    )
    pieces = -(-offsets[-1] // piece_length)
    return Metainfo(
        infohash=HASH,
        name="any",
        piece_length=piece_length,
        piece_hashes=b"".join(bytes([piece % 256]) * 20 for piece in range(pieces)),
        files=files,
    )


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


def names_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# --- pieces and files

lengths_and_piece = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.integers(1, 50)
)


def v2_metainfo_of(lengths: list[int], piece_length: int) -> Metainfo:
    """The same files, with the pads that make each begin a piece."""
    files: list[TorrentFile] = []
    offset = 0
    for name, length in enumerate(lengths):
        for size, is_pad in ((length, False), (-length % piece_length, True)):
            if size or not is_pad:
                files.append(
                    TorrentFile(
                        index=len(files),
                        path=(f"f{name}",),
                        length=size,
                        offset=offset,
                        is_pad=is_pad,
                    )
                )
                offset += size
    pieces = range(offset // piece_length)
    return Metainfo(
        version=2,
        infohash=HASH_V2,
        name="any",
        piece_length=piece_length,
        piece_hashes=b"".join(bytes([piece % 256]) * 32 for piece in pieces),
        files=tuple(files),
    )


@given(lengths_and_piece)
@settings(deadline=None)
def test_v2_pieces_tile_every_byte_of_every_file_once_and_never_span_two(geometry):
    metainfo = v2_metainfo_of(*geometry)

    pieces = [metainfo.spans(piece) for piece in range(metainfo.num_pieces)]

    assert all(len(spans) == 1 for spans in pieces)
    assert [
        (file.index, start + step) for ((file, start, length),) in pieces for step in range(length)
    ] == [(f.index, byte) for f in metainfo.files if not f.is_pad for byte in range(f.length)]


@given(lengths_and_piece)
@settings(deadline=None)
def test_v2_piece_sizes_add_up_to_the_files_and_pieces_of_a_file_are_its_own(geometry):
    metainfo = v2_metainfo_of(*geometry)

    sizes = [metainfo.piece_size(piece) for piece in range(metainfo.num_pieces)]
    named = {
        file.index: [
            piece
            for piece in range(metainfo.num_pieces)
            for span in metainfo.spans(piece)
            if span[0] == file
        ]
        for file in metainfo.files
    }

    assert sum(sizes) == sum(geometry[0])
    assert sizes == [metainfo.spans(piece)[0][2] for piece in range(metainfo.num_pieces)]
    assert {file.index: list(metainfo.pieces_of(file)) for file in metainfo.files} == named
    assert metainfo.total == metainfo.num_pieces * metainfo.piece_length


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        pytest.param([10], [(0, 0, 10)], id="exact"),
        pytest.param([9], [(0, 0, 9)], id="one-less"),
        pytest.param([11], [(0, 0, 10), (0, 10, 1)], id="one-more"),
        pytest.param([9, 1], [(0, 0, 9), (2, 0, 1)], id="small-files"),
        pytest.param([0, 10, 0, 0, 1, 0], [(1, 0, 10), (4, 0, 1)], id="empty-files-at-edges"),
    ],
)
def test_v2_spans_at_the_edges_of_pieces(lengths, spans):
    metainfo = v2_metainfo_of(lengths, 10)

    found = [metainfo.spans(piece) for piece in range(metainfo.num_pieces)]

    assert [(f.index, at, n) for ((f, at, n),) in found] == spans


def test_each_v2_piece_has_its_own_hash():
    metainfo = v2_metainfo_of([35, 1], 10)

    hashes = [metainfo.piece_hash(piece) for piece in range(metainfo.num_pieces)]

    assert hashes == [bytes([piece]) * 32 for piece in range(5)]


@given(lengths_and_piece)
@settings(deadline=None)
def test_spans_tile_every_byte_exactly_once(geometry):
    metainfo = metainfo_of(*geometry)

    covered = [
        (file.index, start + step)
        for piece in range(metainfo.num_pieces)
        for file, start, length in metainfo.spans(piece)
        for step in range(length)
    ]

    assert covered == [(f.index, byte) for f in metainfo.files for byte in range(f.length)]


@given(lengths_and_piece)
@settings(deadline=None)
def test_pieces_of_a_file_are_those_whose_spans_name_it(geometry):
    metainfo = metainfo_of(*geometry)

    named = {file.index: [] for file in metainfo.files}
    for piece in range(metainfo.num_pieces):
        for file, _, length in metainfo.spans(piece):
            assert length > 0
            named[file.index].append(piece)

    assert {file.index: list(metainfo.pieces_of(file)) for file in metainfo.files} == named


@given(lengths_and_piece)
@settings(deadline=None)
def test_piece_sizes_add_up_to_the_total(geometry):
    metainfo = metainfo_of(*geometry)

    sizes = [metainfo.piece_size(piece) for piece in range(metainfo.num_pieces)]

    assert sum(sizes) == metainfo.total == sum(geometry[0])
    assert set(sizes[:-1]) <= {metainfo.piece_length}
    assert 0 < sizes[-1] <= metainfo.piece_length
    assert [
        sum(length for _, _, length in metainfo.spans(piece))
        for piece in range(metainfo.num_pieces)
    ] == sizes


@pytest.mark.parametrize(
    ("lengths", "spans"),
    [
        pytest.param([10], [[(0, 0, 10)]], id="exact"),
        pytest.param([9], [[(0, 0, 9)]], id="one-less"),
        pytest.param([11], [[(0, 0, 10)], [(0, 10, 1)]], id="one-more"),
        pytest.param([9, 1], [[(0, 0, 9), (1, 0, 1)]], id="shared"),
        pytest.param([10, 10], [[(0, 0, 10)], [(1, 0, 10)]], id="edge"),
        pytest.param([9, 2], [[(0, 0, 9), (1, 0, 1)], [(1, 1, 1)]], id="across"),
        pytest.param([0, 10, 0, 0, 1, 0], [[(1, 0, 10)], [(4, 0, 1)]], id="empty-files-at-edges"),
        pytest.param([25], [[(0, 0, 10)], [(0, 10, 10)], [(0, 20, 5)]], id="three-pieces"),
    ],
)
def test_spans_at_the_edges_of_pieces(lengths, spans):
    metainfo = metainfo_of(lengths, 10)

    found = [metainfo.spans(piece) for piece in range(metainfo.num_pieces)]

    assert [[(f.index, at, n) for f, at, n in piece] for piece in found] == spans


def test_each_piece_has_its_own_hash():
    metainfo = metainfo_of([35], 10)

    hashes = [metainfo.piece_hash(piece) for piece in range(metainfo.num_pieces)]

    assert hashes == [bytes([piece]) * 20 for piece in range(4)]


# --- making torrents


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


# --- v2 torrents: hash trees, and no piece that spans two files


def plain_root(leaves: list[bytes]) -> bytes:
    """The root of a tree of as many leaves as a power of two."""
    while len(leaves) > 1:
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        leaves = [hashlib.sha256(left + right).digest() for left, right in pairs]
    return leaves[0]


def padded_root(data: bytes, leaves: int) -> bytes:
    """The root over 16 KiB leaves, with zero hashes in place of those that are not there."""
    parts = [data[start : start + 16384] for start in range(0, len(data), 16384)]
    found = [hashlib.sha256(part).digest() for part in parts]
    return plain_root(found + [bytes(32)] * (leaves - len(found)))


def width(count: int) -> int:
    """The power of two that so many nodes fit in."""
    return 1 << (count - 1).bit_length()


def tree_of(
    files: dict[str, bytes], piece_length: int = 16384
) -> tuple[dict[bytes, object], dict[bytes, bytes]]:
    """The v2 file tree of some files, and their piece layers."""
    tree: dict[bytes, object] = {}
    layers: dict[bytes, bytes] = {}
    for name, data in files.items():
        *folders, last = name.encode().split(b"/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        leaf: dict[bytes, object] = {b"length": len(data)}
        if data:
            root = leaf[b"pieces root"] = padded_root(data, width(-(-len(data) // 16384)))
            if len(data) > piece_length:
                layers[root] = b"".join(
                    padded_root(data[start : start + piece_length], piece_length // 16384)
                    for start in range(0, len(data), piece_length)
                )
        branch[last] = {b"": leaf}
    return tree, layers


def v2_info(tree: dict[bytes, object], piece_length: int = 16384) -> dict[bytes, object]:
    return {
        b"file tree": tree,
        b"meta version": 2,
        b"name": b"grok-1",
        b"piece length": piece_length,
    }


def v2_of(files: dict[str, bytes], piece_length: int = 16384) -> bytes:
    tree, layers = tree_of(files, piece_length)
    return bencode(in_order({b"info": v2_info(tree, piece_length), b"piece layers": layers}))


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


# --- hybrid torrents: libtorrent follows the v2 file tree, so nothing may hide in it


@pytest.fixture
def hybrid(tmp_path: Path) -> bytes:
    root = tmp_path / "grok-1"
    root.mkdir()
    (root / "tensor00000_000").write_bytes(bytes(50_000))
    (root / "tensor00001_000").write_bytes(bytes(300))
    torrent = lt.create_torrent(lt.list_files(str(root)), 16384)
    lt.set_piece_hashes(torrent, str(tmp_path))
    return lt.bencode(torrent.generate())


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


def infohash_of(data: bytes) -> str:
    """The infohash as libtorrent has it: of v1 wherever there is one."""
    hashes = lt.load_torrent_buffer(data).info_hashes
    return str(hashes.v1 if hashes.has_v1() else hashes.v2)


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


# --- hostile names


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


# --- hostile numbers and encodings


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


# --- magnets


def test_the_published_magnet_is_the_root_of_trust():
    magnet = parse_magnet(GROK_1_MAGNET)

    assert magnet.infohash == "5f96d43576e3d386c9ba65b883210a393b68210e"
    assert magnet.name == "grok-1"
    assert len(magnet.trackers) == 3
    assert parse_magnet(str(magnet)) == magnet


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(XT, id="lower-case"),
        pytest.param(XT.upper().replace("MAGNET:?XT=URN:BTIH", "magnet:?xt=urn:btih"), id="upper"),
        pytest.param(
            "magnet:?xt=urn:btih:" + base64.b32encode(bytes.fromhex(HASH)).decode(), id="base32"
        ),
        pytest.param(
            "magnet:?xt=urn:btih:" + base64.b32encode(bytes.fromhex(HASH)).decode().lower(),
            id="base32-lower-case",
        ),
        pytest.param(f"{XT}&xt=urn:btmh:1220{'ab' * 32}", id="hybrid"),
        pytest.param(f"magnet:?dn=x&xt=urn%3Abtih%3A{HASH}", id="quoted"),
        pytest.param(f"MAGNET:?xt=urn:btih:{HASH}", id="scheme-in-capitals"),
    ],
)
def test_a_magnet_names_its_infohash(link):
    assert parse_magnet(link).infohash == HASH


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(XT_V2, id="lower-case"),
        pytest.param(XT_V2.replace(HASH_V2, HASH_V2.upper()), id="upper-case"),
        pytest.param(f"magnet:?xt=urn%3Abtmh%3A1220{HASH_V2}", id="quoted"),
        pytest.param(f"{XT_V2}&xt=urn:sha1:{HASH}", id="beside-another-hash"),
    ],
)
def test_a_magnet_of_a_v2_torrent_names_its_64_digits_and_is_written_as_it_was_read(link):
    magnet = parse_magnet(f"{link}&dn=grok-1&tr=udp://t.example:1")

    assert magnet.infohash == HASH_V2
    assert str(magnet).startswith(XT_V2)
    assert parse_magnet(str(magnet)) == magnet


@pytest.mark.parametrize(
    "link",
    [
        pytest.param("", id="nothing"),
        pytest.param("magnet:", id="only-the-scheme"),
        pytest.param("magnet:?dn=grok-1", id="no-xt"),
        pytest.param(f"{XT_V2}&xt=urn:btmh:1220{'ab' * 32}", id="two-v2-xt"),
        pytest.param(XT_V2[:-1], id="v2-63-digits"),
        pytest.param(f"{XT_V2}0", id="v2-65-digits"),
        pytest.param(f"magnet:?xt=urn:btmh:1120{HASH_V2}", id="multihash-of-another-kind"),
        pytest.param(f"magnet:?xt=urn:btmh:{HASH_V2}", id="no-multihash"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH_V2}", id="v2-digits-as-v1"),
        pytest.param(f"{XT}&xt=urn:btih:{'f' * 40}", id="two-xt"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH[:-1]}", id="39-digits"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH}0", id="41-digits"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH[:-1]}g", id="no-digit"),
        pytest.param(f"magnet:?xt=urn:btih:{'1' * 32}", id="no-base32"),
        pytest.param(f"magnet:?xt=urn:btih:{HASH}%0a", id="newline-behind"),
        pytest.param("magnet:?xt=urn:btih:" + "\uff11" * 40, id="full-width-digits"),
        pytest.param(f"https://example.org/?xt=urn:btih:{HASH}", id="another-scheme"),
        pytest.param(f"magnet:?xt=urn:sha1:{HASH}", id="another-hash"),
        pytest.param("magnet://[", id="a-broken-address"),
        pytest.param("magnet:?" + "\x1b[2J\n" * 100, id="control-characters"),
    ],
)
def test_a_magnet_without_one_infohash_is_a_fetch_error_that_can_be_printed(link):
    with pytest.raises(FetchError) as caught:
        parse_magnet(link)

    assert is_one_clean_line(str(caught.value))
    assert len(str(caught.value)) < 500
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("fields", [200, 100_000])
def test_a_magnet_with_very_many_fields_is_a_magnet_or_a_fetch_error(fields):
    try:
        found = parse_magnet(XT + "&tr=udp://t.example:1" * fields).infohash
    except FetchError as error:
        found = error.exit_code

    assert found in {HASH, 10}


def test_two_infohashes_are_not_called_none():
    with pytest.raises(FetchError) as caught:
        parse_magnet(f"{XT}&xt=urn:btih:{'f' * 40}")

    assert "names no" not in str(caught.value)


def test_a_magnet_name_is_for_people_and_never_a_path():
    magnet = parse_magnet(f"{XT}&dn=../../evil%1b%5b2J%0a%e2%80%ae")

    assert is_one_clean_line(magnet.name)
    assert folder_name(magnet.name, magnet.infohash) == HASH[:16]


def test_peers_and_web_seeds_of_a_magnet_are_dropped():
    link = (
        f"{XT}&x.pe=10.0.0.1:22&x.pe=[::1]:80&ws=http://169.254.169.254/latest&as=http://a&xs=http://b"
        "&tr=http://t.example/announce"
    )

    magnet = parse_magnet(link)

    assert magnet.trackers == ("http://t.example/announce",)
    assert not re.search("10.0.0.1|::1|169.254|as=|xs=|ws=", str(magnet))


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("ws://t.example", id="websocket"),
        pytest.param("javascript:alert(1)", id="script"),
        pytest.param("//t.example/announce", id="no-scheme"),
        pytest.param("http://[t.example", id="a-broken-address"),
        pytest.param("http://t.example/%1b%5b2J", id="escape"),
        pytest.param("http://t.example/%0d%0aX-Header:1", id="header-injection"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_tracker_of_another_kind_is_dropped_and_the_rest_kept(url):
    magnet = parse_magnet(f"{XT}&tr={url}&tr=udp://t.example:1")

    assert magnet.trackers == ("udp://t.example:1",)


def test_a_magnet_with_many_trackers_is_still_a_magnet():
    link = XT + "".join(f"&tr=udp://t{n}.example:1" for n in range(98))

    assert len(parse_magnet(link).trackers) == 98


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_behind_a_magnet_gives_a_magnet_or_a_fetch_error(text):
    for link in (text, XT + text, f"{XT}&{text}", f"{XT}&tr={text}&dn={text}"):
        try:
            shown = parse_magnet(link).name
        except FetchError as error:
            shown = str(error)

        assert is_one_clean_line(shown)


@given(st.text(max_size=300))
def test_printable_text_has_no_control_characters_and_an_end(text):
    shown = printable(text)

    assert len(shown) <= 120
    assert is_one_clean_line(shown)


# --- the places of a torrent's files in a release


def places(*files: dict[bytes, object], **more: object) -> dict[int, str]:
    return release_paths(parse(torrent_of(*files, **more)))


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param([], id="none"),
        pytest.param([b"ckpt"], id="ckpt"),
        pytest.param([b"ckpt-0"], id="ckpt-0"),
        pytest.param([b"grok-1", b"checkpoints", b"ckpt-0"], id="deep"),
    ],
)
def test_tensors_land_in_ckpt_0_whatever_the_torrent_calls_its_folders(folder):
    found = places(
        entry(5, *folder, b"tensor00000_000"),
        entry(5, *folder, b"tensor00769_000"),
        entry(5, b"tokenizer.model"),
        entry(5, b"docs", b"LICENSE.txt"),
    )

    assert found == {
        0: "ckpt-0/tensor00000_000",
        1: "ckpt-0/tensor00769_000",
        2: "tokenizer.model",
        3: "docs/LICENSE.txt",
    }


def test_a_small_file_beside_the_tensors_is_fetched_like_any_other():
    found = places(entry(5, b"ckpt-0", b"tensor00000_000"), entry(5, b"ckpt-0", b"README.md"))

    assert found[1] == "ckpt-0/README.md"


def test_pads_have_no_place():
    found = places(entry(5, b"tensor00000_000"), entry(16379, b".pad", b"16379", attr=b"p"))

    assert found == {0: "ckpt-0/tensor00000_000"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param([b".grokctl", b"receipt.json"], id="receipt"),
        pytest.param([b".grokctl", b"source.json"], id="source"),
        pytest.param([b".GrokCtl", b"receipt.json"], id="receipt-in-capitals"),
        pytest.param([b".grokctl"], id="private-folder-as-file"),
        pytest.param([b"release.torrent"], id="torrent"),
        pytest.param([b"Release.Torrent"], id="torrent-in-capitals"),
        pytest.param([b"release.torrent", b"x"], id="torrent-as-folder"),
        pytest.param([b"ckpt-0"], id="tensors-folder-as-file"),
        pytest.param([b"CKPT-0"], id="tensors-folder-in-capitals"),
        pytest.param([b"grokctl.json"], id="manifest-of-a-ready-checkpoint"),
    ],
)
def test_an_extra_that_wants_a_place_of_ours_is_refused(path):
    with pytest.raises(FetchError, match="grokctl's own"):
        places(entry(5, b"x", b"tensor00000_000"), entry(5, *path))


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([[b"a", b"tensor00000_000"], [b"b", b"tensor00000_000"]], id="two-folders"),
        pytest.param([[b"tensor00000_000"], [b"ckpt-0", b"tensor00000_000"]], id="two-depths"),
        pytest.param(
            [[b"x", b"tensor00000_000"], [b"ckpt-0", b"tensor00000_000", b"y"]],
            id="file-and-folder",
        ),
    ],
)
def test_two_files_for_one_place_are_refused(files):
    with pytest.raises(FetchError, match="place"):
        places(*(entry(5, *path) for path in files))


def test_a_torrent_without_a_tensor_is_refused():
    with pytest.raises(FetchError, match="expected tensorNNNNN_000 files, found none"):
        places(entry(5, b"README.md"), name=b"\x1b[2J")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("movie.mkv", id="a-film"),
        pytest.param("tensor\u0660\u0660\u0660\u0660\u0660_\u0660\u0660\u0660", id="arabic-digits"),
        pytest.param("tensor00000_0000", id="a-digit-too-many"),
        pytest.param("tensor00000_000.bak", id="a-suffix"),
        pytest.param("xtensor00000_000", id="a-prefix"),
    ],
)
def test_a_large_file_that_is_no_tensor_is_refused(name):
    large = 64 * 2**20 + 1

    with pytest.raises(FetchError, match=f"{large:,}"):
        places(entry(5, b"tensor00000_000"), entry(large, name.encode()))


def test_an_extra_of_exactly_64_mb_is_the_largest():
    found = places(entry(5, b"tensor00000_000"), entry(64 * 2**20, b"big"))

    assert found[1] == "big"
