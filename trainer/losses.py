"""Losses from logits and targets, reduced by sum; the step divides once by the global number of tokens.

A target lists K tokens and a tail. The student's probability outside the listed tokens is the same one bucket,
so the optimum is the teacher's own distribution with its own tail: a truncated loss leaks the tail's mass, and a
renormalised one makes the student overconfident.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alignment.target import Target

NOTHING_NATS = (
    1e4  # a listed token outside its own listing: e^−10000, finite so that a row listing all V has a gradient
)

# torch legend: T positions of a batch, K listed tokens, V vocabulary, D width


@dataclass(frozen=True, eq=False)
class Labels:
    """What T positions should predict.

    tokens_T  int64, the text
    ids_TK    int64 listed by the target; short rows repeat their first id with probability 0
    probs_TK  float32
    tail_T    float32; a position without a target has no mass at all and adds nothing to the divergence
    """

    tokens_T: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    tail_T: Tensor

    def __len__(self) -> int:
        return len(self.tokens_T)

    def to(self, device: str) -> "Labels":
        return Labels(*(t.to(device) for t in (self.tokens_T, self.ids_TK, self.probs_TK, self.tail_T)))

    def split(self, size: int) -> list["Labels"]:
        columns = (self.tokens_T, self.ids_TK, self.probs_TK, self.tail_T)
        return [Labels(*parts) for parts in zip(*(c.split(size) for c in columns), strict=True)]


def labels_from(tokens: Sequence[np.ndarray], targets: Sequence[Target | None]) -> Labels:
    """Dense labels of several samples, one after another; None where a sample has no target."""
    wide = max([1, *(int(np.diff(t.offsets).max(initial=0)) for t in targets if t is not None)])
    parts = [_dense(len(t), target, wide) for t, target in zip(tokens, targets, strict=True)]
    ids, probs, tail = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return Labels(torch.from_numpy(np.concatenate(tokens)), ids, probs, tail)


def _dense(length: int, target: Target | None, wide: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.zeros((length, wide), dtype=np.int64)
    probs = np.zeros((length, wide), dtype=np.float32)
    if target is None:
        return ids, probs, np.zeros(length, dtype=np.float32)
    if len(target) != length:
        raise ValueError(f"expected a target for {length} positions, received {len(target)}")
    counts, rows = np.diff(target.offsets), target.rows
    some = counts > 0
    ids[some] = target.ids[target.offsets[:-1][some]][:, None]
    column = np.arange(len(rows)) - target.offsets[rows]
    ids[rows, column] = target.ids
    probs[rows, column] = target.probs
    return ids, probs, target.tail


def _wide(logits_TV: Tensor) -> Tensor:
    """Losses are computed in float32, or in float64 where that is what comes."""
    return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()


def cross_entropy(logits_TV: Tensor, labels: Labels) -> Tensor:
    """[T] nats of the text."""
    return functional.cross_entropy(_wide(logits_TV), labels.tokens_T, reduction="none")


def forward_kl(logits_TV: Tensor, labels: Labels) -> Tensor:
    """[T] nats: KL(target ‖ student) over the listed tokens and one bucket for everything else."""
    logits_TV = _wide(logits_TV)
    log_z_T = logits_TV.logsumexp(-1)
    listed_TK = logits_TV.gather(1, labels.ids_TK) - log_z_T[:, None]
    nothing_TK = (log_z_T[:, None] - NOTHING_NATS).detach().expand_as(listed_TK)
    rest_T = logits_TV.scatter(1, labels.ids_TK, nothing_TK).logsumexp(-1) - log_z_T
    entropy_T = torch.special.entr(labels.probs_TK).sum(-1) + torch.special.entr(labels.tail_T)
    kl_T: Tensor = -(labels.probs_TK * listed_TK).sum(-1) - labels.tail_T * rest_T - entropy_T
    return kl_T


def fusion_loss(logits_TV: Tensor, labels: Labels, ce_weight: float) -> tuple[Tensor, Tensor]:
    """[T] cross-entropy and [T] forward KL; the latter is not computed where it has no weight."""
    ce_T = cross_entropy(logits_TV, labels)
    kl_T = forward_kl(logits_TV, labels) if ce_weight < 1 else torch.zeros_like(ce_T)
    return ce_T, kl_T


def chunked_loss(
    head: torch.nn.Module, hidden_TD: Tensor, labels: Labels, ce_weight: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """[T] cross-entropy and [T] forward KL from hidden states; logits exist for `chunk_tokens` positions at once.

    Each chunk's logits are computed again in the backward pass instead of being kept.
    """

    def one(hidden_CD: Tensor, chunk: Labels) -> tuple[Tensor, Tensor]:
        return fusion_loss(head(hidden_CD), chunk, ce_weight)

    parts = [
        checkpoint(one, hidden_CD, chunk, use_reentrant=False)
        for hidden_CD, chunk in zip(hidden_TD.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]
    ce_T, kl_T = (torch.cat(column) for column in zip(*parts, strict=True))
    return ce_T, kl_T
