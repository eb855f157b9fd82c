"""Main memory in cgroups of both versions, one within another, and without any."""

import os
from types import SimpleNamespace

import psutil
import pytest

from grokctl.inference.memory_check import check_memory
from grokctl.machine.memory import memory

GB = 10**9
NO_LIMIT = 9223372036854771712
"""What version 1 says where there is none."""


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """One of 64 GB, 60 of them free."""
    found = SimpleNamespace(total=64 * GB, available=60 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def version_2(root, path, limit, used, *, cached=0) -> None:
    folder = root / "sys/fs/cgroup" / path.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    stat = f"anon {used}\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached // 2}\n"
    (folder / "memory.stat").write_text(stat)


def version_1(root, path, limit, used, *, cached=0) -> None:
    folder = root / "sys/fs/cgroup/memory" / path.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"inactive_file 7\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
    (folder / "memory.stat").write_text(stat)


def is_in(root, *lines) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_without_cgroups_all_that_is_free_can_be_taken(tmp_path):
    found = memory(tmp_path)

    assert (found.limit, found.used, found.shm) == (None, 0, None)
    assert found.usable == found.available == 60 * GB


def test_a_limit_leaves_what_is_not_used(tmp_path):
    is_in(tmp_path, "0::/user.slice/job")
    version_2(tmp_path, "/user.slice/job", 16 * GB, 10 * GB)

    found = memory(tmp_path)

    assert (found.limit, found.used, found.usable) == (16 * GB, 10 * GB, 6 * GB)


def test_files_that_were_read_do_not_count(tmp_path):
    is_in(tmp_path, "0::/job")
    version_2(tmp_path, "/job", 16 * GB, 15 * GB, cached=12 * GB)

    assert memory(tmp_path).usable == 13 * GB


def test_the_group_that_leaves_least_is_the_one_that_counts(tmp_path):
    is_in(tmp_path, "0::/outer/inner")
    version_2(tmp_path, "/outer", 20 * GB, 19 * GB)
    version_2(tmp_path, "/outer/inner", 8 * GB, 2 * GB)

    found = memory(tmp_path)

    assert (found.limit, found.usable) == (20 * GB, GB)


def test_a_container_that_sees_itself_as_the_topmost_finds_its_limit(tmp_path):
    is_in(tmp_path, "0::/system.slice/docker-0123.scope")
    version_2(tmp_path, "/", 4 * GB, 3 * GB)

    assert memory(tmp_path).usable == GB


def test_version_1_is_read_too(tmp_path):
    is_in(tmp_path, "12:cpu,cpuacct:/job", "7:memory:/job", "1:name=systemd:/", "0::/")
    version_1(tmp_path, "/", NO_LIMIT, 50 * GB)
    version_1(tmp_path, "/job", 32 * GB, 30 * GB, cached=20 * GB)

    found = memory(tmp_path)

    assert (found.limit, found.used) == (32 * GB, 10 * GB)


@pytest.mark.parametrize("limit", ["max", NO_LIMIT, 64 * GB, "", "many", "-"])
def test_what_is_no_limit_is_none(tmp_path, limit):
    is_in(tmp_path, "0::/job")
    version_2(tmp_path, "/job", limit, 10 * GB)

    assert memory(tmp_path).limit is None


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    is_in(tmp_path, "0::/job")
    version_2(tmp_path, "/job", 4 * GB, 5 * GB)

    assert memory(tmp_path).usable == 0


def test_a_path_that_leads_out_stays_inside(tmp_path):
    is_in(tmp_path, "0::/../../../../job")
    version_2(tmp_path, "/job", 4 * GB, GB)

    assert memory(tmp_path).limit == 4 * GB


def test_garbage_is_not_believed(tmp_path):
    is_in(tmp_path, "", "nonsense", "0", "0:", "0::", "::::")
    version_2(tmp_path, "/", 16 * GB, 8 * GB)
    stat = tmp_path / "sys/fs/cgroup/memory.stat"
    stat.write_bytes(b"inactive_file\nactive_file x\n\xff\xfe\ninactive_file -5\n")

    assert memory(tmp_path).used == 8 * GB


def test_shared_memory_is_as_large_as_its_file_system(tmp_path):
    (tmp_path / "dev/shm").mkdir(parents=True)
    there = os.statvfs(tmp_path / "dev/shm")

    assert memory(tmp_path).shm == there.f_blocks * there.f_frsize


def test_the_memory_of_this_machine_is_read():
    found = memory()

    assert 0 < found.usable <= found.available
    check_memory(found.usable // 2, purpose="half of it")
