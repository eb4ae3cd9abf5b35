"""Distributed runs: torchrun and Ray Train start the processes, which `trainer.training` trains in."""
