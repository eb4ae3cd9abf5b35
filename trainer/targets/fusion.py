"""N targets of each sample, one per teacher, into one.

Pure functions. `fuse` weighs the teachers of every position by a rule (what each of them knows of the text, or how sure
it is) times the sample's prior, leaves out those that have no valid answer there, and takes the weighted arithmetic
mean, or the geometric one, over the union of their ids, the tail fused like any other probability. What each teacher
gave and where it was missing is returned, so that it shows in the metrics. Priors that change are made in priors.py.

Losses that choose weights are bits per byte: the same text for all, whatever the tokens. Cost: the entries of the rows,
in compiled loops without the lock (fusion_kernels.py).

Legend: N teachers, T positions, nnz entries of all teachers' rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from alignment.target import Target
from trainer.config import MOST_TEACHERS
from trainer.targets.fusion_kernels import entropies, first_fault, geometric_rows, label_probs, mean_rows

METHODS = ("mean", "geometric", "min_ce", "avg_ce", "confidence", "fusellm_min_ce", "fusellm_avg_ce")
SCOPES = ("token", "sample", "batch")

T = TypeVar("T")
Gathered = Callable[[Any], list[Any]]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Aligned:
    """One sample as all teachers see it, in the student's tokens.

    targets      N targets of T positions each
    labels_T     the student's own tokens
    num_bytes_T  UTF-8 bytes of text that each position stands for; 0 for special tokens and parts of a character
    prior_N      the sample's static weights, ≥ 0 and not all 0; a teacher with 0 does not take part
    own_ce_N     nats per token of each teacher's own tokens, for fusellm_* only; None: per student token
    """

    targets: tuple[Target, ...]
    labels_T: Ints
    num_bytes_T: Ints
    prior_N: Floats
    own_ce_N: Floats | None = None


@dataclass(frozen=True)
class Rule:
    """How to fuse. Raises ValueError that names the value and the choices.

    method       mean        weighted arithmetic mean, minimises Σ w · forward KL; scope and temperature do nothing
                 geometric   log-linear, minimises Σ w · reverse KL; scope and temperature do nothing
                 min_ce      the teacher with the fewest bits per byte; equals share; temperature does nothing
                 avg_ce      softmax of −bits per byte / temperature
                 confidence  softmax of −entropy in nats / temperature
                 fusellm_*   see `_fusellm`; scope and temperature do nothing
    scope        over what a method compares: one token, a sample, or the batch's samples in which the same teachers
                 take part
    top_k        entries kept in a row, ties to the lowest id; the rest joins the tail. None keeps all
    """

    method: str = "mean"
    scope: str = "sample"
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (("method", self.method, METHODS), ("scope", self.scope, SCOPES)):
            if value not in choices:
                raise ValueError(f"fusion {name}: expected one of {', '.join(choices)}, received {value!r}")
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"fusion temperature: expected a finite number above 0, received {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"fusion top_k: expected 1 or more, or None to keep all entries, received {self.top_k}")


@dataclass(frozen=True, eq=False)
class Fused:
    """The fusion of one sample.

    target        rows of distinct ids in no particular order; valid where any teacher is
    shares_N      weight of each teacher averaged over the valid positions; they sum to 1, or are 0 if there are none
    left_out_N    positions where this teacher had no valid answer but another had
    num_vanished  positions where `geometric` left no token possible (disjoint ids and no tails) and the arithmetic
                  mean stands in
    """

    target: Target
    shares_N: Floats
    left_out_N: Ints
    num_vanished: int = 0


class _Rows(NamedTuple):
    """All teachers' rows, one teacher after another, as the compiled loops take them."""

    offsets: Ints  # [N, T + 1] into ids and probs
    ids: NDArray[np.int32]
    probs: NDArray[np.float32]
    tail: NDArray[np.float32]  # [N, T]
    valid: Bools  # [N, T]


class _Evidence(NamedTuple):
    """What a method compares: amounts (nats, bits) over units (bytes, positions); where, and between whom."""

    amounts_NT: Floats
    units_T: Floats
    common_T: Bools
    taking_part_N: Bools

    def total(self) -> Floats:
        """[N + 1] amounts and units summed over the common positions; summable over samples."""
        amounts_N = self.amounts_NT[:, self.common_T].sum(axis=1)
        return np.append(amounts_N, max(self.units_T[self.common_T].sum(), 1.0 if self.common_T.any() else 0.0))


def alone(mine: T) -> list[T]:
    """What all processes say that have a part of the batch, where there is but this one."""
    return [mine]


def fuse(batch: Sequence[Aligned], rule: Rule, vocab_size: int, gathered: Gathered = alone) -> list[Fused]:
    """Fuse every sample of a batch; inputs are untouched, sums are float64, results float32.

    A position where the chosen teachers are not valid falls to the prior of those that are; where nobody with a prior
    above 0 is valid the result is not. One teacher comes back unchanged but for the cut. `gathered` hands on what the
    scope `batch` compares between the processes that have parts of it; all of them fuse theirs, be it empty.
    Raises ValueError for arrays that do not belong together and for rows that are no distribution over distinct ids
    below `vocab_size`, with the numbers, the sample and the teacher.
    """
    indices = range(len(batch))
    # a sample's rows are let go before the next one's are taken: fresh memory is what threads wait for one another over
    together = [indices] if rule.scope == "batch" else [range(i, i + 1) for i in indices]
    return [fused for group in together for fused in _fused_together(batch, group, rule, vocab_size, gathered)]


def _fused_together(
    batch: Sequence[Aligned], group: range, rule: Rule, vocab_size: int, gathered: Gathered
) -> list[Fused]:
    """The fusions of those samples of the batch that are compared together."""
    samples = [batch[i] for i in group]
    rows = [_checked(i, batch[i], len(batch[0].targets), vocab_size) for i in group]
    scores = _scores(samples, rows, rule, gathered)
    return [_fused(*each, rule, vocab_size) for each in zip(samples, rows, scores, strict=True)]


def text_nats(sample: Aligned, vocab_size: int) -> tuple[Floats, Ints]:
    """What RunningBpb takes: nats of the text under each teacher [N], and the bytes that they are for [N].

    Over the positions where every teacher that has an answer anywhere in the sample has one; 0 bytes for the others.
    Priors do not matter: a teacher that is not fused is still watched. Raises ValueError as `fuse` does.
    """
    rows = _checked(0, sample, len(sample.targets), vocab_size)
    answers_N = np.logical_or.reduce(rows.valid, axis=1)
    evidence = _cross_entropy(sample, rows, answers_N)
    total = np.where(np.append(answers_N, True), evidence.total(), 0)
    num_bytes = int(sample.num_bytes_T[evidence.common_T].sum())
    return total[:-1] * math.log(2), np.where(answers_N, num_bytes, 0)


def _checked(index: int, sample: Aligned, num_teachers: int, vocab_size: int) -> _Rows:
    """The rows of one sample, after every check that keeps the compiled loops from reading outside them."""
    targets, num_t, where = sample.targets, len(sample.labels_T), f"sample {index} of the batch"
    if not 1 <= len(targets) <= MOST_TEACHERS:
        raise ValueError(f"{where}: expected 1 to {MOST_TEACHERS} teachers, received {len(targets)}")
    if len(targets) != num_teachers:
        raise ValueError(f"{where}: expected {num_teachers} teachers as in sample 0, received {len(targets)}")
    lengths = [len(t) for t in targets]
    if set(lengths) | {len(sample.num_bytes_T)} != {num_t}:
        raise ValueError(
            f"{where}: expected {num_t} positions, one per label, received {lengths} from the teachers and "
            f"{len(sample.num_bytes_T)} byte counts"
        )
    for name, values_N in {"prior_N": sample.prior_N, "own_ce_N": sample.own_ce_N}.items():
        if values_N is not None and (values_N.shape != (len(targets),) or not (values_N >= 0).all()):
            raise ValueError(f"{where}: expected {name} to be {len(targets)} numbers ≥ 0, received {values_N.tolist()}")
    if not 0 < sample.prior_N.sum() < math.inf:
        raise ValueError(f"{where}: expected finite weights that are not all 0, received {sample.prior_N.tolist()}")
    if num_t and not (sample.labels_T.min() >= 0 and sample.labels_T.max() < vocab_size):
        raise ValueError(
            f"{where}: expected labels from 0 to {vocab_size - 1}, received {sample.labels_T.min()} to "
            f"{sample.labels_T.max()}"
        )
    if num_t and sample.num_bytes_T.min() < 0:
        raise ValueError(f"{where}: expected byte counts ≥ 0, received {sample.num_bytes_T.min()}")
    for n, target in enumerate(targets):
        _check_csr(f"{where}, teacher {n}", target)
    rows = _stacked(targets)
    n, t = first_fault(rows, vocab_size)
    if n >= 0:
        raise ValueError(f"{where}, teacher {n}, position {t}: {_fault(targets[n], t, vocab_size)}")
    return rows


def _check_csr(where: str, target: Target) -> None:
    offsets, num_entries = target.offsets, len(target.ids)
    shape_ok = len(offsets) == len(target) + 1 and len(target.tail) == len(target) and len(target.probs) == num_entries
    if not (shape_ok and offsets[0] == 0 and offsets[-1] == num_entries and (np.diff(offsets) >= 0).all()):
        raise ValueError(
            f"{where}: expected offsets that rise from 0 to the number of entries, one more than positions; received "
            f"{len(offsets)} offsets and {len(target.tail)} tails for {len(target)} positions, {num_entries} ids and "
            f"{len(target.probs)} probabilities"
        )


def _fault(target: Target, position: int, vocab_size: int) -> str:
    own = slice(target.offsets[position], target.offsets[position + 1])
    ids, probs, tail = target.ids[own], target.probs[own], target.tail[position]
    return (
        f"expected distinct ids from 0 to {vocab_size - 1} and probabilities ≥ 0 that sum to 1 with the tail, received "
        f"{len(set(ids.tolist()))} distinct of {len(ids)} ids from {ids.min(initial=vocab_size)} to "
        f"{ids.max(initial=-1)}, the least probability {min(probs.min(initial=1), tail):.3g}, the sum "
        f"{probs.sum(dtype=np.float64) + tail:.6g}, the tail {tail:.3g}"
    )


def _stacked(targets: Sequence[Target]) -> _Rows:
    """Fresh, writable, contiguous arrays of fixed types: the loops are compiled once, not once per kind of array."""
    begins = np.cumsum([0] + [len(t.ids) for t in targets])[:-1]
    return _Rows(
        offsets=np.stack([t.offsets + begin for t, begin in zip(targets, begins, strict=True)]).astype(np.int64),
        ids=np.concatenate([t.ids for t in targets]).astype(np.int32, copy=False),
        probs=np.concatenate([t.probs for t in targets]).astype(np.float32, copy=False),
        tail=np.stack([t.tail for t in targets]).astype(np.float32, copy=False),
        valid=np.stack([t.valid for t in targets]).astype(np.bool_, copy=False),
    )


def _scores(batch: Sequence[Aligned], rows: Sequence[_Rows], rule: Rule, gathered: Gathered) -> list[Floats]:
    """Log weights of each sample, before the prior: [N, T], or [N, 1] where all positions share them."""
    if rule.method in ("mean", "geometric"):
        return [np.zeros((len(sample.targets), 1)) for sample in batch]
    if rule.method.startswith("fusellm"):
        return [_fusellm(sample, own, rule.method) for sample, own in zip(batch, rows, strict=True)]
    measure = _entropy if rule.method == "confidence" else _cross_entropy
    pairs = list(zip(batch, rows, strict=True))
    # a teacher without any answer leaves nothing to compare it by, and must not end the comparison of the others
    taking_part = [(sample.prior_N > 0) & own.valid.any(axis=1) for sample, own in pairs]
    evidence = [measure(sample, own, who) for (sample, own), who in zip(pairs, taking_part, strict=True)]
    if rule.scope == "token":
        losses = [e.amounts_NT / np.maximum(e.units_T, 1) for e in evidence]
        eligible = [(sample.prior_N > 0)[:, None] & own.valid for sample, own in pairs]
    else:
        losses = [_per_unit(total)[:, None] for total in _totals(evidence, rule.scope, gathered)]
        eligible = [who[:, None] for who in taking_part]
    if rule.method == "min_ce":
        return [_best(loss, who) for loss, who in zip(losses, eligible, strict=True)]
    return [-loss / rule.temperature for loss in losses]


def _common(rows: _Rows, taking_part_N: Bools) -> Bools:
    """[T] where every teacher that takes part is valid: the same text for all."""
    return (
        np.logical_and.reduce(rows.valid[taking_part_N]) if taking_part_N.any() else np.zeros(rows.valid.shape[1], bool)
    )


def _cross_entropy(sample: Aligned, rows: _Rows, taking_part_N: Bools) -> _Evidence:
    """Bits of the text under each teacher, per byte.

    A label that a teacher does not list counts with its whole tail, the most it can have meant.
    """
    bits_NT = -np.log2(label_probs(rows, sample.labels_T.astype(np.int64)))
    return _Evidence(bits_NT, sample.num_bytes_T.astype(np.float64), _common(rows, taking_part_N), taking_part_N)


def _entropy(sample: Aligned, rows: _Rows, taking_part_N: Bools) -> _Evidence:
    """Nats of entropy of each row, per position."""
    entropies_NT = entropies(rows, _logs(rows))
    return _Evidence(entropies_NT, np.ones(len(sample.labels_T)), _common(rows, taking_part_N), taking_part_N)


def _fusellm(sample: Aligned, rows: _Rows, method: str) -> Floats:
    """Log weights [N, 1] of FuseLLM's MinCE and AvgCE (arXiv 2401.10491, §3.3), as its released code has them.

    There each teacher has one reward per training sequence, exp(−CE), with CE its nats per token of its own tokens.
    MinCE takes the teacher of the highest reward; AvgCE weighs by the softmax of the rewards (not of −CE), so that
    two teachers always get between 0.27 and 0.73. This differs from min_ce and avg_ce: per token instead of per byte,
    which favours fine tokenizers; always per sequence; no temperature; of the prior only who has one counts.
    We differ from the code: rewards are float64, not bfloat16; equals share, there the first or last of the list wins;
    rows keep their tails, there top-k is renormalised; any number of teachers, there three. Without own_ce_N the nats
    are those of the aligned targets per student token over the common positions: MinCE then chooses as min_ce does.
    """
    taking_part_N = sample.prior_N > 0
    if sample.own_ce_N is None:
        nats = _cross_entropy(sample, rows, taking_part_N)
        ce_N = _per_unit(nats._replace(units_T=np.ones(len(sample.labels_T))).total()) * math.log(2)
    else:
        ce_N = sample.own_ce_N
    with np.errstate(divide="ignore"):
        no_prior = np.where(taking_part_N, -np.log(sample.prior_N), 0)[:, None]
    of_method = _best(ce_N[:, None], taking_part_N[:, None]) if method == "fusellm_min_ce" else np.exp(-ce_N)[:, None]
    scores: Floats = of_method + no_prior
    return scores


def _totals(evidence: Sequence[_Evidence], scope: str, gathered: Gathered) -> list[Floats]:
    """[N + 1] amounts and units of each sample, or of all samples of the batch where the same teachers take part."""
    totals = [e.total() for e in evidence]
    if scope == "sample":
        return totals
    who = [e.taking_part_N.tobytes() for e in evidence]
    pooled: dict[bytes, Floats] = {}
    for said in gathered(list(zip(who, totals, strict=True))):
        for key, total in said:
            pooled[key] = pooled.get(key, np.zeros_like(total)) + total
    return [pooled[key] for key in who]


def _per_unit(total: Floats) -> Floats:
    """[N] amounts over units; all equal where there was nothing to compare."""
    return total[:-1] / total[-1] if total[-1] > 0 else np.zeros(len(total) - 1)


def _best(losses_NT: Floats, eligible_NT: Bools) -> Floats:
    """0 for the lowest loss among those eligible at each position, equals alike, −inf for all others."""
    losses_NT = np.where(eligible_NT, losses_NT, np.inf)
    return np.where(eligible_NT & (losses_NT == losses_NT.min(axis=0)), 0.0, -np.inf)


def _weights(scores_NT: Floats, prior_N: Floats, valid_NT: Bools) -> Floats:
    """[N, T] weights that sum to 1 where anyone that takes part is valid: prior · exp(score), or the prior alone."""
    with np.errstate(divide="ignore"):
        log_NT = np.where(valid_NT, scores_NT + np.log(prior_N)[:, None], -np.inf)
    best_T = log_NT.max(axis=0)
    chosen_T = best_T > -np.inf
    weights_NT: Floats = np.exp(log_NT - np.where(chosen_T, best_T, 0))
    weights_NT = np.where(weights_NT.sum(axis=0) > 0, weights_NT, prior_N[:, None] * valid_NT)
    total_T = weights_NT.sum(axis=0)
    np.divide(weights_NT, total_T, out=weights_NT, where=total_T > 0)
    return weights_NT


def _fused(sample: Aligned, rows: _Rows, scores_NT: Floats, rule: Rule, vocab_size: int) -> Fused:
    weights_NT = _weights(scores_NT, sample.prior_N.astype(np.float64), rows.valid)
    taking_part_NT = rows.valid & (sample.prior_N > 0)[:, None]
    valid_T = np.logical_or.reduce(taking_part_NT)
    top_k = min(rule.top_k or vocab_size, vocab_size)
    num_vanished = 0
    if rule.method == "geometric":
        *csr, num_vanished = geometric_rows(rows, _logs(rows), weights_NT, top_k, vocab_size)
    else:
        csr = mean_rows(rows, weights_NT, top_k, vocab_size)
    offsets, ids, probs, tail = csr
    return Fused(
        target=Target(offsets, ids, probs, tail, valid_T),
        shares_N=weights_NT.sum(axis=1) / max(int(valid_T.sum()), 1),
        left_out_N=(valid_T & ~rows.valid & (sample.prior_N > 0)[:, None]).sum(axis=1),
        num_vanished=int(num_vanished),
    )


def _logs(rows: _Rows) -> Floats:
    """[nnz] natural logs of all listed probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(rows.probs.astype(np.float64))
