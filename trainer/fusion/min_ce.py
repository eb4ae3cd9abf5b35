"""Fusion method `min_ce`."""

from collections.abc import Sequence

from trainer.fusion.base import AllGather, FusionMethod, FusionRule
from trainer.fusion.comparison import best_only, compare, cross_entropy
from trainer.fusion.inputs import Floats, StackedSample


class MinCE(FusionMethod):
    """The teacher with the fewest bits per byte on the text. Teachers with equal values share by their weights."""

    uses_scope = True

    @classmethod
    def scores(cls, samples: Sequence[StackedSample], rule: FusionRule, all_gather: AllGather) -> list[Floats]:
        return [best_only(comparison) for comparison in compare(samples, cross_entropy, rule, all_gather)]
