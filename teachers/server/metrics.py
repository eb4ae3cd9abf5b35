"""Prometheus metrics of a teacher server. Each registry has one set of metrics, which its services share.

A service has its own registry by default. In a vLLM server it uses prometheus_client's default registry, which vLLM's
/metrics exports. vLLM's processes keep values in files, so only types of metrics that files support are used.
"""

from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0)
_by_registry: "WeakKeyDictionary[CollectorRegistry, ServerMetrics]" = WeakKeyDictionary()


class ServerMetrics:
    """The metrics. Their names are those of the attributes with the prefix `tutelage_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens_scored = Counter("tutelage_tokens_scored", "Scored positions.", registry=registry)
        self.sequences_scored = Counter("tutelage_sequences_scored", "Scored sequences.", registry=registry)
        self.queued_tokens = Gauge(
            "tutelage_queued_tokens", "Tokens of unfinished sequences.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.request_seconds = Histogram(
            "tutelage_request_seconds", "Time from the arrival of a request to the last byte of its response.",
            registry=registry, buckets=BUCKETS_S,
        )  # fmt: skip
        self.engine_seconds = Histogram(
            "tutelage_engine_seconds", "Time from passing a sequence to the engine to its rows.", registry=registry,
            buckets=BUCKETS_S,
        )  # fmt: skip
        self.rejected = Counter("tutelage_rejected", "Rejected requests.", ["reason"], registry=registry)
        self.aborted = Counter("tutelage_aborted", "Incomplete responses.", ["reason"], registry=registry)
        self.sent_bytes = Counter("tutelage_sent_bytes", "Bytes of score responses.", registry=registry)
        self.engine_ready = Gauge(
            "tutelage_engine_ready", "1 if the last check of the engine succeeded.", registry=registry,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self.info = Gauge(
            "tutelage_teacher_info", "Always 1; the labels describe the model.", ["model", "fingerprint", "engine"],
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip


def new_registry() -> CollectorRegistry:
    """Return a new registry with memory, CPU seconds and open files of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def metrics_of(registry: CollectorRegistry) -> ServerMetrics:
    """Return the metrics of a registry; the first call creates them."""
    if registry not in _by_registry:
        _by_registry[registry] = ServerMetrics(registry)
    return _by_registry[registry]
