"""What other programs left of a download, beside a missing file or in a folder of their own."""

from pathlib import Path

import pytest

from grokctl.checkpoint.folders import partial_files

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
