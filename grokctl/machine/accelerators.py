"""What the NVIDIA driver and JAX say about accelerators, if they answer at all."""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import pynvml

from grokctl.machine.facts import Accelerator, Found, JaxReport, Nvml
from grokctl.machine.waiting import Waiting
from grokctl.model.sizing import told_share
from grokctl.os_errors import reason_of
from grokctl.text import printable

_CHILD: Final = Path(__file__).with_name("jax_report.py")
_LARGEST_REPORT: Final = 2**20
_LAST_COMPLAINTS: Final = 2**14
"""Bytes of what it says to stderr that are kept."""
_LARGEST_MEMORY: Final = 2**60
_GPU_SHARE: Final = 0.75
"""Of a GPU, what JAX takes unless it is told otherwise: its limit says no more than that."""
_LONGEST_TEXT: Final = 300
_GRACE_S: Final = 5
"""Seconds after which it ends itself, where nobody is left to do it."""
_LEAVE_S: Final = 2.0
_GLANCE_S: Final = 0.1
_ASIDES: Final = re.compile(r"\s|-{8}|={8}|\*{3}|For simplicity, JAX")
"""How lines begin that say nothing alone, such as those of a traceback."""
_PREFIXES: Final = re.compile(r"[A-Z]+:[-\d: ,]+:[\w.]+:\d+: |[IWEF]\d{4} \S+ +\d+ \S+\] ")
"""What loggers of Python and XLA put in front of a line."""

_Value = TypeVar("_Value")


def ask_driver(*, timeout_s: float = 5.0) -> Nvml:
    """Ask the NVIDIA driver for its GPUs.

    Args:
        timeout_s: A driver that hangs is left alone after so many seconds.

    Returns:
        What it said, even if that is not all that it was asked.
    """
    return asking_driver(timeout_s=timeout_s).answer()


def asking_driver(*, timeout_s: float) -> Waiting[Nvml]:
    """Begin to ask the NVIDIA driver; see `ask_driver`."""
    silent = Nvml(found=Found.SILENT, error=f"the driver did not answer in {timeout_s:.0f} s")
    return Waiting(_nvml, timeout_s=timeout_s, otherwise=silent)


def _nvml() -> Nvml:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound as error:
        return Nvml(found=Found.ABSENT, error=str(error))
    except pynvml.NVMLError as error:
        return Nvml(found=Found.FAILED, error=str(error))
    try:
        return _nvml_report()
    finally:
        _told(pynvml.nvmlShutdown)


def _nvml_report() -> Nvml:
    driver = printable(str(_told(pynvml.nvmlSystemGetDriverVersion) or ""))
    number = _told(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    cuda = f"{number // 1000}.{number % 1000 // 10}" if number else ""
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
    except pynvml.NVMLError as error:
        return Nvml(found=Found.FAILED, error=str(error), driver=driver, cuda=cuda)
    return Nvml(
        found=Found.OK,
        driver=driver,
        cuda=cuda,
        gpus=tuple(_gpu(part, driver) for handle in handles for part in _parts(handle)),
    )


def _parts(handle: Any) -> list[Any]:
    """A GPU, or what it was split into (MIG): nobody can use the whole of it then."""
    mode = _told(lambda: pynvml.nvmlDeviceGetMigMode(handle))
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return [handle]
    most = _told(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0
    parts = [
        _told(partial(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index))
        for index in range(most)
    ]
    return [part for part in parts if part is not None]


def _gpu(handle: Any, driver: str) -> Accelerator:
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    capability = _told(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Accelerator(
        name=printable(str(_told(lambda: pynvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU")),
        platform="gpu",
        memory=None if memory is None else int(memory.total),
        free=None if memory is None else int(memory.free),
        compute_capability=None if capability is None else (capability[0], capability[1]),
        driver=driver,
        has_nvlink=_has_nvlink(handle),
    )


def _has_nvlink(handle: Any) -> bool | None:
    """Whether one link is active; GPUs without any refuse the question."""
    says = None
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED:
                return True
            says = False
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
            return False
        except pynvml.NVMLError:
            return says
    return says


def _told(ask: Callable[[], _Value]) -> _Value | None:
    """One answer of the driver, or nothing: each may be refused alone."""
    try:
        return ask()
    except (pynvml.NVMLError, ValueError):  # a name that is no text is a ValueError
        return None


class AskingJax:
    """JAX, asked in a process of its own, as a context manager that leaves none of it behind."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._started = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._refusal = ""
        try:
            self._process = subprocess.Popen(  # noqa: S603 (this Python, and a file of ours)
                [sys.executable, "-P", str(_CHILD), str(int(timeout_s) + _GRACE_S)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=os.sep,  # with -P, no file of the user's folder is taken for a module
                env=_environment(os.environ),
                start_new_session=True,
            )
        except OSError as error:
            self._refusal = f"Python does not start: {reason_of(error)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        with suppress(OSError):  # it is gone, and so are all that it started
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # held by a driver: it dies when that lets go
            self._process.wait(_LEAVE_S)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def report(self) -> JaxReport:
        """What it says; waits until its time is over."""
        if self._process is None:
            return JaxReport(found=Found.FAILED, error=self._refusal)
        answer, complaints = self._listen(self._process)
        seconds = time.monotonic() - self._started
        words = _last_words(complaints)
        is_over = answer.endswith(b"\n") or seconds < self._timeout_s
        if is_over:
            with suppress(subprocess.TimeoutExpired):  # it gives devices back by itself
                self._process.wait(_LEAVE_S)
        if answer.endswith(b"\n"):
            with suppress(ValueError):
                report = _parsed(answer, os.environ, words)
                return replace(report, seconds=min(report.seconds or seconds, seconds))
        if not is_over and self._process.poll() is None:
            found, why = Found.SILENT, f"JAX did not answer in {self._timeout_s:.0f} s"
        else:
            found, why = Found.FAILED, _ending(self._process.poll())
        return JaxReport(
            found=found,
            error=f"{why}; its last words: {words}" if words else why,
            seconds=seconds,
        )

    def _listen(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """What it prints, until there is a line, it is gone or its time is over."""
        assert process.stdout is not None
        assert process.stderr is not None
        answer, complaints = b"", b""
        # what it said in time is heard, also if nobody listened then
        until = max(self._started + self._timeout_s, time.monotonic() + _GLANCE_S)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while selector.get_map() and len(answer) < _LARGEST_REPORT:
                left = until - time.monotonic()
                ready = selector.select(min(left, _GLANCE_S)) if left > 0 else []
                if left <= 0 or (not ready and process.poll() is not None):
                    break  # what it started may hold its pipes open
                for key, _ in ready:
                    block = os.read(key.fd, 2**16)
                    if not block:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout:
                        answer += block
                    else:
                        complaints = (complaints + block)[-_LAST_COMPLAINTS:]
                if answer.endswith(b"\n"):
                    break
        return answer, complaints


def ask_jax(*, timeout_s: float) -> JaxReport:
    """Ask JAX which devices it finds, without starting it here.

    It takes no memory of them, joins no job, and is gone with all it started when this returns.

    Args:
        timeout_s: It is killed after so many seconds.
    """
    with AskingJax(timeout_s=timeout_s) as asking:
        return asking.report()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    folders = environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        **environ,
        # an empty entry would be the folder that it is started in
        "PYTHONPATH": os.pathsep.join(str(Path(each).absolute()) for each in folders if each),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _parsed(answer: bytes, environ: Mapping[str, str], words: str) -> JaxReport:
    """The answer as values.

    Raises:
        ValueError: It is none of ours.
    """
    try:
        said = json.loads(answer)
        if "error" in said:
            found = Found.ABSENT if said.get("is_absent") is True else Found.FAILED
            return JaxReport(found=found, error=_text(said["error"]))
        platform = _text(said["platform"])
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
        devices = said["devices"] if platform != "cpu" else []
        accelerators = tuple(_accelerator(each, platform, environ) for each in devices)
        seconds = float(said["seconds"])
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("not a report") from error
    return JaxReport(
        found=Found.OK,
        error=words,
        platform=platform,
        accelerators=accelerators,
        seconds=seconds if 0 < seconds < inf else 0.0,
    )


def _accelerator(said: Any, platform: str, environ: Mapping[str, str]) -> Accelerator:
    limit = said["limit"]
    memory = None
    if type(limit) is int and 0 < limit < _LARGEST_MEMORY:
        share = (told_share(environ) or _GPU_SHARE) if platform == "gpu" else 1
        memory = round(limit / share)
    capability = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", _text(said["capability"]), re.ASCII)
    return Accelerator(
        name=_text(said["kind"]),
        platform=platform,
        memory=memory,
        compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
    )


def _text(said: Any) -> str:
    if not isinstance(said, str):
        raise TypeError("not a text")
    return printable(said, limit=_LONGEST_TEXT)


def _last_words(complaints: bytes) -> str:
    """The last line that says something, without what loggers put in front of it."""
    lines = complaints.decode(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and not _ASIDES.match(line)]
    return printable(_PREFIXES.sub("", said[-1]), limit=_LONGEST_TEXT) if said else ""


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        with suppress(ValueError):
            return f"JAX was ended by {signal.Signals(-status).name}"
    return f"JAX ended with status {status}" if status is not None else "JAX says nothing sensible"
