"""Load a checkpoint onto devices and stream generated tokens, or score given ones."""

import time
from pathlib import Path

import jax

from grokctl.checkpoint.tensor_source import TensorSource
from grokctl.cluster.process_group import Cluster
from grokctl.events import Observer, ignore
from grokctl.inference.compilation import use_compilation_cache
from grokctl.inference.devices import find_devices
from grokctl.inference.engine import Engine
from grokctl.inference.expert_loading import (
    Loaded,
    load_streamed,
    note_mapped,
    residence_of,
)
from grokctl.inference.loading import Loader, out_of_memory
from grokctl.inference.memory_check import check_room
from grokctl.inference.plan import EngineOptions, RunPlan, plan
from grokctl.model.sizing import needs


def infer(
    source: TensorSource,
    options: EngineOptions,
    *,
    tokenizer: Path | None = None,
    observe: Observer = ignore,
) -> "Engine":
    """Load a checkpoint onto devices.

    Args:
        source: A ready checkpoint, whose files are mapped if its mesh is the one asked for, or
            anything else that tensors can be cut from, which is copied.
        options: Mesh, type of computation, length of the context.
        tokenizer: The sentencepiece model; without one, only token ids can be used.
        observe: Receives progress in bytes, then the phases of running.

    Raises:
        HardwareError: It does not fit.
        GrokctlError: As `plan` does.
    """
    planned = plan(source.config, options, tokenizer=tokenizer)
    return start(source, planned, observe=observe)


def start(
    source: TensorSource,
    planned: RunPlan,
    *,
    cluster: Cluster | None = None,
    observe: Observer = ignore,
) -> "Engine":
    """Load a checkpoint for a run that was planned already; see `infer`.

    With a cluster, every one of its processes does this for devices of its own, and then rank 0
    uses the engine while the others follow.
    """
    options, processes = planned.options, 1 if cluster is None else cluster.count
    devices = find_devices(options.mesh.size, processes=processes, observe=observe)
    # with a cluster, none of ours: one might have a program that another compiles, and waits for it
    use_compilation_cache(None if cluster else options.compilation_cache, observe=observe)
    if cluster is not None:
        own = jax.local_devices()[0]
        cluster.agree("devices", {"device": f"{own.platform} {own.device_kind}"})
    precision = source.storage.precision
    started = time.perf_counter()
    with out_of_memory():
        loader = Loader(source, options.mesh, devices)
        needed = needs(
            source.config,
            options.mesh,
            planned.terms,
            weights=loader.weights,
            precision=precision,
            platform=devices[0].platform,
        )
        residence = residence_of(loader, needed, options)
        if residence is None:
            note_mapped(loader, options, observe=observe)
            check_room(
                loader.local_devices,
                needed,
                context=planned.context,
                precision=precision,
                size=options.mesh.size,
            )
            beside = (needed.cache + needed.workspace) * len(loader.local)
            loaded = Loaded(loader.load(observe, beside=beside))
        else:
            loaded = load_streamed(loader, residence, observe=observe)
    load_s = time.perf_counter() - started
    return Engine(planned, loader, loaded, load_s=load_s, cluster=cluster, observe=observe)
