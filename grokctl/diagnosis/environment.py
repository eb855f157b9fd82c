"""Checks of what started this process, what it was told, and what a download goes through."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis.software import plugins
from grokctl.machine.facts import Machine
from grokctl.model.sizing import SHARE_VARIABLES
from grokctl.paths import quoted
from grokctl.text import format_bytes

_JOINED: Final = frozenset({"Slurm", "Open MPI"})
"""Launchers that tell processes of each other."""
_PROMPT: Final = "grokctl run -p 'Once upon a time'"
_SPOKEN: Final = frozenset({"http", "socks5", "socks5h"})
"""Kinds of proxy that peers can be reached through."""
_MOST_TEXT: Final = 60
"""Characters of a variable that are shown."""


def job(machine: Machine) -> Iterator[Check]:
    """Whether grokctl was started as one process a host: several of a host want the same GPUs."""
    here = machine.surroundings
    if not here.cluster:
        yield Check("job", Status.OK, "started by hand, in one process")
        return
    if max(here.processes, here.local_processes) <= 1:
        yield Check("job", Status.OK, f"{here.cluster}, one process")
        return
    started = f"{here.cluster} starts {here.processes} processes"
    if here.cluster in _JOINED and here.local_processes <= 1:
        detail = f"{started}, one a host: run, score and bench are one run over all of them"
        yield Check("job", Status.OK, detail)
        return
    gpus = max(len(machine.nvml.gpus), len(machine.jax.accelerators))
    if here.cluster in _JOINED:
        started += f", {here.local_processes} of them here"
        detail = f"{started}: they would want the same GPUs, and one a host uses all of them"
    else:
        detail = f"{started}: each would load the whole model, unless it is told of the others"
    yield Check("job", Status.WARN, detail, _one_a_host(here.cluster, gpus))


def _one_a_host(cluster: str, gpus: int) -> str:
    """How to start one process on every host, with everything that is there."""
    match cluster:
        case "Slurm":
            devices = f" --gpus-per-node={gpus}" if gpus else ""
            return f"srun --ntasks-per-node=1{devices} --kill-on-bad-exit=1 {_PROMPT}"
        case "Open MPI":
            return f"mpirun --map-by ppr:1:node --bind-to none {_PROMPT}"
        case _:
            return ""


def variables(machine: Machine) -> Iterator[Check]:
    """What the environment says that changes what happens."""
    known = machine.surroundings.variables
    others = []
    for name in sorted(known):
        judge = next((judge for start, judge in _JUDGES.items() if name.startswith(start)), None)
        if judge is None:
            others.append(name)
        else:
            yield judge(name, known[name], machine)
    if others:
        yield Check("environment", Status.OK, f"also has {_short(', '.join(others))}")
    elif not known:
        yield Check("environment", Status.OK, "changes nothing")


def _told(name: str, value: str, _machine: Machine, *, meaning: str = "") -> Check:
    return Check(name, Status.OK, f"{_short(value)}{f': {meaning}' if meaning else ''}")


def _platforms(name: str, value: str, machine: Machine) -> Check:
    has_others = bool(machine.nvml.gpus) and not machine.jax.accelerators
    if has_others and value and not {"cuda", "gpu"} & set(value.split(",")):
        detail = f"{_short(value)}: JAX looks for no GPU, {len(machine.nvml.gpus)} are here"
        return Check(name, Status.WARN, detail, f"unset {name}")
    return _told(name, value, machine, meaning="where JAX runs")


def _compiler(name: str, value: str, _machine: Machine) -> Check:
    if not value.strip():
        return Check(name, Status.OK, "is empty")
    detail = f"{_short(value)}: changes what is compiled, or how fast it is"
    return Check(name, Status.WARN, detail, f"unset {name}")


def _share(name: str, value: str, machine: Machine) -> Check:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        detail = f"expected a share from 0 to 1, found {_short(value)}"
        return Check(name, Status.WARN, detail, f"unset {name}")
    sizes = [gpu.memory for gpu in machine.accelerators if gpu.memory]
    each = f", {format_bytes(share * min(sizes))} of each" if sizes else ""
    return Check(name, Status.OK, f"JAX takes {share:.0%} of the memory of GPUs{each}")


def _preallocation(name: str, value: str, machine: Machine) -> Check:
    is_off = value.strip().lower() in {"false", "0"}
    meaning = "memory is taken as it is needed, in pieces" if is_off else "memory is taken at once"
    return _told(name, value, machine, meaning=meaning)


def _collectives(name: str, value: str, _machine: Machine) -> Check:
    """NCCL's own settings: those that switch something off cost speed."""
    if name.endswith("_DISABLE") and value.strip() not in {"", "0"}:
        detail = f"{_short(value)}: GPUs talk over a slower way"
        return Check(name, Status.WARN, detail, f"unset {name}")
    return Check(name, Status.OK, _short(value))


def _visible(name: str, value: str, machine: Machine) -> Check:
    return _told(name, value, machine, meaning="the only GPUs that JAX may use")


def _libraries(name: str, value: str, machine: Machine) -> Check:
    """CUDA's libraries come with JAX, and others that are found before them break it."""
    if value and plugins(machine) and not machine.accelerators:
        detail = f"{_short(value)}: libraries in there come before those that JAX brings"
        return Check(name, Status.WARN, detail, f"env -u {name} {_PROMPT}")
    return _told(name, value, machine)


def _virtual(name: str, value: str, machine: Machine) -> Check:
    return _told(name, value, machine, meaning="virtual devices where JAX runs on the CPU")


_JUDGES: Final[Mapping[str, Callable[[str, str, Machine], Check]]] = {
    "JAX_PLATFORM": _platforms,
    "XLA_FLAGS": _compiler,
    "LIBTPU_INIT_ARGS": _compiler,
    **dict.fromkeys(SHARE_VARIABLES, _share),
    "XLA_PYTHON_CLIENT_PREALLOCATE": _preallocation,
    "NCCL_": _collectives,
    "CUDA_VISIBLE_DEVICES": _visible,
    "JAX_NUM_CPU_DEVICES": _virtual,
    "LD_LIBRARY_PATH": _libraries,
}
"""By how the name begins."""


def _short(value: str) -> str:
    text = value if len(value) <= _MOST_TEXT else f"{value[: _MOST_TEXT - 1]}…"
    return text or "empty"


def proxy(machine: Machine) -> Iterator[Check]:
    """What the environment's proxy means for a download: peers do not go through it by itself."""
    told = machine.network.proxy
    if not told:
        yield Check("proxy", Status.OK, "none: everything goes out directly")
        return
    detail = f"{told}: mirrors and the tokenizer go through it, peers only if told"
    url = told if "://" in told else f"http://{told}"
    is_spoken = url.partition("://")[0].lower() in _SPOKEN
    fix = f"grokctl fetch --proxy {quoted(url)}" if is_spoken else "grokctl fetch --mirror hf"
    yield Check("proxy", Status.WARN, detail, fix)


def certificates(machine: Machine) -> Iterator[Check]:
    """Whether HTTPS trackers and mirrors can be trusted."""
    network = machine.network
    if network.has_certificates:
        yield Check("certificates", Status.OK, f"authorities are listed in {network.certificates}")
        return
    detail = f"{network.certificates or 'no bundle of authorities'}: no such file"
    yield Check("certificates", Status.WARN, detail, "unset SSL_CERT_FILE SSL_CERT_DIR")


def port(machine: Machine) -> Iterator[Check]:
    """Whether peers can call."""
    network = machine.network
    if network.port is not None:
        detail = f"{network.port} can be listened on, TCP and UDP"
        yield Check("torrent port", Status.OK, detail)
        return
    why = f": {network.error}" if network.error else ""
    detail = f"none could be bound{why}"
    yield Check("torrent port", Status.WARN, detail, "grokctl fetch --port 0")


SURROUNDINGS: Final = (job, variables)
NETWORK: Final = (proxy, certificates, port)
