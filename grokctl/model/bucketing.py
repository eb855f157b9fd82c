"""How large the parts of a step are: for what runs them, and for what counts their memory."""

from math import ceil, log2
from typing import Final

from grokctl.model.config import GrokConfig

SHORTEST_CHUNK: Final = 16
_LONGEST_CHUNK: Final = {"cpu": 512}
"""Prompts run in chunks of a power of two within these, so that no prompt compiles its own."""
_LONGEST_CHUNK_ELSEWHERE: Final = 2048
POSITION_BLOCK: Final = 128
"""Positions of the cache that attention reads together."""
BLOCK: Final = 2**24
"""Bytes of a dequantised weight that exist at a time on a CPU."""
_FEW_TOKENS: Final = 2
"""Where experts are chosen by so few tokens each, on average, these go through one by one."""
_LONGEST_RUN: Final = {"cpu": 128}
_LONGEST_RUN_ELSEWHERE: Final = 1024
_TOGETHER: Final = {"cpu": 1}
"""Layers in a program. Calling one takes an accelerator longer than the CPU, beside a layer."""
_TOGETHER_ELSEWHERE: Final = 8


def room(context: int, *, platform: str) -> tuple[int, int]:
    """Longest chunk of a prompt, and positions of the cache for so many tokens of context.

    The positions are a whole number of chunks, so that padding behind the last one stays inside.
    """
    longest = _LONGEST_CHUNK.get(platform, _LONGEST_CHUNK_ELSEWHERE)
    chunk = min(longest, max(SHORTEST_CHUNK, 1 << (context - 1).bit_length()))
    return chunk, -(-context // chunk) * chunk


def padded_batch(count: int) -> int:
    """Sequences of a step for so many: 1, 2, 3, 4, 6, 8, 12, 16, …, so that few are compiled."""
    power = 1 << (count - 1).bit_length()
    less = power * 3 // 4
    return less if count <= less and less * 4 == power * 3 else power


def rows_of_a_run(tokens: int, *, config: GrokConfig, platform: str) -> int:
    """How many tokens go through an expert together: twice as many as choose it on average."""
    mean = tokens * config.num_selected_experts / config.num_experts
    if mean <= _FEW_TOKENS:
        return 1
    longest = _LONGEST_RUN.get(platform, _LONGEST_RUN_ELSEWHERE)
    return min(tokens, longest, 1 << max(0, ceil(log2(2 * mean))))


def layers_together(platform: str) -> int:
    """How many layers a program runs."""
    return _TOGETHER.get(platform, _TOGETHER_ELSEWHERE)
