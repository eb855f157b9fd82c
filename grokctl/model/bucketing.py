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
"""Bytes of a dequantised weight in memory at a time on a CPU, and of logits that are scored."""
_FLOAT32: Final = 4
"""Bytes."""
SCORED: Final = 2**25
"""Bytes of the embedding's rows that scores cut out at a time; their logits take a block."""
TOP_LOGPROBS: Final = 20
"""Likeliest tokens that scores give of a position; a smaller vocabulary has fewer."""
_FEW_TOKENS: Final = 2
"""Up to this many tokens an expert, on average, tokens go through experts one by one."""
_SHORT_RUN: Final = 4
"""On a CPU with float32 operands, tokens of a run while no more choose an expert on average: there
a row of padding costs as much as a token (docs/adr/0009)."""
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


def rows_of_a_run(
    tokens: int, *, config: GrokConfig, platform: str, operand: int, skips_padding: bool = False
) -> int:
    """Tokens that go through an expert together: mostly twice as many as choose it on average.

    Args:
        tokens: All tokens of a step.
        config: The model.
        platform: `cpu`, `gpu` or `tpu`.
        operand: Bytes of one operand of a matrix product.
        skips_padding: Whether rows of padding cost nothing: then an expert is read once for all
            tokens that chose it.
    """
    if skips_padding:
        return min(tokens, _LONGEST_RUN.get(platform, _LONGEST_RUN_ELSEWHERE))
    mean = tokens * config.num_selected_experts / config.num_experts
    if mean <= _FEW_TOKENS:
        return 1
    if platform == "cpu" and operand == _FLOAT32 and mean <= _SHORT_RUN:
        return min(tokens, _SHORT_RUN)
    longest = _LONGEST_RUN.get(platform, _LONGEST_RUN_ELSEWHERE)
    return min(tokens, longest, 1 << max(0, ceil(log2(2 * mean))))


def score_width(tokens: int, *, vocab: int, embed: int) -> int:
    """How many tokens of the vocabulary get their logits at a time, for so many positions.

    All of them, if their logits are few enough: any part of the embedding would be copied.
    """
    if tokens * vocab * _FLOAT32 <= BLOCK:
        return vocab
    room = max(1, min(SCORED // (_FLOAT32 * embed), BLOCK // (_FLOAT32 * tokens)))
    return max(width for width in range(1, min(vocab, room) + 1) if vocab % width == 0)


def layers_together(platform: str) -> int:
    """How many layers a program runs."""
    return _TOGETHER.get(platform, _TOGETHER_ELSEWHERE)
