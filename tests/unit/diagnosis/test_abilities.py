from dataclasses import replace
from pathlib import Path

import pytest
from machines import (
    DISK,
    EIGHT,
    EMPTY,
    GB,
    H100,
    HERE,
    HOME,
    RTX_4090,
    TB,
    ability,
    box,
    check,
    laptop,
    on_disk,
    problems,
    server,
    stock,
    told,
    unused,
)

from grokctl.checks import Status
from grokctl.diagnosis.inventory import (
    Inventory,
    KeptReady,
    KeptRelease,
    ready_nbytes,
    release_nbytes,
)
from grokctl.doctor import doctor
from grokctl.machine.facts import (
    Found,
    JaxReport,
)
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.text import format_bytes


def test_eight_h100_run_int8_after_a_download_and_a_reshard():
    found = doctor(EIGHT, EMPTY, question=HERE)

    assert [(a.name, a.status) for a in found.abilities] == [
        ("download", "ok"),
        ("reshard", "ok"),
        ("run", "ok"),
    ]
    assert ability(found, "download").command == "grokctl fetch"
    assert (
        "318.2 GB; 8.8 hours at 10 MB/s or 53 minutes at 100 MB/s"
        in ability(found, "download").detail
    )
    assert ability(found, "reshard").command == "grokctl reshard --devices 8"
    assert ability(found, "run").command.startswith("grokctl run -p ")
    assert "int8 on 8 x NVIDIA H100 80GB HBM3" in ability(found, "run").detail
    assert "(estimate)" in ability(found, "run").detail
    assert found.best is not None
    assert (found.best.mesh, found.best.precision) == (MeshShape(1, 8), Precision.INT8)


def test_a_reshard_takes_the_disk_for_reading_and_for_writing():
    one = doctor(EIGHT, EMPTY, question=HERE)
    apart = replace(DISK, purpose="destination", path=Path("/mnt"), free=TB, read_rate=1e9)
    two = doctor(replace(EIGHT, disks=(DISK, apart)), EMPTY, question=HERE)

    read, written = release_nbytes(GROK_1), ready_nbytes(Precision.INT8, MeshShape(1, 8))
    assert (
        f"about {(read / 3e9 + written / 2e9) / 60:.0f} minutes" in ability(one, "reshard").detail
    )
    assert (
        f"about {max(read / 1e9, written / 2e9) / 60:.0f} minutes" in ability(two, "reshard").detail
    )
    assert ability(two, "download").command == "grokctl fetch --to /mnt"
    assert ability(two, "reshard").command == "grokctl reshard /mnt --devices 8"


def test_four_of_80_gb_hold_int4_and_are_told_what_int8_takes():
    found = doctor(box(*[H100] * 4), EMPTY, question=HERE)

    run = ability(found, "run")
    int8 = next(
        plan
        for plan in found.plans
        if plan.precision is Precision.INT8 and plan.mesh == MeshShape(1, 4)
    )
    assert not int8.fits
    assert run.status is Status.WARN
    assert "at int4 only" in run.detail
    assert f"int8 takes {format_bytes(int8.needs.total)} on each, and needs 8 of them" in run.detail
    assert ability(found, "reshard").command == "grokctl reshard --devices 4 --precision int4"


def test_a_laptop_without_room_is_told_what_it_would_take():
    found = doctor(laptop(), EMPTY, question=HERE)

    assert found.is_ok
    assert [a.status for a in found.abilities] == ["fail", "fail", "fail"]
    assert "expected 318.2 GB free, found 150.0 GB" in ability(found, "download").detail
    assert ability(found, "download").command == "grokctl fetch --home DIR"
    assert "seconds per token (estimate)" in ability(found, "run").detail
    assert " x " in ability(found, "run").detail.partition("fits ")[2]


def test_a_laptop_with_room_reads_int4_from_the_disk():
    found = doctor(laptop(disks=(replace(DISK, free=TB),)), EMPTY, question=HERE)

    assert ability(found, "run").status is Status.WARN
    assert "slowly: int4 on the CPU" in ability(found, "run").detail
    assert ability(found, "reshard").command == "grokctl reshard --devices 1 --precision int4"
    assert any(plan.memory is None for plan in found.plans)  # what accelerators would need


def test_a_server_with_512_gb_runs_int8_on_its_processor():
    found = doctor(server(), EMPTY, question=HERE)

    assert ability(found, "run").status is Status.OK
    assert "int8 on the CPU" in ability(found, "run").detail
    assert "of 480.0 GB of memory" in ability(found, "run").detail


def test_a_gpu_that_is_too_small_leaves_the_work_to_the_processor():
    found = doctor(box(RTX_4090), EMPTY, question=HERE)

    run = ability(found, "run")
    assert "1 x NVIDIA GeForce RTX 4090 are too small; int8 on the CPU" in run.detail
    assert run.command.startswith("JAX_PLATFORMS=cpu grokctl run ")
    assert found.hardware.platform == "cpu"


@pytest.mark.parametrize(
    "jax",
    [JaxReport(found=Found.SILENT, seconds=20), JaxReport(found=Found.FAILED, error="oh")],
    ids=["silent", "failed"],
)
def test_plans_are_for_the_gpus_that_jax_should_use(jax):
    found = doctor(replace(EIGHT, jax=jax), EMPTY, question=HERE)

    assert not found.is_ok
    assert found.hardware.count == 8
    assert ability(found, "run").status is Status.FAIL
    assert "JAX must be fixed first; then int8 on 8 x" in ability(found, "run").detail
    assert ability(found, "run").command.startswith("JAX_PLATFORMS=cpu grokctl run")


def test_a_jax_that_is_silent_without_gpus_is_kept_to_the_processor():
    machine = server(jax=JaxReport(found=Found.SILENT, seconds=20))

    found = doctor(machine, EMPTY, question=HERE)

    assert ability(found, "run").command.startswith("JAX_PLATFORMS=cpu grokctl run")


def test_who_hides_gpus_on_purpose_gets_plans_for_the_processor():
    found = doctor(told(unused(), JAX_PLATFORMS="cpu"), EMPTY, question=HERE)

    assert found.is_ok
    assert found.hardware.platform == "cpu"


def kept(**changes) -> KeptRelease:
    whole = KeptRelease(
        name="grok-1",
        root=HOME / "releases" / "grok-1",
        is_grok_1=True,
        nbytes=release_nbytes(GROK_1),
        is_complete=True,
    )
    return replace(whole, **changes)


def ready(precision=Precision.INT8, **changes) -> KeptReady:
    mesh = MeshShape(1, 8)
    whole = KeptReady(
        name=f"grok-1-{precision}-{mesh.slug}",
        root=HOME / "ready" / f"grok-1-{precision}-{mesh.slug}",
        is_grok_1=True,
        precision=precision,
        mesh=mesh,
        nbytes=ready_nbytes(precision, mesh),
        is_whole=True,
    )
    return replace(whole, **changes)


@pytest.mark.parametrize(
    ("machine", "download", "reshard"),
    [
        pytest.param(
            on_disk(is_writable=False), "no: /data/grokctl cannot be written to", "no: ", id="ro"
        ),
        pytest.param(on_disk(file_system="vfat"), "yes", "no: a device file has", id="vfat"),
        pytest.param(
            on_disk(free=None), "free space is unknown", "free space is unknown", id="unknown"
        ),
        pytest.param(
            on_disk(write_rate=None), "yes", "time unknown before the download", id="no-rates"
        ),
        pytest.param(on_disk(write_rate=50e6), "at 50 MB/s", "hours", id="slow"),
    ],
)
def test_what_a_disk_allows(machine, download, reshard):
    found = doctor(machine, EMPTY, question=HERE)

    assert download in ability(found, "download").detail
    assert reshard in ability(found, "reshard").detail


def test_a_download_that_is_done_needs_no_room():
    machine = replace(EIGHT, disks=(replace(DISK, free=330 * GB),))

    found = doctor(machine, stock(kept()), question=HERE)

    assert ability(found, "download").status is Status.SKIP
    assert ability(found, "download").command == "grokctl verify /data/grokctl/releases/grok-1"
    assert ability(found, "reshard").status is Status.OK
    assert check(found, "room in home").status is Status.OK


def test_a_download_that_was_begun_needs_room_for_the_rest():
    machine = replace(EIGHT, disks=(replace(DISK, free=330 * GB),))
    begun = kept(nbytes=300 * GB, missing_nbytes=18 * GB, is_complete=False)

    found = doctor(machine, stock(begun), question=HERE)

    assert "18.0 GB, the rest is on disk" in ability(found, "download").detail
    reshard = ability(found, "reshard")
    assert reshard.status is Status.FAIL
    assert "expected 318.4 GB free in addition to the download, found 312.0 GB" in reshard.detail
    assert reshard.command == "grokctl reshard --devices 8 --out DIR"


def test_what_is_ready_is_run():
    machine = replace(EIGHT, disks=(replace(DISK, free=GB),))

    found = doctor(machine, stock(ready()), question=HERE)

    assert ability(found, "download").status is Status.SKIP
    assert ability(found, "reshard").status is Status.SKIP
    assert ability(found, "run").status is Status.OK
    assert not problems(found)


def test_what_is_ready_is_preferred_to_what_could_be_made():
    found = doctor(EIGHT, stock(ready(Precision.INT4)), question=HERE)

    assert found.best is not None
    assert found.best.precision is Precision.INT4
    assert ability(found, "reshard").status is Status.SKIP


def test_what_is_ready_and_too_large_is_cut_again():
    found = doctor(box(*[H100] * 4), stock(ready(), kept()), question=HERE)

    source = "/data/grokctl/releases/grok-1"
    command = f"grokctl reshard {source} --devices 4 --precision int4"
    assert ability(found, "reshard").command == command
    assert ability(found, "reshard").status is Status.OK


def test_what_is_ready_is_cut_again_where_there_is_no_release():
    found = doctor(box(*[H100] * 4), stock(ready()), question=HERE)

    source = "/data/grokctl/ready/grok-1-int8-8"
    command = f"grokctl reshard {source} --devices 4 --precision int4"
    assert ability(found, "download").status is Status.SKIP
    assert ability(found, "reshard").command == command
    assert ability(found, "reshard").detail.startswith("yes, about")


def test_what_was_cut_for_fewer_devices_is_run_as_it_is():
    large = replace(H100, name="large", memory=200 * GB, free=200 * GB)
    there = replace(ready(), name="four", mesh=MeshShape(1, 4))

    found = doctor(box(*[large] * 8), stock(there), question=HERE)

    assert found.best is not None
    assert found.best.mesh == MeshShape(1, 4)
    assert ability(found, "reshard").detail.startswith("done: four")


def test_what_cannot_be_undone_does_not_make_a_download_needless():
    wide = ready(Precision.FLOAT32)

    found = doctor(EIGHT, stock(wide), question=HERE)

    assert ability(found, "download").command == "grokctl fetch"
    assert ability(found, "reshard").command == (
        "grokctl reshard /data/grokctl/releases/grok-1 --devices 8"
    )


def test_gpus_can_run_a_release_for_which_a_ready_checkpoint_has_no_room():
    machine = replace(EIGHT, disks=(replace(DISK, free=GB),))

    found = doctor(machine, stock(kept()), question=HERE)

    assert ability(found, "reshard").status is Status.FAIL
    assert ability(found, "run").status is Status.WARN
    assert "resharded at every start" in ability(found, "run").detail


def test_a_read_only_home_with_a_ready_checkpoint_is_good_enough():
    machine = replace(EIGHT, disks=(replace(DISK, is_writable=False, error="read-only"),))

    found = doctor(machine, stock(ready()), question=HERE)

    assert found.is_ok
    assert check(found, "home").status is Status.WARN
    assert ability(found, "run").status is Status.OK


def test_damaged_checkpoints_are_named_with_the_line_that_looks_at_them():
    broken = ready(is_whole=False, damage="device-00: missing", name="a b", root=HOME / "a b")

    found = doctor(EIGHT, stock(broken, error="/data: Permission denied"), question=HERE)

    made = [made for made in problems(found) if made.name == "checkpoints"]
    assert {made.fix for made in made} == {
        "grokctl verify '/data/grokctl/a b'",
        "ls -ld /data/grokctl",
    }
    assert ability(found, "download").status is Status.OK


def test_a_ready_checkpoint_that_takes_no_text_is_said_so():
    root = HOME / "ready" / "a b"
    mute = KeptReady(
        name="a b",
        root=root,
        is_grok_1=True,
        precision=Precision.INT8,
        mesh=MeshShape(1, 8),
        nbytes=1,
        is_whole=True,
        has_tokenizer=False,
    )

    found = doctor(EIGHT, Inventory(home=HOME, ready=(mute,)), question=HERE)

    made = check(found, "tokenizer")
    assert (made.status, made.fix) == (
        Status.WARN,
        "cp tokenizer.model '/data/grokctl/ready/a b'",
    )


def test_what_is_compressed_cannot_be_read_again_and_again():
    packed = KeptReady(
        name="packed",
        root=HOME / "ready" / "packed",
        is_grok_1=True,
        precision=Precision.INT8,
        mesh=MeshShape(1, 1),
        nbytes=1,
        is_whole=True,
        is_mapped=False,
    )
    small = laptop(disks=(DISK,))

    found = doctor(small, Inventory(home=HOME, ready=(packed,)), question=HERE)
    plain = Inventory(home=HOME, ready=(replace(packed, is_mapped=True),))

    assert ability(found, "reshard").status is Status.OK
    assert ability(doctor(small, plain, question=HERE), "reshard").status is Status.SKIP


def test_commands_name_a_home_that_is_not_the_default():
    there = Path("/big disk")

    found = doctor(EIGHT, Inventory(home=there, is_default=False), question=HERE)

    assert [a.command.endswith("--home '/big disk'") for a in found.abilities] == [True] * 3


def test_a_release_among_others_is_named():
    other = kept(name="two", root=HOME / "releases" / "two", is_grok_1=False)

    found = doctor(EIGHT, stock(kept(), other), question=HERE)

    command = ability(found, "reshard").command
    assert command == "grokctl reshard /data/grokctl/releases/grok-1 --devices 8"
