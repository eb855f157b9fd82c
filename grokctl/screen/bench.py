"""A table of speeds beside the memory's limit."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from grokctl.text import format_bytes, format_rate, format_seconds, format_speed

if TYPE_CHECKING:  # a verb pays for its own stage only
    from grokctl.bench import Bench
    from grokctl.inference.plan import EngineOptions
    from grokctl.screen.console import Console


def bench(console: Console, found: Bench, options: EngineOptions) -> None:
    """A table of speeds, each with a bar against what the memory gives."""
    if console.as_json:
        console.emit(
            {
                "devices": options.mesh.size,
                "mesh": str(options.mesh),
                "compute": options.compute,
                "kv": options.kv,
                "max_tokens": found.max_tokens,
                "load_s": found.load_s,
                "compile_s": found.compile_s,
                "bandwidth_bytes_per_s": found.bandwidth,
                "rows": [asdict(row) for row in found.rows],
            }
        )
        return
    limit = format_rate(found.bandwidth)
    console.table(
        f"{found.max_tokens} tokens after each prompt; the limit is this memory's {limit}",
        ("prompt", "batch", "prefill", "first token", "decode", "a step", "reads", "of the limit"),
        [
            (
                f"{row.prompt_tokens:,}",
                f"{row.batch:,}",
                f"{format_speed(row.prefill_tokens_per_s)}/s",
                f"{format_speed(1000 * row.first_token_s)} ms",
                f"{format_speed(row.decode_tokens_per_s)}/s",
                f"{format_speed(1000 * row.step_s)} ms",
                format_bytes(row.bytes_per_step),
                f"{console.gauge(row.bandwidth_fraction, 10)} {row.bandwidth_fraction:4.0%}",
            )
            for row in found.rows
        ],
        right=("prompt", "batch", "prefill", "first token", "decode", "a step", "reads"),
        optional=("reads", "first token", "prefill"),
    )
    console.note(
        f"load {format_seconds(found.load_s)} · compile {format_seconds(found.compile_s)} · "
        "rates count the tokens of a whole batch"
    )
