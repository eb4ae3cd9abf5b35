"""AdamW over the trained parameters, and its learning rate by step."""

import math

import torch

from trainer.student.model import Student
from trainer.training.config import OptimConfig


def make_optimizer(student: Student, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters. Matrices have weight decay; norms and biases do not.

    One step with learning rate 0 creates the optimizer's state of every parameter, as torch does before it loads a
    checkpoint. Otherwise a parameter that never has a gradient (an adapter of a layer that is not called) would have no
    state in the checkpoint, and loading would expect one.
    """
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    others = [p for p in student.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=config.betas, fused=True)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        state["step"].zero_()
    for group in optimizer.param_groups:
        group["lr"] = config.lr
    return optimizer


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return how often the optimizer has updated the parameters, in all starts of a run."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then cosine from lr to lr · min_lr_ratio.

    The learning rate reaches its peak at the last step of the warm-up, and its final value at the last step of the run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    peak_step = max(config.warmup_steps - 1, 0)
    progress = (step - peak_step) / max(1, num_steps - 1 - peak_step)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
