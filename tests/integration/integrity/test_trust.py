"""Proof is not laundered: it covers all that a run reads, is believed only where nobody else can
write, and names its root."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from damaging import DOWN, GATE, flip, found
from users import OTHER, user_of

from grokctl.checkpoint import receipt as receipts
from grokctl.checkpoint import trust
from grokctl.checkpoint.finding import find_checkpoint
from grokctl.checkpoint.proving import root_to_prove
from grokctl.checkpoint.receipt import Proof, Stamp, proof_of, read_receipt
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import (
    BUILT_IN,
    FOUND,
    TYPED,
    read_source,
    root_in_words,
    torrent_file,
    trust_of,
    write_source,
)
from grokctl.checkpoint.unfinished import Unfinished, read_unfinished
from grokctl.errors import UsageError
from grokctl.events import Noted
from grokctl.integrity.provenance import describe_proof
from grokctl.own_key import key_file, sealed
from grokctl.paths import Home
from grokctl.verify import verify

"""A user that this machine does not have."""


def proof(root):
    return proof_of(open_release(root))


def notes(run):
    events = []
    verdict = run(events.append)
    return verdict, [event.message for event in events if isinstance(event, Noted)]


def unseen(path, change):
    """Change a file as an attacker does who sets its times back."""
    status = path.stat()
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(change(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert path.stat().st_size == status.st_size


def with_other_scale(data):
    """The configuration with another multiplier, as many bytes long."""
    values = json.loads(data)
    values["attn_output_multiplier"] = 7
    found = json.dumps(values, indent=1).encode()
    return found[: len(data)].ljust(len(data))


# --- what a receipt compares, and what it covers


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(GATE, lambda data: bytes([data[0] ^ 1]) + data[1:], id="a-tensor"),
        pytest.param("config.json", with_other_scale, id="the-configuration"),
        pytest.param("config.json", lambda data: data.replace(b" ", b"\n"), id="white-space"),
    ],
)
def test_a_file_whose_times_were_set_back_is_hashed_again(root, name, change):
    assert verify(root).is_proven
    assert proof(root).receipt is not None

    unseen(root / name, change)

    if name == "config.json":  # what the structure cannot see
        found_proof = proof(root)
        assert found_proof.receipt is None
        assert found_proof.reason == f"{name}: changed since it was proven"
        assert f"not proven: {name}: changed" in describe_proof(found_proof, root)
    verdict = verify(root)
    assert verdict.hashed > 0
    assert name in found(verdict)
    assert not verdict.is_proven


@pytest.mark.parametrize(
    "touch",
    [
        pytest.param(lambda path: path.chmod(0o600), id="chmod"),
        pytest.param(lambda path: os.link(path, path.with_name("link")), id="hard-link"),
        pytest.param(
            lambda path: path.rename(path.with_name("x")).rename(path), id="there-and-back"
        ),
    ],
)
def test_what_changes_only_the_metadata_is_hashed_again_and_said(root, touch):
    verify(root)
    touch(root / DOWN)
    (root / "ckpt-0/link").unlink(missing_ok=True)

    verdict, said = notes(lambda observe: verify(root, observe=observe))

    assert verdict.is_proven
    assert verdict.hashed > 0
    assert any(
        note.startswith("1 file: same size and time, another time of change") for note in said
    )
    assert verify(root).hashed == 0


def test_a_receipt_that_does_not_cover_the_whole_torrent_proves_nothing(root):
    verify(root)
    receipt = read_receipt(root)
    assert receipt.is_complete
    replace(receipt, is_complete=False).write(root)

    assert proof(root).reason == "receipt: does not cover every file of the torrent"


def test_only_a_receipt_of_all_files_is_complete(root):
    flip(root / DOWN, 900)
    verify(root)
    assert not read_receipt(root).is_complete

    flip(root / DOWN, 900)
    verify(root)

    assert read_receipt(root).is_complete


def test_a_promised_file_that_is_gone_leaves_no_proof(root):
    verify(root)
    receipt = read_receipt(root)
    stamp = receipt.stamps["config.json"]
    replace(receipt, stamps={**receipt.stamps, "tokenizer.model": stamp}).write(root)

    assert proof(root).reason == "tokenizer.model: changed since it was proven"


@pytest.mark.parametrize("infohash", ["0" * 40, "f" * 64])
def test_a_receipt_for_another_infohash_than_the_requested_proves_nothing(root, infohash):
    verify(root)
    replace(read_receipt(root), infohash=infohash).write(root)

    assert proof(root).receipt is None
    assert proof(root).reason.endswith(f"found {infohash}")


def test_a_receipt_without_times_of_change_spares_no_file_and_says_why(root):
    verify(root)
    path = root / ".grokctl/receipt.json"
    values = json.loads(path.read_text())
    values["files"] = {name: stamp[:4] for name, stamp in values["files"].items()}
    del values["complete"], values["root_of_trust"], values["mac"]
    path.write_text(json.dumps(values | {"version": 1}))
    reason = "expected a receipt of version 3, found version 1, which lacks the times of change"
    assert reason in proof(root).reason

    verdict, said = notes(lambda observe: verify(root, observe=observe))

    assert any(reason in note and note.endswith("; hashing every file") for note in said)
    assert verdict.hashed == verdict.nbytes
    assert verdict.is_proven
    assert verify(root).hashed == 0


# --- what the torrent does not promise


def test_a_configuration_that_comes_later_is_not_proven(root):
    files = [f"ckpt-0/tensor{index:05d}_000" for index in range(14)]
    torrent = build_metainfo(root, files, name="small", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)
    write_source(root, infohash=parse_metainfo(torrent, source="").infohash, trust=TYPED)
    verify(root)  # finds the configuration beside it

    assert read_receipt(root).is_complete
    assert proof(root).reason == "config.json: is not in the torrent"


@pytest.mark.parametrize("is_grok_1s", [False, True])
def test_a_tokenizer_is_proven_by_the_torrent_or_by_the_built_in_hash(
    root, is_grok_1s, monkeypatch
):
    (root / "tokenizer.model").write_bytes(b"pieces")
    if is_grok_1s:
        digest = receipts.hashlib.sha256(b"pieces").hexdigest()
        monkeypatch.setattr(receipts, "GROK_1_TOKENIZER_SHA256", digest)

    verdict = verify(root)

    assert verdict.damage == ()
    assert verdict.is_proven == is_grok_1s
    assert verdict.doubt == (None if is_grok_1s else "tokenizer.model: is not in the torrent")
    assert (proof(root).receipt is not None) == is_grok_1s
    assert proof(root).reason == (verdict.doubt or "")


# --- whom to believe


EXPOSED = [
    pytest.param(".", 0o777, id="the-release"),
    pytest.param("..", 0o777, id="above-it"),
    pytest.param(".grokctl", 0o777, id="the-private-folder"),
    pytest.param(".grokctl/receipt.json", 0o666, id="the-receipt"),
]


@pytest.mark.parametrize(("place", "mode"), EXPOSED)
def test_a_receipt_that_others_can_write_is_not_believed(root, place, mode):
    verify(root)
    exposed = (root / place).resolve()
    exposed.chmod(mode)
    reason = f"receipt: {exposed} can be written by others"

    found_proof = proof(root)
    verdict, said = notes(lambda observe: verify(root, observe=observe))

    assert read_receipt(root) is None or place == ".grokctl/receipt.json"  # is written anew
    assert (found_proof.receipt, found_proof.reason) == (None, reason)
    assert f"{reason}; hashing every file" in said
    assert verdict.hashed == verdict.nbytes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", [".", ".grokctl", ".grokctl/receipt.json"])
def test_a_receipt_of_another_user_is_not_believed(root, place):
    verify(root)
    os.chown(root / place, OTHER, -1)

    assert proof(root).reason.endswith(f" belongs to user {OTHER}")
    assert verify(root).hashed == verify(root).nbytes


def test_a_receipt_below_a_sticky_folder_is_believed(root):
    verify(root)
    root.parent.chmod(0o1777)

    assert proof(root).receipt is not None
    assert verify(root).hashed == 0


def planted(root, files=None):
    """A torrent of altered files, beside them."""
    flip(root / GATE, 900)
    files = files or ["config.json", *(f"ckpt-0/tensor{index:05d}_000" for index in range(14))]
    torrent = build_metainfo(root, files, name="small", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)
    return torrent


@pytest.mark.parametrize("has_source", [False, True])
def test_a_torrent_that_others_could_have_planted_proves_nothing(root, has_source):
    torrent = planted(root)
    (root / ".grokctl/source.json").unlink()
    if has_source:
        write_source(root, infohash=parse_metainfo(torrent, source="").infohash, trust=BUILT_IN)
    root.chmod(0o777)

    verdict = verify(root)

    assert verdict.damage == ()
    assert not verdict.is_proven
    assert verdict.verified is None
    assert verdict.root_of_trust is None
    assert verdict.doubt == f"release.torrent in the folder: {root} can be written by others"
    assert not (root / ".grokctl/receipt.json").exists()
    root.chmod(0o755)
    assert proof(root).receipt is None


def unnamed(root, why="nobody has named it here"):
    command = f"grokctl verify {root} --torrent-file {root / 'release.torrent'}"
    return f"{FOUND}: {why}; if you know where it comes from: {command}"


def sources_of_others(root, infohash):
    """Records of the root of trust that this user did not write; each with the words for it."""
    path = root / ".grokctl/source.json"
    of_another = (
        f"{path.relative_to(root)}: its MAC is of another key than that of this user, {key_file()}"
    )
    for words in (BUILT_IN, TYPED, "the torrent file /home/me/x.torrent (sha256 00)"):
        record = {"version": 1, "infohash": infohash, "root_of_trust": words}
        path.write_text(json.dumps(record))
        yield ".grokctl/source.json: has no MAC of this user"
        path.write_text(json.dumps(record | {"mac": "0" * 64}))
        yield of_another
        with user_of(root.parent / "settings of another"):
            write_source(root, infohash=infohash, trust=words)
        yield of_another
        write_source(root, infohash="0" * 40, trust=TYPED)
        path.write_text(path.read_text().replace("0" * 40, infohash))
        yield of_another


def test_a_torrent_is_not_proven_by_a_record_that_this_user_did_not_write(root):
    infohash = read_source(root)

    for why in sources_of_others(root, infohash):
        verdict = verify(root)
        assert (verdict.damage, verdict.is_proven, verdict.root_of_trust) == ((), False, None)
        assert verdict.doubt == unnamed(root, why)
        assert proof(root) == Proof(None, verdict.doubt)
        write_source(root, infohash=infohash)  # what goes on in that folder knows no other
        assert verify(root).doubt == unnamed(root)

    assert verify(root).hashed == 0  # the bytes are what they were


@pytest.mark.parametrize("words", [BUILT_IN, FOUND, "", 3])
def test_the_built_in_magnet_is_no_word_of_a_record(root, words):
    write_source(root, infohash=read_source(root), trust=words)

    assert trust_of(root, read_source(root)).doubt is not None


def test_a_torrent_without_a_record_is_proven_once_it_is_named(root, tmp_path):
    home = Home(tmp_path / "home")
    (root / ".grokctl/source.json").unlink()
    given = root / "release.torrent"

    assert verify(root).doubt == unnamed(root)
    assert proof(root).receipt is None
    root_to_prove(home, find_checkpoint(home, str(root)), given, is_repaired=False)
    verdict = verify(root)

    assert (verdict.is_proven, verdict.hashed) == (True, 0)
    assert verdict.root_of_trust == torrent_file(given, given.read_bytes())
    assert proof(root).receipt.root_of_trust == verdict.root_of_trust


def receipt_of_another(root):
    """As on a drive: it fits the altered file, its inode and its times."""
    flip(root / GATE, 900)
    receipt = read_receipt(root)
    stamps = {name: Stamp.of(root / name) for name in receipt.stamps}
    with user_of(root.parent / "settings of the lender"):
        replace(receipt, stamps=stamps).write(root)


def receipt_without_a_mac(root):
    receipt_of_another(root)
    change(root, mac=None)


def receipt_with_another_value(root):
    flip(root / GATE, 900)
    stamps = {name: Stamp.of(root / name) for name in read_receipt(root).stamps}
    change(root, files={name: [*s.lasting[:3], s.device, s.ctime_ns] for name, s in stamps.items()})


def receipt_that_was_a_source(root):
    receipt_without_a_mac(root)
    values = json.loads((root / ".grokctl/receipt.json").read_text())
    del values["mac"]
    (root / ".grokctl/receipt.json").write_text(json.dumps(sealed("source", values)))


def change(root, **values):
    path = root / ".grokctl/receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "plant",
    [
        receipt_of_another,
        receipt_without_a_mac,
        receipt_with_another_value,
        receipt_that_was_a_source,
    ],
)
def test_a_receipt_that_this_user_did_not_write_spares_no_file(root, plant):
    assert verify(root).is_proven
    plant(root)

    reason = proof(root).reason
    verdict, said = notes(lambda observe: verify(root, observe=observe))

    assert reason.startswith(".grokctl/receipt.json: ")
    assert "MAC" in reason
    assert f"{reason}; hashing every file" in said
    assert GATE in {item.file for item in verdict.damage}
    assert verdict.hashed == verdict.nbytes


def test_without_a_key_everything_is_hashed_and_the_reason_said(root, tmp_path):
    with user_of(tmp_path / "settings"):
        (tmp_path / "settings").write_bytes(b"no folder")
        verdict, said = notes(lambda observe: verify(root, rehash=True, observe=observe))
        write_source(root, infohash=read_source(root), trust=TYPED)
        problem = trust_of(root, read_source(root)).doubt

    assert verdict.hashed == verdict.nbytes
    assert any(
        note.startswith("receipt: cannot be written (the key of this user, ") for note in said
    )
    assert "source.json: has no MAC of this user" in problem


def test_a_named_torrent_is_not_replaced_by_one_that_lies_there(root, tmp_path):
    home = Home(tmp_path / "home")
    given = shutil.copy(root / "release.torrent", tmp_path / "given.torrent")
    planted(root)
    (root / ".grokctl/source.json").unlink()

    with pytest.raises(UsageError, match="expected the torrent") as caught:
        root_to_prove(home, find_checkpoint(home, str(root)), tmp_path / given, is_repaired=False)

    assert caught.value.hint.startswith(f"rm {root / 'release.torrent'}")


def test_a_named_torrent_is_kept_under_home_where_others_can_write(root, tmp_path):
    home = Home(tmp_path / "home")
    given = tmp_path / "given.torrent"
    shutil.copy(root / "release.torrent", given)
    root.chmod(0o777)

    kept = root_to_prove(home, find_checkpoint(home, str(root)), given, is_repaired=False)
    verdict = verify(kept)

    assert kept.is_relative_to(home.adopted)
    assert (verdict.damage, verdict.doubt) == ((), f"{root} can be written by others")
    assert find_checkpoint(home, str(root)).root == kept
    assert verify(kept).hashed == verdict.nbytes
    root.chmod(0o755)
    assert verify(kept).root_of_trust == torrent_file(given, given.read_bytes())
    assert str(given) in verify(kept).root_of_trust
    assert verify(kept).hashed == 0
    assert find_checkpoint(home, str(root)).root == kept  # its own folder has no proof yet


def without_mac(root):
    """As an archive brings it, or an earlier version wrote it."""
    path = root / ".grokctl/unfinished.json"
    values = json.loads(path.read_text())
    del values["mac"]
    path.write_text(json.dumps(values))


def with_another_option(root):
    path = root / ".grokctl/unfinished.json"
    path.write_text(path.read_text().replace('"x"', '"x", "--force"'))


def by_another(root):
    record = read_unfinished(root)
    with user_of(root.parent / "settings of another"):
        record.write(root)


@pytest.mark.parametrize(
    "spoil", [lambda root: root.chmod(0o777), without_mac, with_another_option, by_another]
)
def test_the_command_of_a_download_that_others_could_have_written_is_not_repeated(root, spoil):
    record = Unfinished(source="magnet:?evil", options=("--proxy", "x"), have=1, nbytes=9)
    replace(record, is_final=True).write(root)
    assert "evil" in read_unfinished(root).command(root)

    spoil(root)
    with_torrent = read_unfinished(root).command(root)
    (root / "release.torrent").unlink()
    without = read_unfinished(root).command(root)

    assert with_torrent == f"grokctl fetch {root / 'release.torrent'} --to {root}"
    assert without == f"grokctl fetch grok-1 --to {root}"


# --- the root of trust


def test_the_root_of_trust_is_that_of_the_fetch(root, monkeypatch):
    infohash = verify(root).verified.receipt.infohash
    for words in (TYPED, "the torrent file /home/me/x.torrent (sha256 00)"):
        write_source(root, infohash=infohash, trust=words)
        verdict = verify(root)
        assert verdict.root_of_trust == words
        assert read_receipt(root).root_of_trust == words
        assert verdict.hashed == 0
    write_source(root, infohash=infohash)  # a repair knows no other
    assert trust_of(root, infohash).root == words

    (root / ".grokctl/source.json").write_text(json.dumps({"version": 1, "infohash": infohash}))
    assert verify(root).root_of_trust is None

    monkeypatch.setattr(trust, "GROK_1_INFOHASH", infohash)
    root.chmod(0o777)
    assert trust_of(root, infohash).root == BUILT_IN  # wherever it lies
    assert verify(root).doubt == f"{root} can be written by others"
    root.chmod(0o755)
    assert verify(root).root_of_trust == BUILT_IN


def test_the_built_in_infohash_is_its_own_root(tmp_path):
    assert trust_of(tmp_path, trust.GROK_1_INFOHASH).root == BUILT_IN


@pytest.mark.parametrize("words", [None, 0, "", [], "a\x1b[31m" * 5000])
def test_a_root_of_trust_that_makes_no_sense_is_not_repeated(root, words):
    infohash = verify(root).verified.receipt.infohash
    record = {"version": 1, "infohash": infohash, "root_of_trust": words}
    (root / ".grokctl/source.json").write_text(json.dumps(record))

    found_root = trust_of(root, infohash).root

    assert found_root == FOUND
    assert not root_in_words(words, infohash) or len(root_in_words(words, infohash)) <= 5000
    assert root_in_words(words, infohash).isprintable()
