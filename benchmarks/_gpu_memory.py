"""What programs of Grok-1 take on absent H100s, beside what `model/sizing` counts for them."""

from itertools import product
from typing import Final

from _absent_gpus import CONTEXT, Compiler, Model

from grokctl.inference.compiled_steps import Head
from grokctl.model.bucketing import layers_together, room
from grokctl.model.config import GROK_1
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, Precision
from grokctl.model.sizing import Terms, program_bytes, workspace_bytes

MESHES: Final = (MeshShape(1, 16), MeshShape(1, 8), MeshShape(1, 4))
PRECISIONS: Final = (Precision.INT8, Precision.INT4)
NEAR: Final = 0.05
_FLOAT32: Final = 4


def largest(model: Model) -> tuple[str, int]:
    """The program of a chunk of a prompt that takes most, and its bytes beside weights and cache.

    Every program but the embedding is given the vectors of its tokens.
    """
    tokens = room(CONTEXT, platform="gpu")[0]
    given = tokens * GROK_1.emb_size * _FLOAT32
    found = {}
    for head in (Head.LAST, Head.EVERY, Head.SCORES):
        step = model.step(batch=1, tokens=tokens, head=head)
        found["embed"] = step.embed.made
        found["layers"] = step.layers.made + given
        found[f"head, {head.name.lower()}"] = step.head.made + given
    return max(found.items(), key=lambda item: item[1])


def check_memory(compiler: Compiler) -> list[str]:
    """Print what was found; what differs by more than a twentieth."""
    faults = []
    terms = Terms(context=CONTEXT, compute=Compute.BFLOAT16)
    layers = layers_together("gpu", batch=1, time=room(CONTEXT, platform="gpu")[0])
    print("\n| mesh | weights | largest program | takes | counted | ratio | workspace |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for mesh, precision in product(MESHES, PRECISIONS):
        model = Model(compiler=compiler, mesh=mesh, layers=layers, precision=precision)
        name, taken = largest(model)
        of = {"precision": precision, "platform": "gpu"}
        counted = program_bytes(GROK_1, mesh, terms, **of)
        workspace = workspace_bytes(GROK_1, mesh, terms, **of)
        print(
            f"| {mesh} | {precision} | {name} | {taken / 1e6:.0f} MB | {counted / 1e6:.0f} MB "
            f"| {counted / taken:.2f} | {workspace / 1e6:.0f} MB |",
            flush=True,
        )
        if abs(counted / taken - 1) > NEAR:
            faults.append(
                f"{mesh}, {precision}: expected {counted:,} bytes, {name} takes {taken:,}"
            )
    return faults
