"""A file has exactly the bytes that were appended, past the page cache or through it."""

import errno
import fcntl
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.resharding import appending
from grokctl.resharding.appending import Appending
from grokctl.resharding.estimate import _measure_disk


@pytest.fixture
def handle(tmp_path):
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


def bytes_of(count, seed=0):
    return bytes((seed + 7 * place) % 251 for place in range(count))


def is_direct(handle):
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)


SIZES = st.lists(st.sampled_from([1, 31, 4095, 4096, 4097, 9000, 20000, 33000]), max_size=8)


@settings(max_examples=20)
@given(parts=st.lists(SIZES, min_size=1, max_size=4), is_large=st.booleans(), begun=SIZES)
def test_all_that_was_appended_is_in_the_file_once_it_is_settled(
    tmp_path_factory, parts, is_large, begun
):
    path = tmp_path_factory.mktemp("appending") / "file"
    wanted = bytes_of(sum(begun), 3)
    path.write_bytes(wanted)
    handle = os.open(path, os.O_RDWR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appending, "_BUFFER", 16384)
        end = Appending(handle, len(wanted), is_large=is_large)
        for seed, sizes in enumerate(parts):
            for size in sizes:
                data = bytes_of(size, seed)
                end.append(memoryview(data))
                wanted += data
            end.settle()

            assert path.read_bytes() == wanted
            assert end.nbytes == len(wanted)
        os.close(handle)


def test_large_files_are_written_past_the_page_cache_and_others_are_not(handle, tmp_path):
    Appending(handle, 0, is_large=False)
    assert not is_direct(handle)

    end = Appending(handle, 0, is_large=True)
    if not is_direct(handle):
        pytest.skip("this file system has no O_DIRECT")
    end.append(memoryview(bytes_of(5000)))
    assert (tmp_path / "file").stat().st_size == 0  # collected
    end.settle()

    assert (tmp_path / "file").read_bytes() == bytes_of(5000)


@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_file_system_that_refuses_blocks_gets_the_bytes_through_its_cache(
    handle, tmp_path, monkeypatch, when
):
    real, calls = os.pwrite, []

    def pwrite(own, data, offset):
        calls.append(is_direct(own))
        if is_direct(own) and len(calls) > when:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(own, data, offset)

    monkeypatch.setattr(appending, "_BUFFER", 4096)
    monkeypatch.setattr("os.pwrite", pwrite)
    end = Appending(handle, 0, is_large=True)
    end.append(memoryview(bytes_of(20000)))
    end.settle()

    assert (tmp_path / "file").read_bytes() == bytes_of(20000)
    assert not calls[-1]


def test_blocks_that_are_written_in_part_are_written_to_the_end(handle, tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda own, data, offset: real(own, data[:4096], offset))
    end = Appending(handle, 0, is_large=True)
    end.append(memoryview(bytes_of(50000)))
    end.settle()

    assert (tmp_path / "file").read_bytes() == bytes_of(50000)


@pytest.mark.parametrize("is_large", [True, False])
def test_a_full_disk_is_reported(handle, monkeypatch, is_large):
    def pwrite(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", pwrite)
    end = Appending(handle, 0, is_large=is_large)
    with pytest.raises(OSError, match="No space left"):
        end.append(memoryview(bytes_of(2**20)))


@pytest.mark.parametrize("is_large", [True, False])
def test_the_disk_is_measured_as_it_will_be_written(tmp_path, monkeypatch, is_large):
    real, found = os.fdatasync, []

    def sync(handle):
        found.append(is_direct(handle))
        real(handle)

    monkeypatch.setattr("os.fdatasync", sync)

    assert _measure_disk(tmp_path, 2**21, is_large=is_large) > 0
    assert not list(tmp_path.iterdir())
    if any(found) or not is_large:
        assert set(found) == {is_large}
