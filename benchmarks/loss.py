"""What the loss costs: memory and time of head and loss, forward and backward, against dense logits and cross-entropy.

`python -m benchmarks.loss [--device cuda] [--json FILE]` prints two tables and writes a flat {name: number}.

Memory is what the loss adds at its peak to hidden states and weight that are there already, the weight's gradient
included, each arm in a process of its own (on a GPU: the allocator's peak). Time is the median of rounds in which all
arms take turns, so that a noisy machine disturbs all alike. The peers: dense logits with autograd, which is how the
loss is written in most trainers, and cross-entropy alone in chunks: by torch's own `linear_cross_entropy` (2.13 has it)
and, on a GPU where liger-kernel is installed, by Liger's Triton kernel. The fastest of them is what ratios are of.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from trainer.learning.divergences import NAMES, divergence, forward_kl
from trainer.learning.labels import Labels, Spans, Spread
from trainer.learning.losses import Head, Objective, head_loss

Arm = Callable[[Tensor, Tensor, Labels], Tensor]

TOP_K = 64
SPAN_TOKENS = 3
HOPELESS = 10  # times the fastest: once is enough


@dataclass(frozen=True)
class Size:
    """Positions, vocabulary and width."""

    tokens: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens × {self.vocab:,} × {self.width:,}"


MEMORY = Size(8_192, 151_936, 64)  # narrow, so that only the loss counts
CPU_TIMES = (Size(1_024, 49_152, 576), Size(512, 151_936, 896))  # the heads of SmolLM2-135M and Qwen2.5-0.5B
GPU_TIMES = (Size(8_192, 49_152, 576), Size(8_192, 151_936, 896), Size(8_192, 151_936, 4_096))


def inputs(size: Size, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Labels]:
    """Hidden states and weight that ask for gradients, and labels: targets with mass 0.9 on TOP_K tokens, parts."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(size.tokens, size.width, generator=generator)
    weight_VD = torch.randn(size.vocab, size.width, generator=generator) / size.width**0.5
    tokens_T = torch.randint(size.vocab, (size.tokens,), generator=generator)
    ids_TK = (torch.arange(TOP_K) * 31 + tokens_T[:, None]) % size.vocab
    probs_TK = 0.9 * torch.rand(size.tokens, TOP_K, generator=generator).softmax(1)
    tail_T = 1 - probs_TK.sum(1)
    back_T = np.arange(size.tokens) % SPAN_TOKENS
    labels = Labels(
        tokens_T,
        ids_TK,
        torch.ones_like(ids_TK, dtype=torch.bool),
        probs_TK,
        tail_T,
        (Spread(probs_TK, tail_T, 1.0),),
        (Spans.of(back_T, np.full(size.tokens, -6, dtype=np.float32), 1.0),),
    )
    return (
        hidden_TD.to(device, dtype).requires_grad_(),
        weight_VD.to(device, dtype).requires_grad_(),
        labels.to(device),
    )


def dense(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels) -> Tensor:
    """Forward KL with a tail, and cross-entropy, over all logits at once."""
    logits_TV = linear(hidden_TD, weight_VD).float()
    log_q_TV = logits_TV.log_softmax(-1)
    log_tail_T = log_q_TV.scatter(1, labels.ids_TK, -torch.inf).logsumexp(1, keepdim=True)
    log_q_TB = torch.cat([log_q_TV.gather(1, labels.ids_TK), log_tail_T], 1)
    p_TB = torch.cat([labels.probs_TK, labels.tail_T[:, None]], 1)
    return 0.1 * cross_entropy(logits_TV, labels.tokens_T, reduction="sum") + 0.9 * forward_kl(p_TB, log_q_TB).sum()


def dense_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels) -> Tensor:
    return cross_entropy(linear(hidden_TD, weight_VD).float(), labels.tokens_T, reduction="sum")


def torch_chunked(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    return linear_cross_entropy(hidden_TD, weight_VD, labels.tokens_T, reduction="sum", options=options)


def liger(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    total: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VD, hidden_TD, labels.tokens_T)
    return total


def chunked_peers(device: str) -> dict[str, Arm]:
    """Cross-entropy alone, as libraries compute it that are here."""
    peers: dict[str, Arm] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers["torch chunked ce"] = torch_chunked
    if device != "cpu" and find_spec("liger_kernel"):
        peers["liger chunked ce"] = liger
    return peers


def ours(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels, *, objective: Objective) -> Tensor:
    labels = replace(labels, spreads=(), spans=())
    return head_loss(Head(weight_VD), hidden_TD, labels, objective).total


def by_spans(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels, *, objective: Objective) -> Tensor:
    """A teacher of spans of SPAN_TOKENS."""
    return head_loss(Head(weight_VD), hidden_TD, replace(labels, spreads=()), objective).total


def by_spread(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels, *, objective: Objective) -> Tensor:
    """A teacher of sorted probabilities."""
    return head_loss(Head(weight_VD), hidden_TD, replace(labels, spans=()), objective).total


def arms(device: str, chunk_tokens: int) -> dict[str, Arm]:
    fused = {
        name: partial(ours, objective=Objective(0.1, divergence(name), chunk_tokens=chunk_tokens)) for name in NAMES
    }
    alone = Objective(0.1, chunk_tokens=chunk_tokens, target_share=0.0)
    return {
        "dense forward_kl + ce": dense,
        "dense ce": dense_cross_entropy,
        **chunked_peers(device),
        "ours ce": partial(ours, objective=Objective(chunk_tokens=chunk_tokens)),
        **{f"ours {name} + ce": arm for name, arm in fused.items()},
        "ours forward_kl at 1.5 + ce": partial(ours, objective=Objective(0.1, forward_kl, 1.5, chunk_tokens)),
        "ours by spans + ce": partial(by_spans, objective=alone),
        "ours by sorted probabilities + ce": partial(by_spread, objective=alone),
    }


def once(arm: Arm, given: tuple[Tensor, Tensor, Labels]) -> float:
    """Seconds of one loss with its gradients."""
    hidden_TD, weight_VD, labels = given
    hidden_TD.grad = weight_VD.grad = None
    on_gpu = hidden_TD.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    arm(hidden_TD, weight_VD, labels).backward()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(name: str, size: Size, device: str, chunk_tokens: int) -> int:
    """What one loss adds at its peak, in this process."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    arm = arms(device, chunk_tokens)[name]
    once(arm, inputs(Size(64, 1_000, 16), device, dtype))  # what is loaded on first use
    given = inputs(size, device, dtype)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(arm, given)
        return int(torch.cuda.max_memory_allocated() - before)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(arm, given)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure_memory(size: Size, device: str, chunk_tokens: int) -> dict[str, int]:
    """Bytes of each arm. Dense logits grow with the tokens: they are measured at a quarter and counted four times."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in ("dense forward_kl + ce", "dense ce", *chunked_peers(device), "ours ce", "ours forward_kl + ce"):
        times = 4 if name.startswith("dense") else 1
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            part = replace(size, tokens=size.tokens // times)
            peaks[name] = times * pool.submit(peak_bytes, name, part, device, chunk_tokens).result()
    return peaks


def measure_times(size: Size, device: str, chunk_tokens: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each arm; of a hopeless one, those of its first time."""
    given, measured = inputs(size, device, torch.bfloat16), arms(device, chunk_tokens)
    first = {name: once(arm, given) for name, arm in measured.items()}
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, arm in measured.items():
            if first[name] < HOPELESS * min(first.values()):
                seconds[name].append(once(arm, given))
    return {name: 1e3 * statistics.median(values or [first[name]]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk-tokens", type=int, default=Objective.chunk_tokens)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    say = sys.stdout.write

    peaks = measure_memory(MEMORY, given.device, given.chunk_tokens)
    say(f"{MEMORY}, chunks of {given.chunk_tokens}: what the loss adds at its peak\n")
    for name, peak in peaks.items():
        share = peak / peaks["dense forward_kl + ce"]
        say(f"  {name:32} {peak / 1e6:10,.0f} MB  {share:6.3f} of dense\n")
        figures[f"memory {name}, MB"] = peak / 1e6
    for size in CPU_TIMES if given.device == "cpu" else GPU_TIMES:
        times = measure_times(size, given.device, given.chunk_tokens, given.rounds)
        best = min(times[name] for name in ("dense ce", *chunked_peers(given.device)))
        say(f"{size}, bf16, chunks of {given.chunk_tokens}: median of {given.rounds}\n")
        for name, value in times.items():
            say(f"  {name:32} {value:10,.1f} ms  {value / best:6.2f} × cross-entropy alone\n")
            figures[f"{size}: {name}, of cross-entropy alone"] = value / best
    if given.json:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        given.json.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
