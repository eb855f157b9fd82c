"""A ready checkpoint is proven where it was made: a copy's owner need not have written it."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
from cuts import cut, proven_release
from users import user_of

from grokctl.checkpoint.ready import SUMS, open_ready, read_manifest
from grokctl.checkpoint.ready_receipt import read_ready_receipt, receipt_now
from grokctl.checkpoint.receipt import Stamp
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.sums import doubt_of, not_made_here
from grokctl.checkpoint.trust import BUILT_IN, TYPED
from grokctl.events import Noted
from grokctl.inspect import inspect
from grokctl.integrity.published import verify_ready
from grokctl.model.placement import MeshShape
from grokctl.resharding.source_hashing import SourceHashing
from grokctl.session.candidates import open_candidate

TWO, FOUR = MeshShape(1, 2), MeshShape(2, 2)
FIRST, SECOND = (f"device-{index:02d}-of-02.safetensors" for index in range(2))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A proven release, and its receipt."""
    root = tmp_path_factory.mktemp("pristine") / "small"
    proof = proven_release(root)
    return open_release(root), proof


@pytest.fixture(scope="module")
def pristine(release, tmp_path_factory):
    source, proof = release
    return cut(source, TWO, tmp_path_factory.mktemp("ready") / "ready", proof=proof).root


@pytest.fixture
def ready(release, tmp_path):
    """Made there."""
    source, proof = release
    return cut(source, TWO, tmp_path / "ready", proof=proof).root


def verdict_of(root, **options):
    return verify_ready(read_manifest(root), **options)


def notes_of_run(root):
    seen = []
    open_candidate(root, observe=seen.append)
    return [event.message for event in seen if isinstance(event, Noted)]


def copied(ready, root):
    return shutil.copytree(ready, root)


def extracted(ready, root):
    name = shutil.make_archive(f"{root}-packed", "tar", ready)
    shutil.unpack_archive(name, root, filter="tar")
    return root


def of_an_earlier_version(ready, root):
    shutil.copytree(ready, root)
    shutil.rmtree(root / ".grokctl")
    return root


def lent(ready, root):
    """A drive: what another user wrote, with a receipt that fits, inodes and times included."""
    forged(ready, root)
    with user_of(root.parent / "settings of the lender"):
        receipt = receipt_now(root, read_manifest(root).manifest_sha256, (FIRST, SECOND))
        replace(receipt, root_of_trust=BUILT_IN).write(root)
    return root


def unsigned(ready, root):
    lent(ready, root)
    receipt = root / ".grokctl/receipt.json"
    values = json.loads(receipt.read_text())
    del values["mac"]
    receipt.write_text(json.dumps(values))
    return root


def forged(ready, root):
    """One byte is another, and everything else is made to fit."""
    shutil.copytree(ready, root)
    path, manifest, sums = root / SECOND, root / "grokctl.json", root / SUMS
    data = bytearray(path.read_bytes())
    was = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)
    values = json.loads(manifest.read_text().replace(was, hashlib.sha256(data).hexdigest()))
    values["source"].update(proven=True, root_of_trust=BUILT_IN, infohash="5f96d435" * 5)
    before = hashlib.sha256(manifest.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(values))
    after = hashlib.sha256(manifest.read_bytes()).hexdigest()
    text = sums.read_text().replace(was, hashlib.sha256(data).hexdigest())
    sums.write_text(text.replace(before, after))
    receipt = root / ".grokctl/receipt.json"
    values = json.loads(receipt.read_text())
    values["infohash"] = after
    receipt.write_text(json.dumps(values))
    return root


@pytest.mark.parametrize("copy", [copied, extracted, of_an_earlier_version, forged, lent, unsigned])
def test_a_copy_fits_its_sums_and_is_not_proven_however_often_it_is_verified(
    pristine, tmp_path, copy
):
    root = copy(pristine, tmp_path / "copy")
    doubt = not_made_here(read_manifest(root))

    verdicts = [verdict_of(root), verdict_of(root), verdict_of(root, rehash=True)]

    for verdict in verdicts:
        assert (verdict.damage, verdict.is_proven) == ((), False)
        assert (verdict.doubt, verdict.root_of_trust) == (doubt, None)
    assert verdicts[1].hashed == 0  # the sums are those of before
    inspected = inspect(root)
    assert not inspected.is_proven
    assert inspected.provenance.endswith(f"; not proven: {doubt}")
    assert notes_of_run(root) == [f"copy: not proven: {doubt}"]
    made = cut(open_ready(root), FOUR, tmp_path / "out")
    assert (made.source.proven, made.source.root_of_trust) == (False, None)
    assert doubt_of(made) == "made from a release that was not proven"


def test_what_was_made_here_stays_proven_whatever_is_hashed_again(ready):
    renamed = ready.rename(ready.with_name("renamed"))
    (renamed / FIRST).chmod(0o600)

    assert not inspect(renamed).is_proven
    assert notes_of_run(renamed) == [f"renamed: not proven: {FIRST}: changed since it was hashed"]
    for options in ({"keeps": False}, {}, {"rehash": True}, {}):
        verdict = verdict_of(renamed, **options)
        assert (verdict.is_proven, verdict.root_of_trust) == (True, TYPED)
    assert read_ready_receipt(read_manifest(renamed)).root_of_trust == TYPED
    assert inspect(renamed).is_proven
    assert notes_of_run(renamed) == []


def test_damage_that_is_mended_leaves_the_proof_of_where_it_was_made(ready):
    data = (ready / FIRST).read_bytes()
    (ready / FIRST).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [item.file for item in verdict_of(ready).damage] == [FIRST]

    (ready / FIRST).write_bytes(data)

    assert verdict_of(ready).is_proven


@pytest.mark.parametrize("is_copied", [True, False], ids=["rewritten", "touched"])
def test_a_manifest_that_was_touched_is_no_longer_known_to_be_of_here(ready, is_copied):
    path = ready / "grokctl.json"
    if is_copied:
        shutil.copy(path, ready / "x")
        (ready / "x").rename(path)
    else:
        path.chmod(0o600)

    doubt = not_made_here(read_manifest(ready))
    assert doubt_of(read_manifest(ready)) == doubt
    assert verdict_of(ready).doubt == doubt


def test_a_reshard_of_a_release_that_was_not_proven_proves_nothing_here(release, tmp_path):
    made = cut(release[0], TWO, tmp_path / "ready")

    assert read_ready_receipt(made).root_of_trust == ""
    assert doubt_of(made) == "made from a release that was not proven"


@pytest.mark.parametrize("name", [FIRST, "tokenizer.model"])
def test_a_file_that_others_can_write_is_hashed_every_time_and_hands_no_proof_on(
    ready, tmp_path, name
):
    (ready / name).chmod(0o666)
    reason = f"{ready / name} can be written by others"

    first, second = verdict_of(ready), verdict_of(ready)

    for verdict in (first, second):
        assert (verdict.damage, verdict.is_proven, verdict.is_exposed) == ((), False, True)
        assert verdict.doubt == reason
        assert verdict.hashed == (ready / name).stat().st_size
    assert name not in read_ready_receipt(read_manifest(ready)).stamps
    hashed = {file.record.name for file in SourceHashing(open_ready(ready))._files}
    assert hashed == {name} - {"tokenizer.model"}
    assert notes_of_run(ready) == [f"ready: not proven: {reason}"]
    assert not cut(open_ready(ready), FOUR, tmp_path / "out").source.proven


def test_a_receipt_that_covered_a_file_before_others_could_exchange_it_spares_nothing(
    ready, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    (ready / SECOND).rename(disk / SECOND)
    (ready / SECOND).symlink_to(disk / SECOND)
    assert verdict_of(ready).is_proven
    stamp = Stamp.of(ready / SECOND)
    disk.chmod(0o777)

    verdict = verdict_of(ready)

    assert Stamp.of(ready / SECOND) == stamp
    assert verdict.hashed == stamp.size
    assert verdict.doubt == f"{disk} can be written by others"
    assert os.access(ready / SECOND, os.R_OK)
