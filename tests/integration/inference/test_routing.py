import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuts import cut
from golden import load_golden, start
from training.network import _attention, _mixture
from training.releases import parameters_of

from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import UsageError
from grokctl.inference.routing import Routing, count_experts, keep, kept_at, read_kept
from grokctl.model.experts import route
from grokctl.model.forward import rms_norm
from grokctl.model.placement import MeshShape

FLOAT32 = jnp.dtype(jnp.float32)
ROUTING = Routing(tokens=3, counts=((1, 2, 3), (4, 1, 1)))


@pytest.fixture(scope="module")
def golden():
    return load_golden("two-layers")


@pytest.fixture(scope="module")
def expected(golden):
    """The choices of a whole text, by the form of the model that is trained."""
    config, eps = golden.release.config, golden.release.config.rms_norm_eps
    parameters, form = parameters_of(golden.release), {"config": config, "operand": FLOAT32}

    @jax.jit
    def choices(tokens):
        hidden = parameters.embedding[tokens][None] * config.embedding_multiplier_scale
        found = []
        for layer in parameters.layers:
            normed = rms_norm(hidden, layer.norms.pre_attention, eps=eps)
            mixed = _attention(layer.attention, normed, **form)
            hidden = hidden + rms_norm(mixed, layer.norms.post_attention, eps=eps)
            normed = rms_norm(hidden, layer.norms.pre_moe, eps=eps)
            found.append(route(layer.router, normed[0], config=config)[1])
            mixed, _ = _mixture(layer, normed, **form)
            hidden = hidden + rms_norm(mixed, layer.norms.post_moe, eps=eps)
        return jnp.stack(found)

    found = np.asarray(choices(jnp.asarray(golden.tokens)))
    return tuple(tuple(np.bincount(row.ravel(), minlength=8).tolist()) for row in found)


@pytest.mark.parametrize("mesh", ["model=1", "expert=2,model=4"])
def test_the_experts_of_a_text_are_counted_on_every_mesh(golden, expected, mesh):
    engine = start(ReleaseSource(golden.release), mesh)

    found = count_experts(engine, golden.tokens)

    assert found == Routing(tokens=len(golden.tokens), counts=expected)


def test_a_text_longer_than_the_context_is_counted_in_parts(golden):
    engine = start(ReleaseSource(golden.release), "model=1")
    long = (golden.tokens * 4)[: engine.context + 20]

    found = count_experts(engine, long)
    parts = [long[: engine.context], long[engine.context :]]

    assert found == count_experts(engine, parts[0]) + count_experts(engine, parts[1])
    assert all(sum(row) == 2 * len(long) for row in found.counts)


def test_a_text_of_one_token_is_refused(golden):
    with pytest.raises(UsageError, match="1 tokens, expected at least 2"):
        count_experts(start(ReleaseSource(golden.release), "model=1"), [5])


# --- what is kept


def test_counts_are_added_to_those_that_are_kept(tmp_path):
    path = tmp_path / "routing" / "a.json"

    first, second = keep(path, ROUTING), keep(path, ROUTING)

    assert first == ROUTING
    assert second == Routing(tokens=6, counts=((2, 4, 6), (8, 2, 2))) == read_kept(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{}", id="no counts"),
        pytest.param(b'{"version": 2, "tokens": 1, "counts": [[1]]}', id="a later version"),
        pytest.param(b'{"version": 1, "tokens": 1, "counts": [[1], [1, 2]]}', id="ragged"),
        pytest.param(b'{"version": 1, "tokens": 1, "counts": [["1"]]}', id="texts"),
        pytest.param(b'{"version": 1, "tokens": 1, "counts": [[1, 2]]}', id="another model"),
    ],
)
def test_what_is_kept_of_something_else_is_replaced(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)

    assert keep(path, ROUTING) == ROUTING
    assert json.loads(path.read_text())["tokens"] == 3


def test_a_place_that_refuses_is_an_expected_error(tmp_path):
    (tmp_path / "routing").write_text("a file")

    with pytest.raises(UsageError):
        keep(tmp_path / "routing" / "a.json", ROUTING)


def test_each_checkpoint_has_a_place_of_its_own(golden, tmp_path):
    cut(golden.release, MeshShape(1, 1), tmp_path / "ready")
    ready = open_ready(tmp_path / "ready")
    manifest = hashlib.sha256((tmp_path / "ready" / "grokctl.json").read_bytes()).hexdigest()

    release = kept_at(tmp_path, ReleaseSource(golden.release))

    assert kept_at(tmp_path, ready) == tmp_path / f"{manifest}.json"
    assert release.parent == tmp_path
    assert release.stem not in {manifest, ""}
