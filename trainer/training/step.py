"""One optimizer step: passes over microbatches, with losses divided once by the global number of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.distributed import Ranks
from trainer.errors import NonFiniteLoss
from trainer.losses.head import head_loss
from trainer.losses.labels import Labels, labels_from
from trainer.losses.lm_head import LMHead
from trainer.losses.objective import Objective
from trainer.records import DistillationExample
from trainer.signals.auxiliary import with_auxiliary
from trainer.student.model import Student
from trainer.training.plan import StepPlan


@dataclass(frozen=True)
class RolloutLoss:
    """The tokens that the student sampled: their number, and means over them in nats.

    cross_entropy is the negative log-likelihood of the tokens under the weights before the step. It is not in the loss.
    """

    num_tokens: int
    cross_entropy: float
    divergence: float


@dataclass(frozen=True)
class StepResult:
    """Means over the batch's supervised tokens of given text in nats, and the gradient norm before clipping.

    loss is the mean over all supervised tokens. cross_entropy and divergence are None without tokens of given text;
    divergence is None, too, if it has weight 0 and is not computed. rollout is None without sampled tokens. auxiliary
    has the unweighted loss of each teacher whose signal is not fused, by name. router_loss is the unweighted auxiliary
    loss of the router, the mean over all tokens; it is None if the student has none. Without supervised tokens there
    was no update: losses and norm are None.
    """

    loss: float | None
    cross_entropy: float | None
    divergence: float | None
    num_tokens: int
    grad_norm: float | None
    lr: float
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    router_loss: float | None = None
    rollout: RolloutLoss | None = None


@dataclass(frozen=True)
class _TokenCounts:
    """Tokens of the batch, of all processes.

    given    supervised tokens of given text
    sampled  tokens that the student has sampled
    inputs   tokens that the student reads
    """

    given: int
    sampled: int
    inputs: int

    @property
    def supervised(self) -> int:
        """Divisor of the losses."""
        return self.given + self.sampled


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
    counts = _count_tokens(student, examples, ranks)
    if counts.supervised == 0:
        return StepResult(None, None, None, num_tokens=0, grad_norm=None, lr=plan.lr)
    names = ", ".join(example.sample.name for example in examples) or "(none: all were skipped)"
    torch.manual_seed(int(np.random.SeedSequence([*plan.seed, ranks.rank]).generate_state(1)[0]))  # dropout
    sums = torch.zeros(3 + len(plan.auxiliary) + 2 * (plan.rollout is not None), dtype=torch.float64)
    num_microbatches = plan.gradient_accumulation_steps
    for i in range(num_microbatches):
        begin, end = len(examples) * i // num_microbatches, len(examples) * (i + 1) // num_microbatches
        sums += _backward(student, examples[begin:end], counts, plan)
    norm = _clip(student, plan.clip_norm)
    if not bool(torch.isfinite(norm)):
        raise NonFiniteLoss(f"the gradient norm is {float(norm)} for the samples {names}; nothing was updated")
    for group in optimizer.param_groups:
        group["lr"] = plan.lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    *totals, router_total = ranks.all_reduce_sum(sums.tolist())
    router = (student.router_loss.weight, router_total / counts.inputs) if student.router_loss else None
    return _result(totals, plan, counts, float(norm), router)


def _count_tokens(student: Student, examples: Sequence[DistillationExample], ranks: Ranks) -> _TokenCounts:
    tokens = [0, 0]
    for example in examples:
        tokens[example.sample.rollout is not None] += int(example.supervised(student.first_position).sum())
    inputs = student.num_inputs([example.tokenized.tokens for example in examples])
    return _TokenCounts(*(int(count) for count in ranks.all_reduce_sum([*tokens, inputs])))


def _clip(student: Student, max_norm: float) -> torch.Tensor:
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _result(
    totals: Sequence[float],
    plan: StepPlan,
    counts: _TokenCounts,
    grad_norm: float,
    router: tuple[float, float] | None,
) -> StepResult:
    """Build the result from the sums of `_backward`. `router` is the weight and the mean of the router's loss."""
    num_given = 2 + len(plan.auxiliary)
    cross_entropy, divergence, *auxiliary = (total / max(counts.given, 1) for total in totals[:num_given])
    rollout = None
    if counts.sampled:
        rollout = RolloutLoss(counts.sampled, *(total / counts.sampled for total in totals[num_given:]))
    router_weight, router_loss = router or (0.0, None)
    objective = plan.objective
    distillation_loss = objective.target_weight * divergence
    distillation_loss += (1 - objective.ce_weight) * sum(
        loss.weight * value for loss, value in zip(plan.auxiliary, auxiliary, strict=True)
    )
    loss = counts.given / counts.supervised * (objective.ce_weight * cross_entropy + distillation_loss)
    if rollout is not None and plan.rollout is not None:
        loss += counts.sampled / counts.supervised * plan.rollout.target_weight * rollout.divergence
    return StepResult(
        loss=loss + router_weight * (router_loss or 0.0),
        cross_entropy=cross_entropy if counts.given else None,
        divergence=divergence if objective.target_weight > 0 and counts.given else None,
        num_tokens=counts.supervised,
        grad_norm=grad_norm,
        lr=plan.lr,
        auxiliary={loss.name: value for loss, value in zip(plan.auxiliary, auxiliary, strict=True)},
        router_loss=router_loss,
        rollout=rollout,
    )


def _backward(
    student: Student, examples: Sequence[DistillationExample], counts: _TokenCounts, plan: StepPlan
) -> torch.Tensor:
    """Compute gradients of one microbatch.

    Return the sums of cross-entropy, divergence and auxiliary losses of given text; with rollouts in the run, the sums
    of cross-entropy and divergence of sampled text; and last the router's loss times its tokens.
    """
    first_position = student.first_position
    groups = [(examples, plan.objective)]
    if plan.rollout is not None:
        given = [example for example in examples if example.sample.rollout is None]
        sampled = [example for example in examples if example.sample.rollout is not None]
        groups, examples = [(given, plan.objective), (sampled, plan.rollout)], [*given, *sampled]
    parts = [(_labels(group, plan, first_position).to(student.device), objective) for group, objective in groups]
    samples = [example.tokenized.tokens for example in examples]
    total, ce_T, divergence_T, auxiliary_NT, *router = student.compute(
        samples,
        [example.supervised(first_position) for example in examples],
        partial(_head_losses, parts=parts),
        router_loss=student.router_loss is not None,
    )
    loss, router_sum = total / counts.supervised, torch.zeros(1, dtype=torch.float64)
    if student.router_loss is not None:
        of_microbatch = router[0] * student.num_inputs(samples)
        loss = loss + student.router_loss.weight / counts.inputs * of_microbatch
        router_sum = of_microbatch.detach().double().cpu().reshape(1)
    loss.backward()
    columns_T = (ce_T, divergence_T, *auxiliary_NT)
    num_given = len(parts[0][0])
    sums = [column_T[:num_given].double().sum() for column_T in columns_T]
    if plan.rollout is not None:
        sums += [column_T[num_given:].double().sum() for column_T in (ce_T, divergence_T)]
    sums_cpu = torch.stack(sums).cpu()
    if not bool(torch.isfinite(sums_cpu).all()):
        raise _non_finite(columns_T, examples, first_position, plan)
    return torch.cat([sums_cpu, router_sum])


def _labels(examples: Sequence[DistillationExample], plan: StepPlan, first_position: int) -> Labels:
    pairs = [example.labels(first_position) for example in examples]
    labels = labels_from([ids for ids, _ in pairs], [target for _, target in pairs])
    return with_auxiliary(labels, examples, plan.auxiliary, first_position)


def _head_losses(head: LMHead, hidden_TD: Tensor, parts: Sequence[tuple[Labels, Objective]]) -> tuple[Tensor, ...]:
    """Return the fields of a Loss for consecutive positions with different objectives."""
    hidden = hidden_TD.split([len(labels) for labels, _ in parts])
    losses = [head_loss(head, each_TD, *part) for each_TD, part in zip(hidden, parts, strict=True)]
    total, *columns = zip(*losses, strict=True)
    return (torch.stack(total).sum(), *(torch.cat(column, -1) for column in columns))


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
