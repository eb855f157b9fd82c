"""Where the secret of a job comes from, and which files are believed."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from threading import Timer

import pytest

from grokctl.cluster import secret as module
from grokctl.cluster.secret import VARIABLE, find_secret
from grokctl.errors import UsageError
from grokctl.paths import Home

SECRET = "a secret of a job"


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


def write(path, text=SECRET, mode=0o600):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def on_a_disk(monkeypatch, system):
    monkeypatch.setattr(module, "file_system", lambda _: system)


def test_hosts_that_share_nothing_have_none_and_nothing_is_made(monkeypatch, home):
    on_a_disk(monkeypatch, "ext4")

    assert find_secret({}, home) is None
    assert not home.root.exists()


def test_the_variable_comes_before_the_file(home, tmp_path):
    write(home.cluster_key, "another one that is long enough")
    path = write(tmp_path / "key", f"{SECRET}\n")

    assert find_secret({VARIABLE: f" {SECRET}\n"}, home) == SECRET.encode()
    assert find_secret({VARIABLE: f"@{path}"}, home) == SECRET.encode()


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_a_variable_that_is_set_and_empty_is_not_taken_for_no_secret(home, value):
    with pytest.raises(UsageError, match="expected a secret of 16 to 4096 bytes, found 0"):
        find_secret({VARIABLE: value}, home)


def test_the_file_of_the_home_is_taken_where_it_is(home):
    write(home.cluster_key)

    assert find_secret({}, home) == SECRET.encode()


def test_on_a_disk_that_hosts_share_all_processes_make_one_together(monkeypatch, home):
    on_a_disk(monkeypatch, "nfs4")

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: find_secret({}, home), range(8)))

    assert len(found) == 1
    assert stat.S_IMODE(home.cluster_key.stat().st_mode) == 0o600
    assert len(found.pop()) == 64
    assert [path.name for path in home.root.iterdir()] == ["cluster.key"]


def test_where_none_can_be_made_there_is_none(monkeypatch, home):
    on_a_disk(monkeypatch, "lustre")
    home.root.write_text("no folder")

    assert find_secret({}, home) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_read_or_write_is_refused_with_the_remedy(home, mode):
    path = write(home.cluster_key, mode=mode)

    with pytest.raises(UsageError, match=f"expected mode 600, found {mode:03o}") as raised:
        find_secret({}, home)

    assert raised.value.hint == f"chmod 600 {path}"


def refused(home, environment=None):
    """What is said of a file that is no secret."""
    with pytest.raises(UsageError) as raised:
        find_secret(environment or {}, home)
    assert raised.value.exit_code == 2
    assert raised.value.hint
    return str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_an_error(home, tmp_path):
    os.chown(write(home.cluster_key), 4242, -1)
    os.chown(write(tmp_path / "key"), 4242, -1)
    expected = "expected a file of user 0, found one of 4242"

    assert expected in refused(home)
    assert expected in refused(home, {VARIABLE: f"@{tmp_path / 'key'}"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_network_disk_that_gives_files_to_nobody_gets_no_key(monkeypatch, home):
    on_a_disk(monkeypatch, "nfs")
    create = module.create_beside

    def squashed(path, mode):
        handle, temporary = create(path, mode)
        os.fchown(handle, 65534, -1)
        return handle, temporary

    monkeypatch.setattr(module, "create_beside", squashed)

    assert find_secret({}, home) is None
    assert list(home.root.iterdir()) == []


@pytest.mark.parametrize("target", ["victim", "missing", "folder"])
def test_a_link_is_not_followed(home, tmp_path, target):
    write(tmp_path / "victim")
    (tmp_path / "folder").mkdir()
    home.root.mkdir()
    home.cluster_key.symlink_to(tmp_path / target)

    expected = "expected a file with the job secret, found a symbolic link"
    assert expected in refused(home)
    assert expected in refused(home, {VARIABLE: f"@{home.cluster_key}"})


def test_a_second_name_of_a_file_is_no_secret(monkeypatch, home, tmp_path):
    monkeypatch.setattr(module, "_MAKING_S", 0.1)
    home.root.mkdir()
    os.link(write(tmp_path / "victim"), home.cluster_key)

    assert "found 2 names" in refused(home)
    assert "found 2 names" in refused(home, {VARIABLE: f"@{home.cluster_key}"})


def test_a_key_that_another_process_is_making_is_waited_for(home, tmp_path):
    home.root.mkdir()
    temporary = write(tmp_path / "hidden")
    os.link(temporary, home.cluster_key)
    timer = Timer(0.2, temporary.unlink)
    timer.start()

    assert find_secret({}, home) == SECRET.encode()
    timer.join()


@pytest.mark.parametrize("mode", [0o777, 0o773, 0o1777])
def test_a_key_where_others_can_write_is_an_error(home, mode):
    key = write(home.cluster_key)
    home.root.chmod(mode)
    below = write(home.root / "own" / "key")

    if mode == 0o1777:  # nobody renames what is in a folder with the sticky bit
        assert find_secret({}, home) == SECRET.encode()
    else:
        expected = f"nobody else can replace, but {home.root} can be written by others"
        assert expected in refused(home)
        assert expected in refused(home, {VARIABLE: f"@{key}"})
        assert expected in refused(home, {VARIABLE: f"@{below}"})


def test_no_key_is_made_where_others_can_write(monkeypatch, home):
    on_a_disk(monkeypatch, "nfs")
    home.root.mkdir()
    home.root.chmod(0o777)

    assert find_secret({}, home) is None
    assert not home.cluster_key.exists()


def test_a_folder_is_no_secret(home):
    home.cluster_key.mkdir(parents=True)

    assert "expected a file with the job secret" in refused(home)


@pytest.mark.parametrize("text", ["", "short", "x" * 5000], ids=["empty", "short", "long"])
def test_what_can_be_guessed_or_is_no_secret_is_refused(home, text):
    write(home.cluster_key, text)

    with pytest.raises(UsageError, match="expected a secret of 16 to 4096 bytes") as raised:
        find_secret({}, home)

    assert text == "" or text not in str(raised.value)


def test_a_pipe_is_waited_for_by_nobody(home, tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)

    with pytest.raises(UsageError, match="expected a file with the job secret"):
        find_secret({VARIABLE: f"@{tmp_path / 'pipe'}"}, home)
