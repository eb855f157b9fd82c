"""Declare commands, call one library function each, and turn errors into exit statuses."""

import errno
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from grokctl import __version__, interrupts
from grokctl.cli.options import (
    BindOption,
    CheckpointArgument,
    ClusterTimeoutOption,
    ComputeOption,
    ContextOption,
    CoordinatorOption,
    DevicesOption,
    HomeOption,
    JsonOption,
    KvOption,
    MeshOption,
    MirrorOption,
    NoDhtOption,
    NoLsdOption,
    NumProcessesOption,
    PeerOption,
    PortOption,
    ProcessIdOption,
    ProxyOption,
    QuietOption,
    StallOption,
    TokenIdsOption,
    TrackerOption,
    VerboseOption,
    WebSeedOption,
    check_many,
    check_prompts,
    read_counts,
    read_devices,
    read_kv,
    read_layers,
    read_mesh,
    read_prompt,
    read_size,
    read_stdin,
    read_text,
)
from grokctl.cluster.launcher import BOUND_S
from grokctl.errors import DiskFullError, ExitCode, GrokctlError, UsageError
from grokctl.model.precision import Precision
from grokctl.paths import Home, default_home, kind_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from grokctl.checkpoint.ready import ReadyCheckpoint
    from grokctl.checkpoint.release import Release
    from grokctl.cluster.process_group import Cluster
    from grokctl.fetch import Fetched
    from grokctl.screen.console import Console
    from grokctl.session.job import Wanted
    from grokctl.transfer.sources import FetchOptions
    from grokctl.verify import Verdict

_GOES_ON: Final = "interrupted; the same command goes on where it stopped"
_SEEDS: Final = 10**6
"""One of so many is drawn where none is given: few enough to type again."""
_BATCH: Final = 8


_ParseError: Final = typer.BadParameter.__base__
"""What typer raises for a command line that it cannot read; it exports only the subclass."""


class ErrorBoundary(TyperGroup):
    """The only place where a `GrokctlError` becomes an exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the command."""
        ctx.obj = "--json" in args
        if not args:
            return super().parse_args(ctx, args)  # prints the help
        with _parse_errors(as_json=ctx.obj):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            with _parse_errors(as_json=ctx.obj):
                return super().invoke(ctx)
        except GrokctlError as error:
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from error
        except BrokenPipeError as error:
            raise typer.Exit(ExitCode.OK) from error  # whoever read our output has enough


@contextmanager
def _parse_errors(*, as_json: bool) -> Iterator[None]:
    """Say what is wrong with a command line as every other failure is said."""
    try:
        yield
    except _ParseError as error:  # type: ignore[misc]  # a class of exceptions, found at run time
        from grokctl.screen.console import Console

        message = error.format_message().replace("Value error, ", "").rstrip(".")
        where = error.ctx.command_path if error.ctx else "grokctl"
        failure = UsageError(message[:1].lower() + message[1:], f"{where} --help")
        Console(as_json=as_json).failure(failure)
        raise typer.Exit(failure.exit_code) from error


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
    try:
        interrupts.install()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a narrow locale is no reason to fail
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        interrupts.leave()
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:
            interrupts.leave()
        if interrupts.is_abrupt():
            interrupts.leave(end.code if isinstance(end.code, int) else bool(end.code))
        interrupts.flush()
        raise
    except Exception:
        if not interrupts.is_abrupt():
            raise
        traceback.print_exc()
        interrupts.leave(ExitCode.BUG)
    raise AssertionError  # app() exits


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
    from grokctl.screen.console import Console

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
    except (KeyboardInterrupt, SystemError) as error:
        if isinstance(error, SystemError) and not interrupts.has_arrived():
            raise
        console.note(interrupted)
        raise typer.Exit(ExitCode.INTERRUPTED) from error


@contextmanager
def _cluster(
    console: "Console",
    by_hand: tuple[str | None, int | None, int | None],
    *,
    timeout_s: int,
    verbose: bool,
) -> Iterator["Cluster | None"]:
    """The processes that this one was started with; None if it is alone."""
    from grokctl.cluster.launcher import find_launch

    coordinator, count, rank = by_hand
    launch = find_launch(os.environ, coordinator=coordinator, num_processes=count, process_id=rank)
    if launch is None:
        yield None
        return
    from grokctl.cluster.process_group import joined

    if launch.rank:
        console.step_back(f"rank {launch.rank}", verbose=verbose)
    with joined(
        launch, bound_s=timeout_s, report=console.failure, note=console.note, verbose=verbose
    ) as cluster:
        yield cluster


def _followed(console: "Console", home: Home, wanted: "Wanted", cluster: "Cluster | None") -> bool:
    """Do what rank 0 does, unless this is rank 0 or alone; whether that was so."""
    if cluster is None or not cluster.rank:
        return False
    from grokctl.session.complete import follow

    follow(console, home, wanted, cluster)
    return True


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


@app.command(epilog="Example: grokctl doctor --accelerator h100-80gb --devices 8")
def doctor(
    accelerator: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One that is not here, such as h100-80gb, or cpu."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", help="How many of them.", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of each, such as 80GB.")
    ] = None,
    context: ContextOption = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts at a time.")] = 1,
    kv: KvOption = "compute",
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", parser=Path, help="Folder to download to.")
    ] = None,
    timeout: Annotated[
        int, typer.Option(metavar="S", min=1, max=600, help="Wait S seconds for what is silent.")
    ] = 20,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="All that was found, to paste into an issue.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """What this machine can do, or another, and the line that mends what it cannot."""
    with _ui(as_json=as_json, quiet=quiet, verbose=False) as console:  # a log is not redacted
        from grokctl import doctor as stage
        from grokctl.diagnosis.inventory import take_stock
        from grokctl.diagnosis.redaction import Redaction
        from grokctl.machine.look import look
        from grokctl.screen import doctor as report

        question = stage.Question(
            accelerator=accelerator,
            devices=devices,
            memory=read_size(memory),
            context=context,
            batch=batch,
            kv=read_kv(kv),
        )
        where = _home(home)
        machine = inventory = None
        if question.is_here:
            with console.observing() as observe:
                machine = look(where.root.absolute(), to, timeout_s=timeout, observe=observe)
            inventory = take_stock(where, timeout_s=timeout)
        found, redact = (
            stage.doctor(machine, inventory, question=question),
            Redaction.here(where.root),
        )
        if verbose:
            found = report.redacted(found, redact)
        report.show(console, found, machine, redact, is_full=verbose)
        if not found.is_ok:
            raise _ReportedError(report.failure(found))


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
    mirror: MirrorOption = None,
    web_seed: WebSeedOption = None,
    tracker: TrackerOption = None,
    torrent_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Torrent, if the swarm has none to give.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.model you have.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only files such as 'tensor0000*'.")
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="0-3,7", help="Only these layers.")] = None,
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
        from grokctl.screen import render
        from grokctl.transfer.preflight import refuse
        from grokctl.transfer.sources import FetchOptions

        options = FetchOptions(
            peers=tuple(peer or ()),
            mirrors=tuple(mirror or ()),
            web_seeds=tuple(web_seed or ()),
            trackers=tuple(tracker or ()),
            torrent_file=torrent_file,
            tokenizer=tokenizer,
            only=tuple(only or ()),
            layers=read_layers(layers),
            max_download=read_size(max_download),
            max_upload=read_size(max_upload),
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
            try:
                refuse(plan.checks, root)
            except GrokctlError as error:
                raise _ReportedError(error) from error
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
    mirror: MirrorOption = None,
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
        from grokctl.screen import render
        from grokctl.verify import raise_for

        if quick and repair:
            raise UsageError(
                "--quick --repair: expected one of them; a quick look finds no bad pieces",
                "grokctl verify --repair",
            )
        root = _home(home).find(checkpoint).absolute()
        started = time.perf_counter()

        verdict, fetched = _verify(console, root, quick=quick, rehash=rehash, jobs=jobs), None
        if verdict.damage and repair:
            from grokctl.transfer.sources import FetchOptions

            options = FetchOptions(
                peers=tuple(peer or ()),
                mirrors=tuple(mirror or ()),
                web_seeds=tuple(web_seed or ()),
                trackers=tuple(tracker or ()),
                port=port,
                bind=bind,
                proxy=proxy,
                dht=not no_dht,
                lsd=not no_lsd,
                stall_timeout_s=stall_timeout,
            )
            verdict, fetched = _repair(console, root, verdict, options, jobs=jobs)
        seconds = time.perf_counter() - started
        render.verdict(console, root, verdict, fetched, quick=quick, seconds=seconds)
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
            from grokctl.checkpoint.ready import read_manifest

            return stage.verify_ready(read_manifest(root), quick=quick, jobs=jobs, observe=observe)
        return stage.verify(root, quick=quick, rehash=rehash, jobs=jobs, observe=observe)


def _repair(
    console: "Console", root: Path, verdict: "Verdict", options: "FetchOptions", *, jobs: int | None
) -> tuple["Verdict", "Fetched"]:
    """Fetch the bad pieces, and look again; the originals are kept until that look is good."""
    from grokctl.checkpoint.receipt import trusted_metainfo
    from grokctl.checkpoint.release import release_paths
    from grokctl.fetch import fetch
    from grokctl.integrity.backup import forget, set_aside
    from grokctl.paths import TORRENT

    many = f"{len(verdict.damage)} files are damaged"
    if verdict.remedy is not None:
        raise UsageError(f"{root}: {many}; a ready checkpoint is cut again", verdict.remedy)
    metainfo = trusted_metainfo(root)
    if metainfo is None:
        raise UsageError(f"{root}: {many}, and no {TORRENT} to fetch them by", "grokctl fetch")
    for damage in verdict.damage:
        console.note(f"damaged: {damage}")
    places = release_paths(metainfo)
    with console.observing() as observe:
        aside = set_aside(root, metainfo, places, verdict.bad_pieces, observe=observe)
    have = frozenset(range(metainfo.num_pieces)) - verdict.bad_pieces
    after = verdict
    try:
        with console.observing() as observe:
            fetched = fetch(str(root / TORRENT), root, options, have=have, observe=observe)
        # what the first look proved has a receipt; only what was mended is hashed again
        after = _verify(console, root, quick=False, rehash=False, jobs=jobs)
    finally:
        if aside is not None and after.damage:
            console.note(f"what the repair overwrote is kept in {aside}")
    if not after.damage:
        forget(root)
    return after, fetched


@app.command(epilog="Example: grokctl inspect grok-1 --tensor 'layers.10.*' --stats")
def inspect(
    checkpoint: CheckpointArgument = None,
    tensor: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Single tensors such as '*.moe.gate', or '*'."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read every value: range, rms, use of int8.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads.", show_default="cores")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """List the tensors of a checkpoint; reads little of it without --stats."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from grokctl import inspect as stage
        from grokctl.screen import render

        root = _home(home).find(checkpoint).absolute()
        with console.observing() as observe:
            found = stage.inspect(root, pattern=tensor, stats=stats, jobs=jobs, observe=observe)
        render.inspection(console, found, one_by_one=tensor is not None)


@app.command(epilog="Example: grokctl reshard grok-1 --devices 16 --mesh expert=2,model=8")
def reshard(
    checkpoint: CheckpointArgument = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="int8 and float32 are lossless.", show_default="as it is: int8"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Inputs that share an int4 scale.", show_default="64"
        ),
    ] = None,
    compress: Annotated[
        str | None, typer.Option(metavar="zstd[:LEVEL]", help="Smaller files, slower to load.")
    ] = None,
    only_devices: Annotated[
        str | None, typer.Option(metavar="0-7", help="Write the files of these devices only.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to make.", show_default="ready/NAME-PRECISION-MESH"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would do, and how long it would take.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads.", show_default="cores")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="For all that is under way.", show_default="a quarter of free"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Cut a checkpoint into one file a device; goes on where it stopped."""
    with _ui(as_json=as_json, quiet=quiet, verbose=verbose, interrupted=_GOES_ON) as console:
        from grokctl import reshard as stage
        from grokctl.checkpoint.frames import Compression
        from grokctl.checkpoint.ready import open_ready
        from grokctl.checkpoint.receipt import proof_of
        from grokctl.checkpoint.release import open_release
        from grokctl.paths import kind_of
        from grokctl.resharding.estimate import estimate
        from grokctl.screen import render

        where = _home(home)
        root = where.find(checkpoint, ready=checkpoint is not None).absolute()
        compression = None if compress is None else Compression.parse(compress)
        chosen, proof = read_mesh(devices, mesh), None
        source: Release | ReadyCheckpoint
        if kind_of(root) == "ready":
            source = open_ready(root, is_streamed=True)
            chosen = chosen or source.mesh
            known = render.unhashed(root)
        else:
            with console.observing() as observe:
                source = open_release(root, observe=observe)
            proof = proof_of(source)
            known = render.proof(proof, root)
        if chosen is None:
            raise UsageError("how many devices to cut for is not said", "--devices 8")
        name = stage.usual_name(source, mesh=chosen, precision=precision, compression=compression)
        plan = stage.plan(
            source,
            mesh=chosen,
            out=(out or where.ready / name).absolute(),
            precision=precision,
            group_size=group_size,
            compression=compression,
            devices=read_devices(only_devices),
            jobs=jobs,
            max_memory=read_size(max_memory),
        )
        if dry_run:
            found = estimate(plan)
            render.reshard_plan(console, plan, found)
            try:
                stage.check_destination(plan, force=force)
                stage.check_space(plan, found.nbytes, found.free_nbytes)
            except GrokctlError as error:
                raise _ReportedError(error) from error
            return
        console.note(known)
        started = time.perf_counter()
        with console.observing() as observe:
            ready = stage.reshard(plan, proof=proof, force=force, observe=observe)
        render.resharded(
            console, ready, plan, seconds=time.perf_counter() - started, peak_rss=_peak_rss()
        )


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
    prompts_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Many, as JSON lines; - for stdin."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="N of these at a time.", show_default="8"),
    ] = None,
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
    compute: ComputeOption = None,
    kv: KvOption = "compute",
    context: ContextOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
    cluster_timeout: ClusterTimeoutOption = BOUND_S,
    stats: Annotated[
        bool, typer.Option("--stats", help="Measure the memory, and say all of how fast it was.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """Continue a text. Grok-1 is a base model: it completes, it does not chat."""
    by_hand, is_cut = (coordinator, num_processes, process_id), False
    with (
        _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        _cluster(console, by_hand, timeout_s=cluster_timeout, verbose=verbose) as cluster,
    ):
        from grokctl.inference.generation import Request
        from grokctl.model.sampling import Sampling
        from grokctl.session import settings
        from grokctl.session.job import Wanted
        from grokctl.session.prompts import read_prompts

        wanted = Wanted(checkpoint, devices, mesh, compute=compute, kv=kv, context=context)
        where = _home(home)
        if _followed(console, where, wanted, cluster):
            return
        check_prompts(
            prompt=prompt, prompt_file=prompt_file, token_ids=token_ids, prompts_file=prompts_file
        )
        check_many(prompts_file, batch=batch, echo=echo, no_stream=no_stream)
        drawn = int.from_bytes(os.urandom(4)) % _SEEDS if seed is None else seed
        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=drawn
        )
        request = Request(
            prompt=(), sampling=sampling, max_tokens=max_tokens, ignore_eos=ignore_eos
        )
        request = settings.change(request, "stop", stop or [])
        many = read_prompts(prompts_file, request) if prompts_file else None
        text = None if many else read_prompt(prompt, prompt_file, token_ids)
        is_asked = many is None and text is None and token_ids is None
        if as_json and is_asked:
            raise UsageError("there is no prompt", "grokctl run --json -p 'Once upon a time'")

        from grokctl.session.complete import complete, complete_many
        from grokctl.session.repl import converse

        if many is not None:
            size = batch or _BATCH
            complete_many(
                *(console, where, wanted, many), batch=size, all_stats=stats, cluster=cluster
            )
        elif is_asked:
            converse(console, where, wanted, request, all_stats=stats, cluster=cluster)
        else:
            is_cut = complete(
                *(console, where, wanted, request),
                text=text,
                token_ids=token_ids,
                echo=echo,
                stream=not no_stream,
                all_stats=stats,
                cluster=cluster,
            )
    if is_cut:  # which is no failure of the other processes
        console.note("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED)


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
    compute: ComputeOption = None,
    kv: KvOption = "compute",
    context: ContextOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
    cluster_timeout: ClusterTimeoutOption = BOUND_S,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """How likely the model finds a text: negative log-likelihood and perplexity."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        _cluster(console, by_hand, timeout_s=cluster_timeout, verbose=verbose) as cluster,
    ):
        from grokctl.screen import render
        from grokctl.session.job import Wanted, open_job

        wanted = Wanted(checkpoint, devices, mesh, compute=compute, kv=kv, context=context)
        if _followed(console, _home(home), wanted, cluster):
            return
        if (text is None) == (token_ids is None):
            raise UsageError("score takes either --text or --token-ids", "--text essay.txt")
        content = None
        if text is not None:
            content = read_stdin() if text == "-" else read_text(Path(text))
        with console.observing() as observe:
            job = open_job(console, _home(home), wanted, observe, cluster=cluster)
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


@app.command(epilog="Example: grokctl bench --prompt-tokens 64,512 --batch 1,4,16")
def bench(
    checkpoint: CheckpointArgument = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="64,512", help="Lengths of prompts.")
    ] = "64,512",
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", metavar="N", min=2, help="Tokens after each.")
    ] = 32,
    batch: Annotated[str, typer.Option(metavar="1,4", help="Prompts at a time.")] = "1,4",
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    compute: ComputeOption = None,
    kv: KvOption = "compute",
    context: ContextOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
    cluster_timeout: ClusterTimeoutOption = BOUND_S,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    home: HomeOption = None,
) -> None:
    """How fast it reads and writes, beside what this machine's memory allows."""
    by_hand = (coordinator, num_processes, process_id)
    with (
        _ui(as_json=as_json, quiet=quiet, verbose=verbose) as console,
        _cluster(console, by_hand, timeout_s=cluster_timeout, verbose=verbose) as cluster,
    ):
        lengths = read_counts(prompt_tokens, "--prompt-tokens")
        batches = read_counts(batch, "--batch")

        from grokctl import bench as stage
        from grokctl.screen import render
        from grokctl.session.job import Wanted, open_job

        workloads = [stage.Workload(length, many) for length in lengths for many in batches]
        wanted = Wanted(
            *(checkpoint, devices, mesh),
            compute=compute,
            kv=kv,
            context=context,
            streams=max(batches),
        )
        if _followed(console, _home(home), wanted, cluster):
            return
        with console.observing() as observe:
            job = open_job(console, _home(home), wanted, observe, cluster=cluster)
            stage.check_workloads(job.plan, workloads, max_tokens)
            found = stage.bench(
                job.start(observe), workloads, max_tokens=max_tokens, observe=observe
            )
        render.bench(console, found, job.options)


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
        from grokctl.demo import demo as stage
        from grokctl.screen import render

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


def _peak_rss() -> int:
    """Most memory that this process ever held, bytes."""
    import resource

    try:
        # what Linux counts for us alone: `ru_maxrss` begins with the memory of who started us
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
