"""The partial folder of a reshard is found again whatever a reboot changes."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from grokctl.checkpoint.receipt import Stamp
from grokctl.resharding.publish import partial_folder
from grokctl.resharding.replaced import READY

STAMP = Stamp(size=10, mtime_ns=20, inode=30, device=40, ctime_ns=50)
TENSOR = Path("/mnt/a/release/ckpt-0/tensor00000_000")


@pytest.fixture
def plan(tmp_path):
    return SimpleNamespace(compression=None, layouts=(), out=tmp_path / "out", kind=READY)


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param({TENSOR: replace(STAMP, device=41)}, id="another-device-number"),
        pytest.param({Path("/mnt/b/ckpt-0") / TENSOR.name: STAMP}, id="another-mount-point"),
    ],
)
def test_a_remount_finds_the_same_folder(plan, sources):
    assert partial_folder(plan, sources) == partial_folder(plan, {TENSOR: STAMP})


@pytest.mark.parametrize(
    "change", [{"size": 11}, {"mtime_ns": 21}, {"inode": 31}, {"ctime_ns": 51}]
)
def test_a_changed_source_has_a_folder_of_its_own(plan, change):
    changed = {TENSOR: replace(STAMP, **change)}

    assert partial_folder(plan, changed) != partial_folder(plan, {TENSOR: STAMP})


def test_a_source_that_went_missing_has_a_folder_of_its_own(plan):
    assert partial_folder(plan, {TENSOR: None}) != partial_folder(plan, {TENSOR: STAMP})


def named_by_version(plan, version, stamp):
    """The name that an earlier version gives to the folder of one source."""
    facts = {0: (str(TENSOR), stamp), 1: (TENSOR.name, stamp.lasting[:-1])}[version]
    digest = hashlib.sha256(b"None" + repr(facts).encode()).hexdigest()[:12]
    return plan.out.parent / f".{plan.out.name}.{digest}.partial"


@pytest.mark.parametrize("version", [0, 1])
def test_the_folder_of_an_earlier_version_is_found_and_said_to_be_one(plan, version):
    folder = named_by_version(plan, version, STAMP)
    folder.mkdir()

    assert partial_folder(plan, {TENSOR: STAMP}) == (folder, True)
    # that version did not look at the time of change
    assert partial_folder(plan, {TENSOR: replace(STAMP, ctime_ns=51)}) == (folder, True)


def test_ones_own_folder_comes_before_that_of_an_earlier_version(plan):
    own, is_earlier = partial_folder(plan, {TENSOR: STAMP})
    own.mkdir()
    named_by_version(plan, 1, STAMP).mkdir()

    assert not is_earlier
    assert partial_folder(plan, {TENSOR: STAMP}) == (own, False)
