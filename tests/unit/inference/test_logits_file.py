"""Logits are written whole, or not at all, and to the place that was named."""

import errno
import io
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from grokctl.errors import UsageError
from grokctl.events import Event
from grokctl.inference.logits_file import logits_file

SHAPE = (3, 5)
VALUES = np.arange(15, dtype=np.float32).reshape(SHAPE)


def write(path):
    with logits_file(path, SHAPE) as out:
        out[:] = VALUES


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "logits.npy"

    with logits_file(path, SHAPE) as out:
        out[:] = np.arange(15).reshape(SHAPE)
        assert not path.exists()

    assert np.array_equal(np.load(path), np.arange(15, dtype=np.float32).reshape(SHAPE))
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


def test_a_pipe_without_a_reader_is_waited_for_with_a_word(tmp_path):
    path, received, noted = tmp_path / "pipe", [], []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))

    def observe(event: Event) -> None:
        noted.append(event.message)
        reader.start()

    with logits_file(path, SHAPE, observe=observe) as out:
        out[:] = VALUES
    reader.join(10)

    assert np.array_equal(np.load(io.BytesIO(received[0])), VALUES)
    assert noted == [f"{path}: nobody reads this pipe; waiting for a reader"]


def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "logits.npy"
    path.write_bytes(b"earlier")

    with pytest.raises(ZeroDivisionError), logits_file(path, SHAPE):
        raise ZeroDivisionError

    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


def test_without_a_path_there_is_no_array():
    with logits_file(None, SHAPE) as out:
        assert out is None


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder") as caught, logits_file(tmp_path, SHAPE):
        pass

    assert caught.value.hint == "--logits logits.npy"


@pytest.mark.parametrize("through", ["node", "link"])
def test_a_device_stays_a_device(tmp_path, through):
    node = tmp_path / "null"
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")
    path = node if through == "node" else tmp_path / "link"
    if path != node:
        path.symlink_to(node)

    write(path)

    assert stat.S_ISCHR(node.stat().st_mode)
    assert path.is_symlink() == (through == "link")
    assert not [file for file in tmp_path.iterdir() if file.name not in {"null", "link"}]


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_a_link_and_its_target_receives_the_logits(tmp_path, exists):
    target, path = tmp_path / "disk" / "target.npy", tmp_path / "link.npy"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"earlier")
    path.symlink_to(target)

    write(path)

    assert path.is_symlink()
    assert np.array_equal(np.load(target), VALUES)
    assert [file.name for file in target.parent.iterdir()] == ["target.npy"]


def test_a_pipe_receives_the_whole_file(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()

    write(path)
    reader.join()

    assert np.array_equal(np.load(io.BytesIO(received[0])), VALUES)
    assert path.is_fifo()


def test_the_file_that_stdout_goes_to_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "result.txt"
    path.write_bytes(b"result")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: path.stat() if fd == 1 else real(fd))

    with pytest.raises(UsageError, match="is stdout of this command"):
        write(path)

    assert path.read_bytes() == b"result"


def test_links_in_a_loop_are_refused(tmp_path):
    path = tmp_path / "loop"
    path.symlink_to(path)

    with pytest.raises(OSError, match="symbolic links"):
        write(path)

    assert path.is_symlink()


def test_a_mounted_file_is_written_into(tmp_path, monkeypatch):
    path = tmp_path / "logits.npy"
    path.write_bytes(b"earlier")
    inode = path.stat().st_ino

    def busy(_self, target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(target))

    monkeypatch.setattr(Path, "replace", busy)
    write(path)

    assert np.array_equal(np.load(path), VALUES)
    assert path.stat().st_ino == inode
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]
