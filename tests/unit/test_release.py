import io
import json
import mmap
import os
import pickle
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grokctl.checkpoint.pickles import BFLOAT16, Hole, write
from grokctl.checkpoint.release import file_nbytes, open_release, released_payloads, survey
from grokctl.errors import CorruptCheckpointError, Reason, UnsafePickleError, UsageError
from grokctl.events import Advanced, Event, Finished, Stage, Started, Unit
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
    rewrite(release / "ckpt-0" / KEY, int8(64, 64), bfloat16(4, 64))

    assert open_release(release).tensors[5].scales.shape == (4, 64)


def test_grok_1_is_770_files_of_318_gb_in_all():
    specs = tensor_specs(GROK_1)

    sizes = [file_nbytes(spec) for spec in specs]

    assert len(sizes) == 770
    assert sum(sizes) == 318_239_886_140


def test_a_release_of_full_size_opens_without_reading_it(tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    for spec in tensor_specs(GROK_1):
        with (tmp_path / "ckpt-0" / spec.file).open("wb") as file:
            write(file, *released_payloads(spec))
    before = time.monotonic()

    opened = open_release(tmp_path)

    assert opened.config == GROK_1
    assert opened.nbytes == 318_239_886_140
    assert opened.tensors[26].spec.path == "transformer/decoder_layer_10/moe/linear/w"
    assert time.monotonic() - before < 20


# --- damage


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        pytest.param(Path.unlink, Reason.MISSING, "expected 4519 bytes", id="missing"),
        pytest.param(
            lambda path: os.truncate(path, 4000),
            Reason.SHORT,
            "expected 4519 bytes, found 4000",
            id="short",
        ),
        pytest.param(
            lambda path: os.truncate(path, 1),
            Reason.SHORT,
            "expected 4519 bytes, found 1",
            id="one-byte",
        ),
        pytest.param(
            lambda path: os.truncate(path, 0),
            Reason.SHORT,
            "expected 4519 bytes, found 0",
            id="empty",
        ),
        pytest.param(
            lambda path: os.truncate(path, 4520),
            Reason.LONG,
            "expected 4519 bytes, found 4520",
            id="long",
        ),
        pytest.param(
            lambda path: (path.unlink(), path.mkdir()),
            Reason.UNREADABLE,
            "is no regular file",
            id="directory",
        ),
        pytest.param(
            lambda path: (path.unlink(), path.symlink_to(path.name)),
            Reason.UNREADABLE,
            "Too many levels of symbolic links",
            id="link-to-itself",
        ),
        pytest.param(
            lambda path: (path.unlink(), path.symlink_to("nowhere")),
            Reason.MISSING,
            "expected 4519 bytes",
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(release):
    (release / "ckpt-0" / KEY).chmod(0)

    file, reason, detail = only_damage_of(release)

    assert (file, reason, detail) == (f"ckpt-0/{KEY}", Reason.UNREADABLE, "Permission denied")


@pytest.mark.timeout(20)
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
        f"3 of 26 files are damaged, first ckpt-0/{KEY}: missing, expected 4519 bytes"
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
    assert str(error).startswith(f"1 of 26 files are unsafe pickles, first ckpt-0/{NORM}: unsafe")
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


def test_without_a_torrent_there_is_no_repair_to_hint_at(release):
    (release / "ckpt-0" / KEY).unlink()

    assert damage_of(release).hint is None


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

    with pytest.raises(UsageError, match="no release") as caught:
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


@pytest.mark.timeout(30)
def test_thousands_of_layers_are_reported_in_good_time(release):
    write_config(release, num_layers=4096)

    error = damage_of(release)

    assert len(error.damage) > 49_000
    assert len(str(error)) < 500


def test_another_models_config_is_reported_file_by_file(release):
    write_config(release, emb_size=128)

    error = damage_of(release)

    assert {damage.reason for damage in error.damage} <= {Reason.SHORT, Reason.MALFORMED}
    assert len(error.damage) == 26


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
