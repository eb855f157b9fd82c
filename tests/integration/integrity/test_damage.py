import errno
import os
import shutil

import pytest
from damaging import DOWN, GATE, NORM, PIECE, UP, Seeded, break_disk, flip, found, payloads, refuse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grokctl.errors import CorruptCheckpointError, HardwareError, Reason
from grokctl.os_errors import refusal
from grokctl.verify import raise_for, verify

PREVIOUS, NEXT = "ckpt-0/tensor00001_000", "ckpt-0/tensor00006_000"


@pytest.fixture(scope="module")
def victim(pristine, tmp_path_factory) -> Seeded:
    """A copy that every example damages, and puts right again."""
    root = shutil.copytree(pristine.root, tmp_path_factory.mktemp("victim") / "small")
    payloads(root)
    return Seeded(root, pristine.metainfo)


def borders(seeded: Seeded):
    """Every file's first and last byte, and the bytes around each piece border in it."""
    for name, (start, length) in seeded.files().items():
        first = -(-start // PIECE) * PIECE - start
        around = (border + side for border in range(first, length, PIECE) for side in (-1, 0, 1))
        for offset in sorted({0, length - 1, *around}):
            if 0 <= offset < length:
                yield name, offset


def test_the_files_of_this_test_share_pieces_and_fill_them(pristine):
    lengths = [length for _, length in pristine.files().values()]

    assert min(lengths) < PIECE / 8
    assert max(lengths) > 4 * PIECE
    assert pristine.piece_mates(NORM, 0) > {NORM}


def assert_found(seeded: Seeded, verdict, name: str, offset: int) -> None:
    """A flipped bit is found, in the right piece, and where the pickle is known in the byte."""
    damage = found(verdict)
    piece = (seeded.files()[name][0] + offset) // PIECE
    assert verdict.verified is None
    assert verdict.bad_pieces == {piece}
    assert verdict.mend_nbytes == seeded.metainfo.piece_size(piece)
    assert damage[name].reason in {Reason.ALTERED, Reason.UNSAFE}
    assert damage[name].pieces == ((piece, piece + 1),)
    if name == "config.json" or seeded.is_payload(name, offset):
        assert set(damage) <= seeded.piece_mates(name, offset)
        assert damage[name].ranges == (seeded.piece_range(name, offset),)
    else:
        assert set(damage) == {name}
        assert damage[name].ranges == ((offset, offset + 1),)


def test_one_flipped_bit_at_any_border_is_found_and_located(victim):
    places = [place for place in borders(victim) if place[0] != "config.json"]
    assert len(places) > 100

    for name, offset in places:
        flip(victim.root / name, offset)
        verdict = verify(victim.root, rehash=True, jobs=1)
        flip(victim.root / name, offset)

        assert_found(victim, verdict, name, offset)
        if victim.is_payload(name, offset):
            assert set(found(verdict)) == victim.piece_mates(name, offset)
    assert verify(victim.root, rehash=True).verified is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found_and_located(victim, data):
    name = data.draw(st.sampled_from(sorted(victim.files())))
    _, length = victim.files()[name]
    offset = data.draw(st.integers(0, length - 1))
    bit = data.draw(st.integers(0, 7))

    flip(victim.root / name, offset, bit)
    try:
        verdict = verify(victim.root, rehash=True, jobs=2)
    finally:
        flip(victim.root / name, offset, bit)

    if name == "config.json":
        assert set(found(verdict)) <= victim.piece_mates(name, offset)
        assert verdict.bad_pieces == {victim.pieces_of(name)[0]}
    else:
        assert_found(victim, verdict, name, offset)


def test_a_piece_of_one_file_names_no_other(seeded):
    flip(seeded.root / DOWN, 2 * PIECE)

    (damage,) = verify(seeded.root).damage

    assert damage.file == DOWN
    assert damage.reason is Reason.ALTERED
    pieces = len(seeded.metainfo.pieces_of(seeded.metainfo.files[3]))
    assert damage.detail == f"1 of {pieces} pieces"


def test_a_piece_of_two_files_names_both_candidates(seeded):
    _, length = seeded.files()[GATE]
    inside = length - 100  # in the scales, so that the structure stays sound
    assert seeded.piece_mates(GATE, inside) == {GATE, DOWN}
    flip(seeded.root / GATE, inside)

    damage = found(verify(seeded.root))

    assert set(damage) == {GATE, DOWN}
    assert f"or {DOWN}, which shares the piece" in damage[GATE].detail
    assert f"or {GATE}, which shares the piece" in damage[DOWN].detail


def test_damage_in_many_places_is_listed_whole_and_touching_ranges_are_joined(seeded):
    start, length = seeded.files()[DOWN]
    first = -start % PIECE
    for offset in (first, first + PIECE, first + 2 * PIECE, first + 5 * PIECE):
        flip(seeded.root / DOWN, offset)
    flip(seeded.root / UP, 3 * PIECE)

    damage = found(verify(seeded.root))

    assert set(damage) == {DOWN, UP}
    assert damage[DOWN].ranges == (
        (first, first + 3 * PIECE),
        (first + 5 * PIECE, first + 6 * PIECE),
    )
    assert length > first + 6 * PIECE
    assert damage[DOWN].detail.startswith("4 of ")
    assert damage[UP].ranges == (seeded.piece_range(UP, 3 * PIECE),)


def test_a_file_with_a_bad_piece_of_its_own_accuses_no_neighbour(seeded):
    _, length = seeded.files()[GATE]
    flip(seeded.root / GATE, 3 * PIECE)
    flip(seeded.root / GATE, length - 100)

    damage = found(verify(seeded.root))

    assert "which shares" not in damage[GATE].detail
    assert len(damage[GATE].ranges) == 2


def assert_piece_bounded(seeded: Seeded, damage) -> None:
    start, length = seeded.files()[damage.file]
    assert damage.ranges
    for low, high in damage.ranges:
        assert 0 <= low < high
        if low < length:
            assert low == 0 or (start + low) % PIECE == 0
            assert high == length or (start + high) % PIECE == 0


@pytest.mark.parametrize("cut", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_a_truncated_file_is_short_from_the_piece_of_its_new_end(seeded, cut):
    _, length = seeded.files()[DOWN]
    os.truncate(seeded.root / DOWN, length - cut)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.SHORT
    assert damage[DOWN].detail == f"expected {length:,} bytes, found {length - cut:,}"
    assert damage[DOWN].ranges == ((seeded.piece_range(DOWN, length - cut)[0], length),)
    assert set(damage) == {DOWN, *seeded.piece_mates(DOWN, length - 1)}
    assert damage[UP].reason is Reason.UNPROVEN
    assert damage[UP].detail == f"shares a piece with {DOWN}"


@pytest.mark.parametrize("extra", [1, PIECE])
def test_an_extended_file_is_long_and_its_neighbours_are_proven(seeded, extra):
    _, length = seeded.files()[DOWN]
    with (seeded.root / DOWN).open("ab") as file:
        file.write(bytes(extra))

    (damage,) = verify(seeded.root).damage

    assert damage.file == DOWN
    assert damage.reason is Reason.LONG
    assert damage.detail == f"expected {length:,} bytes, found {length + extra:,}"
    assert damage.ranges == ((length, length + extra),)


def test_an_extended_and_altered_file_has_the_ranges_of_both(seeded):
    _, length = seeded.files()[DOWN]
    flip(seeded.root / DOWN, 2 * PIECE)
    with (seeded.root / DOWN).open("ab") as file:
        file.write(b"x")

    (damage,) = verify(seeded.root).damage

    assert damage.reason is Reason.LONG
    assert damage.ranges == (seeded.piece_range(DOWN, 2 * PIECE), (length, length + 1))


def test_a_missing_file_is_missing_and_its_neighbours_unproven(seeded):
    _, length = seeded.files()[DOWN]
    (seeded.root / DOWN).unlink()

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.MISSING
    assert damage[DOWN].detail == f"expected {length:,} bytes"
    assert damage[DOWN].ranges == ((0, length),)
    assert {name: item.reason for name, item in damage.items() if name != DOWN} == {
        GATE: Reason.UNPROVEN,
        UP: Reason.UNPROVEN,
    }
    for item in damage.values():
        assert_piece_bounded(seeded, item)


def test_an_empty_file_is_short(seeded):
    os.truncate(seeded.root / NORM, 0)

    damage = found(verify(seeded.root))

    assert damage[NORM].reason is Reason.SHORT
    assert damage[NORM].ranges == ((0, seeded.files()[NORM][1]),)


def test_two_files_of_one_size_that_changed_places_are_both_altered(seeded):
    assert seeded.files()[GATE][1] == seeded.files()[UP][1]
    gate, up, aside = seeded.root / GATE, seeded.root / UP, seeded.root / "aside"
    gate.rename(aside)
    up.rename(gate)
    aside.rename(up)

    damage = found(verify(seeded.root))

    assert damage[GATE].reason is damage[UP].reason is Reason.ALTERED
    for name in (GATE, UP):
        low, high = 0, seeded.files()[name][1]
        covered = sum(stop - start for start, stop in damage[name].ranges)
        assert covered > (high - low) - 2 * PIECE
        assert_piece_bounded(seeded, damage[name])


def test_a_flip_in_the_pickle_s_own_bytes_is_damage_and_named(seeded):
    _, length = seeded.files()[DOWN]
    flip(seeded.root / DOWN, length - 1)

    verdict = verify(seeded.root)

    assert found(verdict)[DOWN].reason is Reason.ALTERED
    assert f"byte {length - 1:,} has a flipped bit" in found(verdict)[DOWN].detail
    assert found(verdict)[DOWN].ranges == ((length - 1, length),)
    with pytest.raises(CorruptCheckpointError, match=DOWN) as caught:
        raise_for(verdict, seeded.root)
    assert caught.value.exit_code == 20


def test_a_folder_in_place_of_a_file_is_unreadable(seeded):
    (seeded.root / DOWN).unlink()
    (seeded.root / DOWN).mkdir()

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.UNREADABLE
    assert damage[DOWN].ranges == ((0, seeded.files()[DOWN][1]),)
    assert damage[UP].reason is Reason.UNPROVEN


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_file_that_the_machine_refuses_is_not_damaged(seeded, monkeypatch, code):
    refuse(monkeypatch, DOWN, code)

    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        verify(seeded.root)

    assert caught.value.filename == str(seeded.root / DOWN)


def test_a_disk_that_fails_half_way_is_hardware_and_not_damage(seeded, monkeypatch):
    break_disk(monkeypatch, DOWN, 5 * PIECE)

    with pytest.raises(OSError, match="Input/output error") as caught:
        verify(seeded.root, jobs=1)  # the files before are then hashed before

    error = refusal(caught.value)
    assert type(error) is HardwareError
    assert str(seeded.root / DOWN) in str(error)
    assert (seeded.root / ".grokctl" / "receipt.json").exists()  # what is good so far is kept


@pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_of_that_size_is_damage_and_blocks_nobody(seeded, kind):
    (seeded.root / DOWN).unlink()
    kind(seeded.root / DOWN)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason in {Reason.UNREADABLE, Reason.SHORT}
    assert damage[DOWN].ranges == ((0, seeded.files()[DOWN][1]),)
    assert {damage[GATE].reason, damage[UP].reason} == {Reason.UNPROVEN}
