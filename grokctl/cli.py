"""Declare commands, call one library function each, and turn errors into exit statuses."""

import errno
import io
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from grokctl import __version__, interrupts
from grokctl.errors import DiskFullError, ExitCode, GrokctlError, UsageError
from grokctl.model.precision import Precision
from grokctl.paths import TOKENIZER, Home, default_home, kind_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from grokctl.checkpoint.logical import TensorSource
    from grokctl.console import Console
    from grokctl.events import Observer
    from grokctl.infer import Engine, EngineOptions, Generation, RunPlan
    from grokctl.model.placement import MeshShape
    from grokctl.model.sampling import Sampling
    from grokctl.sources import FetchOptions
    from grokctl.verify import Verdict

_MOST_TEXT: Final = 2**24
"""Characters, far more than any context holds."""
_GOES_ON: Final = "interrupted; the same command goes on where it stopped"


class ErrorBoundary(TyperGroup):
    """The only place where a `GrokctlError` becomes an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except GrokctlError as error:
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from error
        except BrokenPipeError as error:
            raise typer.Exit(ExitCode.OK) from error  # whoever read our output has enough


app = typer.Typer(
    cls=ErrorBoundary,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="From a magnet link to text from Grok-1, on the hardware you have.",
    epilog="Start with: grokctl demo",
)


def main() -> NoReturn:
    """The `grokctl` command."""
    interrupts.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow locale is no reason to fail
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        interrupts.leave()
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:
            interrupts.leave()
        interrupts.flush()
        raise
    raise AssertionError  # app() exits


CheckpointArgument = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help="A name under home, or a path.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Log what happens.")]
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Where checkpoints are kept ($GROKCTL_HOME).", show_default=False),
]
PeerOption = Annotated[
    list[str] | None, typer.Option("--peer", metavar="HOST:PORT", help="Somebody who has it.")
]
WebSeedOption = Annotated[list[str] | None, typer.Option(metavar="URL", help="BEP 19 seed.")]
TrackerOption = Annotated[list[str] | None, typer.Option(metavar="URL", help="Another tracker.")]
NoDhtOption = Annotated[bool, typer.Option("--no-dht", help="Do not use the DHT.")]
NoLsdOption = Annotated[bool, typer.Option("--no-lsd", help="Do not look for peers in the LAN.")]
BindOption = Annotated[str | None, typer.Option(metavar="ADDR", help="Local address to use.")]
PortOption = Annotated[int | None, typer.Option(metavar="N", help="Port to listen on.")]
ProxyOption = Annotated[str | None, typer.Option(metavar="URL", help="socks5:// or http://")]
StallOption = Annotated[
    float, typer.Option("--stall-timeout", metavar="S", help="Give up after S quiet seconds.")
]
DevicesOption = Annotated[
    int | None, typer.Option(metavar="N", help="1, 2, 4, 8 or 16.", show_default=False)
]
MeshOption = Annotated[
    str | None, typer.Option(metavar="MESH", help="Such as expert=2,model=8.", show_default=False)
]
ComputeOption = Annotated[str, typer.Option(metavar="TYPE", help="bfloat16 or float32.")]
ContextOption = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens of context.", show_default="the model's")
]
TokenIdsOption = Annotated[
    str | None, typer.Option(metavar="1,2,3", help="Token ids instead of text.")
]


class _ReportedError(Exception):
    """A failure whose result was rendered in full already."""

    def __init__(self, error: GrokctlError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _ui(
    *, as_json: bool, quiet: bool, verbose: bool, interrupted: str = "interrupted"
) -> Iterator["Console"]:
    """A console that says how the command ended."""
    from grokctl.console import Console

    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
    console = Console(as_json=as_json, quiet=quiet)
    try:
        yield console
    except _ReportedError as reported:
        console.failure(reported.error, has_result=True)
        raise reported.error from None
    except GrokctlError as error:
        console.failure(error)
        raise
    except BrokenPipeError:
        raise
    except OSError as error:
        failure = _refused(error)
        console.failure(failure)
        raise failure from error
    except KeyboardInterrupt as error:
        console.note(interrupted)
        raise typer.Exit(ExitCode.INTERRUPTED) from error


def _refused(error: OSError) -> GrokctlError:
    """What the operating system refused, where no stage knew better."""
    what = error.filename if error.filename is not None else "stdout"
    message = f"{what}: {error.strerror or error}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFullError(message)
    return UsageError(message)


def _home(path: Path | None) -> Home:
    return Home(path if path is not None else default_home())


@app.callback(invoke_without_command=True)
def grokctl(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """From a magnet link to text from Grok-1, on the hardware you have."""
    if version:
        sys.stdout.write(f"grokctl {__version__}\n")
        raise typer.Exit


@app.command(epilog="Example: grokctl fetch --max-download 20MB")
def fetch(
    source: Annotated[
        str, typer.Argument(help="grok-1, a magnet link (quoted), or a .torrent file.")
    ] = "grok-1",
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to fill.", show_default="releases/NAME"),
    ] = None,
    peer: PeerOption = None,
    web_seed: WebSeedOption = None,
    tracker: TrackerOption = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only files such as 'tensor0000*'.")
    ] = None,
    max_download: Annotated[str | None, typer.Option(metavar="RATE", help="Such as 20MB.")] = None,
    max_upload: Annotated[str | None, typer.Option(metavar="RATE", help="Such as 500kB.")] = None,
    connections: Annotated[int | None, typer.Option(metavar="N", help="At most N peers.")] = None,
    port: PortOption = None,
    bind: BindOption = None,
    proxy: ProxyOption = None,
    no_dht: NoDhtOption = False,
    no_lsd: NoLsdOption = False,
    seed: Annotated[bool, typer.Option("--seed", help="Then upload until Ctrl-C.")] = False,
    seed_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Then upload X times its size.")
    ] = None,
    stall_timeout: StallOption = 300.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Adopt files that another program put there.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Download a release from its swarm; goes on where it stopped."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=_GOES_ON) as console:
        from grokctl import fetch as stage
        from grokctl import render
        from grokctl.sources import FetchOptions

        options = FetchOptions(
            peers=tuple(peer or ()),
            web_seeds=tuple(web_seed or ()),
            trackers=tuple(tracker or ()),
            only=tuple(only or ()),
            max_download=parse_size(max_download),
            max_upload=parse_size(max_upload),
            connections=connections,
            port=port,
            bind=bind,
            proxy=proxy,
            dht=not no_dht,
            lsd=not no_lsd,
            seed=seed,
            seed_ratio=seed_ratio,
            stall_timeout_s=stall_timeout,
            force=force,
        )
        root = (to or stage.default_root(source, _home(home).releases)).absolute()
        if dry_run:
            with console.observing() as observe:
                plan = stage.plan(source, root, options, observe=observe)
            render.fetch_plan(console, plan, root)
            return
        with console.observing() as observe:
            done = stage.fetch(source, root, options, observe=observe)
        render.fetched(console, done)


@app.command(epilog="Example: grokctl verify grok-1 --repair")
def verify(
    checkpoint: CheckpointArgument = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the structure; proves no content.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch damaged pieces again; nothing else changes.")
    ] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help="Believe no earlier receipt.")] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads.", show_default="cores")
    ] = None,
    peer: PeerOption = None,
    web_seed: WebSeedOption = None,
    tracker: TrackerOption = None,
    port: PortOption = None,
    bind: BindOption = None,
    proxy: ProxyOption = None,
    no_dht: NoDhtOption = False,
    no_lsd: NoLsdOption = False,
    stall_timeout: StallOption = 300.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Prove every byte against the torrent; list all damage, and mend it if asked to."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import render
        from grokctl.verify import raise_for

        root = _home(home).find(checkpoint).absolute()
        started = time.perf_counter()

        def look() -> "Verdict":
            return _verify(console, root, quick=quick, rehash=rehash, jobs=jobs)

        verdict = look()
        if verdict.damage and repair:
            from grokctl.sources import FetchOptions

            options = FetchOptions(
                peers=tuple(peer or ()),
                web_seeds=tuple(web_seed or ()),
                trackers=tuple(tracker or ()),
                port=port,
                bind=bind,
                proxy=proxy,
                dht=not no_dht,
                lsd=not no_lsd,
                stall_timeout_s=stall_timeout,
                recheck=True,
            )
            _repair(console, root, verdict, options)
            verdict = look()
        seconds = time.perf_counter() - started
        render.verdict(console, root, verdict, quick=quick, seconds=seconds)
        try:
            raise_for(verdict, root)
        except GrokctlError as error:
            raise _ReportedError(error) from error


def _verify(
    console: "Console", root: Path, *, quick: bool, rehash: bool, jobs: int | None
) -> "Verdict":
    from grokctl import verify as stage

    with console.observing() as observe:
        if kind_of(root) == "ready":
            from grokctl.checkpoint.ready import open_ready

            return stage.verify_ready(open_ready(root), quick=quick, jobs=jobs, observe=observe)
        return stage.verify(root, quick=quick, rehash=rehash, jobs=jobs, observe=observe)


def _repair(console: "Console", root: Path, verdict: "Verdict", options: "FetchOptions") -> None:
    from grokctl.fetch import fetch
    from grokctl.paths import TORRENT

    torrent = root / TORRENT
    if kind_of(root) == "ready":
        from grokctl.checkpoint.ready import cut_again, open_ready

        raise UsageError(
            f"{root}: {len(verdict.damage)} files are damaged; a ready checkpoint is cut again",
            cut_again(open_ready(root)),
        )
    if not torrent.is_file():
        raise UsageError(
            f"{root}: holds no {TORRENT} to fetch {len(verdict.damage)} damaged files by",
            "grokctl fetch",
        )
    for damage in verdict.damage:
        console.note(f"damaged: {damage}")
    with console.observing() as observe:
        fetch(str(torrent), root, options, observe=observe)


@app.command(epilog="Example: grokctl inspect grok-1 --tensor 'layers.10.*'")
def inspect(
    checkpoint: CheckpointArgument = None,
    tensor: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only tensors such as '*.moe.gate'.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """List the tensors of a checkpoint; reads headers only."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import inspect as stage
        from grokctl import render

        root = _home(home).find(checkpoint).absolute()
        with console.observing() as observe:
            found = stage.inspect(root, pattern=tensor, observe=observe)
        render.inspection(console, found)


@app.command(epilog="Example: grokctl reshard grok-1 --devices 16 --mesh expert=2,model=8")
def reshard(
    checkpoint: CheckpointArgument = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    precision: Annotated[Precision, typer.Option(help="int8 is lossless.")] = Precision.INT8,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to make.", show_default="ready/NAME-int8-MESH"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do.")] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads.", show_default="cores")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For the workers together, such as 1GB.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Cut a release into one file a device; goes on where it stopped."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=_GOES_ON) as console:
        from grokctl import render
        from grokctl import reshard as stage
        from grokctl.checkpoint.receipt import proof_of
        from grokctl.checkpoint.release import open_release

        where = _home(home)
        root = where.find(checkpoint, ready=False).absolute()
        with console.observing() as observe:
            release = open_release(root, observe=observe)
        chosen = _mesh(devices, mesh)
        if chosen is None:
            raise UsageError("how many devices to cut for is not said", "--devices 8")
        plan = stage.plan(
            release,
            mesh=chosen,
            out=(out or where.ready / f"{release.name}-{precision}-{chosen.slug}").absolute(),
            precision=precision,
            jobs=jobs,
            max_memory=parse_size(max_memory),
        )
        if dry_run:
            render.reshard_plan(console, plan)
            return
        proof = proof_of(release)
        console.note(
            f"{release.name}: {proof_line(proof.verified_at if proof else None, root=root)}"
        )
        started = time.perf_counter()
        with console.observing() as observe:
            ready = stage.reshard(release, plan, proof=proof, force=force, observe=observe)
        render.resharded(
            console, ready, seconds=time.perf_counter() - started, peak_rss=_peak_rss()
        )


def proof_line(verified_at: str | None, *, root: Path) -> str:
    """What is known about the content of a release."""
    if verified_at is not None:
        return f"every byte was proven on {verified_at}"
    return f"its content is not proven (grokctl verify {shlex.quote(str(root))})"


@app.command(epilog="Example: grokctl run -p 'The answer to life is' -n 32 --temperature 0")
def run(
    checkpoint: CheckpointArgument = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Text, or - for stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text from a file.")
    ] = None,
    token_ids: TokenIdsOption = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", min=0, help="Stop after N tokens.")
    ] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(metavar="P", help="Nucleus; 1 keeps all.")] = 0.95,
    top_k: Annotated[int, typer.Option(metavar="K", help="0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(metavar="P", help="Against the likeliest.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="For the draws.", show_default="random")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before it.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt first.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print only at the end.")] = False,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    compute: ComputeOption = "bfloat16",
    context: ContextOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say how fast it was.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Continue a text. Grok-1 is a base model: it completes, it does not chat."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import render
        from grokctl.model.sampling import Sampling

        text = _prompt(prompt, prompt_file, token_ids)
        if as_json and text is None and token_ids is None:
            raise UsageError("there is no prompt", "grokctl run --json -p 'Once upon a time'")
        drawn = int.from_bytes(os.urandom(4)) if seed is None else seed
        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=drawn
        )

        def complete(engine: "Engine", ids: list[int], sampling: Sampling) -> "Generation":
            return engine.generate(
                ids,
                sampling=sampling,
                max_tokens=max_tokens,
                stop=tuple(stop or ()),
                ignore_eos=ignore_eos,
            )

        with console.observing() as observe:
            job = _job(console, home, checkpoint, devices, mesh, compute, context, observe)
            if text is None and token_ids is None:
                _converse(console, job.start(observe), sampling, complete)
                return
            if stop and job.tokenizer is None:
                raise UsageError("--stop needs a tokenizer.model, this checkpoint has none")
            ids = job.tokens(text, token_ids)
            engine = job.start(observe)
            generation = complete(engine, ids, sampling)
            said = (text or " ".join(map(str, ids)) + " ") if echo else None
            _write(console, engine, generation, echo=said, stream=not no_stream)
            if stats or as_json:
                engine.measure_bandwidth(generation.stats)
        if as_json:
            render.generation(console, generation)
        elif stats:
            render.stats(console, generation)
        elif temperature > 0:
            console.note(f"seed {drawn}")


def _prompt(prompt: str | None, prompt_file: Path | None, token_ids: str | None) -> str | None:
    """The text to continue; None if token ids were given or a person is to be asked."""
    if sum(given is not None for given in (prompt, prompt_file, token_ids)) > 1:
        raise UsageError("only one of --prompt, --prompt-file and --token-ids can be meant")
    if prompt_file is not None:
        return _read_text(prompt_file)
    if prompt == "-":
        return _read_stdin()
    if prompt is None and token_ids is None and not (sys.stdin and sys.stdin.isatty()):
        raise UsageError("there is no prompt", "grokctl run -p 'Once upon a time'")
    return _utf8(prompt, "prompt")


def _utf8(text: str | None, name: str) -> str | None:
    """Refuse what the shell handed over as bytes that are no text."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: is no UTF-8 text") from error
    return text


def _limited(text: str, name: str) -> str:
    if len(text) == _MOST_TEXT:
        raise UsageError(f"{name}: is longer than {_MOST_TEXT:,} characters")
    return text


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UsageError("stdin is closed, so there is no text to read")
    try:
        return _limited(sys.stdin.read(_MOST_TEXT), "stdin")
    except UnicodeDecodeError as error:
        raise UsageError("stdin: is no UTF-8 text") from error


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return _limited(file.read(_MOST_TEXT), str(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8 text") from error


def _token_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UsageError(f"token ids {text[:60]!r} are no numbers", "--token-ids 1,2,3")
    return list(map(int, parts))


def _mesh(devices: int | None, mesh: str | None) -> "MeshShape | None":
    """The mesh that the options name together; None if they name none."""
    from grokctl.model.placement import MeshShape

    if mesh is None:
        return None if devices is None else MeshShape(1, devices)
    shape = MeshShape.parse(mesh)
    if devices not in {None, shape.size}:
        raise UsageError(f"mesh {shape} has {shape.size} devices, --devices says {devices}")
    return shape


@dataclass(frozen=True)
class _Job:
    """A checkpoint, how to run it, and what is known before its weights are loaded."""

    source: "TensorSource"
    options: "EngineOptions"
    tokenizer: Path | None
    plan: "RunPlan"

    def tokens(self, text: str | None, token_ids: str | None) -> list[int]:
        """Token ids of what was given, checked."""
        ids = _token_ids(token_ids) if token_ids is not None else self.plan.encode(text or "")
        self.plan.check(ids)
        return ids

    def start(self, observe: "Observer") -> "Engine":
        """Load the weights."""
        from grokctl.infer import infer

        return infer(self.source, self.options, tokenizer=self.tokenizer, observe=observe)


def _job(
    console: "Console",
    home: Path | None,
    checkpoint: str | None,
    devices: int | None,
    mesh: str | None,
    compute: str,
    context: int | None,
    observe: "Observer",
) -> _Job:
    """Open whatever checkpoint is meant."""
    from grokctl.infer import Compute, EngineOptions, plan

    if compute not in set(Compute):
        raise UsageError(f"compute type {compute!r} is neither bfloat16 nor float32")
    asked = _mesh(devices, mesh)
    where = _home(home)
    root = where.find(checkpoint)
    source, natural = _source(console, root, observe)
    options = EngineOptions(
        mesh=asked or natural,
        compute=Compute(compute),
        context=context,
        compilation_cache=where.xla_cache,
    )
    tokenizer = root / TOKENIZER if (root / TOKENIZER).is_file() else None
    planned = plan(source.config, options, tokenizer=tokenizer)
    if kind_of(root) == "ready" and options.mesh != natural:
        console.note(
            f"cut for {natural}, runs on {options.mesh}: slower to load "
            f"(grokctl reshard --mesh {options.mesh} makes it fast)"
        )
    return _Job(source=source, options=options, tokenizer=tokenizer, plan=planned)


def _source(
    console: "Console", root: Path, observe: "Observer"
) -> tuple["TensorSource", "MeshShape"]:
    """A checkpoint of either kind, and the mesh that suits it."""
    from grokctl.model.placement import MeshShape

    if kind_of(root) == "ready":
        from grokctl.checkpoint.ready import open_ready

        ready = open_ready(root)
        if not ready.source.proven:
            console.note(f"{ready.name}: was cut from a release whose content was not proven")
        return ready, ready.mesh
    from grokctl.checkpoint.logical import ReleaseSource
    from grokctl.checkpoint.receipt import proof_of
    from grokctl.checkpoint.release import open_release

    release = open_release(root, observe=observe)
    proof = proof_of(release)
    console.note(f"{release.name}: {proof_line(proof.verified_at if proof else None, root=root)}")
    console.note("cuts the release in memory; grokctl reshard --devices N once makes this fast")
    return ReleaseSource(release), MeshShape(1, 1)


def _write(
    console: "Console",
    engine: "Engine",
    generation: "Generation",
    *,
    echo: str | None,
    stream: bool,
) -> None:
    """Print a generation as it comes, or at its end."""
    silent = console.as_json
    if echo is not None and not silent:
        console.write(echo)
    has_text = engine.tokenizer is not None
    for token in generation:
        if stream and not silent:
            console.write(token.text if has_text else f"{token.id} ")
    if silent:
        return
    if not stream:
        console.write(generation.text if has_text else " ".join(map(str, generation.ids)))
    console.write("\n")


def _converse(
    console: "Console",
    engine: "Engine",
    sampling: "Sampling",
    complete: Callable[["Engine", list[int], "Sampling"], "Generation"],
) -> None:
    """Complete one line after the other, until the end of the input."""
    from dataclasses import replace

    console.note("Type the beginning of a text; Ctrl-D ends. A base model completes, no chat.")
    turn = 0
    while (line := console.ask("> ")) is not None:
        if not line:
            continue
        drawn = replace(sampling, seed=(sampling.seed + turn) % 2**64)
        try:
            generation = complete(engine, engine.plan.encode(line), drawn)
            _write(console, engine, generation, echo=line, stream=True)
        except UsageError as error:
            console.failure(error)
        turn += 1


@app.command(epilog="Example: grokctl score --text essay.txt --compute float32")
def score(
    checkpoint: CheckpointArgument = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to score, or - for stdin.")
    ] = None,
    token_ids: TokenIdsOption = None,
    logits: Annotated[
        Path | None, typer.Option(metavar="OUT.npy", help="Write float32 (tokens, vocab).")
    ] = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    compute: ComputeOption = "bfloat16",
    context: ContextOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """How likely the model finds a text: negative log-likelihood and perplexity."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import render

        if (text is None) == (token_ids is None):
            raise UsageError("score takes either --text or --token-ids", "--text essay.txt")
        content = None
        if text is not None:
            content = _read_stdin() if text == "-" else _read_text(Path(text))
        with console.observing() as observe:
            job = _job(console, home, checkpoint, devices, mesh, compute, context, observe)
            ids = job.tokens(content, token_ids)
            with _logits_file(logits, (len(ids), job.plan.config.vocab_size)) as out:
                found = job.start(observe).score(ids, logits_out=out)
        render.score(console, found, logits)


@contextmanager
def _logits_file(
    path: Path | None, shape: tuple[int, int]
) -> Iterator["NDArray[np.float32] | None"]:
    """An array file that appears whole, or not at all."""
    if path is None:
        yield None
        return
    import numpy as np

    if path.is_dir() or not path.name:
        raise UsageError(f"{path}: is a folder", "--logits logits.npy")
    partial = path.with_name(f".{path.name}.partial")
    try:
        out = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with partial.open("r+b") as file:  # now, because a mapping that runs full kills us
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        yield out
        out.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@app.command(epilog="Example: grokctl demo --keep ./demo")
def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Leave everything in this new folder.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """The whole pipeline on a miniature: magnet, verify, reshard for 8, 4 and 16, run."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import render
        from grokctl.demo import demo as stage

        if keep is not None:
            if keep.exists():
                raise UsageError(f"{keep}: exists", "--keep a-new-folder")
            with console.observing() as observe:
                found = stage(keep, observe=observe)
        else:
            with (
                tempfile.TemporaryDirectory(prefix="grokctl-demo-") as folder,
                console.observing() as observe,
            ):
                found = stage(Path(folder), observe=observe)
        render.demonstration(console, found, keep)
        if not found.agrees:
            raise typer.Exit(ExitCode.BUG)


def parse_size(text: str | None) -> int | None:
    """Read `500kB`, `20MB`, `1.5GiB` or plain bytes.

    Raises:
        UsageError: It is something else, or not positive.
    """
    if text is None:
        return None
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    units |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    lowered = text.strip().lower().removesuffix("/s").removesuffix("b")
    number = lowered.rstrip("kmgti")
    try:
        size = float(number) * units[lowered[len(number) :]]
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"size {text!r} is not one such as 500kB or 20MB")
    return int(size)


def _peak_rss() -> int:
    """Most memory that this process ever held, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
