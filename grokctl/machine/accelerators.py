"""Accelerators by the NVIDIA driver and by JAX, with timeouts for both."""

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
from grokctl.model.memory_share import environment_share
from grokctl.os_errors import reason_of
from grokctl.text import printable

_CHILD: Final = Path(__file__).with_name("jax_report.py")
_LARGEST_REPORT: Final = 2**20
_LAST_COMPLAINTS: Final = 2**14
"""Bytes of its stderr that are kept."""
_LARGEST_MEMORY: Final = 2**60
_GPU_SHARE: Final = 0.75
"""The share of GPU memory that JAX takes by default: it only reports this part."""
_LONGEST_TEXT: Final = 300
_GRACE_S: Final = 5
"""Seconds after the timeout at which it ends itself, if its parent is gone."""
_LEAVE_S: Final = 2.0
_POLL_S: Final = 0.1
_ASIDES: Final = re.compile(r"\s|-{8}|={8}|\*{3}|For simplicity, JAX")
"""Beginnings of lines that mean nothing alone, such as those of a traceback."""
_PREFIXES: Final = re.compile(r"[A-Z]+:[-\d: ,]+:[\w.]+:\d+: |[IWEF]\d{4} \S+ +\d+ \S+\] ")
"""Line prefixes of the loggers of Python and XLA."""

_Value = TypeVar("_Value")


def probe_driver(*, timeout_s: float) -> Waiting[Nvml]:
    """Begin to ask the NVIDIA driver for its GPUs.

    Args:
        timeout_s: Seconds to wait for the driver.
    """
    silent = Nvml(found=Found.SILENT, error=f"the driver did not answer in {timeout_s:.0f} s")
    return Waiting(_nvml, timeout_s=timeout_s, default=silent)


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
        _value(pynvml.nvmlShutdown)


def _nvml_report() -> Nvml:
    driver = printable(str(_value(pynvml.nvmlSystemGetDriverVersion) or ""))
    version = _value(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    cuda = f"{version // 1000}.{version % 1000 // 10}" if version else ""
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
    """A GPU, or its MIG instances: a GPU in MIG mode cannot be used as a whole."""
    mode = _value(lambda: pynvml.nvmlDeviceGetMigMode(handle))
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return [handle]
    most = _value(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0
    parts = [
        _value(partial(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index))
        for index in range(most)
    ]
    return [part for part in parts if part is not None]


def _gpu(handle: Any, driver: str) -> Accelerator:
    memory = _value(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    capability = _value(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Accelerator(
        name=printable(str(_value(lambda: pynvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU")),
        platform="gpu",
        memory=None if memory is None else int(memory.total),
        free=None if memory is None else int(memory.free),
        compute_capability=None if capability is None else (capability[0], capability[1]),
        driver=driver,
        has_nvlink=_has_nvlink(handle),
    )


def _has_nvlink(handle: Any) -> bool | None:
    """Whether at least one link is active; GPUs without links refuse the query."""
    has_link = None
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED:
                return True
            has_link = False
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
            return False
        except pynvml.NVMLError:
            return has_link
    return has_link


def _value(ask: Callable[[], _Value]) -> _Value | None:
    """One value from the driver, or None: each query may be refused."""
    try:
        return ask()
    except (pynvml.NVMLError, ValueError):  # ValueError: a name that is not text
        return None


class JaxProbe:
    """A process that asks JAX for its devices, as a context manager that kills it.

    It takes no memory of them, joins no job, and ends with all of its children.
    """

    def __init__(self, *, timeout_s: float) -> None:
        """Start the process.

        Args:
            timeout_s: Seconds to wait for it.
        """
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
                cwd=os.sep,  # with -P, no file of the user's folder is imported
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
        with suppress(OSError):  # it has ended, with all of its children
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in a driver: it dies when that returns
            self._process.wait(_LEAVE_S)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def report(self) -> JaxReport:
        """Its report, or the reason why there is none; waits until the timeout."""
        if self._process is None:
            return JaxReport(found=Found.FAILED, error=self._refusal)
        answer, complaints = self._read(self._process)
        seconds = time.monotonic() - self._started
        words = _last_line(complaints)
        is_over = answer.endswith(b"\n") or seconds < self._timeout_s
        if is_over:
            with suppress(subprocess.TimeoutExpired):  # it releases the devices
                self._process.wait(_LEAVE_S)
        if answer.endswith(b"\n"):
            with suppress(ValueError):
                report = _parsed(answer, os.environ, words)
                return replace(report, seconds=min(report.seconds or seconds, seconds))
        if not is_over and self._process.poll() is None:
            found, reason = Found.SILENT, f"JAX did not answer in {self._timeout_s:.0f} s"
        else:
            found, reason = Found.FAILED, _ending(self._process.poll())
        return JaxReport(
            found=found,
            error=f"{reason}; its last line: {words}" if words else reason,
            seconds=seconds,
        )

    def _read(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """Its stdout and stderr, until there is a line, the process ends or the time is over."""
        assert process.stdout is not None
        assert process.stderr is not None
        answer, complaints = b"", b""
        # output in time counts, even if it is read late
        until = max(self._started + self._timeout_s, time.monotonic() + _POLL_S)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while selector.get_map() and len(answer) < _LARGEST_REPORT:
                left = until - time.monotonic()
                ready = selector.select(min(left, _POLL_S)) if left > 0 else []
                if left <= 0 or (not ready and process.poll() is not None):
                    break  # its children may keep the pipes open
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


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    folders = environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        **environ,
        # an empty entry would mean the current folder
        "PYTHONPATH": os.pathsep.join(str(Path(each).absolute()) for each in folders if each),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _parsed(answer: bytes, environ: Mapping[str, str], words: str) -> JaxReport:
    """Parse a report.

    Raises:
        ValueError: It is not a report.
    """
    try:
        values = json.loads(answer)
        if "error" in values:
            found = Found.ABSENT if values.get("is_absent") is True else Found.FAILED
            return JaxReport(found=found, error=_text(values["error"]))
        platform = _text(values["platform"])
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
        devices = values["devices"] if platform != "cpu" else []
        accelerators = tuple(_accelerator(each, platform, environ) for each in devices)
        seconds = float(values["seconds"])
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("not a report") from error
    return JaxReport(
        found=Found.OK,
        error=words,
        platform=platform,
        accelerators=accelerators,
        seconds=seconds if 0 < seconds < inf else 0.0,
    )


def _accelerator(values: Any, platform: str, environ: Mapping[str, str]) -> Accelerator:
    limit = values["limit"]
    memory = None
    if type(limit) is int and 0 < limit < _LARGEST_MEMORY:
        share = (environment_share(environ) or _GPU_SHARE) if platform == "gpu" else 1
        memory = round(limit / share)
    capability = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", _text(values["capability"]), re.ASCII)
    return Accelerator(
        name=_text(values["kind"]),
        platform=platform,
        memory=memory,
        compute_capability=(int(capability[1]), int(capability[2])) if capability else None,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return printable(value, limit=_LONGEST_TEXT)


def _last_line(complaints: bytes) -> str:
    """The last meaningful line of stderr, without the prefix of a logger."""
    lines = complaints.decode(errors="replace").splitlines()
    meaningful = [line for line in lines if line.strip() and not _ASIDES.match(line)]
    if not meaningful:
        return ""
    return printable(_PREFIXES.sub("", meaningful[-1]), limit=_LONGEST_TEXT)


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        with suppress(ValueError):
            return f"JAX was ended by {signal.Signals(-status).name}"
    return f"JAX ended with status {status}" if status is not None else "JAX printed no report"
