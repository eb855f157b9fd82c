"""What the server counts, under the names that dashboards for other servers know."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from grokctl import __version__
from grokctl.inference.generation import BatchStats, Ended, Failed, FinishReason

if TYPE_CHECKING:
    from grokctl.serving.admission import Run

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_TO_FIRST: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80, 160, 640, 2560),
)
_BETWEEN: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80),
)
_LATENCY: Final = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920),
    7680,
)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_OF_A_TURN: Final = (1, 8, *(2**bits for bits in range(4, 15)))
_SAMPLES: Final = (1, 2, 5, 10, 20)
_BETWEEN_TOKENS: Final = (
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",  # as older dashboards call it
)
_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.INTERRUPTED: "abort",
}
_RATE_S: Final = 10.0
"""Seconds over which rates for people are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """The present state, for one answer."""

    running: int
    waiting: int
    filled: float
    """Share of the cache's positions that running sequences fill."""
    totals: BatchStats
    """Of the scheduler."""
    bandwidth: float | None = None
    """Bytes a second that the devices' memory can give; None if it was not measured."""


class Measures:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=False)
        self._model = {"model_name": "", "engine": "0"}
        names = tuple(self._model)
        self._counters = {
            name: Counter(name, about, names, registry=self.registry)
            for name, about in _COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(name, about, names, registry=self.registry)
            for name, about in _GAUGES.items()
        }
        self._histograms = {
            name: Histogram(name, about, names, buckets=buckets, registry=self.registry)
            for name, (about, buckets) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            "vllm:request_success",
            "Sequences that ended.",
            (*names, "finished_reason"),
            registry=self.registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests that were refused.",
            (*names, "reason"),
            registry=self.registry,
        )
        self._http = Counter(
            "grokctl_http_requests", "Answers.", ("route", "status"), registry=self.registry
        )
        build = Gauge("grokctl_build_info", "The version.", ("version",), registry=self.registry)
        build.labels(__version__).set(1)
        self._seen = BatchStats()
        self._rates: list[tuple[float, BatchStats]] = []
        self._longest = 0
        """Tokens of the longest sequence until now, its prompt included."""
        self.generated = 0
        """Tokens, of all requests."""
        self.failures = 0
        """Sequences that the engine could not fulfil, since the last one that it could."""

    def serve(self, model: str) -> None:
        """Label everything with a model's name from now on."""
        self._model = {"model_name": model, "engine": "0"}
        for reason in sorted(set(_REASONS.values()) | {"error"}):
            self._success.labels(**self._model, finished_reason=reason)
        for metric in (*self._counters.values(), *self._histograms.values()):
            metric.labels(**self._model)

    # --- events

    def answered(self, route: str, status: int) -> None:
        """Count an answer; routes are templates, never what a stranger typed."""
        self._http.labels(route, str(status)).inc()

    def refused(self, reason: str) -> None:
        """Count a request that was not admitted."""
        self._rejections.labels(**self._model, reason=reason).inc()

    def asked(self, *, samples: int, max_tokens: int) -> None:
        """Count an admitted request."""
        self._observe("vllm:request_params_n", samples)
        self._observe("vllm:request_params_max_tokens", max_tokens)

    def turned(self, tokens: int) -> None:
        """Count the tokens of a turn of the engine, those of prompts included."""
        self._observe("vllm:iteration_tokens_total", tokens)

    def began(self, waited_s: float) -> None:
        """A sequence got a slot."""
        self._observe("vllm:request_queue_time_seconds", waited_s)

    def token(self, run: "Run", now: float) -> None:
        """A sequence got a token; called before that changes it."""
        self.generated += 1
        self._count("vllm:generation_tokens", 1)
        if run.token_at is None:
            self._observe("vllm:time_to_first_token_seconds", now - run.job.arrived_at)
        else:
            for name in _BETWEEN_TOKENS:
                self._observe(name, now - run.token_at)
        self._longest = max(self._longest, run.read + run.made + 1)

    def ended(self, run: "Run", event: Ended | Failed, now: float) -> None:
        """A sequence has ended; called before that changes it."""
        began = now if run.begun_at is None else run.begun_at
        first = now if run.first_at is None else run.first_at
        self._observe("vllm:e2e_request_latency_seconds", now - run.job.arrived_at)
        self._observe("vllm:request_inference_time_seconds", now - began)
        self._observe("vllm:request_prefill_time_seconds", first - began)
        self._observe("vllm:request_decode_time_seconds", now - first)
        if isinstance(event, Failed):
            self.failures += 1
            self._success.labels(**self._model, finished_reason="error").inc()
            return
        generation = event.generation
        reason = _REASONS[generation.finish_reason]
        self._success.labels(**self._model, finished_reason=reason).inc()
        if reason == "abort":
            return
        self.failures = 0
        self._count("vllm:prompt_tokens", generation.prompt_tokens)
        self._count("vllm:prefix_cache_queries", generation.prompt_tokens)
        self._count("vllm:prefix_cache_hits", generation.stats.cached_tokens)
        self._observe("vllm:request_prompt_tokens", generation.prompt_tokens)
        self._observe("vllm:request_generation_tokens", len(generation.ids))

    def _count(self, name: str, amount: float) -> None:
        self._counters[name].labels(**self._model).inc(amount)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].labels(**self._model).observe(value)

    # --- answers

    def rates(self, totals: BatchStats) -> tuple[float, float]:
        """Tokens of prompts, and generated tokens, a second, over the last seconds."""
        now = time.monotonic()
        self._rates.append((now, totals))
        while len(self._rates) > 1 and now - self._rates[1][0] > _RATE_S:
            del self._rates[0]
        then, before = self._rates[0]
        span = now - then
        if span <= 0:
            return 0.0, 0.0
        recent = totals.since(before)
        return recent.prefilled / span, recent.decoded / span

    def page(self, gauges: Gauges) -> bytes:
        """All numbers, as Prometheus reads them."""
        totals = gauges.totals
        recent, self._seen = totals.since(self._seen), totals
        read, made = self.rates(totals)
        busy = totals.decoded / totals.steps if totals.steps else 0.0
        rate = recent.bytes_read / recent.decode_s if recent.decode_s else 0.0
        for name, value in {
            "vllm:num_requests_running": gauges.running,
            "vllm:num_requests_waiting": gauges.waiting,
            "vllm:kv_cache_usage_perc": gauges.filled,
            "llamacpp:requests_processing": gauges.running,
            "llamacpp:requests_deferred": gauges.waiting,
            "llamacpp:prompt_tokens_seconds": read,
            "llamacpp:predicted_tokens_seconds": made,
            "llamacpp:n_busy_slots_per_decode": busy,
            "llamacpp:n_tokens_max": self._longest,
            "grokctl_bandwidth_fraction": rate / gauges.bandwidth if gauges.bandwidth else 0.0,
        }.items():
            self._gauges[name].labels(**self._model).set(value)
        for name, value in _recent(recent).items():
            self._count(name, max(0.0, value))
        return generate_latest(self.registry)


def _recent(stats: BatchStats) -> Mapping[str, float]:
    return {
        "llamacpp:prompt_tokens": stats.prefilled,
        "llamacpp:prompt_seconds": stats.prefill_s,
        "llamacpp:tokens_predicted": stats.decoded,
        "llamacpp:tokens_predicted_seconds": stats.decode_s,
        "llamacpp:n_decode": stats.steps,
        "grokctl_compile_seconds": stats.compile_s,
        "grokctl_weight_bytes": stats.bytes_read,
    }


_COUNTERS: Final = {
    "vllm:prompt_tokens": "Tokens of prompts that were answered.",
    "vllm:generation_tokens": "Sampled tokens.",
    "vllm:prefix_cache_queries": "Tokens of prompts that were looked for in the cache.",
    "vllm:prefix_cache_hits": "Of these, tokens that did not run again.",
    "vllm:num_preemptions": "Always 0: a sequence keeps its slot.",
    "llamacpp:prompt_tokens": "Tokens of prompts that ran.",
    "llamacpp:prompt_seconds": "Time of running them.",
    "llamacpp:tokens_predicted": "Tokens made by decode steps.",
    "llamacpp:tokens_predicted_seconds": "Time of decode steps.",
    "llamacpp:n_decode": "Decode steps.",
    "grokctl_compile_seconds": "Time of compilation.",
    "grokctl_weight_bytes": "Weights read by decode steps.",
}
_GAUGES: Final = {
    "vllm:num_requests_running": "Sequences in slots.",
    "vllm:num_requests_waiting": "Sequences that wait for a slot.",
    "vllm:kv_cache_usage_perc": "Share of the cache's positions that running sequences fill.",
    "llamacpp:requests_processing": "Sequences in slots.",
    "llamacpp:requests_deferred": "Sequences that wait for a slot.",
    "llamacpp:prompt_tokens_seconds": "Tokens of prompts a second, in the last seconds.",
    "llamacpp:predicted_tokens_seconds": "Generated tokens a second, in the last seconds.",
    "llamacpp:n_busy_slots_per_decode": "Sequences of a decode step, on average.",
    "llamacpp:n_tokens_max": "Tokens of the longest sequence until now.",
    "grokctl_bandwidth_fraction": (
        "Share of the memory's bandwidth that decoding has reached since the last time."
    ),
}
_HISTOGRAMS: Final[Mapping[str, tuple[str, tuple[float, ...]]]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token.", _TO_FIRST),
    **dict.fromkeys(_BETWEEN_TOKENS, ("Between two tokens.", _BETWEEN)),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end.", _LATENCY),
    "vllm:request_queue_time_seconds": ("From arrival to a slot.", _LATENCY),
    "vllm:request_prefill_time_seconds": ("From a slot to the first token.", _LATENCY),
    "vllm:request_decode_time_seconds": ("From the first token to the end.", _LATENCY),
    "vllm:request_inference_time_seconds": ("From a slot to the end.", _LATENCY),
    "vllm:request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "vllm:request_generation_tokens": ("Tokens of a completion.", _TOKENS),
    "vllm:request_params_n": ("Completions asked for.", _SAMPLES),
    "vllm:request_params_max_tokens": ("Tokens asked for.", _TOKENS),
    "vllm:iteration_tokens_total": ("Tokens of a turn, those of prompts included.", _OF_A_TURN),
}
