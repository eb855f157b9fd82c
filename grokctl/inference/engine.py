"""The engine: a loaded model that generates and scores."""

from collections.abc import Sequence as Several
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.cluster.process_group import Cluster
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit
from grokctl.inference.devices import has_fast_bfloat16, memory_bandwidth
from grokctl.inference.expert_loading import Loaded
from grokctl.inference.generation import (
    BatchStats,
    Generation,
    PromptLogits,
    PromptOutput,
    PromptRead,
    PromptScores,
    Request,
    Score,
    Stats,
)
from grokctl.inference.loading import Loader
from grokctl.inference.model_runner import ModelRunner
from grokctl.inference.native_kernel import NativeKernel, native_kernel
from grokctl.inference.plan import RunPlan
from grokctl.inference.scheduler import Scheduler
from grokctl.inference.step_logits import log_probabilities
from grokctl.inference.stream import Batch, Stream
from grokctl.machine.memory import pages_of_files
from grokctl.model.sampling import Sampling
from grokctl.model.step_spec import KernelForm, StepShape
from grokctl.text import format_bytes


class Engine:
    """A model on its devices.

    One thread uses it; others may submit requests to its scheduler.
    """

    def __init__(
        self,
        plan: RunPlan,
        loader: Loader,
        loaded: Loaded,
        *,
        load_s: float,
        cluster: Cluster | None = None,
        observe: Observer,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.mesh = plan.mesh
        self.tokenizer = plan.tokenizer
        self.context = plan.context
        compute, device = jnp.dtype(plan.options.compute), loader.local_devices[0]
        form = _working_kernel(device) if device.platform == "gpu" else None
        has_kernel, is_plain = form is not None, form is KernelForm.PLAIN
        is_fast = has_fast_bfloat16()
        native = native_kernel(device, plan.options, observe=observe)
        has_native = native.library is not None
        if cluster is not None:  # all run the same programs
            has_native = cluster.everywhere("native kernel", it_is=has_native)
            has_kernel = cluster.everywhere("kernel", it_is=has_kernel)
            is_plain = not cluster.everywhere("kernel in PTX", it_is=not is_plain)
            is_fast = cluster.everywhere("processor", it_is=is_fast)
        if device.platform == "gpu" and not has_kernel:
            observe(
                Noted(message="the kernel does not work on this GPU: decodes slower without it")
            )
        shape = StepShape(
            config=plan.config,
            mesh=plan.mesh,
            platform=device.platform,
            compute=compute,
            has_fast_bfloat16=is_fast,
            draws_on_device=_draws_on_device(plan, device, cluster),
            has_kernel=has_kernel,
            kernel_form=KernelForm.PLAIN if is_plain else KernelForm.PTX,
            has_native_kernel=has_native,
        )
        self.runner = ModelRunner(
            loader,
            loaded,
            shape,
            plan.terms,
            observe=observe,
            cluster=cluster,
        )
        words = native.words
        if native.library is not None and not has_native:
            words = "XLA: another process has no native kernel"
        self._native = native if has_native else NativeKernel(None, words=words)
        self.kernel = words
        """What multiplies on a CPU, in words; empty on accelerators."""
        stats = Stats(load_s=load_s, bytes_per_token=loader.bytes_per_token, kernel=words)
        self.scheduler = Scheduler(plan, self.runner, stats=stats)
        self._loader = loader
        self.load_s = load_s
        self._observe = observe

    @property
    def devices(self) -> list[jax.Device]:
        """In the order of the mesh."""
        return self._loader.devices

    def follow(self) -> None:
        """Run the steps of rank 0 until its last; on every other rank."""
        self.runner.follow()

    def generate(self, prompt: Several[int], *, sampling: Sampling, **settings: Any) -> Stream:
        """Continue a prompt.

        Args:
            prompt: Token ids.
            sampling: How to choose the next token.
            settings: Other fields of `Request`.

        Returns:
            A stream whose tokens are computed as they are taken.

        Raises:
            UsageError: The prompt is empty, longer than the context, or holds impossible ids.
        """
        return self.fulfil(Request(prompt=tuple(prompt), sampling=sampling, **settings))

    def fulfil(self, request: Request) -> Stream:
        """Continue a prompt, as `generate` does, from a request."""
        return Stream(self.scheduler, request, observe=self._observe)

    def generate_many(self, requests: Several[Request]) -> Batch:
        """Continue many prompts, as many at a time as there are slots.

        Returns:
            Iterator over generations, each as it ends; nothing is computed before the first `next`.

        Raises:
            UsageError: A prompt is empty, longer than the context, or holds impossible ids.
        """
        return Batch(self.scheduler, requests, observe=self._observe)

    def score(
        self, tokens: Several[int], *, logits_out: NDArray[np.float32] | None = None
    ) -> Score:
        """Likelihood of given tokens, each predicted from those before it.

        Args:
            tokens: At least one id.
            logits_out: Filled with the logits, `(tokens, vocab)`.

        Raises:
            UsageError: There is no token, more than the context, or impossible ids.
        """
        output = PromptOutput.SCORES if logits_out is None else PromptOutput.LOGITS
        stream = Stream(
            self.scheduler,
            Request(prompt=tuple(tokens), sampling=Sampling(), max_tokens=0, of_prompt=output),
        )
        nll, total = 0.0, len(tokens)
        self._observe(Started(stage=Stage.SCORE, total=total, unit=Unit.TOKENS))
        for event in stream.events():
            match event:
                case PromptRead(done):
                    self._observe(Advanced(stage=Stage.SCORE, done=done))
                case PromptScores(logprobs=logprobs):
                    nll -= float(np.sum(logprobs, dtype=np.float64))
                case PromptLogits(start, logits) if logits_out is not None:
                    logits_out[start : start + len(logits)] = logits
                    targets = np.asarray(tokens[start + 1 : start + 1 + len(logits)], np.int64)
                    nll -= float(np.sum(log_probabilities(logits[: len(targets)], targets)))
        self._observe(Advanced(stage=Stage.SCORE, done=total))
        self._observe(Finished(stage=Stage.SCORE))
        return Score(tokens=total, nll=nll)

    def measured(self, generation: Generation) -> Generation:
        """A generation with what is measured now: bandwidth, pages, and the disk's part."""
        totals = self.scheduler.totals
        stats = replace(
            generation.stats,
            bandwidth_fraction=self.bandwidth_fraction(generation.stats),
            pages=self.pages(),
            hit_rate=totals.hit_rate,
            disk_bytes_per_token=totals.disk_bytes_per_token,
            disk_fraction=self.disk_fraction(totals),
            waited_s=totals.waited_s,
        )
        return replace(generation, stats=stats)

    def measured_many(self, stats: BatchStats) -> BatchStats:
        """The statistics of many requests, with what is measured now; see `measured`."""
        return replace(
            stats,
            bandwidth_fraction=self.bandwidth_fraction(stats),
            pages=self.pages(),
            disk_fraction=self.disk_fraction(stats),
        )

    def disk_fraction(self, stats: BatchStats) -> float | None:
        """Share of the disk's rate, as it was while loading, at which decoding read experts.

        None if no experts are streamed, or none were read.
        """
        stream = self.runner.stream
        if stream is None or not stats.disk_bytes or not stats.decode_s:
            return None
        return stats.disk_bytes / stats.decode_s / stream.load_rate

    def kernel_rate(self) -> float | None:
        """Bytes a second of int8 weights that the native kernels of all processes read, measured.

        None without them. Assumes that other processes are as fast.
        """
        rate = self._native.measured()
        processes = {device.process_index for device in self.devices}
        return None if rate is None else rate * len(processes)

    def pages(self) -> str:
        """How the weights lie in a CPU's memory now; empty on accelerators.

        Files are mapped, not copied: on file systems with large folios their pages are as large as
        those of a copy, and need no second memory (docs/adr/0014).
        """
        if self.devices[0].platform != "cpu":
            return ""
        if self.runner.stream is not None:
            return self.runner.stream.pages
        nbytes, huge = pages_of_files(".safetensors")
        if not nbytes:
            return "copied: the files were not cut for this mesh"
        return f"{format_bytes(nbytes)} mapped, {huge / nbytes:.0%} of it in huge pages"

    def bandwidth_fraction(self, stats: Stats | BatchStats) -> float:
        """Measure the memory bandwidth of these devices: the share of it that decoding reached."""
        if isinstance(stats, BatchStats):
            rate = stats.bytes_read / stats.decode_s if stats.decode_s else 0.0
        else:
            rate = stats.decode_tokens_per_s * stats.bytes_per_token
        return rate / memory_bandwidth(self.devices)


def _draws_on_device(plan: RunPlan, device: jax.Device, cluster: Cluster | None) -> bool:
    """By default where logits have a way to the host: from accelerators and other processes."""
    if plan.options.draws_on_device is not None:
        return plan.options.draws_on_device
    return device.platform != "cpu" or cluster is not None


def _working_kernel(device: jax.Device) -> KernelForm | None:
    from grokctl.model import kernel_check  # noqa: PLC0415 (Pallas is a fifth of JAX's own start)

    return kernel_check.working_form(device)
