"""What is found out before a byte moves, on real file systems."""

import os
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounts import mounted, remount, tmpfs

from grokctl.checks import Status
from grokctl.errors import DiskFullError, FetchError
from grokctl.fetch import FetchOptions, fetch, plan_fetch
from grokctl.machine.disks import file_system
from grokctl.text import format_bytes

ROOM = 4 * 2**20


def check(planned, name):
    (found,) = [check for check in planned.checks if check.name == name]
    return found


def content(root):
    return {path for path in root.rglob("*") if path.is_file()}


def test_a_disk_without_names_left_is_found_out_before_a_byte_moves(swarm, torrent_file, tmp_path):
    with tmpfs(tmp_path / "disk", f"size={ROOM},nr_inodes=12") as disk:
        planned = plan_fetch(str(torrent_file), disk / "got", swarm.options())
        with pytest.raises(
            DiskFullError, match=r"expected room for \d+ more files, found \d+"
        ) as e:
            fetch(str(torrent_file), disk / "got", swarm.options())
        left_behind = content(disk)
        remount(disk, "nr_inodes=100")
        fetched = fetch(str(torrent_file), disk / "got", swarm.options())

        assert not planned.fits
        assert check(planned, "files").status is Status.FAIL
        assert check(planned, "disk").status is Status.OK
        assert e.value.hint == f"df -i {disk / 'got'}"
        assert left_behind == set()
        assert fetched.is_complete
        swarm.assert_arrived(disk / "got")


def test_names_for_all_files_and_none_for_grokctls_own_are_too_few(swarm, torrent_file, tmp_path):
    with tmpfs(tmp_path / "disk", f"size={ROOM}") as disk:
        taken = os.statvfs(disk)
        room = taken.f_files - taken.f_ffree + len(swarm.files)
        remount(disk, f"nr_inodes={room}")
        with pytest.raises(DiskFullError, match="more files"):
            fetch(str(torrent_file), disk / "got", swarm.options())

        assert content(disk) == set()


def test_files_that_are_there_need_no_name_twice(swarm, torrent_file, tmp_path):
    with tmpfs(tmp_path / "disk", f"size={ROOM}") as disk:
        fetch(str(torrent_file), disk / "got", swarm.options())
        taken = os.statvfs(disk)
        room = taken.f_files - taken.f_ffree + len(swarm.files) - 1
        remount(disk, f"nr_inodes={room}")

        assert fetch(str(torrent_file), disk / "got", swarm.options()).is_complete


@contextmanager
def largest_file(nbytes):
    """What `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_the_size_of_files_is_found_out_before_a_byte_moves(
    swarm, torrent_file, tmp_path
):
    largest = max(file.length for file in swarm.metainfo.files)

    with largest_file(largest - 1):
        planned = plan_fetch(str(torrent_file), tmp_path / "got", swarm.options())
        with pytest.raises(DiskFullError, match=f"files of {largest:,} bytes.*ulimit -f") as caught:
            fetch(str(torrent_file), tmp_path / "got", swarm.options())
    left_behind = content(tmp_path / "got")
    with largest_file(largest):
        fetch(str(torrent_file), tmp_path / "got", swarm.options())

    assert check(planned, "file size").status is Status.FAIL
    assert caught.value.hint == "ulimit -f unlimited"
    assert left_behind == set()
    swarm.assert_arrived(tmp_path / "got")


def test_a_limit_that_only_unwanted_files_break_is_no_obstacle(swarm, torrent_file, tmp_path):
    smallest = swarm.options(only=("config.json",))

    with largest_file(200_000):
        assert fetch(str(torrent_file), tmp_path / "got", smallest).nbytes < 200_000


def test_what_kind_of_file_system_a_folder_lies_on_is_known(tmp_path):
    # vfat, which cannot hold files of 4 GB, needs tools and rights that few machines give
    with tmpfs(tmp_path / "disk", "size=64k") as disk:
        assert file_system(disk) == "tmpfs"
    if Path("/proc/self").exists():
        assert file_system(Path("/proc")) == "proc"


def test_a_folder_that_became_read_only_is_an_error_and_not_touched(swarm, torrent_file, tmp_path):
    with tmpfs(tmp_path / "disk", f"size={ROOM}") as disk:
        fetch(str(torrent_file), disk / "got", swarm.options(only=("tensor00001*",)))
        remount(disk, "ro")
        before = {path: path.stat().st_mtime_ns for path in disk.rglob("*")}
        planned = plan_fetch(str(torrent_file), disk / "got", swarm.options())
        with pytest.raises(FetchError, match="cannot be written to") as caught:
            fetch(str(torrent_file), disk / "got", swarm.options())

        assert caught.type is FetchError
        assert check(planned, "destination").status is Status.FAIL
        assert {path: path.stat().st_mtime_ns for path in disk.rglob("*")} == before


def test_a_read_only_view_of_a_folder_is_one_too(swarm, torrent_file, tmp_path):
    (tmp_path / "folder").mkdir()
    with mounted(tmp_path / "view", "mount", "--bind", tmp_path / "folder") as view:
        remount(view, "bind,ro")
        with pytest.raises(FetchError, match=r"Read-only|cannot be written to"):
            fetch(str(torrent_file), view / "got", swarm.options())

    assert list((tmp_path / "folder").iterdir()) == []


def test_a_plan_lists_every_check_and_what_each_found(swarm, torrent_file, tmp_path):
    options = swarm.options(trackers=("udp://127.0.0.1:1", "http://no.such.name.invalid/a"))

    planned = plan_fetch(str(torrent_file), tmp_path / "got", options)

    named = {found.name: found for found in planned.checks}
    assert {"disk", "file size", "destination", "certificates", "trackers"} <= named.keys()
    assert planned.fits
    assert format_bytes(swarm.metainfo.total) in named["disk"].detail
    assert "1 of 2" in named["trackers"].detail
    assert "no.such.name.invalid" in named["trackers"].detail
    assert list(tmp_path.iterdir()) == [torrent_file]


def test_trackers_and_mirrors_that_cannot_be_found_are_a_warning(swarm, torrent_file, tmp_path):
    options = swarm.options(
        trackers=("http://no.such.name.invalid/a",), mirrors=("http://nor.this.invalid/",)
    )

    planned = plan_fetch(str(torrent_file), tmp_path / "got", options)

    assert check(planned, "trackers").status is Status.WARN
    assert check(planned, "mirrors").status is Status.WARN
    assert planned.fits


def test_behind_a_proxy_no_name_is_looked_up_here(torrent_file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *names, **_: asked.append(names))
    options = FetchOptions(
        proxy="socks5://127.0.0.1:9",
        trackers=("http://secret.invalid/a",),
        mirrors=("http://secret.invalid/",),
    )

    plan_fetch(str(torrent_file), tmp_path / "got", options)

    assert asked == []


def test_certificates_that_are_not_there_are_a_warning(swarm, torrent_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing.pem"))

    planned = plan_fetch(str(torrent_file), tmp_path / "got", swarm.options())

    assert check(planned, "certificates").status is Status.WARN
    assert "nothing.pem" in check(planned, "certificates").detail


def test_what_takes_no_room_on_disk_counts_as_missing(swarm, torrent_file, tmp_path):
    root = tmp_path / "got"
    fetch(str(torrent_file), root, swarm.options())
    largest = max((root / name for name in swarm.files), key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    largest.unlink()
    with largest.open("wb") as file:
        file.truncate(size)

    planned = plan_fetch(str(torrent_file), root, swarm.options())

    assert planned.wanted_nbytes - planned.present_nbytes == size


def test_a_dry_look_changes_nothing_in_a_folder_that_is_half_full(swarm, torrent_file, tmp_path):
    root = tmp_path / "got"
    fetch(str(torrent_file), root, swarm.options(only=("tensor00001*",)))
    before = {path: (path.lstat().st_mtime_ns, stat.S_IMODE(path.lstat().st_mode))
              for path in tmp_path.rglob("*")}  # fmt: skip

    planned = plan_fetch(str(torrent_file), root, swarm.options())

    after = {path: (path.lstat().st_mtime_ns, stat.S_IMODE(path.lstat().st_mode))
             for path in tmp_path.rglob("*")}  # fmt: skip
    assert after == before
    assert 0 < planned.present_nbytes < planned.wanted_nbytes
