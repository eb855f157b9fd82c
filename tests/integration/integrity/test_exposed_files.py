"""Files that others can write are never covered by a receipt: no time shows what they did."""

import mmap
import os
import shutil
from contextlib import contextmanager

import pytest
from cuts import cut
from damaging import DOWN, GATE, found
from users import OTHER, as_root

from grokctl.checkpoint.receipt import proof_of, read_receipt
from grokctl.checkpoint.release import open_release
from grokctl.inspect import inspect
from grokctl.integrity.provenance import describe_proof
from grokctl.model.placement import MeshShape
from grokctl.resharding.request import ReshardRequest, plan_request
from grokctl.verify import verify

"""A user that this machine does not have."""


def proof(root):
    return proof_of(open_release(root))


@contextmanager
def dirty_page(path):
    """A way to change one byte of a file later, in a page that is dirty by now."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as page:
        place = len(page) // 2
        page[place] = page[place]

        def flip():
            page[place] ^= 0x55

        yield flip


def opened_to_all(path):
    path.chmod(path.stat().st_mode | 0o022)
    return f"{path} can be written by others"


def given_away(path):
    os.chown(path, OTHER, -1)
    return f"{path} belongs to user {OTHER}"


EXPOSED = [
    pytest.param(GATE, opened_to_all, id="a-tensor"),
    pytest.param("config.json", opened_to_all, id="the-configuration"),
    pytest.param("ckpt-0", opened_to_all, id="the-folder-of-tensors"),
    pytest.param(GATE, given_away, id="a-foreign-tensor", marks=as_root),
    pytest.param("ckpt-0", given_away, id="a-foreign-folder", marks=as_root),
]


@pytest.mark.parametrize("is_first", [True, False], ids=["before-the-proof", "after-it"])
@pytest.mark.parametrize(("name", "expose"), EXPOSED)
def test_what_others_can_write_is_hashed_every_time_and_not_proven(root, name, expose, is_first):
    if not is_first:
        assert verify(root).is_proven
    reason = expose(root / name)

    inspected = inspect(root)
    first, second = verify(root), verify(root)

    exposed = {"config.json"} if name == "config.json" else {GATE}
    for verdict in (first, second):
        assert (verdict.damage, verdict.is_proven, verdict.is_exposed) == ((), False, True)
        assert (verdict.doubt, verdict.verified, verdict.root_of_trust) == (reason, None, None)
        assert verdict.hashed > 0
    assert not exposed & read_receipt(root).stamps.keys()
    assert (DOWN in read_receipt(root).stamps) == (name != "ckpt-0")
    assert proof(root).reason == reason
    assert f"not proven: {reason} (grokctl verify" in describe_proof(proof(root), root)
    assert not inspected.is_proven
    assert reason in inspected.provenance


def test_a_page_that_was_dirty_before_the_proof_is_hashed_again(root):
    path = root / GATE
    path.chmod(0o666)
    with dirty_page(path) as flip:
        before = verify(root)
        flip()
        after = verify(root)

    assert (before.damage, before.is_proven) == ((), False)
    assert GATE in found(after)


def test_links_to_below_a_shared_folder_are_no_proof(root, tmp_path):
    above = tmp_path / "shared"
    above.mkdir()
    above.chmod(0o777)
    links = tmp_path / "links"
    shutil.copytree(root, above / "release")
    shutil.copytree(root, links)
    for path in (links / "ckpt-0").iterdir():
        path.unlink()
        path.symlink_to(above / "release/ckpt-0" / path.name)

    verdict = verify(links)

    assert (verdict.damage, verdict.is_proven) == ((), False)
    assert verdict.doubt == f"{above} can be written by others"
    assert proof(links).reason == verdict.doubt
    assert verify(links).hashed > 0


def test_a_result_of_what_others_can_write_is_not_proven(root, tmp_path):
    verify(root)
    reason = opened_to_all(root / GATE)

    planned = plan_request(ReshardRequest(root=root, folder=tmp_path, mesh=MeshShape(1, 2)))

    assert planned.proof is None
    assert reason in planned.provenance
    made = cut(open_release(root), MeshShape(1, 2), tmp_path / "out", proof=planned.proof)
    assert not made.source.proven


def test_a_cache_of_ones_own_links_is_proven_until_its_blobs_are_open_to_others(root, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted((root / "ckpt-0").iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")

    assert verify(root).is_proven
    assert verify(root).hashed == 0
    assert proof(root).receipt is not None
    reason = opened_to_all(blobs)

    assert proof(root).reason == reason
    assert verify(root).doubt == reason


def test_a_tokenizer_that_is_built_in_and_open_to_others_is_not_proven(root, monkeypatch):
    monkeypatch.setattr("grokctl.checkpoint.receipt._is_built_in", lambda _: True)
    (root / "tokenizer.model").write_bytes(b"pieces")
    assert verify(root).is_proven

    reason = opened_to_all(root / "tokenizer.model")

    assert verify(root).doubt == reason
    assert proof(root).reason == reason


def test_a_release_that_was_never_verified_says_what_stands_in_the_way(root):
    reason = opened_to_all(root / GATE)

    assert proof(root).reason == reason
