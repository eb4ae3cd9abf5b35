"""Comparison of teachers on the text: cross-entropy or entropy, per token, per sample or per batch.

Cross-entropy is measured in bits per byte, because all teachers share the bytes of the text but not its tokens.

Shapes: N teachers, T positions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trainer.fusion.base import AllGather, FusionRule
from trainer.fusion.inputs import Bools, Floats, FusionInput, Ints, StackedSample, TeacherRows, validate_and_stack
from trainer.fusion.kernels import entropies, label_probs


class Measurement(NamedTuple):
    """Amounts (bits or nats) of each teacher at each position, and the units (bytes or positions) to divide by.

    common_T         positions where all teachers that take part are valid, so that sums compare the same text
    participating_N  teachers that take part
    """

    amounts_NT: Floats
    units_T: Floats
    common_T: Bools
    participating_N: Bools

    def total(self) -> Floats:
        """Return [N + 1] amounts and units, summed over the common positions. Totals of several samples may be added.

        Common positions without any byte count as one unit, so that special tokens alone can be compared as well.
        """
        amounts_N = self.amounts_NT[:, self.common_T].sum(axis=1)
        return np.append(amounts_N, max(self.units_T[self.common_T].sum(), 1.0 if self.common_T.any() else 0.0))


Measure = Callable[[FusionInput, TeacherRows, Bools], Measurement]


class Comparison(NamedTuple):
    """Losses per unit of one sample, and the teachers that are compared. Both are [N, T], or [N, 1] per sample."""

    losses_NT: Floats
    eligible_NT: Bools


def cross_entropy(sample: FusionInput, rows: TeacherRows, participating_N: Bools) -> Measurement:
    """Measure the bits of the text under each teacher, per byte.

    A label that a teacher does not list counts with the whole tail, an upper bound of its probability.
    """
    bits_NT = -np.log2(label_probs(rows, sample.labels_T.astype(np.int64)))
    units_T = sample.num_bytes_T.astype(np.float64)
    return Measurement(bits_NT, units_T, _common(rows, participating_N), participating_N)


def entropy(sample: FusionInput, rows: TeacherRows, participating_N: Bools) -> Measurement:
    """Measure the entropy of each row in nats, per position, with the tail as one bucket."""
    entropies_NT = entropies(rows, log_probs(rows))
    return Measurement(entropies_NT, np.ones(len(sample.labels_T)), _common(rows, participating_N), participating_N)


def compare(
    samples: Sequence[StackedSample], measure: Measure, rule: FusionRule, all_gather: AllGather
) -> list[Comparison]:
    """Compare the teachers of each sample over the rule's scope.

    A teacher takes part if its weight is above 0 and it has at least one valid row in the sample. A teacher without a
    valid row would leave no common position to compare the others on.
    """
    weighted = [sample.teacher_weights_N > 0 for sample, _ in samples]
    participating = [has_weight & own.rows.valid.any(axis=1) for has_weight, own in zip(weighted, samples, strict=True)]
    measured = [measure(*own, who) for own, who in zip(samples, participating, strict=True)]
    if rule.scope == "token":
        return [
            Comparison(m.amounts_NT / np.maximum(m.units_T, 1), has_weight[:, None] & own.rows.valid)
            for m, has_weight, own in zip(measured, weighted, samples, strict=True)
        ]
    totals = [m.total() for m in measured] if rule.scope == "sample" else _batch_totals(measured, all_gather)
    return [
        Comparison(per_unit(total)[:, None], who[:, None]) for total, who in zip(totals, participating, strict=True)
    ]


def per_unit(total: Floats) -> Floats:
    """Return [N] amounts divided by units; all 0, so that all teachers are equal, if there was nothing to compare."""
    return total[:-1] / total[-1] if total[-1] > 0 else np.zeros(len(total) - 1)


def best_only(comparison: Comparison) -> Floats:
    """Return score 0 for the eligible teachers with the lowest loss at each position, −inf for all others."""
    losses_NT = np.where(comparison.eligible_NT, comparison.losses_NT, np.inf)
    return np.where(comparison.eligible_NT & (losses_NT == losses_NT.min(axis=0)), 0.0, -np.inf)


def text_nats(sample: FusionInput, vocab_size: int) -> tuple[Floats, Ints]:
    """Return the nats of the text under each teacher [N] and the bytes that they cover [N], for `FusionMethod.observe`.

    The sums cover the common positions of all teachers that have a valid row in the sample. Teachers without a valid
    row have 0 bytes. Teachers of weight 0 are included, because their weight may increase later.
    Raises ValueError as `fuse` does.
    """
    rows = validate_and_stack(0, sample, len(sample.targets), vocab_size).rows
    has_rows_N = np.logical_or.reduce(rows.valid, axis=1)
    bits = cross_entropy(sample, rows, has_rows_N)
    total = np.where(np.append(has_rows_N, True), bits.total(), 0)
    num_bytes = int(sample.num_bytes_T[bits.common_T].sum())
    return total[:-1] * math.log(2), np.where(has_rows_N, num_bytes, 0)


def log_probs(rows: TeacherRows) -> Floats:
    """Return the natural logarithms [nnz] of all listed probabilities; −inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(rows.probs.astype(np.float64))


def _common(rows: TeacherRows, participating_N: Bools) -> Bools:
    """Return [T] positions where every teacher that takes part is valid; none if no teacher takes part."""
    if not participating_N.any():
        return np.zeros(rows.valid.shape[1], bool)
    common_T: Bools = np.logical_and.reduce(rows.valid[participating_N])
    return common_T


def _batch_totals(measured: Sequence[Measurement], all_gather: AllGather) -> list[Floats]:
    """Return [N + 1] totals for each sample, summed over all samples of the batch in which the same teachers take part.

    Every process calls `all_gather` exactly once, even without samples.
    """
    keys = [m.participating_N.tobytes() for m in measured]
    totals: dict[bytes, Floats] = {}
    for shard in all_gather([(key, m.total()) for key, m in zip(keys, measured, strict=True)]):
        for key, total in shard:
            totals[key] = totals.get(key, np.zeros_like(total)) + total
    return [totals[key] for key in keys]
