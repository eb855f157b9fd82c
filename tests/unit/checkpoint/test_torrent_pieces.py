from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torrents import HASH, HASH_V2

from grokctl.checkpoint.torrent import (
    Metainfo,
)
from grokctl.checkpoint.torrent_files import TorrentFile


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
