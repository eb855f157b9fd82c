"""The partial folder of a reshard is found again whatever a reboot changes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from grokctl.checkpoint.receipt import Stamp
from grokctl.resharding.publish import partial_folder

STAMP = Stamp(size=10, mtime_ns=20, inode=30, device=40)
TENSOR = Path("/mnt/a/release/ckpt-0/tensor00000_000")


@pytest.fixture
def plan(tmp_path):
    return SimpleNamespace(compression=None, layouts=(), out=tmp_path / "out")


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param({TENSOR: replace(STAMP, device=41)}, id="another-device-number"),
        pytest.param({Path("/mnt/b/ckpt-0") / TENSOR.name: STAMP}, id="another-mount-point"),
    ],
)
def test_a_remount_finds_the_same_folder(plan, sources):
    assert partial_folder(plan, sources) == partial_folder(plan, {TENSOR: STAMP})


@pytest.mark.parametrize("change", [{"size": 11}, {"mtime_ns": 21}, {"inode": 31}])
def test_a_changed_source_has_a_folder_of_its_own(plan, change):
    changed = {TENSOR: replace(STAMP, **change)}

    assert partial_folder(plan, changed) != partial_folder(plan, {TENSOR: STAMP})


def test_a_source_that_went_missing_has_a_folder_of_its_own(plan):
    assert partial_folder(plan, {TENSOR: None}) != partial_folder(plan, {TENSOR: STAMP})
