"""The parts of the loss that belong to teachers whose tokens are not translated: as tensors, and what spans weigh.

Teachers matched by `sorted` become spreads, which losses.py holds against the student's own. Those matched by `spans`
come here (Approximate Likelihood Matching, arXiv 2503.20083): with p and q the probabilities that teacher and student
give to the text of a span, there are two outcomes, this text or another, and the loss is the divergence of
(p^(1/τ), 1 − p^(1/τ)) from (q^(1/τ), 1 − q^(1/τ)), least at q = p whatever τ. It is multiplied by τ, so that it does
not vanish as τ grows: forward KL then comes near a log(a/b) − a + b, where a = −log p and b = −log q.

log q is a sum over the span's tokens, so its derivative is one number for all of them: what their cross-entropy is
weighed with. It must be known before the gradient is made, which costs a pass over the head without gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alignment.unaligned import SortedProbs, SpanLikelihoods
from trainer.config import RunConfig
from trainer.learning.divergences import FLOOR
from trainer.learning.labels import Labels, Spread
from trainer.learning.losses import Head, Objective, head_loss
from trainer.targets.fuser import Lesson, part_shares
from trainer.targets.pipeline import supervised_from


@dataclass(frozen=True)
class Part:
    """A teacher with its own part: which of the run's teachers, and its share of what all teachers weigh."""

    index: int
    name: str
    match: Literal["spans", "sorted"]
    share: float


@dataclass(frozen=True, eq=False)
class Spans:
    """S spans of one teacher over T positions, disjoint.

    span_T      int64: the span of each position; S where it is in none
    logprobs_S  float32 nats, of the teacher
    share       of what all teachers weigh in the loss
    """

    span_T: Tensor
    logprobs_S: Tensor
    share: float

    def to(self, device: torch.device) -> "Spans":
        return replace(self, span_T=self.span_T.to(device), logprobs_S=self.logprobs_S.to(device))


def parts_of(config: RunConfig, progress: float) -> tuple[Part, ...]:
    """The parts of the run's teachers at a progress of 0 to 1: those by `sorted` first, then those by `spans`."""
    parts = [
        Part(i, teacher.name, teacher.match, float(share))
        for i, (teacher, share) in enumerate(zip(config.teachers, part_shares(config, progress), strict=True))
        if teacher.match == "spans" or teacher.match == "sorted"
    ]
    return tuple(sorted(parts, key=lambda part: part.match))


def target_share(config: RunConfig, progress: float) -> float:
    """What the fused teachers weigh of all."""
    teachers = zip(config.teachers, part_shares(config, progress), strict=True)
    fused = [float(share) for teacher, share in teachers if teacher.is_fused]
    return 1.0 if len(fused) == len(config.teachers) else sum(fused)


def with_parts(
    labels: Labels, lessons: Sequence[Lesson], parts: Sequence[Part], first_position: int
) -> tuple[Labels, list[Spans]]:
    """The labels of all lessons' supervised positions with the spreads of their teachers, and the others' spans."""
    spreads = tuple(spread_from(lessons, part, first_position) for part in parts if part.match == "sorted")
    spans = [spans_from(lessons, part, first_position) for part in parts if part.match == "spans"]
    return replace(labels, spreads=spreads), spans


def spread_from(lessons: Sequence[Lesson], part: Part, first_position: int) -> Spread:
    """One teacher's sorted probabilities at the supervised positions of all lessons, one after another."""
    found = [lesson.unaligned[part.index] for lesson in lessons]
    wide = max([1, *(own.probs.shape[1] for own in found if isinstance(own, SortedProbs))])
    columns = [(np.zeros((0, wide), dtype=np.float32), np.zeros(0, dtype=np.float32))]
    for lesson, own in zip(lessons, found, strict=True):
        probs_TK = np.zeros((len(lesson.tokens), wide), dtype=np.float32)
        tail_T = np.zeros(len(lesson.tokens), dtype=np.float32)
        if isinstance(own, SortedProbs):
            probs_TK[own.positions, : own.probs.shape[1]], tail_T[own.positions] = own.probs, own.tail
        wanted = supervised_from(lesson, first_position)
        columns.append((probs_TK[first_position:][wanted], tail_T[first_position:][wanted]))
    probs, tail = (torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True))
    return Spread(probs, tail, part.share)


def spans_from(lessons: Sequence[Lesson], part: Part, first_position: int) -> Spans:
    """One teacher's spans over the supervised positions of all lessons, but for those that are not supervised whole."""
    columns, logprobs, num_spans = [np.zeros(0, dtype=np.int64)], [np.zeros(0)], 0
    for lesson in lessons:
        at = first_position + np.flatnonzero(supervised_from(lesson, first_position))
        own, span_T = lesson.unaligned[part.index], np.full(len(at), -1)
        if isinstance(own, SpanLikelihoods) and len(own):
            begin, end = own.student.T
            inside = np.searchsorted(begin, at, side="right") - 1
            inside[at >= end[inside]] = -1
            whole = np.bincount(inside[inside >= 0], minlength=len(own)) == end - begin
            numbers = np.where(whole, num_spans + np.cumsum(whole) - 1, -1)
            span_T = np.where(inside >= 0, numbers[inside], -1)
            logprobs.append(own.logprobs[whole])
            num_spans += int(whole.sum())
        columns.append(span_T)
    every_T = np.concatenate(columns)
    every_T[every_T < 0] = num_spans
    return Spans(torch.from_numpy(every_T), torch.from_numpy(np.concatenate(logprobs).astype(np.float32)), part.share)


def parts_loss(
    head: Head, hidden_TD: Tensor, labels: Labels, objective: Objective, spans: Sequence[Spans]
) -> tuple[Tensor, ...]:
    """`head_loss` of all parts: its total, [T] cross-entropy, [T] divergence, [T] of each spread, [S] of all spans.

    The total's value is not the loss where there are spans, its gradient is.
    """
    labels, of_spans = weigh_spans(head, hidden_TD, labels, objective, spans)
    loss = head_loss(head, hidden_TD, labels, objective)
    return loss.total, loss.ce_T, loss.divergence_T, *loss.spreads_NT, *of_spans


def weigh_spans(
    head: Head, hidden_TD: Tensor, labels: Labels, objective: Objective, spans: Sequence[Spans]
) -> tuple[Labels, list[Tensor]]:
    """The labels with weights of their text that hold the gradient of all spans, and each teacher's loss on them [S].

    One pass over the head without gradients: a product more than the three of `head_loss`.
    """
    if not spans:
        return labels, []
    plain = replace(labels, text_weight_T=None, spreads=())
    with torch.no_grad():
        nats_T = head_loss(head, hidden_TD, plain, Objective(chunk_tokens=objective.chunk_tokens)).ce_T
    weight_T, of_spans = torch.full_like(nats_T, objective.ce_weight), []
    for own in (one.to(nats_T.device) for one in spans):
        apart_S, own_weight_T = span_loss(own, nats_T, objective)
        weight_T += (1 - objective.ce_weight) * own.share * own_weight_T
        of_spans.append(apart_S)
    return replace(labels, text_weight_T=weight_T), of_spans


def span_loss(spans: Spans, nats_T: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """[S] the loss of each span, and [T] what its gradient weighs the cross-entropy of each position with.

    nats_T  what the student pays for each token
    """
    num_spans, temperature = len(spans.logprobs_S), objective.span_temperature
    log_q_S = nats_T.new_zeros(num_spans + 1).index_add_(0, spans.span_T, -nats_T)[:num_spans]
    p_SB = _outcomes(spans.logprobs_S.to(nats_T.dtype), temperature).exp()
    with torch.enable_grad():
        leaf_S = log_q_S.detach().requires_grad_()
        apart_S = temperature * objective.divergence(p_SB, _outcomes(leaf_S, temperature))
        (slope_S,) = torch.autograd.grad(apart_S.sum(), leaf_S)
    return apart_S.detach(), torch.cat([-slope_S, slope_S.new_zeros(1)])[spans.span_T]


def _outcomes(logprobs_S: Tensor, temperature: float) -> Tensor:
    """[S, 2] log-probabilities of a span's text and of any other, tempered. No text counts as surer than 1 − FLOOR."""
    log_p_S = logprobs_S.clamp(max=-FLOOR) / temperature
    return torch.stack([log_p_S, torch.log(-torch.expm1(log_p_S))], -1)
