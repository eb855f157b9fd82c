from itertools import product
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from machines import CUDA, EMPTY, HERE, HOME, PLAIN, stock

from grokctl.diagnosis.inventory import (
    KeptReady,
    KeptRelease,
)
from grokctl.doctor import doctor
from grokctl.machine.facts import (
    Accelerator,
    Cpu,
    Disk,
    Found,
    JaxReport,
    Machine,
    Memory,
    Network,
    Nvml,
    Software,
    Surroundings,
)
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision

words = st.sampled_from(["", "gpu", "tpu", "cpu", "0", "0.10.2", "x\ny", "-1", "nan", "∞", "\0"])


sizes = st.integers(0, 2**63)


maybe = st.none() | sizes


rates = st.none() | st.floats(0, 1e13)


gpus = st.lists(
    st.builds(
        Accelerator,
        name=words,
        platform=st.sampled_from(["gpu", "tpu"]),
        memory=maybe,
        free=maybe,
        compute_capability=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 9)),
        has_nvlink=st.none() | st.booleans(),
    ),
    max_size=17,
).map(tuple)


packages = st.sampled_from([*CUDA, "jax-cuda13-plugin", "jax_cuda", "jax-cuda-plugin", "numpy"])


names = st.sampled_from(
    [
        "JAX_PLATFORMS",
        "XLA_FLAGS",
        "CUDA_VISIBLE_DEVICES",
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "NCCL_P2P_DISABLE",
        "LD_LIBRARY_PATH",
        "JAX_NUM_CPU_DEVICES",
        "TMPDIR",
    ]
)


machines = st.builds(
    Machine,
    nvml=st.builds(
        Nvml,
        found=st.sampled_from(Found),
        error=words,
        driver=words,
        cuda=st.sampled_from(["", "11.8", "12.8", "?"]),
        gpus=gpus,
    ),
    jax=st.builds(
        JaxReport,
        found=st.sampled_from(Found),
        error=words,
        platform=st.sampled_from(["", "cpu", "gpu", "tpu"]),
        accelerators=gpus,
        seconds=st.floats(0, 1e6),
    ),
    cpu=st.builds(
        Cpu,
        model=words,
        architecture=words,
        cores=st.integers(1, 9999),
        flags=st.lists(words).map(tuple),
        bandwidth=rates,
    ),
    memory=st.builds(Memory, total=sizes, available=sizes, limit=maybe, used=sizes, shm=maybe),
    disks=st.lists(
        st.builds(
            Disk,
            purpose=st.sampled_from(["home", "destination"]),
            path=st.sampled_from([HOME, Path("/a b/'$(x)")]),
            total=maybe,
            free=maybe,
            file_system=st.sampled_from(["", "ext4", "vfat", "tmpfs", "nfs", "overlay"]),
            is_remote=st.booleans(),
            is_writable=st.booleans(),
            write_rate=rates,
            read_rate=rates,
            error=words,
        ),
        max_size=3,
    ).map(tuple),
    software=st.builds(
        Software,
        grokctl=words,
        python=words,
        system=words,
        packages=st.dictionaries(packages, words),
    ),
    surroundings=st.builds(
        Surroundings,
        cluster=st.sampled_from(["", "Slurm", "Open MPI", "Kubernetes", "Cloud TPU", "?"]),
        processes=st.integers(0, 2**20),
        local_processes=st.integers(0, 2**20),
        variables=st.dictionaries(names, words),
    ),
    network=st.builds(
        Network,
        proxy=words,
        certificates=words,
        has_certificates=st.booleans(),
        port=st.none() | st.integers(1, 65535),
        error=words,
    ),
    open_files=st.integers(0, 2**63),
    open_files_most=st.integers(0, 2**63),
)


stocks = st.lists(
    st.one_of(
        st.builds(
            KeptRelease,
            name=st.sampled_from(["grok-1", "x\ny", "-rf"]),
            root=st.just(HOME),
            is_grok_1=st.booleans(),
            nbytes=sizes,
            missing_nbytes=sizes,
            is_complete=st.booleans(),
            damage=words,
        ),
        st.builds(
            KeptReady,
            name=st.sampled_from(["grok-1", "x\ny", "-rf"]),
            root=st.just(HOME),
            is_grok_1=st.booleans(),
            precision=st.none() | st.sampled_from(Precision),
            mesh=st.none()
            | st.sampled_from([MeshShape(*shape) for shape in product((1, 2), (1, 8))]),
            nbytes=sizes,
            is_whole=st.booleans(),
            damage=words,
        ),
    ),
    max_size=3,
).map(lambda found: stock(*found))


@given(machine=machines, inventory=stocks)
@settings(max_examples=30, deadline=None)
def test_no_machine_is_too_strange(machine, inventory):
    found = doctor(machine, inventory, question=HERE)

    assert [a.name for a in found.abilities] == ["download", "reshard", "run"]
    assert all(made.name and made.detail for group in found.groups for made in group.checks)
    assert not any("None" in made.detail for group in found.groups for made in group.checks)


def test_a_machine_of_which_nothing_is_known_is_no_reason_to_fail():
    nothing = Machine(
        nvml=Nvml(found=Found.ABSENT),
        jax=JaxReport(found=Found.OK),
        cpu=Cpu(model="", architecture="", cores=1, flags=(), bandwidth=None),
        memory=Memory(total=0, available=0, limit=None),
        disks=(),
        software=Software(grokctl="", python="", system="", packages=PLAIN),
        surroundings=Surroundings(cluster="", processes=1, local_processes=1, variables={}),
        network=Network(proxy="", certificates="", has_certificates=False, port=None),
        open_files=1024,
        open_files_most=1024,
    )

    found = doctor(nothing, EMPTY, question=HERE)

    assert found.is_ok
    assert [a.status for a in found.abilities] == ["skip", "skip", "fail"]
