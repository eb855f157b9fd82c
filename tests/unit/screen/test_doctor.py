"""The screen of doctor: symbols, bars, tables, and lines to copy."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from grokctl.checks import Check, Status
from grokctl.diagnosis.outlook import Ability
from grokctl.diagnosis.redaction import Redaction
from grokctl.doctor import Diagnosis, Group
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
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType, Precision
from grokctl.model.sizing import Needs
from grokctl.planning.plans import Hardware, Plan, plans
from grokctl.planning.step_time import Counts, StepTime
from grokctl.screen import console as screen
from grokctl.screen import doctor as report
from grokctl.screen.console import Console
from grokctl.screen.residence import more_memory
from grokctl.screen.tables import StackedBar, StatusCell

GB = 10**9
EIGHT = Hardware(platform="gpu", name="H100", count=8, memory=70 * GB, bandwidth=3e12)
CPU = Hardware(platform="cpu", name="EPYC", count=1, memory=70 * GB, bandwidth=3e11)
PLAN = Plan(
    mesh=MeshShape(1, 8),
    precision=Precision.INT8,
    compute=Compute.BFLOAT16,
    kv=KvType.COMPUTE,
    context=8192,
    slots=1,
    needs=Needs(weights=40 * GB, cache=GB, workspace=2 * GB),
    memory=70 * GB,
    is_possible=True,
    is_paged=False,
    load_s=80.0,
    tokens_per_s=45.4,
)
STEP = StepTime(
    counts=Counts(launches=2183, sums=129),
    nbytes=11 * GB,
    launches_s=3.3e-3,
    reading_s=5.6e-3,
    sums_s=1e-3,
    waits_s=0.0,
    ends_s=1.5e-3,
)
H100 = Accelerator(
    name="NVIDIA H100", platform="gpu", memory=80 * GB, free=79 * GB, compute_capability=(9, 0)
)
MACHINE = Machine(
    nvml=Nvml(found=Found.OK, driver="570.124.6.1", cuda="12.8", gpus=(H100,) * 4),
    jax=JaxReport(found=Found.OK, platform="gpu", accelerators=(H100,) * 4, seconds=2.0),
    cpu=Cpu(model="EPYC", architecture="x86_64", cores=64, flags=(), bandwidth=None),
    memory=Memory(total=500 * GB, available=400 * GB, limit=None),
    disks=(Disk(purpose="home", path=Path("/home/alice/kept"), error="/home/alice: gone"),),
    software=Software(
        grokctl="0.1.0",
        python="3.11.9",
        system="Linux on frontier7",
        packages={"nvidia-cudnn-cu12": "9.10.2.21", "jax": "not a version, by bob@frontier7"},
    ),
    surroundings=Surroundings(
        cluster="Slurm", processes=4, local_processes=1, variables={"HF_TOKEN": "x", "EMPTY": ""}
    ),
    network=Network(
        proxy="http://10.1.2.3:80", certificates="", has_certificates=False, port=None, error="busy"
    ),
    open_files=1024,
    open_files_most=sys.maxsize,
)
ALICE = Redaction(home=Path("/home/alice"), root=None, user="alice", hosts=("frontier7",))


def diagnosis(**changes):
    values = {
        "groups": (),
        "hardware": EIGHT,
        "is_here": False,
        "plans": (PLAN,),
        "abilities": (),
        "best": PLAN,
    }
    return Diagnosis(**values | changes)


def shown(capsys, found, *, width=200, machine=None, is_full=False):
    console = Console()
    console.out.width = width
    report.show(console, found, machine, ALICE, is_full=is_full)
    return capsys.readouterr().out


def needing(nbytes, **changes):
    return replace(PLAN, needs=Needs(weights=nbytes, cache=0, workspace=0), **changes)


def luminance(color):
    def linear(level):
        share = level / 255
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = color.get_truecolor()
    return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)


@pytest.mark.parametrize("style", [*screen._STYLES.values(), *screen._LAYER_STYLES])
def test_what_is_coloured_is_read_on_dark_and_on_light(style):
    color = Style.parse(style).color
    if color is None or color.is_default:
        return

    light = luminance(color) + 0.05

    assert 1.05 / light > 3.5  # on white
    assert light / 0.05 > 3.5  # on black


def test_no_two_signs_and_no_two_layers_are_alike():
    for signs in (screen._SYMBOLS, screen._ASCII_SYMBOLS):
        assert len(set(signs.values())) == len(Status)
    for layers, nothing in ((screen._LAYERS, "·"), (screen._ASCII_LAYERS, ".")):
        assert len({*layers, nothing}) == len(layers) + 1 == len(screen._LAYER_STYLES) + 1


def test_checks_stand_below_each_other_and_fixes_in_lines_of_their_own(capsys):
    console = Console()
    console.out.width = 40
    fix = "pip install 'grokctl[cuda12]' " + "and-more " * 10

    console.checks(
        [
            ("first", [Check("a", Status.OK, "well"), Check("bc", Status.FAIL, "ill " * 12, fix)]),
            ("nothing", []),
            ("last", [Check("d", Status.SKIP, "none"), Check("e", Status.WARN, "so so")]),
        ],
        words={Status.SKIP: "done"},
    )

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "first"
    assert lines[1] == "  ✓ ok    a   well"
    assert lines[2].startswith("  ✗ fail  bc  ill ill")
    assert lines[3].startswith("              ill")
    assert f"          → {fix.rstrip()}" in lines
    assert lines[-4:] == ["last", "  - done  d   none", "  ! warn  e   so so", ""]
    assert "nothing" not in lines


def test_what_a_terminal_would_obey_is_not_printed(capsys):
    console = Console()

    hostile = "a\x1b]0;b\x07c\x9bd[bold]e[/bold]"
    console.checks([(hostile, [Check(hostile, Status.OK, f"{hostile}\nnext", f"{hostile}\nrm x")])])
    console.table(hostile, (hostile,), [(hostile,), (StatusCell(Status.OK, hostile, hostile),)])
    console.facts(hostile, [(hostile, hostile)])
    console.stacked(hostile, ("x",), "free", [StackedBar(hostile, (1,), 2, hostile)])

    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\x9b"}
    assert out.count("a]0;bcd[bold]e[/bold]") == 15
    assert "e[/bold] next" in out
    assert "e[/bold] rm x" in out


@given(
    parts=st.lists(st.integers(0, 10**12), min_size=1, max_size=4),
    room=st.integers(1, 10**12),
    width=st.integers(8, 40),
)
def test_a_bar_is_as_wide_as_it_should_be_and_shows_every_part(parts, room, width):
    console = Console()
    whole = sum(parts)

    bar = console._stack(StackedBar("", tuple(parts), room, ""), width).plain

    assert len(bar) == width
    if whole <= room:
        assert "┃" not in bar
        for part, cell in zip(parts, screen._LAYERS, strict=False):
            assert (cell in bar) == (part > 0)
            assert abs(bar.count(cell) - part / room * width) <= len(parts) + 1
    else:
        assert bar.count("┃") == (round(room / whole * width) < width)
        assert "·" not in bar


def test_a_bar_without_a_full_terminal_is_ascii(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    found = diagnosis(
        groups=(Group("all", (Check("a", Status.FAIL, "no", "mend it"),)),),
        plans=(PLAN, needing(90 * GB, precision=Precision.FLOAT32)),
    )

    report.show(Console(), found, None, ALICE, is_full=False)

    sys.stdout.flush()
    text = buffer.getvalue().decode("ascii")
    assert "?" not in text
    assert "x fail  a" in text
    assert "-> mend it" in text
    assert "43.0 GB + fits" in text
    assert "90.0 GB x lacks 20.0 GB" in text
    assert "40.0 GB + 1.0 GB + 2.0 GB of 70.0 GB" in text


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (PLAN, "43.0 GB ✓ fits"),
        (needing(71 * GB), "71.0 GB ✗ lacks 1.0 GB"),
        (replace(PLAN, is_possible=False), "43.0 GB - would fit"),
        (needing(71 * GB, is_possible=False), "71.0 GB ✗ lacks 1.0 GB"),
        (replace(PLAN, memory=None), "43.0 GB - may fit"),
    ],
    ids=["fits", "lacks", "would", "lacks all the same", "unknown"],
)
def test_a_cell_says_what_is_needed_and_whether_it_is_there(capsys, plan, expected):
    assert expected in shown(capsys, diagnosis(plans=(plan,), best=None))


def test_a_narrow_terminal_gets_two_lines_a_cell_and_then_fewer_columns(capsys):
    plans = tuple(
        needing(nbytes * 100 * GB, precision=precision)
        for nbytes, precision in enumerate(Precision, start=1)
    )
    found = diagnosis(plans=plans, best=None)

    wide, narrow, tiny = (shown(capsys, found, width=width) for width in (120, 78, 60))

    assert "100.0 GB ✗ lacks 30.0 GB" in wide
    assert "100.0 GB         200.0 GB" in narrow
    assert "✗ lacks 30.0 GB  ✗ lacks 130.0 GB" in narrow
    assert "float32" in wide
    assert "bf16" in tiny
    assert "int4" not in tiny


def test_a_shorter_context_than_the_others_has_is_said(capsys):
    best = replace(PLAN, context=2048)

    text = shown(capsys, diagnosis(best=best))

    assert "what runs on 8 x H100: 1 sequence\n" in text
    assert text.index("2,048") < text.index("8,192")


def test_speeds_that_nobody_knows_have_no_column(capsys):
    unknown = replace(PLAN, load_s=None, tokens_per_s=None)

    assert "about" not in shown(capsys, diagnosis(plans=(unknown,), best=unknown))
    assert "80.0" not in shown(capsys, diagnosis())
    assert "1:20" in shown(capsys, diagnosis())


def test_an_estimate_says_what_it_is_made_of(capsys):
    plan = replace(PLAN, step=STEP)

    text = shown(capsys, diagnosis(plans=(plan,), best=plan))

    assert "time of a token: int8 on model=8, at position 8,192" in text
    assert "reading   5.6 ms: 11.0 GB on a device, at 65% of 3.0 TB/s" in text
    assert "launches  3.3 ms: 2,183 operations" in text
    assert "sums      1.0 ms: 129 sums over devices" in text
    assert "ends      1.5 ms" in text
    assert "nothing was measured on a GPU" in text


def test_an_estimate_names_nothing_that_takes_no_time_and_admits_what_is_assumed(capsys):
    plan = replace(PLAN, step=replace(STEP, counts=Counts(), launches_s=0.0, sums_s=0.0))

    text = shown(
        capsys, diagnosis(hardware=replace(EIGHT, platform="tpu"), plans=(plan,), best=plan)
    )

    assert "launches" not in text
    assert "sums" not in text
    assert "at 60% of 3.0 TB/s" in text
    assert "assumed: nothing was measured on such a device" in text


@pytest.mark.parametrize(
    ("hardware", "changes"),
    [
        pytest.param(CPU, {}, id="a CPU"),
        pytest.param(EIGHT, {"tokens_per_s": None}, id="unknown speed"),
        pytest.param(EIGHT, {"is_paged": True}, id="from the disk"),
    ],
)
def test_other_speeds_are_not_taken_apart(capsys, hardware, changes):
    plan = replace(PLAN, step=STEP, **changes)

    assert "time of a token" not in shown(
        capsys, diagnosis(hardware=hardware, plans=(plan,), best=plan)
    )


def test_json_has_the_parts_of_an_estimate():
    values = report._plan_values(replace(PLAN, step=STEP))["step"]

    assert values == {
        "launches": 2183,
        "sums": 129,
        "bytes": 11 * GB,
        "launches_s": 3.3e-3,
        "sums_s": 1e-3,
        "reading_s": 5.6e-3,
        "ends_s": 1.5e-3,
    }
    assert report._plan_values(replace(PLAN, step=STEP, tokens_per_s=None))["step"] is None


def test_speeds_of_many_sequences_are_called_those_of_one(capsys):
    many = replace(PLAN, slots=4)

    text = shown(capsys, diagnosis(plans=(many,), best=many))

    assert "4 sequences of 8,192 tokens, speed of one alone" in text


def test_a_cpu_that_reads_from_the_disk_says_so_and_what_would_not(capsys):
    paged = needing(300 * GB, mesh=MeshShape(1, 1), is_paged=True)
    elsewhere = replace(PLAN, memory=None, is_possible=False, load_s=None, tokens_per_s=None)

    text = shown(
        capsys, diagnosis(hardware=CPU, is_here=True, plans=(paged, elsewhere), best=paged)
    )

    assert "what runs on EPYC, with 70.0 GB of memory for a run" in text
    assert "! from disk" in text
    assert "┃ limit" in text
    assert "8        43.0 GB  L40S 48GB" in text.partition("memory required of each accelerator")[2]


@pytest.mark.parametrize(
    ("bandwidth", "rate", "title", "int8", "int4"),
    [
        (8e10, 7 * GB, "what a token reads at 7.0 GB/s", "8.4 s", "3 s"),
        (
            *(None, None, "at 3.5 GB/s / 7.0 GB/s / 14.0 GB/s"),
            *("16 s / 8.1 s / 4 s", "5.5 s / 2.8 s / 1.4 s"),
        ),
    ],
)
def test_what_more_memory_changes_is_said_where_experts_come_from_the_disk(
    capsys, bandwidth, rate, title, int8, int4
):
    hardware = replace(CPU, memory=100 * GB, bandwidth=bandwidth, read_rate=rate)

    more_memory(Console(), plans(hardware), hardware)

    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith(title)
    cells = [re.split("  +", row.strip()) for row in rows if row]
    assert [row[:2] for row in cells] == [
        ["100.0 GB", "137"],
        ["128.0 GB", "182"],
        ["192.0 GB", "285"],
        ["256.0 GB", "387"],
        ["384.0 GB", "all"],
    ]
    assert cells[0][2:] == ["56.6 GB", int8, "270", "19.4 GB", int4]
    assert "all" in cells[2]  # of int4


def test_the_sentence_for_a_failure_is_the_first_check_that_failed():
    groups = (
        Group("a", (Check("x", Status.WARN, "hm"), Check("y", Status.FAIL, "no", "mend y"))),
        Group("b", (Check("z", Status.FAIL, "no"),)),
    )

    error = report.failure(diagnosis(groups=groups))

    assert (str(error), error.hint, error.exit_code) == ("y: no", "mend y", 40)


def test_the_sentence_for_what_is_too_small_has_both_numbers():
    error = report.failure(
        diagnosis(plans=(needing(200 * GB), needing(100 * GB, precision=Precision.INT4)), best=None)
    )

    assert (
        "70.0 GB available for a run on each, required at least 100.0 GB (int4 on model=8)"
        in str(error)
    )


def test_hardware_that_no_mesh_suits_is_said():
    error = report.failure(diagnosis(plans=(), best=None))

    assert str(error) == "8 x H100: no mesh has that many devices"


def test_a_full_report_holds_everything_and_nothing_private(capsys):
    private = "/home/alice/x http://bob:pw@10.9.8.7 frontier7"
    found = diagnosis(
        groups=(Group("all", (Check("home", Status.WARN, private, f"ls {private}"),)),),
        abilities=(Ability(name="run", status=Status.OK, detail=private, command=private),),
        is_here=True,
    )

    text = shown(capsys, report.redacted(found, ALICE), machine=MACHINE, is_full=True)

    assert not any(word in text for word in ("alice", "bob", "pw", "10.9.8.7", "frontier7"))
    assert text.count("~/x http://[redacted]@[address] [host]") == 4
    assert "9.10.2.21" in text
    assert "570.124.6.1, CUDA 12.8" in text
    assert "device 0-3     NVIDIA H100, 80.0 GB, 79.0 GB free, compute capability 9.0" in text
    assert "not a version, by [redacted]@[host]" in text
    assert "1,024, at most no limit" in text
    assert "cannot be written" in text
    assert "~: gone" in text
    assert re.search("EMPTY +empty", text)


def test_a_check_of_a_variable_is_as_private_as_the_variable():
    checks = (
        Check("NCCL_COMM_ID", Status.OK, "login2.acme:1234"),
        Check("NCCL_DEBUG", Status.OK, "INFO"),
        Check("JAX", Status.OK, "starts in 0.6 s"),
    )
    found = diagnosis(groups=(Group("surroundings", checks),))

    (group,) = report.redacted(found, ALICE).groups

    assert [made.detail for made in group.checks] == ["[redacted]", "INFO", "starts in 0.6 s"]


def test_what_is_not_known_of_a_machine_is_called_unknown(capsys):
    silent = replace(
        MACHINE,
        nvml=Nvml(found=Found.SILENT, error="no answer"),
        jax=JaxReport(found=Found.FAILED, error="broken", seconds=1.0),
        memory=Memory(total=GB, available=GB, limit=GB // 2, used=GB // 4),
    )

    text = shown(capsys, diagnosis(), machine=silent, is_full=True)

    assert "NVIDIA driver  silent" in text
    assert "driver error   no answer" in text
    assert "JAX error      broken" in text
    assert "250.0 MB of 500.0 MB used" in text
    assert "reads memory at  an unknown rate" in text


@pytest.mark.parametrize("name", ["threads", "address space", "data segment", "open files"])
def test_a_limit_of_the_process_is_the_cause_whatever_failed_before_it(name):
    jax = Check("JAX", Status.FAIL, "does not start: ImportError", "pip install .")
    limit = Check(name, Status.FAIL, "too little", "ulimit -x unlimited")

    error = report.failure(diagnosis(groups=(Group("a", (jax,)), Group("b", (limit,)))))

    assert (str(error), error.hint) == (f"{name}: too little", "ulimit -x unlimited")
