"""Training: the loop over steps, its checkpoints and identity, the optimizer, and launching several processes."""
