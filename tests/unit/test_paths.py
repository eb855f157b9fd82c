import errno
import fcntl
import os
import pwd
import shlex
import stat
from pathlib import Path

import pytest
from folders import make_ready, make_release

from grokctl.errors import FetchError, UsageError
from grokctl.fetch import plan_fetch
from grokctl.own_files import opened_folder
from grokctl.paths import (
    Home,
    default_home,
    expanded,
    fsync_folder,
    kind_of,
    locked,
    quoted,
    typed_path,
    write_atomically,
)
from grokctl.transfer.sources import parse_source


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


# --- what is under home


def test_ready_checkpoints_are_listed_by_name_and_releases_are_not(home):
    made = [make_ready(home.ready / name) for name in ("b", "a")]
    make_release(home.ready / "c")
    make_release(home.releases / "d")

    assert home.ready_checkpoints() == sorted(made)
    assert Home(home.root / "nowhere").ready_checkpoints() == []


# --- kinds and places


def test_kinds_are_told_by_what_a_folder_holds(tmp_path):
    assert kind_of(make_release(tmp_path / "a")) == "release"
    assert kind_of(make_ready(tmp_path / "b")) == "ready"
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "nothing") is None


def test_home_is_the_environments_or_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path))
    assert default_home() == tmp_path

    monkeypatch.setenv("GROKCTL_HOME", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_home() == tmp_path / "data" / "grokctl"

    monkeypatch.delenv("GROKCTL_HOME")
    assert default_home() == tmp_path / "data" / "grokctl"


@pytest.mark.parametrize("typed", ["~/g", "$HOME/g", "${HOME}/g", " ~/g\n", '"~/g"', "'~/g'"])
def test_home_is_found_as_files_of_variables_write_it(monkeypatch, tmp_path, typed):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GROKCTL_HOME", typed)

    assert default_home() == tmp_path / "g"


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("~", "{home}"),
        ("~/a/../b", "{home}/a/../b"),
        ("${HOME}", "{home}"),
        ("$HOMES/x", "$HOMES/x"),
        ("./~", "~"),
        ("a/~/b", "a/~/b"),
        ("/a/$HOME", "/a/$HOME"),
    ],
)
def test_a_tilde_is_the_home_only_where_a_shell_means_it(monkeypatch, tmp_path, typed, path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert expanded(typed) == Path(path.format(home=tmp_path))


def test_a_torrent_in_the_users_home_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.torrent").write_bytes(b"no torrent")

    with pytest.raises(FetchError, match=r"a\.torrent: invalid torrent"):
        parse_source("~/a.torrent")


@pytest.mark.parametrize("name", ["--to", "--out", "GROKCTL_HOME"])
def test_a_path_that_is_not_utf8_or_empty_is_refused(name):
    with pytest.raises(UsageError, match=rf"^{name}: expected a path in UTF-8, .*Andr\\xe9"):
        typed_path("r/Andr\udce9", name)
    with pytest.raises(UsageError, match=f"^{name}: expected a path, found nothing"):
        typed_path("", name)


def test_a_relative_path_in_a_folder_that_is_not_utf8_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "Andr\udce9"
    folder.mkdir()
    monkeypatch.chdir(folder)

    with pytest.raises(UsageError, match="Andr"):
        typed_path("here", "--to")
    assert typed_path(str(tmp_path / "Andr\u00e9"), "--to").name == "Andr\u00e9"


def test_a_fetch_into_a_folder_that_is_not_utf8_writes_nothing(tmp_path):
    source = "magnet:?xt=urn:btih:" + "a" * 40

    with pytest.raises(UsageError, match="destination: expected a path in UTF-8"):
        plan_fetch(source, tmp_path / "r" / "Andr\udce9")

    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_is_told_to_name_one(monkeypatch):
    for name in ("GROKCTL_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as of a container's user

    with pytest.raises(UsageError, match="this user has no home folder") as caught:
        default_home()

    assert caught.value.hint == "export GROKCTL_HOME=/a/folder"


def test_everything_of_home_lies_in_home(home):
    for place in (home.releases, home.ready, home.xla_cache):
        assert home.root in place.parents


# --- writes that are whole or absent


def test_a_file_is_written_whole_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file"

    write_atomically(path, b"content")

    assert path.read_bytes() == b"content"
    assert names_in(path.parent) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")

    write_atomically(path, b"new")

    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("step", ["fsync", "rename"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_behind(
    tmp_path, monkeypatch, step, failure
):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object, **_options: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        write_atomically(path, b"new")

    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_bytes(b"precious")
    path.symlink_to(target)

    write_atomically(path, b"new")

    assert target.read_bytes() == b"precious"
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "file"
    make_special(path, kind)
    before = path.lstat().st_mode

    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(path, b"new")

    assert path.lstat().st_mode == before
    assert names_in(tmp_path) == ["file"]


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
        return
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


def test_a_folder_in_the_way_is_an_os_error_and_stays(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)

    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "file", b"new")

    assert names_in(tmp_path) == ["file"]


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_mode), real(fd)))

    write_atomically(tmp_path / "file", b"x")

    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]


def test_a_file_is_opened_as_no_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with opened_folder(tmp_path) as folder:
        fsync_folder(folder)
    with pytest.raises(NotADirectoryError), opened_folder(tmp_path / "file"):
        pytest.fail("it was opened")


@pytest.mark.parametrize("value", ["plain", "two words", "it's", "$HOME; rm -rf *", "", "-x\n"])
def test_what_is_quoted_is_one_word_to_a_shell(value):
    assert shlex.split(quoted(value)) == [value]
    assert quoted(Path("/a b")) == "'/a b'"


@pytest.mark.parametrize("is_folder", [False, True])
def test_only_one_holds_a_lock_until_it_ends(tmp_path, is_folder):
    path = tmp_path if is_folder else tmp_path / "lock"
    busy = FetchError("somebody else does")

    def lock():
        return locked(path, busy=busy, is_folder=is_folder)

    with lock(), pytest.raises(FetchError, match="somebody else does"), lock():
        pytest.fail("two hold it")
    with pytest.raises(KeyboardInterrupt), lock():
        raise KeyboardInterrupt
    with lock():
        assert path.exists()


def test_what_the_holder_of_a_lock_cannot_do_is_not_taken_for_the_lock(tmp_path):
    busy = FetchError("somebody else does")

    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", busy=busy):
        raise BlockingIOError


def test_a_lock_follows_no_link_and_makes_nothing_elsewhere(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    busy = FetchError("somebody else does")

    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock", busy=busy):
        pytest.fail("it was followed")

    assert names_in(tmp_path) == ["lock"]


def test_a_file_system_without_locks_stands_in_nobodys_way(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)

    with locked(tmp_path / "lock", busy=FetchError("somebody else does")):
        assert names_in(tmp_path) == ["lock"]


# --- several people, one folder


@pytest.fixture(params=[0o002, 0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_and_folders_follow_the_umask(tmp_path, umask):
    with locked(tmp_path / "lock", busy=FetchError("busy")):
        write_atomically(tmp_path / "a" / "file", b"content")

    for place, mode in (("a", 0o777), ("a/file", 0o666)):
        assert stat.S_IMODE((tmp_path / place).stat().st_mode) == mode & ~umask


def test_the_lock_of_somebody_else_can_be_taken_but_not_shared(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.touch()
    real = os.open

    def refuse(file, flags, *mode, **options):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse)
    busy = FetchError("somebody else does")
    with (
        locked(path, busy=busy),
        pytest.raises(FetchError, match="somebody else does"),
        locked(path, busy=busy),
    ):
        pytest.fail("two hold it")
