"""Which of several checkpoints of Grok-1 is run, how, and what is said when none fits."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.errors import HardwareError, PlacementError
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Terms, needs
from grokctl.planning.plans import MESHES, PRECISIONS, Hardware, hardware_for
from grokctl.planning.selection import Asked, Candidate, Choice, choose
from grokctl.planning.spread import Spread

GB = 10**9
RELEASE = Candidate(name="grok-1", storage=released_storage(GROK_1))


def cut(precision: str, mesh: str, *, is_mapped=True) -> Candidate:
    """A ready checkpoint, for a mesh such as `8` or `2x8`."""
    expert, _, model = mesh.rpartition("x")
    shape = MeshShape(int(expert or 1), int(model))
    return Candidate(
        name=f"grok-1-{precision}-{mesh}",
        storage=storage_in(RELEASE.storage, Precision(precision), shape),
        mesh=shape,
        is_mapped=is_mapped,
    )


def h100s(count: int) -> Hardware:
    return replace(hardware_for(accelerator="h100", devices=count), memory=78 * GB)


def a_cpu(memory: int, **facts) -> Hardware:
    return replace(hardware_for(accelerator="cpu", memory=memory), **facts)


def chosen(hardware, *candidates, **asked) -> Choice:
    return choose(hardware, candidates, Asked(**asked))


def refused(hardware, *candidates, cpu=None, **asked) -> HardwareError:
    with pytest.raises(HardwareError) as caught:
        choose(hardware, candidates, Asked(**asked), cpu=cpu)
    return caught.value


# --- which one


@pytest.mark.parametrize(
    ("hardware", "there", "name", "mesh", "why"),
    [
        pytest.param(h100s(8), "int8-8", "int8-8", "model=8", "on each", id="one"),
        pytest.param(
            *(h100s(8), "int8-4 int8-8 int4-8", "int8-8", "model=8"),
            "the fastest of 3 checkpoints, int4 aside",
            id="lossless before fast",
        ),
        pytest.param(
            *(h100s(8), "int8-4 int8-8", "int8-8", "model=8"),
            "the fastest of 2 checkpoints",
            id="all devices before half of them",
        ),
        pytest.param(
            *(hardware_for(accelerator="b200", devices=8), "bf16-8 int8-8", "int8-8", "model=8"),
            "the fastest of 2 checkpoints",
            id="fewer bytes",
        ),
        pytest.param(
            *(hardware_for(accelerator="b200", devices=8), "int8-4", "int8-4", "model=4"),
            "on each",
            id="as it was cut before cut again",
        ),
        pytest.param(h100s(8), "int8-16", "int8-16", "model=8", "on each", id="cut again"),
        pytest.param(h100s(8), "int8-2x8", "int8-2x8", "model=8", "on each", id="of two hosts"),
        pytest.param(
            *(h100s(8), "int4-8 int8-16", "int8-16", "model=8"),
            "the fastest of 2 checkpoints, int4 aside",
            id="lossless cut again before int4",
        ),
        pytest.param(
            *(h100s(4), "int8-4 int4-4", "int4-4", "model=4"),
            "the only one of 2 checkpoints that fits",
            id="int4 where int8 does not fit",
        ),
        pytest.param(
            *(a_cpu(512 * GB), "int8-8 int8-1", "int8-1", "model=1"),
            "the fastest of 2 checkpoints",
            id="one device of a CPU",
        ),
        pytest.param(
            *(a_cpu(512 * GB), "int8-8", "int8-8", "model=8"),
            "of memory",
            id="virtual devices where it was cut for them",
        ),
        pytest.param(
            *(a_cpu(512 * GB), "bf16-1 int4-1", "int4-1", "model=1"),
            "the fastest of 2 checkpoints",
            id="what memory holds before what the disk has to give",
        ),
        pytest.param(
            *(a_cpu(64 * GB), "int8-1 int4-1 bf16-1", "int4-1", "model=1"),
            "others from the disk for every token, the fastest of 3 checkpoints",
            id="from the disk half the bytes are half the wait",
        ),
    ],
)
def test_the_best_that_fits_is_chosen_and_the_reason_given(hardware, there, name, mesh, why):
    candidates = [cut(*one.split("-")) for one in there.split()]

    choice = choose(hardware, candidates, Asked())

    assert choice.candidate.name == f"grok-1-{name}"
    assert str(choice.plan.mesh) == mesh
    assert why in choice.reason
    assert choice.plan.fits
    assert choice.is_cut_again == (choice.candidate.mesh != choice.plan.mesh)


def test_the_line_says_what_on_what_and_why():
    eight = replace(h100s(8), name="NVIDIA H100 80GB HBM3")

    choice = chosen(eight, cut("int8", "8"), cut("int8", "4"), cut("bf16", "8"))

    total = choice.plan.needs.total / GB
    assert choice.reason == (
        "grok-1-int8-8 on 8 x NVIDIA H100 80GB HBM3 (model=8), bfloat16, context 8,192: "
        f"{total:.1f} GB of 78.0 GB on each, the fastest of 3 checkpoints"
    )


def test_a_checkpoint_alone_has_no_rivals():
    assert chosen(h100s(8), cut("int8", "8")).reason.endswith("GB on each")


def test_a_release_is_cut_for_all_devices_that_are_there():
    choice = chosen(h100s(8), RELEASE)

    assert choice.plan.mesh == MeshShape(1, 8)
    assert not choice.is_cut_again
    assert chosen(a_cpu(512 * GB), RELEASE).plan.mesh == MeshShape(1, 1)


def test_fewer_devices_are_taken_where_waiting_for_more_takes_longer():
    tiny = replace(GROK_1, num_layers=4, emb_size=256, key_size=16, vocab_size=512)
    small = Candidate(name="small", storage=released_storage(tiny))

    assert chosen(h100s(8), small).plan.mesh == MeshShape(1, 1)


def test_several_that_are_alike_are_chosen_by_name():
    one, other = (replace(cut("int8", "8"), name=name) for name in "ab")

    assert chosen(h100s(8), other, one).candidate.name == "a"


# --- how


def test_the_mesh_that_is_asked_for_is_taken():
    two = MeshShape(2, 8)

    choice = chosen(a_cpu(512 * GB), cut("int8", "8"), cut("int8", "1"), mesh=two)

    assert choice.plan.mesh == two
    assert choice.is_cut_again
    assert "the CPU as 16 devices (expert=2,model=8)" in choice.reason


def test_of_several_the_one_that_was_cut_for_the_mesh_is_taken():
    four = hardware_for(accelerator="b200", devices=8)

    choice = chosen(four, cut("int8", "8"), cut("int8", "4"), mesh=MeshShape(1, 4))

    assert choice.candidate.name == "grok-1-int8-4"


def test_all_of_the_context_is_taken_where_it_fits_and_else_a_power_of_two():
    contexts = [chosen(h100s(8), cut("int8", "8"), sequences=n).plan.context for n in (1, 64, 256)]

    choice = chosen(h100s(8), cut("int8", "8"), sequences=256)
    needed = choice.plan.needs
    assert contexts == [8192, 8192, 4096]
    assert needed.total <= 78 * GB < needed.total + needed.cache  # twice as long does not fit
    assert "256 sequences: " in choice.reason
    assert "context 4,096 of 8,192" in choice.reason


def test_the_context_that_is_asked_for_is_taken():
    choice = chosen(h100s(8), cut("int8", "8"), context=1000)

    assert choice.plan.context == 1000


def test_as_many_sequences_are_taken_as_cost_no_context():
    counts = []
    for memory in range(41 * GB, 47 * GB, GB // 4):
        hardware = replace(h100s(8), memory=memory)
        try:
            alone = chosen(hardware, cut("int8", "8")).plan
        except HardwareError:
            continue
        found = chosen(hardware, cut("int8", "8"), sequences=8, may_be_fewer=True).plan
        counts.append(found.slots)
        assert found.context == alone.context
        if found.slots < 8:
            with suppress(HardwareError):
                more = chosen(hardware, cut("int8", "8"), sequences=2 * found.slots).plan
                assert more.context < found.context

    assert {1, 2, 4, 8} == set(counts)


def test_more_context_is_taken_before_the_mesh_of_the_checkpoint():
    sixteen = hardware_for(accelerator="a100-40gb", devices=16)

    few, many = (chosen(sixteen, cut("int4", "8"), sequences=count) for count in (48, 56))

    assert few.plan.context == many.plan.context == GROK_1.sequence_len
    assert (few.plan.mesh.size, many.plan.mesh.size) == (8, 16)


@pytest.mark.parametrize("compute", Compute)
def test_the_type_of_computation_that_is_asked_for_is_taken(compute):
    assert chosen(h100s(8), cut("int8", "8"), compute=compute).plan.compute is compute


def test_the_type_of_computation_is_what_the_hardware_is_fast_in():
    old = replace(h100s(8), has_fast_bfloat16=False)

    assert chosen(h100s(8), cut("int8", "8")).plan.compute is Compute.BFLOAT16
    assert chosen(old, cut("int8", "8")).plan.compute is Compute.FLOAT32
    assert chosen(old, cut("int8", "8"), sequences=100).plan.compute is Compute.BFLOAT16


def test_a_cache_of_codes_is_planned_with():
    plan = chosen(h100s(8), cut("int8", "8"), sequences=256, kv=KvType.INT8).plan

    assert (plan.kv, plan.context) == (KvType.INT8, 8192)


def test_accelerators_that_do_not_count_their_memory_are_taken_to_have_enough():
    choice = chosen(replace(h100s(8), memory=None), cut("bf16", "8"))

    assert choice.plan.precision is Precision.BFLOAT16
    assert choice.reason.endswith("GB on each")


# --- a CPU


def test_what_is_cut_in_memory_is_not_paged():
    small, large = a_cpu(200 * GB), a_cpu(400 * GB)

    assert "318.2 GB of weights" in str(refused(small, RELEASE))
    assert "318.2 GB of weights" in str(refused(small, cut("int8", "1", is_mapped=False)))
    assert "of weights" in str(refused(small, cut("int8", "8"), mesh=MeshShape(1, 1)))
    assert chosen(small, cut("int8", "1")).plan.is_paged
    assert not chosen(large, RELEASE).plan.is_paged


def test_a_cpu_that_cannot_hold_what_every_token_reads_is_refused():
    error = refused(a_cpu(10 * GB), cut("int8", "1"))

    assert "with all other experts on the disk (8.9 GB of weights that every token" in str(error)
    assert str(error).endswith("9.2 GB of 10.0 GB are free for it")
    assert error.hint == "grokctl reshard --devices 1 --precision int4"
    assert refused(a_cpu(5 * GB), cut("int8", "1")).hint == "grokctl doctor"
    assert refused(a_cpu(13 * GB), cut("int8", "1"), context=8192).hint == "--context 4096"


def test_a_plan_that_streams_says_how_many_experts_stay_and_the_memory_that_they_take():
    choice = chosen(a_cpu(64 * GB), cut("int8", "1"))

    residence = choice.plan.residence
    assert choice.plan.context == 8192
    assert f"{residence.total / GB:.1f} GB of 64.0 GB of memory" in choice.reason
    assert "77 of 512 experts in memory and the others from the disk" in choice.reason


# --- what does not fit


def test_both_numbers_are_said_and_what_they_are_made_of():
    error = refused(h100s(4), cut("int8", "4"))

    needed = needs(
        GROK_1,
        MeshShape(1, 4),
        Terms(context=512, compute=Compute.BFLOAT16),
        weights=max(Spread.of(RELEASE.storage, MeshShape(1, 4)).stored),
        precision=Precision.INT8,
        platform="gpu",
    )
    assert str(error) == (
        f"grok-1-int8-4 on 4 x H100 80GB (model=4) takes {needed.total / GB:.1f} GB "
        f"({needed.weights / GB:.1f} GB of weights, {needed.cache / 1e6:.1f} MB for 512 tokens of "
        f"context, {needed.workspace / 1e6:.1f} MB to compute in), 78.0 GB are free on each"
    )


@pytest.mark.parametrize(
    ("hardware", "there", "asked", "hint"),
    [
        pytest.param(
            *(h100s(8), "int8-8", {"sequences": 256, "context": 8192}),
            "--context 4096",
            id="a shorter context",
        ),
        pytest.param(
            *(h100s(8), "int8-8", {"sequences": 256, "mesh": MeshShape(1, 8), "context": 512}),
            None,
            id="it fits",
        ),
        pytest.param(
            *(a_cpu(60 * GB), "int8-1", {"sequences": 256, "compute": Compute.FLOAT32}),
            "--compute bfloat16",
            id="a smaller type",
        ),
        pytest.param(
            *(a_cpu(40 * GB), "int8-1", {"sequences": 256, "compute": Compute.BFLOAT16}),
            "--kv int8",
            id="a smaller cache",
        ),
        pytest.param(
            h100s(8), "int8-8", {"mesh": MeshShape(1, 4)}, "--devices 8", id="more devices"
        ),
        pytest.param(
            h100s(4), "int8-4", {}, "grokctl reshard --devices 4 --precision int4", id="int4"
        ),
        pytest.param(h100s(8), "bf16-8", {}, "grokctl reshard --devices 8", id="int8"),
        pytest.param(h100s(1), "int8-1 int4-1", {}, "grokctl doctor", id="nothing"),
    ],
)
def test_the_hint_is_what_helps(hardware, there, asked, hint):
    candidates = [cut(*one.split("-")) for one in there.split()]

    if hint is None:
        assert choose(hardware, candidates, Asked(**asked)).plan.fits
    else:
        assert refused(hardware, *candidates, **asked).hint == hint


def test_the_cpu_is_the_hint_where_it_can_and_accelerators_cannot():
    error = refused(h100s(1), cut("int4", "1"), cpu=a_cpu(256 * GB))

    assert error.hint == "JAX_PLATFORMS=cpu grokctl run …"
    assert refused(h100s(1), cut("int4", "1"), cpu=a_cpu(10**6)).hint == "grokctl doctor"


def test_the_numbers_are_those_of_the_nearest():
    error = refused(h100s(1), cut("bf16", "1"), cut("int4", "1"), cut("int8", "1"))

    assert str(error).startswith("grok-1-int4-1 on H100 80GB takes 17")


def test_a_mesh_that_holds_no_such_model_is_a_placement_error():
    with pytest.raises(PlacementError) as caught:
        chosen(h100s(8), cut("int8", "8"), mesh=MeshShape(1, 3))

    assert caught.value.hint.startswith("--devices")


def test_a_mesh_that_cuts_int4_groups_names_the_one_that_does_not():
    coarse = cut("int4", "4")
    groups = {name: min(rows, 8) for name, rows in coarse.storage.groups.items()}
    coarse = replace(coarse, storage=replace(coarse.storage, groups=groups))
    sixteen = hardware_for(accelerator="h100", devices=16)

    with pytest.raises(PlacementError, match=r"int4|cut its") as alone:
        chosen(sixteen, coarse, mesh=MeshShape(1, 16))
    with pytest.raises(PlacementError, match="none of 2 checkpoints") as together:
        chosen(sixteen, coarse, replace(coarse, name="other"), mesh=MeshShape(1, 16))

    assert alone.value.hint == "--mesh model=4"
    assert together.value.exit_code == alone.value.exit_code
    assert chosen(sixteen, coarse).plan.mesh == coarse.mesh


# --- whatever there is

CUTS = [cut(p, m.slug) for p in PRECISIONS for m in MESHES[3:]]
READY = st.lists(st.sampled_from(range(len(CUTS))), min_size=1, max_size=3, unique=True)
"""Places in `CUTS`, whose own texts are too long for an example."""


def order(plan):
    return *plan.drawbacks, -plan.context


@settings(deadline=None, max_examples=40)
@example(ready=[3, 6], count=4, size=80, sequences=2)
@given(READY, st.sampled_from([1, 4, 8, 16]), st.integers(1, 200), st.integers(1, 64))
def test_what_is_chosen_fits_and_more_memory_refuses_nothing(ready, count, size, sequences):
    candidates = [CUTS[place] for place in ready]
    hardware = replace(h100s(count), memory=size * GB)
    asked = Asked(sequences=sequences)
    choice = None
    with suppress(HardwareError):
        choice = choose(hardware, candidates, asked)

    if choice is None:
        assert refused(hardware, *candidates, sequences=sequences).hint
        return
    more = choose(replace(hardware, memory=2 * size * GB), candidates, asked)
    assert choice.plan.fits
    assert choice.plan.mesh.size <= count
    assert choice.candidate in candidates
    # a better precision than int4 comes before more context
    assert order(more.plan) <= order(choice.plan)
