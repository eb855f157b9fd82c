import errno
from pathlib import Path

import pytest
import sentencepiece
from training.publish import digest
from training.recipe import CONFIG

from grokctl.checkpoint import trained
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo

SHA256 = "d7ab77ccf89aae4e0dd4767c6255ce9ad1be295309f09c1cd98ef3ca865699d6"
"""What `make miniature` printed when the shipped release was written."""


def test_what_ships_is_what_was_trained():
    assert digest(trained.TRAINED) == SHA256


def test_it_is_a_release_of_the_recipe_with_eight_scale_rows_where_grok_1_has_them():
    release = open_release(trained.TRAINED)

    rows = {
        tensor.spec.name: tensor.scales.shape[-2] for tensor in release.tensors if tensor.scales
    }
    assert release.config == CONFIG
    assert {name for name, count in rows.items() if count == 8} == {
        f"layers.{layer}.{part}" for layer in range(3) for part in ("moe.down", "attention.out")
    }


def test_a_copy_has_the_files_that_the_torrent_promises(tmp_path):
    files = trained.copy_trained(tmp_path / "copy")
    torrent, metainfo = trained.read_torrent()

    again = build_metainfo(
        tmp_path / "copy", files, name="miniature", piece_length=metainfo.piece_length
    )

    assert len(files) == 40
    assert {"/".join(file.path) for file in metainfo.files} == set(files)
    assert digest(tmp_path / "copy") == SHA256
    assert parse_metainfo(again, source="copy").infohash == metainfo.infohash
    assert parse_metainfo(torrent, source="shipped").infohash == metainfo.infohash


def test_a_copy_of_a_read_only_package_can_be_deleted(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    (shipped / "ckpt-0").mkdir(parents=True)
    (shipped / "ckpt-0/tensor00000_000").write_bytes(b"x")
    for path in (shipped / "ckpt-0/tensor00000_000", shipped / "ckpt-0"):
        path.chmod(path.stat().st_mode & ~0o222)
    monkeypatch.setattr(trained, "TRAINED", shipped)

    assert trained.copy_trained(tmp_path / "copy") == ["ckpt-0/tensor00000_000"]

    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "copy").rglob("*"))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_file_that_found_it(tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    place = tmp_path / "ckpt-0/tensor00000_000"
    place.symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left") as caught:
        trained.copy_trained(tmp_path)

    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(place))


def test_the_tokenizer_reads_every_text():
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(trained.TRAINED / "tokenizer.model")
    )
    text = trained.UNSEEN + "\n\t1234 é 日 🙂"

    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size() == CONFIG.vocab_size
