import os
import random
import subprocess
from contextlib import suppress
from itertools import accumulate, pairwise
from shutil import which

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.frames import Compression, Frames, Unpacker, compress
from grokctl.errors import UsageError
from grokctl.resharding.output import frames_of

FAST = Compression(1)


@pytest.fixture(scope="module")
def unpacker():
    return Unpacker()


@pytest.fixture(scope="module")
def plain() -> bytes:
    """Half of it can be compressed, and no part is like another."""
    rng = random.Random(1)
    return b"".join(rng.randbytes(900) + bytes([number]) * 900 for number in range(200))


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    """The same in frames of 5000 bytes, and where they are."""
    found = frames_of(plain, 5000, FAST)
    path = tmp_path_factory.mktemp("frames") / "file.zst"
    path.write_bytes(b"".join(data for _, data in found))
    return path, Frames(tuple((size, len(data)) for size, data in found))


def unpack(unpacker, path, frames, start, nbytes):
    out = np.full(nbytes, 0xA5, np.uint8)
    handle = os.open(path, os.O_RDONLY)
    try:
        unpacker.into(out, handle, frames, start)
    finally:
        os.close(handle)
    return out.tobytes()


def refused(unpacker, tmp_path, data, sizes, *, start=0, nbytes=None):
    """Read a stranger's file; the error."""
    path = tmp_path / "file.zst"
    path.write_bytes(data)
    frames = Frames(tuple(sizes))
    whole = frames.plain_starts[-1] if nbytes is None else nbytes
    with pytest.raises(ValueError, match=r"frame \d+ ") as caught:
        unpack(unpacker, path, frames, start, whole)
    return str(caught.value)


# --- what is asked for


@pytest.mark.parametrize(
    ("text", "level"),
    [("zstd", 3), ("zstd:1", 1), ("zstd:3", 3), ("zstd:19", 19), (" zstd:07 ", 7), ("zstd:09", 9)],
)
def test_compression_is_read_and_printed_so_that_it_reads_the_same(text, level):
    found = Compression.parse(text)

    assert found.level == level
    assert Compression.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "", "gzip", "zstd:", "zstd:0", "zstd:00", "zstd:20", "zstd:99", "zstd:-1", "zstd:1.5",
        "zstd:123", "zstd:+3", "zstd: 3", "zstd 3", "ZSTD", "zstd:3:3", "zstd:\u0663", "zstd\x00",
        "zstd:3\nzstd", "x" * 10_000,
    ],
)  # fmt: skip
def test_no_other_compression_is_known(text):
    with pytest.raises(UsageError, match="expected zstd or zstd:1 to zstd:19") as caught:
        Compression.parse(text)

    assert caught.value.hint == "--compress zstd"
    assert len(str(caught.value)) < 200


# --- frames


@settings(max_examples=200)
@given(sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=20))
def test_frames_within_a_range_are_those_that_hold_a_byte_of_it(sizes):
    frames = Frames(tuple(sizes))
    total = sum(plain for plain, _ in sizes)
    owner = np.repeat(np.arange(len(sizes)), [plain for plain, _ in sizes])

    assert frames.plain_starts == tuple(accumulate((a for a, _ in sizes), initial=0))
    assert frames.packed_starts == tuple(accumulate((b for _, b in sizes), initial=0))
    for start in range(total):
        for stop in {start + 1, (start + total + 1) // 2, total}:
            expected = range(owner[start], owner[stop - 1] + 1) if start < stop else range(0)
            assert list(frames.within(start, stop)) == list(expected)


@settings(max_examples=100)
@given(data=st.binary(max_size=3000), size=st.integers(1, 500), level=st.integers(1, 19))
def test_frames_together_are_what_went_in_and_each_says_its_size(data, size, level):
    found = frames_of(data, size, Compression(level))

    assert sum(plain for plain, _ in found) == len(data)
    assert all(plain == size for plain, _ in found[:-1])
    joined = []
    for plain, packed in found:
        parameters = zstandard.get_frame_parameters(packed)
        assert parameters.content_size == plain
        assert parameters.has_checksum
        joined.append(zstandard.ZstdDecompressor().decompress(packed))
    assert b"".join(joined) == data
    assert frames_of(data, size, Compression(level)) == found


def test_without_compression_bytes_are_their_own_frame():
    ((size, data),) = frames_of(b"some bytes", 3, None)

    assert (size, bytes(data)) == (10, b"some bytes")


def test_a_compressor_of_one_level_is_not_used_for_another():
    words = random.Random(4).choices([b"fast", b"small", b" of", b" a", b"level"], k=20_000)
    data = b"".join(words)

    fast, small = compress(data, FAST), compress(data, Compression(19))

    assert len(small) < len(fast)
    assert compress(data, FAST) == fast


# --- other people's readers


def test_the_file_is_plain_to_the_library_s_own_stream_reader(packed, plain):
    path, _ = packed

    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        assert reader.read() == plain


@pytest.mark.skipif(which("zstd") is None, reason="needs the zstd command")
def test_the_file_is_plain_to_the_zstd_command(packed, plain):
    path, _ = packed

    found = subprocess.run(["zstd", "-d", "-c", "-q", str(path)], capture_output=True, check=True)

    assert found.stdout == plain


# --- reading


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_range_is_read_across_frames(packed, plain, unpacker, data):
    path, frames = packed
    near = st.sampled_from(frames.plain_starts[:-1]).flatmap(
        lambda at: st.integers(max(0, at - 2), min(len(plain) - 1, at + 2))
    )
    start = data.draw(st.one_of(near, st.integers(0, len(plain) - 1)))
    stop = data.draw(st.one_of(st.integers(start + 1, len(plain)), st.just(start + 1)))

    assert unpack(unpacker, path, frames, start, stop - start) == plain[start:stop]


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(compress(b"more", FAST), id="a frame"),
        pytest.param(b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", id="a frame to skip"),
        pytest.param(b"\0", id="a byte"),
    ],
)
def test_nothing_is_behind_a_frame_that_other_readers_of_the_file_would_see(
    unpacker, tmp_path, after
):
    data = compress(b"some bytes", FAST) + after

    assert "frame 0 is damaged" in refused(unpacker, tmp_path, data, [(10, len(data))])


def test_a_damaged_frame_is_noticed_whatever_bit_it_is(packed, unpacker, tmp_path, plain):
    path, frames = packed
    rng, data = random.Random(2), path.read_bytes()
    first, second = frames.packed_starts[7:9]
    noticed = 0

    for _ in range(60):
        changed = bytearray(data)
        changed[rng.randrange(first, second)] ^= 1 << rng.randrange(8)
        copy = tmp_path / "copy.zst"
        copy.write_bytes(changed)
        found = None
        with suppress(ValueError):
            found = unpack(unpacker, copy, frames, 7 * 5000, 5000)
        assert found in {None, plain[7 * 5000 : 8 * 5000]}  # there are bits that nobody reads
        noticed += found is None
        assert unpack(unpacker, copy, frames, 8 * 5000, 5000) == plain[8 * 5000 : 9 * 5000]
    assert noticed > 50


def test_frames_of_other_sizes_that_changed_places_are_noticed(unpacker, tmp_path):
    data = [compress(bytes([number]) * (100 + number), FAST) for number in range(3)]
    sizes = [(100 + number, len(part)) for number, part in enumerate(data)]
    assert len({packed for _, packed in sizes}) == 1

    error = refused(unpacker, tmp_path, data[1] + data[0] + data[2], sizes)

    assert error == "frame 0 does not decompress to 100 bytes"


# --- strangers


def bomb(claims: int, holds: int) -> bytes:
    """A frame that says one size and decompresses to another."""
    packed = zstandard.ZstdCompressor(level=1).compress(bytes(holds))
    honest = zstandard.get_frame_parameters(packed)
    assert honest.content_size == holds
    # magic number, then a descriptor: 8 bytes of content size, one segment, no checksum
    header = packed[:4] + bytes([0xE0]) + claims.to_bytes(8, "little")
    blocks = packed[4 + 1 + _header_rest(packed[4]) :]
    lying = header + blocks
    assert zstandard.get_frame_parameters(lying).content_size == claims
    return lying


def _header_rest(descriptor: int) -> int:
    """Bytes of a frame's header behind the descriptor."""
    is_single = bool(descriptor & 0x20)
    size = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    return size + (not is_single) + (0, 1, 2, 4)[descriptor & 3]


def peak_of(call) -> int:
    """Bytes by which the process's most memory ever grew."""
    before = _high_water()
    call()
    return _high_water() - before


def _high_water() -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123 (it is no file on a disk)
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_a_frame_that_claims_ten_gigabytes_is_not_expanded(unpacker, tmp_path):
    data = bomb(10**10, 1000)
    assert len(data) < 1000

    grown = peak_of(lambda: refused(unpacker, tmp_path, data, [(1000, len(data))]))

    assert grown < 50e6


def test_a_frame_that_holds_more_than_it_claims_is_not_expanded(unpacker, tmp_path):
    data = bomb(1000, 2**30)
    assert len(data) < 200_000

    grown = peak_of(lambda: refused(unpacker, tmp_path, data, [(1000, len(data))]))

    assert grown < 50e6


def test_a_frame_that_holds_less_than_it_claims_is_refused(unpacker, tmp_path):
    for holds in (0, 1, 999):
        data = bomb(1000, holds)

        assert "damaged" in refused(unpacker, tmp_path, data, [(1000, len(data))])


def test_a_frame_that_does_not_say_its_size_is_refused(unpacker, tmp_path):
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    data = compressor.compress(bytes(1000))

    error = refused(unpacker, tmp_path, data, [(1000, len(data))])

    assert error == "frame 0 does not decompress to 1000 bytes"


def test_a_skippable_frame_holds_nothing(unpacker, tmp_path):
    for size in (1, 1000):
        data = (0x184D2A50).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(size)

        refused(unpacker, tmp_path, data, [(size, len(data))])


@pytest.mark.parametrize("keep", [0, 1, 4, 6, 12, -1])
def test_a_truncated_frame_is_refused(unpacker, tmp_path, plain, keep):
    data = compress(plain, FAST)

    refused(unpacker, tmp_path, data[:keep], [(len(plain), len(data))])


@pytest.mark.parametrize("shift", [-1, 1])
def test_frames_that_begin_elsewhere_are_refused(unpacker, packed, shift):
    path, frames = packed
    (plain, first), (other, second), *rest = frames.sizes
    moved = Frames(((plain, first + shift), (other, second - shift), *rest))

    with pytest.raises(ValueError, match="frame 1 "):
        unpack(unpacker, path, moved, 5000, 5000)


def test_junk_is_refused(unpacker, tmp_path):
    rng = random.Random(3)

    for size in (1, 5, 20, 300):
        refused(unpacker, tmp_path, rng.randbytes(size), [(1000, size)])


def test_one_bad_frame_among_many_spoils_no_later_read(unpacker, packed, plain, tmp_path):
    path, frames = packed
    data = bytearray(path.read_bytes())
    data[frames.packed_starts[3] : frames.packed_starts[4]] = bytes(frames.sizes[3][1])
    (tmp_path / "bad.zst").write_bytes(data)

    for _ in range(3):
        with pytest.raises(ValueError, match="frame 3 is damaged"):
            unpack(unpacker, tmp_path / "bad.zst", frames, 0, len(plain))
        for low, high in pairwise(frames.plain_starts[4:]):
            assert (
                unpack(unpacker, tmp_path / "bad.zst", frames, low, high - low) == (plain[low:high])
            )
