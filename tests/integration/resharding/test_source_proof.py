"""What a reshard claims about its source: only what was hashed, by whom it could be changed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from cuts import (
    contents,
    cut,
    interrupt_at,
    journal_of,
    kept_by,
    made_here,
    partial_of,
    proven_release,
)
from users import user_of

from grokctl.checkpoint import receipt as receipts
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.ready import SUMS, open_ready, read_manifest
from grokctl.checkpoint.receipt import proof_of, read_receipt
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.sums import doubt_of, read_sums
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source
from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.events import Advanced, Finished, Noted, Stage
from grokctl.integrity.published import verify_ready
from grokctl.marks import MARK, put_mark
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.own_files import opened_folder
from grokctl.paths import TOKENIZER
from grokctl.reshard import reshard
from grokctl.resharding import publish, source_hashing
from grokctl.resharding.plan import ReshardOptions, plan_reshard
from grokctl.verify import verify

TWO, FOUR = MeshShape(1, 2), MeshShape(2, 2)
FIRST, SECOND = (f"device-{index:02d}-of-02.safetensors" for index in range(2))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "small"
    proven_release(root)
    return root


@pytest.fixture(scope="module")
def ready_pristine(pristine, tmp_path_factory):
    """Made of a proven release."""
    proof = verify(pristine).verified.receipt
    return cut(open_release(pristine), TWO, tmp_path_factory.mktemp("ready") / "ready", proof=proof)


@pytest.fixture
def ready(ready_pristine, tmp_path):
    """A copy to damage."""
    return made_here(shutil.copytree(ready_pristine.root, tmp_path / "ready"))


def opened(root):
    return open_ready(root, is_streamed=True)


def flip(path, offset):
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(root, change, *, with_sums=False):
    """Edit a manifest as somebody does who knows about the sums, or does not."""
    path = root / "grokctl.json"
    values = json.loads(path.read_bytes())
    change(values)
    data = json.dumps(values, separators=(",", ":")).encode()
    before, after = (hashlib.sha256(each).hexdigest() for each in (path.read_bytes(), data))
    path.write_bytes(data)
    if with_sums:
        (root / SUMS).write_text((root / SUMS).read_text().replace(before, after))


# --- a ready checkpoint as the source


def test_a_proven_ready_checkpoint_hands_its_proof_on(ready, tmp_path):
    made = cut(opened(ready), FOUR, tmp_path / "out")

    assert made.source.proven
    assert made.source.root_of_trust == TYPED
    assert made.source.infohash == opened(ready).source.infohash
    verdict = verify_ready(made)
    assert (verdict.is_proven, verdict.doubt) == (True, None)
    assert verdict.root_of_trust == TYPED


@pytest.mark.parametrize("compression", [None, Compression(1)], ids=["plain", "zstd"])
@pytest.mark.parametrize("place", ["middle", "end"])
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_an_altered_device_file_is_published_by_no_reshard(
    ready, tmp_path, name, place, compression
):
    source = ready
    if compression is not None:
        source = cut(opened(ready), TWO, tmp_path / "packed", compression=compression).root
        name += ".zst"
    path = source / name
    size = path.stat().st_size
    flip(path, size // 2 if place == "middle" else size - 1)

    with pytest.raises(CorruptCheckpointError) as caught:
        cut(opened(source), FOUR, tmp_path / "out")

    assert caught.value.damage[0].file == name
    assert caught.value.hint == f"grokctl verify {source}"
    assert not (tmp_path / "out").exists()
    if compression is None:  # a frame that does not unpack may be mended, and the rest kept
        assert caught.value.damage[0].reason is Reason.ALTERED
        assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"precision": Precision.BFLOAT16}, id="converted"),
        pytest.param({"precision": Precision.INT4}, id="rounded"),
        pytest.param({"mesh": TWO}, id="copied"),
        pytest.param({"devices": frozenset({0})}, id="one-device"),
    ],
)
def test_a_flipped_bit_shows_in_every_kind_of_reshard(ready, tmp_path, options):
    options = {"mesh": MeshShape(1, 4), **options}
    path = ready / FIRST
    flip(path, path.stat().st_size - 1)

    with pytest.raises(CorruptCheckpointError, match=f"{FIRST}: altered, expected sha256"):
        cut(opened(ready), out=tmp_path / "out", **options)

    assert [entry.name for entry in tmp_path.iterdir()] == ["ready"]


def test_files_that_a_partial_reshard_does_not_read_are_not_hashed(ready, tmp_path):
    flip(ready / SECOND, 10**6 % (ready / SECOND).stat().st_size)

    made = cut(opened(ready), MeshShape(1, 4), tmp_path / "out", devices=frozenset({0}))

    assert made.source.proven  # of the bytes that are in it
    assert not [name for name in contents(tmp_path / "out") if name.startswith("device-01")]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda values: values["source"].update(proven=True, name="x"), id="source"),
        pytest.param(lambda values: values["files"][0].update(sha256="0" * 64), id="a-sum"),
        pytest.param(lambda values: values["config"].update(attn_output_multiplier=7), id="config"),
    ],
)
def test_an_edited_manifest_is_no_source_and_does_not_verify(ready, tmp_path, change):
    rewrite(ready, change)

    verdict = verify_ready(read_manifest(ready))
    quick = verify_ready(read_manifest(ready), quick=True)
    with pytest.raises(CorruptCheckpointError) as caught:
        cut(opened(ready), FOUR, tmp_path / "out")

    named = {item.file: item.reason for item in verdict.damage}
    assert named["grokctl.json"] is Reason.ALTERED
    assert "grokctl.json" in {item.file for item in quick.damage}
    assert caught.value.exit_code == 20
    assert caught.value.hint == f"grokctl verify {ready}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ready"]


def test_an_altered_tokenizer_is_not_handed_on(ready, tmp_path):
    path = ready / "tokenizer.model"
    flip(path, 5)

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model: altered"):
        cut(opened(ready), FOUR, tmp_path / "out")

    assert [entry.name for entry in tmp_path.iterdir()] == ["ready"]


def test_a_tokenizer_that_the_manifest_does_not_have_is_not_proven(pristine, tmp_path):
    proof = verify(pristine).verified.receipt
    bare = shutil.copytree(pristine, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    ready = cut(open_release(bare), TWO, tmp_path / "ready")
    rewrite(ready.root, lambda values: values["source"].update(proven=True), with_sums=True)
    made_here(ready.root)
    assert doubt_of(opened(ready.root)) is None
    (ready.root / "tokenizer.model").write_bytes(b"planted")

    made = cut(opened(ready.root), FOUR, tmp_path / "out")

    assert proof
    assert not made.source.proven
    assert doubt_of(opened(ready.root)) == "tokenizer.model: is not in grokctl.json"


@pytest.mark.parametrize("place", [".", "grokctl.json", ".."])
def test_a_manifest_that_others_can_write_hands_no_proof_on(ready, tmp_path, place):
    exposed = (ready / place).resolve()
    exposed.chmod(exposed.stat().st_mode | 0o002)

    out = tmp_path / "private"
    made = cut(opened(ready), FOUR, out)

    assert not made.source.proven
    assert made.source.root_of_trust is None
    verdict = verify_ready(read_manifest(ready))
    assert verdict.damage == ()
    assert not verdict.is_proven
    assert verdict.doubt == f"{exposed} can be written by others"
    assert verdict.is_exposed


def test_a_resumed_reshard_hashes_what_the_killed_one_read(ready, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cut(opened(ready), FOUR, out, observe=interrupt_at(40))
    assert partial_of(out)
    hashed = []
    feed = source_hashing.Feeder.feed

    class Counting(source_hashing.Feeder):
        def feed(self, hasher, handle, offset, end):
            hashed.append(end - offset)
            return feed(self, hasher, handle, offset, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_hashing, "Feeder", Counting)
        events = []
        made = cut(opened(ready), FOUR, out, observe=events.append)

    notes = [event.message for event in events if isinstance(event, Noted)]
    assert any(note.startswith("continuing after ") for note in notes)
    assert made.source.proven
    assert sum(hashed) == sum((ready / name).stat().st_size for name in (FIRST, SECOND))


def test_a_source_that_was_altered_after_a_kill_is_found(ready, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cut(opened(ready), FOUR, out, observe=interrupt_at(40))
    flip(ready / FIRST, 3000)  # was read already

    with pytest.raises(CorruptCheckpointError, match=FIRST):
        cut(opened(ready), FOUR, out)

    assert not out.exists()


def at_the_end(event):
    """Stop when every tensor is in the journal, and the source is still to be hashed."""
    if isinstance(event, Advanced) and event.detail == "hashing the source":
        raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [20, 0], ids=["midway", "at-the-end"])
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_what_a_killed_reshard_read_of_an_altered_file_is_not_published(
    ready, tmp_path, name, stop, monkeypatch
):
    monkeypatch.setattr(source_hashing, "_BEHIND", 10**9)  # everything is hashed at the end
    out = tmp_path / "out"
    flip(ready / name, 3000)
    with pytest.raises(KeyboardInterrupt):
        cut(opened(ready), FOUR, out, observe=interrupt_at(stop) if stop else at_the_end)
    assert journal_of(out)

    with pytest.raises(CorruptCheckpointError, match=name):
        cut(opened(ready), FOUR, out)

    assert [entry.name for entry in tmp_path.iterdir()] == ["ready"]


def without_a_mark(partial):
    (partial / MARK).unlink()


def as_a_copy(partial):
    copy = shutil.copytree(partial, partial.with_name("copy"))
    shutil.rmtree(partial)
    copy.rename(partial)


def with_a_mark_of_an_earlier_version(partial):
    lines = (partial / MARK).read_text().splitlines(keepends=True)
    (partial / MARK).write_text("".join(lines[:2]))


def with_a_mark_of_another(partial):
    (partial / MARK).unlink()
    with user_of(partial.parent / "settings"), opened_folder(partial) as handle:
        put_mark(handle, partial.name)
    shutil.rmtree(partial.parent / "settings")


@pytest.mark.parametrize(
    "spoil",
    [
        None,
        without_a_mark,
        as_a_copy,
        with_a_mark_of_an_earlier_version,
        with_a_mark_of_another,
    ],
)
def test_what_is_in_a_partial_folder_is_proven_only_if_it_was_begun_here(pristine, tmp_path, spoil):
    source, proof, out = open_release(pristine), verify(pristine).verified.receipt, tmp_path / "out"
    for count in (20, 10):  # a mark that it gets when it is continued changes nothing
        with pytest.raises(KeyboardInterrupt):
            cut(source, TWO, out, proof=proof, observe=interrupt_at(count))
        if spoil is not None and count == 20:
            spoil(partial_of(out))

    events = []
    made = cut(source, TWO, out, proof=proof, observe=events.append)

    assert kept_by(events)
    words = "begun by an earlier version, or elsewhere; its result will not count as proven"
    said = [event.message for event in events if isinstance(event, Noted)]
    assert any(note.endswith(words) for note in said) == (spoil is not None)
    assert made.source.proven == (doubt_of(made) is None) == (spoil is None)


@pytest.mark.parametrize(("before", "after"), [(0o777, 0o755), (0o755, 0o777), (0o777, 0o777)])
@pytest.mark.parametrize("kind", ["ready", "release"])
def test_what_was_read_while_others_could_exchange_it_is_read_again_once_they_cannot(
    ready, pristine, tmp_path, before, after, kind
):
    root = ready if kind == "ready" else shutil.copytree(pristine, tmp_path / "small")
    source = opened(root) if kind == "ready" else open_release(root)
    root.chmod(before)
    with pytest.raises(KeyboardInterrupt):
        cut(source, FOUR, tmp_path / "out", observe=interrupt_at(40))
    root.chmod(after)
    events = []

    cut(source, FOUR, tmp_path / "out", observe=events.append)

    assert (kept_by(events) > 0) == (before == after)


def test_a_journal_in_the_folder_to_fill_is_not_taken(pristine, tmp_path):
    source, proof = open_release(pristine), verify(pristine).verified.receipt
    out, events = tmp_path / "out", []
    (out / ".x.partial").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        cut(source, TWO, out, proof=proof, observe=interrupt_at(20))
    (begun,) = out.glob(".out.*.partial")
    for path in begun.iterdir():  # as an archive brings it, without the folder
        if path.name != MARK:
            path.rename(out / path.name)
    shutil.rmtree(begun)

    made = cut(source, TWO, out, proof=proof, observe=events.append)

    assert kept_by(events) == 0
    assert doubt_of(made) is None


@pytest.mark.parametrize("behind", [0, 10**9])
def test_the_hashing_follows_however_far_it_stays_behind(ready, tmp_path, monkeypatch, behind):
    monkeypatch.setattr(source_hashing, "_BEHIND", behind)
    monkeypatch.setattr(source_hashing, "_FARTHEST", 1000)
    monkeypatch.setattr(source_hashing, "_STEP", 999)
    events = []

    cut(opened(ready), FOUR, tmp_path / "out", observe=events.append)

    reshard_events = [event for event in events if getattr(event, "stage", None) is Stage.RESHARD]
    assert isinstance(reshard_events[-1], Finished)
    done = [event.done for event in reshard_events if isinstance(event, Advanced)]
    assert done == sorted(done)


# --- a release as the source


@pytest.mark.parametrize("name", ["ckpt-0/tensor00003_000", "config.json", "tokenizer.model"])
def test_a_release_that_changes_after_its_receipt_is_not_published(pristine, tmp_path, name):
    root = shutil.copytree(pristine, tmp_path / "small")
    proof = verify(root).verified.receipt
    plan = plan_reshard(open_release(root), ReshardOptions(mesh=TWO, out=tmp_path / "out"))

    def alter(event):
        if isinstance(event, Finished) and event.stage is Stage.RESHARD:
            flip(root / name, (root / name).stat().st_size // 2)

    with pytest.raises(CorruptCheckpointError, match="changed while it was read"):
        reshard(plan, proof=proof, observe=alter)

    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_a_release_that_changed_between_receipt_and_reshard_is_not_published(pristine, tmp_path):
    root = shutil.copytree(pristine, tmp_path / "small")
    proof = verify(root).verified.receipt
    plan = plan_reshard(open_release(root), ReshardOptions(mesh=TWO, out=tmp_path / "out"))
    path = root / "ckpt-0/tensor00003_000"
    flip(path, path.stat().st_size - 100)

    with pytest.raises(CorruptCheckpointError, match="changed while it was read"):
        reshard(plan, proof=proof)

    assert not (tmp_path / "out").exists()


@pytest.fixture
def built_in(pristine, tmp_path, monkeypatch):
    """A release whose torrent does not promise its tokenizer, which is the built-in one."""
    root = shutil.copytree(pristine, tmp_path / "small")
    data = (root / "tokenizer.model").read_bytes()
    monkeypatch.setattr(receipts, "GROK_1_TOKENIZER_SHA256", hashlib.sha256(data).hexdigest())
    files = [str(path.relative_to(root)) for path in root.glob("ckpt-0/*")]
    torrent = build_metainfo(root, sorted([*files, "config.json"]), name="s", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)
    shutil.rmtree(root / ".grokctl")
    write_source(root, infohash=parse_metainfo(torrent, source="s").infohash, trust=TYPED)
    return root


def replaced(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def removed_and_put_back(path):
    path.rename(path.with_name("aside"))
    path.with_name("aside").rename(path)


@pytest.mark.parametrize("proof_from", ["verify", "proof_of"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize(
    "change", [lambda path: flip(path, 5), replaced, removed_and_put_back, Path.unlink]
)
def test_a_built_in_tokenizer_that_changes_after_it_was_hashed_is_not_handed_on(
    built_in, tmp_path, when, change, proof_from
):
    verified = verify(built_in).verified
    release = open_release(built_in)
    proof = verified.receipt if proof_from == "verify" else proof_of(release).receipt
    plan = plan_reshard(release, ReshardOptions(mesh=TWO, out=tmp_path / "out"))
    if when == "before":
        change(built_in / "tokenizer.model")

    def meanwhile(event):
        if isinstance(event, Finished) and event.stage is Stage.RESHARD and when == "meanwhile":
            change(built_in / "tokenizer.model")

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model: altered, changed while"):
        reshard(plan, proof=proof, observe=meanwhile)

    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]
    assert TOKENIZER not in read_receipt(built_in).stamps  # the torrent does not promise it


def test_a_built_in_tokenizer_is_proven_with_the_reshard(built_in, tmp_path):
    assert verify(built_in).is_proven

    made = cut(
        open_release(built_in),
        TWO,
        tmp_path / "out",
        proof=proof_of(open_release(built_in)).receipt,
    )

    assert doubt_of(made) is None
    flip(built_in / "tokenizer.model", 5)
    assert proof_of(open_release(built_in)).reason == "tokenizer.model: is not in the torrent"


def test_a_tokenizer_that_appears_in_a_release_is_not_handed_on(built_in, tmp_path):
    path = built_in / "tokenizer.model"
    path.rename(tmp_path / "aside")
    proof = verify(built_in).verified.receipt

    def appear(event):
        if isinstance(event, Finished) and event.stage is Stage.RESHARD:
            (tmp_path / "aside").rename(path)

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model"):
        cut(open_release(built_in), TWO, tmp_path / "out", proof=proof, observe=appear)


def test_a_tokenizer_that_appears_in_a_ready_checkpoint_is_not_handed_on(
    pristine, tmp_path, monkeypatch
):
    bare = shutil.copytree(pristine, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    ready = cut(open_release(bare), TWO, tmp_path / "ready").root
    rewrite(ready, lambda values: values["source"].update(proven=True), with_sums=True)
    made_here(ready)

    def origin_of(*arguments, **options):
        found = publish.origin_of(*arguments, **options)
        assert found.proven
        (ready / "tokenizer.model").write_bytes(b"planted")
        return found

    monkeypatch.setattr("grokctl.resharding.execution.origin_of", origin_of)
    with pytest.raises(CorruptCheckpointError, match="appeared while it was read"):
        cut(opened(ready), FOUR, tmp_path / "out")

    assert not (tmp_path / "out").exists()


# --- SHA256SUMS


def sums_damage(root):
    return {item.file: item.reason for item in read_sums(read_manifest(root)).damage}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda text: text, {}, id="as-it-was"),
        pytest.param(
            lambda text: "".join(reversed(text.splitlines(keepends=True))), {}, id="another-order"
        ),
        pytest.param(lambda text: text.replace("  ", " *"), {}, id="binary-mode"),
        pytest.param(lambda text: text[:0], {SUMS: Reason.MALFORMED}, id="empty"),
        pytest.param(lambda text: text + "x\n", {SUMS: Reason.MALFORMED}, id="no-line"),
        pytest.param(
            lambda text: text + f"{'0' * 64}  ../x\n", {SUMS: Reason.MALFORMED}, id="outside"
        ),
        pytest.param(
            lambda text: "".join(text.splitlines(keepends=True)[:-1]),
            {SUMS: Reason.MALFORMED},
            id="no-line-for-the-manifest",
        ),
        pytest.param(
            lambda text: "".join(text.splitlines(keepends=True)[1:]),
            {SUMS: Reason.MALFORMED},
            id="no-line-for-a-device",
        ),
        pytest.param(
            lambda text: f"{'0' * 64}  {FIRST}\n" + "".join(text.splitlines(keepends=True)[1:]),
            {SUMS: Reason.ALTERED},
            id="another-sum",
        ),
        pytest.param(
            lambda text: text + f"{'0' * 64}  {FIRST}\n", {SUMS: Reason.MALFORMED}, id="two-sums"
        ),
        pytest.param(
            lambda text: text + f"{'0' * 64}  extra\n", {"extra": Reason.MISSING}, id="a-lost-file"
        ),
        pytest.param(lambda text: text + "\0" * 2**20, {SUMS: Reason.MALFORMED}, id="a-megabyte"),
    ],
)
def test_every_line_of_the_sums_is_checked(ready, change, named):
    (ready / SUMS).write_text(change((ready / SUMS).read_text()))

    assert sums_damage(ready) == named
    assert {item.file: item.reason for item in verify_ready(read_manifest(ready)).damage} == named


@pytest.mark.parametrize(
    ("replace_it", "reason"),
    [
        pytest.param(Path.unlink, Reason.MISSING, id="missing"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), Reason.UNREADABLE, id="folder"),
        pytest.param(lambda path: (path.unlink(), os.mkfifo(path)), Reason.UNREADABLE, id="pipe"),
    ],
)
def test_sums_that_are_no_file_are_damage(ready, tmp_path, replace_it, reason):
    replace_it(ready / SUMS)

    assert sums_damage(ready) == {SUMS: reason}
    with pytest.raises(CorruptCheckpointError, match=SUMS):
        cut(opened(ready), FOUR, tmp_path / "out")


def test_a_file_that_only_the_sums_name_is_hashed(ready):
    (ready / "notes").write_bytes(b"mine")
    with (ready / SUMS).open("a") as file:
        file.write(f"{hashlib.sha256(b'mine').hexdigest()}  notes\n")
    assert verify_ready(read_manifest(ready)).damage == ()

    (ready / "notes").write_bytes(b"thine")

    (damage,) = verify_ready(read_manifest(ready)).damage
    assert (damage.file, damage.reason) == ("notes", Reason.ALTERED)
