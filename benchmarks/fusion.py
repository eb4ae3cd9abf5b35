"""Throughput of fusing four teachers: every method and scope, on one pinned core and with two threads.

`python -m benchmarks.fusion [--json FILE]` prints a table and writes a flat {name: positions per second}. The targets
are synthetic: Zipf-like probabilities in the order of ranks, with neighboring ranks shuffled per teacher, so that
teachers share most of their likely tokens and few of their unlikely ones, as real models do. Kernels are compiled
before timing. One core is measured in CPU time of the thread, which excludes other processes. Two threads are measured
in wall time, so they need two idle cores. The control, a compiled loop without memory access and without the GIL, shows
whether the cores were idle: it is the upper bound of the ratio.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignment.target import Target
from kernel_cache.compiled import compiled
from trainer.fusion import FUSION_METHODS
from trainer.fusion.base import SCOPES, FusionRule, fusion_method
from trainer.fusion.fuse import fuse
from trainer.fusion.inputs import FusionInput

VOCAB_SIZE, NUM_TEACHERS, NUM_POSITIONS, TOP_K = 49_152, 4, 2_048, 64
NUM_SAMPLES = 4  # in a batch
CONTROL_STEPS = 10_000_000
WEIGHTS_ONLY = ("adaptive", "router")  # computed by `fuse` as a mean with other teacher weights
ROUNDS = 15


def teacher_target(ranks: NDArray[np.int64], rng: np.random.Generator) -> Target:
    """Build top-k rows of one teacher whose order of the vocabulary is close to `ranks` [T, V′]."""
    num_positions, num_ranks = ranks.shape
    noise = np.exp(rng.normal(scale=1.0, size=ranks.shape))
    scores = noise / (1 + np.arange(num_ranks)) ** rng.uniform(1.2, 2.0, size=(num_positions, 1))
    probs = scores / scores.sum(axis=1, keepdims=True) * rng.uniform(0.85, 1.0, size=(num_positions, 1))
    order = np.argsort(-probs, axis=1)[:, :TOP_K]
    listed = np.take_along_axis(probs, order, axis=1).astype(np.float32)
    return Target(
        offsets=np.arange(num_positions + 1, dtype=np.int64) * TOP_K,
        ids=np.take_along_axis(ranks, order, axis=1).astype(np.int32).ravel(),
        probs=listed.ravel(),
        tail=(1 - listed.sum(axis=1, dtype=np.float64)).astype(np.float32),
        valid=np.arange(num_positions) > 0,  # a model without BOS has no row for the first token
    )


def sample(seed: int) -> FusionInput:
    """Build one sample: 4 teachers over 256 likely tokens per position, drawn from the vocabulary."""
    rng = np.random.default_rng(seed)
    base = (VOCAB_SIZE * rng.random((NUM_POSITIONS, 512)) ** 3).astype(np.int64)
    ranks = np.stack([np.resize(np.unique(row), 256) for row in base])
    ranks = rng.permuted(ranks, axis=1)
    targets = tuple(_without_first(teacher_target(ranks, rng)) for _ in range(NUM_TEACHERS))
    return FusionInput(
        targets,
        labels_T=ranks[np.arange(NUM_POSITIONS), rng.zipf(1.6, NUM_POSITIONS) % 256],
        num_bytes_T=rng.integers(0, 9, NUM_POSITIONS),
        teacher_weights_N=np.ones(NUM_TEACHERS),
    )


def _without_first(target: Target) -> Target:
    """Empty the first row, as Target requires for rows that are not valid."""
    tail = target.tail.copy()
    tail[0] = 0
    offsets = target.offsets - TOP_K
    offsets[0] = 0
    return Target(offsets, target.ids[TOP_K:], target.probs[TOP_K:], tail, target.valid)


def measure(batch: Sequence[FusionInput]) -> dict[str, float]:
    """Return fusion_METHOD_SCOPE_tokens_per_s, the same with _2_threads, and both for "control"."""
    methods = [name for name in FUSION_METHODS if name not in WEIGHTS_ONLY]
    rules = [
        FusionRule(name, scope, top_k=TOP_K)
        for name in methods
        for scope in (SCOPES if fusion_method(name).uses_scope else SCOPES[1:2])
    ]
    work: dict[str, Callable[[], object]] = {
        f"{r.method}_{r.scope}": partial(fuse, batch, r, VOCAB_SIZE) for r in rules
    }
    work["control"] = partial(arithmetic, CONTROL_STEPS)
    num_tokens = sum(len(one.labels_T) for one in batch)
    figures: dict[str, float] = {}
    with ThreadPoolExecutor(2) as pool:
        for name, each in work.items():
            one, two = _medians_s(each, pool)
            figures[f"fusion_{name}_tokens_per_s"] = num_tokens / one
            figures[f"fusion_{name}_tokens_per_s_2_threads"] = 2 * num_tokens / two
    return figures


def _medians_s(work: Callable[[], object], pool: Executor) -> tuple[float, float]:
    """Return the median seconds of one call on one core and of two calls in two threads, after one warm-up round."""
    durations_s: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        with pinned():
            began = time.thread_time()
            work()
            durations_s[0].append(time.thread_time() - began)
        began = time.perf_counter()
        list(pool.map(lambda _: work(), range(2)))
        durations_s[1].append(time.perf_counter() - began)
    return statistics.median(durations_s[0][1:]), statistics.median(durations_s[1][1:])


@compiled
def arithmetic(num_steps: int) -> int:
    """Compute with integers in registers only."""
    x = 1
    for i in range(num_steps):
        x = (x * 1103515245 + i) & 0x7FFFFFFF
    return x


@contextmanager
def pinned() -> Iterator[None]:
    """Pin this thread to one core; other threads keep their affinity."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def table(figures: dict[str, float]) -> str:
    """Format one line per method and scope."""
    lines = [f"{'1,000 tokens/s':<28}{'one core':>10}{'2 threads':>11}{'ratio':>7}"]
    for name, one in figures.items():
        if not name.endswith("_2_threads"):
            two = figures[f"{name}_2_threads"]
            label = name.removeprefix("fusion_").removesuffix("_tokens_per_s")
            lines.append(f"{label:<28}{one / 1e3:>10,.0f}{two / 1e3:>11,.0f}{two / one:>7.2f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    figures = measure([sample(seed) for seed in range(NUM_SAMPLES)])
    sys.stdout.write(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps({name: round(value) for name, value in figures.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
