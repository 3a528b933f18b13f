"""Metrics for Prometheus. The names are vLLM's but for the prefix, so that its dashboards fit by one replacement."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from internvl_rt.engine.reply import Reply
from internvl_rt.inputs.sampling_params import SamplingParams

PREFIX = "internvl_rt:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

# What a finished request adds to a histogram: name, its description, buckets.
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("from a request's arrival to its first token", _SHORT),
    "request_time_per_output_token_seconds": ("mean time of a token after the first", _TOKEN),
    "e2e_request_latency_seconds": ("from a request's arrival to its end", _LONG),
    "request_queue_time_seconds": ("from the end of a request's preparation to its first step", _SHORT),
    "request_prefill_time_seconds": ("steps up to a request's first token", _SHORT),
    "request_decode_time_seconds": ("steps after a request's first token", _LONG),
    "image_decode_seconds": ("reading and identifying a request's pictures and videos", _SHORT),
    "preprocess_seconds": ("decoding, resizing and cutting a request's pictures", _SHORT),
    "vision_encode_seconds": ("vision tower and projector for a request", _SHORT),
    "request_prompt_tokens": ("tokens of a request's prompt, visual ones included", _COUNTS),
    "request_generation_tokens": ("tokens of a request's answers", _COUNTS),
    "request_params_n": ("answers that a request asks for", (1, 2, 4, 8, 16, 32, 64, 128)),
    "request_params_max_tokens": ("tokens that an answer may have", _COUNTS),
}
_TOKENS = {
    "prompt_tokens": "tokens of prompts, visual ones included",
    "prompt_tokens_cached": "tokens of prompts that were in the KV cache",
    "image_tokens": "visual tokens of prompts",
    "generation_tokens": "tokens of answers",
}
# The engine's own numbers: name in `AsyncEngine.stats`, name here, description.
_GAUGES = (
    ("alive", "engine_alive", "1 while the engine lives, 0 when the process has to be started again"),
    ("running", "num_requests_running", "sequences that run"),
    ("waiting", "num_requests_waiting", "sequences that wait until they run"),
    ("preparing", "num_requests_preparing", "requests whose pictures and texts are being prepared"),
    ("visual_cache_bytes", "visual_cache_bytes", "memory of visual tokens that may be used again"),
)
_COUNTED = (
    ("preemptions", "num_preemptions", "sequences that lost their place to others for lack of memory"),
    ("prefix_queried_tokens", "prefix_cache_queries", "tokens of prompts that were looked up in the KV cache"),
    ("prefix_hit_tokens", "prefix_cache_hits", "tokens of prompts that were found in the KV cache"),
    ("visual_cache_queries", "mm_cache_queries", "pictures that were looked up among the visual tokens kept"),
    ("visual_cache_hits", "mm_cache_hits", "pictures that were found there"),
    ("encoded_tiles", "vision_tiles", "tiles of pictures that were encoded"),
    ("saved_image_tokens", "image_tokens_saved", "visual tokens that prompts do not have, by compressed tiles"),
    ("steps", "engine_steps", "steps of the engine"),
)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, model: str, stats: Callable[[], Mapping[str, float]]) -> None:
        """model: the label of all of them. stats: the engine's numbers, read whenever somebody asks."""
        self._registry = CollectorRegistry()

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, about, ("model_name",), buckets=buckets, registry=self._registry)
            return made.labels(model)

        def counter(name: str, about: str) -> Counter:
            return Counter(PREFIX + name, about, ("model_name",), registry=self._registry).labels(model)

        self._histograms = {name: histogram(name, *more) for name, more in _HISTOGRAMS.items()}
        self._tokens = {name: counter(name, about) for name, about in _TOKENS.items()}
        self._between = _Quick("inter_token_latency_seconds", "between two pieces of a streamed answer", _TOKEN, model)
        self._registry.register(self._between)
        self._model = model
        self._finished = Counter(
            f"{PREFIX}request_success",
            "answers by how they ended",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._refused = Counter(
            f"{PREFIX}request_failure",
            "requests that got an error, by its code",
            ("model_name", "code"),
            registry=self._registry,
        )
        self._registry.register(_EngineNumbers(model, stats))

    def finished(self, reply: Reply, params: SamplingParams, arrived_before_s: float) -> None:
        """Counts a request that was answered. arrived_before_s: how long before the engine's call it had arrived."""
        timings, usage = reply.timings, reply.usage
        values = {
            "time_to_first_token_seconds": arrived_before_s + timings.first_token_s,
            "e2e_request_latency_seconds": arrived_before_s + timings.total_s,
            "request_queue_time_seconds": timings.queued_s,
            "request_prefill_time_seconds": timings.prefill_s,
            "request_decode_time_seconds": timings.decode_s,
            "image_decode_seconds": timings.media_s,
            "preprocess_seconds": timings.tile_s,
            "vision_encode_seconds": timings.vision_s,
            "request_prompt_tokens": usage.prompt_tokens,
            "request_generation_tokens": usage.completion_tokens,
            "request_params_n": params.n,
            "request_params_max_tokens": params.max_tokens,
        }
        if timings.num_decoded:
            values["request_time_per_output_token_seconds"] = timings.per_token_s
        for name, value in values.items():
            self._histograms[name].observe(value)
        self.used(usage.prompt_tokens, usage.cached_tokens, usage.image_tokens, usage.completion_tokens)
        for choice in reply.choices:
            self._finished.labels(self._model, choice.finish_reason).inc()

    def used(self, *counts: int) -> None:
        """Counts tokens of prompts, those cached, visual ones, and those of answers."""
        for counter, count in zip(self._tokens.values(), counts, strict=True):
            counter.inc(count)

    def failed(self, code: str) -> None:
        self._refused.labels(self._model, code).inc()

    def between_pieces(self, seconds: float) -> None:
        self._between.observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Quick(Collector):
    """A histogram for what happens with every token: to observe takes a tenth of the library's time.

    One thread at a time may observe.
    """

    def __init__(self, name: str, about: str, limits: tuple[float, ...], model: str) -> None:
        self._name, self._about, self._limits, self._model = name, about, limits, model
        self._counts, self._sum = [0] * (len(limits) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(PREFIX + self._name, self._about, labels=("model_name",))
        limits = [*map(floatToGoString, self._limits), "+Inf"]
        family.add_metric([self._model], list(zip(limits, accumulate(self._counts), strict=True)), self._sum)
        yield family


class _EngineNumbers(Collector):
    """Reads the engine's numbers when they are asked for."""

    def __init__(self, model: str, stats: Callable[[], Mapping[str, float]]) -> None:
        self._model, self._stats = model, stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        usage = stats["kv_blocks_used"] / stats["kv_blocks"] if stats.get("kv_blocks") else 0.0
        gauges = [(stats.get(key, 0), name, about) for key, name, about in _GAUGES]
        gauges.append((usage, "kv_cache_usage_perc", "share of the KV cache that is used, from 0 to 1"))
        for value, name, about in gauges:
            gauge = GaugeMetricFamily(PREFIX + name, about, labels=("model_name",))
            gauge.add_metric([self._model], value)
            yield gauge
        for key, name, about in _COUNTED:
            counter = CounterMetricFamily(PREFIX + name, about, labels=("model_name",))
            counter.add_metric([self._model], stats.get(key, 0))
            yield counter
