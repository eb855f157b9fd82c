"""Continue one prompt or many, and print the texts."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from grokctl import interrupts
from grokctl.cluster.process_group import Cluster
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason, Generation
from grokctl.screen import run as screen
from grokctl.screen.console import Console
from grokctl.session.job import JobRequest, open_job
from grokctl.session.prompts import Prompt, check_stop, to_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a text is printed."""

    echo: bool = False
    """Print the prompt first."""
    stream: bool = True
    """Print every token at once, and not the whole text at its end."""
    all_stats: bool = False
    """Measure the memory bandwidth, and print all measurements."""


_PLAIN: Final = Output()


def write(
    console: Console,
    engine: Engine,
    generation: Generation,
    *,
    echo: str | None,
    stream: bool,
    stop: interrupts.StopRequest | None = None,
) -> bool:
    """Print a generation while it runs, or at its end.

    Args:
        console: Prints the text; nothing if it prints JSON.
        engine: Runs the generation.
        generation: Not yet begun.
        echo: Printed before it.
        stream: Print every token at once.
        stop: Ctrl-C requests it. By default, one before the first token interrupts the whole
            command, and one after that ends the generation.

    Returns:
        Whether Ctrl-C ended the generation.
    """
    is_silent = console.as_json
    has_text = engine.tokenizer is not None
    with ExitStack() as stack:
        for token in generation:
            if stop is None:
                stop = stack.enter_context(interrupts.deferred())
            if echo is not None and not is_silent:
                console.write(echo)  # not earlier: progress bars would erase it
                echo = None
            if stream and not is_silent:
                console.write(token.text if has_text else f"{token.id} ")
            if stop.is_made:
                break
        is_stopped = stop is not None and stop.is_made
    if is_stopped:
        generation.tokens = iter(())  # frees the engine for the next one
        generation.finish_reason = FinishReason.INTERRUPTED
    if not is_silent:
        console.write(echo or "")
        if not stream:
            console.write(generation.text if has_text else " ".join(map(str, generation.ids)))
        console.write("\n")
    return is_stopped


def complete(
    console: Console,
    request: JobRequest,
    prompt: Prompt,
    *,
    output: Output = _PLAIN,
    cluster: Cluster | None = None,
) -> bool:
    """Load a checkpoint and continue one prompt.

    Args:
        console: Prints the text and its speed.
        request: Which checkpoint, and how to run it.
        prompt: What to continue, and how.
        output: How to print it.
        cluster: The processes that run it together, if there are several.

    Returns:
        Whether Ctrl-C ended it.
    """
    with console.observing() as observe:
        job = open_job(request, cluster=cluster, observe=observe)
        check_stop(prompt.settings.stop, job.plan)
        ids = job.tokens(prompt.content)
        engine = job.start(observe)
        generation = engine.fulfil(replace(prompt.settings, prompt=ids))
        is_text = isinstance(prompt.content, str)
        text = prompt.content if is_text else " ".join(map(str, ids)) + " "
        echo = str(text) if output.echo else None
        is_stopped = write(console, engine, generation, echo=echo, stream=output.stream)
        if output.all_stats or console.as_json:
            engine.measure_bandwidth(generation.stats)
    if console.as_json:
        screen.generation(console, generation)
    elif output.all_stats:
        screen.stats(console, generation)
    else:
        is_drawn = prompt.settings.sampling.temperature > 0
        screen.closing(console, generation, has_loaded=True, is_drawn=is_drawn)
    return is_stopped


def follow(console: Console, request: JobRequest, cluster: Cluster) -> None:
    """Run what rank 0 of a cluster runs, until it is done; prints nothing.

    Args:
        console: Of a rank other than 0.
        request: The same as that of rank 0.
        cluster: The processes.
    """
    with console.observing() as observe:
        open_job(request, cluster=cluster, observe=observe).start(observe).follow()


def complete_many(
    console: Console,
    request: JobRequest,
    prompts: list[Prompt],
    *,
    all_stats: bool,
    cluster: Cluster | None = None,
) -> None:
    """Load a checkpoint, continue many prompts, and print a line of JSON when one ends.

    Args:
        console: Prints the lines, and the speed of all together.
        request: Which checkpoint, and how to run it; its sequences are the largest batch.
        prompts: What to continue, and how.
        all_stats: Measure the memory bandwidth, and print all measurements.
        cluster: The processes that run it together, if there are several.
    """
    with console.observing() as observe:
        request = replace(request, sequences=min(request.sequences, len(prompts)))
        job = open_job(request, cluster=cluster, observe=observe)
        requests = to_requests(prompts, job.plan)
        engine = job.start(observe)
        batch = engine.generate_many(requests)
        for index, generation in batch:
            screen.generation(console, generation, index=index, name=prompts[index].id)
        if all_stats or console.as_json:
            engine.measure_bandwidth(batch.stats)
    if console.as_json:
        screen.generations(console, batch.stats, len(prompts))
    elif all_stats:
        screen.stats_many(console, batch.stats, len(prompts))
    else:
        screen.closing_many(console, batch.stats, len(prompts))
