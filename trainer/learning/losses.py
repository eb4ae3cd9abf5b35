"""Head and loss in one: from hidden states to the loss and its gradients, a chunk of positions at a time.

Logits exist for one chunk only. Its gradients are computed with its loss, in one pass over the vocabulary whatever the
divergence, and only multiplied in the backward pass: three products with the head's weight, as cross-entropy alone
takes. A temperature other than 1 takes a second pass and a second copy of the chunk's logits. Losses are sums; the step
divides once by the global number of tokens.

A target lists K tokens and a tail. The student's probability outside the listed tokens is the same one bucket, so the
optimum is the teacher's own distribution with its own tail: a truncated loss leaks the tail's mass, and a renormalised
one makes the student overconfident. With r = softmax over what is not listed, q the student, g the derivatives of the
divergence by log q of each bucket and G their sum, the derivative by logit j is g_j − G q_j where j is listed and
r_j (g_tail − G q_tail) where not: everything that is as long as the vocabulary is one softmax, scaled.

A teacher whose tokens have no names here gives its sorted probabilities or how likely it finds spans of the text.
Sorted probabilities (Universal Logit Distillation, arXiv 2402.12030) are held against the student's own K likeliest
tokens, in their order, by total variation: one more pass over the logits for each such teacher, and no product.

Spans (Approximate Likelihood Matching, arXiv 2503.20083): with p and q the probabilities that teacher and student give
to the text of a span, there are two outcomes, this text or another, and the loss is the divergence of
(p^(1/τ), 1 − p^(1/τ)) from (q^(1/τ), 1 − q^(1/τ)), least at q = p whatever τ. It is multiplied by τ, so that it does
not vanish as τ grows: forward KL then comes near a log(a/b) − a + b, where a = −log p and b = −log q. log q is a sum
over the span's tokens, so its derivative is one number for all of them: what their cross-entropy is weighed with. It
is known once the span's last token is, so no chunk ends within a span.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.learning.divergences import FLOOR, NOTHING_NATS, Divergence, forward_kl, tempered, total_variation
from trainer.learning.labels import Labels, Spans, Spread

# torch legend: T positions of a batch, C of a chunk, K listed tokens, B buckets (K and the tail), V vocabulary, D width


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: scale · (hidden · weightᵀ + bias), softly capped at ± cap."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V] in float32, or in float64 where that is what comes."""
        logits_CV = hidden_CD @ self.weight_VD.T
        logits_CV = logits_CV.to(_wide(logits_CV))
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.scale != 1:
            logits_CV *= self.scale
        return logits_CV.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits_CV

    def through(self, slope_CV: Tensor, logits_CV: Tensor | None) -> Tensor:
        """Derivatives by the logits, in place, to those before scale and cap; the capped logits are needed for that."""
        if self.cap and logits_CV is not None:
            slope_CV *= 1 - (logits_CV / self.cap) ** 2
        return slope_CV.mul_(self.scale) if self.scale != 1 else slope_CV


@dataclass(frozen=True)
class Objective:
    """ce_weight · cross-entropy + (1 − ce_weight) · what the teachers say.

    Of that, target_share is the divergence from the fused target, temperature² times that of the tempered
    distributions; the rest belongs to teachers whose tokens are not translated, the labels' spreads and spans.
    """

    ce_weight: float = 1.0
    divergence: Divergence = forward_kl
    temperature: float = 1.0
    chunk_tokens: int = 512
    target_share: float = 1.0
    span_temperature: float = 100.0

    @property
    def target_weight(self) -> float:
        """What the divergence from the fused target is multiplied by."""
        return (1 - self.ce_weight) * self.target_share * self.temperature**2


class Loss(NamedTuple):
    """total is the sum over T positions, with its gradient; the others are nats of each, without weights or gradient.

    The divergence is not computed where it has no weight, and then 0. parts_NT has a row for each of the labels'
    spreads (total variations), then of their spans: a span's loss stands at its first position.
    """

    total: Tensor
    ce_T: Tensor
    divergence_T: Tensor
    parts_NT: Tensor


def head_loss(head: Head, hidden_TD: Tensor, labels: Labels, objective: Objective) -> Loss:
    """The loss of T positions, with gradients for the hidden states and for the head where it is trained.

    Products are computed in the type of autocast, else of the weight; softmax and sums in float32 or wider.
    """
    if len(hidden_TD) != len(labels):
        raise ValueError(f"expected as many labels as hidden states, received {len(labels)} and {len(hidden_TD)}")
    job = _Job(head, labels, objective, torch.is_grad_enabled())
    return Loss(*_HeadLoss.apply(hidden_TD, head.weight_VD, head.bias_V, job))


@dataclass(frozen=True, eq=False)
class _Job:
    head: Head
    labels: Labels
    objective: Objective
    makes_gradients: bool


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, for a sum; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        kind, size = hidden_TD.device.type, job.objective.chunk_tokens
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        head = replace(job.head, weight_VD=weight_VD.to(dtype))
        needed = [needs and job.makes_gradients for needs in ctx.needs_input_grad]  # said of inputs, whatever the mode
        gradients = _Gradients((hidden_TD, weight_VD, bias_V), needed)
        chunks = job.labels.split(size)
        rows, begin = [], 0
        with torch.autocast(kind, enabled=False):
            for hidden_CD, chunk in zip(hidden_TD.split([len(c) for c in chunks]), chunks, strict=True):
                hidden_CD = hidden_CD.to(dtype)
                *columns, slope_CV = _chunk(head, hidden_CD, chunk, job.objective)
                gradients.add(begin, hidden_CD, slope_CV, head.weight_VD)
                rows.append(torch.stack(columns))
                begin += len(chunk)
        ctx.gradients = gradients.finished()
        ce_T, divergence_T, *parts = torch.cat(rows, 1)
        parts_NT = torch.stack(parts) if parts else ce_T.new_zeros(0, len(ce_T))
        ctx.mark_non_differentiable(ce_T, divergence_T, parts_NT)
        return weighted(job.labels, job.objective, ce_T, divergence_T, *parts).sum(), ce_T, divergence_T, parts_NT

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so they serve once
        if gradients is None:
            raise RuntimeError("head_loss: its gradients were used already; compute the loss again")
        return *(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), None


class _Sum:
    """Of the chunks' parts: the first as it comes, from the second on in float32 or wider."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, part: Tensor) -> None:
        self.value = part if self.value is None else self.value.to(_wide(part)).add_(part)


class _Gradients:
    """Of hidden states, weight and bias, gathered chunk by chunk; None for what is not trained."""

    def __init__(self, given: tuple[Tensor, Tensor, Tensor | None], needed: Sequence[bool]) -> None:
        self._given = given
        self._hidden_TD = torch.empty_like(given[0]) if needed[0] else None
        self._weight_VD = _Sum() if needed[1] else None
        self._bias_V = _Sum() if needed[2] else None

    def add(self, begin: int, hidden_CD: Tensor, slope_CV: Tensor, weight_VD: Tensor) -> None:
        if self._bias_V:
            self._bias_V.add(slope_CV.sum(0))
        slope_CV = slope_CV.to(weight_VD.dtype)
        if self._hidden_TD is not None:
            self._hidden_TD[begin : begin + len(slope_CV)] = slope_CV @ weight_VD
        if self._weight_VD:
            self._weight_VD.add(slope_CV.T @ hidden_CD)

    def finished(self) -> list[Tensor | None]:
        made = (self._hidden_TD, *(s.value if s else None for s in (self._weight_VD, self._bias_V)))
        pairs = zip(made, self._given, strict=True)
        return [None if m is None or given is None else m.to(given.dtype) for m, given in pairs]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def weighted(labels: Labels, objective: Objective, ce_T: Tensor, divergence_T: Tensor, *parts_T: Tensor) -> Tensor:
    """[T] nats: each position's part of the loss."""
    total_T = objective.ce_weight * ce_T + objective.target_weight * divergence_T
    shares = [spread.share for spread in labels.spreads] + [spans.share for spans in labels.spans]
    for share, apart_T in zip(shares, parts_T, strict=True):
        total_T = total_T + (1 - objective.ce_weight) * share * apart_T
    return total_T


def _chunk(head: Head, hidden_CD: Tensor, labels: Labels, objective: Objective) -> list[Tensor]:
    """[C] cross-entropy, divergence, each spread and each teacher's spans, and last the derivatives of the loss [C, V].

    Those are by the logits before scale and cap.
    """
    logits_CV = head.logits(hidden_CD)
    kept_CV = logits_CV.clone() if head.cap else None
    of_spreads = [_spread(logits_CV, labels, spread, objective) for spread in labels.spreads]
    if objective.target_weight == 0:
        ce_C, slope_CV = _text(logits_CV, labels)
        text_C1, of_spans = _text_weight(ce_C, labels, objective)
        divergence_C = torch.zeros_like(ce_C)
        if objective.ce_weight != 1:
            slope_CV *= text_C1
    elif objective.temperature == 1:
        ce_C, log_q_CB, rest_CV = _buckets(logits_CV, labels)
        text_C1, of_spans = _text_weight(ce_C, labels, objective)
        divergence_C, slope_CV = _slopes(log_q_CB, rest_CV, labels, objective, text_C1)
    else:
        ce_C, text_slope_CV = _text(logits_CV.clone(), labels)
        text_C1, of_spans = _text_weight(ce_C, labels, objective)
        _, log_q_CB, rest_CV = _buckets(logits_CV.div_(objective.temperature), labels)
        divergence_C, slope_CV = _slopes(log_q_CB, rest_CV, labels, objective, torch.zeros_like(text_C1))
        slope_CV = slope_CV.mul_(1 / objective.temperature).addcmul_(text_slope_CV, text_C1)
    for _, own_slope_CV in of_spreads:
        slope_CV += own_slope_CV
    return [ce_C, divergence_C, *(apart_C for apart_C, _ in of_spreads), *of_spans, head.through(slope_CV, kept_CV)]


def _text_weight(ce_C: Tensor, labels: Labels, objective: Objective) -> tuple[Tensor, list[Tensor]]:
    """[C, 1] what each token's cross-entropy is weighed with, [1, 1] if all alike, and [C] of each teacher's spans."""
    text_C1, of_spans = ce_C.new_full((1, 1), objective.ce_weight), []
    for spans in labels.spans:
        apart_C, own_weight_C = _span_loss(spans, ce_C, objective)
        text_C1 = text_C1 + (1 - objective.ce_weight) * spans.share * own_weight_C[:, None]
        of_spans.append(apart_C)
    return text_C1, of_spans


def _span_loss(spans: Spans, ce_C: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """[C] the loss of each span, at its first position, and [C] what its gradient weighs the cross-entropy with."""
    temperature, begins_C = objective.span_temperature, spans.back_T == 0
    begin_C = torch.arange(len(ce_C), device=ce_C.device) - spans.back_T.clamp(min=0)
    log_q_C = torch.zeros_like(ce_C).index_add_(0, begin_C, -ce_C)
    p_CB = _outcomes(spans.logprobs_T.to(ce_C.dtype), temperature).exp()
    with torch.enable_grad():
        leaf_C = log_q_C.requires_grad_()
        apart_C = temperature * objective.divergence(p_CB, _outcomes(leaf_C, temperature)) * begins_C
        (slope_C,) = torch.autograd.grad(apart_C.sum(), leaf_C)
    return apart_C.detach(), -slope_C[begin_C]


def _outcomes(logprobs_C: Tensor, temperature: float) -> Tensor:
    """[C, 2] log-probabilities of a span's text and of any other, tempered. No text counts as surer than 1 − FLOOR."""
    log_p_C = logprobs_C.clamp(max=-FLOOR) / temperature
    return torch.stack([log_p_C, torch.log(-torch.expm1(log_p_C))], -1)


def _text(logits_CV: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """[C] cross-entropy and [C, V] its derivatives, in the place of the logits."""
    tokens_C1 = labels.tokens_T[:, None]
    label_C1 = logits_CV.gather(1, tokens_C1)
    top_C1, log_top_C1, q_CV = _softmax(logits_CV)
    minus_one = torch.full_like(label_C1, -1)
    return (top_C1 - label_C1 - log_top_C1).squeeze(1), q_CV.scatter_add_(1, tokens_C1, minus_one)


def _spread(logits_CV: Tensor, labels: Labels, spread: Spread, objective: Objective) -> tuple[Tensor, Tensor]:
    """[C] total variation between sorted probabilities, and [C, V] the derivatives of its part of the loss.

    The gradient goes to the tokens that lead in the student now. Raises ValueError for a longer list than its tokens.
    """
    top_k, vocab_size = spread.probs_TK.shape[1], logits_CV.shape[1]
    if top_k > vocab_size:
        raise ValueError(f"expected at most {vocab_size} sorted probabilities, as many as tokens, received {top_k}")
    ids_CK = logits_CV.topk(top_k).indices
    sorted_labels = Labels(labels.tokens_T, ids_CK, torch.ones_like(ids_CK).bool(), spread.probs_TK, spread.tail_T)
    alone = Objective(0.0, total_variation, target_share=(1 - objective.ce_weight) * spread.share)
    _, log_q_CB, rest_CV = _buckets(logits_CV.clone(), sorted_labels)
    return _slopes(log_q_CB, rest_CV, sorted_labels, alone, logits_CV.new_zeros((1, 1)))


def _buckets(logits_CV: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """[C] cross-entropy, [C, B] log q of the buckets, [C, V] softmax of what is not listed, in the logits' place."""
    label_C1 = logits_CV.gather(1, labels.tokens_T[:, None])
    listed_CK = logits_CV.gather(1, labels.ids_TK).masked_fill_(~labels.listed_TK, -torch.inf)
    nothing = torch.finfo(logits_CV.dtype).min
    top_rest_C1, log_top_C1, rest_CV = _softmax(logits_CV.scatter_(1, labels.ids_TK, nothing))
    top_C1 = torch.maximum(top_rest_C1, listed_CK.amax(1, keepdim=True))  # sums near it keep a sure student's digits
    log_CB = torch.cat([listed_CK - top_C1, top_rest_C1 - top_C1 - log_top_C1], 1)
    log_z_C1 = log_CB.logsumexp(1, keepdim=True)
    ce_C = (top_C1 - label_C1 + log_z_C1).squeeze(1)
    return ce_C, (log_CB - log_z_C1).clamp_(min=-NOTHING_NATS), rest_CV


def _slopes(
    log_q_CB: Tensor, rest_CV: Tensor, labels: Labels, objective: Objective, text_C1: Tensor
) -> tuple[Tensor, Tensor]:
    """[C] divergence, and [C, V] the derivatives of its part of the loss and of the text's, in the place of rest_CV.

    text_C1 is what the cross-entropy's derivatives are taken with, [1, 1] or for each position.
    """
    divergence_C, g_CB = _small(labels, log_q_CB, objective, rest_CV.shape[1])
    slope_CB = g_CB + log_q_CB.exp() * (text_C1 - g_CB.sum(1, keepdim=True))  # g_j − G q_j, and the text's own q_j
    rest_CV *= slope_CB[:, -1:]
    rest_CV.scatter_add_(1, labels.ids_TK, slope_CB[:, :-1] * labels.listed_TK)
    tokens_C1 = labels.tokens_T[:, None]
    rest_CV.scatter_add_(1, tokens_C1, (-text_C1).expand(tokens_C1.shape))
    return divergence_C, rest_CV


def _small(labels: Labels, log_q_CB: Tensor, objective: Objective, vocab_size: int) -> tuple[Tensor, Tensor]:
    """[C] divergence over the buckets, and [C, B] the derivatives of its part of the loss; nothing without a target."""
    p_CB = torch.cat([labels.probs_TK, labels.tail_T[:, None]], 1).to(log_q_CB.dtype)
    has_target_C = labels.probs_TK.sum(1) > 0  # a tail alone, one bucket of everything, says nothing
    p_CB = tempered(p_CB, objective.temperature, vocab_size - labels.listed_TK.sum(1))
    with torch.enable_grad():
        leaf_CB = log_q_CB.detach().requires_grad_()
        divergence_C = objective.divergence(p_CB, leaf_CB) * has_target_C
        (g_CB,) = torch.autograd.grad(divergence_C.sum(), leaf_CB)
    return divergence_C.detach(), g_CB * objective.target_weight


def _softmax(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[C, 1] the largest logit and the log of its share, and the softmax [C, V] in the place of the logits.

    The first less the second is the logsumexp. Apart they have digits that their difference, as large as logits, loses.
    """
    top_C1, at_C1 = logits_CV.max(1, keepdim=True)
    torch.softmax(logits_CV, 1, out=logits_CV)
    return top_C1, logits_CV.gather(1, at_C1).log(), logits_CV
