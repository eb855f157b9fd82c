"""A repair by the library: bad pieces from a real swarm, and nothing else changes."""

from pathlib import Path

import pytest
from cuts import cut

from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.unfinished import Unfinished, read_unfinished
from grokctl.errors import StalledError, UsageError
from grokctl.events import Noted, Stage, Started
from grokctl.fetch import fetch
from grokctl.model.placement import MeshShape
from grokctl.repair import plan_repair, repair
from grokctl.verify import verify

TENSOR = "ckpt-0/tensor00003_000"


@pytest.fixture
def root(swarm, tmp_path) -> Path:
    """A verified release with one flipped bit."""
    root = tmp_path / "small"
    fetch(swarm.magnet, root, swarm.options())  # with resume data, which still trusts the bit
    assert verify(root).damage == ()
    data = bytearray((root / TENSOR).read_bytes())
    data[len(data) // 2] ^= 1
    (root / TENSOR).write_bytes(data)
    return root


def notes(events):
    return [event.message for event in events if isinstance(event, Noted)]


def test_a_repair_fetches_the_bad_pieces_and_proves_the_release(swarm, root):
    events = []
    verdict = verify(root)
    assert len(verdict.bad_pieces) == 1

    repaired = repair(root, verdict, swarm.options(), jobs=1, observe=events.append)

    assert repaired.verdict.damage == ()
    assert repaired.verdict.verified is not None
    assert repaired.fetched.downloaded == verdict.mend_nbytes
    assert (root / TENSOR).read_bytes() == (swarm.root / TENSOR).read_bytes()
    assert not (root / ".grokctl" / "damaged").exists()
    assert notes(events)[0].startswith(f"damaged: {TENSOR}: altered")
    # the good files are not hashed again
    assert repaired.verdict.hashed < repaired.verdict.nbytes
    assert len([event for event in events if isinstance(event, Started)]) >= 2
    # progress is about what is fetched, and not about the whole
    (started,) = [e for e in events if isinstance(e, Started) and e.stage is Stage.FETCH]
    assert (started.done, started.total) == (0, verdict.mend_nbytes)


def test_a_plan_of_a_repair_changes_nothing_and_asks_nobody(root):
    before = (root / TENSOR).read_bytes()
    verdict = verify(root)

    plan = plan_repair(root, verdict)

    assert (plan.pieces, plan.download_bytes) == (1, verdict.mend_nbytes)
    assert plan.kept_bytes == verdict.mend_nbytes  # in one file, so nothing else is kept
    assert plan.required_bytes >= plan.kept_bytes
    assert plan.fits
    assert (root / TENSOR).read_bytes() == before
    assert not (root / ".grokctl" / "damaged").exists()


def test_a_plan_of_a_repair_counts_missing_bytes(root):
    nbytes = (root / TENSOR).stat().st_size
    (root / TENSOR).unlink()

    plan = plan_repair(root, verify(root))

    assert plan.download_bytes >= nbytes
    assert plan.required_bytes >= nbytes


def test_a_repair_that_fails_keeps_the_overwritten_bytes_and_says_where(swarm, root):
    events = []
    options = swarm.options(peers=(), stall_timeout_s=0.5)

    with pytest.raises(StalledError):
        repair(root, verify(root), options, observe=events.append)

    (backup,) = (root / ".grokctl" / "damaged").iterdir()
    assert notes(events)[-1] == f"the bytes that the repair overwrote are kept in {backup}"
    assert (backup / TENSOR).stat().st_size == (root / TENSOR).stat().st_size


def test_a_repair_that_fails_keeps_the_command_that_continues_the_fetch(swarm, root):
    record = Unfinished(source=swarm.magnet, options=("--peer", swarm.peer), have=1, nbytes=2)
    record.write(root)

    with pytest.raises(StalledError):
        repair(root, verify(root), swarm.options(peers=(), stall_timeout_s=1), jobs=1)

    kept = read_unfinished(root)
    assert (kept.source, kept.options) == (record.source, record.options)


def test_a_ready_checkpoint_is_resharded_again_instead(swarm, tmp_path):
    ready = cut(open_release(swarm.root), MeshShape(1, 2), tmp_path / "ready")
    file = ready.root / "device-01-of-02.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    verdict = verify(ready.root)

    with pytest.raises(UsageError, match=r"1 damaged file; a ready checkpoint") as caught:
        repair(ready.root, verdict, swarm.options())

    assert caught.value.hint == verdict.remedy
    assert caught.value.hint.startswith("grokctl reshard ")


def test_without_a_torrent_there_is_nothing_to_repair_from(swarm, root):
    verdict = verify(root)
    (root / "release.torrent").unlink()

    with pytest.raises(UsageError, match=r"1 damaged file, and no release\.torrent"):
        repair(root, verdict, swarm.options())

    assert not (root / ".grokctl" / "damaged").exists()


def test_verify_takes_a_ready_checkpoint_and_hashes_its_files(swarm, tmp_path):
    ready = cut(open_release(swarm.root), MeshShape(1, 2), tmp_path / "ready")

    verdict = verify(ready.root)
    quick = verify(ready.root, quick=True)

    again = verify(ready.root, rehash=True)

    assert (verdict.damage, verdict.hashed, verdict.spared) == ((), 0, verdict.files)
    assert (again.damage, again.hashed) == ((), verdict.nbytes)
    assert quick.hashed == 0
    assert verdict.remedy is not None
