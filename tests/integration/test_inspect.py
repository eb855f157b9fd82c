"""What `inspect` says of a checkpoint's values is what numpy says of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from places import TWO_LAYERS

from grokctl.checkpoint import value_stats as values
from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.pickle_writer import write
from grokctl.checkpoint.release import open_release
from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.events import Advanced, Finished, Stage, Started, Unit
from grokctl.inspect import inspect
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

EMBEDDING, GATE = "ckpt-0/tensor00000_000", "ckpt-0/tensor00002_000"


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Cut the golden release for a mesh, once."""
    made = {}

    def cut(mesh: str) -> Path:
        if mesh not in made:
            release = open_release(TWO_LAYERS)
            out = tmp_path_factory.mktemp("ready") / mesh.replace(",", "-")
            made[mesh] = reshard(
                plan_reshard(release, ReshardOptions(mesh=MeshShape.parse(mesh), out=out))
            ).root
        return made[mesh]

    return cut


def expected_of(tensor) -> tuple[np.ndarray, np.ndarray]:
    """The stored weight, and its dequantised values in float64."""
    weight, scales = tensor.map()
    if scales is None:
        return weight, weight.astype(np.float64)
    *lead, inputs, outputs = weight.shape
    groups = scales.shape[-2]
    grouped = weight.astype(np.float64).reshape(*lead, groups, inputs // groups, outputs)
    return weight, (grouped * scales.astype(np.float64)[..., :, None, :]).reshape(weight.shape)


def assert_values(row, tensor) -> None:
    weight, wide = expected_of(tensor)
    spread = row.stats
    assert (spread.count, spread.nonfinite) == (wide.size, 0)
    assert (spread.minimum, spread.maximum) == (wide.min(), wide.max())
    assert spread.rms == pytest.approx(np.sqrt(np.mean(wide**2)), rel=1e-12)
    if weight.dtype == np.int8:
        assert spread.integers == weight.size
        assert spread.zeros == (weight == 0).sum()
        assert spread.saturated == (np.abs(weight.astype(int)) >= 127).sum()
        assert sum(spread.cells) == weight.size
    else:
        assert spread.integers == 0


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_values_of_a_release_are_numpys(jobs):
    found = inspect(TWO_LAYERS, stats=True, jobs=jobs)

    tensors = open_release(TWO_LAYERS).tensors
    assert [row.name for row in found.rows] == [tensor.spec.name for tensor in tensors]
    for row, tensor in zip(found.rows, tensors, strict=True):
        assert_values(row, tensor)


@pytest.mark.parametrize("mesh", ["model=1", "model=2", "model=8", "expert=2,model=4"])
def test_the_values_of_a_ready_checkpoint_are_those_of_its_release(ready, mesh):
    found = {row.name: row for row in inspect(ready(mesh), stats=True).rows}

    for tensor in open_release(TWO_LAYERS).tensors:
        assert_values(found.pop(f"{tensor.spec.name}.weight"), tensor)
        if tensor.scales is not None:
            _, scales = tensor.map()
            wide = scales.astype(np.float64)
            spread = found.pop(f"{tensor.spec.name}.scales").stats
            assert (spread.minimum, spread.maximum) == (wide.min(), wide.max())
            assert spread.rms == pytest.approx(np.sqrt(np.mean(wide**2)), rel=1e-12)
    assert found == {}


def test_the_number_of_threads_and_the_size_of_blocks_change_no_number(monkeypatch):
    whole = inspect(TWO_LAYERS, stats=True, jobs=1).rows
    monkeypatch.setattr(values, "_BLOCK", 4096)

    cut = inspect(TWO_LAYERS, stats=True, jobs=4).rows
    again = inspect(TWO_LAYERS, stats=True, jobs=2).rows

    assert cut == again
    for ours, theirs in zip(whole, cut, strict=True):
        assert ours.stats.cells == theirs.stats.cells
        assert ours.stats.maximum == theirs.stats.maximum
        assert ours.stats.rms == pytest.approx(theirs.stats.rms, rel=1e-12)


def test_parameters_are_counted_once_whatever_the_mesh(ready):
    expected = sum(np.prod(spec.shape) for spec in tensor_specs(open_release(TWO_LAYERS).config))

    for root in (TWO_LAYERS, ready("model=2"), ready("model=8")):
        found = inspect(root)
        assert sum(total.parameters for total in found.totals) == expected
        assert {total.kind for total in found.totals} == {
            *("embedding", "norms", "experts", "attention", "router"),
        }
        assert sum(total.nbytes for total in found.totals) == sum(row.nbytes for row in found.rows)


def test_only_what_was_asked_for_is_read():
    events = []

    found = inspect(TWO_LAYERS, pattern="layers.1.*", stats=True, observe=events.append)

    tensors = [t for t in open_release(TWO_LAYERS).tensors if t.spec.name.startswith("layers.1.")]
    total = sum(tensor.weight.nbytes for tensor in tensors)
    ours = [event for event in events if getattr(event, "stage", None) is Stage.VALUES]
    assert len(found.rows) == 12
    assert ours[0] == Started(stage=Stage.VALUES, total=total, unit=Unit.BYTES)
    assert ours[-2:] == [Advanced(stage=Stage.VALUES, done=total), Finished(stage=Stage.VALUES)]


def test_an_observer_that_raises_ends_it():
    def stop(event):
        if isinstance(event, Advanced) and event.stage is Stage.VALUES:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect(TWO_LAYERS, stats=True, jobs=2, observe=stop)


def test_numbers_in_the_embedding_that_are_none_are_counted(two_layers):
    embedding, _ = open_release(two_layers).tensors[0].map()
    damaged = embedding.copy()
    damaged[3, 5], damaged[7] = np.nan, np.inf
    with (two_layers / EMBEDDING).open("wb") as file:
        write(file, damaged)

    (row,) = inspect(two_layers, pattern="embedding", stats=True).rows

    assert row.stats.nonfinite == 1 + damaged.shape[1]
    finite = damaged[np.isfinite(damaged)].astype(np.float64)
    assert (row.stats.minimum, row.stats.maximum) == (finite.min(), finite.max())


def test_a_file_that_shrinks_while_it_is_read_is_unreadable(two_layers):
    def shrink(event):
        if isinstance(event, Finished) and event.stage is Stage.STRUCTURE:
            (two_layers / GATE).write_bytes(b"")

    with pytest.raises(CorruptCheckpointError) as caught:
        inspect(two_layers, stats=True, observe=shrink)

    (damage,) = caught.value.damage
    assert (damage.file, damage.reason) == (GATE, Reason.UNREADABLE)
    assert damage.detail.startswith("ends before byte ")


def test_a_device_file_of_another_mesh_is_altered(ready, tmp_path):
    root = shutil.copytree(ready("model=2"), tmp_path / "ready")
    path = root / "device-01-of-02.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"device":"1"', b'"device":"0"'))

    with pytest.raises(CorruptCheckpointError, match="header"):
        inspect(root, stats=True)


def test_grok_1_has_as_many_parameters_as_its_specifications():
    assert sum(int(np.prod(spec.shape)) for spec in tensor_specs(GROK_1)) == 315_684_820_992


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("precision", ["bf16", "float32", "int4"])
def test_the_values_of_another_precision_are_those_that_it_stores(tmp_path, precision, compressed):
    release = open_release(TWO_LAYERS)
    compression = Compression(1) if compressed else None
    ready = reshard(
        plan_reshard(
            release,
            ReshardOptions(
                mesh=MeshShape(1, 4),
                out=tmp_path / "ready",
                precision=Precision(precision),
                compression=compression,
            ),
        )
    )

    found = {row.name: row for row in inspect(ready.root, stats=True).rows}

    for tensor in release.tensors:
        row = found.pop(f"{tensor.spec.name}.weight")
        _, wide = expected_of(tensor)
        rms = np.sqrt(np.mean(wide**2))
        is_rounded = tensor.spec.is_quantized
        assert row.shape == tensor.spec.shape
        assert row.dtype == (
            {"bf16": "bfloat16"}.get(precision, precision) if is_rounded else "float32"
        )
        assert row.stats.count == wide.size
        assert row.stats.integers == 0
        lost = ready.manifest.errors.get(f"{tensor.spec.name}.weight", 0.0)
        assert abs(row.stats.rms - rms) <= rms * (1.01 * lost + 1e-6)
