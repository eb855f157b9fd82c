"""The key of this user is made once, is not used if others could know it, and signs records."""

import json
import os
import pwd
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from users import OTHER, as_root, mode_of

from grokctl.own_key import MAC, KeyTroubleError, key_file, sealed, why_not_sealed

RECORD = {"a": 1, "b": ["x", None, True, 0.5], "c": {"d": "\ud800"}}


@pytest.fixture
def key(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    path = key_file()
    assert path == tmp_path / "settings/grokctl/proof.key"
    return path


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def why_none(path, record=RECORD):
    """The trouble with the key, which is the same for both directions."""
    with pytest.raises(KeyTroubleError) as caught:
        sealed("test", record)
    problem = caught.value.strerror
    assert why_not_sealed("test", {**record, MAC: "0"}) == f"its MAC cannot be checked: {problem}"
    return problem.removeprefix(f"the key of this user, {path}: ")


def test_the_first_record_makes_the_key_and_the_next_uses_it(key):
    first, second = sealed("test", RECORD), sealed("test", RECORD)

    assert first == second == {**RECORD, MAC: first[MAC]}
    assert (mode_of(key), mode_of(key.parent), mode_of(key.parents[1])) == (0o600, 0o700, 0o700)
    assert len(key.read_bytes()) == 32
    assert names_in(key.parent) == [key.name]
    for text in (json.dumps(first), json.dumps(first, indent=1, sort_keys=True)):
        assert why_not_sealed("test", json.loads(text)) is None


def test_looking_makes_no_key(key):
    problem = why_not_sealed("test", {**RECORD, MAC: "0" * 64})

    assert problem == (
        f"its MAC cannot be checked: the key of this user, {key}: No such file or directory"
    )
    assert not key.parents[1].exists()


def test_many_processes_make_one_key(key):
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda _: sealed("test", RECORD), range(32)))

    assert all(record == records[0] for record in records)
    assert names_in(key.parent) == [key.name]


ALTERED = [
    pytest.param(lambda r: r | {"a": 2}, id="value"),
    pytest.param(lambda r: r | {"a": True}, id="type"),
    pytest.param(lambda r: r | {"e": None}, id="more"),
    pytest.param(lambda r: {name: r[name] for name in r if name != "b"}, id="less"),
    pytest.param(lambda r: r | {"c": {"d": "x"}}, id="inside"),
    pytest.param(lambda r: r | {MAC: r[MAC][:-1]}, id="a-part"),
    pytest.param(lambda r: r | {MAC: r[MAC].upper()}, id="letters"),
    pytest.param(lambda r: r | {MAC: "\ud800"}, id="no-text"),
    pytest.param(lambda r: r | {MAC: ""}, id="empty"),
    pytest.param(lambda r: r | {MAC: [r[MAC]]}, id="a-list"),
    pytest.param(lambda r: r | {MAC: None}, id="null"),
]


@pytest.mark.parametrize("alter", ALTERED)
def test_a_record_that_was_altered_is_not_this_users(key, alter):
    record = sealed("test", {**RECORD, "a": 1})
    assert why_not_sealed("test", record) is None

    problem = why_not_sealed("test", alter(record))

    assert problem in {
        "has no MAC of this user",
        f"its MAC is of another key than that of this user, {key}",
    }


@pytest.mark.usefixtures("key")
def test_a_record_of_one_kind_passes_for_no_other():
    assert why_not_sealed("other", sealed("test", RECORD)) is not None


@given(st.dictionaries(st.text(), st.integers() | st.text(), max_size=3), st.text())
def test_a_record_is_told_from_every_other(values, name):
    values.pop(MAC, None)
    record = sealed("test", values)
    assert why_not_sealed("test", json.loads(json.dumps(record))) is None
    if name not in record:
        assert why_not_sealed("test", {**record, name: 0}) is not None


@pytest.mark.usefixtures("key")
def test_a_record_that_is_nested_a_thousand_times_is_refused():
    sealed("test", RECORD)
    deep = []
    for _ in range(100_000):
        deep = [deep]

    assert why_not_sealed("test", {"deep": deep, MAC: "0"}) == "is nested too deeply"


# --- keys that are not believed


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def with_two_names(path):
    os.link(path, path.with_name("second"))


def a_folder(path):
    path.unlink()
    path.mkdir()


UNUSABLE = [
    pytest.param(linked, "Too many levels of symbolic links", id="link"),
    pytest.param(with_two_names, "has 2 names (hard links)", id="two-names"),
    pytest.param(a_folder, "is not a regular file", id="folder"),
    pytest.param(lambda path: path.write_bytes(b""), "expected 32 bytes, found 0 (rm it)", id="0"),
    pytest.param(
        lambda path: path.write_bytes(b"x" * 33), "expected 32 bytes, found 33 (rm it)", id="33"
    ),
    pytest.param(
        lambda path: path.chmod(0o640),
        "can be read by others (rm it, and everything is proven again)",
        id="readable",
    ),
    pytest.param(lambda path: path.chmod(0o602), "{} can be written by others", id="writable"),
    pytest.param(
        lambda path: path.parent.chmod(0o777), "{0.parent} can be written by others", id="folder-of"
    ),
    pytest.param(
        lambda path: os.chown(path, OTHER, -1),
        f"{{}} belongs to user {OTHER}",
        id="anothers",
        marks=as_root,
    ),
]


@pytest.mark.parametrize(("spoil", "problem"), UNUSABLE)
def test_a_key_that_others_could_know_or_exchange_is_not_used(key, spoil, problem):
    sealed("test", RECORD)
    spoil(key)

    found = why_none(key)

    assert found == problem.format(key)


def test_no_key_is_made_where_others_can_write(key):
    key.parents[1].mkdir()
    key.parents[1].chmod(0o777)

    assert why_none(key) == f"{key.parents[1]} can be written by others"
    assert not key.exists()


@as_root
def test_root_makes_no_key_in_the_home_of_another(key):
    key.parents[1].mkdir()
    os.chown(key.parents[1], OTHER, OTHER)

    with pytest.raises(KeyTroubleError, match="belongs to another user"):
        sealed("test", RECORD)

    assert names_in(key.parents[1]) == []


def test_without_a_home_folder_there_is_no_key(monkeypatch):
    for name in ("XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container with any number

    assert key_file() is None
    with pytest.raises(KeyTroubleError, match="the key of this user: there is no home folder"):
        sealed("test", RECORD)


def test_a_key_is_a_secret_from_the_beginning(key, monkeypatch):
    modes = []
    monkeypatch.setattr(
        os, "rename", lambda *_, **__: modes.extend(map(mode_of, key.parent.iterdir()))
    )
    old = os.umask(0)
    try:
        with pytest.raises(KeyTroubleError):
            sealed("test", RECORD)
    finally:
        os.umask(old)

    assert modes == [0o600]
