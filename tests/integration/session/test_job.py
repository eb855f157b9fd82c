"""Jobs on machines with accelerators: real checkpoints, and devices that only report."""

import hashlib
import shutil
from dataclasses import dataclass, replace

import jax
import pytest
from cuts import cut, proven_release

from grokctl.checkpoint import receipt as receipts
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import build_metainfo, parse_metainfo
from grokctl.checkpoint.trust import TYPED, write_source
from grokctl.errors import CorruptCheckpointError, HardwareError
from grokctl.events import Noted, ignore
from grokctl.inference.devices import accelerators
from grokctl.machine.facts import Accelerator, Memory
from grokctl.model.placement import MESH_SIZES, MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.paths import Home
from grokctl.planning.selection import Asked
from grokctl.session.candidates import find_candidates
from grokctl.session.choice import settle
from grokctl.session.doubts import doubts_of_ready
from grokctl.session.job import EngineJob, JobRequest, open_job
from grokctl.verify import verify

WORDS = replace(MINIATURE, sequence_len=2048, num_layers=2, vocab_size=512, emb_size=96, key_size=8)
H100 = "NVIDIA H100 80GB HBM3"
PLENTY = 2**36


@dataclass
class Device:
    """A GPU as JAX describes it."""

    device_kind: str = H100
    platform: str = "gpu"
    compute_capability: str = "9.0"
    limit: int | None = PLENTY
    used: int = 0

    def memory_stats(self) -> dict[str, int] | None:
        if self.limit is None:
            return None
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


@pytest.fixture
def having(monkeypatch):
    """Let JAX report other devices than this machine's."""

    def have(*devices: Device) -> None:
        monkeypatch.setattr(jax, "devices", lambda *_: list(devices))

    return have


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "words"
    write_miniature(root, WORDS)
    return open_release(root)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def opened(release, home):
    """Reshard like `int8-8`, open a job, and return it with its notes."""

    def open_it(*names: str, mesh: MeshShape | None = None) -> tuple[EngineJob, str]:
        for name in names:
            precision, _, devices = name.partition("-")
            expert, _, model = devices.rpartition("x")
            shape = MeshShape(int(expert or 1), int(model))
            cut(release, shape, home.ready / f"words-{name}", precision=Precision(precision))
        events = []
        job = open_job(JobRequest(home=home, mesh=mesh), observe=events.append)
        return job, "\n".join(event.message for event in events if isinstance(event, Noted))

    return open_it


# --- devices


def test_a_gpu_tells_its_name_its_memory_and_what_it_can(having):
    having(Device(limit=70, used=20), Device(limit=70))

    first, second = accelerators()

    assert first == Accelerator(
        name=H100, platform="gpu", memory=70, free=50, compute_capability=(9, 0)
    )
    assert second.free == 70


@pytest.mark.parametrize("capability", ["gfx942", "", "9", "9.x"])
def test_what_is_no_compute_capability_is_none(having, capability):
    having(Device(compute_capability=capability, limit=None))

    (found,) = accelerators()

    assert (found.compute_capability, found.memory, found.free) == (None, None, None)


def test_devices_of_another_kind_are_not_counted(having):
    having(Device(), Device(), Device(device_kind="A display"), Device())

    assert len(accelerators()) == 2


def test_a_cpu_is_no_accelerator_and_has_devices_for_any_mesh():
    assert accelerators() == ()
    assert len(jax.devices("cpu")) == max(MESH_SIZES)


# --- jobs


def test_on_gpus_the_checkpoint_for_all_of_them_is_opened(having, opened):
    having(*[Device()] * 8)

    job, said = opened("int8-8", "int4-8", "int8-16")

    assert job.options.mesh == MeshShape(1, 8)
    assert job.options.compute is Compute.BFLOAT16
    assert job.options.context == job.plan.context == WORDS.sequence_len
    assert f"words-int8-8 on 8 x {H100} (model=8), bfloat16, context 2,048: " in said
    assert "on each, the fastest of 3 checkpoints" in said
    assert "slower to load" not in said


def test_a_checkpoint_for_more_gpus_is_cut_again_for_those_that_are_there(having, opened):
    having(*[Device()] * 8)

    job, said = opened("int8-16")

    assert job.options.mesh.size <= 8
    assert "words-int8-16 on " in said
    assert f"resharded for model=16, runs on {job.options.mesh}: slower to load" in said


def test_where_that_does_not_fit_it_is_opened_for_virtual_devices(having, opened):
    having(*[Device(limit=2**10)] * 8)

    job, said = opened("int8-16")

    assert job.options.mesh == MeshShape(1, 16)
    assert "words-int8-16 on the CPU as 16 devices (model=16)" in said


def test_gpus_that_are_too_small_are_refused_with_the_numbers(having, opened):
    having(*[Device(limit=10**5)] * 8)

    with pytest.raises(HardwareError) as caught:
        opened("int8-8", "int8-4")

    assert "are free on each" in str(caught.value)
    assert "100.0 kB" in str(caught.value)
    assert caught.value.hint == "JAX_PLATFORMS=cpu grokctl run …"


def test_memory_that_is_in_use_is_not_there(having, opened):
    having(Device(), Device(limit=PLENTY, used=PLENTY - 10**5))

    with pytest.raises(HardwareError, match=r"100\.0 kB are free"):
        opened("int8-2", mesh=MeshShape(1, 2))


def test_a_mesh_for_more_gpus_than_there_are_is_for_virtual_devices(having, opened):
    having(Device())

    job, said = opened("int8-1", mesh=MeshShape(1, 4))

    assert job.options.mesh == MeshShape(1, 4)
    assert "on the CPU as 4 devices" in said


def test_gpus_before_ampere_compute_in_float32(having, opened):
    having(Device(device_kind="Tesla V100-SXM2-32GB", compute_capability="7.0"))

    job, said = opened("int8-1")

    assert job.options.compute is Compute.FLOAT32
    assert ", float32, " in said


def test_a_release_is_cut_for_the_gpus_that_are_there(having, opened, release, home):
    having(*[Device()] * 4)
    (home.releases).mkdir(parents=True)
    (home.releases / "words").symlink_to(release.root)

    job, said = opened(mesh=MeshShape(1, 4))
    chosen, _ = opened()

    assert job.options.mesh == MeshShape(1, 4)
    assert "reshards the release in memory" in said
    assert chosen.options.mesh.size <= 4


@pytest.mark.parametrize("machines", [1, 2])
def test_processes_on_one_machine_share_its_memory(monkeypatch, release, home, machines):
    seen = []

    def stop(_hardware, cpu, *_, is_limited):
        assert not is_limited
        seen.append(cpu.memory)
        raise HardwareError("seen")

    monkeypatch.setattr("grokctl.session.choice._choose", stop)
    monkeypatch.setattr(
        "grokctl.session.choice.memory", lambda: Memory(total=9000, available=1000, limit=None)
    )
    asked = Asked(mesh=MeshShape(2, 1), compute=None, context=None, sequences=1, kv=KvType.COMPUTE)
    found = find_candidates(home, str(release.root), processes=2, observe=ignore)

    with pytest.raises(HardwareError, match="seen"):
        settle(found, asked, processes=2, machines=machines, observe=ignore)

    assert seen == [1000 * machines]


def test_a_built_in_tokenizer_that_changes_before_the_end_of_loading_is_not_used(
    tmp_path, monkeypatch
):
    root = tmp_path / "small"
    proven_release(root)
    data = (root / "tokenizer.model").read_bytes()
    monkeypatch.setattr(receipts, "GROK_1_TOKENIZER_SHA256", hashlib.sha256(data).hexdigest())
    files = [str(path.relative_to(root)) for path in root.glob("ckpt-0/*")]
    torrent = build_metainfo(root, sorted([*files, "config.json"]), name="s", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)
    shutil.rmtree(root / ".grokctl")
    write_source(root, infohash=parse_metainfo(torrent, source="s").infohash, trust=TYPED)
    assert verify(root).is_proven
    request = JobRequest(home=Home(tmp_path / "home"), checkpoint=str(root), mesh=MeshShape(1, 1))
    job = open_job(replace(request, context=64))
    assert job.proof is not None
    (root / "tokenizer.model").chmod(0o600)

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model: altered, changed while"):
        job.start(ignore)


def test_a_file_that_changes_just_after_it_was_judged_is_not_used(release, tmp_path, monkeypatch):
    root = cut(release, MeshShape(1, 1), tmp_path / "ready").root

    def judged(ready):
        found = doubts_of_ready(ready)
        (root / "tokenizer.model").chmod(0o600)
        return found

    monkeypatch.setattr("grokctl.session.candidates.doubts_of_ready", judged)
    request = JobRequest(home=Home(tmp_path / "home"), checkpoint=str(root), mesh=MeshShape(1, 1))
    job = open_job(replace(request, context=64))

    with pytest.raises(CorruptCheckpointError, match=r"tokenizer\.model: altered, changed while"):
        job.start(ignore)


@pytest.mark.parametrize("kind", ["release", "ready"])
def test_a_checkpoint_that_changes_before_it_is_loaded_is_not_used(release, tmp_path, kind):
    root = shutil.copytree(release.root, tmp_path / "words")
    if kind == "ready":
        root = cut(open_release(root), MeshShape(1, 1), tmp_path / "ready").root
    request = JobRequest(home=Home(tmp_path / "home"), checkpoint=str(root), mesh=MeshShape(1, 1))
    job = open_job(replace(request, context=64))
    path = max(root.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    path.chmod(0o600)

    with pytest.raises(CorruptCheckpointError, match="changed while it was loaded") as caught:
        job.start(ignore)

    assert caught.value.damage[0].file == path.name
    assert caught.value.hint == f"grokctl verify {root}"
