"""An engine on a CPU has the native kernel, or says why not."""

from types import SimpleNamespace

import pytest

from grokctl.events import ignore
from grokctl.inference.native_kernel import native_kernel
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import MeshShape
from grokctl.native.binary import SWITCH, NoKernelError
from grokctl.native.library import load
from grokctl.system import usable_cores

CPU = SimpleNamespace(platform="cpu")


def of(device=CPU, **options):
    return native_kernel(device, EngineOptions(mesh=MeshShape(1, 1), **options), observe=ignore)


def test_an_accelerator_needs_none():
    found = of(SimpleNamespace(platform="gpu"))

    assert (found.library, found.words) == (None, "")
    assert found.measured() is None


def test_the_reason_of_its_absence_is_kept(monkeypatch):
    monkeypatch.setenv(SWITCH, "off")

    found = of()

    assert (found.library, found.words) == (None, f"XLA: {SWITCH}=off")


def test_it_has_as_many_threads_as_asked_for():
    try:
        library = load()
    except NoKernelError as error:
        pytest.skip(str(error))

    assert of(threads=1).words == f"native, {library.instruction_set}, 1 thread"
    assert library.threads == 1
    assert of().measured() > 1e8
    assert library.threads == usable_cores()
