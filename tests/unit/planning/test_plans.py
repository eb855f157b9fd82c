"""What fits on which hardware, and how fast it is estimated to be: the real Grok-1's numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.layout import bytes_per_token, weight_bytes
from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.errors import PlacementError, UsageError
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
from grokctl.model.config import GROK_1
from grokctl.model.memory_share import usable
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Terms
from grokctl.planning.accelerators import PUBLISHED
from grokctl.planning.plans import (
    MESHES,
    PRECISIONS,
    Hardware,
    Plan,
    accelerated,
    examples,
    hardware_for,
    hardware_of,
    plan_for,
    plans,
)
from grokctl.planning.residence import room_in
from grokctl.planning.spread import Spread, missed_bytes, read_bytes
from grokctl.planning.step_time import KERNEL_REACHED, REACHED

GB = 10**9
SMALL = replace(GROK_1, num_layers=2, emb_size=256, key_size=16, vocab_size=512, sequence_len=2048)
INT8, INT4, BF16, FLOAT32 = PRECISIONS


def grok(precision: Precision, mesh: MeshShape) -> Spread:
    return Spread.of(storage_in(released_storage(GROK_1), precision, mesh), mesh)


def on(hardware: Hardware, size: int, **options) -> dict[Precision, Plan]:
    """Plans for all devices on the model axis, by precision."""
    found = plans(hardware, **options)
    return {plan.precision: plan for plan in found if plan.mesh == MeshShape(1, size)}


def a_cpu(memory: int, **facts) -> Hardware:
    given = {"bandwidth": 300e9, "read_rate": 3e9} | facts
    return replace(hardware_for(accelerator="cpu", memory=memory), **given)


# --- the table of the README


@pytest.mark.parametrize(
    ("hardware", "fitting"),
    [
        pytest.param(hardware_for(devices=8, memory=80 * GB), {INT8, INT4}, id="8 x 80 GB"),
        pytest.param(hardware_for(devices=4, memory=141 * GB), {INT8, INT4}, id="4 x 141 GB"),
        pytest.param(hardware_for(devices=16, memory=40 * GB), {INT8, INT4}, id="16 x 40 GB"),
        pytest.param(hardware_for(devices=16, memory=24 * GB), {INT8, INT4}, id="16 x 24 GB"),
        pytest.param(hardware_for(devices=8, memory=48 * GB), {INT8, INT4}, id="8 x 48 GB"),
        pytest.param(hardware_for(devices=4, memory=80 * GB), {INT4}, id="4 x 80 GB"),
        pytest.param(hardware_for(devices=1, memory=80 * GB), set(), id="1 x 80 GB"),
        pytest.param(hardware_for(devices=8, memory=192 * GB), set(PRECISIONS), id="8 x 192 GB"),
    ],
)
def test_what_fits_of_grok_1_on_accelerators(hardware, fitting):
    found = on(hardware, hardware.count)

    assert set(found) == set(PRECISIONS)
    assert {precision for precision, plan in found.items() if plan.fits} == fitting


def test_int8_does_not_fit_on_four_of_80_gb_and_the_plan_says_by_how_much():
    hardware = hardware_for(accelerator="h100", devices=4)

    plan = on(hardware, 4)[INT8]

    assert not plan.fits
    assert plan.is_possible
    assert plan.memory == hardware.memory == usable(80 * GB, platform="gpu")
    assert plan.missing == plan.needs.total - plan.memory > 0
    assert plan.needs.weights > GB * 318 / 4


def test_on_512_gb_of_memory_a_cpu_holds_int8_and_int4_and_reads_the_others_from_the_disk():
    found = on(a_cpu(512 * GB), 1)

    assert all(plan.fits for plan in found.values())
    assert {precision for precision, plan in found.items() if plan.is_paged} == {BF16, FLOAT32}
    assert found[INT8].tokens_per_s > 10 * found[BF16].tokens_per_s


def test_a_plan_is_made_for_every_mesh_and_precision():
    found = plans(hardware_for(accelerator="h100", devices=8))

    assert [(p.mesh, p.precision) for p in found] == [(m, p) for m in MESHES for p in PRECISIONS]
    assert {plan.mesh.size for plan in found if plan.is_possible} == {1, 2, 4, 8}
    assert not any(plan.fits for plan in found if plan.mesh.size == 16)


def test_a_cpu_is_planned_for_as_one_device():
    found = plans(a_cpu(512 * GB))

    assert [(p.mesh, p.precision) for p in found] == [(MeshShape(1, 1), p) for p in PRECISIONS]


def test_a_model_that_does_not_divide_over_a_mesh_has_no_plan_for_it():
    three = replace(SMALL, num_q_heads=3, num_kv_heads=3, num_experts=3)

    found = plans(hardware_for(accelerator="h100"), config=three)

    assert {plan.mesh for plan in found} == {MeshShape(1, 1)}


@pytest.mark.parametrize("context", [0, -1, GROK_1.sequence_len + 1])
def test_a_context_that_the_model_does_not_have_is_refused(context):
    with pytest.raises(UsageError, match=f"context {context}: expected 1 to 8192"):
        plans(None, context=context)


def test_less_is_asked_of_a_device_for_a_shorter_context_and_a_smaller_cache():
    hardware = hardware_for(accelerator="h100", devices=8)

    whole, short, coded, many = (
        on(hardware, 8, **options)[INT8]
        for options in ({}, {"context": 1024}, {"kv": KvType.INT8}, {"slots": 4})
    )

    assert (whole.context, short.context) == (GROK_1.sequence_len, 1024)
    assert 8 * short.needs.cache == whole.needs.cache
    assert coded.needs.cache < whole.needs.cache
    assert many.needs.cache == 4 * whole.needs.cache
    assert whole.needs.weights == short.needs.weights == many.needs.weights


# --- the type of computation


def test_a_cpu_without_a_matrix_unit_computes_in_float32_as_long_as_its_cache_fits():
    slow = a_cpu(512 * GB, has_fast_bfloat16=False)
    small = replace(slow, memory=15 * GB)

    assert on(a_cpu(512 * GB), 1)[INT8].compute is Compute.BFLOAT16
    assert on(slow, 1)[INT8].compute is Compute.FLOAT32
    assert on(small, 1)[INT8].compute is Compute.BFLOAT16
    assert on(small, 1)[INT8].fits


def test_the_type_of_computation_that_is_asked_for_is_planned():
    found = plans(hardware_for(accelerator="h100"), compute=Compute.FLOAT32)

    assert {plan.compute for plan in found} == {Compute.FLOAT32}


# --- without hardware


def test_without_hardware_plans_say_what_would_be_needed():
    found = plans(None)

    assert len(found) == len(MESHES) * len(PRECISIONS)
    assert {(plan.memory, plan.is_possible, plan.fits, plan.missing) for plan in found} == {
        (None, False, False, 0)
    }
    assert {(plan.load_s, plan.tokens_per_s) for plan in found} == {(None, None)}


def test_examples_are_accelerators_that_hold_a_plan_gpus_and_the_smallest_first():
    for plan in plans(None):
        found = examples(plan)

        rooms = {kind: usable(kind.memory, platform=kind.platform) for kind in PUBLISHED}
        assert set(found) == {k for k, room in rooms.items() if room >= plan.needs.total}
        for platform in ("gpu", "tpu"):
            sizes = [kind.memory for kind in found if kind.platform == platform]
            assert sizes == sorted(sizes)
        assert [kind.platform for kind in found] == sorted(kind.platform for kind in found)


def test_eight_l40s_are_the_smallest_that_hold_int8():
    by_mesh = {plan.mesh.size: plan for plan in plans(None) if plan.precision is INT8}

    assert examples(by_mesh[8])[0].slug == "l40s-48gb"
    assert examples(by_mesh[1]) == ()


# --- estimates


def test_loading_takes_as_long_as_reading_what_all_devices_get():
    hardware = replace(hardware_for(accelerator="h100", devices=8), read_rate=2e9)
    weights = grok(INT8, MeshShape(1, 8))

    assert on(hardware, 8)[INT8].load_s == sum(weights.stored) / 2e9
    assert on(replace(hardware, read_rate=None), 8)[INT8].load_s is None


def test_a_token_takes_the_reading_of_its_weights_and_of_the_context():
    hardware = hardware_for(accelerator="h100", devices=8)
    read = max(bytes_per_token(released_storage(GROK_1), MeshShape(1, 8)))
    cache = 2 * 64 * 128 * 2  # keys and values of a head, in bfloat16, for each position

    steps = [on(hardware, 8, context=context)[INT8].estimate for context in (100, 8192)]

    assert [step.nbytes for step in steps] == [read + 100 * cache, read + 8192 * cache]
    assert [step.reading_s * 3350e9 * REACHED["gpu"] for step in steps] == pytest.approx(
        [step.nbytes for step in steps]
    )


def test_other_sequences_do_not_slow_the_estimate_of_one_and_codes_of_keys_read_less():
    hardware = hardware_for(accelerator="h100", devices=8)
    one, many, codes = (
        on(hardware, 8, **options)[INT8]
        for options in ({}, {"slots": 4}, {"slots": 4, "kv": KvType.INT8})
    )

    assert many.tokens_per_s == one.tokens_per_s < codes.tokens_per_s
    assert one.tokens_per_s == 1 / one.estimate.total_s


@pytest.mark.parametrize("bandwidth", [None, 400e9])
def test_any_platform_of_jax_can_be_planned_for(bandwidth):
    hardware = Hardware(
        platform="METAL", name="Apple M2", count=1, memory=900 * GB, bandwidth=bandwidth
    )

    plan = on(hardware, 1)[INT8]

    assert plan.fits
    assert (plan.tokens_per_s is None) == (bandwidth is None)
    assert plan.step.launches_s == 0


def test_clients_share_the_reading_of_weights():
    hardware = hardware_for(accelerator="h100", devices=8)
    plans = {slots: on(hardware, 8, slots=slots, context=64)[INT8] for slots in (1, 2, 8, 64)}

    assert plans[1].shared_tokens_per_s is None
    rates = [plans[slots].shared_tokens_per_s for slots in (2, 8, 64)]
    assert plans[1].tokens_per_s > rates[0] > rates[1] > rates[2]
    assert 2 * rates[0] < 8 * rates[1] < 64 * rates[2]  # of all together
    paged = on(a_cpu(100 * GB), 1, slots=2)[INT8]
    assert paged.is_paged
    assert paged.shared_tokens_per_s is None


def test_an_expert_is_read_once_for_all_that_choose_it():
    weights = grok(INT8, MeshShape(1, 1))
    (whole,), (read,) = weights.stored, weights.read
    experts = (whole - read) * 8 / 6

    assert read_bytes(weights, 1) == [read]
    assert read_bytes(weights, 2)[0] - read == pytest.approx(experts * 1.5 / 8)  # of 3.5 experts
    assert read_bytes(weights, 1000)[0] == whole


def test_a_cpu_is_estimated_by_the_reading_of_weights_alone():
    (read,) = bytes_per_token(released_storage(GROK_1), MeshShape(1, 1))

    plan = on(a_cpu(512 * GB), 1)[INT8]

    assert plan.tokens_per_s == pytest.approx(300e9 * REACHED["cpu"] / read)
    assert plan.estimate.total_s == plan.estimate.reading_s


def test_a_cpu_with_the_kernel_is_as_fast_as_that_was_measured():
    weights = grok(INT8, MeshShape(1, 1))
    alone, paged = a_cpu(400 * GB), a_cpu(200 * GB)

    with_kernel = on(replace(alone, kernel_rate=280e9), 1)[INT8]
    from_disk = on(replace(paged, kernel_rate=280e9), 1)[INT8]

    assert with_kernel.tokens_per_s == pytest.approx(280e9 * KERNEL_REACHED / weights.read[0])
    assert with_kernel.tokens_per_s > on(alone, 1)[INT8].tokens_per_s
    assert from_disk.tokens_per_s > on(paged, 1)[INT8].tokens_per_s


def test_nothing_is_estimated_of_what_nobody_knows():
    plan = on(hardware_for(devices=8, memory=80 * GB), 8)[INT8]

    assert plan.fits
    assert plan.tokens_per_s is None
    assert plan.estimate is None
    assert plan.step is not None  # to compare plans by
    assert on(a_cpu(100 * GB, read_rate=None), 1)[INT8].tokens_per_s is None
    assert on(a_cpu(400 * GB, read_rate=None), 1)[INT8].tokens_per_s is not None


def test_weights_that_memory_does_not_hold_are_waited_for():
    weights = grok(INT8, MeshShape(1, 1))
    (whole,), (read,) = weights.stored, weights.read

    assert missed_bytes(weights, whole) == 0
    assert missed_bytes(weights, whole - GB) == GB / 4  # of eight experts, two are chosen
    assert missed_bytes(weights, read) == (whole - read) / 4 < read
    assert missed_bytes(weights, read - 1) == read  # gone before it is needed again
    assert missed_bytes(weights, 0) == read


def test_a_model_of_which_every_expert_is_chosen_is_read_whole():
    all_of_them = replace(SMALL, num_selected_experts=8)
    weights = Spread.of(released_storage(all_of_them), MeshShape(1, 1))

    assert read_bytes(weights, 9) == list(weights.read)
    assert missed_bytes(weights, weights.stored[0]) == 0
    assert missed_bytes(weights, weights.stored[0] - 1) == weights.stored[0]


def test_a_streamed_plan_is_as_fast_as_the_slower_of_memory_and_disk():
    hardware = a_cpu(200 * GB)

    plan = on(hardware, 1)[INT8]

    assert plan.is_paged
    assert plan.estimate is None
    rates = {"read_rate": 3e9, "decode_rate": 300e9 * REACHED["cpu"]}
    assert plan.tokens_per_s == pytest.approx(1 / plan.residence.seconds(**rates))
    assert plan.first_token_s == pytest.approx(plan.residence.swept / 3e9)
    assert plan.missing == 0
    assert on(a_cpu(400 * GB), 1)[INT8].residence is None


def test_files_for_several_devices_are_mapped_on_a_cpu():
    hardware, mesh = a_cpu(200 * GB), MeshShape(1, 2)
    weights = grok(INT8, mesh)

    plan = plan_for(hardware, weights, Terms(context=8192, compute=Compute.BFLOAT16))

    room = hardware.memory // 2 - plan.needs.cache - plan.needs.workspace
    missed = 2 * missed_bytes(weights, room)
    seconds = (sum(weights.read) - missed) / (300e9 * REACHED["cpu"]) + missed / 3e9
    assert plan.is_paged
    assert plan.residence is None
    assert plan.tokens_per_s == pytest.approx(1 / seconds)


def test_a_cpu_needs_memory_for_what_every_token_reads_and_two_experts():
    found = on(a_cpu(20 * GB), 1)[INT8].residence
    floor = found.total - found.pinned * found.expert_nbytes
    least = int(floor / 0.9)
    while room_in(least - 1) >= floor:
        least -= max(1, (room_in(least - 1) - floor) // 2)

    enough, less = (on(a_cpu(size), 1)[INT8] for size in (least, least - 1))

    assert (enough.fits, enough.missing) == (True, 0)
    assert (less.fits, less.missing) == (False, 1)


SIZES = st.integers(0, 3 * 10**8)
"""Bytes, from too few for anything of the small model to more than enough for all of it."""
KINDS = st.sampled_from(["cpu", *(kind.slug for kind in PUBLISHED)])


@settings(deadline=None, max_examples=50)
@given(st.tuples(SIZES, SIZES), KINDS)
def test_more_memory_never_fits_less_and_is_never_slower(sizes, kind):
    two = [
        replace(hardware_for(accelerator=kind, memory=size), bandwidth=1e12, read_rate=1e9)
        for size in sorted(sizes)
    ]

    for less, more in zip(*(plans(one, config=SMALL) for one in two), strict=True):
        assert more.fits or not less.fits
        assert more.missing <= less.missing
        assert less.is_paged or not more.is_paged
        assert more.tokens_per_s >= less.tokens_per_s
        assert (more.mesh, more.precision) == (less.mesh, less.precision)
        assert less.load_s in {None, more.load_s}


RATES = st.floats(1e8, 1e13)


@settings(deadline=None, max_examples=50)
@given(st.tuples(RATES, RATES), st.tuples(RATES, RATES), KINDS, SIZES)
def test_faster_memory_and_a_faster_disk_are_never_slower(bandwidths, rates, kind, memory):
    hardware = hardware_for(accelerator=kind, memory=memory)
    two = [
        replace(hardware, bandwidth=bandwidth, read_rate=rate)
        for bandwidth, rate in zip(sorted(bandwidths), sorted(rates), strict=True)
    ]

    for slower, faster in zip(*(plans(one, config=SMALL) for one in two), strict=True):
        assert faster.tokens_per_s >= slower.tokens_per_s > 0
        assert (faster.load_s is None) == (slower.load_s is None) == faster.is_paged
        assert faster.is_paged or faster.load_s <= slower.load_s


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 600 * GB), st.sampled_from(PRECISIONS))
def test_what_is_waited_for_is_at_most_what_a_token_reads(room, precision):
    weights = grok(precision, MeshShape(1, 1))

    assert 0 <= missed_bytes(weights, room) <= weights.read[0]


def test_a_plan_holds_the_bytes_of_the_files():
    for plan in plans(None):
        storage = storage_in(released_storage(GROK_1), plan.precision, plan.mesh)

        assert plan.needs.weights == max(weight_bytes(storage, plan.mesh))


# --- hardware that is not here


def test_published_hardware_has_published_figures():
    hardware = hardware_for(accelerator="H200", devices=4)

    assert hardware == Hardware(
        platform="gpu",
        name="H200 141GB",
        count=4,
        memory=usable(141 * GB, platform="gpu"),
        bandwidth=4800e9,
        has_fast_links=True,
    )


def test_without_a_number_there_are_as_many_as_any_mesh_has():
    assert hardware_for(accelerator="h100").count == max(mesh.size for mesh in MESHES)


def test_of_hardware_of_which_only_the_memory_is_known_nothing_else_is_claimed():
    hardware = hardware_for(devices=8, memory=80 * GB)

    assert (hardware.count, hardware.bandwidth, hardware.has_fast_links) == (8, None, None)
    assert hardware.memory == usable(80 * GB, platform="gpu")
    assert hardware_for(accelerator="v6e", memory=64 * GB).memory == usable(64 * GB, platform="tpu")


@pytest.mark.parametrize("named", ["cpu", "CPU"])
def test_a_cpu_is_hardware_with_all_of_its_memory(named):
    hardware = hardware_for(accelerator=named, memory=512 * GB, devices=4)

    assert (hardware.platform, hardware.count, hardware.memory) == ("cpu", 1, 512 * GB)


@pytest.mark.parametrize("given", [{}, {"devices": 8}, {"accelerator": "cpu"}])
def test_hardware_without_memory_is_nothing_to_plan_for(given):
    with pytest.raises(UsageError, match="memory") as caught:
        hardware_for(**given)

    assert "--memory" in caught.value.hint


@pytest.mark.parametrize(("devices", "nearest"), [(0, 1), (3, 4), (6, 8), (12, 16), (10**9, 16)])
def test_a_number_of_devices_that_no_mesh_has_names_the_nearest(devices, nearest):
    with pytest.raises(PlacementError, match=f"no mesh has {devices} devices") as caught:
        hardware_for(accelerator="h100", devices=devices)

    assert caught.value.hint == f"--devices {nearest}"


# --- hardware that is here


def gpu(name="NVIDIA H100 80GB HBM3", **facts) -> Accelerator:
    given = {"platform": "gpu", "memory": 85 * GB, "compute_capability": (9, 0)} | facts
    return Accelerator(name=name, **given)


def machine(*, gpus=(), seen=None, variables=None, **facts) -> Machine:
    """A machine with some GPUs, of which JAX sees as many as it is said to."""
    shown = gpus if seen is None else seen
    found = JaxReport(found=Found.OK, platform="gpu" if shown else "cpu", accelerators=tuple(shown))
    given = {
        "nvml": Nvml(found=Found.OK if gpus else Found.ABSENT, gpus=tuple(gpus)),
        "jax": found,
        "cpu": Cpu(model="A CPU", architecture="x86_64", cores=8, flags=(), bandwidth=40e9),
        "memory": Memory(total=64 * GB, available=60 * GB, limit=None),
        "disks": (
            Disk(purpose="home", path=Path("/home"), read_rate=2e9),
            Disk(purpose="destination", path=Path("/data"), read_rate=9e9),
        ),
    }
    return Machine(
        **(given | facts),
        software=Software(grokctl="1", python="3.11", system="Linux", packages={}),
        surroundings=Surroundings(
            cluster="", processes=1, local_processes=1, variables=variables or {}
        ),
        network=Network(proxy="", certificates="", has_certificates=True, port=None),
        open_files=1024,
        open_files_most=4096,
    )


def test_a_machine_without_accelerators_runs_on_its_cpu():
    assert hardware_of(machine()) == Hardware(
        platform="cpu",
        name="A CPU",
        count=1,
        memory=60 * GB,
        bandwidth=40e9,
        is_measured=True,
        has_fast_bfloat16=False,
        read_rate=2e9,
    )


def test_a_cgroup_limits_what_a_cpu_has():
    limited = Memory(total=64 * GB, available=60 * GB, limit=16 * GB, used=4 * GB)

    assert hardware_of(machine(memory=limited)).memory == 12 * GB


def test_accelerators_that_jax_uses_have_published_bandwidth_and_the_least_memory():
    hardware = hardware_of(machine(gpus=[gpu(), gpu(memory=84 * GB), gpu()]))

    assert hardware == Hardware(
        platform="gpu",
        name="NVIDIA H100 80GB HBM3",
        count=3,
        memory=usable(84 * GB, platform="gpu"),
        bandwidth=3350e9,
        has_fast_links=True,
        read_rate=2e9,
    )


def test_accelerators_that_jax_does_not_see_are_not_used():
    assert hardware_of(machine(gpus=[gpu()], seen=[])).platform == "cpu"
    assert hardware_of(machine(gpus=[gpu()] * 8, seen=[gpu()] * 4)).count == 4


def test_memory_that_others_use_is_not_there():
    assert hardware_of(machine(gpus=[gpu(), gpu(free=30 * GB)])).memory == 30 * GB
    assert hardware_of(machine(gpus=[gpu(free=85 * GB)])).memory == usable(85 * GB, platform="gpu")


def test_the_share_that_jax_was_told_to_take_is_what_there_is():
    told = machine(gpus=[gpu()], variables={"XLA_CLIENT_MEM_FRACTION": "0.5"})

    assert hardware_of(told).memory == 85 * GB // 2


def test_links_are_what_the_driver_says_and_else_what_is_published():
    def links(*found, name="NVIDIA H100 80GB HBM3"):
        return accelerated([gpu(name, has_nvlink=one) for one in found], is_whole=True)

    assert links(True, True).has_fast_links is True
    assert links(True, False).has_fast_links is False
    assert links(None, None).has_fast_links is True
    assert links(None, name="A GPU").has_fast_links is None


def test_an_accelerator_of_unknown_memory_is_taken_to_have_enough():
    hardware = accelerated([gpu("A GPU", memory=None)], is_whole=False)

    assert (hardware.memory, hardware.bandwidth) == (None, None)
    assert on(hardware, 1)[FLOAT32].fits
    assert not on(hardware, 8)[INT4].fits


@pytest.mark.parametrize(
    ("capability", "is_fast"), [((7, 0), False), ((7, 5), False), ((8, 0), True), (None, True)]
)
def test_gpus_before_ampere_compute_in_float32(capability, is_fast):
    hardware = accelerated([gpu("A GPU", compute_capability=capability)], is_whole=True)

    assert hardware.has_fast_bfloat16 is is_fast
    assert hardware.computes[0] is (Compute.BFLOAT16 if is_fast else Compute.FLOAT32)


def test_no_accelerators_are_no_hardware():
    assert accelerated([], is_whole=True) is None
