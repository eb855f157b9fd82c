"""Sizes of the parts of a step, for running it and for counting its memory."""

from math import ceil, log2
from typing import Final

from grokctl.model.config import GrokConfig

SHORTEST_CHUNK: Final = 16
_LONGEST_CHUNK: Final = {"cpu": 512}
"""Prompts run in chunks of a power of two tokens within these bounds: few programs are compiled."""
_LONGEST_CHUNK_ELSEWHERE: Final = 4096
_ROUNDED: Final = 2048
"""Positions of the cache are a multiple of this, or of a shorter chunk."""
POSITION_BLOCK: Final = 128
"""Positions of the cache that attention reads together on a CPU, and at least elsewhere."""
_LARGEST_POSITION_BLOCK: Final = 1024
_LOGITS: Final = 2**27
"""Bytes of the logits of a block: accelerators read fewer positions together for more of them."""
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
_LONGEST_RUN: Final = 128
_CAPACITIES: Final = (0.5, 1.0, 1.25, 1.5, 2.0)
"""Tokens that an accelerator runs through an expert together, in shares of the mean: close to each
other around it, so that little of a product is padding; each is compiled."""
MOST_IN_KERNEL: Final = 32
"""Up to this many tokens, a GPU with the kernels of `model/kernels` runs experts in them."""
_TOGETHER: Final = 64
"""Layers in a program that decodes on an accelerator: each program has its weights, and a CUDA
graph that runs with the same arguments is not recorded again. Elsewhere, and with more sequences
than `MOST_IN_KERNEL`, a layer takes so long that the call of a program costs nothing."""


def room(context: int, *, platform: str) -> tuple[int, int]:
    """Longest chunk of a prompt, and positions of the cache, for a context of `context` tokens.

    The positions are a whole number of chunks, or of halves, so that most padding behind the last
    token fits.
    """
    longest = _LONGEST_CHUNK.get(platform, _LONGEST_CHUNK_ELSEWHERE)
    chunk = min(longest, max(SHORTEST_CHUNK, 1 << (context - 1).bit_length()))
    rounded = min(chunk, _ROUNDED)
    return chunk, -(-context // rounded) * rounded


def position_block(queries: int, *, platform: str) -> int:
    """Positions of the cache that attention reads together.

    Args:
        queries: Vectors that look at them: tokens times heads.
        platform: `cpu`, `gpu` or `tpu`.
    """
    if platform == "cpu":
        return POSITION_BLOCK
    fitting = max(1, _LOGITS // (_FLOAT32 * queries))
    return max(POSITION_BLOCK, min(_LARGEST_POSITION_BLOCK, 1 << (fitting.bit_length() - 1)))


def padded_batch(count: int) -> int:
    """Sequences of a step that has room for `count`: 1, 2, 3, 4, 6, 8, 12, 16, …: few programs."""
    power = 1 << (count - 1).bit_length()
    less = power * 3 // 4
    return less if count <= less and less * 4 == power * 3 else power


def rows_of_a_run(
    tokens: int, *, config: GrokConfig, platform: str, operand: int, skips_padding: bool = False
) -> int:
    """Tokens that go through an expert together: mostly twice as many as choose it on average.

    Accelerators have more of them: see `capacities`.

    Args:
        tokens: All tokens of a step.
        config: The model.
        platform: `cpu`, `gpu` or `tpu`.
        operand: Bytes of one operand of a matrix product.
        skips_padding: Whether rows of padding cost nothing: then an expert is read once for all
            tokens that chose it.
    """
    if skips_padding:
        return min(tokens, _LONGEST_RUN)
    mean = tokens * config.num_selected_experts / config.num_experts
    if mean <= _FEW_TOKENS:
        return 1
    if platform == "cpu" and operand == _FLOAT32 and mean <= _SHORT_RUN:
        return min(tokens, _SHORT_RUN)
    if platform != "cpu":
        return capacities(tokens, config=config)[-1]
    return min(tokens, _LONGEST_RUN, 1 << max(0, ceil(log2(2 * mean))))


def capacities(tokens: int, *, config: GrokConfig) -> tuple[int, ...]:
    """Numbers of tokens, of which an accelerator runs the next larger one through an expert."""
    mean = tokens * config.num_selected_experts / config.num_experts
    return tuple(sorted({min(tokens, ceil(mean * share)) for share in _CAPACITIES}))


def rows_in_kernel(tokens: int, *, config: GrokConfig, most: int) -> int:
    """Tokens that go through an expert together in the kernels for GPUs.

    Args:
        tokens: All tokens of a step.
        config: The model.
        most: Rows that the kernels take.
    """
    mean = tokens * config.num_selected_experts / config.num_experts
    return min(tokens, most, 1 << max(0, ceil(log2(2 * mean))))


def score_width(tokens: int, *, vocab: int, embed: int) -> int:
    """How many tokens of the vocabulary get their logits at a time, for so many positions.

    All of them, if their logits are few enough: any part of the embedding would be copied.
    """
    if tokens * vocab * _FLOAT32 <= BLOCK:
        return vocab
    room = max(1, min(SCORED // (_FLOAT32 * embed), BLOCK // (_FLOAT32 * tokens)))
    return max(width for width in range(1, min(vocab, room) + 1) if vocab % width == 0)


def layers_together(platform: str, *, batch: int, time: int) -> int:
    """How many layers a program runs, for so many tokens of each of so many sequences."""
    return _TOGETHER if platform != "cpu" and time == 1 and batch <= MOST_IN_KERNEL else 1
