"""Telemetry of samples and batches: durations, responses and counts, collected beside the data.

Every sample has a collector while its teachers are queried. The collectors of a batch are merged into one, which the
fusion and the training loop complete. Collectors of several processes are merged in training/step_metrics.py.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from alignment.report import AlignmentReport
from trainer.telemetry.rollout_telemetry import RolloutTelemetry


@dataclass(frozen=True)
class ResponseTime:
    """When a teacher's response was requested and received, in seconds of time.monotonic()."""

    teacher: str
    requested_at: float
    received_at: float

    def overlap_s(self, begin: float, end: float) -> float:
        """Return the part of the interval from `begin` to `end` in which the response was awaited."""
        return max(min(end, self.received_at) - max(begin, self.requested_at), 0.0)


@dataclass
class TeacherTelemetry:
    """One teacher. Sums over samples, except `pool`.

    report       how much of the teacher's probability arrived at the student's tokens
    weight       weight in the loss
    missing      positions without a valid target where another teacher had one
    unaligned    supervised positions of chats without a target of this teacher, by reason
    unavailable  samples that were scored while the teacher was lost
    masked       tokens of the teacher whose scores are masked, because its server returns no ids
    rollout_*    log-likelihood in nats of the sampled text, by the teacher's own tokens, and its bytes
    wait_s       seconds that the step waited for this teacher's last response
    pool         state of the teacher's replicas (teachers.client.load_balancer.LoadBalancerStats)
    """

    report: AlignmentReport = AlignmentReport()
    weight: float = 0.0
    missing: int = 0
    unaligned: Counter[str] = field(default_factory=Counter)
    unavailable: int = 0
    masked: int = 0
    rollout_nats: float = 0.0
    rollout_bytes: int = 0
    wait_s: float = 0.0
    pool: Mapping[str, float] = field(default_factory=dict)

    def add(self, other: "TeacherTelemetry") -> None:
        """Add the sums of another sample."""
        self.report += other.report
        self.weight += other.weight
        self.missing += other.missing
        self.unaligned.update(other.unaligned)
        self.unavailable += other.unavailable
        self.masked += other.masked
        self.rollout_nats += other.rollout_nats
        self.rollout_bytes += other.rollout_bytes
        self.wait_s += other.wait_s


@dataclass
class Collector:
    """One sample or one batch. Sums, except `sample_s`, `queued_batches`, `queued_tokens` and `last_response`.

    seconds        CPU seconds by stage: tokenize, align, fuse
    wait_s         seconds that the step waited for the batch
    sample_s       seconds in which the training loop sampled rollouts before the step
    queued_*       batches and tokens that were ready when the step requested this one
    last_response  response that arrived last; None if nothing was requested
    examples       training examples; skipped chats do not count
    positions      supervised positions of examples that have a target
    valid          those whose target is valid; mass and tail are sums of probability over them
    fallbacks      positions where a geometric mean has no common token and the arithmetic mean is used
    shortened      samples that exceeded the limit of a model
    skipped        chats that could not be rendered for every model; skip_reason is the error of one of them
    folded_system  chats whose system message was moved into the first user message
    omitted_reasoning, changed_content  texts that the student's template does not render, or rewrites
    rollouts       counts of the rollouts
    """

    teachers: dict[str, TeacherTelemetry] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wait_s: float = 0.0
    sample_s: float = 0.0
    queued_batches: int = 0
    queued_tokens: int = 0
    last_response: ResponseTime | None = None
    examples: int = 0
    positions: int = 0
    valid: int = 0
    mass: float = 0.0
    tail: float = 0.0
    fallbacks: int = 0
    shortened: int = 0
    skipped: int = 0
    skip_reason: str = ""
    folded_system: int = 0
    omitted_reasoning: int = 0
    changed_content: int = 0
    rollouts: RolloutTelemetry = field(default_factory=RolloutTelemetry)

    def teacher(self, name: str) -> TeacherTelemetry:
        """Return the telemetry of one teacher, created if it does not exist."""
        return self.teachers.setdefault(name, TeacherTelemetry())

    def record(self, stage: str, seconds: float) -> None:
        """Add CPU seconds of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def respond(self, response: ResponseTime) -> None:
        """Record a teacher's response."""
        if self.last_response is None or response.received_at > self.last_response.received_at:
            self.last_response = response

    def add(self, other: "Collector") -> None:
        """Add the sums and the responses of another sample."""
        for name, teacher in other.teachers.items():
            self.teacher(name).add(teacher)
        for stage, seconds in other.seconds.items():
            self.record(stage, seconds)
        if other.last_response is not None:
            self.respond(other.last_response)
        self.skip_reason = self.skip_reason or other.skip_reason
        self.rollouts.add(other.rollouts)
        for count in ("examples", "positions", "valid", "mass", "tail", "fallbacks"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        for count in ("shortened", "skipped", "folded_system", "omitted_reasoning", "changed_content"):
            setattr(self, count, getattr(self, count) + getattr(other, count))

    def wait(self, begin: float, end: float) -> None:
        """Record that the step waited from `begin` to `end`; the last response's share is its teacher's."""
        self.wait_s = max(end - begin, 0.0)
        if self.last_response is not None:
            self.teacher(self.last_response.teacher).wait_s = self.last_response.overlap_s(begin, end)

    def without_cost(self) -> "Collector":
        """Return a copy without durations and responses, for a sample whose scores are reused."""
        return replace(self, teachers=dict(self.teachers), seconds={}, last_response=None)


def merged(collectors: Iterable[Collector]) -> Collector:
    """Return the sums of several samples."""
    total = Collector()
    for collector in collectors:
        total.add(collector)
    return total
