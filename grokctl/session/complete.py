"""Continue one prompt or many, and print the texts."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final

from grokctl import interrupts
from grokctl.cluster.process_group import Cluster
from grokctl.inference.engine import Engine
from grokctl.inference.generation import FinishReason, Generation, Token
from grokctl.inference.stream import Stream
from grokctl.screen import run as screen
from grokctl.screen.console import Console
from grokctl.session.job import JobRequest, open_job
from grokctl.session.prompts import Prompt, check_settings, to_requests


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
    stream: Stream,
    *,
    echo: str | None,
    is_streamed: bool,
    stop: interrupts.StopRequest | None = None,
) -> Generation:
    """Print a generation while it runs, or at its end.

    Args:
        console: Prints the text; nothing if it prints JSON.
        engine: Runs the generation.
        stream: Not yet begun.
        echo: Printed before it.
        is_streamed: Print every token at once.
        stop: Ctrl-C requests it. By default, one before the first token interrupts the whole
            command, and one after that ends the generation.

    Returns:
        The generation; `interrupted` if Ctrl-C ended it.
    """
    is_silent = console.as_json
    has_text = engine.tokenizer is not None
    has_begun = False
    with ExitStack() as stack:
        for event in stream.events():
            if isinstance(event, Token):
                has_begun = True
                if stop is None:
                    stop = stack.enter_context(interrupts.deferred())
                if echo is not None and not is_silent:
                    console.write(echo)  # not earlier: progress bars would erase it
                    echo = None
                if is_streamed and not is_silent:
                    console.write(event.text if has_text else _shown_id(event))
            if stop is not None and stop.is_made:
                stream.cancel()  # what it has said until now still comes
    generation = stream.result
    was_stopped = generation.finish_reason is FinishReason.INTERRUPTED
    if not is_silent and (has_begun or not was_stopped):
        console.write(echo or "")
        if not is_streamed:
            console.write(generation.text if has_text else " ".join(map(str, generation.ids)))
        console.write("\n")
    return generation


def _shown_id(token: Token) -> str:
    return "" if token.id is None else f"{token.id} "


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
        check_settings(prompt.settings, job.plan)
        ids = job.tokens(prompt.content)
        engine = job.start(observe)
        stream = engine.fulfil(replace(prompt.settings, prompt=ids))
        is_text = isinstance(prompt.content, str)
        text = prompt.content if is_text else " ".join(map(str, ids)) + " "
        echo = str(text) if output.echo else None
        generation = write(console, engine, stream, echo=echo, is_streamed=output.stream)
        if output.all_stats or console.as_json:
            generation = engine.measured(generation)
    if console.as_json:
        screen.generation(console, generation)
    elif output.all_stats:
        screen.stats(console, generation)
    else:
        is_drawn = prompt.settings.sampling.temperature > 0
        screen.closing(console, generation, has_loaded=True, is_drawn=is_drawn)
    return generation.finish_reason is FinishReason.INTERRUPTED


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
        stats = batch.stats
        if all_stats or console.as_json:
            stats = engine.measured_many(stats)
    if console.as_json:
        screen.generations(console, stats, len(prompts))
    elif all_stats:
        screen.stats_many(console, stats, len(prompts))
    else:
        screen.closing_many(console, stats, len(prompts))
