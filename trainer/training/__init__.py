"""Training: the loop over steps, its checkpoints and identity, and the optimizer."""
