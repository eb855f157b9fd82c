"""Machines that are broken for real: drivers, plugins and disks that fail, hang or lie."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import pytest
from mounts import mounted, remount, tmpfs

from grokctl.events import Advanced, Finished, Started
from grokctl.machine import jax_report
from grokctl.machine.accelerators import JaxProbe
from grokctl.machine.disks import _bypass_cache, _read_rate, disk, probe_disks, write_rate
from grokctl.machine.facts import Found
from grokctl.machine.look import look


def ask_jax(*, timeout_s):
    with JaxProbe(timeout_s=timeout_s) as probe:
        return probe.report()


ASK_DRIVER = """
import json
from dataclasses import asdict
from grokctl.machine.accelerators import probe_driver
print(json.dumps(asdict(probe_driver(timeout_s={}).answer())))
"""
DRIVER = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int is(const char *how) { return !strcmp(getenv("DRIVER"), how); }
int nvmlInitWithFlags(unsigned flags) {
    if (is("hangs")) sleep(600);
    return is("unloaded") ? 9 : 0;
}
int nvmlShutdown(void) { return is("partial") ? 999 : 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    strcpy(text, "570.1\\033[31m"); return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *number) { *number = 12080; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return is("forbidden") ? 4 : 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = 0; return 0; }
#ifndef OLD
int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    strcpy(name, is("partial") ? "\\377" : "NVIDIA H100"); return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = 9; *minor = 0; return is("partial") ? 3 : 0;
}
int nvmlDeviceGetNvLinkState(void *handle, unsigned link, unsigned *active) {
    *active = is("linked") && link == 5; return is("partial") ? 999 : link < 18 ? 0 : 2;
}
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *next) {
    *now = is("split"); *next = 0; return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part) {
    *part = handle; return index < 3 ? 0 : 6;
}
#endif
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 85; memory[1] = 80; memory[2] = 5; return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Ask a driver that behaves as it is told."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build a driver with")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)

    def ask(how, *options, timeout_s=10.0):
        built = folder / "-".join(["built", *options])
        if not built.exists():
            built.mkdir()
            library = built / "libnvidia-ml.so.1"
            command = ["cc", "-shared", "-fPIC", *options, "-o", library, folder / "driver.c"]
            subprocess.run(command, check=True)
        environ = {**os.environ, "LD_LIBRARY_PATH": str(built), "DRIVER": how}
        asked = subprocess.run(
            [sys.executable, "-c", ASK_DRIVER.format(timeout_s)],
            env=environ,
            check=True,
            capture_output=True,
            timeout=30,
        )
        return json.loads(asked.stdout)

    return ask


@pytest.mark.parametrize(("how", "has_nvlink"), [("alone", False), ("linked", True)])
def test_a_driver_tells_of_its_gpus(driver, how, has_nvlink):
    told = driver(how)

    assert (told["found"], told["driver"], told["cuda"]) == ("ok", "570.1?[31m", "12.8")
    assert (
        told["gpus"]
        == [
            {
                "name": "NVIDIA H100",
                "platform": "gpu",
                "memory": 85,
                "free": 80,
                "compute_capability": [9, 0],
                "driver": "570.1?[31m",
                "has_nvlink": has_nvlink,
            }
        ]
        * 2
    )


def test_a_gpu_that_is_split_is_told_of_by_its_parts(driver):
    assert len(driver("split")["gpus"]) == 2 * 3


@pytest.mark.parametrize("options", [(), ("-DOLD",)])
def test_a_driver_that_answers_in_part_is_heard_in_part(driver, options):
    told = driver("partial", *options)

    assert told["found"] == "ok"
    assert [(gpu["name"], gpu["memory"]) for gpu in told["gpus"]] == [("NVIDIA GPU", 85)] * 2
    assert {gpu["compute_capability"] for gpu in told["gpus"]} == {None}
    assert {gpu["has_nvlink"] for gpu in told["gpus"]} == {None}


@pytest.mark.parametrize(
    ("how", "error"), [("unloaded", "Driver Not Loaded"), ("forbidden", "Insufficient Permissions")]
)
def test_a_driver_that_refuses_says_why(driver, how, error):
    told = driver(how)

    assert (told["found"], told["error"], told["gpus"]) == ("failed", error, [])


def test_a_driver_that_hangs_is_left_alone(driver):
    assert driver("hangs", timeout_s=0.2)["found"] == "silent"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Give JAX a plugin that does what it is told."""

    def install(code):
        folder = tmp_path / "plugins/jax_plugins/odd"
        folder.mkdir(parents=True)
        lines = "".join(f"    {line}\n" for line in code.splitlines())
        (folder / "__init__.py").write_text(
            f"import os, subprocess, sys, time\ndef initialize():\n{lines}"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plugins"))

    return install


def is_alive(pid):
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in {"Z", "X"}
    return False


def test_jax_is_asked_and_gone():
    report = ask_jax(timeout_s=30)

    assert (report.found, report.platform, report.accelerators) == (Found.OK, "cpu", ())
    assert report.error == ""
    assert report.seconds > 0


def test_what_jax_says_is_what_it_says_here():
    told = jax_report._report()

    assert told["platform"] == "cpu"
    assert told["devices"] == [
        {"kind": "cpu", "limit": None, "capability": ""} for _ in jax.local_devices()
    ]


def test_a_plugin_that_hangs_is_killed_with_all_that_it_started(plugin, tmp_path):
    plugin(
        f"started = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{started.pid}}')\n"
        f"print('still looking', file=sys.stderr, flush=True)\n"
        f"time.sleep(600)"
    )
    started = time.monotonic()

    report = ask_jax(timeout_s=4.0)

    assert time.monotonic() - started < 4 + 20
    assert report.found is Found.SILENT
    assert report.error == "JAX did not answer in 4 s; its last line: still looking"
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_what_was_said_in_time_is_heard_also_if_nobody_listened_then():
    with JaxProbe(timeout_s=3.0) as asking:
        asking._process.wait(30)
        asking._started -= 100
        report = asking.report()

    assert (report.found, report.platform) == (Found.OK, "cpu")
    assert report.seconds < 30


def test_one_that_never_stops_talking_is_not_listened_to_for_ever(tmp_path, monkeypatch):
    code = "import os\nwhile True: os.write(2, b'and another thing\\n' * 1000)"
    (tmp_path / "jax.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    report = ask_jax(timeout_s=1.0)

    assert report.found is Found.SILENT
    assert "; its last line: " in report.error
    assert report.seconds < 3


def test_jax_is_killed_when_nobody_waits_for_it_any_more(plugin):
    plugin("time.sleep(600)")

    def interrupted(asking):
        assert is_alive(asking._process.pid)
        raise KeyboardInterrupt

    asking = JaxProbe(timeout_s=60)
    pid = asking._process.pid
    with pytest.raises(KeyboardInterrupt), asking:
        interrupted(asking)

    assert not is_alive(pid)


def test_a_plugin_that_crashes_is_named_by_its_signal(plugin):
    plugin("os.write(2, b'the end\\n')\nos.abort()")

    report = ask_jax(timeout_s=30)

    assert report.found is Found.FAILED
    assert report.error == "JAX was ended by SIGABRT; its last line: the end"


def test_a_plugin_that_ends_the_process_leaves_one_that_it_started(plugin):
    plugin("subprocess.Popen(['sleep', '600'])\nos._exit(3)")

    report = ask_jax(timeout_s=30)

    assert (report.found, report.error) == (Found.FAILED, "JAX ended with status 3")
    assert report.seconds < 20


def test_what_a_plugin_prints_is_no_answer(plugin):
    plugin("print('{\"platform\": \"gpu\"}' * 100_000, flush=True)\nos.write(1, b'}\\n')")

    report = ask_jax(timeout_s=30)

    assert (report.found, report.platform) == (Found.OK, "cpu")


@pytest.mark.parametrize("said", [b'{"platform": 5}\n', b"\xff\n", b"[" * 2**21])
def test_a_plugin_that_answers_for_jax_is_not_believed(plugin, said):
    code = (
        f"    os.write(number, {said!r})"
        if len(said) < 99
        else "    os.write(number, b'[' * 2**21)"
    )
    plugin(f"for number in range(3, 30):\n  try:\n{code}\n  except OSError: pass")

    report = ask_jax(timeout_s=20)

    assert report.found is Found.FAILED
    assert report.seconds < 15


def test_what_a_plugin_complains_of_is_told(plugin):
    plugin("raise RuntimeError('driver too old\\x1b[31m')")

    report = ask_jax(timeout_s=30)

    assert (report.found, report.error) == (Found.OK, "RuntimeError: driver too old?[31m")


@pytest.mark.parametrize(
    ("code", "found", "error"),
    [
        pytest.param(
            "raise RuntimeError('jaxlib is version 9, but this version\\n  of jax wants 10')",
            Found.FAILED,
            "RuntimeError: jaxlib is version 9, but this version",
            id="versions that do not match",
        ),
        pytest.param(
            "raise ImportError('libx.so: cannot open')",
            Found.FAILED,
            "ImportError: libx.so: cannot open",
            id="broken",
        ),
        pytest.param(
            "raise ModuleNotFoundError(\"No module named 'jax'\", name='jax')",
            Found.ABSENT,
            "ModuleNotFoundError: No module named 'jax'",
            id="not installed",
        ),
        pytest.param("assert False", Found.FAILED, "AssertionError: assert False", id="no words"),
        pytest.param("import sys; sys.exit(7)", Found.FAILED, "JAX ended with status 7", id="exit"),
        pytest.param(
            "x = 1", Found.FAILED, "AttributeError: module 'jax' has no", id="another jax"
        ),
    ],
)
def test_a_jax_that_cannot_be_imported_is_told(tmp_path, monkeypatch, code, found, error):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    report = ask_jax(timeout_s=30)

    assert report.found is found
    assert report.error.startswith(error)


@pytest.mark.parametrize("pythonpath", [None, ":nowhere:"])
def test_files_of_the_users_folder_are_not_run(tmp_path, monkeypatch, pythonpath):
    for name in ("jax.py", "json.py", "grokctl.py", "sitecustomize.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    if pythonpath is not None:
        monkeypatch.setenv("PYTHONPATH", pythonpath)

    report = ask_jax(timeout_s=30)

    assert (report.found, report.error) == (Found.OK, "")
    assert not (tmp_path / "was-run").exists()


def test_jax_does_not_join_the_job_that_started_us(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "192.0.2.1",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "OMPI_MCA_orte_hnp_uri": "garbage",
    }.items():
        monkeypatch.setenv(name, value)

    assert ask_jax(timeout_s=30).found is Found.OK


def test_flags_that_xla_does_not_know_are_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_nobody=1")

    report = ask_jax(timeout_s=30)

    assert report.found is Found.FAILED
    assert "--xla_of_nobody" in report.error


def test_a_python_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nothing/python")

    report = ask_jax(timeout_s=30)

    assert report.found is Found.FAILED
    assert report.error == "Python does not start: No such file or directory"


def test_a_disk_is_tried_and_nothing_stays(tmp_path):
    found = disk("home", tmp_path / "not/yet/there", tries=True)

    assert found.is_writable
    assert found.write_rate > 0
    assert found.read_rate > 0
    assert found.free <= found.total
    assert found.error == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_not_to_be_tried_is_only_looked_at(tmp_path):
    found = disk("home", tmp_path, tries=False)

    assert (found.is_writable, found.write_rate, found.read_rate) == (True, None, None)


def test_one_disk_is_tried_once(tmp_path):
    (tmp_path / "file").touch()
    purposes = ("home", "destination", "a", "b", "c")

    found = probe_disks(
        [*((purpose, tmp_path / purpose) for purpose in purposes), ("d", tmp_path / "file/d")],
        tries=True,
        timeout_s=30,
    )()

    assert [each.purpose for each in found] == [*purposes, "d"]
    assert len({(each.write_rate, each.read_rate) for each in found[:5]}) == 1
    assert found[0].write_rate is not None
    assert (found[5].is_writable, found[5].write_rate) == (False, None)
    assert found[5].error == f"{tmp_path / 'file'} is not a folder"


def test_a_disk_that_is_full_is_not_tried(tmp_path):
    with tmpfs(tmp_path / "disk", "size=1M") as full:
        (full / "file").write_bytes(bytes(2**20))
        found = disk("home", full / "grokctl", tries=True)

    assert (found.total, found.free, found.file_system) == (2**20, 0, "tmpfs")
    assert found.error == "0 B are free, too few to measure"
    assert found.write_rate is None


def test_where_no_file_can_be_made_nothing_can_be_written():
    found = disk("home", Path("/proc/grokctl"), tries=True)

    assert (found.is_writable, found.write_rate) == (False, None)


def test_a_disk_without_room_for_names_cannot_be_written_to(tmp_path):
    with tmpfs(tmp_path / "disk", "size=1G,nr_inodes=2") as full:
        (full / "last").touch()
        found = disk("home", full, tries=True)

    assert (found.is_writable, found.error) == (False, "No space left on device")


def test_a_disk_that_is_mounted_read_only_says_so(tmp_path):
    with tmpfs(tmp_path / "disk", "size=1G") as still:
        remount(still, "ro")
        found = disk("home", still / "grokctl", tries=True)

    assert (found.is_writable, found.error) == (False, "it is mounted read-only")


def test_a_folder_that_is_closed_to_us_says_so():
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom grokctl.machine.disks import disk\n"
        "if os.geteuid() == 0:  # nothing is closed to root\n"
        "    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
        "found = disk('home', Path(sys.argv[1]) / 'deep/grokctl', tries=True)\n"
        "print(found.is_writable, found.write_rate, found.error)"
    )

    def told(folder):
        command = [sys.executable, "-c", code, folder]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        closed, hidden = folder / "closed", folder / "hidden"
        closed.mkdir(mode=0o555)
        hidden.mkdir(mode=0o000)
        found, lost = told(closed), told(hidden)

    assert found == f"False None no permission for {closed}\n"
    assert lost == "False None Permission denied\n"


def test_a_home_that_no_file_can_have_is_no_crash(tmp_path):
    found = disk("home", tmp_path / ("x" * 5000), tries=True)
    nothing = disk("home", Path("/nothing\0here"), tries=False)

    assert not found.is_writable or found.write_rate
    assert nothing.purpose == "home"


@contextmanager
def largest_file(nbytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_the_page_cache_cannot_be_gone_around_it_forgets(tmp_path):
    with (
        mounted(tmp_path / "disk", "mount", "-t", "ramfs", "ramfs") as plain,
        tempfile.TemporaryFile(dir=plain, buffering=0) as file,
    ):
        with pytest.raises(OSError, match="Invalid argument"):
            _bypass_cache(file)
        rate, why = write_rate(file, 2**22, seconds=5)

        assert rate > 0
        assert why == ""
        assert _read_rate(file, 2**22, seconds=5) > 0


def test_files_that_may_not_grow_are_measured_as_far_as_they_go(tmp_path):
    with largest_file(3 * 2**20 + 5):
        found = disk("home", tmp_path, tries=True)
    with largest_file(0):
        nothing = disk("home", tmp_path, tries=True)

    assert found.write_rate > 0
    assert found.read_rate > 0
    assert (nothing.is_writable, nothing.write_rate, nothing.read_rate) == (False, None, None)
    assert found.error.startswith("File too large: this process may write files of 3,145,733 bytes")
    assert nothing.error.startswith("File too large: this process may write files of 0 bytes")


def test_a_disk_that_hangs_is_left_alone(tmp_path):
    if shutil.which("mkfs.ext4") is None or shutil.which("fsfreeze") is None:
        pytest.skip("nothing to freeze a file system with")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(2**27)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with mounted(tmp_path / "disk", "mount", "-o", "loop", image) as frozen:
        subprocess.run(["fsfreeze", "-f", frozen], check=True)
        try:
            stuck, other = probe_disks(
                [("home", frozen), ("destination", tmp_path)], tries=True, timeout_s=2
            )()
        finally:
            subprocess.run(["fsfreeze", "-u", frozen], check=True)

    assert stuck.error == "it did not answer in 2 s"
    assert not stuck.is_writable
    assert other.write_rate


def test_killed_while_it_tries_a_disk_it_leaves_nothing(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom grokctl.machine.disks import disk\n"
        "print('now', flush=True)\ndisk('home', Path(sys.argv[1]), tries=True)"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(signal.SIGKILL)

    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_whole_machine_is_looked_at(tmp_path):
    seen = []

    machine = look(tmp_path / "home", tmp_path / "destination", observe=seen.append)

    assert [found.purpose for found in machine.disks] == ["home", "destination"]
    assert machine.disks[0].write_rate == machine.disks[1].write_rate
    assert machine.cpu.bandwidth > 0
    assert machine.memory.total >= machine.memory.usable > 0
    assert machine.jax.found is Found.OK
    assert 0 < machine.open_files <= machine.open_files_most
    assert isinstance(seen[0], Started)
    assert isinstance(seen[-1], Finished)
    assert [event.detail for event in seen[1:-1] if isinstance(event, Advanced)] == [
        "memory, NVIDIA driver",
        "disks, JAX",
        "NVIDIA driver",
        "JAX",
        "kernel of the CPU",
    ]


def test_without_measuring_it_is_only_looked_at(tmp_path):
    machine = look(tmp_path, None, is_measured=False)

    assert machine.cpu.bandwidth is None
    assert [(found.purpose, found.write_rate) for found in machine.disks] == [("home", None)]


def test_a_machine_without_proc_and_sys_is_one(tmp_path):
    hide = "mount -t tmpfs none /proc && mount -t tmpfs none /sys && exec"
    code = (
        "import sys\nfrom pathlib import Path\nfrom grokctl.machine.look import look\n"
        "machine = look(Path(sys.argv[1]), None, is_measured=False)\n"
        "print(machine.disks[0].error, machine.disks[0].is_writable, machine.jax.found, "
        "machine.memory.total > 0, machine.cpu.cores > 0)"
    )
    asked = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{hide} "$@"', "sh", sys.executable, "-c", code, tmp_path],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "Operation not permitted" in asked.stderr or "must be superuser" in asked.stderr:
        pytest.skip("only root may hide them")

    assert asked.stderr == ""
    assert asked.stdout == " True ok True True\n"
