"""Published figures: found by what people type, matched by what drivers say, and possible."""

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.errors import UsageError
from grokctl.planning.accelerators import PUBLISHED, find, match

KINDS = [pytest.param(kind, id=kind.slug) for kind in PUBLISHED]


# --- what people type


@pytest.mark.parametrize("kind", KINDS)
def test_a_slug_is_found_however_it_is_written(kind):
    assert find(kind.slug) is kind
    assert find(kind.slug.upper()) is kind
    assert find(f" {kind.label.replace(' ', '_')} ") is kind


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("h100", "h100-80gb"),
        ("H200", "h200-141gb"),
        ("b2", "b200-180gb"),
        ("mi300x", "mi300x-192gb"),
        ("4090", "rtx-4090-24gb"),
        ("RTX 5090", "rtx-5090-32gb"),
        ("rtx4090", "rtx-4090-24gb"),
        ("RTX5090", "rtx-5090-32gb"),
        ("tpuv6e", "tpu-v6e-32gb"),
        ("a100 80GB", "a100-80gb"),
        ("v6e", "tpu-v6e-32gb"),
        ("tpu-v5p", "tpu-v5p-95gb"),
    ],
)
def test_the_beginning_of_a_word_is_enough(name, slug):
    assert find(name).slug == slug


@pytest.mark.parametrize(
    ("name", "slugs"),
    [
        ("a100", {"a100-40gb", "a100-80gb"}),
        ("rtx", {"rtx-4090-24gb", "rtx-5090-32gb"}),
        ("v5", {"tpu-v5e-16gb", "tpu-v5p-95gb"}),
        ("80gb", {"a100-80gb", "h100-80gb"}),
    ],
)
def test_what_may_be_several_names_those(name, slugs):
    with pytest.raises(UsageError) as caught:
        find(name)

    assert {kind.slug for kind in PUBLISHED if kind.slug in str(caught.value)} == slugs
    assert caught.value.hint.removeprefix("--accelerator ") in slugs


@pytest.mark.parametrize("name", ["", "-", "gb", "h1000", "00", "rocket", "h100-80gb-x", "[bold]"])
def test_what_is_none_names_all(name):
    with pytest.raises(UsageError) as caught:
        find(name)

    assert all(kind.slug in str(caught.value) for kind in PUBLISHED)
    assert caught.value.hint == "--accelerator h100-80gb"


@given(st.text(max_size=200))
def test_whatever_is_typed_is_found_or_refused(name):
    found = None
    with suppress(UsageError):
        found = find(name)

    assert found is None or found in PUBLISHED


# --- what drivers and JAX say


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("nvidia h100  80gb hbm3 ", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090-32gb"),
        ("AMD Instinct MI300X", "mi300x-192gb"),
        ("TPU v5 lite", "tpu-v5e-16gb"),
        ("TPU v5", "tpu-v5p-95gb"),
        ("TPU v6 lite", "tpu-v6e-32gb"),
    ],
)
def test_a_drivers_name_is_the_accelerator(name, slug):
    assert match(name).slug == slug


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("NVIDIA H100 PCIe", id="less bandwidth"),
        pytest.param("NVIDIA H100 NVL", id="another memory"),
        pytest.param("NVIDIA A100 80GB PCIe", id="a little less bandwidth"),
        pytest.param("NVIDIA H100 80GB HBM3 MIG 1g.10gb", id="a seventh of it"),
        pytest.param("NVIDIA GeForce RTX 4090 D", id="fewer cores"),
        pytest.param("NVIDIA GeForce RTX 4090 Laptop GPU", id="another chip"),
        pytest.param("NVIDIA H20", id="a beginning"),
        pytest.param("NVIDIA L40", id="the older one"),
        pytest.param("AMD Instinct MI325X", id="the newer one"),
        pytest.param("TPU v4", id="an older one"),
        pytest.param("cpu", id="none"),
        pytest.param("", id="nothing"),
    ],
)
def test_what_only_looks_alike_is_not_matched(name):
    assert match(name) is None


# --- the figures


def test_names_and_slugs_are_of_one_accelerator_each():
    slugs = [kind.slug for kind in PUBLISHED]
    names = [name.casefold() for kind in PUBLISHED for name in kind.names]

    assert len(set(slugs)) == len(slugs)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slug_and_a_label_say_the_memory(kind):
    size = re.fullmatch(r"[a-z0-9-]+-([0-9]+)gb", kind.slug)

    assert kind.memory == int(size[1]) * 10**9
    assert kind.label.endswith(f" {size[1]}GB")


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_of_the_size_that_such_things_have(kind):
    assert 5e11 < kind.bandwidth < 1e13
    assert 1e14 < kind.flops < 1e16
    assert 1e-3 < kind.memory / kind.bandwidth < 0.1  # seconds to read all of it
    assert 50 < kind.flops / kind.bandwidth < 1000  # operations a byte
    assert kind.platform in {"gpu", "tpu"}
    assert (kind.compute_capability is None) == ("NVIDIA" not in kind.source)
    assert re.search(r"\b20[12][0-9]\b", kind.source)
    assert "//" not in kind.source
