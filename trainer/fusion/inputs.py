"""Input of fusion: the targets of all teachers for one sample, validated and stacked for the compiled kernels.

Shapes: N teachers, T positions, nnz entries of all teachers' rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignment.target import Target
from trainer.fusion.kernels import first_invalid_row
from trainer.query.config import MAX_TEACHERS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FusionInput:
    """One sample with the targets of all teachers, in the tokens of the student.

    targets            N targets of T positions each
    labels_T           tokens of the text, as the student tokenizes it
    num_bytes_T        UTF-8 bytes of text that each position represents; 0 for special tokens and partial characters
    teacher_weights_N  teacher weights of this sample, ≥ 0 and not all 0; a teacher with weight 0 does not take part
    own_ce_N           nats per token of each teacher on its own tokens, for fusellm_* only; None: per student token
    keeps_label        whether the cut to FusionRule.top_k keeps the entry of the label wherever a row has one, in place
                       of the least probable entry that it would keep otherwise
    """

    targets: tuple[Target, ...]
    labels_T: Ints
    num_bytes_T: Ints
    teacher_weights_N: Floats
    own_ce_N: Floats | None = None
    keeps_label: bool = False


class TeacherRows(NamedTuple):
    """The rows of all teachers, one teacher after another, in the types that the kernels are compiled for."""

    offsets: Ints  # [N, T + 1] into ids and probs
    ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    tail: NDArray[np.float32]  # [N, T]
    valid: Bools  # [N, T]


class StackedSample(NamedTuple):
    """A validated sample and its stacked rows."""

    sample: FusionInput
    rows: TeacherRows


def validate_and_stack(index: int, sample: FusionInput, num_teachers: int, vocab_size: int) -> StackedSample:
    """Validate a sample and stack its rows. The kernels do no bounds checks, so every array is checked here.

    Raises ValueError that names the sample (`index`), the teacher, and the values expected and received.
    """
    where = f"sample {index} of the batch"
    _check_shapes(where, sample, num_teachers)
    _check_values(where, sample, vocab_size)
    for n, target in enumerate(sample.targets):
        _check_csr(f"{where}, teacher {n}", target)
    rows = _stack(sample.targets)
    n, t = first_invalid_row(rows, vocab_size)
    if n >= 0:
        raise ValueError(f"{where}, teacher {n}, position {t}: {_describe_row(sample.targets[n], t, vocab_size)}")
    return StackedSample(sample, rows)


def _check_shapes(where: str, sample: FusionInput, num_teachers: int) -> None:
    targets, num_t = sample.targets, len(sample.labels_T)
    if not 1 <= len(targets) <= MAX_TEACHERS:
        raise ValueError(f"{where}: expected 1 to {MAX_TEACHERS} teachers, received {len(targets)}")
    if len(targets) != num_teachers:
        raise ValueError(f"{where}: expected {num_teachers} teachers as in sample 0, received {len(targets)}")
    lengths = [len(t) for t in targets]
    if set(lengths) | {len(sample.num_bytes_T)} != {num_t}:
        raise ValueError(
            f"{where}: expected {num_t} positions, one per label, received {lengths} from the teachers and "
            f"{len(sample.num_bytes_T)} byte counts"
        )


def _check_values(where: str, sample: FusionInput, vocab_size: int) -> None:
    num_n, num_t = len(sample.targets), len(sample.labels_T)
    for name, values_N in {"teacher_weights_N": sample.teacher_weights_N, "own_ce_N": sample.own_ce_N}.items():
        if values_N is not None and (values_N.shape != (num_n,) or not (values_N >= 0).all()):
            raise ValueError(f"{where}: expected {name} to be {num_n} numbers ≥ 0, received {values_N.tolist()}")
    if not 0 < sample.teacher_weights_N.sum() < math.inf:
        raise ValueError(
            f"{where}: expected finite weights that are not all 0, received {sample.teacher_weights_N.tolist()}"
        )
    if num_t and not (sample.labels_T.min() >= 0 and sample.labels_T.max() < vocab_size):
        raise ValueError(
            f"{where}: expected labels from 0 to {vocab_size - 1}, received {sample.labels_T.min()} to "
            f"{sample.labels_T.max()}"
        )
    if num_t and sample.num_bytes_T.min() < 0:
        raise ValueError(f"{where}: expected byte counts ≥ 0, received {sample.num_bytes_T.min()}")


def _check_csr(where: str, target: Target) -> None:
    offsets, num_entries = target.offsets, len(target.ids)
    shape_ok = len(offsets) == len(target) + 1 and len(target.tail) == len(target) and len(target.probs) == num_entries
    if not (shape_ok and offsets[0] == 0 and offsets[-1] == num_entries and (np.diff(offsets) >= 0).all()):
        raise ValueError(
            f"{where}: expected offsets that rise from 0 to the number of entries, one more than positions; received "
            f"{len(offsets)} offsets and {len(target.tail)} tails for {len(target)} positions, {num_entries} ids and "
            f"{len(target.probs)} probabilities"
        )


def _describe_row(target: Target, position: int, vocab_size: int) -> str:
    own = slice(target.offsets[position], target.offsets[position + 1])
    ids, probs, tail = target.ids[own], target.probs[own], target.tail[position]
    return (
        f"expected distinct ids from 0 to {vocab_size - 1} and probabilities ≥ 0 that sum to 1 with the tail, received "
        f"{len(set(ids.tolist()))} distinct of {len(ids)} ids from {ids.min(initial=vocab_size)} to "
        f"{ids.max(initial=-1)}, the lowest probability {min(probs.min(initial=1), tail):.3g}, the sum "
        f"{probs.sum(dtype=np.float64) + tail:.6g}, the tail {tail:.3g}"
    )


def _stack(targets: Sequence[Target]) -> TeacherRows:
    """Copy the targets into writable, contiguous arrays of fixed types; numba compiles one version per array type."""
    begins = np.cumsum([0] + [len(t.ids) for t in targets])[:-1]
    return TeacherRows(
        offsets=np.stack([t.offsets + begin for t, begin in zip(targets, begins, strict=True)]).astype(np.int64),
        ids=np.concatenate([t.ids for t in targets]).astype(np.int32, copy=False),
        probs=np.concatenate([t.probs for t in targets]).astype(np.float32, copy=False),
        tail=np.stack([t.tail for t in targets]).astype(np.float32, copy=False),
        valid=np.stack([t.valid for t in targets]).astype(np.bool_, copy=False),
    )
