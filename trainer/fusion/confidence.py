"""Fusion method `confidence`."""

from collections.abc import Sequence

from trainer.fusion.base import AllGather, FusionMethod, FusionRule
from trainer.fusion.comparison import compare, entropy
from trainer.fusion.inputs import Floats, StackedSample


class Confidence(FusionMethod):
    """Arithmetic mean weighted by the softmax of −entropy in nats / temperature."""

    uses_scope = True

    @classmethod
    def scores(cls, samples: Sequence[StackedSample], rule: FusionRule, all_gather: AllGather) -> list[Floats]:
        return [-losses_NT / rule.temperature for losses_NT, _ in compare(samples, entropy, rule, all_gather)]
