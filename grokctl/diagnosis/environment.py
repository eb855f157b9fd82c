"""Checks of the launcher, of environment variables, and of the network of a download."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from grokctl.checks import Check, Status
from grokctl.diagnosis.software import plugins
from grokctl.machine.facts import Machine
from grokctl.machine.jax_variables import OWN
from grokctl.model.memory_share import SHARE_VARIABLES
from grokctl.paths import quoted
from grokctl.text import format_bytes

_JOINED: Final = frozenset({"Slurm", "Open MPI"})
"""Launchers that tell processes about each other."""
_PROMPT: Final = "grokctl run -p 'Once upon a time'"
_SUPPORTED: Final = frozenset({"http", "socks5", "socks5h"})
"""Types of proxy that BitTorrent supports."""
_COMPILERS: Final = (
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_MEMORY_FITTING_",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT",
    "JAX_COMPILER_ENABLE_REMAT_PASS",
    "JAX_ALLOW_F16_REDUCTIONS",
    "JAX_ENABLE_PGLE",
)
"""Flags of JAX that reach the compiler."""
_MOST_TEXT: Final = 60
"""Characters of a variable to show."""


def job(machine: Machine) -> Iterator[Check]:
    """Whether there is one process per host: several would compete for the same GPUs."""
    launch = machine.surroundings
    if not launch.cluster:
        yield Check("job", Status.OK, "one process, without a launcher")
        return
    if max(launch.processes, launch.local_processes) <= 1:
        yield Check("job", Status.OK, f"{launch.cluster}, one process")
        return
    started = f"{launch.cluster} starts {launch.processes} processes"
    if launch.cluster in _JOINED and launch.local_processes <= 1:
        detail = f"{started}, one per host: run, score and bench use all of them together"
        yield Check("job", Status.OK, detail)
        return
    gpus = max(len(machine.nvml.gpus), len(machine.jax.accelerators))
    if launch.cluster in _JOINED:
        started += f", {launch.local_processes} of them here"
        detail = f"{started}: they compete for the same GPUs, and one per host uses all of them"
    else:
        detail = f"{started}: each would load the whole model, unless --coordinator joins them"
    yield Check("job", Status.WARN, detail, _one_a_host(launch.cluster, gpus))


def _one_a_host(cluster: str, gpus: int) -> str:
    """The command that starts one process on every host, with all GPUs."""
    match cluster:
        case "Slurm":
            devices = f" --gpus-per-node={gpus}" if gpus else ""
            return f"srun --ntasks-per-node=1{devices} --kill-on-bad-exit=1 {_PROMPT}"
        case "Open MPI":
            return f"mpirun --map-by ppr:1:node --bind-to none {_PROMPT}"
        case _:
            return ""


def variables(machine: Machine) -> Iterator[Check]:
    """Environment variables that change the behaviour of grokctl."""
    known = machine.surroundings.variables
    others = []
    for name in sorted(known):
        judge = next((judge for start, judge in _JUDGES.items() if name.startswith(start)), None)
        if judge is None:
            others.append(name)
        else:
            yield judge(name, known[name], machine)
    if others:
        yield Check("environment", Status.OK, f"also set: {_short(', '.join(others))}")
    elif not known:
        yield Check("environment", Status.OK, "nothing relevant is set")


def _shown(name: str, value: str, _machine: Machine, *, meaning: str = "") -> Check:
    return Check(name, Status.OK, f"{_short(value)}{f': {meaning}' if meaning else ''}")


def _platforms(name: str, value: str, machine: Machine) -> Check:
    has_others = bool(machine.nvml.gpus) and not machine.jax.accelerators
    if has_others and value and not {"cuda", "gpu"} & set(value.split(",")):
        detail = f"{_short(value)}: JAX ignores {len(machine.nvml.gpus)} GPUs"
        return Check(name, Status.WARN, detail, f"unset {name}")
    return _shown(name, value, machine, meaning="the platforms of JAX")


def _set_aside(name: str, value: str, _machine: Machine) -> Check:
    detail = f"{_short(value)}: changes {OWN[name]} of JAX; run, score and bench set it aside"
    return Check(name, Status.OK, detail)


def _compiler(name: str, value: str, _machine: Machine) -> Check:
    if not value.strip():
        return Check(name, Status.OK, "is empty")
    detail = f"{_short(value)}: changes compilation or speed"
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
    return Check(name, Status.OK, f"JAX uses {share:.0%} of the memory of GPUs{each}")


def _preallocation(name: str, value: str, machine: Machine) -> Check:
    is_off = value.strip().lower() in {"false", "0"}
    meaning = "memory is allocated as needed" if is_off else "memory is allocated at start"
    return _shown(name, value, machine, meaning=meaning)


def _collectives(name: str, value: str, _machine: Machine) -> Check:
    """Settings of NCCL: disabling a feature costs speed."""
    if name.endswith("_DISABLE") and value.strip() not in {"", "0"}:
        detail = f"{_short(value)}: GPUs communicate over a slower path"
        return Check(name, Status.WARN, detail, f"unset {name}")
    return Check(name, Status.OK, _short(value))


def _visible(name: str, value: str, machine: Machine) -> Check:
    return _shown(name, value, machine, meaning="the only GPUs that JAX may use")


def _libraries(name: str, value: str, machine: Machine) -> Check:
    """JAX comes with CUDA's libraries; other versions that are found first break it."""
    if value and plugins(machine) and not machine.accelerators:
        detail = f"{_short(value)}: libraries there take precedence over those of JAX"
        return Check(name, Status.WARN, detail, f"env -u {name} {_PROMPT}")
    return _shown(name, value, machine)


def _virtual(name: str, value: str, machine: Machine) -> Check:
    return _shown(name, value, machine, meaning="virtual devices when JAX runs on the CPU")


def _hub(name: str, value: str, machine: Machine) -> Check:
    return _shown(name, value, machine, meaning="where --mirror hf fetches from")


_JUDGES: Final[Mapping[str, Callable[[str, str, Machine], Check]]] = {
    **dict.fromkeys(OWN, _set_aside),
    **dict.fromkeys(_COMPILERS, _compiler),
    "JAX_PLATFORM": _platforms,
    "XLA_FLAGS": _compiler,
    "LIBTPU_INIT_ARGS": _compiler,
    **dict.fromkeys(SHARE_VARIABLES, _share),
    "XLA_PYTHON_CLIENT_PREALLOCATE": _preallocation,
    "NCCL_": _collectives,
    "CUDA_VISIBLE_DEVICES": _visible,
    "JAX_NUM_CPU_DEVICES": _virtual,
    "TF_XLA_FLAGS": _compiler,
    "NVIDIA_TF32_OVERRIDE": _compiler,
    "CUDA_LAUNCH_BLOCKING": _compiler,
    "RCCL_": _collectives,
    "JAX_": _shown,
    "XLA_": _shown,
    "LD_LIBRARY_PATH": _libraries,
    "HF_ENDPOINT": _hub,
}
"""Beginning of a variable's name -> its check."""


def _short(value: str) -> str:
    text = value if len(value) <= _MOST_TEXT else f"{value[: _MOST_TEXT - 1]}…"
    return text or "empty"


def proxy(machine: Machine) -> Iterator[Check]:
    """The proxy of the environment: peers only use it if told to."""
    address = machine.network.proxy
    if not address:
        yield Check("proxy", Status.OK, "none: direct connections")
        return
    detail = f"{address}: used for mirrors and the tokenizer, for peers only with --proxy"
    url = address if "://" in address else f"http://{address}"
    is_supported = url.partition("://")[0].lower() in _SUPPORTED
    fix = f"grokctl fetch --proxy {quoted(url)}" if is_supported else "grokctl fetch --mirror hf"
    yield Check("proxy", Status.WARN, detail, fix)


def certificates(machine: Machine) -> Iterator[Check]:
    """Whether HTTPS trackers and mirrors can be verified."""
    network = machine.network
    if network.has_certificates:
        yield Check("certificates", Status.OK, f"authorities in {network.certificates}")
        return
    detail = f"{network.certificates or 'no bundle of authorities'}: no such file"
    yield Check("certificates", Status.WARN, detail, "unset SSL_CERT_FILE SSL_CERT_DIR")


def port(machine: Machine) -> Iterator[Check]:
    """Whether peers can connect."""
    network = machine.network
    if network.port is not None:
        detail = f"can listen on {network.port}, TCP and UDP"
        yield Check("torrent port", Status.OK, detail)
        return
    reason = f": {network.error}" if network.error else ""
    detail = f"cannot listen on any{reason}"
    yield Check("torrent port", Status.WARN, detail, "grokctl fetch --port 0")


SURROUNDINGS: Final = (job, variables)
NETWORK: Final = (proxy, certificates, port)
