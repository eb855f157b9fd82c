"""`grokctl inspect`: tables that fit a terminal, and all numbers in JSON."""

import json
import os
import re
import signal

import numpy as np
import pytest

from grokctl.checkpoint.release import open_release

BARS = "▁▂▃▄▅▆▇█"
PLAIN = ".:-=+*#@"
LARGEST_WIDTH = 80


@pytest.fixture
def release(home):
    return home / "releases" / "two-layers"


def table(stdout):
    """The lines of the first table, below its heading."""
    lines = [line.rstrip() for line in stdout.splitlines()]
    rule = next(place for place, line in enumerate(lines) if line and set(line) <= set("─-+ "))
    return lines[rule - 1], lines[rule + 1 : lines.index("", rule)]


# --- what people see


def test_identical_layers_share_a_row_and_the_totals_stand_below(grokctl, release):
    outcome = grokctl("inspect", release)

    _, rows = table(outcome.stdout)
    assert outcome.exit_code == 0
    assert len(rows) == 2 + 12
    assert any(re.search(r"layers\.\*\.moe\.gate +2 +8x64x344 +int8 +1 ", row) for row in rows)
    nbytes = open_release(release).nbytes
    assert f"two-layers: release checkpoint, {nbytes / 1e6:.1f} MB" in outcome.stdout
    parameters = sum(int(np.prod(t.spec.shape)) for t in open_release(release).tensors)
    assert f"{parameters:,} parameters" in outcome.stdout
    for part in ("embedding", "norms", "experts", "attention", "router"):
        assert re.search(rf"^{part} +\d+ +[\d,]+ ", outcome.stdout, re.MULTILINE)


def test_a_layer_that_is_stored_otherwise_has_a_row_of_its_own(grokctl, two_layers):
    source, target = (two_layers / "ckpt-0" / f"tensor{n:05d}_000" for n in (4, 16))
    assert source.stat().st_size == target.stat().st_size
    config = json.loads((two_layers / "config.json").read_text())
    assert config["num_layers"] == 2
    tensor = open_release(two_layers).tensors[16]
    weight, scales = (array.copy() for array in tensor.map())
    from grokctl.checkpoint.pickle_writer import write  # noqa: PLC0415

    with target.open("wb") as file:
        write(file, weight, np.repeat(scales, 2, axis=-2))

    outcome = grokctl("inspect", two_layers)

    _, rows = table(outcome.stdout)
    assert any(re.search(r"layers\.0\.moe\.up .* 1 ", row) for row in rows)
    assert any(re.search(r"layers\.1\.moe\.up .* 2 ", row) for row in rows)


def test_single_tensors_have_their_number_and_file(grokctl, release):
    outcome = grokctl("inspect", release, "--tensor", "layers.1.*")

    _, rows = table(outcome.stdout)
    assert len(rows) == 12
    assert re.search(r"^ +14 +layers\.1\.moe\.gate .*tensor00014_000$", rows[0])


def test_stats_give_ranges_shares_and_a_strip(grokctl, release):
    outcome = grokctl("inspect", release, "--tensor", "*", "--stats")

    heading, rows = table(outcome.stdout)
    assert outcome.exit_code == 0
    assert heading.split()[:3] == ["index", "tensor", "type"]
    for tensor, row in zip(open_release(release).tensors, rows, strict=True):
        weight, scales = tensor.map()
        strip = re.search(rf"[{BARS}][{BARS} ]*$", row)
        if scales is None:
            assert strip is None
            assert f"{weight.min():.3g}" in row
            continue
        sizes = np.histogram(np.abs(weight.astype(int)), 16, (0, 128))[0]
        levels = np.ceil(sizes * len(BARS) / sizes.max()).astype(int)
        assert strip[0] == "".join((" " + BARS)[level] for level in levels).rstrip()
        assert f"{(weight == 0).mean():.1%}" in row
        assert f"{(np.abs(weight.astype(int)) >= 127).mean():.1%}" in row


def test_a_group_of_layers_has_the_range_of_all_of_them(grokctl, release):
    outcome = grokctl("inspect", release, "--stats")

    _, rows = table(outcome.stdout)
    (row,) = [row for row in rows if "layers.*.norms.pre_moe" in row]
    norms = [t for t in open_release(release).tensors if t.spec.name.endswith("norms.pre_moe")]
    values = np.concatenate([tensor.map()[0] for tensor in norms]).astype(float)
    wanted = [values.min(), values.max(), np.sqrt(np.mean(values**2))]
    assert row.split()[-3:] == [f"{value:.3g}" for value in wanted]


def test_a_terminal_that_knows_no_blocks_gets_letters(process, release):
    outcome = process.run(
        *("inspect", release, "--stats"), env=process.environment(PYTHONIOENCODING="ascii")
    )

    _, rows = table(outcome.stdout)
    (row,) = [row for row in rows if "layers.*.moe.gate" in row]
    assert outcome.exit_code == 0
    assert outcome.stdout.isascii()
    assert "?" not in outcome.stdout
    assert re.search(rf"[{re.escape(PLAIN)}][{re.escape(PLAIN)} ]+$", row)


@pytest.mark.parametrize("columns", [LARGEST_WIDTH, 100, 200])
@pytest.mark.parametrize(
    "arguments",
    [[], ["--stats"], ["--tensor", "*"], ["--tensor", "*", "--stats"]],
    ids=["groups", "groups-stats", "single", "single-stats"],
)
def test_no_row_breaks_on_a_terminal(process, release, columns, arguments):
    code, said = on_a_terminal(process, columns, "inspect", release, *arguments)

    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    heading, rows = table(plain[plain.index("two-layers: ") :])
    assert code == 0
    assert len(rows) == (26 if "--tensor" in arguments else 14)
    assert max(map(len, [heading, *rows])) <= columns
    assert "tensor" in heading
    assert ("|q| 0 to 127" in heading) is ("--stats" in arguments)
    assert ("shape" in heading) is ("--stats" not in arguments)


def on_a_terminal(process, columns, *arguments):
    leader, follower = os.openpty()
    environment = process.environment(TERM="xterm", COLUMNS=str(columns), NO_COLOR="1")
    running = process.start(
        *arguments, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    said = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        said += part
    running.wait(timeout=60)
    os.close(leader)
    return running.returncode, said.decode().replace("\r\n", "\n")


def test_numbers_that_are_none_are_said(grokctl, two_layers):
    plant_nan(two_layers)

    outcome = grokctl("inspect", two_layers, "--stats")

    assert outcome.exit_code == 0
    assert "embedding: 2 of 16,384 values are not finite" in outcome.stderr


def plant_nan(root):
    """Damage two numbers of the embedding, which is too large for every command to read."""
    tensor = open_release(root).tensors[0]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.weight.offset)
        file.write(np.array([np.nan, np.inf], np.float32).tobytes())


# --- what programs see


def test_json_has_every_tensor_and_its_numbers_on_demand(grokctl, release):
    plain = grokctl("inspect", release, "--json").result
    outcome = grokctl("inspect", release, "--stats", "--json")

    values = outcome.result
    tensors = open_release(release).tensors
    assert [tensor["index"] for tensor in values["tensors"]] == list(range(26))
    assert all(tensor["stats"] is None for tensor in plain["tensors"])
    assert {*values} == {
        *("checkpoint", "kind", "config", "bytes", "proven", "proven_by", "parameters"),
        *("totals", "tensors"),
    }
    assert values["parameters"] == sum(total["parameters"] for total in values["totals"])
    assert sum(total["nbytes"] for total in values["totals"]) == values["bytes"]
    for row, tensor in zip(values["tensors"], tensors, strict=True):
        stats = row["stats"]
        weight, scales = tensor.map()
        assert {*row} == {
            *("index", "file", "name", "kind", "shape", "dtype", "scale_groups", "parameters"),
            *("nbytes", "stats"),
        }
        assert {*stats} == {
            *("min", "max", "rms", "nonfinite", "zero_share", "saturated_share", "use"),
            *("lowest", "zero_scales", "negative_scales", "zero_values"),
        }
        if scales is None:
            assert stats["use"] is stats["zero_share"] is stats["saturated_share"] is None
            assert stats["min"] == float(weight.min())
        else:
            assert sum(stats["use"]) == pytest.approx(1)
            assert len(stats["use"]) == 16
            assert stats["zero_share"] == pytest.approx((weight == 0).mean())
    assert '"values"' in outcome.stderr


def test_json_of_a_ready_checkpoint_has_the_same_keys(grokctl, release, cut):
    ours = grokctl("inspect", cut("two-layers", 4).root, "--stats", "--json").result
    theirs = grokctl("inspect", release, "--stats", "--json").result

    assert {*ours} == {*theirs}
    assert {*ours["tensors"][0]} == {*theirs["tensors"][0]}
    assert ours["parameters"] == theirs["parameters"]
    by_name = {row["name"]: row for row in ours["tensors"]}
    for row in theirs["tensors"]:
        mate = by_name[f"{row['name']}.weight"]
        assert mate["index"] is None
        for key, value in row["stats"].items():
            same = value is mate["stats"][key] is None
            assert same or mate["stats"][key] == pytest.approx(value, rel=1e-12)


def test_a_range_without_a_number_is_null_and_the_json_valid(grokctl, two_layers):
    tensor = open_release(two_layers).tensors[0]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.weight.offset)
        file.write(np.full(tensor.weight.shape, np.nan, np.float32).tobytes())

    outcome = grokctl("inspect", two_layers, "--tensor", "embedding", "--stats", "--json")

    def refuse(constant):
        raise AssertionError(constant)

    stats = json.loads(outcome.stdout, parse_constant=refuse)["tensors"][0]["stats"]
    assert (stats["min"], stats["max"], stats["rms"]) == (None, None, None)
    assert stats["nonfinite"] == int(np.prod(tensor.weight.shape))


# --- damage and interrupts


@pytest.mark.parametrize("arguments", [[], ["--stats"]], ids=["plain", "stats"])
def test_a_damaged_release_is_said_to_be_one(grokctl, two_layers, arguments):
    (two_layers / "ckpt-0" / "tensor00003_000").unlink()

    outcome = grokctl("inspect", two_layers, *arguments)

    assert outcome.exit_code == 20
    assert outcome.stdout == ""
    assert "ckpt-0/tensor00003_000: missing" in outcome.error


def test_looking_at_values_can_be_stopped(process, large, stop_signal):
    slow = "patch('checkpoint.value_stats:Part.stats', delayed(0.2))"

    with process.start("inspect", large, "--stats", "--json", code=slow) as running:
        for line in running.stderr:
            if '"advanced"' in line and '"values"' in line:
                break
        running.send_signal(stop_signal)
        stdout, stderr = running.communicate(timeout=5)

    assert running.returncode == 130
    assert stdout == ""
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert stop_signal in {signal.SIGINT, signal.SIGTERM}


# --- structure, as `verify` reports it


SPOILT = {
    "nan scale": (5, np.nan, "layers.0.attention.key.scales", "1 value not finite", "nan"),
    "infinite scale": (3, np.inf, "layers.0.moe.down.scales", "1 value not finite", "inf"),
    "negative scale": (6, -1, "layers.0.attention.out.scales", "1 value below 0", "-1"),
    "zero scale": (2, 0, "layers.0.moe.gate.scales", "1 value of 0", "0"),
    "negative zero": (2, -0.0, "layers.0.moe.gate.scales", "1 value of 0", "-0"),
    "subnormal scale": (4, 1e-39, "layers.0.moe.up.scales", "1 value subnormal", "1.01"),
    "nan norm": (9, np.nan, "layers.0.norms.pre_attention.weight", "1 value not finite", "nan"),
    "zero norm": (9, 0, "layers.0.norms.pre_attention.weight", "1 value of 0", "0"),
    "infinite router": (13, np.inf, "layers.0.router.weight", "1 value not finite", "inf"),
}


def spoil(root, index, value):
    """Replace the first scale, or number, of a file."""
    tensor = open_release(root).tensors[index]
    ref = tensor.scales or tensor.weight
    with tensor.path.open("r+b") as file:
        file.seek(ref.offset)
        file.write(np.array([value]).astype(ref.dtype).tobytes())
    return f"ckpt-0/{tensor.spec.file}", ref


def torrent_of(root):
    from grokctl.checkpoint.torrent import build_metainfo  # noqa: PLC0415

    files = [
        path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()
    ]
    torrent = build_metainfo(root, files, name="spoilt", piece_length=16384)
    (root / "release.torrent").write_bytes(torrent)


@pytest.mark.parametrize("how", SPOILT)
def test_an_unusual_value_is_noted_and_refuses_nothing(grokctl, two_layers, how):
    index, value, array, words, first = SPOILT[how]
    file, _ = spoil(two_layers, index, value)

    outcome = grokctl("verify", two_layers, "--quick")

    assert outcome.exit_code == 0
    assert f"{file}: {array}: {words}, first [0" in outcome.stderr
    assert f"] = {first}" in outcome.stderr


@pytest.mark.parametrize("how", SPOILT)
def test_what_a_torrent_promises_is_proven_whatever_its_values(grokctl, two_layers, how):
    index, value, array, words, _ = SPOILT[how]
    file, _ = spoil(two_layers, index, value)
    torrent_of(two_layers)

    outcome = grokctl("verify", two_layers, "--torrent-file", two_layers / "release.torrent")

    assert outcome.exit_code == 0
    assert "every byte is proven" in outcome.stdout
    assert f"{file}: {array}: {words}" in outcome.stderr


@pytest.mark.parametrize("verb", [["inspect"], ["reshard", "--devices", "1", "--dry-run"]])
@pytest.mark.parametrize("value", [0, -1, np.nan])
def test_every_verb_takes_a_release_with_unusual_values(grokctl, two_layers, verb, value):
    spoil(two_layers, 5, value)

    outcome = grokctl(verb[0], two_layers, *verb[1:])

    assert outcome.exit_code == 0
    assert "layers.0.attention.key.scales: 1 value" in outcome.stderr


def test_stats_show_zero_scales_the_lowest_integer_and_norms_of_zero(grokctl, two_layers):
    spoil(two_layers, 5, 0)
    spoil(two_layers, 9, 0)
    tensor = open_release(two_layers).tensors[6]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.weight.offset)
        file.write(b"\x80\x80")

    outcome = grokctl("inspect", two_layers, "--stats")

    assert outcome.exit_code == 0
    assert "attention.key: 1 scales are 0" in outcome.stderr
    assert "attention.out: 2 of 16,384 values are stored as -128" in outcome.stderr
    assert "norms.pre_attention: 1 of 128 values are 0" in outcome.stderr


def test_a_torrent_of_a_malformed_file_is_not_repaired_for_ever(grokctl, two_layers):
    path = two_layers / "ckpt-0" / "tensor00005_000"
    path.write_bytes(path.read_bytes()[:-1] + b"/")
    torrent_of(two_layers)

    outcomes = [grokctl("verify", two_layers), grokctl("verify", two_layers, "--repair")]

    for outcome in outcomes:
        assert outcome.exit_code == 20
        assert "has a flipped bit" in outcome.error
        assert "as its torrent promises" in outcome.error
        assert "--repair" not in outcome.hint


# --- the experts of a text


def test_the_experts_of_a_text_are_a_strip_for_each_layer_and_kept_below_home(grokctl, home):
    command = ("inspect", "words", "--routing", "The import statement", "--home", home)

    people, machine = grokctl(*command), grokctl(*command, "--json")

    assert people.exit_code == machine.exit_code == 0
    values = machine.result
    assert all(sum(row) == 2 * values["tokens"] for row in values["counts"])
    _, rows = table(people.stdout)
    assert len(rows) == len(values["counts"])
    kept = json.loads((home / "routing").joinpath(values["kept"]).read_text())
    assert kept == {"version": 1, "tokens": values["kept_tokens"], "counts": values["kept_counts"]}
    assert values["kept_tokens"] >= 2 * values["tokens"]


@pytest.mark.parametrize("other", [("--stats",), ("--tensor", "*")])
def test_routing_stands_alone(grokctl, home, other):
    outcome = grokctl("inspect", "words", "--routing", "x y", *other, "--home", home)

    assert outcome.exit_code == 2
    assert f"--routing or {other[0]}" in outcome.error
