"""Continue one prompt or many with the checkpoint that is meant, and write what comes."""

from contextlib import ExitStack
from dataclasses import replace

from grokctl import interrupts
from grokctl.cluster.process_group import Cluster
from grokctl.errors import UsageError
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason, Generation, Request
from grokctl.paths import Home
from grokctl.screen import run as screen
from grokctl.screen.console import Console
from grokctl.session.job import Wanted, open_job
from grokctl.session.prompts import Prompt, to_requests


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
    cluster: Cluster | None = None,
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
        cluster: The processes that do it together, if there are several.

    Returns:
        Whether Ctrl-C ended it.
    """
    with console.observing() as observe:
        job = open_job(console, home, wanted, observe, cluster=cluster)
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
        screen.generation(console, generation)
    elif all_stats:
        screen.stats(console, generation)
    else:
        is_drawn = request.sampling.temperature > 0
        screen.closing(console, generation, has_loaded=True, is_drawn=is_drawn)
    return is_cut


def follow(console: Console, home: Home, wanted: Wanted, cluster: Cluster) -> None:
    """Do what rank 0 of a cluster does, until it is done; of every other rank, and without a word.

    Args:
        console: Gets notes.
        home: Where checkpoints are.
        wanted: What the options say here, which is what they say there.
        cluster: The processes.
    """
    with console.observing() as observe:
        open_job(console, home, wanted, observe, cluster=cluster).start(observe).follow()


def complete_many(
    console: Console,
    home: Home,
    wanted: Wanted,
    prompts: list[Prompt],
    *,
    batch: int,
    all_stats: bool,
    cluster: Cluster | None = None,
) -> None:
    """Load a checkpoint, continue many prompts, and print a JSON line for each when it ends.

    Args:
        console: Gets the lines, and what all of them took together.
        home: Where checkpoints are.
        wanted: Which one, and how to run it.
        prompts: What to continue, and how.
        batch: How many at a time.
        all_stats: Whether to measure the memory, and say everything that was measured.
        cluster: The processes that do it together, if there are several.
    """
    with console.observing() as observe:
        wanted = replace(wanted, streams=min(batch, len(prompts)))
        job = open_job(console, home, wanted, observe, cluster=cluster)
        requests = to_requests(prompts, job.plan)
        engine = job.start(observe)
        running = engine.generate_many(requests)
        for index, generation in running:
            screen.generation(console, generation, index=index, name=prompts[index].id)
        if all_stats or console.as_json:
            engine.measure_bandwidth(running.stats)
    if console.as_json:
        screen.generations(console, running.stats, len(prompts))
    elif all_stats:
        screen.stats_many(console, running.stats, len(prompts))
    else:
        screen.closing_many(console, running.stats, len(prompts))
