"""Bytes a device: weights as files have them, published sizes, and what grows with what."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import TINY, meshes, models, storages

from grokctl.checkpoint.layout import bytes_per_token, device_layouts, weight_bytes
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.errors import PlacementError
from grokctl.model.config import GROK_1
from grokctl.model.memory_share import MEMORY_SHARE, environment_share, usable
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import (
    Needs,
    Terms,
    _Step,
    cache_bytes,
    needs,
    program_bytes,
    workspace_bytes,
)
from grokctl.model.tensors import Axis

OWN = released_storage(GROK_1)
EIGHT = MeshShape(1, 8)
PUBLISHED = {
    MeshShape(1, 1): (318.2, 170.5, 633.0, 1262.7),
    MeshShape(1, 2): (159.1, 85.3, 316.5, 631.4),
    MeshShape(1, 4): (79.6, 42.6, 158.3, 315.7),
    MeshShape(1, 8): (39.8, 21.3, 79.1, 157.9),
    MeshShape(1, 16): (20.0, 10.7, 39.7, 79.1),
    MeshShape(2, 8): (20.5, 11.1, 40.5, 80.5),
}
"""GB for each device in docs/measurements.md, of int8, int4, bf16 and float32."""
PRECISIONS = (Precision.INT8, Precision.INT4, Precision.BFLOAT16, Precision.FLOAT32)


def needed(mesh=EIGHT, *, weights=None, precision=Precision.INT8, **changes) -> Needs:
    terms = Terms(**{"context": 8192, "compute": Compute.BFLOAT16, **changes})
    weights = max(weight_bytes(OWN, mesh)) if weights is None else weights
    return needs(GROK_1, mesh, terms, weights=weights, precision=precision, platform="gpu")


# --- weights


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weights_are_what_device_files_hold_behind_their_headers(data):
    config = data.draw(models())
    mesh = data.draw(meshes(config))
    storage = data.draw(storages(config, mesh, data.draw(st.sampled_from(Precision))))

    found = weight_bytes(storage, mesh)

    layouts = device_layouts(storage, mesh)
    assert found == tuple(layout.nbytes - len(layout.header) for layout in layouts)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_token_reads_everything_but_the_experts_that_it_does_not_choose(data):
    config = data.draw(models())
    chosen = data.draw(st.integers(1, config.num_experts))
    config = replace(config, num_selected_experts=chosen)
    mesh = data.draw(meshes(config))
    storage = data.draw(storages(config, mesh, data.draw(st.sampled_from(Precision))))

    found = bytes_per_token(storage, mesh)

    for device, layout in enumerate(device_layouts(storage, mesh)):
        sizes = {True: 0, False: 0}
        for held in layout.tensors:
            sizes[Axis.EXPERTS in held.tensor.spec.axes] += held.nbytes
        assert found[device] == sizes[False] + sizes[True] * chosen // config.num_experts


@pytest.mark.parametrize("mesh", PUBLISHED, ids=str)
def test_grok_1_takes_what_the_table_says(mesh):
    found = [max(weight_bytes(storage_in(OWN, kept, mesh), mesh)) for kept in PRECISIONS]

    assert tuple(round(nbytes / 1e9, 1) for nbytes in found) == PUBLISHED[mesh]


def test_a_table_of_grok_1_takes_no_time_to_speak_of():
    begun = time.process_time()

    for mesh in PUBLISHED:
        for precision in Precision:
            storage = storage_in(OWN, precision, mesh)
            assert max(weight_bytes(storage, mesh)) > max(bytes_per_token(storage, mesh)) > 0

    assert time.process_time() - begun < 2


def test_a_mesh_that_cannot_hold_a_model_is_refused():
    with pytest.raises(PlacementError, match="devices"):
        weight_bytes(OWN, MeshShape(1, 3))


def test_int4_groups_that_a_device_would_have_in_part_are_refused():
    two = storage_in(released_storage(TINY), Precision.INT4, MeshShape(1, 2))
    whole = replace_groups(two, "layers.0.moe.down", 1)

    with pytest.raises(PlacementError, match="not whole int4 groups"):
        weight_bytes(whole, MeshShape(1, 2))


def replace_groups(storage, name, groups):
    return replace(storage, groups={**storage.groups, name: groups})


# --- all of it


@settings(max_examples=200, deadline=None)
@given(
    mesh=st.sampled_from(list(PUBLISHED)),
    contexts=st.tuples(st.integers(1, 8192), st.integers(1, 8192)),
    slots=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    compute=st.sampled_from(Compute),
    kv=st.sampled_from(KvType),
    precision=st.sampled_from(Precision),
    platform=st.sampled_from(["cpu", "gpu", "tpu"]),
)
def test_longer_contexts_and_more_slots_never_need_less(
    mesh, contexts, slots, compute, kv, **stored
):
    low, high = (
        needs(
            GROK_1,
            mesh,
            Terms(context=context, compute=compute, slots=count, kv=kv),
            weights=7,
            **stored,
        )
        for context, count in zip(sorted(contexts), sorted(slots), strict=True)
    )

    assert 7 == low.weights == high.weights
    assert 0 < low.cache <= high.cache
    assert 0 < low.workspace <= high.workspace
    assert low.total == 7 + low.cache + low.workspace


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_small_model_takes_no_more_on_a_device_of_many_than_on_one(data):
    config = data.draw(models())
    mesh = data.draw(meshes(config))
    assume(mesh.size > 1)
    terms = Terms(
        context=data.draw(st.integers(1, config.sequence_len)),
        slots=data.draw(st.integers(1, 4)),
        compute=data.draw(st.sampled_from(Compute)),
        kv=data.draw(st.sampled_from(KvType)),
    )
    stored = {
        "precision": data.draw(st.sampled_from(Precision)),
        "platform": data.draw(st.sampled_from(["cpu", "gpu", "tpu"])),
    }

    alone = workspace_bytes(config, MeshShape(1, 1), terms, **stored)

    assert 0 < workspace_bytes(config, mesh, terms, **stored) <= alone


def test_the_parts_are_those_that_are_counted_one_by_one():
    found = needed(slots=4, kv=KvType.INT8)

    assert found.cache == cache_bytes(GROK_1, EIGHT, slots=4, past=8192, dtype=np.dtype(np.int8))
    assert found.weights == max(weight_bytes(OWN, EIGHT))


def test_codes_of_keys_and_values_take_about_half_and_float32_twice_as_much():
    plain = needed().cache

    assert needed(kv=KvType.INT8).cache == plain * (128 + 4) // 256  # codes and a scale a head
    assert needed(compute=Compute.FLOAT32).cache == 2 * plain
    assert plain == 64 * 2 * 8192 * 128 * 2


@pytest.mark.parametrize(
    ("mesh", "precision", "gigabytes", "fits"),
    [
        pytest.param(MeshShape(1, 8), Precision.INT8, 80, True, id="8 x 80 GB"),
        pytest.param(MeshShape(1, 4), Precision.INT8, 141, True, id="4 x 141 GB"),
        pytest.param(MeshShape(1, 16), Precision.INT8, 40, True, id="16 x 40 GB"),
        pytest.param(MeshShape(1, 16), Precision.INT8, 24, True, id="16 x 24 GB"),
        pytest.param(MeshShape(1, 8), Precision.INT8, 48, True, id="8 x 48 GB"),
        pytest.param(MeshShape(1, 4), Precision.INT8, 80, False, id="4 x 80 GB"),
        pytest.param(MeshShape(1, 4), Precision.INT4, 80, True, id="4 x 80 GB, int4"),
        pytest.param(MeshShape(1, 1), Precision.INT4, 80, False, id="1 x 80 GB, int4"),
        pytest.param(MeshShape(1, 8), Precision.BFLOAT16, 80, False, id="8 x 80 GB, bf16"),
    ],
)
def test_what_fits_on_gpus_that_people_have(mesh, precision, gigabytes, fits):
    weights = max(weight_bytes(storage_in(OWN, precision, mesh), mesh))

    found = needed(mesh, weights=weights, precision=precision)

    assert (found.total <= usable(gigabytes * 10**9, platform="gpu")) is fits


@pytest.mark.parametrize(
    ("mesh", "precision", "layers", "every", "scores"),
    [
        pytest.param(MeshShape(1, 16), Precision.INT8, 503, 285, 187, id="model=16"),
        pytest.param(MeshShape(1, 8), Precision.INT8, 545, 419, 192, id="model=8"),
        pytest.param(MeshShape(1, 8), Precision.INT4, 550, 419, 192, id="model=8, int4"),
        pytest.param(MeshShape(1, 4), Precision.INT8, 805, 688, 204, id="model=4"),
        pytest.param(MeshShape(1, 1), Precision.INT8, 2013, 2298, 275, id="model=1"),
    ],
)
def test_programs_for_gpus_take_what_xla_reported(mesh, precision, layers, every, scores):
    """Megabytes for a chunk of 4,096 tokens: `make gpu-forms` with JAX 0.11.2."""
    step = _Step(
        config=GROK_1,
        mesh=mesh,
        tokens=4096,
        batch=1,
        platform="gpu",
        operand=2,
        kept=2,
        precision=precision,
    )

    found = (step.layers, step.head, step.scores)

    assert found == pytest.approx([1e6 * size for size in (layers, every, scores)], rel=0.03)
    assert step.embed == 4096 * 6144 * 4


@pytest.mark.parametrize(
    ("precision", "temporaries"),
    [
        pytest.param(Precision.INT8, 344, id="int8"),
        pytest.param(Precision.INT4, 348, id="int4"),
    ],
)
def test_experts_take_most_on_eight_gpus(precision, temporaries):
    step = _Step(
        config=GROK_1,
        mesh=EIGHT,
        tokens=4096,
        batch=1,
        platform="gpu",
        operand=2,
        kept=2,
        precision=precision,
    )

    assert step._experts == pytest.approx(1e6 * temporaries, rel=0.03)
    assert step._experts > step._attention


def test_a_gpu_has_room_for_a_library_and_to_try_the_heads_product():
    terms = Terms(context=8192, compute=Compute.BFLOAT16)
    of = {"precision": Precision.INT8, "platform": "gpu"}
    tried = 4 * (4096 * 6144 + 131072 // 8 * (6144 + 4096))  # vectors, embedding and logits

    assert workspace_bytes(GROK_1, EIGHT, terms, **of) == tried + 2**25
    sixteen = MeshShape(1, 16)
    programs = program_bytes(GROK_1, sixteen, terms, **of)
    assert workspace_bytes(GROK_1, sixteen, terms, **of) == programs + 2**25


def test_needs_say_their_parts():
    found = Needs(weights=39_800_000_000, cache=2_100_000_000, workspace=500_000_000)

    assert str(found) == "weights 39.8 GB, cache 2.1 GB and workspace 500.0 MB"


# --- how much there is


def test_a_gpu_keeps_something_for_itself_unless_jax_was_told_otherwise():
    assert usable(1000, platform="gpu") == 1000 * MEMORY_SHARE
    assert usable(1000, platform="gpu", share=0.5) == 500
    assert usable(1000, platform="tpu", share=0.5) > 920  # the variable is for GPUs only
    assert usable(1000, platform="cpu", share=0.5) == 1000


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, None),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.9),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 0.5),
        ({"XLA_CLIENT_MEM_FRACTION": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}, 0.6),
        ({"XLA_CLIENT_MEM_FRACTION": "most"}, None),
        ({"XLA_CLIENT_MEM_FRACTION": "nan"}, None),
        ({"XLA_CLIENT_MEM_FRACTION": "0"}, None),
    ],
)
def test_what_the_environment_says_of_a_gpus_memory_is_read_as_jax_does(variables, share):
    assert environment_share(variables) == share
