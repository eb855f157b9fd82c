"""Serve a checkpoint over HTTP: bound first, then loaded, until a signal ends it."""

import gc
import ipaddress
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from grokctl.cluster.process_group import Cluster
from grokctl.errors import GrokctlError, InvalidValueError, UsageError
from grokctl.events import (
    Advanced,
    Answered,
    Event,
    Finished,
    Noted,
    Observer,
    Stage,
    Started,
    Unit,
)
from grokctl.inference.devices import memory_bandwidth
from grokctl.inference.engine import Engine
from grokctl.inference.warm_up import warm_up
from grokctl.model.sizing import cache_bytes
from grokctl.paths import read_limited
from grokctl.planning import accelerators
from grokctl.screen.serve import Ready
from grokctl.serving.app import application
from grokctl.serving.exchange import Exchange
from grokctl.serving.guard import GuardOptions
from grokctl.serving.served_model import ServedModel, describe
from grokctl.serving.server import End, Server, ServerOptions, bound
from grokctl.serving.service import Phase, Service, ServiceOptions
from grokctl.session.job import EngineJob, JobRequest, open_job

_LONGEST_KEY: Final = 4096
"""Bytes of a file with a key."""
_UNLOGGED: Final = frozenset({"/health", "/v1/health", "/metrics", "/slots", "/load"})
"""Routes that machines ask all the time."""
_LAST_WORDS_S: Final = 1.0
"""For streams, when another rank is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a checkpoint is served."""

    server: ServerOptions
    service: ServiceOptions
    guard: GuardOptions
    aliases: tuple[str, ...] = ()
    needs_key: bool = True
    """Whether a key is a condition of serving other machines."""
    warms_up: bool = True
    """Whether all steps are compiled before the first request, which would wait for them."""
    logs_all: bool = False
    """Whether requests of probes are logged, too."""


def serve(
    request: JobRequest,
    options: ServeOptions,
    *,
    cluster: Cluster | None = None,
    observe: Observer,
    on_ready: Callable[[Ready], object],
) -> End:
    """Serve until a signal comes, or the engine ends.

    Args:
        request: Which checkpoint, and how to run it.
        options: How to serve it.
        cluster: The processes that run it; this one is rank 0.
        observe: Receives progress, every answer, and the state while something runs.
        on_ready: Called once, when requests are answered.

    Returns:
        How it ended; the failure of the engine is in it.

    Raises:
        UsageError: The port or the address cannot be used, or it would serve strangers.
        GrokctlError: As `open_job` and `EngineJob.start` do.
    """
    with bound(options.server) as listener:
        address = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        if not is_local and options.needs_key and options.guard.key is None:
            raise UsageError(
                f"--host {options.server.host}: other machines reach it, so it needs a key",
                "--api-key-file FILE  # or --no-auth, where everybody may ask",
            )
        serving = _Serving(request, options, cluster, _one_at_a_time(observe), on_ready)
        return serving.run(listener, address, is_local=is_local)


class _Serving:
    """A server under way, and what it tells."""

    def __init__(
        self,
        request: JobRequest,
        options: ServeOptions,
        cluster: Cluster | None,
        observe: Observer,
        on_ready: Callable[[Ready], object],
    ) -> None:
        self._request = request
        self._options = options
        self._cluster = cluster
        self._observe = observe
        self._on_ready = on_ready
        self._job: EngineJob | None = None
        self._address: tuple[str, int] = ("", 0)
        self._is_local = True
        self._seen = ""
        self._service = Service(
            self._start,
            self._described,
            options=options.service,
            observe=observe,
            on_change=self._changed,
            report=self._report,
        )

    def run(self, listener: socket.socket, address: tuple[str, int], *, is_local: bool) -> End:
        """Serve on a socket."""
        self._address, self._is_local = address, is_local
        guard = self._options.guard
        if not is_local and not guard.hosts:
            guard = replace(guard, hosts=None)
        app = application(self._service, guard, log=self._log)
        server = Server(self._service, app, self._options.server, pulse=self._pulse)
        if self._cluster is not None:
            self._cluster.before_end(lambda: self._say_last_words(server))
        end = server.run(listener)
        if self._seen:
            self._observe(Finished(stage=Stage.SERVE))
        return end

    # --- in the thread of the engine

    def _start(self, observe: Observer) -> Engine:
        self._job = open_job(self._request, cluster=self._cluster, observe=observe)
        engine = self._job.start(observe)
        if self._options.warms_up:
            warm_up(engine.runner)
        gc.freeze()  # weights and programs stay: no look at them for garbage
        return engine

    def _described(self, engine: Engine) -> ServedModel:
        assert self._job is not None
        job = self._job
        return describe(
            job.source,
            engine.plan,
            name=job.name,
            tokenizer=job.tokenizer,
            aliases=self._options.aliases,
            bandwidth=_bandwidth(engine),
        )

    # --- in the loop

    def _changed(self, phase: Phase) -> None:
        if phase is Phase.READY:
            self._on_ready(self._ready())
            self._observe(Started(stage=Stage.SERVE, unit=Unit.TOKENS))
        elif phase is Phase.DRAINING:
            seconds = self._options.server.drain_s
            self._observe(Noted(message=f"ends: what runs may go on for {seconds:g} s"))

    def _ready(self) -> Ready:
        engine, model = self._service.engine.engine, self._service.model
        terms = engine.plan.terms
        nbytes = cache_bytes(
            engine.config, engine.mesh, slots=1, past=engine.runner.past, dtype=terms.cache_dtype
        )
        name, port = self._address
        scheme = "http" if self._options.server.certificate is None else "https"
        host = f"[{name}]" if ":" in name else name
        return Ready(
            url=f"{scheme}://{host}:{port}",
            model=model.name,
            slots=terms.slots,
            context=terms.context,
            slot_nbytes=nbytes * engine.mesh.size,
            is_local=self._is_local,
            has_key=self._options.guard.key is not None,
            load_s=engine.load_s,
            compile_s=engine.runner.compile_s,
        )

    def _log(self, exchange: Exchange) -> None:
        if exchange.route in _UNLOGGED and not self._options.logs_all:
            return
        self._observe(
            Answered(
                id=exchange.id,
                route=exchange.route,
                status=exchange.status,
                prompt_tokens=exchange.prompt_tokens,
                tokens=exchange.tokens,
                seconds=exchange.seconds,
            )
        )

    def _report(self, request_id: str, error: Exception) -> None:
        """What failed inside: for the log, without texts of clients."""
        if isinstance(error, GrokctlError):
            self._observe(Noted(message=f"{request_id}: {error}"))
            return
        places = traceback.extract_tb(error.__traceback__)[-4:]
        where = ", ".join(f"{Path(place.filename).name}:{place.lineno}" for place in places)
        self._observe(Noted(message=f"{request_id}: a bug: {type(error).__name__} at {where}"))

    def _pulse(self) -> None:
        """Say how it goes, if anything has changed."""
        if self._service.phase is not Phase.READY and not self._seen:
            return
        gauges, made = self._service.gauges(), self._service.measures.generated
        detail = f"{gauges.running} of {self._service.slots} slots, {gauges.waiting} waiting"
        if f"{made} {detail}" != self._seen:
            self._seen = f"{made} {detail}"
            self._observe(Advanced(stage=Stage.SERVE, done=made, detail=detail))

    def _say_last_words(self, server: Server) -> None:
        """End all streams with an error, from another thread: a rank was lost."""
        if server.fail():
            time.sleep(_LAST_WORDS_S)


def _bandwidth(engine: Engine) -> float | None:
    """Bytes a second of the memory of all devices: of accelerators the published one, if known.

    A measurement would take memory there that may be needed for weights.
    """
    devices = engine.devices
    if devices[0].platform == "cpu":
        return memory_bandwidth(devices)
    known = accelerators.match(devices[0].device_kind)
    return None if known is None else known.bandwidth * len(devices)


def _one_at_a_time(observe: Observer) -> Observer:
    """An observer that the thread of the engine and the loop may call."""
    lock = threading.Lock()

    def locked(event: Event) -> None:
        with lock:
            observe(event)

    return locked


def read_key(path: Path | None, value: str | None) -> str | None:
    """The key that clients need: of a file, or else of the environment.

    Args:
        path: The file, which has nothing else; None for none.
        value: Of the variable `GROKCTL_API_KEY`; None if it is not set.

    Raises:
        UsageError: There is a file or a variable without a key.
    """
    name = "GROKCTL_API_KEY" if path is None else str(path)
    if path is not None:
        try:
            value = read_limited(path, _LONGEST_KEY).decode("ascii", "replace")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or 'cannot be read'}") from error
    if value is None:
        return None
    key = value.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        problem = "expected a key: ASCII characters without spaces"
        raise InvalidValueError(problem, "openssl rand -hex 32 > FILE", name)
    return key
