"""The engine: a loaded model that generates and scores."""

from collections.abc import Iterator
from collections.abc import Sequence as Several

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from grokctl.cluster.process_group import Cluster
from grokctl.errors import invalid
from grokctl.events import Advanced, Finished, Noted, Observer, Stage, Started, Unit
from grokctl.inference.devices import has_fast_bfloat16, memory_bandwidth
from grokctl.inference.generation import (
    BatchStats,
    Generation,
    Request,
    Score,
    Stats,
    Token,
    negative_log_likelihood,
)
from grokctl.inference.loading import Loader
from grokctl.inference.model_runner import ModelRunner
from grokctl.inference.plan import RunPlan
from grokctl.inference.scheduler import Batch
from grokctl.inference.sequence import Sequence
from grokctl.model.parameters import Parameters
from grokctl.model.sampling import Sampling
from grokctl.model.step_spec import StepShape


class Engine:
    """A model on its devices. Does one thing at a time; not thread-safe."""

    def __init__(
        self,
        plan: RunPlan,
        loader: Loader,
        parameters: Parameters,
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
        has_kernel = device.platform == "gpu" and _kernel_works(device)
        is_fast = has_fast_bfloat16()
        if cluster is not None:  # all run the same programs
            has_kernel = cluster.everywhere("kernel", it_is=has_kernel)
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
            has_kernel=has_kernel,
        )
        self.runner = ModelRunner(
            loader, parameters, shape, plan.terms, observe=observe, cluster=cluster
        )
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

    def generate(
        self,
        prompt: Several[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Several[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Continue a prompt; see `Request`.

        Returns:
            A generation whose tokens are computed as they are taken.

        Raises:
            UsageError: The prompt is empty, longer than the context, or holds impossible ids.
        """
        return self.fulfil(
            Request(
                prompt=tuple(prompt),
                sampling=sampling,
                max_tokens=max_tokens,
                stop=tuple(stop),
                ignore_eos=ignore_eos,
            )
        )

    def fulfil(self, request: Request) -> Generation:
        """Continue a prompt, as `generate` does, from a request."""
        sequence = self._sequence(request)
        sequence.generation.tokens = self._tokens(sequence)
        return sequence.generation

    def generate_many(self, requests: Several[Request]) -> Batch:
        """Continue many prompts, as many at a time as there are slots.

        Returns:
            Iterator over generations, each as it ends; nothing is computed before the first `next`.

        Raises:
            UsageError: A prompt is empty, longer than the context, or holds impossible ids.
        """
        return Batch(
            self.runner,
            [self._sequence(request) for request in requests],
            stats=BatchStats(load_s=self.load_s),
            observe=self._observe,
        )

    def _sequence(self, request: Request) -> Sequence:
        self.plan.check(request.prompt)
        if request.max_tokens < 0:
            raise invalid("max_tokens", request.max_tokens, "expected at least 0")
        stats = Stats(load_s=self.load_s, bytes_per_token=self._loader.bytes_per_token)
        return Sequence(
            request,
            config=self.config,
            tokenizer=self.tokenizer,
            context=self.context,
            stats=stats,
        )

    def _tokens(self, sequence: Sequence) -> Iterator[Token]:
        """Run a sequence alone; fills in the timings."""
        if sequence.limit == 0:
            yield from sequence.finish()
            return
        prompt, stats, clock = (
            sequence.request.prompt,
            sequence.generation.stats,
            self.runner.clock,
        )
        compiled = self.runner.compile_s
        self._compile(len(prompt), decodes=sequence.limit > 1)
        self.runner.begin(sequence)
        begun = clock()
        logits = self.runner.prefill(0, prompt, observe=self._observe)
        tokens = sequence.take(logits)
        stats.first_token_s = clock() - begun
        stats.prefill_tokens_per_s = len(prompt) / stats.first_token_s
        decoded = 0.0
        while True:
            stats.compile_s = self.runner.compile_s - compiled
            yield from tokens
            if sequence.is_over:
                return
            self.runner.check(sequence)
            begun = clock()
            logits = self.runner.decode([0], [sequence.last], [sequence.position])[0]
            tokens = sequence.take(logits)
            decoded += clock() - begun
            stats.decode_tokens_per_s = (sequence.sampled - 1) / decoded

    def _compile(self, prompt: int, *, decodes: bool) -> None:
        """Compile the steps of a generation now, so that none is compiled between its tokens."""
        chunk = self.runner.chunk
        parts = {min(chunk, prompt - start) for start in range(0, prompt, chunk)}
        for length in sorted(
            {self.runner.padded(part) for part in [*parts, *([1] if decodes else [])]}
        ):
            self.runner.step(1, length)

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
        self.plan.check(tokens)
        nll, chunk = 0.0, self.runner.chunk
        self.runner.begin(tokens)
        self._observe(Started(stage=Stage.SCORE, total=len(tokens), unit=Unit.TOKENS))
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            logits = self.runner.score(part, start)
            if logits_out is not None:
                logits_out[start : start + len(part)] = logits
            targets = np.asarray(tokens[start + 1 : start + 1 + len(part)], np.int64)
            nll += negative_log_likelihood(logits[: len(targets)], targets)
            self._observe(Advanced(stage=Stage.SCORE, done=start + len(part)))
        self._observe(Finished(stage=Stage.SCORE))
        return Score(tokens=len(tokens), nll=nll)

    def measure_bandwidth(self, stats: Stats | BatchStats) -> None:
        """Measure the memory bandwidth of these devices, and the share that decoding reached."""
        if isinstance(stats, BatchStats):
            rate = stats.bytes_read / stats.decode_s if stats.decode_s else 0.0
        else:
            rate = stats.decode_tokens_per_s * stats.bytes_per_token
        stats.bandwidth_fraction = rate / memory_bandwidth(self.devices)


def _kernel_works(device: jax.Device) -> bool:
    from grokctl.model import kernels  # noqa: PLC0415 (Pallas is a fifth of JAX's own start)

    return kernels.works(device)
