import re
from dataclasses import replace
from itertools import product

import pytest
from machines import (
    EIGHT,
    EMPTY,
    GB,
    H100,
    HERE,
    RTX_4090,
    ability,
    box,
    check,
    laptop,
    told,
)

from grokctl.checkpoint.storage import released_storage, storage_in
from grokctl.checks import Status
from grokctl.doctor import Question, doctor
from grokctl.errors import HardwareError, PlacementError, UsageError
from grokctl.machine.facts import (
    Memory,
)
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import KvType, Precision
from grokctl.planning.plans import MESHES, PRECISIONS, hardware_for
from grokctl.planning.selection import Asked, Candidate, choose
from grokctl.text import format_bytes


def test_hardware_that_is_not_here_needs_no_machine():
    found = doctor(None, question=Question(devices=8, memory=80 * GB))

    assert not found.groups
    assert not found.is_here
    assert found.is_ok
    assert [a.command.split(" -p ")[0] for a in found.abilities] == [
        "grokctl reshard --devices 8",
        "grokctl run",
    ]


def test_the_fewest_devices_are_named_where_nobody_says_how_many():
    found = doctor(None, question=Question(accelerator="h100"))

    assert found.best is not None
    assert found.best.mesh == MeshShape(1, 8)


def test_who_can_never_have_int8_is_told_what_has():
    found = doctor(None, question=Question(accelerator="tpu-v5e", devices=16))

    assert "at int4 only, on 16 x TPU v5e 16GB" in ability(found, "run").detail
    assert "8 x L40S 48GB" in ability(found, "run").detail


def test_hardware_that_holds_nothing_is_not_ok():
    found = doctor(EIGHT, EMPTY, question=Question(accelerator="rtx-4090", devices=1))

    run = ability(found, "run")
    assert not found.is_ok
    assert not found.groups
    assert run.status is Status.FAIL
    assert "needs" in run.detail
    assert re.search("are available; (8|16) of them hold int[48]", run.detail)


def test_a_context_that_only_a_small_memory_asks_for_is_said():
    machine = laptop(memory=Memory(total=16 * GB, available=9 * GB, limit=None, shm=0))

    found = doctor(machine, EMPTY, question=HERE)

    assert found.best is not None
    assert found.best.context < GROK_1.sequence_len
    assert f"context {found.best.context:,}" in ability(found, "run").detail


def test_of_gpus_that_were_chosen_already_those_of_one_kind_keep_their_numbers():
    mixed = told(box(H100, RTX_4090, H100), CUDA_VISIBLE_DEVICES="4,5,7")

    assert check(doctor(mixed, EMPTY, question=HERE), "one kind").fix == (
        "export CUDA_VISIBLE_DEVICES=4,7"
    )


def test_a_processor_without_room_for_anything_is_told_what_it_needs_beside_the_weights():
    machine = laptop(memory=Memory(total=GB, available=GB // 2, limit=None, shm=0))

    found = doctor(machine, EMPTY, question=HERE)

    plan = found.plans[0]
    assert plan.is_paged
    assert not plan.fits
    on_cpu = [plan for plan in found.plans if plan.residence is not None]
    nearest = min(on_cpu, key=lambda plan: plan.missing).residence
    assert f"the CPU needs {nearest.shortage}" in ability(found, "run").detail
    assert format_bytes(nearest.dense) in nearest.shortage


def every_cut(platform: str) -> list[Candidate]:
    """Grok-1 as it can be cut, a candidate for each mesh and precision."""
    own = released_storage(GROK_1)
    return [
        Candidate(
            name=f"{precision}-{mesh}",
            storage=storage_in(own, precision, mesh),
            mesh=mesh,
            is_mapped=True,
        )
        for precision, mesh in product(PRECISIONS, MESHES[:1] if platform == "cpu" else MESHES)
    ]


@pytest.mark.parametrize("asked", [{}, {"batch": 8, "context": 1024, "kv": KvType.INT8}], ids=str)
@pytest.mark.parametrize(
    "named",
    [
        {"devices": 8, "memory": 80 * GB},
        {"devices": 4, "memory": 141 * GB},
        {"devices": 4, "memory": 80 * GB},
        {"devices": 16, "memory": 40 * GB},
        {"devices": 16, "memory": 24 * GB},
        {"devices": 8, "memory": 48 * GB},
        {"devices": 1, "memory": 80 * GB},
        {"devices": 2, "memory": 192 * GB},
        {"devices": 8, "accelerator": "rtx-4090"},
        {"devices": 16, "accelerator": "tpu-v5e"},
        {"memory": 512 * GB, "accelerator": "cpu"},
        {"memory": 200 * GB, "accelerator": "cpu"},
        {"memory": 24 * GB, "accelerator": "cpu"},
        {"memory": GB, "accelerator": "cpu"},
    ],
    ids=str,
)
def test_what_doctor_would_run_is_what_run_chooses(named, asked):
    best = doctor(None, question=Question(**named, **asked)).best

    hardware = hardware_for(**named)
    wanted = Asked(
        context=asked.get("context"),
        sequences=asked.get("batch", 1),
        kv=asked.get("kv", KvType.COMPUTE),
    )
    try:
        chosen = choose(hardware, every_cut(hardware.platform), wanted).plan
    except HardwareError:
        chosen = None
    assert best == chosen


def test_a_context_that_is_asked_for_is_in_the_command():
    question = Question(devices=8, memory=80 * GB, context=1024, kv=KvType.INT8)

    found = doctor(None, question=question)

    assert ability(found, "run").command.endswith("--context 1024 --kv int8")
    assert all(plan.context == 1024 for plan in found.plans)


def test_a_batch_comes_from_a_file():
    found = doctor(None, question=Question(devices=8, memory=80 * GB, batch=4))

    command = ability(found, "run").command
    assert command == "grokctl run --prompts-file prompts.jsonl --batch 4"


def test_a_shorter_context_is_taken_where_only_that_fits():
    sizes = [
        plan.needs
        for plan in doctor(None, question=Question(devices=8, memory=80 * GB)).plans
        if plan.precision is Precision.INT8 and plan.mesh == MeshShape(1, 8)
    ]
    room = sizes[0].weights + sizes[0].workspace  # nothing for keys and values
    tight = replace(H100, memory=None, free=room + sizes[0].cache // 2)

    found = doctor(box(*[tight] * 8), EMPTY, question=HERE)

    assert found.best is not None
    assert found.best.precision is Precision.INT8
    assert 512 <= found.best.context < GROK_1.sequence_len
    assert f"context {found.best.context:,}" in ability(found, "run").detail


def test_questions_that_cannot_be_meant_are_refused():
    with pytest.raises(UsageError):
        doctor(None, question=Question(accelerator="abacus"))
    with pytest.raises(PlacementError):
        doctor(None, question=Question(devices=3, memory=80 * GB))
