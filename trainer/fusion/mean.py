"""Fusion method `mean`."""

from trainer.fusion.base import FusionMethod


class Mean(FusionMethod):
    """Weighted arithmetic mean of the teachers' probabilities: the minimum of Σ w · KL(teacher ‖ target)."""
