"""Fusion of the targets of several teachers into one target per position.

This module holds only the registry of fusion methods. It imports nothing heavy, so that configuration can list the
names. A new method is one file with one subclass of `trainer.fusion.base.FusionMethod` and one line here.
"""

FUSION_METHODS: dict[str, str] = {
    "mean": "trainer.fusion.mean:Mean",
    "geometric": "trainer.fusion.geometric:Geometric",
    "min_ce": "trainer.fusion.min_ce:MinCE",
    "avg_ce": "trainer.fusion.avg_ce:AvgCE",
    "confidence": "trainer.fusion.confidence:Confidence",
    "adaptive": "trainer.fusion.adaptive:Adaptive",
    "router": "trainer.fusion.router:Router",
    "fusellm_min_ce": "trainer.fusion.fusellm:FuseLLMMinCE",
    "fusellm_avg_ce": "trainer.fusion.fusellm:FuseLLMAvgCE",
}
"""Name in the run file → "module:class", in the order in which documentation and error messages list them."""
