"""Compile every step that requests can need before the first one comes: nobody waits later."""

from grokctl.inference.chunks import Chunk
from grokctl.inference.compiled_steps import Head
from grokctl.inference.model_runner import ModelRunner
from grokctl.inference.step_logits import AdjustedRows, adjusted_widths
from grokctl.model.bucketing import SHORTEST_CHUNK, padded_batch


def warm_up(runner: ModelRunner) -> None:
    """Compile the steps of all requests that a runner's slots and context allow.

    Decode steps of every batch; chunks of every length, for their keys and values alone, with
    logits, and with scores; what draws tokens on the devices; what copies and clears slots. All
    logits of a prompt, which no server gives, are left out.

    Args:
        runner: Its slots are empty.
    """
    for length in chunk_lengths(runner.longest_chunk):
        chunk = Chunk(start=0, count=length, padded=length)
        for head in (Head.NONE, Head.LAST, Head.SCORES):
            runner.chunk_step(chunk, head)
    for batch in batches(runner.slots):
        runner.decode_step(batch)
        if runner.shape.draws_on_device:
            _draw(runner, batch)
    runner.clear(0)
    if runner.slots > 1:
        runner.copy(0, 1)


def batches(slots: int) -> list[int]:
    """Sequences of the decode steps that so many slots need, the fewest first."""
    return sorted({padded_batch(count) for count in range(1, slots + 1)})


def chunk_lengths(longest: int) -> list[int]:
    """Tokens of the chunks of prompts, the fewest first: one, or a power of two from 16."""
    powers = [1 << bits for bits in range(longest.bit_length())]
    return [length for length in powers if length == 1 or length >= SHORTEST_CHUNK]


def _draw(runner: ModelRunner, batch: int) -> None:
    """Compile the draws of a batch, which need logits: those of tokens that are written over."""
    sequences = list(range(min(batch, runner.slots)))
    runner.decode(sequences, [0] * len(sequences), [0] * len(sequences))
    vocab_size = runner.shape.config.vocab_size
    for width in adjusted_widths():
        runner.largest_logits(AdjustedRows.unchanged(batch, width=width, vocab_size=vocab_size))
        if width >= runner.past:  # a penalty has no more tokens to count
            break
