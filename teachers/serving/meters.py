"""What a teacher tells Prometheus. One set of meters in each registry, however many services share it.

A service has a registry of its own unless it is given one. In a vLLM server that is prometheus_client's default, which
vLLM's own /metrics shows; its processes keep values in files, so nothing here is of a kind that files cannot hold.
"""

from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0)
_kept: "WeakKeyDictionary[CollectorRegistry, Meters]" = WeakKeyDictionary()


class Meters:
    """The names are the attributes' with the prefix `tutelage_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens_scored = Counter("tutelage_tokens_scored", "Positions answered.", registry=registry)
        self.sequences_scored = Counter("tutelage_sequences_scored", "Sequences answered.", registry=registry)
        self.queued_tokens = Gauge(
            "tutelage_queued_tokens", "Tokens of sequences not answered yet.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.request_seconds = Histogram(
            "tutelage_request_seconds", "From a question's arrival to its last byte.", registry=registry,
            buckets=BUCKETS_S,
        )  # fmt: skip
        self.engine_seconds = Histogram(
            "tutelage_engine_seconds", "From handing a sequence to the engine to its rows.", registry=registry,
            buckets=BUCKETS_S,
        )  # fmt: skip
        self.rejected = Counter("tutelage_rejected", "Requests refused.", ["reason"], registry=registry)
        self.aborted = Counter("tutelage_aborted", "Answers cut short.", ["reason"], registry=registry)
        self.sent_bytes = Counter("tutelage_sent_bytes", "Bytes of answers.", registry=registry)
        self.engine_ready = Gauge(
            "tutelage_engine_ready", "1 if the engine answered when it was last asked.", registry=registry,
            multiprocess_mode="livemin",
        )  # fmt: skip
        self.info = Gauge(
            "tutelage_teacher_info", "Always 1; the labels say what is served.", ["model", "fingerprint", "engine"],
            registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip


def own_registry() -> CollectorRegistry:
    """A new registry with this process's memory, CPU seconds and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def meters_in(registry: CollectorRegistry) -> Meters:
    """The registry's meters, made when they are first asked for."""
    if registry not in _kept:
        _kept[registry] = Meters(registry)
    return _kept[registry]
