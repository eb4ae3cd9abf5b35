"""Fusion of N targets per sample, one per teacher, into one target.

Pure functions. At every position, `fuse` weights the teachers by the method's scores and the sample's teacher weights,
leaves out teachers without a valid row, and computes the weighted arithmetic or geometric mean over the union of
the listed ids. The tail is fused like any other probability. The average weight of each teacher and the number of
positions where it was missing are returned for the metrics.

The cost is proportional to the number of entries; the loops are compiled and release the GIL (mean_kernels.py).

Shapes: N teachers, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.target import Target
from trainer.fusion.base import AllGather, FusionMethod, FusionRule, fusion_method, single_process
from trainer.fusion.comparison import log_probs
from trainer.fusion.inputs import Bools, Floats, FusionInput, Ints, StackedSample, TeacherRows, validate_and_stack
from trainer.fusion.mean_kernels import NO_ID, geometric_rows, mean_rows


@dataclass(frozen=True, eq=False)
class FusedTarget:
    """The fused target of one sample.

    target             rows of distinct ids in no particular order; valid where any teacher that takes part is valid
    teacher_weights_N  weight of each teacher, averaged over the valid positions; sum 1, or 0 without valid positions
    missing_N          positions where this teacher had no valid row and another teacher had one
    num_fallbacks      positions where the geometric mean left no possible token (disjoint ids and no tails) and the
                       arithmetic mean was used instead
    """

    target: Target
    teacher_weights_N: Floats
    missing_N: Ints
    num_fallbacks: int = 0


def fuse(
    batch: Sequence[FusionInput], rule: FusionRule, vocab_size: int, all_gather: AllGather = single_process
) -> list[FusedTarget]:
    """Fuse every sample of a batch. Inputs are not changed; sums are float64, results float32.

    If the scores give weight 0 to every teacher that is valid at a position, the teacher weights alone are used there.
    The result is invalid where no teacher with weight above 0 is valid. A single teacher is returned unchanged except
    for `top_k`. A row has at most `top_k` entries, also where the cut keeps the label. With scope batch, `all_gather`
    exchanges sums between the processes that fuse shards of the same batch; every process must call `fuse`, even with
    an empty shard.

    Raises ValueError, with values, sample and teacher, for arrays that do not match and for rows that are no
    distribution over distinct ids below `vocab_size`.
    """
    method = fusion_method(rule.method)
    indices = range(len(batch))
    # samples are processed one at a time where possible, so that a sample's arrays are freed before the next sample:
    # several threads would otherwise contend for fresh memory
    groups = [indices] if method.uses_scope and rule.scope == "batch" else [range(i, i + 1) for i in indices]
    return [fused for group in groups for fused in _fuse_group(batch, group, rule, vocab_size, all_gather)]


def _fuse_group(
    batch: Sequence[FusionInput], group: Sequence[int], rule: FusionRule, vocab_size: int, all_gather: AllGather
) -> list[FusedTarget]:
    """Fuse the samples of a batch that the method compares with each other. Their arrays are freed at the return."""
    method, top_k = fusion_method(rule.method), min(rule.top_k or vocab_size, vocab_size)
    stacked = [validate_and_stack(i, batch[i], len(batch[0].targets), vocab_size) for i in group]
    scores = method.scores(stacked, rule, all_gather)
    return [_fuse_sample(*each, method, top_k, vocab_size) for each in zip(stacked, scores, strict=True)]


def _fuse_sample(
    stacked: StackedSample, scores_NT: Floats, method: type[FusionMethod], top_k: int, vocab_size: int
) -> FusedTarget:
    sample, rows = stacked
    weights_NT = _weights(scores_NT, sample.teacher_weights_N.astype(np.float64), rows.valid)
    participating_N = sample.teacher_weights_N > 0
    valid_T = np.logical_or.reduce(rows.valid & participating_N[:, None])
    kept_ids_T = sample.labels_T.astype(np.int64) if sample.keeps_label else np.full(len(valid_T), NO_ID)
    (offsets, ids, probs, tail), num_fallbacks = _mean(rows, weights_NT, method, (top_k, kept_ids_T), vocab_size)
    return FusedTarget(
        target=Target(offsets, ids, probs, tail, valid_T),
        teacher_weights_N=weights_NT.sum(axis=1) / max(int(valid_T.sum()), 1),
        missing_N=(valid_T & ~rows.valid & participating_N[:, None]).sum(axis=1),
        num_fallbacks=num_fallbacks,
    )


def _mean(
    rows: TeacherRows, weights_NT: Floats, method: type[FusionMethod], cut: tuple[int, Ints], vocab_size: int
) -> tuple[tuple[Any, ...], int]:
    """Return offsets, ids, probabilities and tail of the weighted mean, and the number of fallbacks."""
    if method.mean == "geometric":
        *csr, num_fallbacks = geometric_rows(rows, log_probs(rows), weights_NT, cut, vocab_size)
        return tuple(csr), int(num_fallbacks)
    return mean_rows(rows, weights_NT, cut, vocab_size), 0


def _weights(scores_NT: Floats, teacher_weights_N: Floats, valid_NT: Bools) -> Floats:
    """Return weights [N, T] proportional to teacher weight · exp(score), 0 for invalid rows.

    They sum to 1 where a participating teacher is valid. Where all products are 0, the teacher weights alone are used.
    """
    with np.errstate(divide="ignore"):
        log_NT = np.where(valid_NT, scores_NT + np.log(teacher_weights_N)[:, None], -np.inf)
    max_T = log_NT.max(axis=0)
    weights_NT: Floats = np.exp(log_NT - np.where(max_T > -np.inf, max_T, 0))
    weights_NT = np.where(weights_NT.sum(axis=0) > 0, weights_NT, teacher_weights_N[:, None] * valid_NT)
    total_T = weights_NT.sum(axis=0)
    np.divide(weights_NT, total_T, out=weights_NT, where=total_T > 0)
    return weights_NT
