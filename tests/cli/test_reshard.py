"""`grokctl reshard` writes all files or none, even if it is killed."""

import hashlib
import json
import shutil
import signal
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from grokctl.checkpoint.release import open_release


@pytest.fixture
def release(home):
    return home / "releases" / "two-layers"


@pytest.fixture(scope="module")
def whole(large, process, tmp_path_factory):
    """The hashes of an uninterrupted reshard."""
    out = tmp_path_factory.mktemp("whole") / "ready"
    assert process.run("reshard", large, "--devices", 8, "--out", out).exit_code == 0
    sums = (out / "SHA256SUMS").read_text()
    shutil.rmtree(out)
    return sums


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("device-*"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_killed_reshard_goes_on_and_comes_to_the_same_bytes(
    process, large, whole, tmp_path, share
):
    out = tmp_path / "ready"
    arguments = ("reshard", large, "--devices", 8, "--out", out, "--jobs", 1)
    enough = share * 200e6

    with process.start(*arguments) as running:
        process.await_that(lambda: size_of(tmp_path) > enough)
        running.send_signal(signal.SIGKILL)
    published = out.exists()
    rest = process.run(*arguments)

    assert running.returncode == -signal.SIGKILL
    assert not published
    assert rest.exit_code == 0
    assert (out / "SHA256SUMS").read_text() == whole
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, check=False)
    assert checked.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]
    if share >= 0.1:
        assert "continuing after" in rest.stderr


def test_a_reshard_killed_twice_still_comes_to_the_same_bytes(process, large, whole, tmp_path):
    out = tmp_path / "ready"
    arguments = ("reshard", large, "--devices", 8, "--out", out, "--jobs", 1)

    for enough in (40e6, 120e6):
        with process.start(*arguments) as running:
            process.await_that(lambda enough=enough: size_of(tmp_path) > enough)
            running.send_signal(signal.SIGKILL)
    rest = process.run(*arguments)

    assert rest.exit_code == 0
    assert (out / "SHA256SUMS").read_text() == whole


def test_a_partial_of_another_release_is_not_gone_on_with(process, large, tmp_path):
    out = tmp_path / "ready"
    other = shutil.copytree(large, tmp_path / "other")
    with process.start("reshard", large, "--devices", 8, "--out", out) as running:
        process.await_that(lambda: size_of(tmp_path) > 50e6)
        running.send_signal(signal.SIGKILL)

    outcome = process.run("reshard", other, "--devices", 8, "--out", out)

    assert outcome.exit_code == 0
    assert "continuing after" not in outcome.stderr


def test_two_reshards_into_one_folder_do_not_mix(process, large, whole, tmp_path):
    out = tmp_path / "ready"
    arguments = ("reshard", large, "--devices", 8, "--out", out, "--jobs", 1)

    with process.start(*arguments) as first:
        process.await_that(lambda: size_of(tmp_path) > 50e6)
        first.send_signal(signal.SIGSTOP)  # or it may be ready before the second begins
        try:
            second = process.run(*arguments)
        finally:
            first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)

    assert first.returncode == 0
    assert second.exit_code == 2
    assert "another grokctl" in second.error
    assert (out / "SHA256SUMS").read_text() == whole
    assert process.run("verify", out).exit_code == 0


def test_two_runs_and_any_number_of_threads_write_the_same_bytes(grokctl, release, tmp_path):
    options = (["--jobs", 1], ["--jobs", 4], ["--max-memory", "1MB"], [])

    sums = set()
    for index, more in enumerate(options):
        out = tmp_path / str(index)
        assert grokctl("reshard", release, "--devices", 4, "--out", out, *more).exit_code == 0
        sums.add((out / "SHA256SUMS").read_bytes())

    assert len(sums) == 1


def test_force_replaces_a_ready_checkpoint(grokctl, release, ready):
    before = json.loads((ready / "grokctl.json").read_text())

    outcome = grokctl("reshard", release, "--devices", 2, "--out", ready, "--force", "--json")

    after = json.loads((ready / "grokctl.json").read_text())
    assert outcome.exit_code == 0
    assert (before["mesh"]["model"], after["mesh"]["model"]) == (4, 2)
    assert not list(ready.glob("*-of-04*"))
    assert [path.name for path in ready.parent.iterdir()] == [ready.name]


def test_force_takes_nobody_elses_file_along(grokctl, release, ready):
    (ready / "thesis").touch()

    outcome = grokctl("reshard", release, "--devices", 2, "--out", ready, "--force")

    assert outcome.exit_code == 2
    assert "'thesis'" in outcome.error
    assert (ready / "thesis").exists()
    assert (ready / "device-03-of-04.safetensors").exists()


def test_force_never_replaces_the_folder_that_the_source_is_in(grokctl, release, ready):
    source = shutil.copytree(release, ready / "release")

    outcome = grokctl("reshard", source, "--devices", 2, "--out", ready, "--force")

    assert outcome.exit_code == 2
    assert "contains the source of this reshard" in outcome.error
    assert (source / "ckpt-0").is_dir()


def test_force_replaces_no_link(grokctl, release, ready, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(ready)

    outcome = grokctl("reshard", release, "--devices", 2, "--out", link, "--force")

    assert outcome.exit_code == 2
    assert outcome.error == f"{link}: is a symbolic link, expected a new or an empty folder"
    assert link.is_symlink()
    assert (ready / "device-03-of-04.safetensors").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "", "--home=x", "x" * 255, "a b/c"])
def test_a_name_in_a_strangers_manifest_leads_nowhere(grokctl, home, ready, name):
    manifest = json.loads((ready / "grokctl.json").read_text())
    manifest["source"]["name"] = name
    (ready / "grokctl.json").write_text(json.dumps(manifest))
    sums = (ready / "SHA256SUMS").read_text().splitlines()[:-1]
    digest = hashlib.sha256((ready / "grokctl.json").read_bytes()).hexdigest()
    (ready / "SHA256SUMS").write_text("\n".join([*sums, f"{digest}  grokctl.json"]) + "\n")

    outcome = grokctl("reshard", ready, "--devices", 2, "--home", home, "--json")

    made = Path(outcome.result["ready"])
    assert outcome.exit_code == 0
    assert made.parent == home / "ready"
    assert not made.name.startswith(("-", "."))
    shutil.rmtree(made)


def test_a_dry_run_of_damaged_files_ends(grokctl, release, tmp_path):
    packed = tmp_path / "packed"
    options = ("--devices", 2, "--compress", "zstd", "--out", packed)
    assert grokctl("reshard", release, *options).exit_code == 0
    for path in packed.glob("device-*"):
        data = bytearray(path.read_bytes())
        for place in range(20_000, len(data), 97):
            data[place] ^= 255
        path.write_bytes(data)

    outcome = grokctl("reshard", packed, "--devices", 4, "--dry-run")

    assert outcome.exit_code == 20
    assert "device-0" in outcome.error


@pytest.mark.parametrize("kind", ["release", "folder", "file"])
def test_force_replaces_nothing_else(grokctl, release, two_layers, tmp_path, kind):
    out = two_layers if kind == "release" else tmp_path / "precious"
    if kind == "folder":
        out.mkdir()
        (out / "thesis").touch()
    elif kind == "file":
        out.write_text("thesis")

    outcome = grokctl("reshard", release, "--devices", 2, "--out", out, "--force")

    assert outcome.exit_code == 2
    assert str(out) in outcome.error
    assert out.exists()
    assert kind != "folder" or (out / "thesis").exists()


def test_force_never_follows_a_link_to_somebody_elses_folder(grokctl, release, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")

    link = grokctl("reshard", release, "--devices", 2, "--out", tmp_path / "link", "--force")
    dangling = grokctl("reshard", release, "--devices", 2, "--out", tmp_path / "nowhere", "--force")

    assert (link.exit_code, dangling.exit_code) == (2, 2)
    assert (precious / "thesis").exists()
    assert not (tmp_path / "absent").exists()


def test_the_sums_are_sha256sums_own_and_cover_every_file(cut):
    root = cut("words", 4).root

    checked = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0
    named = {line.split("  ")[1] for line in (root / "SHA256SUMS").read_text().splitlines()}
    assert named == {path.name for path in root.iterdir()} - {"SHA256SUMS", ".grokctl"}


def test_the_manifest_says_where_the_bytes_came_from(grokctl, download, tmp_path, cut):
    out = tmp_path / "proven"
    assert grokctl("reshard", download.root, "--devices", 1, "--out", out).exit_code == 0

    proven = json.loads((out / "grokctl.json").read_text())["source"]
    unproven = json.loads((cut("two-layers", 1).root / "grokctl.json").read_text())["source"]

    assert proven["proven"] is True
    assert proven["infohash"] == download.verified.result["infohash"]
    assert proven["verified_at"]
    assert (unproven["proven"], unproven["infohash"]) == (False, None)


def test_a_release_touched_since_its_proof_is_not_called_proven(grokctl, verified, tmp_path):
    (verified / "ckpt-0" / "tensor00003_000").touch()
    out = tmp_path / "ready"

    outcome = grokctl("reshard", verified, "--devices", 1, "--out", out)

    assert outcome.exit_code == 0
    assert "not proven" in outcome.stderr
    assert json.loads((out / "grokctl.json").read_text())["source"]["proven"] is False


@pytest.mark.parametrize("devices", [1, 4])
def test_device_files_open_anywhere_and_hold_the_released_numbers(cut, release, devices):
    root = cut("two-layers", devices).root
    manifest = json.loads((root / "grokctl.json").read_text())
    found = {}
    for device in range(devices):
        name = f"device-{device:02}-of-{devices:02}.safetensors"
        with safe_open(root / name, framework="numpy") as file:
            assert set(file.keys()) == set(manifest["tensors"])
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                entry = manifest["tensors"][key]
                shape = tuple(entry["shape"])
                whole = found.setdefault(key, np.empty(shape, file.get_tensor(key).dtype))
                place = tuple(slice(low, high) for low, high in entry["slices"][device])
                whole[place] = file.get_tensor(key)

    for tensor in open_release(release).tensors:
        weight, scales = tensor.map()
        stored = found.pop(f"{tensor.spec.name}.weight")
        if scales is not None:
            kept = found.pop(f"{tensor.spec.name}.scales")
            assert kept.dtype == ml_dtypes.bfloat16
            assert np.array_equal(kept.view(np.uint16), scales.view(np.uint16))
        assert stored.dtype == weight.dtype
        assert np.array_equal(stored, weight), tensor.spec.name
    assert not found


def test_the_same_bytes_whatever_the_folder_is_called(grokctl, release, tmp_path):
    strange = shutil.copytree(release, tmp_path / "a release — with 'quotes' & $pace")
    out = tmp_path / "an out put"

    outcome = grokctl("reshard", strange, "--devices", 2, "--out", out, "--json")
    plain = grokctl("reshard", release, "--devices", 2, "--out", tmp_path / "plain", "--json")

    assert (outcome.exit_code, plain.exit_code) == (0, 0)
    for path in (tmp_path / "plain").glob("device-*"):
        same = hashlib.sha256((out / path.name).read_bytes()).digest()
        assert hashlib.sha256(path.read_bytes()).digest() == same


def test_the_next_command_can_be_pasted_even_with_a_space_in_it(grokctl, release, tmp_path):
    out = tmp_path / "an out put"

    outcome = grokctl("reshard", release, "--devices", 2, "--out", out)

    assert f"grokctl run '{out}'" in outcome.stdout


@pytest.mark.parametrize(("limit", "code"), [(1000, 12), (2**40, 0), (None, 0)])
def test_the_plan_knows_the_largest_file_that_may_be_written(
    grokctl, two_layers, monkeypatch, limit, code
):
    monkeypatch.setattr("grokctl.resharding.publish.largest_file", lambda _: (limit, "ulimit -f"))

    outcome = grokctl("reshard", two_layers, "--devices", 1, "--dry-run")

    assert outcome.exit_code == code
    if code:
        assert "found a limit of 1.0 kB (ulimit -f)" in outcome.error
        assert outcome.hint == "ulimit -f unlimited"


def test_verify_proves_a_release_while_it_is_cut(grokctl, download, tmp_path):
    root = tmp_path / "words"
    shutil.copytree(download.root, root)  # other inodes: its receipt covers nothing

    made = grokctl(
        *("reshard", root, "--devices", 2, "--verify", "--out", tmp_path / "out", "--json")
    )

    assert made.exit_code == 0, made
    assert (made.result["proven"], made.result["proven_by"]) == (True, "infohash")
    assert grokctl("verify", root, "--json").result["hashed_bytes"] == 0


def test_verify_without_a_torrent_is_refused(grokctl, home, tmp_path):
    outcome = grokctl(
        *("reshard", "two-layers", "--devices", 2, "--verify", "--home", home),
        *("--out", tmp_path / "out"),
    )

    assert outcome.exit_code == 2
    assert "without release.torrent" in outcome.error
