"""An export that is stopped, killed or out of room continues, and comes to the same bytes."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from cuts import contents
from exports import WIDE, exported

from grokctl.checkpoint.miniature import write_miniature
from grokctl.checkpoint.receipt import Stamp
from grokctl.checkpoint.release import open_release
from grokctl.errors import CorruptCheckpointError, DiskFullError
from grokctl.events import Advanced, Noted, Stage, Started

SLOWLY = ("--jobs", "1", "--max-memory", "1MB")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, WIDE)
    return open_release(root)


@pytest.fixture(scope="module", params=[None, 4 * 10**6], ids=["one-file", "split"])
def split(request):
    return request.param


@pytest.fixture(scope="module")
def whole(release, split, tmp_path_factory):
    return contents(exported(release, tmp_path_factory.mktemp("whole") / "out", split=split).root)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_a_stopped_export_goes_on_and_comes_to_the_same_bytes(
    release, whole, split, tmp_path, share
):
    total = 0

    def stop(event):
        nonlocal total
        if isinstance(event, Started):
            total = event.total
        if isinstance(event, Advanced) and event.done > share * total:
            raise KeyboardInterrupt

    out, options = tmp_path / "out", {"split": split, "max_memory": 10**6, "jobs": 1}
    with pytest.raises(KeyboardInterrupt):
        exported(release, out, observe=stop, **options)
    assert not out.exists()
    seen = []
    made = exported(release, out, observe=seen.append, **options)

    assert contents(made.root) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    notes = [event.message for event in seen if isinstance(event, Noted)]
    continued = [note for note in notes if note.startswith("continuing after ")]
    assert len(continued) == (share > 0.1)
    steps = [event for event in seen if isinstance(event, Advanced)]
    assert {event.stage for event in steps} == {Stage.EXPORT}
    (started,) = (event for event in seen if isinstance(event, Started))
    assert steps[-1].done == started.total


def test_a_killed_export_goes_on_and_comes_to_the_same_bytes(release, tmp_path):
    out, home = tmp_path / "place" / "out", tmp_path / "home"
    command = [sys.executable, "-m", "grokctl", "export", str(release.root), "--home", str(home)]
    command += ["--out", str(out), *SLOWLY]

    def grown():
        return sum(path.stat().st_size for path in out.parent.glob(".out.*.partial/*.gguf"))

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while grown() < 4 * 10**6 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    rest = subprocess.run(command, capture_output=True, text=True, check=False)

    assert rest.returncode == 0, rest.stderr
    assert "continuing after" in rest.stderr
    fresh = exported(release, tmp_path / "fresh").root
    found = {name.replace("wide-", ""): one for name, one in contents(out).items()}
    wanted = {name.replace("wide-", ""): one for name, one in contents(fresh).items()}
    assert found == wanted
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_full_disk_keeps_what_was_written(release, whole, split, tmp_path, monkeypatch):
    out, room = tmp_path / "out", 2 * 10**6
    real = os.pwrite

    def pwrite(handle, data, offset):
        if offset + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", pwrite)
        with pytest.raises(DiskFullError):
            exported(release, out, split=split, max_memory=10**6)
    assert not out.exists()
    assert sum(path.stat().st_size for path in tmp_path.glob(".out.*.partial/*.gguf")) > 10**6

    assert contents(exported(release, out, split=split).root) == whole


def test_what_does_not_fit_is_refused_before_a_byte_is_written(release, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    with pytest.raises(DiskFullError, match=r"expected 12\.1 MB free, found 1\.0 MB"):
        exported(release, tmp_path / "out")

    assert not list(tmp_path.iterdir())


def test_a_release_that_changes_meanwhile_is_not_exported(two_layers_wide, tmp_path):
    release = open_release(two_layers_wide)
    path = release.tensors[5].path

    def change(event):
        if isinstance(event, Started):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    before = Stamp.of(path)
    with pytest.raises(CorruptCheckpointError, match="changed"):
        exported(release, tmp_path / "out", observe=change)

    assert Stamp.of(path) != before
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_layers_wide(tmp_path):
    write_miniature(tmp_path / "wide", replace(WIDE, num_layers=1))
    return tmp_path / "wide"


def test_values_that_are_not_finite_are_not_exported(two_layers_wide, tmp_path):
    release = open_release(two_layers_wide)
    (tensor,) = (one for one in release.tensors if one.spec.name == "embedding")
    with tensor.path.open("r+b") as file:
        file.seek(tensor.weight.offset + 400)
        file.write(b"\0\0\xc0\x7f")

    with pytest.raises(CorruptCheckpointError, match=r"token_embd.weight.* not finite") as caught:
        exported(open_release(two_layers_wide), tmp_path / "out")

    assert "--stats" in (caught.value.hint or "")
