"""One optimizer step: passes over microbatches, with losses divided once by the global number of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from trainer.distributed import Ranks
from trainer.errors import NonFiniteLoss
from trainer.losses.head import head_loss
from trainer.losses.labels import labels_from
from trainer.records import DistillationExample
from trainer.signals.auxiliary import with_auxiliary
from trainer.student.model import Student
from trainer.training.plan import StepPlan


@dataclass(frozen=True)
class StepResult:
    """Means over the batch's supervised tokens in nats, and the gradient norm before clipping.

    divergence is None if it has weight 0 and is not computed. auxiliary has the unweighted loss of each teacher whose
    signal is not fused, by name. router_loss is the unweighted auxiliary loss of the router, the mean over all tokens;
    it is None if the student has none. Without supervised tokens there was no update: losses and norm are None.
    """

    loss: float | None
    cross_entropy: float | None
    divergence: float | None
    num_tokens: int
    grad_norm: float | None
    lr: float
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    router_loss: float | None = None


def train_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[DistillationExample],
    plan: StepPlan,
    ranks: Ranks = Ranks(),
) -> StepResult:
    """Update the student once. `examples` are this process's shard of the batch.

    If no process has a supervised token, because all chats of the batch were skipped, nothing is updated, in all
    processes alike. Raises NonFiniteLoss, naming the samples, if a loss or the gradient norm is NaN or infinite. After
    an error the weights are unchanged.
    """
    num_tokens, num_inputs = _num_tokens(student, examples, ranks)
    if num_tokens == 0:
        return StepResult(None, None, None, num_tokens=0, grad_norm=None, lr=plan.lr)
    names = ", ".join(example.sample.name for example in examples) or "(none: all were skipped)"
    torch.manual_seed(int(np.random.SeedSequence([*plan.seed, ranks.rank]).generate_state(1)[0]))  # dropout
    sums = torch.zeros(3 + len(plan.auxiliary), dtype=torch.float64)
    num_microbatches = plan.gradient_accumulation_steps
    for i in range(num_microbatches):
        begin, end = len(examples) * i // num_microbatches, len(examples) * (i + 1) // num_microbatches
        sums += _backward(student, examples[begin:end], (num_tokens, num_inputs), plan)
    norm = _clip(student, plan.clip_norm)
    if not bool(torch.isfinite(norm)):
        raise NonFiniteLoss(f"the gradient norm is {float(norm)} for the samples {names}; nothing was updated")
    for group in optimizer.param_groups:
        group["lr"] = plan.lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    *totals, router_total = ranks.all_reduce_sum(sums.tolist())
    router = (student.router_loss.weight, router_total / num_inputs) if student.router_loss else None
    return _result([value / num_tokens for value in totals], plan, (num_tokens, float(norm)), router)


def _num_tokens(student: Student, examples: Sequence[DistillationExample], ranks: Ranks) -> tuple[int, int]:
    """Return the number of supervised tokens, and of tokens that the student reads, of all processes."""
    tokens = sum(int(example.supervised(student.first_position).sum()) for example in examples)
    inputs = student.num_inputs([example.tokenized.tokens for example in examples])
    num_tokens, num_inputs = ranks.all_reduce_sum([tokens, inputs])
    return int(num_tokens), int(num_inputs)


def _clip(student: Student, max_norm: float) -> torch.Tensor:
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _result(
    means: Sequence[float], plan: StepPlan, tokens_and_norm: tuple[int, float], router: tuple[float, float] | None
) -> StepResult:
    """Build the result from means over the supervised tokens. `router` is the weight and the mean of its loss."""
    cross_entropy, divergence, *auxiliary = means
    num_tokens, grad_norm = tokens_and_norm
    router_weight, router_loss = router or (0.0, None)
    objective = plan.objective
    distillation_loss = objective.target_weight * divergence
    distillation_loss += (1 - objective.ce_weight) * sum(
        loss.weight * value for loss, value in zip(plan.auxiliary, auxiliary, strict=True)
    )
    return StepResult(
        loss=objective.ce_weight * cross_entropy + distillation_loss + router_weight * (router_loss or 0.0),
        cross_entropy=cross_entropy,
        divergence=divergence if objective.target_weight > 0 else None,
        num_tokens=num_tokens,
        grad_norm=grad_norm,
        lr=plan.lr,
        auxiliary={loss.name: value for loss, value in zip(plan.auxiliary, auxiliary, strict=True)},
        router_loss=router_loss,
    )


def _backward(
    student: Student, examples: Sequence[DistillationExample], batch_tokens: tuple[int, int], plan: StepPlan
) -> torch.Tensor:
    """Compute gradients of one microbatch.

    batch_tokens  supervised tokens of the batch, and tokens that the student reads: the divisors of the losses
    Return the sums of cross-entropy, divergence and auxiliary losses, and last the router's loss times its tokens.
    """
    num_tokens, num_inputs = batch_tokens
    samples = [example.tokenized.tokens for example in examples]
    first_position = student.first_position
    pairs = [example.labels(first_position) for example in examples]
    labels = labels_from([ids for ids, _ in pairs], [target for _, target in pairs])
    labels = with_auxiliary(labels, examples, plan.auxiliary, first_position).to(student.device)
    total, ce_T, divergence_T, auxiliary_NT, *router = student.compute(
        samples,
        [example.supervised(first_position) for example in examples],
        partial(head_loss, labels=labels, objective=plan.objective),
        router_loss=student.router_loss is not None,
    )
    loss, router_sum = total / num_tokens, torch.zeros(1, dtype=torch.float64)
    if student.router_loss is not None:
        of_microbatch = router[0] * student.num_inputs(samples)
        loss = loss + student.router_loss.weight / num_inputs * of_microbatch
        router_sum = of_microbatch.detach().double().cpu().reshape(1)
    loss.backward()
    columns_T = (ce_T, divergence_T, *auxiliary_NT)
    sums = torch.stack([column.double().sum() for column in columns_T]).cpu()
    if not bool(torch.isfinite(sums).all()):
        raise _non_finite(columns_T, examples, first_position, plan)
    return torch.cat([sums, router_sum])


def _non_finite(
    columns_T: Sequence[torch.Tensor], examples: Sequence[DistillationExample], first_position: int, plan: StepPlan
) -> NonFiniteLoss:
    """Return an error that names the sample, the position and the loss.

    Cross-entropy is searched first, because it shows whether the student itself has failed.
    """
    positions = [np.flatnonzero(example.supervised(first_position)) + first_position for example in examples]
    owners = ["", "", *(f" of teacher {loss.name}" for loss in plan.auxiliary)]
    messages = (
        f"the loss{owner} of sample {example.sample.name} at token {int(at[int(bad[0])])} is {float(part[bad[0]])} "
        f"(teachers: {', '.join(plan.teachers) or 'none'}); nothing was updated"
        for owner, column_T in zip(owners, columns_T, strict=True)
        for example, at, part in zip(examples, positions, column_T.split([len(p) for p in positions]), strict=True)
        if len(bad := torch.isfinite(part).logical_not().nonzero())
    )
    return NonFiniteLoss(next(messages))
