"""Verification finds every damaged byte, says where, and believes only what it proved."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.ready import SUMS, open_ready, read_manifest
from grokctl.checkpoint.receipt import read_receipt, write_source
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import Metainfo, build_metainfo, parse_metainfo
from grokctl.errors import CorruptCheckpointError, Reason, UnsafePickleError, UsageError
from grokctl.events import Advanced, Noted, Stage, Started
from grokctl.model.placement import MeshShape
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.verify import raise_for, verify, verify_ready

PIECE = 16384
SMALL = replace(MINIATURE, num_layers=1, vocab_size=512, emb_size=64, num_q_heads=4, num_kv_heads=2)
# SMALL's gate is file 2, down 3, up 4; norms and router are a few hundred bytes each
GATE, DOWN, UP, NORM = (f"ckpt-0/tensor{index:05d}_000" for index in (2, 3, 4, 9))
PREVIOUS, NEXT = "ckpt-0/tensor00001_000", "ckpt-0/tensor00006_000"


@dataclass(frozen=True, eq=False)
class Seeded:
    root: Path
    metainfo: Metainfo

    def files(self) -> dict[str, tuple[int, int]]:
        """Offset and length of each file."""
        return {"/".join(file.path): (file.offset, file.length) for file in self.metainfo.files}

    def piece_mates(self, name: str, offset: int) -> set[str]:
        """The files that share the piece of a byte."""
        piece = (self.files()[name][0] + offset) // PIECE
        return {"/".join(file.path) for file, _, _ in self.metainfo.spans(piece)}

    def pieces_of(self, name: str) -> range:
        (file,) = (file for file in self.metainfo.files if "/".join(file.path) == name)
        return self.metainfo.pieces_of(file)

    def is_payload(self, name: str, offset: int) -> bool:
        """Whether a byte belongs to an array, and not to the pickle around it."""
        return any(low <= offset < high for low, high in payloads(self.root).get(name, ()))

    def piece_range(self, name: str, offset: int) -> tuple[int, int]:
        """The bytes of a file in the piece of one of them."""
        start, length = self.files()[name]
        low = (start + offset) // PIECE * PIECE - start
        return max(0, low), min(length, low + PIECE)


@cache
def payloads(root: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """Where the arrays of each file lie; asked for before anything is damaged."""
    return {
        f"ckpt-0/{tensor.spec.file}": tuple(
            (ref.offset, ref.offset + ref.nbytes)
            for ref in (tensor.weight, tensor.scales)
            if ref is not None
        )
        for tensor in open_release(root).tensors
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Seeded:
    root = tmp_path_factory.mktemp("pristine") / "small"
    files = write_miniature(root, SMALL, tokenizer=False)
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    metainfo = parse_metainfo(torrent, source="small")
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=metainfo.infohash)
    return Seeded(root, metainfo)


@pytest.fixture
def seeded(pristine, tmp_path) -> Seeded:
    """A copy that a test may damage."""
    return Seeded(shutil.copytree(pristine.root, tmp_path / "small"), pristine.metainfo)


@pytest.fixture
def root(seeded) -> Path:
    return seeded.root


@pytest.fixture(scope="module")
def victim(pristine, tmp_path_factory) -> Seeded:
    """A copy that every example damages, and puts right again."""
    root = shutil.copytree(pristine.root, tmp_path_factory.mktemp("victim") / "small")
    payloads(root)
    return Seeded(root, pristine.metainfo)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def found(verdict):
    return {damage.file: damage for damage in verdict.damage}


def borders(seeded: Seeded):
    """Every file's first and last byte, and the bytes around each piece border in it."""
    for name, (start, length) in seeded.files().items():
        first = -(-start // PIECE) * PIECE - start
        around = (border + side for border in range(first, length, PIECE) for side in (-1, 0, 1))
        for offset in sorted({0, length - 1, *around}):
            if 0 <= offset < length:
                yield name, offset


# --- one flipped bit


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


# --- files that are not what they were


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
    assert damage[DOWN].detail == f"expected {length} bytes, found {length - cut}"
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
    assert damage.detail == f"expected {length} bytes, found {length + extra}"
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
    assert damage[DOWN].detail == f"expected {length} bytes"
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


def test_a_flip_in_the_pickle_s_own_bytes_is_refused_as_unsafe(seeded):
    _, length = seeded.files()[DOWN]
    flip(seeded.root / DOWN, length - 1)

    verdict = verify(seeded.root)

    assert found(verdict)[DOWN].reason is Reason.UNSAFE
    assert found(verdict)[DOWN].ranges == ((length - 1, length),)
    with pytest.raises(UnsafePickleError, match=DOWN):
        raise_for(verdict, seeded.root)


def test_a_folder_in_place_of_a_file_is_unreadable(seeded):
    (seeded.root / DOWN).unlink()
    (seeded.root / DOWN).mkdir()

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.UNREADABLE
    assert damage[DOWN].ranges == ((0, seeded.files()[DOWN][1]),)
    assert damage[UP].reason is Reason.UNPROVEN


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_unreadable(seeded):
    (seeded.root / DOWN).chmod(0)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.UNREADABLE
    assert damage[UP].reason is Reason.UNPROVEN


def break_disk(monkeypatch, name: str, offset: int) -> None:
    """Let the disk refuse to read a file from some place on."""

    def preadv(handle, buffers, start, flags=0):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.name == Path(name).name and start + len(buffers[0]) > offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(handle, buffers, start, flags)

    read = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)


def test_a_file_that_cannot_be_read_half_way_is_unreadable(seeded, monkeypatch):
    break_disk(monkeypatch, DOWN, 5 * PIECE)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.UNREADABLE
    assert damage[DOWN].detail == "Input/output error"
    low, high = damage[DOWN].ranges[0]
    assert low <= 5 * PIECE < low + PIECE
    assert high == seeded.files()[DOWN][1]
    assert damage[UP].reason is Reason.UNPROVEN
    assert GATE not in damage


@pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/proc/self/mem")])
def test_what_is_no_file_of_that_size_is_damage_and_blocks_nobody(seeded, kind):
    (seeded.root / DOWN).unlink()
    kind(seeded.root / DOWN)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason in {Reason.UNREADABLE, Reason.SHORT}
    assert damage[DOWN].ranges == ((0, seeded.files()[DOWN][1]),)
    assert {damage[GATE].reason, damage[UP].reason} == {Reason.UNPROVEN}


# --- whose fault a bad piece is


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
    assert not {GATE, DOWN} & read_receipt(seeded.root).stamps.keys()


def test_an_earlier_proof_is_given_up_for_a_file_that_shares_a_bad_piece(seeded):
    verify(seeded.root)
    receipt = read_receipt(seeded.root)
    (seeded.root / GATE).unlink()
    replace(receipt, stamps={DOWN: receipt.stamps[DOWN]}).write(seeded.root)

    damage = found(verify(seeded.root))

    assert damage[DOWN].reason is Reason.UNPROVEN
    assert DOWN not in read_receipt(seeded.root).stamps


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
    with pytest.raises(CorruptCheckpointError, match=f"{len(damage)} of 15 files") as caught:
        raise_for(verdict, root)
    assert caught.value.damage == verdict.damage
    assert caught.value.hint == f"grokctl verify {root} --repair"


# --- the configuration is a file like any other


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


# --- proofs


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


def flip_unseen(path: Path, offset: int) -> None:
    before = path.stat()
    flip(path, offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flip_that_keeps_the_time_is_found_when_hashed_again(root):
    verify(root)
    flip_unseen(root / DOWN, 2 * PIECE)

    believed = verify(root)
    hashed = verify(root, rehash=True)

    assert believed.verified is not None
    assert set(found(hashed)) == {DOWN}
    assert hashed.hashed == hashed.nbytes


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
    path.write_text(json.dumps({**receipt, "infohash": "0" * 40}))

    assert verify(root).hashed == verify(root, rehash=True).hashed


def test_a_tensor_that_the_torrent_does_not_promise_is_not_proven(root):
    files = ["config.json", *(f"ckpt-0/tensor{index:05d}_000" for index in range(13))]
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash)

    verdict = verify(root)

    assert verdict.verified is None
    assert set(found(verdict)) == {"ckpt-0/tensor00013_000"}


def test_a_configuration_that_the_torrent_does_not_promise_is_not_proven(root):
    files = [f"ckpt-0/tensor{index:05d}_000" for index in range(14)]
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash)

    verdict = verify(root)

    assert verdict.verified is None
    assert {name: item.reason for name, item in found(verdict).items()} == {
        "config.json": Reason.UNPROVEN
    }


def test_a_file_beside_the_release_is_nobody_s_business(root):
    (root / "README.txt").write_text("hello")

    assert verify(root).verified is not None


# --- torrents


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

    assert caught.value.hint == f"grokctl verify {root} --quick"


def test_without_a_torrent_structural_damage_is_still_found(root):
    (root / "release.torrent").unlink()
    os.truncate(root / DOWN, 1000)

    verdict = verify(root)

    assert {name: item.reason for name, item in found(verdict).items()} == {DOWN: Reason.SHORT}
    assert verdict.verified is None
    with pytest.raises(CorruptCheckpointError, match=DOWN) as caught:
        raise_for(verdict, root)
    assert caught.value.hint is None


def test_a_release_is_something_with_tensors(tmp_path):
    with pytest.raises(UsageError, match="expected a release"):
        verify(tmp_path)


# --- unsafe pickles


def test_an_unsafe_pickle_is_refused_even_if_the_torrent_promises_it(root):
    size = (root / NORM).stat().st_size
    attack = b"\x80\x04cposix\nsystem\n(S'true'\ntR."
    (root / NORM).write_bytes(attack.ljust(size, b"."))
    files = [*(f"ckpt-0/tensor{index:05d}_000" for index in range(14)), "config.json"]
    torrent = build_metainfo(root, files, name="small", piece_length=PIECE)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash)

    verdict = verify(root)

    assert verdict.verified is None
    assert {name: item.reason for name, item in found(verdict).items()} == {NORM: Reason.UNSAFE}
    with pytest.raises(UnsafePickleError, match="1 of 15 files are unsafe pickles"):
        raise_for(verdict, root)


def test_an_attack_hides_behind_no_damaged_configuration(root):
    size = (root / NORM).stat().st_size
    (root / NORM).write_bytes(b"\x80\x04cposix\nsystem\n".ljust(size, b"."))
    (root / "config.json").write_text("?")

    damage = found(verify(root))

    assert damage[NORM].reason is Reason.UNSAFE
    assert damage["config.json"].reason in {Reason.ALTERED, Reason.SHORT}


# --- quick


def test_a_quick_look_proves_nothing(root):
    verdict = verify(root, quick=True)

    assert verdict.damage == ()
    assert verdict.verified is None
    assert verdict.hashed == 0
    assert verdict.files == 14
    assert verdict.nbytes == sum(path.stat().st_size for path in (root / "ckpt-0").iterdir())
    assert not (root / ".grokctl/receipt.json").exists()


def test_a_quick_look_sees_structure_and_no_content(root):
    flip(root / DOWN, 2 * PIECE)
    os.truncate(root / GATE, 1000)
    (root / NORM).unlink()

    damage = found(verify(root, quick=True))

    assert {name: item.reason for name, item in damage.items()} == {
        GATE: Reason.SHORT,
        NORM: Reason.MISSING,
    }


# --- threads and progress


def test_any_number_of_threads_finds_the_same(root):
    for offset in range(0, 20 * PIECE, 3 * PIECE):
        flip(root / "ckpt-0/tensor00000_000" if offset % 2 else root / DOWN, offset % 150_000)
    os.truncate(root / UP, 70_000)

    verdicts = [verify(root, jobs=jobs, rehash=True) for jobs in (1, 4, None)]

    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert len(verdicts[0].damage) >= 3


def test_progress_is_in_bytes_never_backwards_and_complete(seeded):
    events = []

    verify(seeded.root, observe=events.append)

    done = [
        event.done
        for event in events
        if isinstance(event, Advanced) and event.stage is Stage.VERIFY
    ]
    assert done == sorted(done)
    assert done[-1] == seeded.metainfo.total
    assert Started(stage=Stage.VERIFY, total=seeded.metainfo.total) in events


def interrupted_at(share: float) -> Callable[[object], None]:
    total = 0

    def interrupt(event):
        nonlocal total
        if isinstance(event, Started) and event.stage is Stage.VERIFY:
            total = event.total
        is_over = isinstance(event, Advanced) and event.stage is Stage.VERIFY
        if is_over and event.done > share * total:
            raise KeyboardInterrupt

    return interrupt


def test_a_verification_that_is_interrupted_at_once_leaves_no_proof(root):
    with pytest.raises(KeyboardInterrupt):
        verify(root, observe=interrupted_at(0))

    assert read_receipt(root) is None


def test_an_interrupted_verification_goes_on_where_it_stopped(seeded):
    with pytest.raises(KeyboardInterrupt):
        verify(seeded.root, jobs=1, observe=interrupted_at(0.5))
    first = read_receipt(seeded.root)

    again = verify(seeded.root)

    assert 0 < len(first.stamps) < len(seeded.files())
    assert again.spared == len(first.stamps)
    assert again.hashed <= 0.5 * seeded.metainfo.total + 9 * PIECE  # the largest file
    assert again.verified is not None
    assert verify(seeded.root).hashed == 0


def test_what_an_interrupted_verification_did_not_hash_is_not_proven(seeded):
    flip(seeded.root / "ckpt-0/tensor00013_000", -1 + seeded.files()["ckpt-0/tensor00013_000"][1])
    with pytest.raises(KeyboardInterrupt):
        verify(seeded.root, jobs=1, observe=interrupted_at(0.5))

    assert set(found(verify(seeded.root))) == {"ckpt-0/tensor00013_000"}


def test_an_interrupted_rehash_takes_back_what_it_did_not_prove(root):
    verify(root)
    flip_unseen(root / DOWN, 2 * PIECE)
    with pytest.raises(KeyboardInterrupt):
        verify(root, rehash=True, jobs=1, observe=interrupted_at(0.4))

    assert set(found(verify(root))) == {DOWN}


def test_a_receipt_tells_when_each_file_was_proven(seeded, monkeypatch):
    monkeypatch.setattr("grokctl.integrity.content_check.now", lambda: "2024-03-17T12:00:00Z")
    verify(seeded.root)
    monkeypatch.setattr("grokctl.integrity.content_check.now", lambda: "2025-01-01T00:00:00Z")
    os.utime(seeded.root / DOWN, ns=(1, 1))

    again = verify(seeded.root)

    receipt = read_receipt(seeded.root)
    assert receipt == again.verified.receipt
    assert again.since == receipt.since == receipt.proven_at(UP) == "2024-03-17T12:00:00Z"
    assert receipt.verified_at == receipt.proven_at(DOWN) == "2025-01-01T00:00:00Z"


def test_a_receipt_that_cannot_be_kept_is_no_reason_to_stop(root):
    (root / ".grokctl/receipt.json").mkdir(parents=True)
    events = []

    verdict = verify(root, observe=events.append)

    assert verdict.verified is not None
    assert any(isinstance(e, Noted) and "receipt: cannot be written" in e.message for e in events)


# --- ready checkpoints


@pytest.fixture(scope="module")
def ready_pristine(pristine, tmp_path_factory) -> Path:
    release = open_release(pristine.root)
    out = tmp_path_factory.mktemp("ready") / "ready"
    reshard(plan_reshard(release, ReshardOptions(mesh=MeshShape(2, 2), out=out)))
    return out


def test_a_whole_ready_checkpoint_is_whole(ready_pristine):
    checkpoint = open_ready(ready_pristine)

    verdict = verify_ready(checkpoint)

    assert verdict.damage == ()
    assert verdict.verified is None
    assert verdict.files == 4
    assert verdict.hashed == verdict.nbytes == checkpoint.nbytes


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_flipped_bit_in_each_file_of_a_ready_checkpoint_is_found(ready_pristine, tmp_path, jobs):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    checkpoint = open_ready(root)
    for record in checkpoint.files:
        for offset in (0, record.nbytes // 2, record.nbytes - 1):
            flip(root / record.name, offset)
            (damage,) = verify_ready(checkpoint, jobs=jobs).damage
            flip(root / record.name, offset)

            assert damage.file == record.name
            assert damage.reason is Reason.ALTERED
            assert damage.ranges == ((0, record.nbytes),)
    assert verify_ready(checkpoint, jobs=jobs).damage == ()


def test_every_kind_of_damage_to_a_ready_checkpoint_is_listed(ready_pristine, tmp_path):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    altered, missing, short, no_file = (record.name for record in read_manifest(root).files)
    nbytes = {record.name: record.nbytes for record in read_manifest(root).files}
    flip(root / altered, 9)
    (root / missing).unlink()
    os.truncate(root / short, 100)
    (root / no_file).unlink()
    os.mkfifo(root / no_file)

    verdict = verify_ready(read_manifest(root))

    assert {name: (item.reason, item.ranges) for name, item in found(verdict).items()} == {
        altered: (Reason.ALTERED, ((0, nbytes[altered]),)),
        missing: (Reason.MISSING, ((0, nbytes[missing]),)),
        short: (Reason.SHORT, ((100, nbytes[short]),)),
        no_file: (Reason.UNREADABLE, ((0, nbytes[no_file]),)),
    }
    assert verdict.hashed == nbytes[altered]
    quick = found(verify_ready(read_manifest(root), quick=True))
    assert set(quick) == {missing, short, no_file}
    with pytest.raises(CorruptCheckpointError) as caught:
        raise_for(verdict, root)
    again = f"grokctl reshard small --mesh expert=2,model=2 --out {root} --force"
    assert caught.value.hint == again


def test_a_device_file_that_is_too_long_or_that_the_disk_refuses_is_damage(
    ready_pristine, tmp_path, monkeypatch
):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    long, refused, *_ = read_manifest(root).files
    with (root / long.name).open("ab") as file:
        file.write(b"xyz")
    break_disk(monkeypatch, refused.name, refused.nbytes // 2)

    damage = found(verify_ready(read_manifest(root)))

    assert damage[long.name].reason is Reason.LONG
    assert damage[long.name].ranges == ((long.nbytes, long.nbytes + 3),)
    assert damage[refused.name].reason is Reason.UNREADABLE
    assert damage[refused.name].detail == "Input/output error"
    assert len(damage) == 2


def test_sha256sum_agrees_about_every_file_of_a_ready_checkpoint(ready_pristine, tmp_path):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    second = read_manifest(root).files[1].name

    def sums():
        command = ["sha256sum", "--check", SUMS]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    whole = sums()
    flip(root / second, 1000)
    damaged = sums()

    assert whole.returncode == 0
    assert {f"{record.name}: OK" for record in read_manifest(root).files} <= set(
        whole.stdout.splitlines()
    )
    assert damaged.returncode != 0
    assert [line for line in damaged.stdout.splitlines() if not line.endswith(": OK")] == [
        f"{second}: FAILED"
    ]
    assert set(found(verify_ready(read_manifest(root)))) == {second}


def test_all_damaged_files_of_a_ready_checkpoint_are_listed(ready_pristine, tmp_path):
    root = shutil.copytree(ready_pristine, tmp_path / "ready")
    checkpoint = open_ready(root)
    for record in checkpoint.files:
        flip(root / record.name, 9)

    verdict = verify_ready(checkpoint)

    assert [damage.file for damage in verdict.damage] == [file.name for file in checkpoint.files]
    with pytest.raises(CorruptCheckpointError, match="4 of 4 files are damaged"):
        raise_for(verdict, root)
