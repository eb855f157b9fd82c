"""What is read from files and variables about a machine, whatever they hold."""

import os
import resource
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.machine import network as network_module
from grokctl.machine.accelerators import _last_line, _parsed
from grokctl.machine.disks import _REMOTE, _rate, file_system
from grokctl.machine.environment import software, surroundings, without_password
from grokctl.machine.facts import Found
from grokctl.machine.host import bandwidth, cpu
from grokctl.machine.network import certificates, network
from grokctl.machine.waiting import Waiting

SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, ("", 1, 1), id="nothing"),
        pytest.param(SLURM, ("Slurm", 16, 8), id="Slurm"),
        pytest.param(SLURM | {"SLURM_NTASKS_PER_NODE": "4"}, ("Slurm", 16, 4), id="Slurm's own"),
        pytest.param(
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "7(x2),2", "SLURM_NODEID": "2"},
            ("Slurm", 16, 2),
            id="Slurm, uneven",
        ),
        pytest.param(
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "7(x2", "SLURM_NODEID": "-1"},
            ("Slurm", 16, 8),
            id="Slurm, garbage of nodes",
        ),
        pytest.param(
            {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},
            ("Slurm", 1, 1),
            id="the script of a Slurm job, which runs alone",
        ),
        pytest.param(dict.fromkeys(SLURM, "x\0"), ("Slurm", 1, 1), id="Slurm, garbage"),
        pytest.param(
            SLURM | {"SLURM_NTASKS": "9" * 5000, "SLURM_STEP_NUM_NODES": "0"},
            ("Slurm", 1, 1),
            id="Slurm, too large",
        ),
        pytest.param(
            SLURM | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ("Open MPI", 4, 2),
            id="Open MPI within Slurm",
        ),
        pytest.param({"OMPI_MCA_orte_hnp_uri": ""}, ("Open MPI", 1, 1), id="Open MPI, no more"),
        pytest.param(
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("Kubernetes", 1, 1), id="Kubernetes"
        ),
        pytest.param(
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"},
            ("Cloud TPU", 4, 1),
            id="TPU in Kubernetes",
        ),
    ],
)
def test_a_cluster_is_known_by_what_jax_looks_at(environ, expected):
    found = surroundings(environ)

    assert (found.cluster, found.processes, found.local_processes) == expected


@given(
    st.dictionaries(
        st.sampled_from([*SLURM, "SLURM_NODEID", "SLURM_TASKS_PER_NODE", "TPU_PROCESS_ADDRESSES"])
        | st.text(),
        st.text() | st.from_regex(r"\A[0-9(),x²-]*\Z"),
    )
)
def test_no_environment_is_too_odd(environ):
    found = surroundings(environ)

    assert 1 <= found.local_processes <= found.processes
    "".join(found.variables.values()).encode()


def test_variables_that_change_what_happens_are_kept_and_no_others():
    told = {
        "XLA_FLAGS": "--xla_dump_to=/tmp/a@b",
        "JAX_PLATFORMS": "cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "NCCL_P2P_DISABLE": "1",
        "GROKCTL_HOME": "/data",
        "TMPDIR": "/scratch",
    }

    found = surroundings({**told, "HOME": "/home/me", "EDITOR": "vi", "AXLA_FLAGS": "x"})

    assert found.variables == told


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("HTTPS_PROXY", "http://me:secret@proxy:3128", "http://proxy:3128"),
        ("https_proxy", "http://me:se/cr@et@proxy:3128/", "http://proxy:3128/"),
        ("ALL_PROXY", "me:secret@proxy:3128", "proxy:3128"),
        ("ALL_PROXY", "socks5://me:sec://ret@proxy:1", "socks5://proxy:1"),
        ("NO_PROXY", "localhost,.example.org", "localhost,.example.org"),
        ("JAX_COMPILATION_CACHE_DIR", "s3://me:secret@host/x", "s3://host/x"),
    ],
)
def test_passwords_are_not_kept(name, value, kept):
    found = surroundings({name: value})

    assert found.variables == {name: kept}


@pytest.mark.parametrize("name", ["JAX_TOKEN", "GROKCTL_API_KEY", "TPU_secret_1", "NCCL_PASSWORD"])
def test_variables_with_the_names_of_secrets_are_not_kept(name):
    assert surroundings({name: "hidden"}).variables == {}


@given(st.text(), st.text(), st.sampled_from(["", "http://", "socks5h://"]))
def test_whatever_stands_in_front_of_a_host_is_cut_off(user, password, scheme):
    assert without_password(f"{scheme}{user}:{password}@proxy:1").endswith("proxy:1")
    secret = f"<{password}>"
    assert secret not in without_password(f"{scheme}{user}:{secret}@proxy:1")


def test_a_variable_that_is_no_text_can_be_shown():
    found = surroundings({"TMPDIR": os.fsdecode(b"/tmp/\xff")})

    assert found.variables == {"TMPDIR": "/tmp/�"}


def test_software_is_what_is_installed():
    found = software()

    assert found.packages["jax"]
    assert found.packages["numpy"]
    assert "pytest" not in found.packages
    assert found.system


def test_a_broken_installation_of_something_else_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "jax_rocm7_plugin-2.dist-info").mkdir()
    (tmp_path / "jax_rocm7_plugin-2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: jax-rocm7-plugin\nVersion: 2\n"
    )
    (tmp_path / "jaxlib-0.dist-info").mkdir()
    (tmp_path / "jaxlib-0.dist-info/METADATA").write_bytes(b"\xff\xfe\0")
    monkeypatch.syspath_prepend(tmp_path)

    assert software().packages["jax-rocm7-plugin"] == "2"


CPUINFO = """\
processor\t: 0
model name\t: A processor \x1b[31mof some kind
flags\t\t: fpu sse amx_bf16 avx512f avx512_bf16 avx2 avx512vl

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """\
processor\t: 0
Features\t: fp asimd sve sve2 bf16
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


@pytest.mark.parametrize(
    ("text", "model", "flags"),
    [
        pytest.param(
            CPUINFO.encode(),
            "A processor ?[31mof some kind",
            ("amx_bf16", "avx2", "avx512_bf16", "avx512f"),
            id="x86",
        ),
        pytest.param(ARM.encode(), "CPU 0x41 0xd4f", ("asimd", "bf16", "sve", "sve2"), id="ARM"),
        pytest.param(b"\xff\xfe:\n:::\n\n", None, (), id="garbage"),
        pytest.param(None, None, (), id="no /proc"),
    ],
)
def test_a_processor_says_what_it_is(tmp_path, text, model, flags):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_bytes(text)

    found = cpu(tmp_path)

    assert found.flags == flags
    assert found.model == model if model else found.model
    assert found.bandwidth is None


@pytest.mark.parametrize(
    ("line", "is_fast"),
    [
        ("flags : avx512f avx512_bf16 amx_bf16", True),
        ("flags : avx512f avx512_bf16", True),  # Zen 4, Cooper Lake
        ("flags : avx2 avx512f avx512_vnni amx_int8", False),
        ("Features : asimd bf16 i8mm", True),
        ("Features : asimd sve svebf16", True),
        ("Features : asimd sve", False),
    ],
)
def test_a_processor_that_multiplies_bfloat16_is_known_by_its_flags(tmp_path, line, is_fast):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"{line}\n")

    assert cpu(tmp_path).has_fast_bfloat16 is is_fast


def test_memory_is_read_at_some_speed_and_not_where_there_is_too_little():
    assert 1e8 < bandwidth(nbytes=2**26, rounds=1) < 1e13
    assert cpu(available=2**20).bandwidth is None


def test_memory_that_is_not_given_is_not_measured():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, hard))
    try:
        found = cpu(available=2**34).bandwidth
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    assert found is None


GPU = (
    b'{"platform": "gpu", "devices": [{"kind": "H", "limit": 750, "capability": "9.0"}],'
    b' "seconds": 1}\n'
)


def test_the_limit_of_a_gpu_stands_for_the_share_that_jax_was_told():
    whole, told = (
        _parsed(GPU, environ, "").accelerators[0]
        for environ in ({}, {"XLA_CLIENT_MEM_FRACTION": "0.5"})
    )

    assert whole.memory == 1000
    assert told.memory == 1500
    assert whole.compute_capability == (9, 0)


@pytest.mark.parametrize(
    ("platform", "expected", "memory"),
    [("cuda", "gpu", 1000), ("rocm", "gpu", 1000), ("tpu", "tpu", 750)],
)
def test_platforms_are_called_by_their_kind(platform, expected, memory):
    report = _parsed(GPU.replace(b'"gpu"', f'"{platform}"'.encode()), {}, "")

    assert report.platform == expected
    assert [device.platform for device in report.accelerators] == [expected]
    assert report.accelerators[0].memory == memory


@pytest.mark.parametrize("seconds", [b"-1", b"NaN", b"Infinity", b"1e999"])
def test_a_time_that_is_none_is_not_told(seconds):
    assert _parsed(GPU.replace(b": 1}", b": " + seconds + b"}"), {}, "").seconds == 0


@pytest.mark.parametrize("limit", [b"null", b"-1", b"true", b"1e3", b'"7"', b"1" + b"0" * 400])
def test_a_limit_that_is_none_is_not_taken_for_memory(limit):
    assert _parsed(GPU.replace(b"750", limit), {}, "").accelerators[0].memory is None


@pytest.mark.parametrize(
    "answer",
    [
        b"\n",
        b"\xff\n",
        b"7\n",
        b"[]\n",
        b"{}\n",
        b'{"error": 7}\n',
        b'{"platform": "gpu"}\n',
        b'{"platform": "gpu", "devices": 7}\n',
        b'{"platform": "gpu", "devices": []}\n',
        b'{"platform": "gpu", "devices": [], "seconds": 1' + b"0" * 400 + b"}\n",
        b'{"platform": "gpu", "devices": [7]}\n',
        b'{"platform": ["gpu"], "devices": []}\n',
        b"[" * 100_000 + b"\n",
        b"1" * 10_000 + b"\n",
    ],
)
def test_an_answer_that_is_none_is_refused(answer):
    with pytest.raises(ValueError, match=r"."):
        _parsed(answer, {}, "")


@given(st.binary())
def test_no_answer_is_too_odd(answer):
    with suppress(ValueError):
        assert _parsed(answer, {}, "").found in set(Found)


@pytest.mark.parametrize(
    ("complaints", "expected"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"WARNING:2026-01-02 03:04:05,678:jax._src.xla_bridge:794: no plugin\n", "no plugin"),
        (b"F1121 14:48:46.519559   11978 parse.cc:234] Unknown flag\n", "Unknown flag"),
        (
            b"Traceback (most recent call last):\n  x = y\nRuntimeError: no\n---------\n",
            "RuntimeError: no",
        ),
        (b"\x1b[2J\xff\n", "?[2J�"),
    ],
)
def test_the_last_line_are_those_that_say_something(complaints, expected):
    assert _last_line(complaints) == expected


def test_nobody_waits_longer_than_allowed_and_errors_come_back():
    blocked = threading.Event()

    def fail() -> None:
        raise LookupError("lost")

    silent = Waiting(blocked.wait, timeout_s=0.05, default=None)
    failing = Waiting(fail, timeout_s=5, default=None)

    assert silent.answer() is None
    with pytest.raises(LookupError, match="lost"):
        failing.answer()
    assert Waiting(lambda: 7, timeout_s=5, default=0).answer() == 7
    blocked.set()


def test_where_no_thread_can_be_had_questions_are_answered_all_the_same():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    usual = threading.stack_size(2**28)  # none of the stacks that ended threads left is as large
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, hard))
    try:
        asked = Waiting(lambda: 7, timeout_s=5, default=0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        threading.stack_size(usual)

    assert asked.answer() == 7


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "9p", "ceph", "fuse", "fuseblk", "fuse.sshfs", "lustre", "gpfs"]
)
def test_networks_and_fuse_are_remote(kind):
    assert _REMOTE.fullmatch(kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "fusectl", ""])
def test_other_file_systems_are_not(kind):
    assert not _REMOTE.fullmatch(kind)


MOUNTS = r"""
1 0 7:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
2 1 7:2 / {0} rw,relatime - btrfs /dev/vdb rw
3 1 7:3 / {0}/deeper rw,relatime - xfs /dev/vdc rw
4 1 7:4 / {0}/a\040b rw,relatime - zfs tank rw
5 1
6 1 7:5 / {0} rw,relatime -
"""


@pytest.mark.parametrize(("name", "kind"), [(".", "btrfs"), ("c", "btrfs"), ("a b/d", "zfs")])
def test_a_file_system_with_a_number_of_its_own_is_known_by_its_place(tmp_path, name, kind):
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.replace("\\\\", "\\").format(tmp_path))

    assert file_system(tmp_path / name, table=table) == kind
    assert file_system(tmp_path / name, table=tmp_path / "nothing") == ""


def test_an_error_in_the_middle_keeps_what_was_measured():
    sizes = []

    def move(size: int) -> int:
        if len(sizes) == 3:
            raise OSError(28, "No space left on device")
        sizes.append(size)
        return size

    rate, why = _rate(move, 2**40, seconds=60)

    assert rate is not None
    assert why == "No space left on device"
    assert sizes == [2**20, 2**21, 2**22]


def test_a_port_that_is_taken_is_replaced_by_another(monkeypatch):
    with (
        closing(socket.socket()) as stream,
        closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as packets,
    ):
        stream.bind(("0.0.0.0", 0))
        stream.listen()
        packets.bind(("0.0.0.0", 0))
        for taken in (stream, packets):
            monkeypatch.setattr(network_module, "_PORT", taken.getsockname()[1])
            found = network({})

            assert found.port not in {None, 0, taken.getsockname()[1]}
            assert "already in use" in found.error


def test_a_port_that_is_bound_is_free_again():
    first = network({})
    second = network({})

    assert first.port is not None
    assert second.port is not None


def test_where_no_socket_can_be_had_there_is_no_port():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        found = network({"SSL_CERT_FILE": "/" + "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert found.port is None
    assert "Too many open files" in found.error
    assert not found.has_certificates


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ""),
        ({"HTTPS_PROXY": "", "http_proxy": "http://a:1"}, "http://a:1"),
        ({"all_proxy": "socks5://me:pw@b:2", "HTTP_PROXY": "http://a:1"}, "socks5://b:2"),
    ],
)
def test_a_proxy_is_read_from_the_usual_variables(environ, expected):
    assert network(environ).proxy == expected


def test_certificates_are_found_where_libtorrent_does_not_look(monkeypatch, tmp_path):
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    monkeypatch.setattr(network_module, "BUILT_IN_CA_BUNDLES", ())
    monkeypatch.setattr(network_module, "_OTHER_CA_BUNDLES", (str(bundle),))
    monkeypatch.setattr(
        network_module.ssl, "get_default_verify_paths", lambda: SimpleNamespace(cafile=None)
    )

    seen = network({})

    assert (seen.certificates, seen.has_certificates) == (str(bundle), True)
    assert certificates({}) == str(bundle)
    assert certificates({"SSL_CERT_FILE": "another"}) == "another"
