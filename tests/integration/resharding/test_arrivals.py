"""Files that arrive one by one: each is proven before anything is cut from it."""

import shutil
import threading
import time

import pytest
from cuts import contents, cut, proven_release

from grokctl.checkpoint.hub_record import trusted_hashes
from grokctl.checkpoint.receipt import forget_receipt
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.sums import doubt_of
from grokctl.errors import CorruptCheckpointError
from grokctl.events import Noted, ignore
from grokctl.integrity.trailing_check import ArrivalEndedError
from grokctl.model.placement import MeshShape
from grokctl.overlap import Overlap, Target
from grokctl.transfer.destination import FileSelection
from grokctl.verify import verifying_arrivals

TWO = MeshShape(1, 2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "small"
    proven_release(root)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    """The folder of a fetch that has begun: the torrent, and no other file."""
    shutil.copytree(pristine, tmp_path / "small", ignore=shutil.ignore_patterns("tensor*"))
    forget_receipt(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def metainfo(root):
    return trusted_hashes(root)


def selection_of(metainfo, check_places):
    return FileSelection(
        metainfo=metainfo,
        info=b"",
        layers=b"",
        trackers=(),
        places=dict(check_places),
        wanted=frozenset(check_places),
    )


def names_in_order(metainfo, root):
    check = verifying_arrivals(root, metainfo).check
    return check.places, [check.places[file.index] for file in metainfo.files]


def have_of(metainfo, places, present):
    """The pieces of which every file is there."""
    have = [True] * metainfo.num_pieces
    for file in metainfo.files:
        if places[file.index] not in present:
            for piece in metainfo.pieces_of(file):
                have[piece] = False
    return have


def put(pristine, root, name):
    (root / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(pristine / name, root / name)


def overlap_of(root, metainfo, tmp_path):
    places, names = names_in_order(metainfo, root)
    overlap = Overlap(Target(root=root, folder=tmp_path / "ready", mesh=TWO, precision=None))
    overlap.begin(selection_of(metainfo, places))
    return overlap, places, names


def test_each_file_is_cut_once_it_is_proven_and_the_result_is_the_usual_one(
    pristine, root, metainfo, tmp_path
):
    usual = cut(open_release(pristine), TWO, tmp_path / "usual")
    overlap, places, names = overlap_of(root, metainfo, tmp_path)
    seen, present = [], []
    relay = overlap.relayed(seen.append)

    try:
        for name in (*names[:4], *names[7:]):  # among the last, the configuration
            put(pristine, root, name)
            present.append(name)
        overlap.arrived(have_of(metainfo, places, present))
        deadline = time.monotonic() + 30
        while not overlap._cut and time.monotonic() < deadline:
            relay(Noted(message="more"))
            time.sleep(0.01)
        cut_before_the_end = overlap._cut
        for name in names[4:7]:
            put(pristine, root, name)
        ready = overlap.finish(seen.append)
    finally:
        overlap.close()

    assert cut_before_the_end > 0
    assert doubt_of(ready) is None
    assert ready.source.infohash == metainfo.infohash
    devices = [name for name in contents(usual.root) if name.startswith("device-")]
    assert [contents(ready.root)[name] for name in devices] == [
        contents(usual.root)[name] for name in devices
    ]
    assert overlap._check.check.hashed == metainfo.total


def test_what_is_not_there_or_not_proven_is_not_read(pristine, root, metainfo):
    check = verifying_arrivals(root, metainfo)
    name, got = "ckpt-0/tensor00000_000", []

    def read():
        check.await_proof(name)
        got.append(name)

    with check:
        reader = threading.Thread(target=read)
        reader.start()
        put(pristine, root, name)
        reader.join(0.3)
        assert not got
        for file in metainfo.files:
            put(pristine, root, check.check.places[file.index])
        check.fetched()
        reader.join(30)
        assert got == [name]


def test_a_piece_that_is_still_on_its_way_to_the_disk_is_read_again(pristine, root, metainfo):
    check = verifying_arrivals(root, metainfo)
    places = check.check.places
    for file in metainfo.files:
        put(pristine, root, places[file.index])
    path = root / "ckpt-0/tensor00000_000"
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))

    with check:
        check.arrived([True] * metainfo.num_pieces)
        time.sleep(0.2)
        with path.open("r+b") as file:
            file.write(data)
        check._thread.join(30)
        assert not check.check.bad

    # its time of modification changed after the first look: that file is proven later, not wrongly
    assert "ckpt-0/tensor00000_000" not in check._proven


def test_damage_ends_the_wait_and_nothing_is_published(pristine, root, metainfo, tmp_path):
    overlap, _, names = overlap_of(root, metainfo, tmp_path)
    for name in names:
        put(pristine, root, name)
    path = root / names[3]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    try:
        with pytest.raises(CorruptCheckpointError):
            overlap.finish(ignore)
    finally:
        overlap.close()

    assert not list((tmp_path / "ready").glob("*/grokctl.json"))


def test_an_end_lets_nobody_wait(root, metainfo, tmp_path):
    before = set(threading.enumerate())
    overlap, _, _ = overlap_of(root, metainfo, tmp_path)

    overlap.close()

    assert set(threading.enumerate()) == before
    assert isinstance(overlap._trouble, ArrivalEndedError)
