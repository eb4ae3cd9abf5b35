"""Fusion method `geometric`."""

from trainer.fusion.base import FusionMethod


class Geometric(FusionMethod):
    """Weighted geometric mean (log-linear pooling): the minimum of Σ w · KL(target ‖ teacher)."""

    mean = "geometric"
