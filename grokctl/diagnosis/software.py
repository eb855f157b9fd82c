"""Checks of software: matching versions, and limits of the system."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis.inventory import ready_nbytes
from grokctl.machine.facts import Found, Machine
from grokctl.machine.limits import ENOUGH_THREADS
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.model.tensors import tensor_specs
from grokctl.text import format_bytes

INSTALL: Final = "pip install '.[cuda12]'"
_PYTHONS: Final = ((3, 11), (3, 13))
"""The oldest and the newest supported version."""
_ENOUGH_FILES: Final = 1024
_WANTED_FILES: Final = 4096
_ENOUGH_LOCKED: Final = 2**30
_UNLIMITED: Final = "ulimit {} unlimited  # unless an administrator set the limit"


def numbers(version: str) -> tuple[int, ...]:
    """`0.10.2.dev1` as `(0, 10, 2)`; empty if it does not begin with a number."""
    match = re.match(r"[0-9]{1,9}(?:\.[0-9]{1,9})*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def packages(machine: Machine) -> Mapping[str, str]:
    """Versions by normalized distribution name."""
    known = machine.software.packages
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in known.items()}


def plugins(machine: Machine) -> dict[str, str]:
    """JAX's plugins for CUDA."""
    return {name: known for name, known in packages(machine).items() if name.startswith("jax-cuda")}


def python(machine: Machine) -> Iterator[Check]:
    """Whether this Python is supported."""
    software = machine.software
    oldest, newest = (".".join(map(str, version)) for version in _PYTHONS)
    version = numbers(software.python)[:2]
    on = f" on {software.system}" if software.system else ""
    if not version:
        yield Check("Python", Status.SKIP, f"unknown version{on}")
    elif _PYTHONS[0] <= version <= _PYTHONS[1]:
        yield Check("Python", Status.OK, f"{software.python}{on}, grokctl {software.grokctl}")
    else:
        detail = f"expected {oldest} to {newest}, found {software.python}"
        fix = "python3.13 -m venv ~/grokctl && ~/grokctl/bin/pip install ."
        yield Check("Python", Status.FAIL, detail, fix)


def versions(machine: Machine) -> Iterator[Check]:
    """Whether JAX, jaxlib and the plugins match: JAX refuses other versions."""
    known = packages(machine)
    jax, jaxlib = known.get("jax", ""), known.get("jaxlib", "")
    if not jax or not jaxlib:
        missing = " and ".join(name for name in ("jax", "jaxlib") if not known.get(name))
        yield Check("JAX's parts", Status.FAIL, f"{missing} not installed", "pip install .")
        return
    extra = next((f"[{name.split('-')[1]}]" for name in plugins(machine)), "")
    fix = f"pip install --upgrade 'jax{extra}=={jax}'"
    if numbers(jaxlib)[:2] != numbers(jax)[:2] or numbers(jaxlib) > numbers(jax):
        detail = f"jaxlib {jaxlib} does not match jax {jax}"
        yield Check("JAX's parts", Status.FAIL, detail, fix)
        return
    for name, version in sorted(plugins(machine).items()):
        if numbers(version) != numbers(jaxlib):
            detail = f"{name}: expected {jaxlib} like jaxlib, found {version}: JAX ignores it"
            yield Check("JAX's parts", Status.FAIL, detail, fix)
            return
    kinds = sorted({name.split("-")[1] for name in plugins(machine)})
    if len(kinds) > 1:
        detail = f"plugins for {' and '.join(kinds)}: JAX can start only one of them"
        fix = f"pip uninstall -y jax-{kinds[-1]}-plugin jax-{kinds[-1]}-pjrt"
        yield Check("JAX's parts", Status.WARN, detail, fix)
        return
    beside = f", plugin for {kinds[0]}" if kinds else ""
    yield Check("JAX's parts", Status.OK, f"jax {jax}, jaxlib {jaxlib}{beside}")


def libtorrent(machine: Machine) -> Iterator[Check]:
    """Whether libtorrent is installed."""
    version = packages(machine).get("libtorrent")
    if version:
        yield Check("libtorrent", Status.OK, version)
    else:
        yield Check("libtorrent", Status.FAIL, "is not installed", "pip install .")


def open_files(machine: Machine) -> Iterator[Check]:
    """Whether all files of the release can be open at once."""
    soft, hard = machine.open_files, machine.open_files_most
    count = len(tensor_specs(GROK_1))
    if soft >= _ENOUGH_FILES:
        yield Check("open files", Status.OK, f"up to {soft:,}, the release has {count}")
        return
    detail = f"up to {soft:,}, expected {_ENOUGH_FILES:,}: the release has {count}"
    can_raise = hard > soft
    wanted = min(_WANTED_FILES, hard) if can_raise else _WANTED_FILES
    raised = f"ulimit -n {wanted}" if can_raise else f"sudo prlimit --pid $$ --nofile={wanted}"
    yield Check("open files", Status.WARN, detail, raised)


def memory_limits(machine: Machine) -> Iterator[Check]:
    """Whether weights can be mapped, and JAX can start: login nodes often set a limit."""
    status = Status.FAIL if machine.jax.found is Found.FAILED else Status.WARN
    why = "JAX does not start" if status is Status.FAIL else "a run on the CPU maps all weights"
    if (space := machine.address_space) is not None:
        weights = format_bytes(ready_nbytes(Precision.INT8, MeshShape(1, 1)))
        more = "" if status is Status.FAIL else f", {weights} at int8"
        detail = f"limited to {format_bytes(space)}: {why}{more}"
        yield Check("address space", status, detail, _UNLIMITED.format("-v"))
    if (data := machine.data_segment) is not None:
        why = why if status is Status.FAIL else "JAX and the KV cache need more"
        detail = f"limited to {format_bytes(data)}: {why}"
        yield Check("data segment", status, detail, _UNLIMITED.format("-d"))


def threads(machine: Machine) -> Iterator[Check]:
    """Whether a run can start its threads: without one, libraries abort."""
    if machine.threads is None:
        return
    limits = f" ({', '.join(machine.thread_limits)})" if machine.thread_limits else ""
    if machine.threads >= ENOUGH_THREADS:
        yield Check("threads", Status.OK, f"{ENOUGH_THREADS} can be started{limits}")
        return
    detail = f"{machine.threads} can be started, a run needs {ENOUGH_THREADS}{limits}"
    yield Check("threads", Status.FAIL, detail, "ulimit -u unlimited")


def locked_memory(machine: Machine) -> Iterator[Check]:
    """Whether fast networks between hosts can register memory."""
    limit = machine.locked_memory
    if limit is None:
        return
    detail = f"at most {format_bytes(limit)}"
    if machine.surroundings.processes > 1 and machine.accelerators and limit < _ENOUGH_LOCKED:
        detail += ": InfiniBand and RDMA between hosts need more"
        yield Check("locked memory", Status.WARN, detail, "ulimit -l unlimited")
    else:
        yield Check("locked memory", Status.OK, f"{detail}; grokctl locks none")


CHECKS: Final = (python, versions, libtorrent, open_files, threads, locked_memory, memory_limits)
