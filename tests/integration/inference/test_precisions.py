"""Logits of every precision on every mesh: those of the same values in float32 on one device."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from golden import FLOAT32_BOUND, load_golden, score_logits, start

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.pickles import BFLOAT16
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import LogicalTensor, ReleaseSource, Slices, Storage, index_of
from grokctl.model.precision import Precision
from grokctl.model.sampling import Sampling

# 512 feed-forward columns: sixteen devices have a whole int4 group each
SMALL = replace(MINIATURE, vocab_size=256, emb_size=96, key_size=8, num_layers=2, sequence_len=64)
GROUP = 4
MESHES = [
    *("model=1", "model=4", "expert=8,model=1", "model=8"),
    pytest.param("expert=2,model=8", marks=pytest.mark.optimized),
    "model=16",
]
"""One as users compile; XLA divides a program among devices before it optimizes."""


class Stored:
    """A release in a precision, by the definition of the format, all in memory."""

    def __init__(self, release: Release, precision: Precision) -> None:
        source = ReleaseSource(release)
        self.config = release.config
        self.storage = Storage(
            config=release.config,
            precision=precision,
            groups={
                tensor.spec.name: tensor.spec.shape[-2] // GROUP
                if precision is Precision.INT4 and tensor.spec.is_quantized
                else 0
                for tensor in source.storage.tensors
            },
        )
        self.arrays = {}
        for tensor in source.storage.tensors:
            if tensor.is_scales:
                continue
            weight = source.read(tensor, whole(tensor))
            if not tensor.groups:
                self.arrays[tensor.key] = weight
                continue
            scales = source.storage.scales(tensor.spec)
            rows = source.read(scales, whole(scales)).astype(np.float32)
            values = weight * np.repeat(rows, weight.shape[-2] // rows.shape[-2], axis=-2)
            self.arrays.update(stored(tensor.spec.name, values, precision))

    def read(self, tensor: LogicalTensor, slices: Slices):
        return np.ascontiguousarray(self.arrays[tensor.key][index_of(slices)])

    @property
    def values(self) -> "Stored":
        """The same values in float32."""
        plain = object.__new__(Stored)
        plain.config = self.config
        groups = dict.fromkeys(self.storage.groups, 0)
        plain.storage = replace(self.storage, precision=Precision.FLOAT32, groups=groups)
        plain.arrays = {
            key: values_of(array, self.arrays.get(key.replace(".weight", ".scales")))
            for key, array in self.arrays.items()
            if key.endswith(".weight")
        }
        return plain


def whole(tensor: LogicalTensor) -> Slices:
    return tuple((0, length) for length in tensor.shape)


def stored(name, values, precision):
    match precision:
        case Precision.FLOAT32:
            return {f"{name}.weight": values}
        case Precision.BFLOAT16:
            return {f"{name}.weight": values.astype(BFLOAT16)}
        case Precision.INT4:
            grouped = values.reshape(*values.shape[:-2], -1, GROUP, values.shape[-1])
            scales = (np.abs(grouped).max(axis=-2) / 7 + 1e-9).astype(BFLOAT16)
            codes = grouped / scales.astype(np.float32)[..., None, :]
            codes = np.rint(codes).clip(-7, 7).reshape(values.shape).astype(np.int8) + 8
            low, high = (codes[..., part::2, :].astype(np.uint8) for part in (0, 1))
            return {f"{name}.weight": low | high << 4, f"{name}.scales": scales}


def values_of(array, scales):
    if scales is None:
        return array.astype(np.float32)
    codes = np.stack([array & 15, array >> 4], axis=-2).astype(np.float32) - 8
    codes = codes.reshape(*array.shape[:-2], -1, array.shape[-1])
    return codes * np.repeat(scales.astype(np.float32), GROUP, axis=-2)


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, SMALL, tokenizer=False)
    return open_release(root)


@pytest.fixture(scope="module")
def source(release):
    return cache(lambda precision: Stored(release, precision))


TOKENS = np.random.default_rng(3).integers(3, 256, 21).tolist()


@pytest.fixture(scope="module")
def expected(source):
    """Logits and greedy text of the same values on one device."""

    @cache
    def run(precision):
        engine = start(source(precision).values, "model=1")
        return score_logits(engine, TOKENS), greedy(engine)

    return run


def greedy(engine):
    generation = engine.generate(
        TOKENS, sampling=Sampling(temperature=0), max_tokens=8, ignore_eos=True
    )
    return [token.id for token in generation]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("precision", [Precision.BFLOAT16, Precision.FLOAT32, Precision.INT4])
def test_a_precision_gives_the_logits_of_its_values_on_every_mesh(
    source, expected, precision, mesh
):
    engine = start(source(precision), mesh)

    logits, text = expected(precision)

    assert np.abs(score_logits(engine, TOKENS) - logits).max() < FLOAT32_BOUND
    assert greedy(engine) == text


def test_the_precisions_are_not_the_same(expected):
    logits = [expected(precision)[0] for precision in (Precision.FLOAT32, Precision.BFLOAT16)]

    assert np.abs(logits[0] - logits[1]).max() > 10 * FLOAT32_BOUND


@pytest.mark.optimized
@pytest.mark.parametrize("mesh", ["model=1", "model=8"])
def test_float32_weights_match_the_reference(mesh):
    golden = load_golden("two-layers")

    engine = start(Stored(golden.release, Precision.FLOAT32), mesh)

    error = np.abs(score_logits(engine, golden.tokens) - golden.float32).max()
    assert error < FLOAT32_BOUND
    assert engine.runner._parameters.layers[0].experts.up.weight.dtype == np.float32
