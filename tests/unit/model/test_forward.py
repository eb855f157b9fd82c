from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from grokctl.checkpoint.miniature import MINIATURE
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.tensor_source import LogicalTensor, ReleaseSource, Storage, extent
from grokctl.events import ignore
from grokctl.infer import infer
from grokctl.inference.chunks import Chunk
from grokctl.inference.devices import find_devices
from grokctl.inference.loading import Loader
from grokctl.inference.plan import EngineOptions
from grokctl.model import axes, experts, forward
from grokctl.model import bucketing as forms
from grokctl.model.attention import attend_at_once
from grokctl.model.bucketing import rows_of_a_run
from grokctl.model.cache import Positions, empty_cache
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.parameters import Matrix, build_parameters
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, Precision
from grokctl.model.rotary import rotate
from grokctl.model.step_spec import StepShape
from grokctl.model.tensors import tensor_specs

pytestmark = pytest.mark.heavy

SMALL = replace(MINIATURE, vocab_size=64, emb_size=24, widening_factor=2, key_size=4, num_layers=1)
ONE = MeshShape(1, 1)
FLOAT32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def step_shape(config=SMALL, mesh=ONE, platform="cpu", compute=FLOAT32) -> StepShape:
    return StepShape(config=config, mesh=mesh, platform=platform, compute=compute)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x):
    wide = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return wide / wide.sum(axis=-1, keepdims=True)


def released(config) -> Storage:
    """How the release stores a model of these sizes."""
    groups = {spec.name: spec.scale_groups for spec in tensor_specs(config)}
    return Storage(config=config, precision=Precision.INT8, groups=groups)


@dataclass
class RandomSource:
    """Random weights whose sums are of order one."""

    config: GrokConfig

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        self.storage = released(self.config)
        self.arrays = {}
        for tensor in self.storage.tensors:
            inputs = tensor.spec.shape[-2] if tensor.groups else 1
            if tensor.is_scales:
                array = rng.uniform(0.5, 2, tensor.shape) / (73 * np.sqrt(inputs))
            elif tensor.groups:
                array = rng.integers(-127, 128, tensor.shape)
            else:
                array = rng.standard_normal(tensor.shape)
            self.arrays[tensor.key] = array.astype(tensor.dtype)

    def read(self, tensor: LogicalTensor, slices):
        return np.ascontiguousarray(self.arrays[tensor.key][tuple(slice(*s) for s in slices)])

    def dequantised(self, name: str):
        """`(*lead, inputs, outputs)` in float64."""
        weight = self.arrays[f"{name}.weight"].astype(np.float64)
        scales = self.arrays[f"{name}.scales"].astype(np.float64)
        return weight * np.repeat(scales, weight.shape[-2] // scales.shape[-2], axis=-2)


class OnDevices:
    """Parameters on a mesh of CPU devices, and functions run over them."""

    def __init__(self, source, mesh: MeshShape) -> None:
        self.mesh = mesh
        self.loader = Loader(source, mesh, find_devices(mesh.size))
        self.parameters = self.loader.load(ignore)

    def run(self, function, *arguments):
        def local(parameters, *arguments):
            return function(jax.tree.map(lambda leaf: leaf[0], parameters), *arguments)

        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            local,
            mesh=self.loader.jax_mesh,
            in_specs=(self.loader.per_device, *[everywhere] * len(arguments)),
            out_specs=everywhere,
            check_vma=False,
        )
        return jax.tree.map(np.asarray, jax.jit(mapped)(self.parameters, *arguments))


@pytest.fixture(scope="module")
def source() -> RandomSource:
    return RandomSource(SMALL)


# --- norm


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)], ids=str)
def test_rms_norm_divides_by_the_root_mean_square(shape):
    x, scale = 5 * normal(1, *shape), normal(2, 24)

    found = forward.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=1e-5)

    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected * scale, rtol=1e-5, atol=1e-6)
    assert found.dtype == jnp.float32


def test_rms_norm_of_zeros_is_zero_and_of_little_is_held_by_epsilon():
    x = np.stack([np.zeros(24), np.full(24, 1e-3)]).astype(np.float32)

    found = forward.rms_norm(jnp.asarray(x), jnp.ones(24), eps=1e-5)

    np.testing.assert_allclose(found[0], 0)
    np.testing.assert_allclose(found[1], 1e-3 / np.sqrt(1e-6 + 1e-5), rtol=1e-5)


# --- rotation


def rotated(x, positions):
    return np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32), base=10000.0))


def test_rotation_pairs_the_two_halves_of_a_head():
    x, positions = normal(3, 2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [7, 100, 1000, 4000, 8191]])

    found = rotated(x, positions)

    expected = np.empty_like(x, np.float64)
    for pair in range(4):
        angle = positions[:, :, None] / 10000.0 ** (pair / 4)
        low, high = x[..., pair].astype(np.float64), x[..., pair + 4].astype(np.float64)
        expected[..., pair] = low * np.cos(angle) - high * np.sin(angle)
        expected[..., pair + 4] = high * np.cos(angle) + low * np.sin(angle)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)


def test_the_first_position_is_not_rotated():
    x = normal(4, 1, 1, 2, 8)

    np.testing.assert_array_equal(rotated(x, [[0]]), x)


def test_products_of_rotated_heads_depend_on_the_distance_alone():
    query, key = normal(5, 1, 1, 1, 16), normal(6, 1, 1, 1, 16)

    products = [
        float(np.sum(rotated(query, [[at + 13]]) * rotated(key, [[at]]))) for at in (0, 1, 50, 300)
    ]

    np.testing.assert_allclose(products, products[0], atol=1e-3)
    assert abs(float(np.sum(rotated(query, [[14]]) * rotated(key, [[0]]))) - products[0]) > 1e-2


# --- attention


def attention_oracle(query, key, value, mask, config):
    batch, time, heads, _ = query.shape
    shared = heads // key.shape[1]
    out = np.zeros(query.shape)
    for b in range(batch):
        for t in range(time):
            for head in range(heads):
                past = np.flatnonzero(mask[b, t])
                logits = key[b, head // shared, past].astype(np.float64) @ query[b, t, head]
                logits = 30 * np.tanh(logits * config.attn_output_multiplier / 30)
                out[b, t, head] = softmax(logits) @ value[b, head // shared, past]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_groups_heads_caps_logits_and_keeps_to_its_mask(kv_heads):
    query = 20 * normal(7, 2, 3, 6, 8)
    key, value = 20 * normal(8, 2, kv_heads, 7, 8), normal(9, 2, kv_heads, 7, 8)
    mask = np.random.default_rng(10).random((2, 3, 7)) < 0.5
    mask[..., 0] = True

    found = attend_at_once(*map(jnp.asarray, (query, key, value, mask)), config=SMALL)

    expected = attention_oracle(query, key, value, mask, SMALL)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    uncapped = replace(SMALL, attn_output_multiplier=SMALL.attn_output_multiplier / 10)
    assert np.abs(attention_oracle(query, key, value, mask, uncapped) - expected).max() > 0.1


def test_attention_logits_beyond_the_cap_no_longer_grow():
    query, key = np.full((1, 1, 1, 4), 1e6, np.float32), np.ones((1, 1, 2, 4), np.float32)
    key[0, 0, 1] = 0
    value = np.array([[[[1.0] * 4, [0.0] * 4]]], np.float32)
    mask = np.ones((1, 1, 2), bool)

    found = attend_at_once(*map(jnp.asarray, (query, key, value, mask)), config=SMALL)

    np.testing.assert_allclose(found, 1 / (1 + np.exp(-30)), rtol=1e-6)


def test_what_the_mask_hides_has_no_influence_however_large():
    query, key, value = normal(11, 1, 2, 4, 8), normal(12, 1, 2, 5, 8), normal(13, 1, 2, 5, 8)
    mask = np.broadcast_to(np.arange(5) < 3, (1, 2, 5))
    large_key, large_value = key.copy(), value.copy()
    large_key[:, :, 3:], large_value[:, :, 3:] = 1e10, 1e30

    plain, other = (
        attend_at_once(*map(jnp.asarray, (query, k, v, mask)), config=SMALL)
        for k, v in ((key, value), (large_key, large_value))
    )

    np.testing.assert_array_equal(plain, other)


# --- routing


def test_gates_are_probabilities_among_all_experts_and_not_renormalised():
    rows, router = normal(14, 50, 24), normal(15, 24, 8)

    gates, chosen = experts.route(jnp.asarray(router), jnp.asarray(rows), config=SMALL)

    probabilities = softmax(rows @ router)
    expected = np.argsort(-probabilities, axis=1)[:, :2]
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(
        gates, np.take_along_axis(probabilities, expected, axis=1), rtol=1e-4
    )
    assert np.asarray(gates).sum(axis=1).min() < 0.9
    assert gates.dtype == jnp.float32


def test_as_many_experts_are_chosen_as_the_model_says():
    config = replace(SMALL, num_selected_experts=3)

    gates, chosen = experts.route(
        jnp.asarray(normal(16, 24, 8)), jnp.asarray(normal(17, 4, 24)), config=config
    )

    assert gates.shape == chosen.shape == (4, 3)
    assert (np.diff(np.asarray(gates)) <= 0).all()


# --- experts


def moe_oracle(source: RandomSource, x):
    config = source.config
    gate, up, down = (source.dequantised(f"layers.0.moe.{name}") for name in ("gate", "up", "down"))
    router = source.arrays["layers.0.router.weight"]
    out, chosen = np.zeros(x.shape), set()
    for place in np.ndindex(x.shape[:-1]):
        row = x[place].astype(np.float64)
        probabilities = softmax(row @ router.astype(np.float64))
        for expert in np.argsort(-probabilities)[: config.num_selected_experts]:
            hidden = row @ gate[expert]
            gelu = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            out[place] += probabilities[expert] * ((gelu * (row @ up[expert])) @ down[expert])
            chosen.add(int(expert))
    return out, chosen


@pytest.fixture(
    scope="module", params=[ONE, MeshShape(2, 2), MeshShape(4, 1), MeshShape(1, 8)], ids=str
)
def devices(request, source) -> OnDevices:
    return OnDevices(source, request.param)


def mixed(devices: OnDevices, x, count=None, platform="cpu"):
    """What experts make of tokens, and how many experts of all devices were read for that."""
    shape = step_shape(mesh=devices.mesh, platform=platform)
    count = np.int32(x[..., 0].size if count is None else count)

    def run(parameters, x, count):
        found, read = experts.mixture_of_experts(parameters.layers[0], x, count, shape=shape)
        return found, jax.lax.psum(read, axes.EXPERT_AXIS)

    return devices.run(run, jnp.asarray(x), count)


@pytest.mark.parametrize(
    ("time", "few", "longest"),
    [
        pytest.param(1, 2, 128, id="one token"),
        pytest.param(9, 100, 128, id="one by one"),
        pytest.param(9, 0, 128, id="in runs"),
        pytest.param(40, 0, 3, id="in many runs"),
    ],
)
def test_experts_are_weighted_by_their_gates_in_absolute_scale(
    devices, source, monkeypatch, time, few, longest
):
    monkeypatch.setattr(forms, "_FEW_TOKENS", few)
    monkeypatch.setattr(forms, "_LONGEST_RUN", longest)
    x = normal(18 + time, 1, time, 24)

    found, read = mixed(devices, x)

    expected, chosen = moe_oracle(source, x)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert read == len(chosen)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_padding_goes_through_no_expert(devices, source, count):
    x = normal(21, 1, 9, 24)
    x[:, count:] *= 1e3

    found, read = mixed(devices, x, count)

    expected, chosen = moe_oracle(source, x[:, :count])
    np.testing.assert_allclose(found[:, :count], expected, atol=2e-5)
    assert not found[:, count:].any()
    assert read == len(chosen)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([1, 16, 40]).flatmap(
        lambda size: st.lists(st.integers(0, 5), min_size=size, max_size=size)
    ),
    st.sampled_from([1, 3, 8]),
)
def test_every_choice_has_a_place_of_its_own_in_a_run_of_its_expert(numbers, run):
    of_runs, places = map(np.asarray, experts._runs(jnp.array(numbers), 5, run=run))

    here = [place for number, place in zip(numbers, places, strict=True) if number < 5]
    assert len(set(here)) == len(here)
    assert of_runs[np.array(here, int) // run].tolist() == [n for n in numbers if n < 5]
    assert all(place >= len(of_runs) * run for place in set(places) - set(here))
    counts = np.bincount(numbers, minlength=6)[:5]
    assert (of_runs < 5).sum() == sum(-(-count // run) for count in counts)


@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 512, 4096])
def test_a_run_is_no_longer_than_what_there_is_to_run(tokens):
    for platform in ("cpu", "gpu"):
        run = rows_of_a_run(tokens, config=GROK_1, platform=platform, operand=2)

        mean = tokens / 4
        assert 1 <= run <= tokens
        assert run == 1 or mean <= run or (platform == "cpu" and run == forms._LONGEST_RUN)


def test_only_float32_on_a_cpu_has_short_runs():
    runs = {
        (platform, operand): [
            rows_of_a_run(tokens, config=GROK_1, platform=platform, operand=operand)
            for tokens in (8, 9, 16, 17, 64)
        ]
        for platform, operand in (("cpu", 4), ("cpu", 2), ("gpu", 4))
    }

    assert runs == {
        ("cpu", 4): [1, 4, 4, 16, 32],
        ("cpu", 2): [1, 8, 8, 16, 32],
        ("gpu", 4): [1, 5, 8, 9, 32],
    }


@pytest.mark.parametrize(
    ("platform", "batch", "time", "layers"),
    [("gpu", 1, 1, 64), ("gpu", 32, 1, 64), ("gpu", 33, 1, 1), ("gpu", 1, 2, 1), ("cpu", 1, 1, 1)],
)
def test_all_layers_are_one_program_where_few_sequences_decode(platform, batch, time, layers):
    assert forms.layers_together(platform, batch=batch, time=time) == layers


def test_an_accelerator_runs_numbers_of_tokens_close_around_the_mean():
    assert forms.capacities(4096, config=GROK_1) == (512, 1024, 1280, 1536, 2048)
    assert forms.capacities(16, config=GROK_1) == (2, 4, 5, 6, 8)
    assert forms.capacities(1, config=GROK_1) == (1,)


@pytest.mark.parametrize(
    ("shares", "count"),
    [
        pytest.param((0.5, 1.0, 2.0), 23, id="some"),
        pytest.param((0.2, 0.5), 40, id="with a rest"),
        pytest.param((0.15,), 40, id="with a long rest"),
        pytest.param((9.0,), 0, id="none"),
    ],
)
def test_experts_one_after_the_other_are_weighted_alike(
    devices, source, monkeypatch, shares, count
):
    monkeypatch.setattr(forms, "_FEW_TOKENS", 0)
    monkeypatch.setattr(forms, "_CAPACITIES", shares)
    x = normal(58, 1, 40, 24)

    found, read = mixed(devices, x, count, platform="gpu")

    expected, chosen = moe_oracle(source, x[:, :count])
    np.testing.assert_allclose(found[:, :count], expected, atol=2e-5)
    assert not found[:, count:].any()
    assert read == len(chosen)


def test_one_token_alone_goes_through_the_same_experts_as_among_many(devices):
    x = normal(22, 1, 3, 24)

    together, _ = mixed(devices, x)
    alone = np.concatenate([mixed(devices, x[:, [index]])[0] for index in range(3)], axis=1)

    # the two forms sum in different orders, and each JAX in its own
    np.testing.assert_allclose(alone, together, rtol=5e-6, atol=2e-6)


def test_batches_and_times_are_tokens_alike(devices, source):
    x = normal(23, 3, 1, 24)

    np.testing.assert_allclose(mixed(devices, x)[0], moe_oracle(source, x)[0], atol=2e-5)


def test_tokens_are_looked_up_wherever_their_row_lies(devices, source):
    tokens = np.array([[0, 7, 8, 31, 32, 63]], np.int32)
    shape = step_shape(mesh=devices.mesh)

    found = devices.run(
        lambda parameters, tokens: forward.embed(parameters.embedding, tokens, shape=shape),
        jnp.asarray(tokens),
    )

    expected = source.arrays["embedding.weight"][tokens] * SMALL.embedding_multiplier_scale
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_operands_are_bfloat16_where_that_is_asked_for_and_fast():
    shapes = {platform: step_shape(platform=platform, compute=BF16) for platform in ("cpu", "gpu")}
    fast = replace(shapes["cpu"], has_fast_bfloat16=True)

    assert {name: shape.operand for name, shape in shapes.items()} == {"cpu": FLOAT32, "gpu": BF16}
    assert fast.operand == BF16
    assert replace(fast, compute=FLOAT32).operand == FLOAT32


# --- the whole step


@pytest.fixture(scope="module")
def two_layers(request) -> ReleaseSource:
    return ReleaseSource(open_release(request.config.rootpath / "tests" / "data" / "two-layers"))


@pytest.fixture(scope="module")
def engine(two_layers):
    return infer(two_layers, EngineOptions(mesh=ONE, compute=Compute.FLOAT32))


def logits_of(engine, tokens):
    logits = np.zeros((len(tokens), engine.config.vocab_size), np.float32)
    engine.score(tokens, logits_out=logits)
    return logits


TOKENS = np.random.default_rng(40).integers(0, 256, 30).tolist()


def test_the_compiled_steps_are_the_model_in_parts(engine, two_layers):
    config, count = engine.config, 16
    cache = empty_cache(
        config,
        ONE,
        slots=1,
        past=count,
        dtype=FLOAT32,
        zeros=lambda shape, dtype: jnp.zeros((1, *shape), dtype),
    )
    nowhere = jnp.zeros(1, jnp.int32)

    def whole(parameters, tokens):
        positions = Positions(slots=nowhere, start=nowhere, count=jnp.int32(count))
        logits, _, read = forward.forward(
            parameters, cache, tokens, positions, shape=step_shape(config)
        )
        return logits[0], read

    logits, read = OnDevices(two_layers, ONE).run(whole, jnp.asarray([TOKENS[:count]]))

    np.testing.assert_allclose(logits, logits_of(engine, TOKENS[:count]), atol=1e-5)
    assert 0 < read <= config.num_layers * config.num_experts


@pytest.mark.parametrize("changed", [1, 15, 16, 28, 29])
def test_a_later_token_never_changes_earlier_logits(engine, changed):
    other = list(TOKENS)
    other[changed] = (other[changed] + 1) % 256

    before, after = logits_of(engine, TOKENS), logits_of(engine, other)

    np.testing.assert_array_equal(before[:changed], after[:changed])
    assert np.abs(before[changed:] - after[changed:]).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("length", [2, 15, 16, 17, 29])
def test_padding_never_changes_logits(engine, length):
    whole = logits_of(engine, TOKENS)

    part = logits_of(engine, TOKENS[:length])

    np.testing.assert_allclose(part, whole[:length], atol=1e-5)


def test_what_another_text_left_in_the_cache_is_never_seen(engine):
    tokens = TOKENS[:10]
    first = logits_of(engine, tokens)
    logits_of(engine, [(token * 7 + 1) % 256 for token in TOKENS])

    np.testing.assert_array_equal(logits_of(engine, tokens), first)


def test_the_last_logits_are_those_of_the_last_token(engine):
    every = logits_of(engine, TOKENS[:12])

    last = engine.runner.read_last(0, TOKENS, Chunk(0, 12, 16)).on_host()[0]

    assert last.shape == (256,)
    np.testing.assert_allclose(last, every[-1], atol=1e-5)


# --- Grok-1 itself, without a weight


@pytest.mark.parametrize("mesh", [MeshShape(1, 8), MeshShape(2, 8), MeshShape(1, 16)], ids=str)
def test_grok_1_has_the_right_shapes_on_every_device(mesh, monkeypatch):
    # traced once for all layers, as all are alike
    layer = jax.jit(forward.decoder_layer, static_argnames="shape")
    monkeypatch.setattr(forward, "decoder_layer", layer)
    config = replace(GROK_1, num_layers=2) if mesh.size == 16 and mesh.expert == 1 else GROK_1
    jax_mesh = jax.make_mesh(
        (mesh.expert, mesh.model),
        (axes.EXPERT_AXIS, axes.MODEL_AXIS),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: mesh.size],
    )
    per_device = PartitionSpec((axes.EXPERT_AXIS, axes.MODEL_AXIS))
    tensors = {tensor.key: tensor for tensor in released(config).tensors}

    def array(key):
        if key not in tensors:
            return None
        shape = extent(tensors[key].slices(mesh, mesh.size - 1, config))
        dtype = tensors[key].dtype
        return jax.ShapeDtypeStruct((mesh.size, *shape), "u2" if dtype == BFLOAT16 else dtype)

    parameters = build_parameters(
        config, lambda name: Matrix(array(f"{name}.weight"), array(f"{name}.scales"))
    )
    cache = empty_cache(
        config,
        mesh,
        slots=1,
        past=8192,
        dtype=BF16,
        zeros=lambda shape, dtype: jax.ShapeDtypeStruct((mesh.size, *shape), dtype),
    )
    shape = step_shape(config, mesh, platform="gpu", compute=BF16)

    def step(parameters, cache, tokens, start):
        parameters = jax.tree.map(lambda leaf: leaf[0], parameters)
        positions = Positions(slots=jnp.zeros(1, jnp.int32), start=start, count=jnp.int32(1))
        logits, cache, _ = forward.forward(parameters, cache, tokens, positions, shape=shape)
        return logits, cache

    mapped = jax.shard_map(
        step,
        mesh=jax_mesh,
        in_specs=(per_device, per_device, PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(None, None, axes.MODEL_AXIS), per_device),
        check_vma=False,
    )
    for time in (1, 16):
        tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
        logits, extended = jax.eval_shape(
            mapped, parameters, cache, tokens, jax.ShapeDtypeStruct((1,), jnp.int32)
        )
        assert logits.shape == (1, time, 131072)
        assert logits.dtype == jnp.float32
        assert extended == cache
