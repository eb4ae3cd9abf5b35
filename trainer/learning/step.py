"""One optimizer step: forward and backward over the parts of a batch, divided once by its number of tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from trainer.config import LossConfig, OptimConfig, RunConfig
from trainer.data.order import DROPOUT
from trainer.errors import DataError, NonFiniteLoss
from trainer.learning.divergences import divergence
from trainer.learning.labels import labels_from
from trainer.learning.losses import Objective, head_loss
from trainer.learning.parts import Part, parts_of, target_share, with_parts
from trainer.learning.student import Student
from trainer.ranks import Ranks
from trainer.targets.fuser import Lesson
from trainer.targets.pipeline import labels_of, supervised_from
from trainer.targets.priors import scheduled


@dataclass(frozen=True)
class StepPlan:
    """What the run file says for one step."""

    lr: float
    objective: Objective
    accumulate: int
    clip_norm: float
    teachers: tuple[str, ...]
    seed: tuple[int, ...] = (0,)
    parts: tuple[Part, ...] = ()


def plan_step(config: RunConfig, step: int, num_steps: int, num_ranks: int = 1) -> StepPlan:
    """`step` counts from 0. No rank is to make a pass over nothing while another has samples left."""
    progress = min(step / max(num_steps - 1, 1), 1.0)
    objective = objective_at(config.loss, progress, target_share(config, progress))
    return StepPlan(
        learning_rate(step, num_steps, config.optim),
        objective,
        min(config.train.accumulate, -(-config.train.batch_samples // num_ranks)),
        config.optim.clip_norm,
        tuple(teacher.name for teacher in config.teachers),
        (config.train.seed, DROPOUT, step),
        parts_of(config, progress) if objective.ce_weight < 1 else (),
    )


def objective_at(loss: LossConfig, progress: float, share: float = 1.0) -> Objective:
    """The loss at a progress of 0 to 1 through the run; share is what the fused teachers weigh of all."""
    first, last = loss.ce_weight, loss.last_ce_weight
    ce_weight = float(scheduled([first, 1 - first], [last, 1 - last], loss.schedule, progress)[0])
    apart = divergence(loss.divergence, loss.mix)
    return Objective(ce_weight, apart, loss.temperature, loss.chunk_tokens, share, loss.span_temperature)


@dataclass(frozen=True)
class StepResult:
    """Means over the batch's predicted tokens, in nats; the gradient's norm before clipping.

    divergence is None where it has no weight, for then it is not computed. parts are the losses of teachers that are
    not fused, by name, without their weights.
    """

    loss: float
    cross_entropy: float
    divergence: float | None
    num_tokens: int
    grad_norm: float
    lr: float
    parts: Mapping[str, float] = field(default_factory=dict)


def make_optimizer(student: Student, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trained, in one pass over it; matrices decay, norms and biases do not.

    Its state is made here for all of it, as torch does before it reads a checkpoint: a weight that no text reaches (an
    adapter of a part that is not called) would have none to be saved, and be missed.
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


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then cosine from lr to lr · min_lr_ratio over the rest; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def train_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    lessons: Sequence[Lesson],
    plan: StepPlan,
    ranks: Ranks = Ranks(),
) -> StepResult:
    """Move the student once; `lessons` are this rank's part of the batch.

    Raises NonFiniteLoss, naming sample and teachers, before the optimizer is touched.
    """
    tokens = sum(int(supervised_from(lesson, student.first_position).sum()) for lesson in lessons)
    num_tokens = int(ranks.sum([tokens])[0])
    names = ", ".join(lesson.sample.name for lesson in lessons) or "(none: all were skipped)"
    if num_tokens == 0:
        raise DataError(
            f"there is nothing to learn from in the samples {names}: nothing was updated; mend the data, or raise "
            "train.batch_samples"
        )
    torch.manual_seed(int(np.random.SeedSequence([*plan.seed, ranks.rank]).generate_state(1)[0]))  # dropout
    sums = torch.zeros(2 + len(plan.parts), dtype=torch.float64)
    for i in range(plan.accumulate):
        part = lessons[len(lessons) * i // plan.accumulate : len(lessons) * (i + 1) // plan.accumulate]
        sums += _backward(student, part, num_tokens, plan)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), plan.clip_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not bool(torch.isfinite(norm)):
        raise NonFiniteLoss(f"the gradient's norm is {float(norm)} for the samples {names}; nothing was updated")
    for group in optimizer.param_groups:
        group["lr"] = plan.lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ce, apart, *own = (value / num_tokens for value in ranks.sum(sums.tolist()))
    objective, of_parts = plan.objective, list(zip(plan.parts, own, strict=True))
    taught = objective.target_weight * apart
    taught += (1 - objective.ce_weight) * sum(part.share * value for part, value in of_parts)
    return StepResult(
        objective.ce_weight * ce + taught,
        ce,
        apart if objective.target_weight > 0 else None,
        num_tokens,
        float(norm),
        plan.lr,
        {part.name: value for part, value in of_parts},
    )


def _backward(student: Student, lessons: Sequence[Lesson], num_tokens: int, plan: StepPlan) -> torch.Tensor:
    """Gradients of one part; returns the sums of cross-entropy, divergence and each teacher's own part."""
    pairs = [labels_of(lesson, student.first_position) for lesson in lessons]
    labels = labels_from([tokens for tokens, _ in pairs], [target for _, target in pairs])
    labels = with_parts(labels, lessons, plan.parts, student.first_position).to(student.device)
    total, ce_T, divergence_T, parts_NT = student.compute(
        [lesson.tokens for lesson in lessons],
        [supervised_from(lesson, student.first_position) for lesson in lessons],
        partial(head_loss, labels=labels, objective=plan.objective),
    )
    (total / num_tokens).backward()
    columns_T = (ce_T, divergence_T, *parts_NT)
    sums = torch.stack([column.double().sum() for column in columns_T]).cpu()
    if not bool(torch.isfinite(sums).all()):
        raise _non_finite(columns_T, lessons, student.first_position, plan)
    return sums


def _non_finite(
    columns_T: Sequence[torch.Tensor], lessons: Sequence[Lesson], first_position: int, plan: StepPlan
) -> NonFiniteLoss:
    """Which sample, where, and whose: cross-entropy first, for what is wrong with the student shows there."""
    positions = [np.flatnonzero(supervised_from(lesson, first_position)) + first_position for lesson in lessons]
    whose = ["", "", *(f" of teacher {part.name}" for part in plan.parts)]
    found = (
        f"the loss{of} of sample {lesson.sample.name} at token {int(at[int(bad[0])])} is {float(part[bad[0]])} "
        f"(teachers: {', '.join(plan.teachers) or 'none'}); nothing was updated"
        for of, column_T in zip(whose, columns_T, strict=True)
        for lesson, at, part in zip(lessons, positions, column_T.split([len(p) for p in positions]), strict=True)
        if len(bad := torch.isfinite(part).logical_not().nonzero())
    )
    return NonFiniteLoss(next(found))
