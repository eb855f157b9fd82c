import errno
import io
import json
import mmap
import os
import pickle
import shlex
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damaging import refuse

from grokctl.checkpoint.pickle_writer import Hole, write
from grokctl.checkpoint.pickles import BFLOAT16, scan
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.release_files import file_nbytes, released_payloads
from grokctl.checkpoint.structure import survey
from grokctl.errors import (
    CorruptCheckpointError,
    HardwareError,
    Reason,
    UnsafePickleError,
    UsageError,
)
from grokctl.events import Advanced, Event, Finished, Noted, Stage, Started, Unit
from grokctl.model.config import GROK_1, GrokConfig
from grokctl.model.tensors import tensor_specs

NORM, ROUTER, KEY, OUT, DOWN = (f"tensor{n:05d}_000" for n in (9, 13, 5, 6, 3))


def rewrite(path: Path, weight: np.ndarray | Hole, scales: np.ndarray | Hole | None = None) -> None:
    file = io.BytesIO()
    write(file, weight, scales)
    path.write_bytes(file.getvalue())


def int8(*shape: int) -> Hole:
    return Hole(shape, np.dtype("i1"))


def bfloat16(*shape: int) -> Hole:
    return Hole(shape, BFLOAT16)


def float32(*shape: int) -> Hole:
    return Hole(shape, np.dtype("<f4"))


def damage_of(root: Path) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError) as caught:
        open_release(root)
    return caught.value


def only_damage_of(root: Path) -> tuple[str, Reason, str]:
    error = damage_of(root)
    assert type(error) is CorruptCheckpointError
    (damage,) = error.damage
    return damage.file, damage.reason, damage.detail


# --- a release that is whole


def test_a_genuine_release_opens_with_every_tensor_in_order(release):
    opened = open_release(release)

    assert [tensor.spec for tensor in opened.tensors] == list(tensor_specs(opened.config))
    assert len(opened.tensors) == 26
    assert opened.name == "release"
    assert opened.tokenizer is None
    assert opened.nbytes == sum(path.stat().st_size for path in (release / "ckpt-0").iterdir())


def test_a_tokenizer_beside_the_tensors_is_found(release):
    (release / "tokenizer.model").write_bytes(b"x")

    assert open_release(release).tokenizer == release / "tokenizer.model"


def test_every_tensor_is_a_view_of_the_mapped_file(golden):
    for tensor in open_release(golden).tensors:
        data = tensor.path.read_bytes()

        for view, ref in zip(tensor.map(), (tensor.weight, tensor.scales), strict=True):
            if ref is None:
                assert view is None
                continue
            assert view.tobytes() == data[ref.offset : ref.offset + ref.nbytes]
            assert (view.shape, view.dtype) == (ref.shape, ref.dtype)
            assert not view.flags.owndata
            assert not view.flags.writeable
            base = view
            while isinstance(base, np.ndarray):
                base = base.base
            assert isinstance(base, mmap.mmap) or isinstance(base.obj, mmap.mmap)


def test_weight_and_scales_share_one_mapping(golden):
    tensor = open_release(golden).tensors[5]
    weight, scales = tensor.map()

    distance = scales.__array_interface__["data"][0] - weight.__array_interface__["data"][0]

    assert distance == tensor.scales.offset - tensor.weight.offset


def test_views_outlive_the_release_and_the_file_name(release):
    tensor = open_release(release).tensors[9]
    view, _ = tensor.map()
    before = view.copy()

    tensor.path.unlink()

    np.testing.assert_array_equal(view, before)


def test_the_values_are_those_that_were_pickled(golden):
    tensors = open_release(golden).tensors

    norm, _ = tensors[1].map()
    weight, scales = tensors[6].map()

    assert norm.dtype == np.float32
    assert np.isfinite(norm).all()
    assert weight.dtype == np.int8
    assert scales.shape == (8, 64)
    assert (scales.astype(np.float32) > 0).all()


def test_progress_counts_files(release):
    seen: list[Event] = []

    open_release(release, observe=seen.append)

    assert seen[0] == Started(stage=Stage.STRUCTURE, total=26, unit=Unit.FILES)
    assert seen[1:-1] == [Advanced(stage=Stage.STRUCTURE, done=done) for done in range(1, 27)]
    assert seen[-1] == Finished(stage=Stage.STRUCTURE)


def test_other_scale_rows_are_the_releases_to_say(release):
    rewrite(release / "ckpt-0" / KEY, int8(64, 64), np.ones((4, 64), BFLOAT16))

    assert open_release(release).tensors[5].scales.shape == (4, 64)


def test_grok_1_is_770_files_of_318_gb_in_all():
    specs = tensor_specs(GROK_1)

    sizes = [file_nbytes(spec) for spec in specs]

    assert len(sizes) == 770
    assert sum(sizes) == 318_239_886_140


def test_a_release_of_full_size_opens_without_reading_it(tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    for spec in tensor_specs(GROK_1):
        weight, scales = released_payloads(spec)
        with (tmp_path / "ckpt-0" / spec.file).open("wb") as file:
            write(file, weight, np.ones(scales.shape, BFLOAT16) if scales else None)
    before = time.thread_time()

    opened = open_release(tmp_path)

    assert opened.config == GROK_1
    assert opened.nbytes == 318_239_886_140
    assert opened.tensors[26].spec.path == "transformer/decoder_layer_10/moe/linear/w"
    assert time.thread_time() - before < 40


# --- damage


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        pytest.param(Path.unlink, Reason.MISSING, "expected 4,519 bytes", id="missing"),
        pytest.param(
            lambda path: os.truncate(path, 4000),
            Reason.SHORT,
            "expected 4,519 bytes, found 4,000",
            id="short",
        ),
        pytest.param(
            lambda path: os.truncate(path, 1),
            Reason.SHORT,
            "expected 4,519 bytes, found 1",
            id="one-byte",
        ),
        pytest.param(
            lambda path: os.truncate(path, 0),
            Reason.SHORT,
            "is empty, expected 4,519 bytes",
            id="empty",
        ),
        pytest.param(
            lambda path: os.truncate(path, 4520),
            Reason.LONG,
            "expected 4,519 bytes, found 4,520",
            id="long",
        ),
        pytest.param(
            lambda path: (path.unlink(), path.mkdir()),
            Reason.UNREADABLE,
            "is not a regular file",
            id="directory",
        ),
        pytest.param(
            lambda path: (path.unlink(), path.symlink_to("nowhere")),
            Reason.MISSING,
            "expected 4,519 bytes",
            id="link-to-nothing",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(64, 65), bfloat16(1, 65)),
            Reason.MALFORMED,
            "expected (64, 64) int8, found (64, 65) int8",
            id="wider",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(32, 128), bfloat16(1, 128)),
            Reason.MALFORMED,
            "expected (64, 64) int8, found (32, 128) int8",
            id="reshaped",
        ),
        pytest.param(
            lambda path: rewrite(path, float32(64, 64)),
            Reason.MALFORMED,
            "expected (64, 64) int8, found (64, 64) float32",
            id="float32",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(64, 64), bfloat16(1, 32)),
            Reason.MALFORMED,
            "expected scales (1, 64), found (1, 32)",
            id="scales-narrower",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(64, 64), bfloat16(64)),
            Reason.MALFORMED,
            "expected scales (1, 64), found (64,)",
            id="scales-of-rank-one",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(64, 64), bfloat16(1, 1, 64)),
            Reason.MALFORMED,
            "expected scales (1, 64), found (1, 1, 64)",
            id="scales-of-rank-three",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(64, 64), bfloat16(3, 64)),
            Reason.MALFORMED,
            "expected scales (1, 64), found (3, 64)",
            id="scale-rows-that-do-not-divide",
        ),
        pytest.param(
            lambda path: rewrite(path, int8(64, 64), bfloat16(128, 64)),
            Reason.MALFORMED,
            "expected scales (1, 64), found (128, 64)",
            id="more-scale-rows-than-inputs",
        ),
    ],
)
def test_a_damaged_file_is_named_with_both_sides(release, change, reason, detail):
    change(release / "ckpt-0" / KEY)

    assert only_damage_of(release) == (f"ckpt-0/{KEY}", reason, detail)


def test_a_quantized_file_in_place_of_a_norm_is_malformed(release):
    rewrite(release / "ckpt-0" / ROUTER, int8(64, 8), bfloat16(1, 8))

    file, reason, detail = only_damage_of(release)

    assert (file, reason) == (f"ckpt-0/{ROUTER}", Reason.MALFORMED)
    assert detail == "expected (64, 8) float32, found (64, 8) int8"


def test_a_link_to_itself_is_an_error_of_the_machine(release):
    path = release / "ckpt-0" / KEY
    path.unlink()
    path.symlink_to(path.name)

    with pytest.raises(UsageError, match="Too many levels of symbolic links") as caught:
        open_release(release)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EPERM])
def test_a_file_that_the_machine_refuses_is_not_damaged(release, monkeypatch, code):
    tensor = open_release(release).tensors[5]
    refuse(monkeypatch, KEY, code)

    for look in (lambda: open_release(release), tensor.map, lambda: tensor.opened().__enter__()):
        with pytest.raises(UsageError, match=os.strerror(code)) as caught:
            look()
        assert str(tensor.path) in str(caught.value)


def test_a_failing_disk_is_hardware(release, monkeypatch):
    refuse(monkeypatch, KEY, errno.EIO)

    with pytest.raises(HardwareError, match="Input/output error") as caught:
        open_release(release)

    assert caught.value.exit_code == 40


@pytest.mark.timeout(60)
def test_a_named_pipe_is_damage_and_is_not_waited_for(release):
    path = release / "ckpt-0" / KEY
    path.unlink()
    os.mkfifo(path)

    assert only_damage_of(release)[0] == f"ckpt-0/{KEY}"


@pytest.mark.parametrize("delta", [100, -100])
def test_a_wrong_length_inside_a_file_of_the_right_size_is_not_called_short_or_long(release, delta):
    path = release / "ckpt-0" / NORM
    data = path.read_bytes()
    place = data.index(b"B\x00\x01\x00\x00") + 1
    path.write_bytes(data[:place] + (256 + delta).to_bytes(4, "little") + data[place + 4 :])

    error = damage_of(release)

    assert error.damage[0].reason not in {Reason.SHORT, Reason.LONG}
    assert "expected 406 bytes, found 406" not in str(error)


def test_a_file_of_zeros_of_the_right_size_is_corrupt_and_no_attack(release):
    # what an interrupted download leaves behind
    path = release / "ckpt-0" / KEY
    path.write_bytes(bytes(4519))

    error = damage_of(release)

    assert type(error) is CorruptCheckpointError


def test_all_damage_is_listed_and_not_only_the_first(release):
    (release / "ckpt-0" / KEY).unlink()
    os.truncate(release / "ckpt-0" / OUT, 10)
    rewrite(release / "ckpt-0" / NORM, float32(65))

    error = damage_of(release)

    assert [(damage.file, damage.reason) for damage in error.damage] == [
        (f"ckpt-0/{KEY}", Reason.MISSING),
        (f"ckpt-0/{OUT}", Reason.SHORT),
        (f"ckpt-0/{NORM}", Reason.MALFORMED),
    ]
    assert error.exit_code == 20
    assert str(error) == (
        f"3 of 27 files are damaged, first ckpt-0/{KEY}: missing, expected 4,519 bytes"
    )


def test_an_empty_release_lists_every_file(release):
    for path in (release / "ckpt-0").iterdir():
        path.unlink()

    error = damage_of(release)

    assert len(error.damage) == 26
    assert {damage.reason for damage in error.damage} == {Reason.MISSING}


class _Trap:
    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_an_unsafe_file_decides_the_exit_code_and_nothing_of_it_runs(release, tmp_path):
    trap = _Trap()
    _Trap.canary = shlex.quote(str(tmp_path / "canary"))
    (release / "ckpt-0" / "tensor00000_000").unlink()
    (release / "ckpt-0" / NORM).write_bytes(pickle.dumps(trap, protocol=4))

    error = damage_of(release)

    assert isinstance(error, UnsafePickleError)
    assert error.exit_code == 21
    assert [damage.reason for damage in error.damage] == [Reason.MISSING, Reason.UNSAFE]
    assert str(error).startswith(f"1 of 27 files is an unsafe pickle, first ckpt-0/{NORM}: unsafe")
    assert "posix.system" in str(error)
    assert "nothing was executed" in error.hint
    assert not (tmp_path / "canary").exists()


def test_a_survey_keeps_what_is_whole(release):
    (release / "ckpt-0" / KEY).unlink()

    found = survey(release)

    assert len(found.tensors) == 25
    assert [damage.file for damage in found.damage] == [f"ckpt-0/{KEY}"]


def test_the_hint_of_a_damaged_release_can_be_pasted(release):
    spaced = release.with_name("my release; rm -rf x")
    release.rename(spaced)
    (spaced / "release.torrent").write_bytes(b"x")
    (spaced / "ckpt-0" / KEY).unlink()

    error = damage_of(spaced)

    assert shlex.split(error.hint) == ["grokctl", "verify", str(spaced), "--repair"]


def test_without_a_torrent_the_hint_is_to_fetch_what_is_missing_into_the_same_folder(release):
    (release / "ckpt-0" / KEY).unlink()

    hint = damage_of(release).hint
    assert "--repair" not in hint
    assert hint.startswith(f"grokctl fetch FILE.torrent --to {release} --force")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Path.exists, id="nothing"),
        pytest.param(lambda root: root.mkdir(), id="empty-folder"),
        pytest.param(lambda root: root.write_bytes(b""), id="a-file"),
        pytest.param(lambda root: (root.mkdir(), (root / "ckpt-0").touch()), id="ckpt-0-a-file"),
    ],
)
def test_where_there_is_no_release_it_is_a_usage_error(tmp_path, make):
    root = tmp_path / "nothing"
    make(root)

    with pytest.raises(UsageError, match="expected a release") as caught:
        open_release(root)

    assert caught.value.hint == "grokctl fetch"


def test_a_release_without_config_must_be_grok_1_to_the_byte(release):
    (release / "config.json").unlink()

    error = damage_of(release)

    assert len(error.damage) == 770


def test_a_file_that_shrinks_after_it_was_opened_is_corrupt_and_no_bug(release):
    tensor = open_release(release).tensors[5]
    os.truncate(tensor.path, 1000)

    with pytest.raises(CorruptCheckpointError):
        tensor.map()


# --- a hostile config.json


def write_config(root: Path, **changes: object) -> None:
    values = json.loads((root / "config.json").read_text()) | changes
    (root / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"emb_size": 2**20, "vocab_size": 2**20}, id="a-payload-of-4-TB"),
        pytest.param({"vocab_size": 2**24}, id="a-payload-of-4-GiB"),
        pytest.param({"widening_factor": 2**24, "emb_size": 2**24}, id="an-ffn-of-2-to-the-47"),
        pytest.param({"num_q_heads": 4096, "key_size": 2**24}, id="heads-of-2-to-the-36"),
        pytest.param({"num_experts": 4096, "emb_size": 2**24}, id="4096-experts"),
    ],
)
def test_sizes_that_no_file_can_have_are_a_corrupt_config(release, changes):
    write_config(release, **changes)

    error = damage_of(release)

    assert error.exit_code == 20


def test_hundreds_of_layers_are_reported_in_good_time(release):
    write_config(release, num_layers=256)

    error = damage_of(release)

    assert len(error.damage) > 3000
    assert len(str(error)) < 500


def test_thousands_of_layers_are_no_model(release):
    write_config(release, num_layers=4096)

    assert str(damage_of(release)) == "config.json: malformed, num_layers is 4096"


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        pytest.param(
            {"emb_size": 128},
            "emb_size is 128, the tensors have 64; "
            "the width of an expert is 688, the tensors have 344",
            id="emb_size",
        ),
        pytest.param(
            {"vocab_size": 512}, "vocab_size is 512, the tensors have 256", id="vocabulary"
        ),
        pytest.param({"num_experts": 4}, "num_experts is 4, the tensors have 8", id="experts"),
        pytest.param(
            {"widening_factor": 4},
            "the width of an expert is 176, the tensors have 344",
            id="width",
        ),
        pytest.param(
            {"num_layers": 1},
            "describes 14 tensors, ckpt-0 contains 12 more, first tensor00014_000",
            id="layers",
        ),
    ],
)
def test_another_models_config_is_what_is_wrong_when_the_files_agree(release, changes, detail):
    write_config(release, **changes)

    assert only_damage_of(release) == ("config.json", Reason.MALFORMED, detail)


def test_a_wrong_config_hides_no_other_damage(release):
    write_config(release, emb_size=128)
    (release / "ckpt-0" / KEY).unlink()
    rewrite(release / "ckpt-0" / NORM, float32(65))

    error = damage_of(release)

    assert {damage.file: damage.reason for damage in error.damage} == {
        "config.json": Reason.MALFORMED,
        f"ckpt-0/{KEY}": Reason.MISSING,
        f"ckpt-0/{NORM}": Reason.MALFORMED,
    }


def test_more_layers_in_config_than_in_files_are_missing_files(release):
    write_config(release, num_layers=3)

    error = damage_of(release)

    assert [damage.reason for damage in error.damage] == [Reason.MISSING] * 12


def test_other_files_beside_the_tensors_are_nobodys_business(release):
    (release / "ckpt-0" / "tensor00099_000.note").write_text("x")
    (release / "ckpt-0" / "README").write_text("x")

    assert len(open_release(release).tensors) == 26


# --- values


def values_of(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A tensor's arrays, to change."""
    with path.open("rb") as file:
        found = scan(file.read(), file=path.name)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    weight, scales = (
        None
        if ref is None
        else data[ref.offset : ref.offset + ref.nbytes].view(ref.dtype).reshape(ref.shape).copy()
        for ref in (found.weight, found.scales)
    )
    return weight, scales


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(np.nan, "1 value not finite", id="nan"),
        pytest.param(
            np.uint16(0xFF81).view(BFLOAT16), "1 value not finite", id="negative-signalling-nan"
        ),
        pytest.param(np.inf, "1 value not finite", id="inf"),
        pytest.param(-np.inf, "1 value not finite", id="negative-inf"),
        pytest.param(-0.5, "1 value below 0", id="negative"),
        pytest.param(0.0, "1 value of 0", id="zero"),
        pytest.param(-0.0, "1 value of 0", id="negative-zero"),
    ],
)
def test_an_unusual_scale_is_a_fact_and_located(release, value, said):
    path = release / "ckpt-0" / OUT
    weight, scales = values_of(path)
    scales[3, 17] = value
    rewrite(path, weight, scales)

    found = survey(release)

    assert found.damage == ()
    (odd,) = found.odd
    assert odd.file == f"ckpt-0/{OUT}"
    first = "nan" if "finite" in said and "inf" not in str(value) else f"{value:g}"
    assert str(odd) == f"layers.0.attention.out.scales: {said}, first [3, 17] = {first}"
    ((low, high),) = odd.values.ranges
    assert path.read_bytes()[low:high] == scales[3, 17].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    ("file", "place", "name"),
    [
        pytest.param(NORM, (5,), "layers.0.norms.pre_attention.weight", id="norm"),
        pytest.param(ROUTER, (2, 7), "layers.0.router.weight", id="router"),
        pytest.param("tensor00001_000", (0,), "final_norm.weight", id="final-norm"),
    ],
)
def test_a_norm_or_router_that_is_no_number_is_noted(release, file, place, name, value):
    path = release / "ckpt-0" / file
    weight, _ = values_of(path)
    weight[place] = value
    rewrite(path, weight)

    seen: list[Event] = []
    open_release(release, observe=seen.append)

    (note,) = [event.message for event in seen if isinstance(event, Noted)]
    index = ", ".join(map(str, place))
    assert note == f"ckpt-0/{file}: {name}: 1 value not finite, first [{index}] = {value:g}"


def test_a_norm_may_be_negative_and_zero(release):
    path = release / "ckpt-0" / NORM
    weight, _ = values_of(path)
    weight[:2] = -1, 0
    rewrite(path, weight)

    open_release(release)


def test_the_smallest_and_largest_scales_are_sound(release):
    path = release / "ckpt-0" / KEY
    weight, scales = values_of(path)
    limits = ml_dtypes.finfo(BFLOAT16)
    scales[0, :3] = limits.smallest_subnormal, limits.tiny, limits.max
    rewrite(path, weight, scales)

    open_release(release)


def test_scales_of_0_are_all_counted_in_one_fact(release):
    path = release / "ckpt-0" / KEY
    weight, scales = values_of(path)
    rewrite(path, weight, np.zeros_like(scales))

    (odd,) = survey(release).odd

    assert odd.values.zeros == odd.values.count == scales.size
    ((low, high),) = odd.values.ranges
    assert high - low == scales.nbytes


def test_many_files_with_unusual_values_are_counted(release):
    for number in (2, 3, 4, 5, 6, 7):
        path = release / "ckpt-0" / f"tensor{number:05d}_000"
        weight, scales = values_of(path)
        rewrite(path, weight, np.zeros_like(scales))
    seen: list[Event] = []

    open_release(release, observe=seen.append)

    notes = [event.message for event in seen if isinstance(event, Noted)]
    assert len(notes) == 5
    assert notes[-1] == "unusual values in 2 more files"


# --- damage in words, each with its own advice


@pytest.mark.parametrize(
    ("change", "words", "advice"),
    [
        pytest.param(
            lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
            "was not written to its end",
            "finish it",
            id="a-zero-tail",
        ),
        pytest.param(
            lambda _: b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer",
            "lfs pull",
            id="lfs",
        ),
        pytest.param(lambda _: b"<html>", "HTML page", "download", id="html"),
        pytest.param(lambda data: b"GGUF" + data[4:], "GGUF file", "replace it", id="gguf"),
        pytest.param(
            lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
            "byte 30 has a flipped bit",
            "copy it again",
            id="a-flip-in-a-name",
        ),
        pytest.param(
            lambda data: data[:-1] + b"/",
            "has a flipped bit",
            "copy it again",
            id="a-flip-at-the-end",
        ),
        pytest.param(
            lambda data: data[:10] + bytes([data[10] ^ 128]) + data[11:],
            "has a flipped bit",
            "copy it again",
            id="a-flip-in-a-length",
        ),
    ],
)
def test_what_happened_to_a_file_is_said_with_advice(release, change, words, advice):
    path = release / "ckpt-0" / KEY
    path.write_bytes(change(path.read_bytes()))

    error = damage_of(release)

    assert type(error) is CorruptCheckpointError
    assert words in str(error)
    assert advice in error.hint
    assert " rm " not in f" {error.hint}"


def test_bytes_after_the_pickles_end_are_found_where_the_size_is_right(release):
    path = release / "ckpt-0" / NORM
    weight, _ = values_of(path)
    size = path.stat().st_size
    rewrite(path, weight[:-1])
    shorter = path.stat().st_size
    os.truncate(path, size)

    _, reason, detail = only_damage_of(release)

    assert reason is Reason.MALFORMED
    assert detail == f"{size - shorter:,} bytes after the pickle's end"


def test_a_file_of_right_shapes_that_another_pickler_wrote_has_another_size(release):
    path = release / "ckpt-0" / NORM
    data = path.read_bytes()
    frame, head = data.index(b"\x95"), data.index(b"\x95") + 9
    length = len(data) - head
    assert int.from_bytes(data[frame + 1 : head], "little") == length
    path.write_bytes(data[:frame] + data[head:])

    _, reason, detail = only_damage_of(release)

    assert reason is Reason.SHORT
    assert detail == f"expected {len(data)} bytes, found {len(data) - 9}"


def test_payloads_are_described_by_the_specification():
    specs = tensor_specs(GROK_1)

    assert released_payloads(specs[0]) == (float32(131072, 6144), None)
    assert released_payloads(specs[3]) == (int8(8, 32768, 6144), bfloat16(8, 8, 6144))


@pytest.mark.parametrize("layers", [1, 2, 11])
def test_sizes_of_other_models_are_what_is_written(tmp_path, layers):
    config: GrokConfig = replace(GROK_1, num_layers=layers, emb_size=48, key_size=2, vocab_size=77)

    for spec in tensor_specs(config)[:14]:
        path = tmp_path / spec.file
        with path.open("wb") as file:
            write(file, *released_payloads(spec))

        assert path.stat().st_size == file_nbytes(spec)
