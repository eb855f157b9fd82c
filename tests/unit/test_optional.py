"""What a file system may lack is tried and done without; every other failure is one."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest
from machines import on_disk

from grokctl.diagnosis.disks import checks
from grokctl.diagnosis.inventory import Inventory
from grokctl.errors import FetchError
from grokctl.inference.logits_file import logits_file
from grokctl.machine.disks import disk
from grokctl.paths import locked, write_atomically
from grokctl.session.history import History
from grokctl.system import optional
from grokctl.transfer.download import _sync

REFUSALS = [errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS]
FAILURES = [errno.EACCES, errno.EIO, errno.ENOSPC, errno.EDQUOT]


@pytest.fixture
def refuse(monkeypatch):
    """Let operations of `os` fail."""

    def set_up(code, *names):
        def fail(*_):
            raise OSError(code, os.strerror(code))

        for name in names:
            monkeypatch.setattr(os, name, fail)

    return set_up


def write_file(folder):
    write_atomically(folder / "file", b"content")


def write_logits(folder):
    with logits_file(folder / "file", (1, 1)) as out:
        out[:] = 1


def write_history(folder):
    (folder / "file").touch(0o644)
    History(folder / "file").add("a line")


def sync_download(folder):
    (folder / "file").write_bytes(b"content")
    _sync(folder / "file")


def take_lock(folder):
    with locked(folder / "file", busy=FetchError("busy")):
        (folder / "file").write_bytes(b"content")


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize(
    "write", [write_file, write_logits, write_history, sync_download, take_lock]
)
def test_a_file_system_without_the_good_to_have_takes_every_file(
    tmp_path, monkeypatch, refuse, write, code
):
    refuse(code, "fsync", "fdatasync", "fchmod", "posix_fallocate", "posix_fadvise")
    monkeypatch.setattr(fcntl, "flock", os.fsync)

    write(tmp_path)

    assert (tmp_path / "file").stat().st_size > 0


def test_a_folder_that_nobody_may_list_is_not_synced(tmp_path, monkeypatch):
    real = os.open

    def deny(path, flags, *mode, **options):
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", deny)

    write_file(tmp_path)

    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("code", FAILURES)
@pytest.mark.parametrize("write", [write_file, sync_download])
def test_a_failing_or_full_disk_is_an_error_all_the_same(tmp_path, refuse, write, code):
    refuse(code, "fsync")

    with pytest.raises(Exception, match=os.strerror(code)):
        write(tmp_path)


@pytest.mark.parametrize("code", FAILURES)
def test_a_failure_is_no_refusal(code):
    with pytest.raises(OSError, match=os.strerror(code)), optional():
        raise OSError(code, os.strerror(code))


def test_doctor_names_what_a_file_system_lacks(tmp_path, monkeypatch, refuse):
    assert disk("home", tmp_path, tries=True).lacks == ()

    refuse(errno.EPERM, "fchmod")
    monkeypatch.setattr(fcntl, "flock", os.fchmod)
    real = mmap.mmap
    monkeypatch.setattr(
        mmap, "mmap", lambda file, size: real(file, size) if file < 0 else os.fchmod()
    )
    lacks = disk("home", tmp_path, tries=True).lacks

    assert lacks == ("locks", "file modes", "mappings")


@pytest.mark.parametrize(
    ("lacks", "status", "words"),
    [
        pytest.param(("file modes",), "ok", "exfat has no file modes, which is good", id="modes"),
        pytest.param(("locks", "file modes"), "warn", "only one fetch", id="locks"),
        pytest.param(("folder syncs",), "warn", "after a power cut", id="syncs"),
    ],
)
def test_a_check_says_what_follows(lacks, status, words):
    machine = on_disk(file_system="exfat", lacks=lacks)

    inventory = Inventory(home=Path("/data"), releases=(), ready=())
    (check,) = (each for each in checks(machine, inventory) if each.name == "features of home")

    assert (check.status, bool(check.fix)) == (status, status == "warn")
    assert words in check.detail
