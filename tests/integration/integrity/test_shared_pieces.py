import os
from dataclasses import replace
from pathlib import Path

import pytest
from damaging import DOWN, GATE, PIECE, UP, flip, found

from grokctl.checkpoint.receipt import Stamp, read_receipt
from grokctl.checkpoint.refusal import read_refusal
from grokctl.errors import CorruptCheckpointError, Reason, count_of
from grokctl.events import Advanced, Stage
from grokctl.verify import raise_for, verify


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_the_file_whose_pickle_is_damaged_is_blamed_for_a_shared_piece(seeded):
    _, length = seeded.files()[GATE]
    low, _ = seeded.piece_range(GATE, length - 1)
    overwrite(seeded.root / GATE, low, bytes(length - low))

    damage = found(verify(seeded.root))

    assert damage[GATE].reason in {Reason.ALTERED, Reason.UNSAFE}
    assert damage[GATE].ranges == ((low, length),)
    assert damage[DOWN].reason is Reason.UNPROVEN
    assert damage[DOWN].detail == f"shares a piece with {GATE}"


def test_a_piece_that_is_good_with_its_pickle_put_right_condemns_nobody_else(seeded):
    _, length = seeded.files()[GATE]
    overwrite(seeded.root / GATE, length - 3, b"???")
    overwrite(seeded.root / DOWN, 0, b"?")

    damage = found(verify(seeded.root))

    assert damage[GATE].ranges == ((length - 3, length),)
    assert damage[DOWN].ranges == ((0, 1),)
    assert set(damage) == {GATE, DOWN}


def test_a_scale_that_no_model_can_have_tells_whose_fault_a_shared_piece_is(seeded):
    _, length = seeded.files()[GATE]
    inside = length - 100
    assert seeded.is_payload(GATE, inside)
    assert seeded.is_payload(GATE, inside + 1)
    overwrite(seeded.root / GATE, inside, b"\xff\xff")  # a bfloat16 that is no number

    damage = found(verify(seeded.root))

    assert damage[GATE].reason is Reason.ALTERED
    assert "which shares" not in damage[GATE].detail
    assert damage[DOWN].reason is Reason.UNPROVEN


def test_the_file_whose_next_piece_is_bad_too_is_blamed_for_a_shared_one(seeded):
    start, length = seeded.files()[GATE]
    last = (start + length - 1) // PIECE
    flip(seeded.root / GATE, (last - 1) * PIECE - start)
    flip(seeded.root / GATE, length - 100)

    damage = found(verify(seeded.root))

    assert set(damage) == {GATE, DOWN}
    assert damage[GATE].pieces == ((last - 1, last + 1),)
    assert damage[GATE].detail.startswith("2 of ")
    assert damage[DOWN].reason is Reason.UNPROVEN


def test_a_file_that_an_earlier_proof_covers_is_not_blamed(seeded):
    verify(seeded.root)
    _, length = seeded.files()[GATE]
    flip(seeded.root / GATE, length - 100)  # touches it as well

    damage = found(verify(seeded.root))

    assert damage[GATE].reason is Reason.ALTERED
    assert "which shares" not in damage[GATE].detail
    assert damage[DOWN].reason is Reason.UNPROVEN
    assert GATE not in read_receipt(seeded.root).stamps
    assert [found(verify(seeded.root)) for _ in range(2)] == [damage, damage]
    assert count_of(tuple(damage.values()), 15).startswith("1 of 15 files is damaged, 1 more")
    assert read_refusal(seeded.root).describe(seeded.root).count("found 1 damaged file on") == 1
    flip(seeded.root / GATE, length - 100)
    again = verify(seeded.root)
    assert (again.damage, again.spared) == ((), 14)
    assert again.verified is not None


def test_without_an_earlier_proof_files_that_share_a_bad_piece_may_be_damaged(seeded):
    for name in (GATE, UP):
        flip(seeded.root / name, seeded.files()[name][1] - 100)

    verdict = verify(seeded.root)

    damage = found(verdict)
    assert {name for name in damage if not damage[name].is_certain} == damage.keys()
    with pytest.raises(
        CorruptCheckpointError, match=f"^2 to {len(damage)} of 15 files are damaged"
    ):
        raise_for(verdict, seeded.root)
    shown = read_refusal(seeded.root).describe(seeded.root)
    assert f"verify found 2 to {len(damage)} damaged files on" in shown


def test_an_earlier_proof_is_given_up_for_a_file_with_evidence_against_it(seeded):
    verify(seeded.root)
    _, length = seeded.files()[GATE]
    overwrite(seeded.root / GATE, length - 3, b"???")
    overwrite(seeded.root / DOWN, 0, b"?")
    receipt = read_receipt(seeded.root)
    now = {DOWN: Stamp.of(seeded.root / DOWN), UP: Stamp.of(seeded.root / UP)}
    replace(receipt, stamps=now, is_complete=False).write(
        seeded.root
    )  # as if the disk had changed it

    damage = found(verify(seeded.root))

    assert damage[DOWN].is_certain
    assert DOWN not in read_receipt(seeded.root).stamps


def test_an_earlier_proof_is_kept_for_a_file_that_shares_a_bad_piece_with_a_missing_one(seeded):
    verify(seeded.root)
    receipt = read_receipt(seeded.root)
    (seeded.root / GATE).unlink()
    replace(receipt, stamps={DOWN: receipt.stamps[DOWN]}).write(seeded.root)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.UNPROVEN
    assert DOWN in read_receipt(seeded.root).stamps
    assert not read_receipt(seeded.root).is_complete


def test_a_file_that_is_touched_after_an_earlier_proof_was_believed_is_not_proven(root):
    verify(root)
    os.utime(root / UP, ns=(1, 1))

    def touch(event):
        if isinstance(event, Advanced) and event.stage is Stage.VERIFY:
            os.utime(root / DOWN, ns=(5, 5))

    verdict = verify(root, observe=touch)

    assert verdict.verified is None
    assert set(found(verdict)) == {DOWN}


def test_pieces_and_ranges_are_those_of_every_damage(seeded):
    for name, offset in ((DOWN, 2 * PIECE), (DOWN, 7 * PIECE), (UP, 3 * PIECE)):
        flip(seeded.root / name, offset)

    verdict = verify(seeded.root)

    damage = found(verdict)
    pieces = [piece for item in damage.values() for piece in item.pieces]
    assert len(pieces) == 3
    assert {first for first, _ in pieces} == verdict.bad_pieces
    assert verdict.mend_nbytes == 3 * PIECE
    assert damage[DOWN].mend_nbytes == 2 * PIECE
    assert damage[UP].mend_nbytes == PIECE


def test_a_bad_piece_that_no_broken_file_explains_is_altered(seeded):
    _, length = seeded.files()[DOWN]
    (seeded.root / GATE).unlink()  # explains the first piece of DOWN, not its last
    flip(seeded.root / DOWN, length - 100)

    damage = found(verify(seeded.root))

    assert damage[GATE].reason is Reason.MISSING
    assert damage[DOWN].reason is Reason.ALTERED


def test_all_damage_is_listed_with_its_own_reason(seeded):
    root = seeded.root
    flip(root / GATE, 3 * PIECE)
    os.truncate(root / DOWN, 5)
    (root / "ckpt-0/tensor00000_000").unlink()

    verdict = verify(root)

    damage = found(verdict)
    assert damage[GATE].reason is Reason.ALTERED
    assert damage[DOWN].reason is Reason.SHORT
    assert damage["ckpt-0/tensor00000_000"].reason is Reason.MISSING
    assert [item.file for item in verdict.damage] == sorted(damage)
    assert verdict.files == len(seeded.files())
    with pytest.raises(
        CorruptCheckpointError, match=r"3 of 15 files are damaged, 2 more share"
    ) as caught:
        raise_for(verdict, root)
    assert caught.value.damage == verdict.damage
    assert caught.value.hint == f"grokctl verify {root} --repair"
