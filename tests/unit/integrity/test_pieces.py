import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from damaging import refuse
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.torrent import Metainfo, build_metainfo, parse_metainfo
from grokctl.integrity.pieces import Checked, check_pieces

PIECE = 16384


def metainfo_of(root: Path, names: list[str], piece_length: int = PIECE) -> Metainfo:
    return parse_metainfo(
        build_metainfo(root, names, name="x", piece_length=piece_length), source="x"
    )


def places_of(metainfo: Metainfo) -> dict[int, str]:
    return {file.index: "/".join(file.path) for file in metainfo.files}


def check(root: Path, metainfo: Metainfo, *, jobs: int = 2, **options) -> dict[int, Checked]:
    """Every piece, by its number; each must come once."""
    places = options.get("places", places_of(metainfo))
    pieces = options.get("pieces", range(metainfo.num_pieces))
    results = list(check_pieces(root, metainfo, places, pieces, jobs=jobs))
    assert sorted(result.piece for result in results) == sorted(set(pieces))
    assert all(result.nbytes == metainfo.piece_size(result.piece) for result in results)
    return {result.piece: result for result in results}


def bad(results: dict[int, Checked]) -> set[int]:
    return {piece for piece, result in results.items() if not result.is_good}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files that share pieces, and one that fills several."""
    for name, size in (("a", 100), ("b", 3 * PIECE), ("c", 0), ("d", PIECE - 100), ("e", 5)):
        (tmp_path / name).write_bytes(os.urandom(size))
    return tmp_path


@pytest.fixture
def metainfo(root: Path) -> Metainfo:
    return metainfo_of(root, ["a", "b", "c", "d", "e"])


@pytest.mark.parametrize("jobs", [1, 2, 5, 64])
def test_good_pieces_are_good_for_any_number_of_threads(root, metainfo, jobs):
    assert metainfo.num_pieces == 5

    assert bad(check(root, metainfo, jobs=jobs)) == set()


def test_only_the_pieces_that_are_asked_for_are_looked_at(root, metainfo):
    assert set(check(root, metainfo, pieces=[3, 1, 3])) == {1, 3}
    assert check(root, metainfo, pieces=[]) == {}


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_changed_byte_makes_its_own_piece_bad_and_no_other(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("files")
    sizes = data.draw(st.lists(st.integers(0, 3 * PIECE), min_size=1, max_size=6))
    names = [f"f{index}" for index in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        (root / name).write_bytes(hashlib.shake_128(name.encode()).digest(size))
    total = sum(sizes)
    if not total:
        return
    metainfo = metainfo_of(root, names)
    place = data.draw(st.integers(0, total - 1))
    file = next(f for f in metainfo.files if f.offset <= place < f.offset + f.length)
    content = bytearray((root / names[file.index]).read_bytes())
    content[place - file.offset] ^= 1
    (root / names[file.index]).write_bytes(content)

    assert bad(check(root, metainfo)) == {place // PIECE}


def test_the_hashes_are_those_of_hashlib(root, metainfo):
    content = b"".join((root / name).read_bytes() for name in "abcde")

    for piece in range(metainfo.num_pieces):
        part = content[piece * PIECE : (piece + 1) * PIECE]
        assert metainfo.piece_hash(piece) == hashlib.sha1(part, usedforsecurity=False).digest()
    assert bad(check(root, metainfo)) == set()


# --- what is not there


def test_a_missing_file_makes_bad_pieces_and_no_error(root, metainfo):
    (root / "b").unlink()

    results = check(root, metainfo)

    assert bad(results) == {0, 1, 2, 3}
    assert all(result.unreadable == () for result in results.values())


def test_a_missing_folder_is_a_missing_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"a" * PIECE)
    metainfo = metainfo_of(tmp_path, ["folder/a"])
    (tmp_path / "folder" / "a").unlink()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_bytes(b"")

    assert check(tmp_path, metainfo) == {0: Checked(0, is_good=False, nbytes=PIECE)}


@pytest.mark.parametrize("size", [0, 1, PIECE, 3 * PIECE - 1])
def test_a_truncated_file_is_bad_from_its_end_on(root, metainfo, size):
    os.truncate(root / "b", size)

    results = check(root, metainfo)

    assert bad(results) == set(range((100 + size) // PIECE, 4))
    assert all(result.unreadable == () for result in results.values())


def test_what_comes_after_the_end_is_no_piece_s_business(root, metainfo):
    with (root / "b").open("ab") as file:
        file.write(b"more")

    assert bad(check(root, metainfo)) == set()


def test_files_without_a_place_count_as_zeros(root):
    (root / "b").write_bytes(bytes(3 * PIECE))
    metainfo = metainfo_of(root, ["a", "b", "e"])
    places = {index: name for index, name in places_of(metainfo).items() if name != "b"}
    (root / "b").unlink()

    assert bad(check(root, metainfo, places=places)) == set()


# --- what cannot be read


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_unreadable_and_blocks_nobody(root, metainfo, make):
    (root / "d").unlink()
    make(root / "d")

    results = check(root, metainfo)

    assert bad(results) == {3}
    assert results[3].unreadable == (("d", "is not a regular file"),)


def test_a_link_that_leads_nowhere_is_a_missing_file_and_one_in_a_circle_an_error(root, metainfo):
    (root / "d").unlink()
    (root / "d").symlink_to(root / "nowhere")
    nowhere = check(root, metainfo)
    (root / "nowhere").symlink_to(root / "d")

    assert bad(nowhere) == {3}
    assert nowhere[3].unreadable == ()
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)) as caught:
        check(root, metainfo)
    assert caught.value.filename == str(root / "d")


def test_every_unreadable_file_of_a_piece_is_named(root, metainfo):
    for name in "ab":
        (root / name).unlink()
        (root / name).mkdir()

    results = check(root, metainfo)

    assert [name for name, _ in results[0].unreadable] == ["a", "b"]
    assert [name for name, _ in results[1].unreadable] == ["b"]
    assert bad(results) == {0, 1, 2, 3}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.ENAMETOOLONG])
def test_a_file_that_the_machine_refuses_is_an_error_and_no_bad_piece(
    root, metainfo, monkeypatch, code
):
    refuse(monkeypatch, "b", code)

    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        check(root, metainfo)

    assert caught.value.filename == str(root / "b")


# --- holes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes were read each time."""
    seen: list[int] = []

    def preadv(handle, buffers, offset, flags=0):
        count = read(handle, buffers, offset, flags)
        seen.append(count)
        return count

    read = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    if path.stat().st_blocks:
        pytest.skip("this file system has no holes")


def test_a_hole_that_should_be_data_is_bad_and_is_not_read(tmp_path, reads):
    (tmp_path / "a").write_bytes(os.urandom(8 * PIECE))
    metainfo = metainfo_of(tmp_path, ["a"])
    sparse(tmp_path / "a", 8 * PIECE)

    assert bad(check(tmp_path, metainfo)) == set(range(8))
    assert reads == []


def test_a_hole_that_should_be_zeros_is_good_and_is_not_read(tmp_path, reads):
    sparse(tmp_path / "a", 8 * PIECE)
    metainfo = metainfo_of(tmp_path, ["a"])

    assert bad(check(tmp_path, metainfo)) == set()
    assert reads == []


def test_a_last_piece_that_is_a_hole_is_compared_like_any_other(tmp_path):
    sparse(tmp_path / "a", PIECE + 5)
    zeros = metainfo_of(tmp_path, ["a"])
    (tmp_path / "a").write_bytes(bytes(PIECE) + b"12345")
    data = metainfo_of(tmp_path, ["a"])
    sparse(tmp_path / "a", PIECE + 5)

    assert bad(check(tmp_path, zeros)) == set()
    assert bad(check(tmp_path, data)) == {1}


def test_a_short_file_is_no_hole(tmp_path):
    sparse(tmp_path / "a", 4 * PIECE)
    metainfo = metainfo_of(tmp_path, ["a"])
    os.truncate(tmp_path / "a", 2 * PIECE)

    assert bad(check(tmp_path, metainfo)) == {2, 3}


def test_data_between_holes_is_read(tmp_path, reads):
    sparse(tmp_path / "a", 64 * PIECE)
    zeros = metainfo_of(tmp_path, ["a"])
    with (tmp_path / "a").open("r+b") as file:
        file.seek(40 * PIECE + 7)
        file.write(b"x")

    assert bad(check(tmp_path, zeros)) == {40}
    assert 0 < sum(reads) < 8 * PIECE


def test_a_file_system_that_knows_no_holes_is_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "cannot tell")

    sparse(tmp_path / "a", 2 * PIECE)
    metainfo = metainfo_of(tmp_path, ["a"])
    monkeypatch.setattr(os, "lseek", refuse)

    assert bad(check(tmp_path, metainfo)) == set()


# --- threads, files, memory, cache


def test_closing_early_ends_the_threads(root, metainfo):
    before = threading.active_count()
    checks = check_pieces(root, metainfo, places_of(metainfo), range(5), jobs=4)

    next(checks)
    checks.close()

    assert threading.active_count() == before


def test_a_bug_in_a_thread_is_raised_where_the_results_are_taken(root, metainfo):
    places = {0: "a\0b", 1: "b", 2: "c", 3: "d", 4: "e"}

    with pytest.raises(ValueError, match="null"):
        check(root, metainfo, places=places)


def test_few_files_are_open_however_many_there_are(tmp_path):
    names = [f"f{index:03d}" for index in range(200)]
    for name in names:
        (tmp_path / name).write_bytes(os.urandom(300))
    metainfo = metainfo_of(tmp_path, names)
    checks = check_pieces(tmp_path, metainfo, places_of(metainfo), range(4), jobs=2)
    before = len(list(Path("/proc/self/fd").iterdir()))

    first = next(checks)
    during = len(list(Path("/proc/self/fd").iterdir()))
    rest = list(checks)

    assert first.is_good
    assert all(result.is_good for result in rest)
    assert during <= before + 2 * 9
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def is_cached(path: Path, offset: int) -> bool:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def evict(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def test_the_page_cache_is_left_as_it_was_found(tmp_path):
    size = 64 * PIECE
    for name in ("cold", "warm"):
        (tmp_path / name).write_bytes(os.urandom(size))
        evict(tmp_path / name)
    if is_cached(tmp_path / "cold", size // 2 + 4096):
        pytest.skip("this file system does not let go")
    evict(tmp_path / "cold")
    metainfo = metainfo_of(tmp_path, ["cold", "warm"])
    (tmp_path / "warm").read_bytes()

    def is_left_cold() -> bool:
        evict(tmp_path / "cold")
        assert bad(check(tmp_path, metainfo)) == set()
        return not any(is_cached(tmp_path / "cold", offset) for offset in (0, PIECE, size - PIECE))

    # Linux keeps pages that another core has just queued, so one of several tries has to do
    assert any(is_left_cold() for _ in range(5))
    assert all(is_cached(tmp_path / "warm", offset) for offset in (0, PIECE, size - PIECE))
