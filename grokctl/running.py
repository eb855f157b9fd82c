"""What `run`, `score` and `bench` share: open the checkpoint meant, load it, write its text."""

from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from grokctl import interrupts, render
from grokctl.arguments import read_mesh, read_token_ids
from grokctl.checkpoint.logical import ReleaseSource, TensorSource
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.receipt import proof_of
from grokctl.checkpoint.release import open_release
from grokctl.console import Console
from grokctl.errors import UsageError
from grokctl.events import Observer
from grokctl.generation import FinishReason, Generation, Request
from grokctl.infer import Engine, EngineOptions, RunPlan, plan, start
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, KvType
from grokctl.paths import TOKENIZER, Home, kind_of
from grokctl.prompts import Prompt, to_requests


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options say about the checkpoint, and about how to run it."""

    checkpoint: str | None
    devices: int | None
    mesh: str | None
    _: KW_ONLY
    compute: str
    kv: str
    context: int | None
    streams: int = 1
    """Sequences that run at a time."""


@dataclass(frozen=True)
class Job:
    """A checkpoint, how to run it, and what is known before its weights are loaded."""

    source: TensorSource
    options: EngineOptions
    plan: RunPlan

    def tokens(self, text: str | None, token_ids: str | None) -> list[int]:
        """Token ids of what was given, checked."""
        ids = read_token_ids(token_ids) if token_ids is not None else self.plan.encode(text or "")
        self.plan.check(ids)
        return ids

    def start(self, observe: Observer) -> Engine:
        """Load the weights."""
        return start(self.source, self.options, self.plan, observe=observe)


def open_job(console: Console, home: Home, wanted: Wanted, observe: Observer) -> Job:
    """Open whatever checkpoint is meant."""
    if wanted.compute not in set(Compute):
        raise UsageError(f"compute type {wanted.compute!r} is neither bfloat16 nor float32")
    if wanted.kv not in set(KvType):
        raise UsageError(f"type of the cache {wanted.kv!r} is neither compute nor int8")
    asked = read_mesh(wanted.devices, wanted.mesh)
    root = home.find(wanted.checkpoint)
    source, natural = _source(console, root, observe)
    options = EngineOptions(
        mesh=asked or natural,
        compute=Compute(wanted.compute),
        context=wanted.context,
        compilation_cache=home.xla_cache,
        streams=wanted.streams,
        kv=KvType(wanted.kv),
    )
    tokenizer = root / TOKENIZER if (root / TOKENIZER).is_file() else None
    planned = plan(source.config, options, tokenizer=tokenizer)
    if kind_of(root) == "ready" and options.mesh != natural:
        console.note(
            f"cut for {natural}, runs on {options.mesh}: slower to load "
            f"(grokctl reshard --mesh {options.mesh} makes it fast)"
        )
    return Job(source=source, options=options, plan=planned)


def _source(console: Console, root: Path, observe: Observer) -> tuple[TensorSource, MeshShape]:
    """A checkpoint of either kind, and the mesh that suits it."""
    if kind_of(root) == "ready":
        ready = open_ready(root)
        if not ready.source.proven:
            console.note(f"{ready.name}: was cut from a release whose content was not proven")
        return ready, ready.mesh

    release = open_release(root, observe=observe)
    console.note(render.proof(proof_of(release), root))
    console.note("cuts the release in memory; grokctl reshard --devices N once makes this fast")
    return ReleaseSource(release), MeshShape(1, 1)


def write(
    console: Console,
    engine: Engine,
    generation: Generation,
    *,
    echo: str | None,
    stream: bool,
    asked: interrupts.Asked | None = None,
) -> bool:
    """Print a generation as it comes, or at its end.

    Args:
        console: Gets the text; nothing if it takes JSON.
        engine: Whose it is.
        generation: Not yet begun.
        echo: What to print before it.
        stream: Whether to print it as it comes.
        asked: Tells whether Ctrl-C was pressed; without it, one that is pressed after the first
            token ends the generation, and one before it everything.

    Returns:
        Whether Ctrl-C ended it.
    """
    silent = console.as_json
    has_text = engine.tokenizer is not None
    with ExitStack() as stack:
        for token in generation:
            if asked is None:
                asked = stack.enter_context(interrupts.deferred())
            if echo is not None and not silent:
                console.write(echo)  # not before: bars would wipe it off
                echo = None
            if stream and not silent:
                console.write(token.text if has_text else f"{token.id} ")
            if asked.to_end:
                break
        is_cut = asked is not None and asked.to_end
    if is_cut:
        generation.tokens = iter(())  # whatever it holds is free for the next one
        generation.finish_reason = FinishReason.INTERRUPTED
    if not silent:
        console.write(echo or "")
        if not stream:
            console.write(generation.text if has_text else " ".join(map(str, generation.ids)))
        console.write("\n")
    return is_cut


def complete(
    console: Console,
    home: Home,
    wanted: Wanted,
    request: Request,
    *,
    text: str | None,
    token_ids: str | None,
    echo: bool,
    stream: bool,
    all_stats: bool,
) -> bool:
    """Load a checkpoint and continue one prompt.

    Args:
        console: Gets the text and what it took.
        home: Where checkpoints are.
        wanted: Which one, and how to run it.
        request: How to continue; has no prompt yet.
        text: The prompt, unless there are token ids.
        token_ids: As they were typed.
        echo: Whether to print the prompt first.
        stream: Whether to print the text as it comes.
        all_stats: Whether to measure the memory, and say everything that was measured.

    Returns:
        Whether Ctrl-C ended it.
    """
    with console.observing() as observe:
        job = open_job(console, home, wanted, observe)
        if request.stop and job.plan.tokenizer is None:
            raise UsageError("--stop needs a tokenizer.model, this checkpoint has none")
        ids = job.tokens(text, token_ids)
        engine = job.start(observe)
        generation = engine.fulfil(replace(request, prompt=tuple(ids)))
        said = (text or " ".join(map(str, ids)) + " ") if echo else None
        is_cut = write(console, engine, generation, echo=said, stream=stream)
        if all_stats or console.as_json:
            engine.measure_bandwidth(generation.stats)
    if console.as_json:
        render.generation(console, generation)
    elif all_stats:
        render.stats(console, generation)
    else:
        is_drawn = request.sampling.temperature > 0
        render.closing(console, generation, has_loaded=True, is_drawn=is_drawn)
    return is_cut


def complete_many(
    console: Console,
    home: Home,
    wanted: Wanted,
    prompts: list[Prompt],
    *,
    batch: int,
    all_stats: bool,
) -> None:
    """Load a checkpoint, continue many prompts, and print a JSON line for each when it ends.

    Args:
        console: Gets the lines, and what all of them took together.
        home: Where checkpoints are.
        wanted: Which one, and how to run it.
        prompts: What to continue, and how.
        batch: How many at a time.
        all_stats: Whether to measure the memory, and say everything that was measured.
    """
    with console.observing() as observe:
        wanted = replace(wanted, streams=min(batch, len(prompts)))
        job = open_job(console, home, wanted, observe)
        requests = to_requests(prompts, job.plan)
        engine = job.start(observe)
        running = engine.generate_many(requests)
        for index, generation in running:
            render.generation(console, generation, index=index, name=prompts[index].id)
        if all_stats or console.as_json:
            engine.measure_bandwidth(running.stats)
    if console.as_json:
        render.generations(console, running.stats, len(prompts))
    elif all_stats:
        render.stats_many(console, running.stats, len(prompts))
    else:
        render.closing_many(console, running.stats, len(prompts))
