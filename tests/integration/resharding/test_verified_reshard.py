"""`reshard --verify`: every byte of a release is proven by what is read of it once."""

import shutil
import threading

import pytest
from cuts import contents, cut, proven_release

from grokctl.checkpoint.receipt import forget_receipt, proof_of, read_receipt
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.sums import doubt_of
from grokctl.errors import CorruptCheckpointError, UsageError
from grokctl.events import Advanced, Stage
from grokctl.integrity.trailing_check import _BEHIND
from grokctl.model.placement import MeshShape
from grokctl.paths import TORRENT
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.verify import verify, verifying

TWO = MeshShape(1, 2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "small"
    proven_release(root)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    """A release with a torrent, of which nothing is proven yet."""
    shutil.copytree(pristine, tmp_path / "small")
    forget_receipt(tmp_path / "small")
    return tmp_path / "small"


def planned(root, out):
    return plan_reshard(open_release(root), ReshardOptions(mesh=TWO, out=out))


def test_it_is_proven_as_if_it_had_been_verified_before(root, pristine, tmp_path):
    proof = verify(pristine).verified.receipt
    usual = cut(open_release(pristine), TWO, tmp_path / "usual", proof=proof)
    check = verifying(root)

    made = reshard(planned(root, tmp_path / "out"), check=check)

    assert made.source.proven
    assert made.source.root_of_trust == usual.source.root_of_trust
    assert doubt_of(made) is None
    devices = [name for name in contents(made.root) if name.startswith("device-")]
    assert [contents(made.root)[name] for name in devices] == [
        contents(usual.root)[name] for name in devices
    ]
    assert proof_of(open_release(root)).receipt is not None
    assert check.check.hashed == check.check.metainfo.total
    assert verify(root).hashed == 0


def test_a_wrong_byte_is_found_and_nothing_is_published(root, tmp_path):
    path = sorted(root.glob("ckpt-0/*"))[-2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(CorruptCheckpointError, match="files are damaged"):
        reshard(planned(root, tmp_path / "out"), check=verifying(root))

    assert {each.name for each in tmp_path.iterdir()} == {"small"}
    assert read_receipt(root).stamps  # the good files need no second look


def test_an_interruption_ends_its_threads_and_the_next_run_goes_on(root, tmp_path):
    def stop(event):
        if isinstance(event, Advanced) and event.stage is Stage.RESHARD and event.done:
            raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        reshard(planned(root, tmp_path / "out"), check=verifying(root), observe=stop)

    assert set(threading.enumerate()) == before
    assert not (tmp_path / "out").exists()
    made = reshard(planned(root, tmp_path / "out"), check=verifying(root))
    assert doubt_of(made) is None


def test_pieces_wait_until_the_reader_is_past_them(root):
    check = verifying(root)
    pieces = check.check.metainfo.num_pieces
    total = 2 * _BEHIND

    with check:
        check.follow(total // 4, total, lambda _: None)
        check._thread.join(0.2)
        held = check.check.hashed
        assert check.finish(total, lambda _: None) == ()

    assert pieces > 2
    assert held == 0
    assert check.check.hashed == check.check.metainfo.total
    assert check.receipt is not None


def test_what_a_receipt_covers_is_not_hashed_again(root, tmp_path):
    verify(root)
    check = verifying(root)

    assert doubt_of(reshard(planned(root, tmp_path / "out"), check=check)) is None
    assert check.check.hashed == 0


def test_without_hashes_nothing_can_be_proven(root):
    (root / TORRENT).unlink()

    with pytest.raises(UsageError, match="cannot be proven"):
        verifying(root)
