"""Weights on devices: streamed through two buffers, mapped, or cut; and memory counted before."""

import mmap
import os
import re
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jaxlib.xla_client
import numpy as np
import psutil
import pytest
from cuts import cut
from golden import load_golden

from grokctl.checkpoint import device_file
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.cli.environment import gpu_memory_claimed
from grokctl.errors import CorruptCheckpointError, ExitCode, HardwareError, Reason
from grokctl.events import Advanced, Finished, Noted, Stage, Started, ignore
from grokctl.inference import loading
from grokctl.inference.devices import accelerators, find_devices
from grokctl.inference.loading import Loader
from grokctl.inference.memory_check import check_room
from grokctl.model.memory_share import MEMORY_SHARE
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.sizing import Needs
from grokctl.system import Reading

FOUR = MeshShape(1, 4)


@pytest.fixture(scope="module")
def release():
    return load_golden("two-layers").release


@pytest.fixture(scope="module")
def ready(release, tmp_path_factory):
    """A checkpoint for four devices; read only."""
    return cut(release, FOUR, tmp_path_factory.mktemp("ready") / "four")


@pytest.fixture
def own(ready, tmp_path):
    """A copy of it, to damage."""
    return open_ready(shutil.copytree(ready.root, tmp_path / "own"))


def loader(source, mesh=FOUR, **options) -> Loader:
    return Loader(source, mesh, find_devices(mesh.size), **options)


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)


# --- streamed, as accelerators have it


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), FOUR, MeshShape(2, 4)], ids=str)
@pytest.mark.parametrize(
    ("precision", "compression"),
    [
        pytest.param(Precision.INT8, None, id="int8"),
        pytest.param(Precision.BFLOAT16, None, id="bf16"),
        pytest.param(Precision.INT8, Compression(1), id="zstd"),
    ],
)
def test_what_is_streamed_is_what_is_cut_from_the_release(
    release, tmp_path, mesh, precision, compression
):
    checkpoint = cut(
        release, mesh, tmp_path / "ready", precision=precision, compression=compression
    )
    source = ReleaseSource(release) if precision is Precision.INT8 else checkpoint

    streamed = loader(checkpoint, mesh, is_streamed=True)
    expected = loader(source, mesh, is_streamed=False)

    assert_same(streamed.load(ignore), expected.load(ignore))
    assert streamed.nbytes == expected.nbytes
    assert streamed.expert_nbytes == expected.expert_nbytes
    assert streamed.bytes_per_token == expected.bytes_per_token


def test_every_device_has_two_buffers_of_the_size_of_its_largest_tensor(ready, monkeypatch):
    taken, real = [], mmap.mmap

    def recorded(handle, nbytes, **options):
        if handle == -1:
            taken.append(nbytes)
        return real(handle, nbytes, **options)

    monkeypatch.setattr(mmap, "mmap", recorded)

    loader(ready, is_streamed=True).load(ignore)

    largest = [max(held.nbytes for held in layout.tensors) for layout in ready.layouts]
    assert sorted(taken) == sorted(largest * 2)


def test_every_file_is_read_in_its_own_order(ready, monkeypatch):
    read, real = {}, os.preadv

    def recorded(handle, buffers, offset):
        read.setdefault(handle, []).append(offset)
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)

    loader(ready, is_streamed=True).load(ignore)

    expected = [[0, *[held.offset for held in layout.tensors]] for layout in ready.layouts]
    assert sorted(read.values()) == sorted(expected)


@pytest.mark.parametrize("devices", [1, 4])
def test_several_threads_read_a_large_tensor_of_few_devices(
    release, tmp_path, monkeypatch, devices
):
    mesh, read, real = MeshShape(1, devices), [], os.preadv
    checkpoint = cut(release, mesh, tmp_path / "ready")

    def recorded(handle, buffers, offset):
        read.append((offset, sum(map(len, buffers))))
        return real(handle, buffers, offset)

    monkeypatch.setattr(loading, "_PART", 1000)
    monkeypatch.setattr(os, "preadv", recorded)

    streamed = loader(checkpoint, mesh, is_streamed=True).load(ignore)

    monkeypatch.setattr(os, "preadv", real)
    assert_same(streamed, loader(ReleaseSource(release), mesh, is_streamed=False).load(ignore))
    held = max(checkpoint.layouts[0].tensors, key=lambda held: held.nbytes)
    parts = [n for at, n in read if held.offset <= at < held.offset + held.nbytes]
    assert len(parts) >= 8 // devices
    assert sum(parts) >= held.nbytes


def test_the_kernel_hears_what_is_read_next(ready, monkeypatch):
    heard = []
    monkeypatch.setattr(
        device_file,
        "announce",
        lambda _handle, reading, *, offset, nbytes: heard.append((reading, offset, nbytes)),
    )

    loader(ready, is_streamed=True).load(ignore)

    for layout in ready.layouts:
        for held in layout.tensors[1:]:
            assert (Reading.SOON, held.offset, held.nbytes) in heard
    assert len(heard) == sum(len(layout.tensors) - 1 for layout in ready.layouts)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_progress_names_tensors_and_ends_with_every_byte(ready, is_streamed):
    seen = []
    used = loader(ready, is_streamed=is_streamed)

    used.load(seen.append)

    first, *between, last = seen
    assert first == Started(stage=Stage.LOAD, total=used.nbytes)
    assert last == Finished(stage=Stage.LOAD)
    assert all(isinstance(event, Advanced) for event in between)
    done = [event.done for event in between]
    assert done == sorted(done)
    assert done[-1] == used.nbytes
    keys = {tensor.key for tensor in ready.storage.tensors}
    assert {event.detail for event in between} == keys


def test_another_mesh_is_cut_and_not_streamed(ready):
    other = MeshShape(1, 2)

    assert_same(
        loader(ready, other, is_streamed=True).load(ignore),
        loader(ready, other, is_streamed=False).load(ignore),
    )


def test_a_file_that_ends_early_is_damage(own):
    name = own.layouts[2].name
    with (own.root / name).open("r+b") as file:
        file.truncate(own.layouts[2].nbytes - 1)

    with pytest.raises(CorruptCheckpointError) as caught:
        loader(own, is_streamed=True).load(ignore)

    (damage,) = caught.value.damage
    assert (damage.file, damage.reason) == (name, Reason.UNREADABLE)
    assert "ends before byte" in damage.detail
    assert caught.value.exit_code is ExitCode.CORRUPT
    assert "grokctl verify" in caught.value.hint


def test_a_file_of_another_device_is_damage(own):
    shutil.copy(own.root / own.layouts[1].name, own.root / own.layouts[3].name)

    with pytest.raises(CorruptCheckpointError, match=re.escape(own.layouts[3].name)):
        loader(own, is_streamed=True).load(ignore)


def test_who_watches_can_end_it(ready):
    def watch(event):
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loader(ready, is_streamed=True).load(watch)


# --- memory


@dataclass
class Device:
    """One that counts its memory."""

    limit: int | None
    used: int = 0
    platform: str = "gpu"

    def memory_stats(self):
        if self.limit is None:
            return None
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}

    def __str__(self) -> str:
        return "cuda:0"


GB = 10**9


def needs(weights, cache=0, workspace=0) -> Needs:
    return Needs(weights=weights * GB, cache=cache * GB, workspace=workspace * GB)


def refusal(*devices, needed, **options) -> HardwareError:
    with pytest.raises(HardwareError) as caught:
        check_room(devices, needed, **{"context": 8192, **options})
    assert caught.value.exit_code is ExitCode.HARDWARE
    return caught.value


@pytest.fixture
def without_share(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)


def test_what_fits_is_not_refused():
    check_room([Device(60 * GB)] * 8, needs(40, 15, 5), context=8192)


def test_a_device_that_does_not_count_is_not_asked_again():
    check_room([Device(None)] * 2, needs(40), context=8192)


def test_every_part_is_said_and_both_sums():
    error = refusal(Device(24 * GB, used=2 * GB, platform="tpu"), needed=needs(40, 2, 1))

    assert str(error) == (
        "weights 40.0 GB, cache 2.0 GB and workspace 1.0 GB take 43.0 GB on each device, "
        "cuda:0 has 22.0 GB free"
    )


def test_a_shorter_context_that_fits_is_named():
    eight = [Device(46 * GB, platform="tpu")] * 8

    assert refusal(*eight, needed=needs(40, 10, 1)).hint == "--context 4096"


def test_the_smallest_mesh_that_fits_is_named():
    needed = needs(80, 0, 2)

    assert refusal(*[Device(60 * GB, platform="tpu")] * 4, needed=needed).hint == "--devices 8"
    assert refusal(*[Device(30 * GB, platform="tpu")] * 4, needed=needed).hint == "--devices 16"


def test_fewer_bits_are_named_where_no_mesh_is_large_enough():
    small, needed = [Device(21 * GB, platform="tpu")] * 4, needs(80, 0, 2)

    assert refusal(*small, needed=needed).hint == "grokctl reshard --precision int4"
    assert refusal(*small, needed=needed, precision=Precision.INT4).hint == "grokctl doctor"


@pytest.mark.usefixtures("without_share")
def test_a_gpu_of_which_jax_takes_too_little_is_said_to(monkeypatch):
    eight = [Device(36 * GB)] * 8  # of 48

    assert refusal(*eight, needed=needs(40)).hint == "--devices 16"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")
    assert refusal(*eight, needed=needs(40)).hint == "export XLA_CLIENT_MEM_FRACTION=0.92"
    assert refusal(*eight, needed=needs(46)).hint == "--devices 16"
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    assert refusal(*eight, needed=needs(40)).hint == (
        "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"  # JAX refuses both at a time
    )
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert refusal(*eight, needed=needs(40)).hint == "--devices 16"


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
@pytest.mark.usefixtures("without_share")
def test_jax_takes_the_share_of_a_gpu_that_is_counted_on_or_what_it_was_told(monkeypatch, name):
    shares = []

    def starting(*arguments):
        options = jaxlib.xla_client.generate_pjrt_gpu_plugin_options()
        shares.extend([] if arguments else [options["memory_fraction"]])
        return start(*arguments)

    start = jax.devices
    monkeypatch.setattr(jax, "devices", starting)

    with gpu_memory_claimed():
        find_devices(1)
        accelerators()
    assert set(shares) == {MEMORY_SHARE}
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ
    shares.clear()
    monkeypatch.setenv(name, "0.5")
    with gpu_memory_claimed():
        find_devices(1)
    assert set(shares) == {0.5}


def virtual_memory(available):
    return lambda: SimpleNamespace(total=2**40, available=available)


def test_virtual_devices_share_main_memory(monkeypatch):
    two = [Device(None, platform="cpu")] * 2
    monkeypatch.setattr(psutil, "virtual_memory", virtual_memory(12 * GB))

    check_room(two, needs(400, 5, 1), context=8192)
    error = refusal(*two, needed=needs(400, 8, 2))

    assert str(error) == (
        "a context of 8192 tokens (cache 16.0 GB, workspace 4.0 GB) takes 20.0 GB of memory, "
        "12.0 GB are free"
    )
    assert error.hint == "--context 4096"
    assert refusal(*two, needed=needs(400, 8, 6)).hint is None


@pytest.mark.parametrize(("available", "notes"), [(2**20, 1), (2**40, 0)])
def test_mapped_weights_that_memory_cannot_hold_are_mentioned(ready, monkeypatch, available, notes):
    seen = []
    monkeypatch.setattr(psutil, "virtual_memory", virtual_memory(available))

    loader(ready).load(seen.append)

    found = [event.message for event in seen if isinstance(event, Noted)]
    assert len(found) == notes
    assert all("every token" in message for message in found)


def test_what_lies_beside_mapped_weights_leaves_them_less(ready, monkeypatch):
    seen, used = [], loader(ready)
    monkeypatch.setattr(psutil, "virtual_memory", virtual_memory(used.nbytes + 100))

    used.load(seen.append, beside=100)
    assert not any(isinstance(event, Noted) for event in seen)
    used.load(seen.append, beside=101)
    assert any(isinstance(event, Noted) for event in seen)


def test_what_is_cut_in_memory_must_fit_beside_the_rest(release, monkeypatch):
    used = loader(ReleaseSource(release))
    monkeypatch.setattr(psutil, "virtual_memory", virtual_memory(used.nbytes + 100))

    used.load(ignore, beside=100)
    with pytest.raises(HardwareError, match="cutting this checkpoint in memory takes"):
        used.load(ignore, beside=101)


def test_buffers_that_memory_cannot_hold_are_refused(ready, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", virtual_memory(1000))

    with pytest.raises(HardwareError, match="reading this checkpoint takes"):
        loader(ready, is_streamed=True).load(ignore)
