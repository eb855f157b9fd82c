"""Sizes of the parts of a step, for running it and for counting its memory."""

from math import ceil, log2
from typing import Final

from grokctl.model.config import GrokConfig

SHORTEST_CHUNK: Final = 16
_LONGEST_CHUNK: Final = {"cpu": 512}
"""Prompts run in chunks of a power of two tokens within these bounds: few programs are compiled."""
_LONGEST_CHUNK_ELSEWHERE: Final = 2048
POSITION_BLOCK: Final = 128
"""Positions of the cache that attention reads together."""
BLOCK: Final = 2**24
"""Bytes of a dequantised weight in memory at a time on a CPU."""
_FEW_TOKENS: Final = 2
"""Up to this many tokens an expert, on average, tokens go through experts one by one."""
_LONGEST_RUN: Final = {"cpu": 128}
_LONGEST_RUN_ELSEWHERE: Final = 1024
_TOGETHER: Final = {"cpu": 1}
"""Layers in a program: on a CPU, a layer takes so long that the call of a program costs nothing."""
_TOGETHER_ELSEWHERE: Final = 8


def room(context: int, *, platform: str) -> tuple[int, int]:
    """Longest chunk of a prompt, and positions of the cache, for a context of `context` tokens.

    The positions are a whole number of chunks, so that padding behind the last token fits.
    """
    longest = _LONGEST_CHUNK.get(platform, _LONGEST_CHUNK_ELSEWHERE)
    chunk = min(longest, max(SHORTEST_CHUNK, 1 << (context - 1).bit_length()))
    return chunk, -(-context // chunk) * chunk


def padded_batch(count: int) -> int:
    """Sequences of a step that has room for `count`: 1, 2, 3, 4, 6, 8, 12, 16, …: few programs."""
    power = 1 << (count - 1).bit_length()
    less = power * 3 // 4
    return less if count <= less and less * 4 == power * 3 else power


def rows_of_a_run(tokens: int, *, config: GrokConfig, platform: str) -> int:
    """Tokens that go through an expert together: twice as many as choose it on average."""
    mean = tokens * config.num_selected_experts / config.num_experts
    if mean <= _FEW_TOKENS:
        return 1
    longest = _LONGEST_RUN.get(platform, _LONGEST_RUN_ELSEWHERE)
    return min(tokens, longest, 1 << max(0, ceil(log2(2 * mean))))


def layers_together(platform: str) -> int:
    """How many layers a program runs."""
    return _TOGETHER.get(platform, _TOGETHER_ELSEWHERE)
