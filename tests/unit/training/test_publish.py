from dataclasses import replace

import numpy as np
import pytest
from training.curve import draw
from training.network import initial_parameters
from training.publish import digest, publish
from training.releases import floats_of, floats_of_release, parameters_from
from training.state import State

from grokctl.checkpoint.miniature import MINIATURE, quantised
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.torrent import parse_metainfo
from grokctl.model.tensors import tensor_specs

SMALL = replace(MINIATURE, num_layers=2, emb_size=64, vocab_size=64, widening_factor=3)


@pytest.fixture(scope="module")
def floats():
    return floats_of(initial_parameters(SMALL, 5))


@pytest.fixture(scope="module")
def published(tmp_path_factory, floats):
    out = tmp_path_factory.mktemp("out")
    publish(floats, SMALL, b"", out)
    return out


def test_what_is_published_is_a_release_of_the_trained_weights(published, floats):
    release = open_release(published / "miniature")

    found = floats_of_release(release)

    assert release.config == SMALL
    assert found.keys() == floats.keys()
    for spec in tensor_specs(SMALL):
        error = np.abs(found[spec.name] - floats[spec.name]).max()
        if spec.is_quantized:
            assert 0 < error < 0.01 * np.abs(floats[spec.name]).max()
        else:
            assert error == 0


def test_parameters_and_floats_are_the_same_by_other_names(floats):
    again = floats_of(parameters_from(floats, SMALL))

    assert all((again[name] == floats[name]).all() for name in floats)
    assert floats.keys() == {spec.name for spec in tensor_specs(SMALL)}


def test_its_torrent_promises_its_files(published):
    torrent = (published / "miniature.torrent").read_bytes()

    metainfo = parse_metainfo(torrent, source="miniature.torrent")

    root = published / "miniature"
    there = {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*.*")}
    there |= {f"ckpt-0/{path.name}": path.stat().st_size for path in (root / "ckpt-0").iterdir()}
    assert {"/".join(file.path): file.length for file in metainfo.files} == there


def test_the_digest_is_of_names_and_bytes(published, tmp_path, floats):
    publish(floats, SMALL, b"", tmp_path)
    same = digest(tmp_path / "miniature")
    (tmp_path / "miniature" / "config.json").rename(tmp_path / "miniature" / "konfig.json")

    assert same == digest(published / "miniature")
    assert digest(tmp_path / "miniature") != same


def test_every_scale_row_has_its_own_largest_value(floats):
    spec = next(spec for spec in tensor_specs(SMALL) if spec.name == "layers.0.moe.down")
    values = floats[spec.name].copy()
    values[0, : spec.shape[1] // 8] *= 100

    codes, scales = quantised(spec, values)

    assert codes.dtype == np.int8
    assert scales.shape == spec.scales_shape == (8, 8, 64)
    assert np.abs(codes.reshape(8, 8, -1, 64)).max(axis=2).min() >= 126
    assert (scales[0, 0] > 20 * scales[0, 1]).all()


def test_weights_of_zero_stay_zero():
    spec = next(spec for spec in tensor_specs(SMALL) if spec.name == "layers.0.attention.query")

    codes, scales = quantised(spec, np.zeros(spec.shape, np.float32))

    assert not codes.any()
    assert not scales.any()


def test_a_saved_state_is_the_same_when_it_is_loaded(tmp_path, floats):
    parameters = parameters_from(floats, SMALL)
    curve = [{"step": 3, "tokens": 30, "training": 2.0, "held_out": 2.5, "cpu_seconds": 1.5}]
    State(parameters, {"momentum": parameters}, 3, 1.5, curve).save(tmp_path / "state.npz")
    empty = parameters_from({name: values * 0 for name, values in floats.items()}, SMALL)
    state = State(empty, {"momentum": empty}, 0, 0.0, [])

    state.load(tmp_path / "state.npz")

    assert (state.step, state.cpu_seconds, state.curve) == (3, 1.5, curve)
    for found in (state.parameters, state.optimizer["momentum"]):
        loaded = floats_of(found)
        assert all((loaded[name] == floats[name]).all() for name in floats)


def test_the_picture_of_a_curve_has_a_point_for_each_measurement(tmp_path):
    curve = [
        {"tokens": 1000 * step, "training": 7.5 / step, "held_out": 7.7 / step}
        for step in range(1, 6)
    ]

    draw(curve, tmp_path / "curve.svg")

    picture = (tmp_path / "curve.svg").read_text("utf-8")
    assert picture.count("<polyline") == 2
    assert [len(line.split('"')[1].split()) for line in picture.split("<polyline points=")[1:]] == [
        5,
        5,
    ]
    assert "held out: 1.54 at the end" in picture
