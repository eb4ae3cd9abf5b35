"""Fusion method `avg_ce`."""

from collections.abc import Sequence

from trainer.fusion.base import AllGather, FusionMethod, FusionRule
from trainer.fusion.comparison import compare, cross_entropy
from trainer.fusion.inputs import Floats, StackedSample


class AvgCE(FusionMethod):
    """Arithmetic mean weighted by the softmax of −bits per byte / temperature."""

    uses_scope = True

    @classmethod
    def scores(cls, samples: Sequence[StackedSample], rule: FusionRule, all_gather: AllGather) -> list[Floats]:
        return [-losses_NT / rule.temperature for losses_NT, _ in compare(samples, cross_entropy, rule, all_gather)]
