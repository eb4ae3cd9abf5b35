"""N targets of one sample, one per teacher, into one.

Pure functions on targets. The union of ids is kept, the tail is fused like any other probability, and a
teacher without a valid answer at a position is left out there: the others' weights are rescaled to sum to 1,
and what each teacher gave is returned as its share, so that it shows in the metrics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.target import Target, target_from_entries

# shape legend: N teachers, T positions


@dataclass(frozen=True, eq=False)
class Fused:
    """target: the fusion; shares_N: each teacher's part in it, averaged over its valid positions."""

    target: Target
    shares_N: NDArray[np.float64]


def mean(targets: Sequence[Target], labels_T: NDArray[np.int64], weights_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, T] weights of the weighted arithmetic mean, which minimises Σ w · forward KL."""
    return np.broadcast_to(weights_N[:, None], (len(targets), len(labels_T)))


def min_ce(
    targets: Sequence[Target], labels_T: NDArray[np.int64], weights_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[N, T] weights that choose, for the whole sample, the teacher that predicts its text best (2401.10491, §3.3).

    Compared over the positions where every teacher is valid, which are the same bytes for all. A token that a
    teacher does not list counts with the teacher's whole tail, the most it can have meant. Equals share.
    """
    everywhere = np.logical_and.reduce([t.valid for t in targets])
    floor = np.finfo(np.float32).tiny
    nats_N = [-np.log(np.maximum(_listed_or_tail(t, labels_T)[everywhere], floor)).sum() for t in targets]
    chosen_N = (np.asarray(nats_N) == min(nats_N)).astype(np.float64)
    return np.broadcast_to(chosen_N[:, None], (len(targets), len(labels_T)))


METHODS: dict[str, Callable[[Sequence[Target], NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": mean,
    "min_ce": min_ce,
}


def fuse(
    targets: Sequence[Target],
    labels_T: NDArray[np.int64],
    weights_N: Sequence[float],
    method: str = "mean",
    top_k: int | None = None,
) -> Fused:
    """Fuse by a method's weights, then keep the `top_k` likeliest entries of each row.

    labels_T are the student's own tokens. One teacher comes back unchanged but for the cut. A position where
    the chosen teachers are not valid falls to those that are; where none is, it is invalid.
    """
    if len({len(t) for t in targets} | {len(labels_T)}) != 1:
        raise ValueError(f"expected {len(labels_T)} positions from every teacher, got {[len(t) for t in targets]}")
    valid_NT = np.stack([t.valid for t in targets])
    weights_NT = METHODS[method](targets, labels_T, np.asarray(weights_N, dtype=np.float64)) * valid_NT
    orphaned_T = weights_NT.sum(axis=0) == 0
    weights_NT = np.where(orphaned_T, valid_NT, weights_NT)
    total_T = weights_NT.sum(axis=0)
    weights_NT = np.divide(weights_NT, total_T, out=np.zeros_like(weights_NT), where=total_T > 0)
    valid_T = np.logical_or.reduce(valid_NT)
    target = target_from_entries(
        np.concatenate([t.rows for t in targets]),
        np.concatenate([t.ids for t in targets]),
        np.concatenate([t.probs * w_T[t.rows] for t, w_T in zip(targets, weights_NT, strict=True)]),
        valid_T,
    )
    shares_N = weights_NT.sum(axis=1) / max(int(valid_T.sum()), 1)
    return Fused(target if top_k is None else target.cut(top_k), shares_N)


def _listed_or_tail(target: Target, labels_T: NDArray[np.int64]) -> NDArray[np.float64]:
    listed = target.prob_of(labels_T)
    return np.where(listed > 0, listed, target.tail)
