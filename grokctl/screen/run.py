"""Print the speed of generated texts, or texts and speeds as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from grokctl.text import format_bytes, format_number, format_rate, format_seconds, format_speed

if TYPE_CHECKING:  # a screen imports no stage
    from grokctl.inference.generation import BatchStats, Generation, Stats
    from grokctl.screen.console import Console
    from grokctl.screen.tables import Facts

_ENDS: Final = {"interrupted": "stopped", "context": "end of the context"}
"""Ends of a text that its reader may not expect."""


def generation(
    console: Console,
    result: Generation,
    *,
    index: int | None = None,
    name: str | int | None = None,
) -> None:
    """Print the JSON object of a run, or of one prompt of many."""
    console.emit(
        {
            **({} if index is None else {"index": index}),
            **({} if name is None else {"id": name}),
            "prompt_tokens": result.prompt_tokens,
            "tokens": result.ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "ended_by": result.ended_by,
            "seed": result.seed,
            "stats": asdict(result.stats),
        }
    )


def generations(console: Console, stats: BatchStats, prompts: int) -> None:
    """Print the JSON object of a run over many prompts, after an object for each of them."""
    console.emit(
        {
            "prompts": prompts,
            "tokens": stats.tokens,
            "prompt_tokens": stats.prompt_tokens,
            "seconds": stats.seconds,
            "stats": {
                "load_s": stats.load_s,
                "compile_s": stats.compile_s,
                "prefill_tokens_per_s": stats.prefill_tokens_per_s,
                "decode_tokens_per_s": stats.decode_tokens_per_s,
                "cached_tokens": stats.cached_tokens,
                "steps": stats.steps,
                "bytes_per_step": stats.bytes_per_step,
                "bandwidth_fraction": stats.bandwidth_fraction,
                "kernel": stats.kernel,
                "pages": stats.pages,
                "hit_rate": stats.hit_rate,
                "disk_bytes_per_token": stats.disk_bytes_per_token,
                "disk_fraction": stats.disk_fraction,
                "waited_s": stats.waited_s,
            },
        }
    )


def closing(console: Console, result: Generation, *, has_loaded: bool, is_drawn: bool) -> None:
    """Print the times and speeds of a text on one line of stderr, shorter on a narrow terminal.

    Args:
        console: Prints the line.
        result: The text.
        has_loaded: Whether the weights were loaded for it.
        is_drawn: Whether its tokens depend on the seed.
    """
    stats = result.stats
    start = [_ENDS[result.finish_reason]] if result.finish_reason in _ENDS else []
    end = [f"seed {result.seed}"] if is_drawn else []
    load = [("load", stats.load_s)] if has_loaded else []
    compiled = [("compile", stats.compile_s)] if stats.compile_s else []
    first = [("first token", stats.first_token_s)] if result.ids else []
    wide, narrow = _speeds(stats.prefill_tokens_per_s, stats.decode_tokens_per_s)
    reads = [f"{format_bytes(stats.bytes_per_token)}/token"] if result.ids else []
    forms = [" · ".join([*start, *_times(load + compiled + first), *wide, *reads, *end])]
    shorter = [(load + compiled + first, reads), (compiled + first, reads), (first, reads)]
    for times, read in (*shorter, (first, [])):
        short = ", ".join(_times(times)).replace("first token", "first")
        forms.append(" · ".join([*start, *filter(None, [short]), *narrow, *read, *end]))
    console.note_fitting(forms)


def closing_many(console: Console, stats: BatchStats, prompts: int) -> None:
    """Print the times and speeds of many texts together on one line of stderr."""
    wide, narrow = _speeds(stats.prefill_tokens_per_s, stats.decode_tokens_per_s)
    count = format_number(prompts, "prompt")
    reads = [f"{format_bytes(stats.bytes_per_step)}/step"] if stats.steps else []
    took = f"{stats.tokens:,} tokens in {format_seconds(stats.seconds)}"
    load = ("load", stats.load_s)
    times = [load, ("compile", stats.compile_s)] if stats.compile_s else [load]
    console.note_fitting(
        [
            " · ".join([count, *_times(times), took, *wide, *reads]),
            " · ".join([count, ", ".join(_times(times)), took, *narrow, *reads]),
            " · ".join([count, took, *narrow, *reads]),
            " · ".join([count, took, *narrow]),
        ]
    )


def _times(times: Iterable[tuple[str, float]]) -> list[str]:
    return [f"{name} {format_seconds(seconds)}" for name, seconds in times]


def _speeds(prefill: float, decode: float) -> tuple[list[str], list[str]]:
    """The rates that are known, in long and in short form."""
    rates = [("prefill", "in", prefill), ("decode", "out", decode)]
    wide = [f"{name} {format_speed(rate)} tokens/s" for name, _, rate in rates if rate]
    narrow = ", ".join(f"{name} {format_speed(rate)}/s" for _, name, rate in rates if rate)
    return wide, [narrow] if narrow else []


def stats(console: Console, result: Generation) -> None:
    """Print all measurements of a text on stderr."""
    measured = result.stats
    rate = measured.decode_tokens_per_s * measured.bytes_per_token
    cached = measured.cached_tokens
    console.asides(
        [
            ("load", format_seconds(measured.load_s)),
            ("compile", format_seconds(measured.compile_s)),
            ("first token", format_seconds(measured.first_token_s)),
            *_kept(cached),
            ("prefill", _counted(result.prompt_tokens - cached, measured.prefill_tokens_per_s)),
            ("decode", _counted(max(0, len(result.ids) - 1), measured.decode_tokens_per_s)),
            ("reads per token", format_bytes(measured.bytes_per_token)),
            *_bandwidth(console, rate, measured.bandwidth_fraction),
            *_on_cpu(measured),
            *_from_disk(measured),
            ("ended by", _end_of(result)),
            ("seed", str(result.seed)),
        ]
    )


def stats_many(console: Console, measured: BatchStats, prompts: int) -> None:
    """Print all measurements of many texts together on stderr."""
    rate = measured.bytes_read / measured.decode_s if measured.decode_s else 0.0
    console.asides(
        [
            ("prompts", f"{prompts:,} in {format_seconds(measured.seconds)}"),
            ("load", format_seconds(measured.load_s)),
            ("compile", format_seconds(measured.compile_s)),
            *_kept(measured.cached_tokens),
            ("prefill", _counted(measured.prefilled, measured.prefill_tokens_per_s)),
            ("decode", _counted(measured.decoded, measured.decode_tokens_per_s)),
            ("reads per step", format_bytes(measured.bytes_per_step)),
            *_bandwidth(console, rate, measured.bandwidth_fraction),
            *_on_cpu(measured),
            *_from_disk(measured),
        ]
    )


def _from_disk(measured: Stats | BatchStats) -> Facts:
    """What decoding waited for, if experts came from the disk."""
    if measured.hit_rate is None or measured.disk_bytes_per_token is None:
        return []
    words = f"{measured.hit_rate:.0%} of experts in memory"
    words += f", {format_bytes(measured.disk_bytes_per_token)} a token from the disk"
    if measured.disk_fraction is not None:
        words += f" at {measured.disk_fraction:.0%} of its rate while loading"
    waited = f", waited {format_seconds(measured.waited_s)}"
    return [("experts", f"{words}{waited}")]


def _on_cpu(measured: Stats | BatchStats) -> Facts:
    """What multiplies on a CPU, and how weights lie in its memory."""
    facts = [("kernel", measured.kernel), ("pages", measured.pages)]
    return [(name, words) for name, words in facts if words]


def _end_of(result: Generation) -> str:
    """The reason of an end, and the stop string or token."""
    if result.ended_by is None:
        return str(result.finish_reason)
    is_token = isinstance(result.ended_by, int)
    return f"{result.finish_reason} ({'token ' if is_token else ''}{result.ended_by!r})"


def _kept(tokens: int) -> Facts:
    """Tokens of prompts that did not run again."""
    return [("kept prefix", format_number(tokens, "token"))] if tokens else []


def _counted(tokens: int, rate: float) -> str:
    count = format_number(tokens, "token")
    return f"{count} at {format_speed(rate)} tokens/s" if rate else count


def _bandwidth(console: Console, rate: float, share: float | None) -> Facts:
    """The share of the measured memory bandwidth that reading took, if it was measured."""
    if not share:
        return []
    reached = f"{share:.0%} of the {format_rate(rate / share)} measured now"
    return [("bandwidth", f"{console.gauge(share)} {reached}")]
