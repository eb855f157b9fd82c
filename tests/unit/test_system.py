import ast
import os
from pathlib import Path

import pytest

import grokctl
from grokctl.checkpoint.frames import Unpacker
from grokctl.system import Reading, announce, usable_cores


@pytest.mark.parametrize(
    ("files", "most"),
    [
        pytest.param({"sys/fs/cgroup/cpu.max": "100000 100000"}, 1, id="topmost group"),
        pytest.param({"sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1, id="half a core"),
        pytest.param(
            {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "150000 100000"},
            1,
            id="a group around ours",
        ),
        pytest.param({"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, None, id="no limit"),
        pytest.param({"sys/fs/cgroup/a/b/cpu.max": "1 0\n"}, None, id="no period"),
        pytest.param({"sys/fs/cgroup/a/b/cpu.max": "one two three"}, None, id="garbage"),
        pytest.param(
            {
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
            },
            1,
            id="version 1",
        ),
        pytest.param(
            {
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
            },
            None,
            id="version 1, no limit",
        ),
        pytest.param({}, None, id="no cgroups"),
    ],
)
def test_cores_are_those_that_the_cgroup_allows(tmp_path, files, most):
    for name, text in {"proc/self/cgroup": "4:cpu,cpuacct:/c\n0::/a/b\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert usable_cores(tmp_path) == (most or len(os.sched_getaffinity(0)))


def test_fewer_cores_by_affinity_are_fewer_threads_everywhere(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})

    assert usable_cores() == 1
    assert Unpacker()._pool._max_workers == 1


def test_one_function_counts_cores():
    root = Path(grokctl.__file__).parent
    counting = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in COUNTERS)
        or (isinstance(node, ast.alias) and node.name in COUNTERS)
    }

    assert counting == {"system.py"}


COUNTERS = {"cpu_count", "process_cpu_count", "sched_getaffinity"}


@pytest.mark.parametrize("reading", Reading)
def test_what_will_be_read_is_told_to_the_kernel(tmp_path, monkeypatch, reading):
    path, heard, real = tmp_path / "file", [], os.posix_fadvise
    path.write_bytes(bytes(8192))
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: [heard.append(given), real(*given)])

    with path.open("rb") as file:
        announce(file.fileno(), reading, offset=4096, nbytes=100)
        expected = [(file.fileno(), 4096, 100, getattr(os, reading.value))]

    assert heard == expected


def test_a_system_or_a_file_that_takes_no_advice_is_left_alone(monkeypatch):
    reader, writer = os.pipe()
    announce(reader, Reading.IN_ORDER)  # ESPIPE
    monkeypatch.delattr(os, "posix_fadvise")
    announce(reader, Reading.SOON)
    os.close(reader)
    os.close(writer)
