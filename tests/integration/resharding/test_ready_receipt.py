"""The receipt of a ready checkpoint: what it spares, and what it must not spare."""

import hashlib
import os
import shutil

import pytest
from cuts import SMALL, cut
from damaging import flip

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.ready import SUMS, open_ready, read_manifest
from grokctl.checkpoint.ready_receipt import read_ready_receipt
from grokctl.checkpoint.release import open_release
from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.events import Noted, Stage, Started
from grokctl.integrity.published import verify_ready
from grokctl.model.placement import MeshShape
from grokctl.paths import TOKENIZER
from grokctl.resharding.source_hashing import SourceHashing

TWO, FOUR = MeshShape(1, 2), MeshShape(2, 2)
FIRST, SECOND = (f"device-{index:02d}-of-02.safetensors" for index in range(2))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "small"
    write_miniature(root, SMALL)
    return open_release(root)


@pytest.fixture
def ready(release, tmp_path):
    return cut(release, TWO, tmp_path / "ready").root


def hashed_by_reshard(root):
    """Names of the device files that a reshard would hash."""
    return {file.record.name for file in SourceHashing(open_ready(root))._files}


def receipt_of(root):
    return read_ready_receipt(read_manifest(root))


def notes_of(root, **options):
    seen = []
    verify_ready(read_manifest(root), observe=seen.append, **options)
    return [event.message for event in seen if isinstance(event, Noted)]


def test_what_a_reshard_wrote_is_hashed_neither_by_verify_nor_by_the_next_reshard(ready, tmp_path):
    seen = []
    verdict = verify_ready(read_manifest(ready), observe=seen.append)

    receipt = receipt_of(ready)
    assert receipt.is_complete
    assert receipt.stamps.keys() == {
        path.relative_to(ready).as_posix() for path in ready.iterdir() if path.is_file()
    }
    assert (verdict.damage, verdict.hashed, verdict.spared) == ((), 0, verdict.files)
    assert verdict.since == receipt.since
    assert Started(stage=Stage.VERIFY, total=0) in seen
    assert hashed_by_reshard(ready) == set()
    assert notes_of(ready) == [
        f"3 of 3 files are unchanged since they were proven, {receipt.since}"
    ]
    assert receipt_of(cut(open_ready(ready), FOUR, tmp_path / "out").root).is_complete


def test_rehash_hashes_every_file_again(ready):
    verdict = verify_ready(read_manifest(ready), rehash=True)

    assert (verdict.hashed, verdict.spared, verdict.since) == (verdict.nbytes, 0, None)
    assert notes_of(ready, rehash=True) == []


@pytest.mark.parametrize("is_filled", [True, False], ids=["empty-folder", "forced"])
def test_the_receipt_is_of_the_names_that_a_reshard_gives(release, ready, tmp_path, is_filled):
    out = tmp_path / "out" if is_filled else ready
    out.mkdir(exist_ok=True)

    made = cut(release, FOUR, out, force=not is_filled).root

    assert receipt_of(made).is_complete
    assert verify_ready(read_manifest(made)).hashed == 0
    assert {path.name for path in (made / ".grokctl").iterdir()} == {"receipt.json"}


@pytest.mark.parametrize("hides_it", [True, False], ids=["time-set-back", "plain"])
def test_an_altered_file_is_hashed_whatever_its_receipt(ready, tmp_path, hides_it):
    path = ready / SECOND
    status = path.stat()
    flip(path, 4000)
    if hides_it:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert hashed_by_reshard(ready) == {SECOND}
    with pytest.raises(CorruptCheckpointError, match=f"{SECOND}: altered"):
        cut(open_ready(ready, is_streamed=True), FOUR, tmp_path / "out")
    verdict = verify_ready(read_manifest(ready))
    assert [(item.file, item.reason) for item in verdict.damage] == [(SECOND, Reason.ALTERED)]
    assert (verdict.spared, verdict.hashed) == (2, path.stat().st_size)
    assert receipt_of(ready).stamps.keys() == {FIRST, TOKENIZER, "grokctl.json", SUMS}
    assert not receipt_of(ready).is_complete
    assert hashed_by_reshard(ready) == {SECOND}
    assert [item.file for item in verify_ready(read_manifest(ready)).damage] == [SECOND]


def test_a_touched_file_is_hashed_once_and_the_note_says_why(ready):
    before = receipt_of(ready)
    (ready / FIRST).chmod(0o600)

    first, second = notes_of(ready), notes_of(ready)

    assert first[0] == f"2 of 3 files are unchanged since they were proven, {before.since}"
    assert first[1].startswith("1 file: same size and time, another time of change (ctime)")
    assert second == [f"3 of 3 files are unchanged since they were proven, {before.since}"]


def test_a_copy_is_hashed_and_gets_a_receipt_of_its_own(ready, tmp_path):
    copy = shutil.copytree(ready, tmp_path / "copy")

    first, second = verify_ready(read_manifest(copy)), verify_ready(read_manifest(copy))

    assert (first.spared, first.hashed) == (0, first.nbytes)
    assert (second.spared, second.hashed) == (3, 0)


@pytest.mark.parametrize("kind", ["edited-manifest", "writable", "malformed", "none"])
def test_a_receipt_of_something_else_or_of_somebody_else_spares_nothing(ready, kind):
    record = ready / ".grokctl" / "receipt.json"
    match kind:
        case "edited-manifest":
            manifest = ready / "grokctl.json"
            before = hashlib.sha256(manifest.read_bytes()).hexdigest()
            manifest.write_bytes(manifest.read_bytes() + b"\n")
            after = hashlib.sha256(manifest.read_bytes()).hexdigest()
            (ready / SUMS).write_text((ready / SUMS).read_text().replace(before, after))
        case "writable":
            record.chmod(0o666)
        case "malformed":
            record.write_text('{"version": 2')
        case _:
            record.unlink()

    notes = notes_of(ready)

    assert not [note for note in notes if "unchanged" in note]
    assert any("hashing every file" in note for note in notes) == (
        kind in {"writable", "malformed"}
    )
    assert verify_ready(read_manifest(ready)).hashed == 0  # there is a new one


def test_no_receipt_is_written_where_others_could_have_changed_the_files(ready):
    (ready / ".grokctl" / "receipt.json").unlink()
    ready.chmod(0o777)

    verify_ready(read_manifest(ready))

    assert not (ready / ".grokctl" / "receipt.json").exists()


def test_a_damaged_manifest_leaves_no_receipt(ready):
    (ready / "grokctl.json").write_bytes((ready / "grokctl.json").read_bytes() + b" ")

    verdict = verify_ready(read_manifest(ready))

    assert [item.file for item in verdict.damage] == ["grokctl.json"]
    assert not (ready / ".grokctl" / "receipt.json").exists()


def test_a_line_of_sha256sums_counts_only_while_it_is_unchanged(ready):
    (ready / "notes.txt").write_text("right")
    right, wrong = (hashlib.sha256(text).hexdigest() for text in (b"right", b"wrong"))
    sums = (ready / SUMS).read_text()
    (ready / SUMS).write_text(f"{sums}{right}  notes.txt\n")
    assert verify_ready(read_manifest(ready)).damage == ()
    assert verify_ready(read_manifest(ready)).spared == 4

    (ready / SUMS).write_text(f"{sums}{wrong}  notes.txt\n")

    assert [item.file for item in verify_ready(read_manifest(ready)).damage] == ["notes.txt"]


def test_what_changes_while_it_is_hashed_is_not_in_the_receipt(ready):
    path = ready / FIRST

    def change(event):
        if isinstance(event, Started):
            path.chmod(0o600)

    verify_ready(read_manifest(ready), rehash=True, observe=change)

    assert FIRST not in receipt_of(ready).stamps
    assert SECOND in receipt_of(ready).stamps
