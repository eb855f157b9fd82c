"""A full disk, a quota, a read-only disk, a lack of rights and a file too large, at every door."""

import errno
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from grokctl import demo, temporary
from grokctl.checkpoint.torrent import Metainfo
from grokctl.checkpoint.torrent_files import TorrentFile
from grokctl.cli.context import command
from grokctl.errors import (
    DiskFullError,
    ExitCode,
    FetchError,
    GrokctlError,
    HardwareError,
    StalledError,
    UsageError,
)
from grokctl.fetch import plan_fetch
from grokctl.inference.logits_file import logits_file
from grokctl.integrity.backup import set_aside
from grokctl.os_errors import (
    NotAFileError,
    StdoutError,
    TooLargeError,
    is_absence,
    located,
    reason_of,
    refusal,
)
from grokctl.paths import write_atomically
from grokctl.resharding.publish import writing
from grokctl.screen.console import Console
from grokctl.transfer.destination import fetch_lock
from grokctl.transfer.download import _sync
from grokctl.transfer.sources import FetchOptions
from grokctl.transfer.swarm import _disk_failure, _torrent_failure

FULL = [errno.ENOSPC, errno.EDQUOT]
OTHERS = [errno.EROFS, errno.EACCES, errno.EFBIG]


def refused(code: int, *file: str) -> OSError:
    return OSError(code, os.strerror(code), *file)


def named(code: int) -> str:
    return errno.errorcode[code]


@pytest.mark.parametrize("code", FULL, ids=named)
@pytest.mark.parametrize("kind", [UsageError, FetchError])
def test_a_full_disk_is_one_error_whatever_was_done(code, kind):
    error = refusal(refused(code, "/data/a b"), Path("/data"), kind=kind, hint="--out DIR")

    assert type(error) is DiskFullError
    assert str(error) == f"/data/a b: {os.strerror(code)}"
    assert error.hint == "df -h /data  # free some space, then run the same command again"


@pytest.mark.parametrize("code", OTHERS, ids=named)
@pytest.mark.parametrize("kind", [UsageError, FetchError])
def test_anything_else_is_of_the_caller_s_kind(code, kind):
    error = refusal(refused(code, "/data/a b"), Path("/data"), kind=kind)

    assert type(error) is kind
    assert str(error) == f"/data/a b: {os.strerror(code)}"
    assert error.hint == "ls -ld '/data/a b'"
    assert refusal(refused(code), kind=kind, hint="--out DIR").hint == "--out DIR"


@pytest.mark.parametrize("kind", [UsageError, FetchError])
def test_a_failing_disk_is_hardware_whatever_was_done(kind):
    error = refusal(refused(errno.EIO, "/data/a"), kind=kind)

    assert type(error) is HardwareError
    assert error.exit_code is ExitCode.HARDWARE
    assert str(error) == "/data/a: Input/output error"


def test_too_many_open_files_names_the_limit():
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    error = refusal(refused(errno.EMFILE, "/data/a"))

    assert f"may have {limit} (ulimit -n)" in str(error)
    assert error.hint.startswith("ulimit -n ")


@pytest.mark.parametrize("kind", [UsageError, FetchError])
def test_a_file_over_the_limit_of_the_process_names_the_limit(monkeypatch, kind):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (102_400, 102_400))

    error = refusal(refused(errno.EFBIG, "/data/a"), kind=kind, hint="--out DIR")
    ours = refusal(TooLargeError(Path("/data/a"), most=1, found=2), kind=kind)

    assert type(error) is DiskFullError
    assert "this process may write files of 102,400 bytes (ulimit -f)" in str(error)
    assert error.hint == "ulimit -f unlimited"
    assert type(ours) is kind
    assert "ulimit" not in str(ours)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOSPC, errno.EACCES], ids=named)
def test_what_stops_a_torrent_is_the_system_s_error(code):
    error = _torrent_failure(code, os.strerror(code))
    other = _torrent_failure(code, "mismatching info-hash")

    assert str(error).startswith(f"torrent: {os.strerror(code)}")
    assert type(error) is (DiskFullError if code == errno.ENOSPC else FetchError)
    assert ("ulimit -n" in str(error)) == (code == errno.EMFILE) == bool(error.hint)
    assert str(other) == "torrent: mismatching info-hash"


def test_only_what_could_be_looked_at_can_be_absent():
    absent = [FileNotFoundError(2, "x"), NotADirectoryError(20, "x"), OSError("ends before byte 7")]
    others = [errno.EACCES, errno.ELOOP, errno.EMFILE, errno.ESTALE, errno.EIO, errno.ENAMETOOLONG]

    assert all(map(is_absence, [*absent, NotAFileError(Path("/a"))]))
    assert not any(is_absence(refused(code)) for code in others)
    assert located(refused(errno.EIO), Path("/a/b")).filename == "/a/b"
    assert located(refused(errno.EIO, "c"), Path("/a/b")).filename == "c"


@pytest.mark.parametrize(
    ("file", "folder", "where", "hint"),
    [
        pytest.param(("/a/b",), None, "/a/b", "ls -ld /a/b", id="only a file"),
        pytest.param((b"/a/b",), None, "/a/b", "ls -ld /a/b", id="a file as bytes"),
        pytest.param((), Path("/a"), "/a", "ls -ld /a", id="only a folder"),
        pytest.param(("b",), Path("/a"), "/a: b", "ls -ld /a", id="a part of a path"),
        pytest.param((7,), Path("/a"), "/a", "ls -ld /a", id="a descriptor"),
        pytest.param((), None, "this machine", None, id="neither"),
    ],
)
def test_the_place_is_named_as_well_as_it_is_known(file, folder, where, hint):
    error = refusal(refused(errno.EACCES, *file), folder)

    assert str(error) == f"{where}: Permission denied"
    assert error.hint == hint
    full = refusal(refused(errno.ENOSPC, *file), folder)
    assert str(full) == f"{where}: No space left on device"
    assert (full.hint is None) == (hint is None)


def test_an_error_without_a_number_has_its_own_words():
    assert reason_of(OSError("ends before byte 7")) == "ends before byte 7"
    assert str(refusal(OSError("ends early"), Path("/a"))) == "/a: ends early"


# --- the doors


def through_the_command_line(error: OSError, _folder: Path) -> None:
    with command(as_json=False, quiet=True, verbose=False):
        raise error


def through_a_reshard(error: OSError, folder: Path) -> None:
    with writing(folder / "out"):
        raise error


def through_a_sync_of_a_download(_error: OSError, folder: Path) -> None:
    (folder / "file").touch()
    _sync(folder / "file")


def through_the_lock_of_a_fetch(_error: OSError, folder: Path) -> None:
    with fetch_lock(folder):
        pass


def through_a_backup(_error: OSError, folder: Path) -> None:
    set_aside(folder, metainfo_of(), {0: "a"}, {0})


def through_the_swarm(error: OSError, folder: Path) -> None:
    raise _disk_failure(str(folder / "file"), error.errno, error.strerror)


def metainfo_of():
    files = (TorrentFile(index=0, path=("a",), length=1, offset=0),)
    return Metainfo(
        infohash="0" * 40, name="a", piece_length=2**14, piece_hashes=bytes(20), files=files
    )


@pytest.mark.parametrize("code", [*FULL, *OTHERS], ids=named)
@pytest.mark.parametrize(
    ("door", "usual"),
    [
        (through_the_command_line, ExitCode.USAGE),
        (through_a_reshard, ExitCode.USAGE),
        (through_a_sync_of_a_download, ExitCode.FETCH),
        (through_the_lock_of_a_fetch, ExitCode.FETCH),
        (through_a_backup, ExitCode.FETCH),
        (through_the_swarm, ExitCode.FETCH),
    ],
)
def test_every_door_says_the_same(tmp_path, monkeypatch, door, usual, code):
    (tmp_path / ".grokctl").mkdir()
    (tmp_path / "a").write_bytes(b"bad")

    def refuse(*_args, **_options):
        raise refused(code)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "ftruncate", refuse)
    if door is through_the_lock_of_a_fetch:
        monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(GrokctlError) as caught:
        door(refused(code), tmp_path)

    assert caught.value.exit_code == (ExitCode.DISK_FULL if code in FULL else usual)
    assert str(caught.value).endswith(f": {os.strerror(code)}")


def test_stdout_is_blamed_only_where_it_failed(capsys, monkeypatch):
    full = refused(errno.ENOSPC)

    def fail(_text):
        raise full

    monkeypatch.setattr(sys.stdout, "write", fail)
    with pytest.raises(StdoutError) as caught:
        Console().write("result")
    monkeypatch.undo()

    assert str(refusal(caught.value)) == "stdout: No space left on device"
    assert isinstance(refusal(caught.value), DiskFullError)
    assert str(refusal(full)) == "this machine: No space left on device"
    assert capsys.readouterr().out == ""


# --- temporary files


@pytest.fixture
def no_temporary_files(monkeypatch):
    """As on a read-only root with an unusable TMPDIR."""

    def refuse():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    monkeypatch.setattr(temporary, "PLACES", ())
    with pytest.raises(FileNotFoundError):
        tempfile.mkdtemp()


@pytest.mark.usefixtures("no_temporary_files")
def test_a_demo_takes_home_where_the_system_has_no_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo, "_demo", lambda folder, _observe: folder)

    folder = demo.demo()

    assert folder.parent == tmp_path / "home"
    assert list(folder.parent.iterdir()) == []


@pytest.mark.usefixtures("no_temporary_files")
def test_a_demo_without_any_place_says_which_option_names_one(tmp_path, monkeypatch):
    (tmp_path / "home").touch()
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))

    with pytest.raises(UsageError, match="home: ") as caught:
        demo.demo()

    assert caught.value.hint == "grokctl demo --keep DIR"


@pytest.mark.usefixtures("no_temporary_files")
def test_a_demo_without_space_says_so_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path / "home"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=6_000_000))

    with pytest.raises(DiskFullError, match=r"home: expected 100\.0 MB free, found 6\.0 MB"):
        demo.demo()

    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.usefixtures("no_temporary_files")
def test_metadata_is_awaited_without_temporary_files(tmp_path):
    options = FetchOptions(dht=False, lsd=False, bind="127.0.0.1", port=0, stall_timeout_s=0.1)
    magnet = "magnet:?xt=urn:btih:" + "a" * 40

    with pytest.raises(StalledError, match="expected metadata"):
        plan_fetch(magnet, tmp_path / "release", options)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_temporary_files")
def test_own_files_are_written_without_temporary_folders(tmp_path):
    write_atomically(tmp_path / "file", b"content")
    with logits_file(tmp_path / "logits.npy", (1, 2)) as out:
        out[:] = 1

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "logits.npy"]
