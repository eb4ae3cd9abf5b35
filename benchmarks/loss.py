"""Memory and time of LM head and loss, forward and backward, compared with dense logits and with cross-entropy.

`python -m benchmarks.loss [--device cuda] [--json FILE]` prints two tables and writes a flat {name: number}.

Memory is the increase at the peak over existing hidden states and weight. It includes the weight's gradient. Each
implementation is measured in a separate process (on a GPU: the allocator's peak). Time is the median of rounds in which
all implementations take turns, so that noise of the machine affects all of them. The peers are dense logits with
autograd, as in most trainers, and chunked cross-entropy alone: torch's `linear_cross_entropy` (in torch 2.13) and, on a
GPU with liger-kernel installed, Liger's Triton kernel. Ratios are relative to the fastest peer.
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

from trainer.losses import DIVERGENCES
from trainer.losses.divergences import divergence
from trainer.losses.forward_kl import forward_kl
from trainer.losses.head import head_loss
from trainer.losses.labels import Labels
from trainer.losses.lm_head import LMHead
from trainer.losses.objective import Objective
from trainer.losses.sorted_probs_loss import SortedProbsLabels
from trainer.losses.span_loss import SpanLabels

Implementation = Callable[[Tensor, Tensor, Labels], Tensor]

TOP_K = 64
SPAN_TOKENS = 3
SLOW_FACTOR = 10  # implementations slower than this, relative to the fastest, are timed once only


@dataclass(frozen=True)
class Size:
    """Number of positions, vocabulary size and hidden size."""

    tokens: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens × {self.vocab:,} × {self.width:,}"


MEMORY = Size(8_192, 151_936, 64)  # a small hidden size, so that the loss dominates
CPU_TIMES = (Size(1_024, 49_152, 576), Size(512, 151_936, 896))  # the heads of SmolLM2-135M and Qwen2.5-0.5B
GPU_TIMES = (Size(8_192, 49_152, 576), Size(8_192, 151_936, 896), Size(8_192, 151_936, 4_096))


def inputs(size: Size, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Labels]:
    """Hidden states and weight with gradients, and labels: targets with a mass of 0.9 on TOP_K tokens, ULD and ALM."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(size.tokens, size.width, generator=generator)
    weight_VD = torch.randn(size.vocab, size.width, generator=generator) / size.width**0.5
    tokens_T = torch.randint(size.vocab, (size.tokens,), generator=generator)
    ids_TK = (torch.arange(TOP_K) * 31 + tokens_T[:, None]) % size.vocab
    probs_TK = 0.9 * torch.rand(size.tokens, TOP_K, generator=generator).softmax(1)
    tail_T = 1 - probs_TK.sum(1)
    offset_T = np.arange(size.tokens) % SPAN_TOKENS
    labels = Labels(
        tokens_T,
        ids_TK,
        torch.ones_like(ids_TK, dtype=torch.bool),
        probs_TK,
        tail_T,
        (
            SortedProbsLabels(probs_TK, tail_T, 1.0),
            SpanLabels.from_numpy(offset_T, np.full(size.tokens, -6, dtype=np.float32), 1.0),
        ),
    )
    return (
        hidden_TD.to(device, dtype).requires_grad_(),
        weight_VD.to(device, dtype).requires_grad_(),
        labels.to(device),
    )


def dense(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels) -> Tensor:
    """Forward KL with a tail, plus cross-entropy, over all logits at once."""
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


def chunked_peers(device: str) -> dict[str, Implementation]:
    """Chunked cross-entropy of the installed libraries."""
    peers: dict[str, Implementation] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        peers["torch chunked ce"] = torch_chunked
    if device != "cpu" and find_spec("liger_kernel"):
        peers["liger chunked ce"] = liger
    return peers


def ours(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels, *, objective: Objective) -> Tensor:
    labels = replace(labels, auxiliary=())
    return head_loss(LMHead(weight_VD), hidden_TD, labels, objective).total


def _only(labels: Labels, kind: type) -> Labels:
    return replace(labels, auxiliary=tuple(one for one in labels.auxiliary if isinstance(one, kind)))


def with_alm(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels, *, objective: Objective) -> Tensor:
    """One teacher with ALM on spans of SPAN_TOKENS."""
    return head_loss(LMHead(weight_VD), hidden_TD, _only(labels, SpanLabels), objective).total


def with_uld(hidden_TD: Tensor, weight_VD: Tensor, labels: Labels, *, objective: Objective) -> Tensor:
    """One teacher with ULD."""
    return head_loss(LMHead(weight_VD), hidden_TD, _only(labels, SortedProbsLabels), objective).total


def implementations(device: str, chunk_tokens: int) -> dict[str, Implementation]:
    fused = {
        name: partial(ours, objective=Objective(0.1, divergence(name), chunk_tokens=chunk_tokens))
        for name in DIVERGENCES
    }
    auxiliary_only = Objective(0.1, chunk_tokens=chunk_tokens, target_share=0.0)
    return {
        "dense forward_kl + ce": dense,
        "dense ce": dense_cross_entropy,
        **chunked_peers(device),
        "ours ce": partial(ours, objective=Objective(chunk_tokens=chunk_tokens)),
        **{f"ours {name} + ce": implementation for name, implementation in fused.items()},
        "ours forward_kl at 1.5 + ce": partial(ours, objective=Objective(0.1, forward_kl, 1.5, chunk_tokens)),
        "ours ALM + ce": partial(with_alm, objective=auxiliary_only),
        "ours ULD + ce": partial(with_uld, objective=auxiliary_only),
    }


def time_once(implementation: Implementation, given: tuple[Tensor, Tensor, Labels]) -> float:
    """Return the seconds of one loss with its gradients."""
    hidden_TD, weight_VD, labels = given
    hidden_TD.grad = weight_VD.grad = None
    on_gpu = hidden_TD.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    implementation(hidden_TD, weight_VD, labels).backward()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(name: str, size: Size, device: str, chunk_tokens: int) -> int:
    """Return the bytes that one loss adds at its peak, in this process."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    implementation = implementations(device, chunk_tokens)[name]
    time_once(implementation, inputs(Size(64, 1_000, 16), device, dtype))  # loads libraries on first use
    given = inputs(size, device, dtype)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_once(implementation, given)
        return int(torch.cuda.max_memory_allocated() - before)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    time_once(implementation, given)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure_memory(size: Size, device: str, chunk_tokens: int) -> dict[str, int]:
    """Return the bytes of each implementation. Dense logits are measured with a quarter of the tokens, times four."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in ("dense forward_kl + ce", "dense ce", *chunked_peers(device), "ours ce", "ours forward_kl + ce"):
        times = 4 if name.startswith("dense") else 1
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            part = replace(size, tokens=size.tokens // times)
            peaks[name] = times * pool.submit(peak_bytes, name, part, device, chunk_tokens).result()
    return peaks


def measure_times(size: Size, device: str, chunk_tokens: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each implementation; the first measurement of a slow one."""
    given, measured = inputs(size, device, torch.bfloat16), implementations(device, chunk_tokens)
    first = {name: time_once(implementation, given) for name, implementation in measured.items()}
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, implementation in measured.items():
            if first[name] < SLOW_FACTOR * min(first.values()):
                seconds[name].append(time_once(implementation, given))
    return {name: 1e3 * statistics.median(values or [first[name]]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk-tokens", type=int, default=Objective.chunk_tokens)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures: dict[str, float] = {}
    write = sys.stdout.write

    peaks = measure_memory(MEMORY, given.device, given.chunk_tokens)
    write(f"{MEMORY}, chunks of {given.chunk_tokens}: memory added at the peak\n")
    for name, peak in peaks.items():
        share = peak / peaks["dense forward_kl + ce"]
        write(f"  {name:32} {peak / 1e6:10,.0f} MB  {share:6.3f} of dense\n")
        figures[f"memory {name}, MB"] = peak / 1e6
    for size in CPU_TIMES if given.device == "cpu" else GPU_TIMES:
        times = measure_times(size, given.device, given.chunk_tokens, given.rounds)
        best = min(times[name] for name in ("dense ce", *chunked_peers(given.device)))
        write(f"{size}, bf16, chunks of {given.chunk_tokens}: median of {given.rounds}\n")
        for name, value in times.items():
            write(f"  {name:32} {value:10,.1f} ms  {value / best:6.2f} × cross-entropy alone\n")
            figures[f"{size}: {name}, of cross-entropy alone"] = value / best
    if given.json:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        given.json.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
