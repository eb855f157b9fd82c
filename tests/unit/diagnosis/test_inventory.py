"""What lies under home, looked at without trust: whole, half, damaged, and none of ours."""

import os

import pytest

from grokctl.checkpoint.layout import device_layouts
from grokctl.checkpoint.manifest import FileRecord, Manifest, Source, manifest_bytes
from grokctl.checkpoint.release_files import file_nbytes
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.diagnosis.inventory import (
    Inventory,
    largest_file,
    largest_released_file,
    ready_nbytes,
    release_nbytes,
    take_stock,
)
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.paths import Home

MESH = MeshShape(1, 8)


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.releases.mkdir(parents=True)
    home.ready.mkdir()
    return home


@pytest.fixture
def here(home, release):
    """Home with the genuine two-layer release."""
    release.rename(home.releases / "two-layers")
    return home


def grok_1(folder, *, holes=True, until=None):
    """A release of the true sizes that holds nothing."""
    (folder / "ckpt-0").mkdir(parents=True)
    for spec in tensor_specs(GROK_1)[:until]:
        with (folder / "ckpt-0" / spec.file).open("wb") as file:
            if holes:
                file.truncate(file_nbytes(spec))
    return folder


def cut(folder, *, mesh=MESH, precision=Precision.INT8):
    """A ready checkpoint of Grok-1 whose files have holes for weights."""
    storage = storage_in(released_storage(GROK_1), precision, mesh)
    layouts = device_layouts(storage, mesh)
    manifest = Manifest(
        storage=storage,
        mesh=mesh,
        source=Source(name="grok-1", infohash=None, proven=False, verified_at=None),
        devices=tuple(range(mesh.size)),
        compression=None,
        errors={},
        files=tuple(
            FileRecord(name=layout.name, nbytes=layout.nbytes, sha256="0" * 64)
            for layout in layouts
        ),
    )
    folder.mkdir(parents=True)
    for layout in layouts:
        with (folder / layout.name).open("wb") as file:
            file.truncate(layout.nbytes)
    (folder / "grokctl.json").write_bytes(manifest_bytes(manifest))
    return folder


def test_a_home_that_does_not_exist_holds_nothing(tmp_path):
    found = take_stock(Home(tmp_path / "nowhere"))

    assert found == Inventory(home=tmp_path / "nowhere", is_default=False)
    assert found.to_download == release_nbytes(GROK_1)


def test_the_default_home_is_known_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("GROKCTL_HOME", str(tmp_path))

    assert take_stock(Home(tmp_path)).is_default


def test_a_small_release_is_complete_and_not_grok_1(here):
    (kept,) = take_stock(here).releases

    assert (kept.name, kept.is_complete, kept.is_grok_1, kept.damage) == (
        "two-layers",
        True,
        False,
        "",
    )
    assert take_stock(here).grok_1 is None


def test_grok_1_is_known_by_the_size_of_every_file(home):
    grok_1(home.releases / "grok-1")

    found = take_stock(home)

    assert found.grok_1 is not None
    assert found.grok_1.is_complete
    assert found.to_download == 0


def test_what_a_download_left_is_not_complete(home):
    root = grok_1(home.releases / "grok-1", holes=False, until=2)
    (root / "ckpt-0" / tensor_specs(GROK_1)[1].file).write_bytes(b"x" * 8192)

    found = take_stock(home)

    assert found.grok_1 is not None
    assert not found.grok_1.is_complete
    assert found.grok_1.nbytes == 8192
    assert found.to_download == release_nbytes(GROK_1) - 8192


def test_a_download_that_goes_on_is_not_complete(home):
    root = grok_1(home.releases / "grok-1")
    (root / ".grokctl").mkdir()
    (root / ".grokctl" / "resume.begun").touch()

    found = take_stock(home)

    assert found.grok_1 is not None
    assert not found.grok_1.is_complete
    assert found.to_download == release_nbytes(GROK_1)  # holes are still to come


def test_a_ready_checkpoint_is_known_by_its_manifest(home):
    cut(home.ready / "grok-1-int8-8")

    found = take_stock(home)

    (kept,) = found.ready_grok_1
    assert (kept.name, kept.precision, kept.mesh, kept.damage) == (
        "grok-1-int8-8",
        Precision.INT8,
        MESH,
        "",
    )
    assert kept.nbytes == ready_nbytes(Precision.INT8, MESH)


def test_a_ready_checkpoint_may_have_a_tokenizer_or_none(home):
    cut(home.ready / "mute")
    (cut(home.ready / "whole") / "tokenizer.model").touch()

    assert {kept.name: kept.has_tokenizer for kept in take_stock(home).ready_grok_1} == {
        "mute": False,
        "whole": True,
    }


def test_a_ready_checkpoint_without_a_file_is_damaged(home):
    root = cut(home.ready / "grok-1-int8-8")
    (root / "device-03-of-08.safetensors").unlink()

    found = take_stock(home)

    assert found.ready_grok_1 == ()
    assert "device-03-of-08.safetensors: missing" in found.ready[0].damage


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"format": "x"}'])
def test_a_manifest_that_is_none_is_damaged(home, text):
    (home.ready / "bad").mkdir()
    (home.ready / "bad" / "grokctl.json").write_bytes(text)

    (kept,) = take_stock(home).ready

    assert kept.damage
    assert kept.precision is None


def test_a_configuration_that_is_none_is_damaged(here):
    (here.releases / "two-layers" / "config.json").write_text("[]")

    (kept,) = take_stock(here).releases

    assert "no JSON object" in kept.damage
    assert not kept.is_complete


def test_names_can_be_anything(home):
    for name in ("-rf", "a\nb", "\udcff", "$(reboot)"):
        (home.releases / name / "ckpt-0").mkdir(parents=True)

    found = take_stock(home)

    assert len(found.releases) == 4
    assert not found.error


def test_what_is_no_checkpoint_is_passed_over(home):
    (home.releases / "notes").mkdir()
    (home.releases / "file").touch()
    (home.ready / "grok-1.partial").mkdir()
    (home.ready / "dangling").symlink_to(home.ready / "nowhere")
    os.mkfifo(home.ready / "pipe")

    found = take_stock(home)

    assert found.releases == ()
    assert found.ready == ()


def test_a_folder_in_the_way_of_a_file_is_damage(home):
    root = cut(home.ready / "grok-1-int8-8")
    (root / "device-03-of-08.safetensors").unlink()
    (root / "device-03-of-08.safetensors").mkdir()

    assert "not a regular file" in take_stock(home).ready[0].damage


def test_a_folder_that_cannot_be_looked_at_is_said_so(tmp_path):
    found = take_stock(Home(tmp_path / ("x" * 300)))

    assert "File name too long" in found.error
    assert found.releases == found.ready == ()


def test_a_home_that_takes_too_long_is_said_so(home):
    for number in range(20):
        (home.releases / f"{number}" / "ckpt-0").mkdir(parents=True)

    found = take_stock(home, timeout_s=0)

    assert found.error == f"{home.root}: was not searched within 0 s"
    assert found.releases == found.ready == ()


def test_sizes_come_from_the_layouts():
    storage = storage_in(released_storage(GROK_1), Precision.INT4, MESH)
    sizes = [layout.nbytes for layout in device_layouts(storage, MESH)]

    assert ready_nbytes(Precision.INT4, MESH) == sum(sizes)
    assert largest_file(Precision.INT4, MESH) == max(sizes)
    assert largest_released_file() < 2**32 < largest_file(Precision.INT4, MESH)
