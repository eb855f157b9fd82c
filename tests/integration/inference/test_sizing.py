"""Sizing beside what XLA reports: miniatures, and Grok-1 at its full width, without any weights."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import psutil
import pytest
from golden import load_golden
from jax.sharding import NamedSharding, PartitionSpec

from grokctl.checkpoint.layout import weight_bytes
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import HardwareError
from grokctl.infer import infer
from grokctl.inference.compiled_steps import Head, Programs
from grokctl.inference.devices import find_devices
from grokctl.inference.loading import Loader
from grokctl.inference.plan import EngineOptions
from grokctl.model.axes import MODEL_AXIS
from grokctl.model.bucketing import padded_batch, room
from grokctl.model.cache import empty_cache, stored_type
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.scores import scores
from grokctl.model.sizing import Needs, Terms, _Step, needs
from grokctl.model.step_spec import StepShape

pytestmark = pytest.mark.fused

WIDE = replace(GROK_1, num_layers=2, emb_size=1536, num_q_heads=16, vocab_size=16384)
"""A quarter of Grok-1's width: 0.7 GB at int8, of which nothing is made."""
ONE_LAYER = replace(GROK_1, num_layers=1)
EIGHT = MeshShape(1, 8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to run a model."""

    config: GrokConfig = WIDE
    mesh: MeshShape = EIGHT
    precision: Precision = Precision.INT8
    compute: Compute = Compute.BFLOAT16
    kv: KvType = KvType.COMPUTE
    context: int = 1024
    slots: int = 1

    @property
    def storage(self):
        return storage_in(released_storage(self.config), self.precision, self.mesh)

    @property
    def terms(self) -> Terms:
        return Terms(context=self.context, compute=self.compute, slots=self.slots, kv=self.kv)

    @property
    def needed(self) -> Needs:
        return needs(
            self.config,
            self.mesh,
            self.terms,
            weights=max(weight_bytes(self.storage, self.mesh)),
            precision=self.precision,
            platform="cpu",
        )

    def programs(self, *shapes) -> list["Reported"]:
        """What XLA says of programs for steps: sequences, tokens of each, and the head."""
        source = SimpleNamespace(storage=self.storage, config=self.config)
        loader = Loader(source, self.mesh, find_devices(self.mesh.size))
        shape = StepShape(
            config=self.config,
            mesh=self.mesh,
            platform="cpu",
            compute=jnp.dtype(self.compute),
        )
        programs = Programs(loader, loader.absent_parameters(), shape)
        cache = empty_cache(
            self.config,
            self.mesh,
            slots=self.slots,
            past=room(self.context, platform="cpu")[1],
            dtype=stored_type(jnp.dtype(self.terms.cache_dtype), platform="cpu"),
            zeros=loader.absent,
        )
        read, found = loader.absent((), jnp.dtype(jnp.int32)), []
        for batch, time, head in shapes:
            step = programs.step(cache, read, batch=batch, time=time, head=head)
            hidden, task = batch * time * self.config.emb_size * 4, batch * (4 + time) * 4
            found += [
                Reported.of("embed", step.embed, given=task),
                *[Reported.of("layers", one, given=hidden + task + 4) for one in step.layers],
                Reported.of("head", step.head, given=hidden + (0 if head is Head.EVERY else task)),
            ]
        return found

    @property
    def largest(self) -> list["Reported"]:
        """Of a chunk of a prompt whose logits are all wanted, and of a token in every slot."""
        chunk, _ = room(self.context, platform="cpu")
        return self.programs((1, chunk, Head.EVERY), (padded_batch(self.slots), 1, Head.LAST))


@dataclass(frozen=True, kw_only=True)
class Reported:
    """Bytes of a program on each device."""

    name: str
    held: int
    """Weights and cache."""
    workspace: int
    """Every other argument, results that are no argument, and temporaries."""

    @classmethod
    def of(cls, name, program, *, given) -> "Reported":
        found = program.memory_analysis()
        made = found.output_size_in_bytes - found.alias_size_in_bytes
        return cls(
            name=name,
            held=found.argument_size_in_bytes - given,
            workspace=given + made + found.temp_size_in_bytes,
        )


def held_by(programs: list[Reported], config: GrokConfig) -> int:
    """All weights and the whole cache, out of the programs of one step."""
    embed, *layers, head = programs[: config.num_layers + 2]
    assert embed.held < head.held == embed.held + config.emb_size * 4  # and the final norm
    return head.held + sum(layer.held for layer in layers)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(mesh=MeshShape(1, 1)), id="model=1"),
        pytest.param(Case(mesh=MeshShape(1, 4)), id="model=4", marks=pytest.mark.slow),
        pytest.param(Case(mesh=EIGHT), id="model=8"),
        pytest.param(Case(mesh=MeshShape(1, 16)), id="model=16", marks=pytest.mark.slow),
        pytest.param(Case(mesh=MeshShape(2, 4)), id="expert=2,model=4"),
        pytest.param(Case(mesh=EIGHT, precision=Precision.INT4), id="int4"),
        pytest.param(Case(mesh=EIGHT, precision=Precision.BFLOAT16), id="bf16"),
        pytest.param(Case(mesh=MeshShape(1, 4), precision=Precision.FLOAT32), id="float32"),
        pytest.param(
            Case(mesh=EIGHT, compute=Compute.FLOAT32, slots=12),
            id="12 slots",
            marks=pytest.mark.slow,
        ),
        pytest.param(Case(mesh=EIGHT, kv=KvType.INT8, slots=5), id="5 slots, cache in int8"),
        pytest.param(Case(mesh=MeshShape(1, 1), context=40, slots=20), id="20 short slots"),
    ],
)
def test_a_device_takes_what_xla_reports(case):
    found, needed = case.largest, case.needed

    workspace = max(program.workspace for program in found)
    assert held_by(found, case.config) == needed.weights + needed.cache
    assert needed.total == pytest.approx(needed.weights + needed.cache + workspace, rel=0.05)
    assert 0.98 * workspace <= needed.workspace <= 1.25 * workspace


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(EIGHT, id="model=8"),
        pytest.param(MeshShape(1, 4), id="model=4", marks=pytest.mark.slow),
        pytest.param(MeshShape(2, 8), id="expert=2,model=8"),
    ],
)
def test_so_does_a_layer_of_grok_1_at_its_full_width(mesh):
    case = Case(config=ONE_LAYER, mesh=mesh, context=8192, slots=16)

    found, needed = case.largest, case.needed

    workspace = max(program.workspace for program in found)
    assert held_by(found, ONE_LAYER) == needed.weights + needed.cache
    assert needed.total == pytest.approx(needed.weights + needed.cache + workspace, rel=0.05)
    assert 0.98 * workspace <= needed.workspace <= 1.2 * workspace


@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (1, 512)], ids=str)
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(Precision.INT8, id="int8"),
        pytest.param(Precision.INT4, id="int4", marks=pytest.mark.slow),
    ],
)
def test_no_smaller_step_of_it_takes_more(shape, precision):
    case = Case(config=ONE_LAYER, precision=precision, context=8192, slots=16)

    found, needed = case.programs((*shape, Head.LAST)), case.needed

    assert held_by(found, ONE_LAYER) == needed.weights + needed.cache
    assert max(program.workspace for program in found) <= needed.workspace


@pytest.mark.parametrize(
    ("config", "mesh", "tokens"),
    [
        pytest.param(GROK_1, MeshShape(1, 1), 512, id="in blocks"),
        pytest.param(GROK_1, MeshShape(1, 1), 16, id="at once"),
        pytest.param(GROK_1, EIGHT, 512, id="in blocks on eight"),
        pytest.param(WIDE, MeshShape(1, 1), 512, id="a smaller model"),
    ],
)
def test_scores_take_what_xla_reports(config, mesh, tokens):
    shape = StepShape(config=config, mesh=mesh, platform="cpu", compute=jnp.dtype(jnp.float32))
    jax_mesh = jax.make_mesh(
        (mesh.expert, mesh.model), ("expert", MODEL_AXIS), devices=find_devices(mesh.size)
    )
    split, everywhere = PartitionSpec(MODEL_AXIS), PartitionSpec()

    def array(dtype, *shape, spec=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(jax_mesh, spec))

    program = jax.jit(
        jax.shard_map(
            lambda *arrays: scores(*arrays, shape=shape),
            mesh=jax_mesh,
            in_specs=(split, everywhere, everywhere, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )
    ).lower(
        array(jnp.float32, config.vocab_size, config.emb_size, spec=split),
        array(jnp.float32, config.emb_size),
        array(jnp.float32, 1, tokens, config.emb_size),
        array(jnp.int32, 1, tokens),
    )

    found = Reported.of("scores", program.compile(), given=tokens * (config.emb_size + 1) * 4)

    counted = _Step(
        config=config,
        mesh=mesh,
        tokens=tokens,
        batch=1,
        platform="cpu",
        operand=4,
        kept=4,
        precision=Precision.INT8,
    )
    assert 0.98 * found.workspace <= counted.scores <= 1.25 * found.workspace
    assert counted.scores <= counted.head  # which has the logits of all tokens


@pytest.mark.parametrize("precision", Precision, ids=str)
def test_parameters_of_all_64_layers_are_what_is_counted(precision):
    storage = storage_in(released_storage(GROK_1), precision, EIGHT)
    source = SimpleNamespace(storage=storage, config=GROK_1)

    leaves = jax.tree.leaves(Loader(source, EIGHT, find_devices(8)).absent_parameters())

    every = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert every == sum(weight_bytes(storage, EIGHT))


# --- what is really there


@pytest.fixture(scope="module")
def source():
    return ReleaseSource(load_golden("two-layers").release)


OPTIONS = EngineOptions(mesh=MeshShape(1, 4), context=16, slots=3)


def needed_for(source) -> Needs:
    terms = Terms(context=OPTIONS.context, compute=OPTIONS.compute, slots=OPTIONS.slots)
    return needs(
        source.config,
        OPTIONS.mesh,
        terms,
        weights=max(weight_bytes(source.storage, OPTIONS.mesh)),
        precision=source.storage.precision,
        platform="cpu",
    )


def test_an_engine_holds_what_is_counted(source):
    engine, needed = infer(source, OPTIONS), needed_for(source)

    for arrays, expected in (
        (engine.runner._parameters, needed.weights),
        (engine.runner._cache, needed.cache),
    ):
        for device in range(OPTIONS.mesh.size):
            shards = [leaf.addressable_shards[device].data for leaf in jax.tree.leaves(arrays)]
            assert sum(shard.nbytes for shard in shards) == expected


def test_a_run_is_refused_for_one_byte_and_no_more(source, monkeypatch):
    available = needed_for(source).total * OPTIONS.mesh.size
    memory = SimpleNamespace(total=2**40, available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    assert infer(source, OPTIONS).context == OPTIONS.context
    memory.available -= 1
    with pytest.raises(HardwareError, match="memory"):
        infer(source, OPTIONS)
