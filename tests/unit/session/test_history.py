"""The history is private and bounded, and its failures are ignored."""

import os
import socket
import stat

import pytest
from users import as_root

from grokctl.session.history import History


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "history"


def test_what_was_typed_is_there_again(path):
    for line in ("one", "zwei Wörter", "/set top-p 0.5"):
        History(path).add(line)

    assert History(path).read() == ["one", "zwei Wörter", "/set top-p 0.5"]


def test_nobody_else_may_read_it(path):
    path.parent.mkdir()
    path.touch(0o644)

    History(path).add("a secret")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_terminals_lose_nothing(path):
    one, other = History(path), History(path)

    one.add("1")
    other.add("2")
    one.add("3")

    assert one.read() == ["1", "2", "3"]


def test_a_long_history_is_cut_to_its_last_lines(path):
    path.parent.mkdir()
    path.write_text("".join(f"line {number}\n" for number in range(2001)))

    lines = History(path).read()

    assert (len(lines), lines[-1]) == (1000, "line 2000")
    assert path.read_text().splitlines() == lines
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["history"]


def test_a_history_of_megabytes_is_read_from_its_end(path):
    path.parent.mkdir()
    path.write_text("x" * 5000 + "\n" + ("y" * 5000 + "\n") * 400 + "last\n")

    lines = History(path).read()

    assert lines[-1] == "last"
    assert path.stat().st_size < 2**20


def test_lines_that_a_terminal_would_obey_are_left_out(path):
    path.parent.mkdir()
    path.write_bytes(b"good\n\x1b[2Jbad\n\xff\xfe\nbetter\n")
    History(path).add("\x1b]0;title\x07")

    lines = History(path).read()

    assert lines[0] == "good"
    assert lines[-1] == "better"
    assert not any("\x1b" in line for line in lines)


def test_pasted_lines_are_one_entry_and_blank_ones_none(path):
    history = History(path)

    for line in ("a\nb", "", "  ", "z" * 10_001):
        history.add(line)

    assert history.read() == ["a b"]


def test_a_history_that_cannot_be_kept_is_no_failure(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()

    for path in (tmp_path / "file" / "history", tmp_path / "folder"):
        History(path).add("line")
        assert History(path).read() == []


@pytest.mark.parametrize("lines", [1, 3000])
def test_a_history_that_is_a_link_stays_one(path, lines):
    path.parent.mkdir()
    target = path.parent / "target"
    target.write_text("line\n" * lines)
    path.symlink_to(target)

    History(path).add("new")
    assert History(path).read()[-1] == "new"

    assert path.is_symlink()
    assert target.read_text().endswith("new\n")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "socket"])
def test_lines_are_written_into_a_file_only(path, monkeypatch, kind):
    path.parent.mkdir()
    place = path if kind in {"pipe", "socket"} else path.parent / "there"
    if "pipe" in kind:
        os.mkfifo(place, 0o666)
    if kind == "socket":
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    if place != path:
        path.symlink_to("/dev/null" if kind == "device" else place)
    written = []
    monkeypatch.setattr(os, "fchmod", lambda *call: written.append(call))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if "pipe" in kind else None

    History(path).add("secret")

    if reader is not None:
        assert os.read(reader, 100) == b""
        os.close(reader)
    assert written == []
    assert History(path).read() == []


# --- what others plant


def anothers_link(path, precious):
    path.symlink_to(precious)
    os.lchown(path, 54_321, -1)


def anothers_file(path, precious):
    precious.rename(path)
    os.chown(path, 54_321, -1)
    precious.symlink_to(path)


@as_root
@pytest.mark.parametrize(
    "plant", [lambda path, precious: path.hardlink_to(precious), anothers_link, anothers_file]
)
def test_what_is_planted_for_the_history_is_neither_read_nor_written(path, tmp_path, plant):
    path.parent.mkdir()
    precious = tmp_path / "thesis"
    precious.write_text("mine\n" * 3000)
    precious.chmod(0o644)
    plant(path, precious)

    History(path).add("new")

    assert History(path).read() == []
    assert precious.read_text() == "mine\n" * 3000
    assert stat.S_IMODE(precious.stat().st_mode) == 0o644
