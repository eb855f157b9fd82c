"""What `run` and `score` share: open the checkpoint that is meant, load it, write its text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from grokctl import render
from grokctl.arguments import read_mesh, read_token_ids
from grokctl.checkpoint.logical import ReleaseSource, TensorSource
from grokctl.checkpoint.ready import open_ready
from grokctl.checkpoint.receipt import proof_of
from grokctl.checkpoint.release import open_release
from grokctl.console import Console
from grokctl.errors import UsageError
from grokctl.events import Observer
from grokctl.generation import Generation
from grokctl.infer import Compute, Engine, EngineOptions, RunPlan, plan, start
from grokctl.model.placement import MeshShape
from grokctl.model.sampling import Sampling
from grokctl.paths import TOKENIZER, Home, kind_of


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


def open_job(
    console: Console,
    home: Home,
    checkpoint: str | None,
    devices: int | None,
    mesh: str | None,
    compute: str,
    context: int | None,
    observe: Observer,
) -> Job:
    """Open whatever checkpoint is meant."""
    if compute not in set(Compute):
        raise UsageError(f"compute type {compute!r} is neither bfloat16 nor float32")
    asked = read_mesh(devices, mesh)
    root = home.find(checkpoint)
    source, natural = _source(console, root, observe)
    options = EngineOptions(
        mesh=asked or natural,
        compute=Compute(compute),
        context=context,
        compilation_cache=home.xla_cache,
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


def converse(
    console: Console,
    engine: Engine,
    sampling: Sampling,
    complete: Callable[[Engine, list[int], Sampling], Generation],
) -> None:
    """Complete one line after the other, until the end of the input."""
    console.note("Type the beginning of a text; Ctrl-D ends. A base model completes, no chat.")
    turn = 0
    while (line := console.ask("> ")) is not None:
        if not line:
            continue
        drawn = replace(sampling, seed=(sampling.seed + turn) % 2**64)
        try:
            generation = complete(engine, engine.plan.encode(line), drawn)
            write(console, engine, generation, echo=line, stream=True)
        except UsageError as error:
            console.failure(error)
        turn += 1
