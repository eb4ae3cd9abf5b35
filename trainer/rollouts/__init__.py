"""Rollouts for on-policy distillation: the student continues prompts, and learns from the teachers' scores of its text.

ENGINES is the registry of what samples the tokens: name -> "module:class" of a trainer.rollouts.base.RolloutEngine.
"""

ENGINES: dict[str, str] = {
    "transformers": "trainer.rollouts.transformers_engine:TransformersEngine",
}
