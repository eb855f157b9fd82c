"""What a run generated, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from grokctl.text import format_bytes, format_number, format_rate, format_seconds, format_speed

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.inference.generation import BatchStats, Generation
    from grokctl.screen.console import Console, Facts


def generation(
    console: Console,
    result: Generation,
    *,
    index: int | None = None,
    name: str | int | None = None,
) -> None:
    """The JSON object of a run, or of one prompt of many; people have read the text already."""
    console.emit(
        {
            **({} if index is None else {"index": index}),
            **({} if name is None else {"id": name}),
            "prompt_tokens": result.prompt_tokens,
            "tokens": result.ids,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            "stats": asdict(result.stats),
        }
    )


def generations(console: Console, stats: BatchStats, prompts: int) -> None:
    """The JSON object of a run over many prompts, which had an object each before."""
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
                "steps": stats.steps,
                "bytes_per_step": stats.bytes_per_step,
                "bandwidth_fraction": stats.bandwidth_fraction,
            },
        }
    )


def closing(console: Console, result: Generation, *, has_loaded: bool, is_drawn: bool) -> None:
    """What one text took, in a line on stderr: in fewer words where that is narrow.

    Args:
        console: Whose terminal it is.
        result: The text.
        has_loaded: Whether the weights were loaded for it.
        is_drawn: Whether its seed matters.
    """
    found = result.stats
    start = ["stopped"] if result.finish_reason == "interrupted" else []
    end = [f"seed {result.seed}"] if is_drawn else []
    load = [("load", found.load_s)] if has_loaded else []
    compiled = [("compile", found.compile_s)] if found.compile_s else []
    first = [("first token", found.first_token_s)] if result.ids else []
    wide, narrow = _speeds(found.prefill_tokens_per_s, found.decode_tokens_per_s)
    reads = [f"{format_bytes(found.bytes_per_token)}/token"] if result.ids else []
    forms = [" · ".join([*start, *_times(load + compiled + first), *wide, *reads, *end])]
    for times in (load + compiled + first, compiled + first, first):
        short = ", ".join(_times(times)).replace("first token", "first")
        forms.append(" · ".join([*start, *filter(None, [short]), *narrow, *reads, *end]))
    console.note_fitting(forms)


def closing_many(console: Console, stats: BatchStats, prompts: int) -> None:
    """What many texts took together, in a line on stderr."""
    wide, narrow = _speeds(stats.prefill_tokens_per_s, stats.decode_tokens_per_s)
    many = format_number(prompts, "prompt")
    reads = [f"{format_bytes(stats.bytes_per_step)}/step"] if stats.steps else []
    took = f"{stats.tokens:,} tokens in {format_seconds(stats.seconds)}"
    load = ("load", stats.load_s)
    times = [load, ("compile", stats.compile_s)] if stats.compile_s else [load]
    console.note_fitting(
        [
            " · ".join([many, *_times(times), took, *wide, *reads]),
            " · ".join([many, ", ".join(_times(times)), took, *narrow, *reads]),
            " · ".join([many, took, *narrow, *reads]),
            " · ".join([many, took, *narrow]),
        ]
    )


def _times(times: Iterable[tuple[str, float]]) -> list[str]:
    return [f"{name} {format_seconds(seconds)}" for name, seconds in times]


def _speeds(prefill: float, decode: float) -> tuple[list[str], list[str]]:
    """Both rates, as far as there are any, in many words and in few."""
    rates = [("prefill", "in", prefill), ("decode", "out", decode)]
    wide = [f"{name} {format_speed(rate)} tokens/s" for name, _, rate in rates if rate]
    narrow = ", ".join(f"{name} {format_speed(rate)}/s" for _, name, rate in rates if rate)
    return wide, [narrow] if narrow else []


def stats(console: Console, result: Generation) -> None:
    """All that was measured of one text, on stderr."""
    found = result.stats
    rate = found.decode_tokens_per_s * found.bytes_per_token
    console.asides(
        [
            ("load", format_seconds(found.load_s)),
            ("compile", format_seconds(found.compile_s)),
            ("first token", format_seconds(found.first_token_s)),
            ("prefill", _counted(result.prompt_tokens, found.prefill_tokens_per_s)),
            ("decode", _counted(max(0, len(result.ids) - 1), found.decode_tokens_per_s)),
            ("a token reads", format_bytes(found.bytes_per_token)),
            *_bandwidth(console, rate, found.bandwidth_fraction),
            ("ended by", str(result.finish_reason)),
            ("seed", str(result.seed)),
        ]
    )


def stats_many(console: Console, found: BatchStats, prompts: int) -> None:
    """All that was measured of many texts together, on stderr."""
    rate = found.bytes_read / found.decode_s if found.decode_s else 0.0
    console.asides(
        [
            ("prompts", f"{prompts:,} in {format_seconds(found.seconds)}"),
            ("load", format_seconds(found.load_s)),
            ("compile", format_seconds(found.compile_s)),
            ("prefill", _counted(found.prompt_tokens, found.prefill_tokens_per_s)),
            ("decode", _counted(found.decoded, found.decode_tokens_per_s)),
            ("a step reads", format_bytes(found.bytes_per_step)),
            *_bandwidth(console, rate, found.bandwidth_fraction),
        ]
    )


def _counted(tokens: int, rate: float) -> str:
    many = format_number(tokens, "token")
    return f"{many} at {format_speed(rate)} tokens/s" if rate else many


def _bandwidth(console: Console, rate: float, share: float | None) -> Facts:
    """What was read beside what the memory was measured to give, if it was."""
    if not share:
        return []
    reach = f"{share:.0%} of the {format_rate(rate / share)} measured now"
    return [("its memory", f"{console.gauge(share)} {reach}")]
