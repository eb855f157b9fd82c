"""A server on the loopback interface, in a thread of this process, with a small real engine."""

import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field, replace

import httpx

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import Release, open_release
from grokctl.checkpoint.tensor_source import ReleaseSource
from grokctl.errors import GrokctlError
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.plan import EngineOptions
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute
from grokctl.serving.app import application
from grokctl.serving.guard import GuardOptions
from grokctl.serving.served_model import describe
from grokctl.serving.server import Server, ServerOptions, bound
from grokctl.serving.service import Phase, Service, ServiceOptions

CONFIG = replace(
    MINIATURE,
    vocab_size=512,
    emb_size=64,
    key_size=8,
    num_q_heads=8,
    num_layers=2,
    sequence_len=128,
)


def small_release(root, config=CONFIG) -> Release:
    write_miniature(root, config)
    return open_release(root)


def small_engine(release: Release, **options) -> Engine:
    options = {"mesh": MeshShape(1, 1), "compute": Compute.FLOAT32, "slots": 3, **options}
    return infer(ReleaseSource(release), EngineOptions(**options), tokenizer=release.tokenizer)


@dataclass
class Running:
    """A server that answers."""

    service: Service
    server: Server
    port: int
    log: list = field(default_factory=list)
    bugs: list = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def on_loop(self, function):
        """Call something in the loop of the server, and wait for it."""
        done = asyncio.run_coroutine_threadsafe(_called(function), self.server._loop)
        return done.result(timeout=30)


async def _called(function):
    return function()


@contextlib.contextmanager
def serving(
    release: Release,
    start,
    *,
    guard: GuardOptions | None = None,
    aliases=("alias/one",),
    is_awaited=True,
    server_options: ServerOptions | None = None,
    **options,
):
    """Serve what `start` gives; a wait for it is part of this, unless `is_awaited` is false."""
    log, bugs, ends = [], [], []
    changed = threading.Event()

    def on_change(phase):
        if phase is not Phase.LOADING:
            changed.set()

    service = Service(
        start,
        lambda engine: describe(
            ReleaseSource(release),
            engine.plan,
            name="miniature",
            tokenizer=release.tokenizer,
            aliases=aliases,
        ),
        options=ServiceOptions(**options),
        on_change=on_change,
        report=lambda id_, error: bugs.append((id_, error)),
    )
    app = application(
        service,
        guard or GuardOptions(),
        log=log.append,
    )
    listening = replace(server_options or ServerOptions(), port=0)
    server = Server(service, app, listening)
    listener = bound(listening)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=lambda: ends.append(asyncio.run(server.serve(listener))))
    thread.start()
    running = Running(service, server, port, log, bugs)
    running.ends, running.thread = ends, thread
    try:
        if is_awaited:
            assert changed.wait(120)
            if service.failure is not None and is_awaited is True:
                raise service.failure
        yield running
    finally:
        if thread.is_alive() and server._loop is not None:
            with contextlib.suppress(RuntimeError):
                server._loop.call_soon_threadsafe(server.stop)
                server._loop.call_soon_threadsafe(server.stop)
        thread.join(30)
        assert not thread.is_alive()
        assert service.engine._has_ended.wait(120)  # the engine is another server's from now on
    assert not [error for _, error in bugs if not isinstance(error, GrokctlError)]


def events_of(text: str) -> list:
    """The values of a stream's events; comments are left out, and the end is `[DONE]`."""
    found = []
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
    return found
