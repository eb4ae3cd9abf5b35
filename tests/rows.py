"""Rows without a model: the top K of a seeded random distribution at every position."""

import numpy as np
from numpy.typing import NDArray

from teachers.protocol.rows import Rows


def random_rows(ids: NDArray[np.int64], vocab_size: int, top_k: int, seed: int, start: int = 0) -> Rows:
    """Return rows of the tokens ids[start:]: softmax of normal logits, with a higher logit for the actual token."""
    rng = np.random.default_rng(seed)
    actual = ids[start:]
    logits = rng.normal(scale=2.0, size=(len(actual), vocab_size))
    logits[np.arange(len(actual)), actual] += 3.0
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)[:, :top_k]
    listed = np.take_along_axis(logprobs, order, axis=1)
    return Rows(
        start=start,
        ids=order.astype(np.uint32),
        logprobs=listed.astype(np.float32),
        actual=logprobs[np.arange(len(actual)), actual].astype(np.float32),
        tail=np.maximum(1 - np.exp(listed).sum(axis=1), 0).astype(np.float32),
    )
