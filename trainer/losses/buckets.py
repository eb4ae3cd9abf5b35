"""Softmax over buckets, and the gradients of cross-entropy and divergence with respect to the logits.

The student's probability of all unlisted tokens is one bucket, like the tail of the target. At the optimum the student
has the teacher's probabilities and the teacher's tail. Losses that truncate the list lose the mass of the tail; losses
that renormalize the list make the student overconfident.

Derivation of the gradient. Let q be the student's probabilities, z the logits, g_b the derivative of the divergence
with respect to log q_b of bucket b, and G = Σ g_b. Let r be the softmax over the unlisted tokens only, so that
q_j = q_tail · r_j for an unlisted token j. Then

    listed token j:    d/dz_j = g_j − G · q_j
    unlisted token j:  d/dz_j = r_j · (g_tail − G · q_tail)

and with the cross-entropy of weight w and label y, both lines gain w · q_j and the label loses w. For every divergence,
the part of the gradient that is as long as the vocabulary is therefore r times one number per position. It is computed
in the buffer of the logits.

Shapes: C positions of a chunk, V vocabulary, K listed tokens, B = K + 1 buckets.
"""

import torch
from torch import Tensor

from trainer.losses.divergences import MIN_LOG_PROB, apply_temperature
from trainer.losses.labels import Labels
from trainer.losses.objective import Objective


def softmax_(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the softmax in the buffer of the logits.

    Returns the largest logit [C, 1], the log of its probability [C, 1] and the softmax [C, V]. logsumexp is the first
    minus the second. The two are kept separate because their difference, as large as the logits, would lose digits.
    """
    top_C1, top_id_C1 = logits_CV.max(1, keepdim=True)
    torch.softmax(logits_CV, 1, out=logits_CV)
    return top_C1, logits_CV.gather(1, top_id_C1).log(), logits_CV


def cross_entropy_(logits_CV: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy [C] and its gradient [C, V], q − one-hot(label), in the buffer of the logits."""
    tokens_C1 = labels.tokens_T[:, None]
    label_C1 = logits_CV.gather(1, tokens_C1)
    top_C1, log_top_C1, q_CV = softmax_(logits_CV)
    minus_one = torch.full_like(label_C1, -1)
    return (top_C1 - label_C1 - log_top_C1).squeeze(1), q_CV.scatter_add_(1, tokens_C1, minus_one)


def bucket_logprobs_(logits_CV: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy [C], log q of the buckets [C, B], and the softmax r over unlisted tokens [C, V].

    r uses the buffer of the logits and is 0 at listed tokens.
    """
    label_C1 = logits_CV.gather(1, labels.tokens_T[:, None])
    # padding repeats a listed id; −inf keeps the repeated logit out of the sum
    listed_CK = logits_CV.gather(1, labels.ids_TK).masked_fill_(~labels.listed_TK, -torch.inf)
    # the lowest finite number instead of −inf: a row that lists the whole vocabulary would give NaN
    excluded = torch.finfo(logits_CV.dtype).min
    top_rest_C1, log_top_C1, rest_CV = softmax_(logits_CV.scatter_(1, labels.ids_TK, excluded))
    # relative to the largest logit of the row: sums near 0 keep the digits of a confident student
    top_C1 = torch.maximum(top_rest_C1, listed_CK.amax(1, keepdim=True))
    log_CB = torch.cat([listed_CK - top_C1, top_rest_C1 - top_C1 - log_top_C1], 1)
    log_z_C1 = log_CB.logsumexp(1, keepdim=True)
    ce_C = (top_C1 - label_C1 + log_z_C1).squeeze(1)
    return ce_C, (log_CB - log_z_C1).clamp_(min=MIN_LOG_PROB), rest_CV


def divergence_and_gradient_(
    log_q_CB: Tensor, rest_CV: Tensor, labels: Labels, objective: Objective, ce_weight_C1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the divergence [C], and the gradient [C, V] of weighted divergence plus weighted cross-entropy.

    `ce_weight_C1` is the weight of the cross-entropy, [1, 1] or one per position. `rest_CV` is the softmax over
    unlisted tokens; the gradient is computed in its buffer.
    """
    divergence_C, g_CB = _bucket_gradient(labels, log_q_CB, objective, rest_CV.shape[1])
    # per bucket: g − G · q of the divergence plus w · q of the cross-entropy
    grad_CB = g_CB + log_q_CB.exp() * (ce_weight_C1 - g_CB.sum(1, keepdim=True))
    rest_CV *= grad_CB[:, -1:]
    rest_CV.scatter_add_(1, labels.ids_TK, grad_CB[:, :-1] * labels.listed_TK)
    tokens_C1 = labels.tokens_T[:, None]
    rest_CV.scatter_add_(1, tokens_C1, (-ce_weight_C1).expand(tokens_C1.shape))
    return divergence_C, rest_CV


def _bucket_gradient(labels: Labels, log_q_CB: Tensor, objective: Objective, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the divergence [C] and its weighted derivatives g [C, B] with respect to log q of the buckets.

    Both are 0 where the target lists no token. The only bucket is then the tail, which contains the whole vocabulary
    and has probability 1 for target and student.
    """
    p_CB = torch.cat([labels.probs_TK, labels.tail_T[:, None]], 1).to(log_q_CB.dtype)
    has_target_C = labels.probs_TK.sum(1) > 0
    p_CB = apply_temperature(p_CB, objective.temperature, vocab_size - labels.listed_TK.sum(1))
    with torch.enable_grad():
        leaf_CB = log_q_CB.detach().requires_grad_()
        divergence_C = objective.divergence(p_CB, leaf_CB) * has_target_C
        (g_CB,) = torch.autograd.grad(divergence_C.sum(), leaf_CB)
    return divergence_C.detach(), g_CB * objective.target_weight
