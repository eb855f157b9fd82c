import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grokctl.checkpoint import receipt as receipts
from grokctl.checkpoint.receipt import (
    Receipt,
    Stamp,
    now,
    proof_of,
    read_receipt,
    unread_receipt,
)
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import read_source, trusted_metainfo, write_source
from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.own_key import MAC, sealed
from grokctl.verify import verify

HASH = "0123456789abcdef0123456789abcdef01234567"
TENSOR = "ckpt-0/tensor00005_000"


def names_in(root: Path) -> list[str]:
    return [*sorted(f"ckpt-0/{path.name}" for path in (root / "ckpt-0").iterdir()), "config.json"]


def proven(root: Path) -> Receipt | None:
    return proof_of(open_release(root)).receipt


def sign(path: Path, values: dict) -> None:
    """A receipt of this user, whatever is in it."""
    del values[MAC]
    path.write_text(json.dumps(sealed("receipt", values)))


@pytest.fixture
def receipt(release: Path) -> Receipt:
    """Written with the release: everything proven just now."""
    written = Receipt(
        infohash=HASH,
        verified_at=now(),
        stamps={name: Stamp.of(release / name) for name in names_in(release)},
        is_complete=True,
        root_of_trust="the magnet that was typed",
    )
    written.write(release)
    write_source(release, infohash=HASH, trust=written.root_of_trust)
    return written


@pytest.fixture
def torrent(release: Path) -> bytes:
    """The release's own torrent, lying with it."""
    data = build_metainfo(release, names_in(release), name="tiny", piece_length=16384)
    (release / "release.torrent").write_bytes(data)
    return data


# --- receipts


def test_a_receipt_is_read_as_it_was_written(release, receipt):
    assert read_receipt(release) == receipt


def test_the_time_of_a_receipt_is_utc_to_the_second():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", now())


def test_an_untouched_release_is_proven(release, receipt):
    assert receipt.untouched(release) == set(names_in(release))
    assert proven(release) == receipt


def test_without_a_receipt_nothing_is_proven(release):
    assert read_receipt(release) is None
    assert proven(release) is None


@pytest.mark.parametrize(
    "touch",
    [
        pytest.param(lambda path: os.utime(path, ns=(0, 1)), id="another-time"),
        pytest.param(
            lambda path: os.utime(
                path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1000)
            ),
            id="a-microsecond-later",
        ),
        pytest.param(
            lambda path: shutil.copy2(path, path.with_suffix(".new")).replace(path),
            id="replaced-by-a-copy-of-the-same-time",
        ),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()), id="written-again"),
    ],
)
def test_a_touched_file_is_no_longer_proven(release, receipt, touch):
    touch(release / TENSOR)

    assert receipt.untouched(release) == set(names_in(release)) - {TENSOR}
    assert proven(release) is None


def test_files_are_proven_after_a_reboot_that_numbers_disks_anew(release, receipt):
    path = release / ".grokctl" / "receipt.json"
    values = json.loads(path.read_bytes())
    for stamp in values["files"].values():
        stamp[3] += 1
    sign(path, values)

    assert read_receipt(release) == receipt
    assert proven(release) is not None


@pytest.mark.parametrize("place", [0, 1, 2, 4], ids=["size", "time", "inode", "time-of-change"])
def test_everything_else_of_a_stamp_is_compared(release, receipt, place):
    assert receipt.stamps
    path = release / ".grokctl" / "receipt.json"
    values = json.loads(path.read_bytes())
    values["files"][TENSOR][place] += 1
    sign(path, values)

    assert proven(release) is None


def test_a_missing_file_is_no_longer_proven(release, receipt):
    opened = open_release(release)
    (release / TENSOR).unlink()

    assert TENSOR not in receipt.untouched(release)
    assert proof_of(opened).receipt is None


def test_a_receipt_that_lacks_a_tensor_proves_nothing(release, receipt):
    stamps = {name: stamp for name, stamp in receipt.stamps.items() if name != TENSOR}
    replace(receipt, stamps=stamps).write(release)

    assert proven(release) is None


def test_a_receipt_may_cover_more_than_the_tensors(release, receipt):
    (release / "README").write_text("hello")
    stamps = {**receipt.stamps, "README": Stamp.of(release / "README")}
    replace(receipt, stamps=stamps).write(release)

    assert proven(release) is not None


def test_a_copied_release_is_not_proven_by_the_receipt_that_came_with_it(
    release, receipt, tmp_path
):
    assert receipt.stamps
    copied = tmp_path / "copied"
    shutil.copytree(release, copied)

    assert proven(copied) is None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="a-list"),
        pytest.param(b"5", id="a-number"),
        pytest.param(b'"text"', id="a-text"),
        pytest.param(b"{}", id="nothing-in-it"),
        pytest.param(b"\xff\xfe", id="no-text"),
        pytest.param(b"\x80\x04N.", id="a-pickle"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"version": ' + b"1" * 5000 + b"}", id="5000-digits"),
    ],
)
def test_a_receipt_that_is_no_object_is_no_receipt(release, content):
    path = release / ".grokctl" / "receipt.json"
    path.parent.mkdir()
    path.write_bytes(content)

    assert read_receipt(release) is None
    assert proven(release) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"version": 4}, id="another-version"),
        pytest.param({"version": "3"}, id="version-a-text"),
        pytest.param({"version": None}, id="version-null"),
        pytest.param({"files": None}, id="files-null"),
        pytest.param({"files": []}, id="files-a-list"),
        pytest.param({"files": "text"}, id="files-a-text"),
        pytest.param({"files": {TENSOR: None}}, id="a-stamp-that-is-null"),
        pytest.param({"files": {TENSOR: 5}}, id="a-stamp-that-is-a-number"),
        pytest.param({"files": {TENSOR: [1, 2, 3, 4]}}, id="four-numbers"),
        pytest.param({"files": {TENSOR: [1, 2, 3, 4, 5, 6]}}, id="six-numbers"),
        pytest.param({"files": {TENSOR: ["1", "2", "3", "4", "5"]}}, id="five-texts"),
        pytest.param({"files": {TENSOR: [None] * 5}}, id="five-nulls"),
        pytest.param({"files": {TENSOR: {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}}}, id="an-object"),
        pytest.param({"files": {TENSOR: [[], [], [], [], []]}}, id="five-lists"),
        pytest.param({"files": {"../../../etc/passwd": [1, 2, 3, 4, 5]}}, id="a-name-outside"),
        pytest.param({"files": {"a\0b": [1, 2, 3, 4, 5]}}, id="a-name-with-nul"),
        pytest.param({"files": {"\ud800": [1, 2, 3, 4, 5]}}, id="a-name-with-a-surrogate"),
        pytest.param({"files": {"a" * 5000: [1, 2, 3, 4, 5]}}, id="a-long-name"),
        pytest.param({"files": {"": [1, 2, 3, 4, 5]}}, id="no-name"),
    ],
)
def test_a_malformed_receipt_proves_nothing_and_breaks_nothing(release, receipt, change):
    assert receipt.stamps
    path = release / ".grokctl" / "receipt.json"
    sign(path, json.loads(path.read_text()) | change)

    assert proven(release) is None


@pytest.mark.parametrize(
    "key", ["version", "infohash", "verified_at", "files", "complete", "root_of_trust"]
)
def test_a_receipt_that_lacks_an_entry_is_no_receipt(release, receipt, key):
    assert receipt.stamps
    path = release / ".grokctl" / "receipt.json"
    values = json.loads(path.read_text())
    del values[key]
    sign(path, values)

    assert read_receipt(release) is None


def test_a_folder_in_place_of_the_receipt_is_no_receipt(release):
    (release / ".grokctl" / "receipt.json").mkdir(parents=True)

    assert read_receipt(release) is None


def test_the_stamp_of_a_missing_file_is_none(tmp_path):
    assert Stamp.of(tmp_path / "nothing") is None


# --- which torrent was asked for


@pytest.mark.parametrize("infohash", [HASH, "0123456789abcdef" * 4], ids=["v1", "v2"])
def test_the_infohash_asked_for_is_remembered(release, infohash):
    assert read_source(release) is None

    write_source(release, infohash=infohash)

    assert read_source(release) == infohash


@pytest.mark.parametrize(
    "infohash", [None, 5, "", "x" * 40, HASH.upper(), HASH[:-1], HASH + "0", HASH + "\n", [HASH]]
)
def test_a_source_that_is_no_infohash_is_none(release, infohash):
    write_source(release, infohash=HASH)
    (release / ".grokctl" / "source.json").write_text(json.dumps({"infohash": infohash}))

    assert read_source(release) is None


def test_a_release_without_a_torrent_has_no_metainfo(release):
    assert trusted_metainfo(release) is None


def test_the_torrent_that_was_asked_for_is_trusted(release, torrent):
    metainfo = parse_metainfo(torrent, source="x")
    write_source(release, infohash=metainfo.infohash)

    assert trusted_metainfo(release) == metainfo


def test_a_torrent_that_came_with_the_files_is_taken_when_nothing_was_asked_for(release, torrent):
    assert trusted_metainfo(release) == parse_metainfo(torrent, source="x")


def test_a_foreign_torrent_is_corrupt_and_both_infohashes_are_named(release, torrent):
    write_source(release, infohash=HASH)

    with pytest.raises(CorruptCheckpointError) as caught:
        trusted_metainfo(release)

    infohash = parse_metainfo(torrent, source="x").infohash
    assert caught.value.damage[0].file == "release.torrent"
    assert caught.value.damage[0].reason is Reason.ALTERED
    assert infohash in str(caught.value)
    assert HASH in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda data: data[:0], id="empty"),
        pytest.param(lambda data: data[:-1], id="cut"),
        pytest.param(lambda data: data + b"x", id="longer"),
        pytest.param(lambda data: b"<html>" + data, id="a-web-page"),
    ],
)
def test_a_malformed_torrent_is_a_corrupt_checkpoint(release, torrent, content):
    (release / "release.torrent").write_bytes(content(torrent))

    with pytest.raises(CorruptCheckpointError) as caught:
        trusted_metainfo(release)

    assert caught.value.damage[0].file == "release.torrent"
    assert caught.value.damage[0].reason is Reason.MALFORMED


# --- when


def test_a_receipt_remembers_what_was_proven_before(release, receipt):
    earlier = dict.fromkeys(names_in(release)[:3], "2024-03-17T12:00:00Z")
    later = replace(receipt, verified_at="2025-01-01T00:00:00Z", earlier=earlier)

    later.write(release)

    found = read_receipt(release)
    assert found == later
    assert found.since == "2024-03-17T12:00:00Z"
    assert found.proven_at(names_in(release)[0]) == found.since
    assert found.proven_at(names_in(release)[-1]) == "2025-01-01T00:00:00Z"


def test_a_receipt_of_files_proven_at_once_has_one_time(receipt):
    assert receipt.since == receipt.verified_at
    assert replace(receipt, stamps={}).since == receipt.verified_at


@pytest.mark.parametrize("key", ["complete", "root_of_trust"])
@pytest.mark.parametrize("value", [None, 5, [], {}])
def test_a_receipt_with_another_kind_of_entry_is_no_receipt(release, receipt, key, value):
    path = release / ".grokctl" / "receipt.json"
    sign(path, json.loads(path.read_text()) | {key: value})

    assert receipt.stamps
    assert read_receipt(release) is None
    assert unread_receipt(release).endswith("found a damaged one")


@pytest.mark.parametrize("earlier", [[], "text", 5, None])
def test_earlier_times_that_make_no_sense_make_no_receipt(release, receipt, earlier):
    path = release / ".grokctl" / "receipt.json"
    sign(path, json.loads(path.read_text()) | {"earlier": earlier})

    assert receipt.stamps
    assert read_receipt(release) is None


@pytest.mark.parametrize("content", ["whole", "damaged"])
def test_a_receipt_is_parsed_once(release, receipt, torrent, monkeypatch, content):
    write_source(release, infohash=parse_metainfo(torrent, source="x").infohash)
    path = release / ".grokctl" / "receipt.json"
    if content == "damaged":
        path.write_text(path.read_text().replace("complete", "whole"))
    parsed, read = [], receipts.read_object
    monkeypatch.setattr(
        receipts, "read_object", lambda *a, **k: parsed.append(a[0]) or read(*a, **k)
    )

    proof_of(open_release(release))
    verify(release, keeps=False)

    assert receipt.stamps
    assert parsed == [path, path]  # by each of the two
