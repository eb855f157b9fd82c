"""A request for a reshard is completed: its source opened, its mesh and its name chosen."""

from dataclasses import replace

import pytest
from cuts import cut

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.receipt import proof_of
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source
from grokctl.errors import DiskFullError, UsageError
from grokctl.events import Stage, Started
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.reshard import reshard
from grokctl.resharding.estimate import Estimate, estimate
from grokctl.resharding.request import ReshardRequest, check_feasible, plan_request
from grokctl.verify import verify

SMALL = replace(MINIATURE, num_layers=1, vocab_size=512, emb_size=64, num_q_heads=4, num_kv_heads=2)
TWO = MeshShape(1, 2)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "small"
    files = write_miniature(root, SMALL, tokenizer=False)
    torrent = build_metainfo(root, files, name="small", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="small").infohash, trust=TYPED)
    return root


def request(root, folder, **changes):
    return ReshardRequest(root=root, folder=folder, **changes)


def test_a_release_needs_a_mesh_and_gets_the_usual_name(release, tmp_path):
    events = []
    with pytest.raises(UsageError, match="the number of devices is required") as caught:
        plan_request(request(release, tmp_path))

    planned = plan_request(request(release, tmp_path, mesh=TWO), observe=events.append)

    assert caught.value.hint == "--devices 8"
    assert planned.plan.out == tmp_path / "small-int8-2"
    assert planned.plan.mesh == TWO
    assert planned.proof is None
    assert planned.provenance.startswith("small: its content is not proven (grokctl verify ")
    assert Stage.STRUCTURE in {event.stage for event in events if isinstance(event, Started)}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"precision": Precision.BFLOAT16}, "small-bf16-2"),
        ({"compression": Compression.parse("zstd")}, "small-int8-2-zst"),
        ({"mesh": MeshShape(2, 1)}, "small-int8-2x1"),
        ({"out": "elsewhere"}, "elsewhere"),
    ],
)
def test_the_name_says_what_is_written(release, tmp_path, changes, name):
    changes = {key: tmp_path / value if key == "out" else value for key, value in changes.items()}

    planned = plan_request(request(release, tmp_path, **{"mesh": TWO, **changes}))

    assert planned.plan.out == tmp_path / name


def test_a_verified_release_brings_its_receipt_into_the_manifest(release, tmp_path):
    assert verify(release).verified is not None

    planned = plan_request(request(release, tmp_path, mesh=TWO))
    ready = reshard(planned.plan, proof=planned.proof)

    assert planned.proof == proof_of(open_release(release)).receipt
    assert planned.provenance.startswith("small: every byte was proven on ")
    assert ready.source.proven


def test_a_ready_checkpoint_keeps_its_mesh_unless_another_is_asked_for(release, tmp_path):
    source = cut(open_release(release), TWO, tmp_path / "source")

    same = plan_request(request(source.root, tmp_path, precision=Precision.INT4))
    other = plan_request(request(source.root, tmp_path, mesh=MeshShape(1, 1)))

    assert (same.plan.mesh, same.plan.out.name) == (TWO, "small-int4-2")
    assert (other.plan.mesh, other.plan.out.name) == (MeshShape(1, 1), "small-int8-1")
    assert same.proof is None
    assert same.provenance.startswith("source: unchanged since its files were hashed, ")


def test_what_the_reshard_would_refuse_is_refused_before_it(release, tmp_path):
    plan = plan_request(request(release, tmp_path, mesh=TWO)).plan
    fitting = estimate(plan)
    full = Estimate(work_rate=1.0, disk_rate=1.0, nbytes=10, free_nbytes=9)

    check_feasible(plan, fitting, force=False)
    with pytest.raises(DiskFullError):
        check_feasible(plan, full, force=False)
    plan.out.mkdir()
    (plan.out / "thesis").touch()
    with pytest.raises(UsageError, match="not a ready checkpoint"):
        check_feasible(plan, fitting, force=True)
