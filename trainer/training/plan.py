"""The plan of one step: learning rate, objective, auxiliary losses and microbatches, from the run file's schedules."""

from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.fusion.run_fuser import teacher_weights_at
from trainer.fusion.teacher_weights import scheduled
from trainer.losses.config import LossConfig
from trainer.losses.divergences import divergence
from trainer.losses.objective import Objective
from trainer.rollouts.config import RolloutConfig
from trainer.signals.auxiliary import AuxiliaryLoss, auxiliary_losses, fused_weight
from trainer.sources.sample_order import DROPOUT
from trainer.training.optimizer import learning_rate


@dataclass(frozen=True)
class StepPlan:
    """Settings of one step.

    auxiliary  losses of teachers whose signal is not fused; empty if the distillation loss has weight 0
    seed       seed of dropout; every process appends its rank
    rollout    objective on text that the student has sampled; None for a run without rollouts
    """

    lr: float
    objective: Objective
    gradient_accumulation_steps: int
    clip_norm: float
    teachers: tuple[str, ...]
    seed: tuple[int, ...] = (0,)
    auxiliary: tuple[AuxiliaryLoss, ...] = ()
    rollout: Objective | None = None


def plan_step(config: RunConfig, step: int, num_steps: int, num_ranks: int = 1) -> StepPlan:
    """Return the plan of a step, counted from 0.

    The number of microbatches is at most the number of samples of the largest shard.
    """
    progress = min(step / max(num_steps - 1, 1), 1.0)
    teacher_weights_N = teacher_weights_at(config.teachers, config.fusion, progress).tolist()
    objective = objective_at(config.loss, progress, fused_weight(config.teachers, teacher_weights_N))
    return StepPlan(
        lr=learning_rate(step, num_steps, config.optim),
        objective=objective,
        gradient_accumulation_steps=min(
            config.train.gradient_accumulation_steps, -(-config.max_batch_samples // num_ranks)
        ),
        clip_norm=config.optim.clip_norm,
        teachers=tuple(teacher.name for teacher in config.teachers),
        seed=(config.train.seed, DROPOUT, step),
        auxiliary=auxiliary_losses(config.teachers, teacher_weights_N) if objective.ce_weight < 1 else (),
        rollout=rollout_objective(config.rollout, config.loss) if config.rollout else None,
    )


def objective_at(loss: LossConfig, progress: float, fused_weight: float = 1.0) -> Objective:
    """Return the objective at a progress of 0 to 1 through the run.

    fused_weight is the weight of the fused target, relative to all teachers.
    """
    begin, end = loss.ce_weight, loss.end_ce_weight
    ce_weight = float(scheduled([begin, 1 - begin], [end, 1 - end], loss.schedule, progress)[0])
    function = divergence(loss.divergence, loss.alpha, loss.beta)
    return Objective(ce_weight, function, loss.temperature, loss.chunk_tokens, fused_weight, loss.span_temperature)


def rollout_objective(rollout: RolloutConfig, loss: LossConfig) -> Objective:
    """Return the objective on text that the student has sampled: the divergence alone, without cross-entropy."""
    return Objective(
        0.0, divergence(rollout.divergence, rollout.alpha, rollout.beta), loss.temperature, loss.chunk_tokens
    )
