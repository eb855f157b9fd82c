"""What `make gpu-forms` reads from XLA's texts; nothing here needs a GPU or its plugin."""

from pathlib import Path

import _gpu_check
import _hlo
import _sass
import _thunks
import jax
import jax.numpy as jnp
import pytest
from _absent_gpus import Compiler, Program, Step
from _hlo import Array
from _thunks import Tally

from grokctl.model.placement import MeshShape
from grokctl.planning.step_time import LAUNCHES_OF_A_LAYER, LAUNCHES_OUTSIDE

WEIGHT = Array("s8", (8, 256, 512))
LISTING = """\
000: kCommandBuffer [source       | next=004 (1)]
    001: kCopy [source       | next=002 (1)] kCopy
    002: kCustomKernel [prev=001 (1) | sink] few_rows grid: [1, 1, 1] threads: [128, 1, 1]
004: kWhile         [prev=000 (1) | next=000 (1)]\x20\x20\x20
condition:
    005: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=009 (1)]
        006: kCustomKernel [source | sink] loop_add grid: [1, 1, 1] threads: [1, 1, 1]
        007: kCopy         [source | sink] kCopy
    009: kWhile         [prev=000 (1) | next=018 (2)]
condition:
        010: kCustomKernel [source | sink] other_compare grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        011: kCustomKernel [source       | sink        ] gemm grid: [1, 1, 1] threads: [1, 1, 1]
    014: kCustomKernel  [source       | next=018 (1)] loop_compare grid: [1, 1, 1]
    018: kConditional   [prev=014 (1) | next=019 (1)]
      false_branch:
        015: kCustomKernel [source | sink] product grid: [32, 1, 1] threads: [64, 1, 1]
      true_branch:
        016: kCopy         [source       | next=017 (1)] kCopy
        017: kCustomKernel [prev=016 (1) | sink        ] sort_6_1 grid: [64, 1, 1]
    019: kCopy          [prev=018 (1) | sink        ] kCopy
035: kAllReduce    [prev=034 (1)  | next=036 (1)] kAllReduce
059: kAsyncStart   [prev=047 (1)  | next=064 (4)] stream=communication_stream[0], async_id=59
    060: kAllReduce [source | sink] kAllReduce
063: kAsyncDone    [source        | sink        ] async_id=59
"""
METADATA = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "command_buffer_1"
  }
  thunk_kind: "kCommandBuffer"
}
thunk_metadata {
  thunk_info {
    profile_annotation: "while.26"
    thunk_id: 4
  }
  thunk_kind: "kWhile"
}
"""


def counted(listing: str, trips=(), *, turns: int = 1) -> Tally:
    return _thunks.tally(_thunks.thunks(listing), dict(trips), turns=turns)


@pytest.mark.parametrize(
    ("trips", "turns", "expected"),
    [
        # before the loops 2; a turn 2 + (1 + turns of the inner: 2) + 1 + the longer branch 2 + 1
        pytest.param({}, 0, Tally(launches=2 + 1, sums=2, waits=1, graphs=1), id="no turn"),
        pytest.param(
            {}, 1, Tally(launches=2 + 2 + 9, sums=2, waits=2 + 3, graphs=2), id="asks at each turn"
        ),
        pytest.param(
            {}, 2, Tally(launches=2 + 3 + 22, sums=2, waits=3 + 8, graphs=3), id="one in the other"
        ),
        pytest.param(
            {4: 3}, 1, Tally(launches=2 + 3 * 9, sums=2, waits=3 * 3, graphs=4), id="known length"
        ),
        pytest.param(
            {4: 3, 9: 5},
            1,
            Tally(launches=2 + 3 * (6 + 5), sums=2, waits=3, graphs=4),
            id="both known: only the branch asks",
        ),
    ],
)
def test_loops_turn_and_ask_as_often_as_they_say(trips, turns, expected):
    assert counted(LISTING, trips.items(), turns=turns) == expected


def test_within_a_graph_the_host_is_not_asked():
    listing = """\
000: kCommandBuffer [source | sink]
    001: kWhile [source | sink]
condition:
        002: kCustomKernel [source | sink] compare grid: [1, 1, 1]
      body:
        003: kCustomKernel [source | sink] add grid: [1, 1, 1]
"""

    assert counted(listing, turns=3) == Tally(launches=3 + 4, waits=0, graphs=1)
    assert counted(listing.replace("kCommandBuffer", "kSequential"), turns=3).waits == 4


@pytest.mark.parametrize("kind", ["kHostExecuteStart", "kRecv", "kSend", "kDynamicSlice"])
def test_what_needs_the_host_waits_for_it(kind):
    assert counted(f"001: {kind} [source | sink] x") == Tally(launches=1, waits=1)


@pytest.mark.parametrize("kind", ["kAllGatherStart", "kReduceScatter", "kCollectivePermute"])
def test_sums_over_devices_are_no_launches(kind):
    listing = f"001: {kind} [source | sink] x\n002: kAllGatherDone [source | sink] x\n"

    assert counted(listing) == Tally(sums=1)


def test_an_empty_branch_is_none():
    listing = """\
001: kConditional [source | sink]
      branch_0:
        No thunks.      branch_1:
        002: kCustomKernel [source | sink] one grid: [1, 1, 1]
        003: kCustomKernel [source | sink] two grid: [1, 1, 1]
      branch_2:
        No thunks.
"""

    (thunk,) = _thunks.thunks(listing)

    assert [each.number for each in thunk.inner["branch_1"]] == [2, 3]
    assert counted(listing) == Tally(launches=2, waits=1)


def test_every_entry_of_a_listing_is_kept():
    numbers = [each.number for top in _thunks.thunks(LISTING) for each in top.walk()]

    assert [number for number in numbers if number] == [
        *(1, 2, 4, 5, 6, 7, 9, 10, 11, 14, 18, 15, 16, 17, 19, 35, 59, 60, 63)
    ]


def test_a_listing_in_another_form_is_refused():
    with pytest.raises(ValueError, match="expected a thunk"):
        _thunks.thunks("017: CustomKernel few_rows\n")


def test_thunks_name_their_instructions():
    assert _thunks.annotations(METADATA) == {4: "while.26"}


# --- HLO, of programs that are compiled here for a CPU


def hlo(function) -> str:
    x, n = jax.ShapeDtypeStruct((2, 256), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    weight = jax.ShapeDtypeStruct(WEIGHT.shape, jnp.int8)
    return jax.jit(function).lower(x, weight, n).compile().as_text()


def product(x, weight, number):
    chosen = jax.lax.dynamic_index_in_dim(weight, number, keepdims=False)
    return x @ jax.lax.optimization_barrier(chosen.astype(jnp.float32))


def looped(x, weight, number):
    return jax.lax.fori_loop(
        0, 3, lambda turn, sums: sums + product(x, weight, number + turn), jnp.zeros((2, 512))
    )


def branched(x, weight, number):
    other = lambda x, weight: x[:, :1] @ weight[1, :1].astype(jnp.float32)  # noqa: E731
    return jax.lax.cond(number > 0, lambda x, w: product(x, w, 0), other, x, weight)


@pytest.mark.parametrize("function", [product, looped, branched])
def test_a_matrix_that_is_converted_before_a_product_is_a_copy(function):
    (copy,) = _hlo.copies(hlo(function), [WEIGHT])

    assert copy.written == Array("f32", (256, 512))
    assert copy.weight == WEIGHT


def test_a_weight_that_is_returned_is_copied():
    (copy,) = _hlo.copies(hlo(lambda x, weight, number: (x, number, weight)), [WEIGHT])

    assert copy.written == WEIGHT


def test_a_row_of_a_weight_and_its_largest_number_are_no_copies():
    def read(x, weight, number):
        return x[:, :1] * weight[number, :1].astype(jnp.float32), jnp.max(weight)

    assert _hlo.copies(hlo(read), [WEIGHT]) == []


def test_other_arrays_may_be_copied():
    assert _hlo.copies(hlo(product), [Array("s8", (8, 512, 256))]) == []


GPU_PROGRAM = """\
HloModule jit_f, is_scheduled=true

%body.1 (param.1: (s32[], s8[8,256,512])) -> (s32[], s8[8,256,512]) {
  %param.1 = (s32[], s8[8,256,512]{2,1,0}) parameter(0)
  %part = s8[1,128,512]{2,1,0} fusion(%param.1#1, %param.1#0), kind=kLoop, calls=%fused
  %other = bf16[256,512]{1,0} fusion(%param.1#0), kind=kLoop, calls=%fill
  %next = s32[] fusion(%param.1#0), kind=kLoop, calls=%other
  ROOT %tuple.2 = (s32[], s8[8,256,512]{2,1,0}) tuple(%next, %param.1#1)
}

ENTRY %main.2 (w.1: s8[8,256,512]) -> f32[64,512] {
  %w.1 = s8[8,256,512]{2,1,0} parameter(0), metadata={op_name="w"}
  %constant.1 = s32[] constant(0)
  %pallas.1 = f32[64,512]{1,0} custom-call(%w.1), custom_call_target="__gpu$xla.gpu.triton"
  %pallas.2 = f32[256,512]{1,0} custom-call(%w.1), custom_call_target="__gpu$xla.gpu.triton"
  %blas.1 = (f32[64,512]{1,0}, s8[512]{0}) custom-call(%w.1), custom_call_target="__cublas$gemm"
  %nothing = f32[0]{0} fusion(%w.1), kind=kLoop, calls=%none
  %activations = f32[384,512]{1,0} fusion(%w.1), kind=kCustom, calls=%gemm
  %tuple.1 = (s32[], /*index=1*/s8[8,256,512]{2,1,0}) tuple(%constant.1, %w.1)
  %while.1 = (s32[], s8[8,256,512]{2,1,0}) while(%tuple.1), condition=%cond, body=%body.1, \
backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"2"}}
  %while.2 = (s32[], s8[8,256,512]{2,1,0}) while(%while.1), condition=%cond, body=%body.1
  %gte.1 = s8[8,256,512]{2,1,0} get-tuple-element(%while.2), index=1
  %flat = s8[2048,512]{1,0} bitcast(%gte.1)
  %wide = bf16[2048,512]{1,0} fusion(%flat), kind=kLoop, calls=%widen
  ROOT %copy.1 = f32[64,512]{1,0} copy(%pallas.1)
}
"""


def test_weights_are_followed_through_loops_and_half_a_matrix_is_a_copy():
    names = {copy.name: str(copy.written) for copy in _hlo.copies(GPU_PROGRAM, [WEIGHT])}

    assert names == {"part": "s8[1,128,512]", "wide": "bf16[2048,512]"}


def test_only_loops_of_known_length_have_one():
    assert _hlo.trip_counts(GPU_PROGRAM) == {"while.1": 2}
    assert list(_hlo.trip_counts(hlo(looped)).values()) == [3]


def test_kernels_are_told_from_other_libraries():
    assert _hlo.kernels(GPU_PROGRAM) == {"pallas.1", "pallas.2"}


# --- what ends the check with 1

LINE = "{number:03d}: {kind} [source | sink] name grid: [1, 1, 1]\n"
INFO = """\
thunk_metadata {{
  thunk_info {{
    profile_annotation: "name"
    thunk_id: {number}
  }}
}}
"""
PLAIN = """\
ENTRY %main.1 (w.1: s8[8,256,512]) -> f32[1,512] {
  %w.1 = s8[8,256,512]{2,1,0} parameter(0)
  ROOT %product = f32[1,512]{1,0} custom-call(%w.1), custom_call_target="__gpu$xla.gpu.triton"
}
"""
COPYING = PLAIN.replace(
    "  ROOT", "  %part = s8[1,256,512]{2,1,0} fusion(%w.1), kind=kLoop, calls=%cut\n  ROOT"
)


def program(folder: Path, name: str, kinds: list[str], hlo: str = PLAIN) -> Program:
    """A program that has been compiled, as XLA's texts tell it."""
    start = f"module_0001.{name}"
    listing = [LINE.format(number=number, kind=kind) for number, kind in enumerate(kinds, 1)]
    known = [INFO.format(number=number) for number in range(1, len(kinds) + 1)]
    for ending, text in (
        ("gpu_after_optimizations.txt", hlo),
        ("thunk_sequence_after_thunk_passes.txt", "".join(listing)),
        ("thunk_metadata.txt", "".join(known)),
    ):
        (folder / f"{start}.sm_9.0_{ending}").write_text(text, "utf-8")
    return Program(compiled=None, texts=folder, name=name)


@pytest.mark.parametrize(
    ("changes", "batch", "devices", "expected"),
    [
        pytest.param({}, 1, 8, [], id="as counted"),
        pytest.param({"launches": 41}, 1, 8, ["launches a layer", "LAUNCHES_OF_A_LAYER"], id="41"),
        pytest.param({"launches": LAUNCHES_OF_A_LAYER + 2}, 1, 8, [], id="two more"),
        pytest.param({"launches": LAUNCHES_OF_A_LAYER - 3}, 1, 8, ["LAUNCHES_OF"], id="three less"),
        pytest.param({"outside": LAUNCHES_OUTSIDE + 3}, 1, 8, ["LAUNCHES_OUTSIDE"], id="outside"),
        pytest.param({"launches": 41}, 8, 8, [], id="of eight tokens"),
        pytest.param({"launches": 41}, 1, 1, [], id="on one device"),
        pytest.param({"layer": ["kRecv"]}, 8, 1, ["host waits"], id="a layer waits"),
        pytest.param({"head": ["kConditional"]}, 16, 8, ["host waits"], id="the head waits"),
        pytest.param({"hlo": COPYING}, 8, 1, ["of the weight s8[8,256,512]"], id="a copied weight"),
    ],
)
def test_decoding_must_not_wait_nor_copy_nor_start_much(
    tmp_path, changes, batch, devices, expected
):
    launches = changes.get("launches", LAUNCHES_OF_A_LAYER)
    outside = changes.get("outside", LAUNCHES_OUTSIDE)
    layer = ["kCustomKernel"] * (launches - len(changes.get("layer", []))) + changes.get(
        "layer", []
    )
    embed = program(tmp_path, "embed", ["kCustomKernel", "kAllReduce"])
    head = program(tmp_path, "head", ["kGemm"] * (outside - 2) + changes.get("head", []))
    one, two = (
        Step(
            embed=embed,
            layers=program(
                tmp_path, f"run_{count}", ["kCopy", *layer * count], changes.get("hlo", PLAIN)
            ),
            head=head,
            together=64,
            seconds=1.0,
        )
        for count in (1, 2)
    )
    case = _gpu_check.Case(
        compiler=Compiler.__new__(Compiler),  # which compiles nothing, and sets no flags
        mesh=MeshShape(1, devices),
        batch=batch,
        tokens=1,
    )
    vars(case).update(one=one, two=two, weights=frozenset([WEIGHT]))

    faults = list(case.faults())

    assert len(faults) == len(expected), faults
    assert all(words in fault for words, fault in zip(expected, faults, strict=True))


# --- kernels

PTXAS = """\
ptxas info    : Compiling entry function 'few_rows' for 'sm_90a'
ptxas info    : Function properties for few_rows
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size
"""


def sass(*lines: str) -> str:
    return "\n".join(
        f"        /*{16 * number:04x}*/                   {line} ;"
        for number, line in enumerate(lines)
    )


def test_registers_and_spills():
    assert _sass.resources(PTXAS) == _sass.Resources(registers=40, spilled=12)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(["FADD R1, R2, R3"], 0, id="none"),
        pytest.param(
            [
                "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
                "FADD R0, R0, R7",
                "@!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
                "FADD R0, R0, R4",
            ],
            1,
            id="one after the other",
        ),
        pytest.param(
            [
                "LDG.E.128 R4, desc[UR4][R2.64]",
                "@P0 LDG.E.128 R8, desc[UR4][R2.64+0x100]",
                "LDG.E R20, desc[UR4][R30.64]",
                "LDG.E.128 R12, desc[UR4][R2.64+0x200]",
                "FFMA R0, R20, R4, R0",
                "LDG.E.128 R16, desc[UR4][R2.64+0x300]",
            ],
            3,
            id="three, and narrow ones between",
        ),
        pytest.param(
            ["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R4, desc[UR4][R2.64]"],
            1,
            id="into the same registers",
        ),
        pytest.param(
            [
                *2 * ["LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]", "LDGDEPBAR"],
                "DEPBAR.LE SB0, 0x1",
                *2 * ["LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]"],
                "LDGDEPBAR",
                "DEPBAR.LE SB0, 0x0",
                "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64]",
            ],
            3,
            id="to shared memory",
        ),
    ],
)
def test_loads_are_in_flight_until_they_are_needed(code, expected):
    assert _sass.loads_in_flight(sass(*code)) == expected


def test_operations_are_counted_whatever_their_form():
    code = sass("FFMA.FTZ R1, R2, R3, R4", "@P1 FFMA R1, R2, R3, R4", "FADD R1, R2, R3")

    assert _sass.operations(code, "FFMA", "FADD", "HMMA") == {"FFMA": 2, "FADD": 1, "HMMA": 0}
