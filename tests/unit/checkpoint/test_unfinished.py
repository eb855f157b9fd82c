import errno
import json
import os
import stat
from dataclasses import replace

import pytest

from grokctl.checkpoint.refusal import forget_refusal, read_refusal, write_refusal
from grokctl.checkpoint.unfinished import (
    Unfinished,
    forget_unfinished,
    read_unfinished,
    refuse_unfinished,
)
from grokctl.errors import CorruptCheckpointError, Damage, Reason
from grokctl.paths import PRIVATE, UNFINISHED, kind_of

RECORD = Unfinished(
    source="magnet:?xt=urn:btih:0",
    options=("--peer", "127.0.0.1:7", "--no-dht"),
    have=349,
    nbytes=1000,
    is_final=True,
)


def test_a_record_is_read_as_it_was_written_until_it_is_forgotten(tmp_path):
    RECORD.write(tmp_path)

    assert read_unfinished(tmp_path) == RECORD
    assert kind_of(tmp_path) == "release"
    forget_unfinished(tmp_path)
    forget_unfinished(tmp_path)
    assert read_unfinished(tmp_path) is None
    refuse_unfinished(tmp_path)


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        pytest.param({}, 0o644, id="harmless"),
        pytest.param(
            {"options": ("--only", "ckpt-0/tensor0000*", "--port", "1")}, 0o644, id="glob"
        ),
        pytest.param({"source": "/a@b/0a1b2c3d4e5f6071.torrent"}, 0o644, id="file"),
        pytest.param({"options": ("--mirror", "http://h/0a1b2c3d4e5f6071/")}, 0o600, id="path"),
        pytest.param({"options": ("--proxy", "http://u:p@h:1")}, 0o600, id="proxy"),
        pytest.param({"source": "magnet:?xt=urn:btih:0&ws=https://h/"}, 0o600, id="magnet"),
    ],
)
def test_a_record_with_a_passkey_of_an_earlier_version_is_its_users_alone(tmp_path, values, mode):
    before = os.umask(0o022)
    try:
        replace(RECORD, **values).write(tmp_path)
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / PRIVATE / UNFINISHED).stat().st_mode) == mode


def test_the_refusal_says_how_far_it_is_and_how_it_continues(tmp_path):
    root = tmp_path / "a release"
    RECORD.write(root)

    with pytest.raises(CorruptCheckpointError) as caught:
        refuse_unfinished(root)

    assert str(caught.value) == f"{root}: incomplete, 34% (349 B of 1.0 kB)"
    assert caught.value.hint == (
        f"grokctl fetch 'magnet:?xt=urn:btih:0' --to '{root}' --peer 127.0.0.1:7 --no-dht"
    )
    assert caught.value.exit_code == 20


@pytest.mark.parametrize(
    ("have", "nbytes", "share"), [(0, 1000, "0%"), (999_999, 10**6, "99%"), (0, 0, "0%")]
)
def test_a_share_is_never_100_percent(have, nbytes, share):
    assert Unfinished(source="grok-1", have=have, nbytes=nbytes).share == share


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"source": 1},
        {"options": "x"},
        {"options": [1]},
        {"have_bytes": -1},
        {"have_bytes": 2000},
        {"bytes": None},
        {"bytes": 10**400},
        {"final": None},
    ],
)
def test_a_malformed_record_says_nothing(tmp_path, change):
    RECORD.write(tmp_path)
    path = tmp_path / ".grokctl" / "unfinished.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    assert read_unfinished(tmp_path) is None


def test_a_killed_download_is_counted_by_what_is_on_disk(release):
    from grokctl.checkpoint.torrent import build_metainfo  # noqa: PLC0415

    files = sorted(path.relative_to(release).as_posix() for path in release.glob("ckpt-0/*"))
    torrent = build_metainfo(release, files, name="x", piece_length=16384)
    (release / "release.torrent").write_bytes(torrent)
    (release / ".grokctl").mkdir()
    (release / ".grokctl" / "resume.begun").write_bytes(b"")
    assert read_unfinished(release) is None  # every file is there

    os.truncate(release / files[0], 0)
    found = read_unfinished(release)

    assert 0 < found.have < found.nbytes
    assert found.source == str(release / "release.torrent")


def test_the_last_bad_result_is_kept_until_it_is_forgotten(tmp_path):
    damage = [
        Damage("b", Reason.UNPROVEN, "shares", is_certain=False),
        Damage("a", Reason.ALTERED, "3 of 7 pieces"),
        Damage("c", Reason.SHORT, "expected 7"),
    ]

    write_refusal(tmp_path, damage)
    found = read_refusal(tmp_path)

    assert (found.files, found.first) == (2, "a: altered, 3 of 7 pieces")
    assert "verify found 2 damaged files on 20" in found.describe(tmp_path)
    forget_refusal(tmp_path)
    assert read_refusal(tmp_path) is None


def refused(files: int, most: int) -> bytes:
    when = "2026-11-30T00:00:00Z"
    values = {"version": 1, "at": when, "files": files, "most": most, "first": "a"}
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{}", b"[]", b"\xff", b'{"at": 1}'),
        *(refused(*numbers) for numbers in [(0, 1), (2, 1), (-1, 1), (1, 10**21)]),
    ],
)
def test_a_malformed_result_says_nothing(tmp_path, data):
    (tmp_path / ".grokctl").mkdir()
    (tmp_path / ".grokctl" / "refusal.json").write_bytes(data)

    assert read_refusal(tmp_path) is None


def test_errors_of_the_machine_are_not_hidden_by_the_kind(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("pathlib.Path.is_file", refuse)

    with pytest.raises(PermissionError):
        kind_of(tmp_path)
