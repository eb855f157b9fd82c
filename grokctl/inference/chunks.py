"""How the rest of a prompt is cut into chunks, each of which a compiled step runs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from grokctl.model.bucketing import SHORTEST_CHUNK

LONGEST_SWEEP: Final = 2048
"""Tokens of a prompt that run together where experts are streamed: with more, a CPU computes for
longer than a disk reads. Their hidden states between layers take 150 MB of Grok-1."""
_BESIDE_DECODE: Final = {"cpu": 128}
"""Most tokens of prompts in a turn that other sequences wait for to decode."""
_BESIDE_DECODE_ELSEWHERE: Final = 512


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of a prompt that run together."""

    start: int
    """Position of the first."""
    count: int
    padded: int
    """`count` and the padding behind: the length of the step."""

    @property
    def end(self) -> int:
        """Position behind the last."""
        return self.start + self.count


def turn_budget(longest: int, platform: str, *, is_decoding: bool, is_streamed: bool) -> int:
    """Tokens of prompts in a turn.

    Args:
        longest: Most tokens of a chunk.
        platform: `cpu`, `gpu` or `tpu`.
        is_decoding: Whether other sequences wait for the turn to end.
        is_streamed: Whether experts are streamed: a few tokens read as many of them as a sweep.
    """
    if is_streamed:
        return LONGEST_SWEEP
    if not is_decoding:
        return longest
    return min(longest, _BESIDE_DECODE.get(platform, _BESIDE_DECODE_ELSEWHERE))


def padded_length(count: int, *, longest: int) -> int:
    """Length of the step for `count` tokens: 1, or a power of two from 16 to `longest`."""
    if count == 1:
        return 1
    return min(longest, max(SHORTEST_CHUNK, 1 << (count - 1).bit_length()))


def next_chunk(start: int, end: int, *, longest: int, past: int) -> Chunk:
    """The next tokens of a prompt to run.

    A step writes `padded` positions of the cache, and XLA moves a write that would reach behind
    the cache to lower positions, over other tokens, without a word. So a chunk near the end of the
    cache is short; and if even the shortest does not fit, it starts earlier, with up to 15 tokens
    that have run before.

    Args:
        start: Position of the first token that has not run.
        end: Length of the prompt, at least `start + 1`.
        longest: Most tokens of a chunk, a power of two, at least 16.
        past: Positions of the cache, a multiple of 16, at least `end`.
    """
    rest = end - start
    padded = padded_length(rest, longest=longest)
    while start + padded > past and padded > SHORTEST_CHUNK:
        padded //= 2
    start = min(start, past - padded)
    return Chunk(start=start, count=min(end - start, padded), padded=padded)


def joined(parts: Iterable[tuple[Chunk, NDArray[Any]]]) -> NDArray[Any]:
    """Rows of consecutive chunks, without padding and those of tokens that have run before.

    Args:
        parts: Chunks, each with a row for each of its tokens, and for padding.
    """
    rows: list[NDArray[Any]] = []
    end: int | None = None
    for chunk, array in parts:
        begin = chunk.start if end is None else end
        rows.append(array[begin - chunk.start : chunk.count])
        end = chunk.end
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def chunks(start: int, end: int, *, longest: int, past: int) -> Iterator[Chunk]:
    """All chunks of a prompt, in order; see `next_chunk`."""
    while start < end:
        chunk = next_chunk(start, end, longest=longest, past=past)
        yield chunk
        start = chunk.end
