"""A Slurm of two nodes on this machine, without systemd or root, in a folder of its own."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

_CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
KillWait=2
WaitTime=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={0} NodeHostname={0} NodeAddr=127.0.0.1 Port={1} CPUs=4 RealMemory=1000\n"
_STARTS_WITHIN_S = 30


def find_daemon(name: str) -> str | None:
    """Where a daemon is, which need not be on the path of a user."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """A controller and two nodes, which are this machine under two names.

    Only the first name has to mean something: that is where rank 0 is looked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        host = socket.gethostname().split(".")[0]
        self._host, self._names = host, (host, f"{host}-b")
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        (self._folder / "state").mkdir(parents=True)
        control, *ports = free_ports(1 + len(self._names))
        # the number of a job chooses the port of rank 0: other sessions begin with other numbers
        text = _CONFIGURATION.format(
            first_job=1 + os.getpid() % 4000,
            host=self._host,
            port=control,
            folder=self._folder,
            user=getpass.getuser(),
        )
        for name, port in zip(self._names, ports, strict=True):
            (self._folder / f"spool-{name}").mkdir()
            text += _NODE.format(name, port)
        (self._folder / "slurm.conf").write_text(text)
        try:
            self._start("slurmctld", "-D", "-i")
            for name in self._names:
                self._start("slurmd", "-D", "-N", name)
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name: str, *arguments: str) -> None:
        daemon = find_daemon(name)
        assert daemon is not None
        with (self._folder / f"{len(self._daemons)}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    [daemon, *arguments, "-f", self.environment["SLURM_CONF"]],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _wait(self) -> None:
        """Until both nodes are idle."""
        until = time.monotonic() + _STARTS_WITHIN_S
        states: list[str] = []
        while states != ["idle"] * len(self._names):
            assert time.monotonic() < until, (states, list(self._folder.glob("*.log")))
            assert all(daemon.poll() is None for daemon in self._daemons), self._folder
            states = self.ask("sinfo", "-h", "-N", "-o", "%T").split()
            time.sleep(0.1)

    def ask(self, *command: str) -> str:
        """What a command of Slurm says."""
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout

    def __exit__(self, *_: object) -> None:
        if self._daemons and self._daemons[0].poll() is None:  # else it would wait for ever
            self.ask("scancel", "-u", getpass.getuser())
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
