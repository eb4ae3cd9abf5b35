"""The telemetry of one rollout: counts of its tokens, and its likelihood by the fused target."""

import numpy as np

from trainer.records import DistillationExample
from trainer.telemetry.rollout_telemetry import RolloutTelemetry

REPEATED_TOKENS = 4
MIN_PROB = 2.0**-24  # resolution of a target's tail


def count_rollout(example: DistillationExample, step: int, first_position: int) -> RolloutTelemetry:
    """Return the telemetry of an example; all 0 for given text.

    step  number of steps before the one that trains on the example
    A sampled token that the target does not list counts with the whole tail, an upper bound of its probability.
    """
    rollout = example.sample.rollout
    if rollout is None:
        return RolloutTelemetry()
    age = step - rollout.version
    counts = RolloutTelemetry(
        samples=1,
        tokens=len(rollout.ids),
        num_bytes=sum(rollout.num_bytes),
        own_nats=-sum(rollout.logprobs),
        entropy=sum(rollout.entropies),
        cut=rollout.num_cut,
        finished=int(rollout.finish != "length"),
        repeated=_count_repeated(rollout.ids),
        age_steps=age * len(rollout.ids),
        max_age_steps=age,
    )
    ids, target = example.labels(first_position)
    if target is not None:
        num_bytes = example.tokenized.num_bytes_T[first_position:][example.supervised(first_position)]
        probs = target.prob_of(ids)
        probs = np.where(probs > 0, probs, target.tail).clip(min=MIN_PROB)
        counts.fused_nats = -float(np.log(probs[target.valid]).sum())
        counts.fused_bytes = int(num_bytes[target.valid].sum())
    return counts


def _count_repeated(ids: tuple[int, ...]) -> int:
    runs = [ids[i : i + REPEATED_TOKENS] for i in range(len(ids) - REPEATED_TOKENS + 1)]
    return len(runs) - len(set(runs))
