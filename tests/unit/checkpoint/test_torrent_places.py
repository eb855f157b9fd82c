import pytest
from torrents import entry, parse, torrent_of

from grokctl.checkpoint.release_files import is_document, release_paths
from grokctl.errors import FetchError


def places(*files: dict[bytes, object], **more: object) -> dict[int, str]:
    return release_paths(parse(torrent_of(*files, **more)))


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param([], id="none"),
        pytest.param([b"ckpt"], id="ckpt"),
        pytest.param([b"ckpt-0"], id="ckpt-0"),
        pytest.param([b"grok-1", b"checkpoints", b"ckpt-0"], id="deep"),
    ],
)
def test_tensors_land_in_ckpt_0_whatever_the_torrent_calls_its_folders(folder):
    found = places(
        entry(5, *folder, b"tensor00000_000"),
        entry(5, *folder, b"tensor00769_000"),
        entry(5, b"tokenizer.model"),
        entry(5, b"docs", b"LICENSE.txt"),
    )

    assert found == {
        0: "ckpt-0/tensor00000_000",
        1: "ckpt-0/tensor00769_000",
        2: "tokenizer.model",
        3: "docs/LICENSE.txt",
    }


def test_a_small_file_beside_the_tensors_is_fetched_like_any_other():
    found = places(entry(5, b"ckpt-0", b"tensor00000_000"), entry(5, b"ckpt-0", b"README.md"))

    assert found[1] == "ckpt-0/README.md"


def test_pads_have_no_place():
    found = places(entry(5, b"tensor00000_000"), entry(16379, b".pad", b"16379", attr=b"p"))

    assert found == {0: "ckpt-0/tensor00000_000"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param([b".grokctl", b"receipt.json"], id="receipt"),
        pytest.param([b".grokctl", b"source.json"], id="source"),
        pytest.param([b".GrokCtl", b"receipt.json"], id="receipt-in-capitals"),
        pytest.param([b".grokctl"], id="private-folder-as-file"),
        pytest.param([b"release.torrent"], id="torrent"),
        pytest.param([b"Release.Torrent"], id="torrent-in-capitals"),
        pytest.param([b"release.torrent", b"x"], id="torrent-as-folder"),
        pytest.param([b"ckpt-0"], id="tensors-folder-as-file"),
        pytest.param([b"CKPT-0"], id="tensors-folder-in-capitals"),
        pytest.param([b"grokctl.json"], id="manifest-of-a-ready-checkpoint"),
    ],
)
def test_an_extra_that_wants_a_place_of_ours_is_refused(path):
    with pytest.raises(FetchError, match="grokctl's own"):
        places(entry(5, b"x", b"tensor00000_000"), entry(5, *path))


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([[b"a", b"tensor00000_000"], [b"b", b"tensor00000_000"]], id="two-folders"),
        pytest.param([[b"tensor00000_000"], [b"ckpt-0", b"tensor00000_000"]], id="two-depths"),
        pytest.param(
            [[b"x", b"tensor00000_000"], [b"ckpt-0", b"tensor00000_000", b"y"]],
            id="file-and-folder",
        ),
    ],
)
def test_two_files_for_one_place_are_refused(files):
    with pytest.raises(FetchError, match="place"):
        places(*(entry(5, *path) for path in files))


def test_a_torrent_without_a_tensor_is_refused():
    with pytest.raises(FetchError, match="expected tensorNNNNN_000 files, found none"):
        places(entry(5, b"README.md"), name=b"\x1b[2J")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("movie.mkv", id="a-film"),
        pytest.param("tensor\u0660\u0660\u0660\u0660\u0660_\u0660\u0660\u0660", id="arabic-digits"),
        pytest.param("tensor00000_0000", id="a-digit-too-many"),
        pytest.param("tensor00000_000.bak", id="a-suffix"),
        pytest.param("xtensor00000_000", id="a-prefix"),
    ],
)
def test_a_large_file_that_is_no_tensor_is_refused(name):
    large = 64 * 2**20 + 1

    with pytest.raises(FetchError, match=f"{large:,}"):
        places(entry(5, b"tensor00000_000"), entry(large, name.encode()))


def test_an_extra_of_exactly_64_mb_is_the_largest():
    found = places(entry(5, b"tensor00000_000"), entry(64 * 2**20, b"big.txt"))

    assert found[1] == "big.txt"


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "LICENSE", "docs/LICENSE.txt", "MODEL CARD.pdf", "config.json", "EMPTY",
        "generation_config.json", "tokenizer.model", "SHA256SUMS", "ckpt-0/notes.txt", "a/b/c.png",
    ],
)  # fmt: skip
def test_a_document_keeps_its_name(name):
    parts = [part.encode() for part in name.split("/")]

    assert is_document(tuple(name.split("/")))
    assert places(entry(5, b"tensor00000_000"), entry(5, *parts))[1] == name


@pytest.mark.parametrize(
    "name",
    [
        ".git/config", ".gitattributes", ".vscode/notes.txt", "docs/.hidden/LICENSE", ".bashrc",
        "typer.py", "site.pth", "x.so", "run.sh", "a.js", "x.md.py", "Makefile", "conftest.py",
        "ckpt-0/__init__", "package.json", "settings.json", "CMakeLists.txt", "requirements.txt",
        "AGENTS.md", "Claude.md", "BUILD", "-rf.txt", "docs/-x/a.txt", "x.txt\u0430", "big",
    ],
)  # fmt: skip
def test_what_a_program_might_run_or_obey_gets_a_number(name):
    parts = [part.encode() for part in name.split("/")]

    assert places(entry(5, b"tensor00000_000"), entry(5, *parts))[1] == ".grokctl/extra/1"
