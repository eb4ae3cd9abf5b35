"""Rollouts for on-policy distillation: the student continues prompts, and learns from the teachers' scores of its text.

ENGINES is the registry of the components that sample tokens: name -> "module:class" of a RolloutEngine (base.py).
"""

ENGINES: dict[str, str] = {
    "transformers": "trainer.rollouts.transformers_engine:TransformersEngine",
}
