"""Windows of a file arrive whole, or with an error; a dead disk is not waited for."""

import errno
import fcntl
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.errors import HardwareError
from grokctl.inference.expert_buffers import Buffer, Part
from grokctl.inference.expert_reader import PAGE, ExpertReader

NBYTES = 2**24 + 12_345


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """More than one request of random bytes, whose end is within a page."""
    path = tmp_path_factory.mktemp("disk") / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(NBYTES))
    return path


@pytest.fixture(scope="module")
def content(file):
    return np.frombuffer(file.read_bytes(), np.uint8)


def part(offset, nbytes):
    return Part(key="x", offset=offset, shape=(1, nbytes), dtype=np.dtype(np.uint8))


def came(reader, *parts):
    buffer = Buffer(parts)
    reading = reader.ask(buffer.windows(parts))
    reading.wait()
    assert reading.has_ended
    return [view[0] for view in buffer.arrays(parts)]


def can_be_direct(path):
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def through_cache(handle, memory, offset):
    """A file system that takes the flag, and refuses the read."""
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return os.preadv(handle, memory, offset)


def in_pieces(handle, memory, offset):
    """A disk that gives less than was asked for."""
    return os.preadv(handle, [memory[0][: 5 * PAGE]], offset)


@pytest.mark.parametrize("read", [os.preadv, through_cache, in_pieces])
@settings(max_examples=15)
@given(data=st.data())
def test_any_bytes_of_the_file_arrive_as_they_are(file, content, read, data):
    reader = ExpertReader(file, read=read)
    places = st.tuples(st.integers(0, NBYTES - 1), st.integers(1, 2**18))
    if read is not in_pieces:
        places |= st.just((1536, NBYTES - 1536))  # several requests, to the end of the file
    wanted = data.draw(st.lists(places, min_size=1, max_size=4))
    parts = [part(low, min(size, NBYTES - low)) for low, size in wanted]

    found = came(reader, *parts)

    for each, view in zip(parts, found, strict=True):
        assert np.array_equal(view, content[each.offset : each.offset + each.nbytes])
    assert reader.nbytes >= sum(each.nbytes for each in parts)
    assert reader.is_direct is (can_be_direct(file) and read is not through_cache)


def test_a_file_without_direct_reads_is_read_all_the_same():
    status = Path("/proc/self/maps")  # O_DIRECT is refused when it is opened
    reader = ExpertReader(status)

    (found,) = came(reader, part(0, 20))

    assert not reader.is_direct
    assert bytes(found) == status.read_bytes()[:20]


def test_a_file_that_shrank_is_too_short(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(10 * PAGE))
    reader = ExpertReader(path)
    os.truncate(path, 6 * PAGE + 7)

    assert len(came(reader, part(0, 6 * PAGE + 7))[0]) == 6 * PAGE + 7
    with pytest.raises(OSError, match=f"ends before byte {6 * PAGE + 8:,}") as caught:
        came(reader, part(0, 6 * PAGE + 8))
    assert caught.value.errno is None  # the file's fault, not the machine's


def test_an_error_in_the_middle_is_passed_on_once_nothing_is_written_any_more():
    memory = Path("/proc/self/mem")  # nothing is mapped at its beginning: EIO
    reader = ExpertReader(memory)
    buffer = Buffer([part(0, 2**25)])
    reading = reader.ask(buffer.windows([part(0, 2**25)]))

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        reading.wait()

    assert reading.has_ended


def test_a_disk_that_sends_nothing_is_given_up_and_threads_do_not_hold_the_process(file):
    released, begun = threading.Event(), threading.Event()

    def dead(handle, memory, offset):
        begun.set()
        released.wait(30)
        return os.preadv(handle, memory, offset)

    reader = ExpertReader(file, stall_s=0.6, read=dead)
    buffer = Buffer([part(0, PAGE)])
    reading = reader.ask(buffer.windows([part(0, PAGE)]))
    assert begun.wait(10)

    with pytest.raises(HardwareError, match="weights: the disk has sent nothing for"):
        reading.wait()

    assert not reading.has_ended
    assert all(thread.daemon for thread in threading.enumerate() if "_work" in thread.name)
    released.set()
    reading.wait()


def test_what_is_cancelled_is_not_begun(file):
    gate, asked = threading.Event(), []

    def slow(handle, memory, offset):
        asked.append(offset)
        gate.wait(30)
        return os.preadv(handle, memory, offset)

    reader = ExpertReader(file, read=slow)
    first = [part(n * PAGE, PAGE) for n in range(4)]  # each keeps one thread
    buffer, second = Buffer(first), Buffer([part(2**20, PAGE)])
    reading = reader.ask(buffer.windows(first))
    cancelled = reader.ask(second.windows([part(2**20, PAGE)]))

    cancelled.cancel()
    gate.set()
    reading.wait()
    cancelled.wait_end()

    assert sorted(asked) == [n * PAGE for n in range(4)]


def test_nothing_of_the_size_of_the_file_is_allocated_beside_the_buffer(file):
    reader = ExpertReader(file)
    parts = [part(0, NBYTES)]
    buffer = Buffer(parts)
    tracemalloc.start()
    try:
        reader.ask(buffer.windows(parts)).wait()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2**20
