"""Losses of the student: divergences from the fused target, auxiliary losses, and their computation with the LM head.

This module holds only the registry of divergences. It imports nothing heavy, so that configuration can list the names.
A new divergence is one file with one function and one line here; `trainer.losses.divergences` describes the function.
"""

DIVERGENCES: dict[str, str] = {
    "forward_kl": "trainer.losses.forward_kl:forward_kl",
    "reverse_kl": "trainer.losses.reverse_kl:reverse_kl",
    "jensen_shannon": "trainer.losses.jensen_shannon:jensen_shannon",
    "skew_kl": "trainer.losses.skew_kl:skew_kl",
    "skew_reverse_kl": "trainer.losses.skew_reverse_kl:skew_reverse_kl",
    "total_variation": "trainer.losses.total_variation:total_variation",
}
"""Name in the run file → "module:function", in the order in which documentation and error messages list them."""
