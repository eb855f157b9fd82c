"""What other programs left of a download, beside a missing file or in a folder of their own."""

import os
from pathlib import Path

import pytest
from users import OTHER, as_root

from grokctl.checkpoint.adopted import adopt
from grokctl.checkpoint.folders import ReleaseFolder, partial_files, release_folder
from grokctl.paths import Home

PLACE = "ckpt-0/tensor00003_000"
DOWNLOADS = ".cache/huggingface/download"


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "ckpt-0").mkdir()
    return tmp_path


def left(root: Path, place: str) -> Path:
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    "suffix",
    [".!qB", ".aria2", ".bc!", ".filepart", ".opdownload", ".td", ".PART", ".part", ".CRDOWNLOAD"],
)
def test_what_a_client_left_beside_a_file_is_found(root, suffix):
    path = left(root, PLACE + suffix)
    left(root, "ckpt-0/tensor00004_000" + suffix)
    left(root, PLACE + suffix + "x")

    assert list(partial_files(root, PLACE)) == [path]


@pytest.mark.parametrize("target", ["gone", "/etc/hostname", "."])
def test_a_link_is_found(root, target):
    path = root / f"{PLACE}.!qB"
    path.symlink_to(target)

    assert list(partial_files(root, PLACE)) == [path]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tensor00003_000.0af3.incomplete", id="with-the-files-name"),
        # the sha1 of `tensor00003_000.metadata`, as the client of 2025 has it
        pytest.param("NVsW7Wtj0drl781RuftgZk2Fzqk=.0af3.incomplete", id="with-its-hash"),
    ],
)
def test_what_the_hubs_client_left_in_its_own_folder_is_found(root, name):
    path = left(root, f"{DOWNLOADS}/ckpt-0/{name}")
    left(root, f"{DOWNLOADS}/ckpt-0/tensor00004_000.0af3.incomplete")
    left(root, f"{DOWNLOADS}/{name}")

    assert list(partial_files(root, PLACE)) == [path]


@pytest.mark.parametrize("link", [".cache", DOWNLOADS, f"{DOWNLOADS}/ckpt-0"])
def test_no_link_on_the_way_to_the_hubs_folder_is_followed(root, tmp_path_factory, link):
    left(root, f"{DOWNLOADS}/{PLACE}.0af3.incomplete")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    (root / link).rename(elsewhere)
    (root / link).symlink_to(elsewhere)

    assert not list(partial_files(root, PLACE))


# --- small files above a release


def open_to_all(above, _file):
    above.chmod(0o777)


def sticky(above, _file):
    above.chmod(0o1777)


def of_another(above, file):
    above.chmod(0o1777)
    os.chown(file, OTHER, OTHER)


def writable(_above, file):
    file.chmod(0o666)


def behind_a_link_of_another(above, file):
    above.chmod(0o1777)
    file.rename(above / "there")
    file.symlink_to("there")
    os.lchown(file, OTHER, OTHER)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("expose", "counts"),
    [
        pytest.param(None, True, id="ones-own"),
        pytest.param(sticky, True, id="ones-own-in-a-sticky-folder"),
        pytest.param(open_to_all, False, id="anybodys-folder"),
        pytest.param(writable, False, id="anybodys-file"),
        pytest.param(of_another, False, id="anothers", marks=as_root),
        pytest.param(behind_a_link_of_another, False, id="anothers-link", marks=as_root),
    ],
)
def test_a_file_above_a_release_counts_if_nobody_else_can_put_it_there(
    tmp_path, name, expose, counts
):
    above = tmp_path / "above"
    tensor = left(above, "release/tensor00000_000")
    file = left(above, name)
    if expose is not None:
        expose(above, file)

    found = release_folder(tensor.parent)

    assert found == ReleaseFolder(tensor.parent, tensor.parent, is_usual=False)
    # where others can exchange the whole release, they gain nothing by that file
    is_theirs = expose is open_to_all
    assert (file in found.sources(name)) == (counts or is_theirs)
    assert list(found.small_files()) == ([name] if counts or is_theirs else [])
    left(tensor.parent, name)
    assert next(found.sources(name)) == tensor.parent / name


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_link_to_a_file_above_a_release_goes_when_that_counts_no_more(tmp_path, name):
    above = tmp_path / "above"
    tensor = left(above, "release/tensor00000_000")
    left(above, name)
    home = Home(tmp_path / "home")
    root = adopt(home, release_folder(tensor.parent))
    assert (root / name).resolve() == above / name

    (above / name).chmod(0o666)
    assert adopt(home, release_folder(tensor.parent)) == root

    assert not os.path.lexists(root / name)
    assert (above / name).exists()
