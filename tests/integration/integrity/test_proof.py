import itertools
import json
import os
import shutil

import pytest
from damaging import DOWN, GATE, NORM, PIECE, flip, flip_unseen, found

from grokctl.checkpoint.receipt import read_receipt
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source
from grokctl.errors import CorruptCheckpointError, Reason, UnsafePickleError, UsageError
from grokctl.events import Advanced, Noted, Stage, Started
from grokctl.own_key import MAC, sealed
from grokctl.verify import raise_for, verify


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: "?" + text[1:], id="no-json"),
        pytest.param(lambda text: text.replace('"emb_size": 64', '"emb_size": 65'), id="digit"),
        pytest.param(lambda text: text.replace('"num_layers": 1', '"num_layers": 3'), id="layers"),
    ],
)
def test_a_damaged_configuration_is_named_and_condemns_no_proven_file(seeded, change):
    path = seeded.root / "config.json"
    path.write_text(change(path.read_text()))

    damage = found(verify(seeded.root))

    assert damage["config.json"].reason in {Reason.ALTERED, Reason.MALFORMED}
    assert set(damage) == seeded.piece_mates("config.json", 0)


def test_a_missing_configuration_is_named(seeded):
    (seeded.root / "config.json").unlink()

    damage = found(verify(seeded.root))

    assert damage["config.json"].reason is Reason.MISSING
    assert set(damage) == seeded.piece_mates("config.json", 0)


def test_a_whole_release_is_proven_and_the_proof_covers_every_file(seeded):
    verdict = verify(seeded.root)

    assert verdict.damage == ()
    assert verdict.hashed == verdict.nbytes == seeded.metainfo.total
    assert verdict.files == len(seeded.files())
    assert verdict.name == "small"
    assert verdict.verified.release == open_release(seeded.root)
    assert verdict.verified.receipt == read_receipt(seeded.root)
    assert verdict.verified.receipt.infohash == seeded.metainfo.infohash
    assert set(verdict.verified.receipt.stamps) == set(seeded.files())
    raise_for(verdict, seeded.root)


def test_the_verdict_has_the_time_that_was_written(root, monkeypatch):
    seconds = itertools.count(10)  # every look at the clock is a second later
    monkeypatch.setattr(
        "grokctl.integrity.content_check.now", lambda: f"2026-11-30T00:00:{next(seconds)}Z"
    )

    assert verify(root, rehash=True).verified.receipt == read_receipt(root)


def test_a_second_verification_hashes_nothing(root):
    first, events = verify(root), []

    again = verify(root, observe=events.append)

    assert again.hashed == 0
    assert again.verified == first.verified
    since = first.verified.receipt.verified_at
    message = f"15 of 15 files are unchanged since they were proven, {since}"
    assert Noted(message=message) in events
    assert (again.spared, again.since) == (15, since)
    assert Started(stage=Stage.VERIFY, total=0) in events


@pytest.mark.parametrize("name", [GATE, NORM, "config.json"])
def test_a_touched_file_is_hashed_again_with_its_pieces(seeded, name):
    verify(seeded.root)
    os.utime(seeded.root / name, ns=(1, 1))

    again = verify(seeded.root)

    file = next(file for file in seeded.metainfo.files if "/".join(file.path) == name)
    pieces = seeded.metainfo.pieces_of(file)
    assert again.hashed == sum(map(seeded.metainfo.piece_size, pieces))
    assert again.verified is not None
    assert verify(seeded.root).hashed == 0


def test_a_file_that_was_replaced_by_an_equal_one_is_hashed_again(seeded):
    verify(seeded.root)
    path, other = seeded.root / DOWN, seeded.root / "other"
    shutil.copy2(path, other)
    other.rename(path)

    assert verify(seeded.root).hashed > seeded.files()[DOWN][1] - 1


def test_a_flip_that_keeps_the_time_is_found_by_the_time_of_change(root):
    verify(root)
    flip_unseen(root / DOWN, 2 * PIECE)

    again = verify(root)
    whole = verify(root, rehash=True)

    assert set(found(again)) == set(found(whole)) == {DOWN}
    assert 0 < again.hashed < whole.hashed == whole.nbytes


def test_a_flip_that_keeps_the_time_is_found_without_a_receipt(root):
    verify(root)
    flip_unseen(root / DOWN, 2 * PIECE)
    (root / ".grokctl/receipt.json").unlink()

    assert set(found(verify(root))) == {DOWN}


def test_what_rehashing_found_is_not_believed_afterwards(root):
    verify(root)
    flip_unseen(root / DOWN, 2 * PIECE)
    verify(root, rehash=True)

    assert set(found(verify(root))) == {DOWN}


def test_a_damaged_release_keeps_the_proof_of_its_good_files(seeded):
    flip(seeded.root / DOWN, 2 * PIECE)
    verify(seeded.root)

    again = verify(seeded.root)

    assert set(found(again)) == {DOWN}
    assert again.hashed < seeded.files()[DOWN][1] + 2 * PIECE
    assert DOWN not in read_receipt(seeded.root).stamps


def test_a_file_that_changes_while_it_is_verified_is_not_proven(root):
    def touch(event):
        if isinstance(event, Advanced) and event.stage is Stage.VERIFY:
            os.utime(root / DOWN, ns=(5, event.done))

    verdict = verify(root, jobs=1, observe=touch)

    receipt = read_receipt(root)
    assert DOWN not in receipt.stamps
    assert verdict.verified is None
    assert {name: (item.reason, item.detail) for name, item in found(verdict).items()} == {
        DOWN: (Reason.UNPROVEN, "changed while it was verified")
    }
    assert verify(root).hashed > 0


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 2}', b"\xff\xfe", b"null"])
def test_a_receipt_that_makes_no_sense_is_no_proof(root, content):
    verify(root)
    (root / ".grokctl/receipt.json").write_bytes(content)

    verdict = verify(root)

    assert verdict.hashed == verdict.nbytes
    assert verdict.verified is not None


def test_a_receipt_for_another_torrent_is_no_proof(root):
    verify(root)
    path = root / ".grokctl/receipt.json"
    receipt = json.loads(path.read_bytes())
    del receipt[MAC]
    path.write_text(json.dumps(sealed("receipt", {**receipt, "infohash": "0" * 40})))

    assert verify(root).hashed == verify(root, rehash=True).hashed


def test_a_tensor_that_the_torrent_does_not_promise_is_not_proven(root):
    files = ["config.json", *(f"ckpt-0/tensor{index:05d}_000" for index in range(13))]
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash, trust=TYPED)

    verdict = verify(root)

    assert verdict.verified is None
    assert set(found(verdict)) == {"ckpt-0/tensor00013_000"}


def test_a_configuration_that_the_torrent_does_not_promise_is_not_proven(root):
    files = [f"ckpt-0/tensor{index:05d}_000" for index in range(14)]
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash, trust=TYPED)

    verdict = verify(root)

    assert verdict.verified is None
    assert {name: item.reason for name, item in found(verdict).items()} == {
        "config.json": Reason.UNPROVEN
    }


def test_a_file_beside_the_release_is_nobody_s_business(root):
    (root / "README.txt").write_text("hello")

    assert verify(root).verified is not None


def test_another_torrent_than_the_one_asked_for_is_refused(root):
    write_source(root, infohash="0123456789" * 4)

    with pytest.raises(CorruptCheckpointError, match="expected infohash 0123456789") as caught:
        verify(root)

    assert caught.value.damage[0].file == "release.torrent"
    assert caught.value.damage[0].reason is Reason.ALTERED
    assert not (root / ".grokctl/receipt.json").exists()


def test_a_torrent_of_junk_is_refused(root):
    (root / "release.torrent").write_bytes(b"d4:infoe")

    with pytest.raises(CorruptCheckpointError, match=r"release\.torrent: malformed"):
        verify(root)


def test_without_a_torrent_nothing_can_be_proven(root):
    (root / "release.torrent").unlink()

    with pytest.raises(UsageError, match=r"cannot be proven without release\.torrent") as caught:
        verify(root)

    assert caught.value.hint == f"grokctl verify {root} --torrent-file FILE  # or --quick"


def test_without_a_torrent_structural_damage_is_still_found(root):
    (root / "release.torrent").unlink()
    os.truncate(root / DOWN, 1000)

    verdict = verify(root)

    assert {name: item.reason for name, item in found(verdict).items()} == {DOWN: Reason.SHORT}
    assert verdict.verified is None
    with pytest.raises(CorruptCheckpointError, match=DOWN) as caught:
        raise_for(verdict, root)
    assert caught.value.hint == f"ls -l {root / DOWN}  # copy it again from its source"


def test_a_release_is_something_with_tensors(tmp_path):
    with pytest.raises(UsageError, match="expected a release"):
        verify(tmp_path)


def test_an_unsafe_pickle_is_refused_even_if_the_torrent_promises_it(root):
    size = (root / NORM).stat().st_size
    attack = b"\x80\x04cposix\nsystem\n(S'true'\ntR."
    (root / NORM).write_bytes(attack.ljust(size, b"."))
    files = [*(f"ckpt-0/tensor{index:05d}_000" for index in range(14)), "config.json"]
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash, trust=TYPED)

    verdict = verify(root)

    assert verdict.verified is None
    assert {name: item.reason for name, item in found(verdict).items()} == {NORM: Reason.UNSAFE}
    with pytest.raises(UnsafePickleError, match="1 of 15 files is an unsafe pickle"):
        raise_for(verdict, root)


def test_an_attack_hides_behind_no_damaged_configuration(root):
    size = (root / NORM).stat().st_size
    (root / NORM).write_bytes(b"\x80\x04cposix\nsystem\n".ljust(size, b"."))
    (root / "config.json").write_text("?")

    damage = found(verify(root))

    assert damage[NORM].reason is Reason.UNSAFE
    assert damage["config.json"].reason in {Reason.ALTERED, Reason.SHORT}
