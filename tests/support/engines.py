"""What the tests of real engines share: questions to one, its answers, and mistakes in a file."""

import json
import pydoc_data.topics
import random
import subprocess
import sys

import numpy as np
from places import TESTS

from grokctl.checkpoint.gguf import read_gguf


def note(*words):
    """Say what was measured; `pytest -s` shows it."""
    sys.stdout.write(f"{' '.join(map(str, words))}\n")


def asked(script, model, job, folder, name):
    """What an engine answers in a process of its own; its log if it fails."""
    question, answer = folder / "question.json", folder / name
    question.write_text(json.dumps(job))
    program = TESTS / "engines" / script
    command = [sys.executable, *map(str, (program, model, question, answer))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return answer


def logits(model, tokens, folder):
    return np.load(asked("ik_engine.py", model, {"tokens": tokens}, folder, "logits.npy"))


def shares(found, wanted):
    """The root mean square error of each position, as a share of the logits' deviation."""
    return np.sqrt(((found - wanted) ** 2).mean(axis=1)) / wanted.std()


def texts() -> list[str]:
    """A thousand texts: parts of Python's reference, and random characters."""
    drawn = random.Random(0)
    whole = "\n".join(pydoc_data.topics.topics.values())
    starts = [drawn.randrange(len(whole) - 300) for _ in range(500)]
    found = [whole[start : start + drawn.randrange(1, 300)] for start in starts]
    letters = "ab 1\n\t ,.éß日本語🙂▁[]\r<|>"
    found += ["".join(drawn.choices(letters, k=drawn.randrange(1, 60))) for _ in range(500)]
    return [text for text in found if "<|separator|>" not in text]


def differing(found, wanted):
    return [
        (text, one, other)
        for text, one, other in zip(texts(), found, wanted, strict=True)
        if one != other
    ]


# --- mistakes, each of which passes every check of shapes


def swapped(data, header, first, second):
    """Exchange the values of two tensors."""
    places = {one.name: (at, one) for one, at in zip(header.tensors, header.offsets, strict=True)}
    (left, one), (right, other) = places[first], places[second]
    assert one.nbytes == other.nbytes
    part = data[left : left + one.nbytes]
    data[left : left + one.nbytes] = data[right : right + one.nbytes]
    data[right : right + one.nbytes] = part


def gate_and_up(data, header, config):
    for layer in range(config.num_layers):
        swapped(
            data, header, f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight"
        )


def norms(data, header, config):
    """The norm after the attention, and that after the experts."""
    for layer in range(config.num_layers):
        names = (f"blk.{layer}.{name}_norm.weight" for name in ("attn_output", "layer_output"))
        swapped(data, header, *names)


def rotary_pairs(data, header, config):
    """Queries and keys permuted as for a rotary embedding of neighbouring pairs."""
    for tensor, at in zip(header.tensors, header.offsets, strict=True):
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            rows = np.frombuffer(bytes(data[at : at + tensor.nbytes]), np.uint8)
            heads = rows.reshape(-1, 2, config.key_size // 2, tensor.nbytes // tensor.shape[0])
            data[at : at + tensor.nbytes] = heads.swapaxes(1, 2).tobytes()


def scale_groups(data, header, _):
    """The scales of inputs in reverse."""
    _change_scales(data, header, lambda scales: scales[:, ::-1].copy())


def first_scales(data, header, _):
    """The scales of the first inputs for all."""
    _change_scales(data, header, lambda scales: scales[:, :1])


def _change_scales(data, header, change):
    for tensor, at in zip(header.tensors, header.offsets, strict=True):
        if "attn_output.weight" in tensor.name or "ffn_down" in tensor.name:
            part = bytes(data[at : at + tensor.nbytes])
            blocks = np.frombuffer(part, np.dtype([("scale", "<f2"), ("codes", "i1", 32)])).copy()
            rows = blocks.reshape(-1, tensor.shape[-1] // 32)
            rows["scale"] = change(rows["scale"])
            data[at : at + tensor.nbytes] = rows.tobytes()


def layers(data, header, config):
    """The first layer and the last."""
    for tensor in header.tensors:
        if tensor.name.startswith("blk.0."):
            other = tensor.name.replace("blk.0.", f"blk.{config.num_layers - 1}.")
            swapped(data, header, tensor.name, other)


MISTAKES = [gate_and_up, norms, rotary_pairs, scale_groups, first_scales, layers]
"""Each takes the bytes of a file, its header, and the model."""


def with_mistake(path, mistake, config):
    """Make a mistake in a file."""
    header, data = read_gguf(path), bytearray(path.read_bytes())
    mistake(data, header, config)
    path.write_bytes(data)
