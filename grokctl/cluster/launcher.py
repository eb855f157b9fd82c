"""This process's place in a run: from Open MPI, from Slurm, or from options."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from grokctl.errors import UsageError, invalid

BOUND_S: Final = 60
"""Seconds after which every process of a run has ended if one is lost or never comes."""
_PORTS: Final = range(61440, 65536)
"""Ports of rank 0 without an option: the number of the job chooses, as in JAX itself."""
_BY_HAND: Final = "--coordinator HOST:PORT --num-processes 2 --process-id 0"
_ADDRESS_VARIABLE: Final = "JAX_COORDINATOR_ADDRESS"
_PORT_VARIABLE: Final = "JAX_COORDINATOR_PORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process of several."""

    host: str
    """Name or address at which the others reach rank 0."""
    port: int
    """Port of rank 0."""
    count: int
    """Processes of the run, at least 2."""
    rank: int
    is_by_hand: bool = False
    """Whether a person started this process, and no launcher started all of them."""

    @property
    def address(self) -> str:
        """Host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def find_launch(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """The launch from options, or else from the environment; None for a single process.

    Args:
        environment: Of this process.
        coordinator: Host and port of rank 0.
        num_processes: Number of processes.
        process_id: This process's rank.

    Raises:
        UsageError: Options contradict each other, or the address of rank 0 is unknown.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        return _of_open_mpi(environment) or _of_slurm(environment)
    if coordinator is None or num_processes is None or process_id is None:
        raise UsageError(
            "--coordinator, --num-processes and --process-id: one means nothing without the others",
            _BY_HAND,
        )
    if not 0 <= process_id < num_processes:
        expected = f"expected 0 to {num_processes - 1}"
        raise invalid("process_id", process_id, expected, _BY_HAND)
    host, port = _address(coordinator, "coordinator")
    if num_processes == 1:
        return None
    return Launch(host=host, port=port, count=num_processes, rank=process_id, is_by_hand=True)


def _address(text: str, name: str) -> tuple[str, int]:
    """Read `HOST:PORT` or `[ADDRESS]:PORT`."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\[\]\s/]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 2**16:
        raise invalid(name, text, "expected HOST:PORT", _BY_HAND)
    return match[1] or match[2], int(match[3])


def _of_open_mpi(environment: Mapping[str, str]) -> Launch | None:
    """The launch by `mpirun`; read before Slurm's, in whose allocation `mpirun` may run."""
    count = _number(environment, "OMPI_COMM_WORLD_SIZE", 1)
    if count < 2:  # noqa: PLR2004 # one process is alone
        return None
    address = environment.get(_ADDRESS_VARIABLE)
    if address is not None:
        host, port = _address(address, _ADDRESS_VARIABLE)
    else:
        # such as 2416246784.0;tcp://10.0.0.1,192.168.0.1:36823; Open MPI 5 no longer sets it
        uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
        match = re.match(r"(\d{1,19})\.\d+;tcp(?:6://\[([^,\]\s]+)|://([^,:\s]+))", uri)
        if match is None:
            raise UsageError(
                "this Open MPI does not give the address of rank 0",
                f"mpirun -x {_ADDRESS_VARIABLE}=HOST:PORT …",
            )
        host = match[2] or match[3]
        port = _port(environment, int(match[1]) >> 12)
    rank = _rank(environment, "OMPI_COMM_WORLD_RANK", count)
    return Launch(host=host, port=port, count=count, rank=rank)


def _of_slurm(environment: Mapping[str, str]) -> Launch | None:
    """The launch by `srun`; a batch script itself is no step, and runs alone."""
    count = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if count < 2:  # noqa: PLR2004 # one process is alone
        return None
    address = environment.get(_ADDRESS_VARIABLE)
    if address is not None:
        host, port = _address(address, _ADDRESS_VARIABLE)
    else:
        host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
        port = _port(environment, _number(environment, "SLURM_JOB_ID", 0))
    rank = _rank(environment, "SLURM_PROCID", count)
    return Launch(host=host, port=port, count=count, rank=rank)


def first_host(nodes: str) -> str:
    """The first of Slurm's `node[001-004,7]-ib,other`.

    Raises:
        UsageError: The list names no host.
    """
    match = re.match(r"([^,\[\s]+)(?:\[([^,\-\]\s]+)[^\]]*\]([^,\s]*))?", nodes)
    if match is None:
        raise UsageError("Slurm does not give the nodes of this run", _BY_HAND)
    return match[1] + (match[2] or "") + (match[3] or "")


def _port(environment: Mapping[str, str], job: int) -> int:
    text = environment.get(_PORT_VARIABLE)
    if not text:
        return _PORTS[job % len(_PORTS)]
    port = _number(environment, _PORT_VARIABLE, 0)
    if not 0 < port < 2**16:
        hint = f"export {_PORT_VARIABLE}=61500"
        raise invalid(_PORT_VARIABLE, text, "expected a port, 1 to 65535", hint)
    return port


def _rank(environment: Mapping[str, str], name: str, count: int) -> int:
    """This process's rank; without one it would be a second rank 0."""
    rank = _number(environment, name, count)
    if rank >= count:
        raise invalid(name, environment.get(name, ""), f"expected 0 to {count - 1}", _BY_HAND)
    return rank


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else default
