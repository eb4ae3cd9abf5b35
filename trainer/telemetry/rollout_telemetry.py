"""Counts of rollouts, collected beside the data like all telemetry (collector.py)."""

from dataclasses import dataclass, fields


@dataclass
class RolloutTelemetry:
    """Sums over rollouts.

    samples          rollouts
    tokens           sampled tokens, end tokens included
    num_bytes        bytes of sampled text
    own_nats         negative log-likelihood of the sampled tokens by the weights that sampled them
    entropy          entropy in nats of the distributions from which they were sampled
    cut              sampled tokens that are not used, because they are not whole characters
    finished         rollouts that ended with an end token or a stop string
    repeated         tokens that end a run of four tokens which the same rollout contains earlier
    age_steps        steps between the weights that sampled a token and those that are trained on it, summed over tokens
    max_age_steps    largest such number
    noncanonical     tokens without a target because the tokenizer would have written their text with other tokens
    fused_nats       negative log-likelihood of the sampled tokens by the fused target, where it is valid
    fused_bytes      bytes of text of these tokens
    """

    samples: int = 0
    tokens: int = 0
    num_bytes: int = 0
    own_nats: float = 0.0
    entropy: float = 0.0
    cut: int = 0
    finished: int = 0
    repeated: int = 0
    age_steps: int = 0
    max_age_steps: int = 0
    noncanonical: int = 0
    fused_nats: float = 0.0
    fused_bytes: int = 0

    def add(self, other: "RolloutTelemetry") -> None:
        """Add the sums of other rollouts."""
        largest = max(self.max_age_steps, other.max_age_steps)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        self.max_age_steps = largest
