"""The embedded engine: a causal language model from transformers, on a CPU or one GPU.

One thread owns the model. It takes what is waiting, sorts it by length and scores it in batches of at most
`batch_tokens` padded tokens; with 0 every sequence is a batch of its own, and an answer does not depend, to the
last bit, on what else was asked at that moment. Hidden states go through the head in chunks, log-softmax in
float32, so that [tokens, vocabulary] never exists whole. At start the chunked route is held against the model's
own forward pass: an architecture that changes its logits afterwards is refused, not mis-served.
"""

import asyncio
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from teachers.engine import EngineOptions
from teachers.engines.files import bos_of, describe, prefers_bos, probe_ids, says_bos, tokenizer_files
from teachers.errors import EngineDead, TeacherError
from teachers.protocol import Card
from teachers.rows import Rows
from teachers.weights import load_model

CHUNK_TOKENS = 128  # [128, 262144] float32 is 134 MB
NEWLINE = "\n"
MAX_CHOSEN = 64  # they are gathered from logits that are there already; a body of one megabyte holds far fewer

# torch legend: B sequences, L padded length, C chunk of positions, D width, W teacher's vocabulary, K top-k, M chosen


@dataclass(frozen=True)
class _Job:
    sequence: list[int]
    start: int
    top_k: int
    chosen: list[list[int]] | None = None
    answer: "Future[Rows]" = field(default_factory=Future)


class TransformersEngine:
    """Scores with a local model directory. Raises TeacherError if the directory cannot be served."""

    def __init__(self, folder: Path, options: EngineOptions = EngineOptions()) -> None:
        self._options = options
        self._files = tokenizer_files(folder)
        self._model = _load(folder, options)
        self._check_head()
        self._batch_tokens = 0 if _scales_by_batch(self._model) else options.batch_tokens
        self._card = self._describe(folder)
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def card(self) -> Card:
        return self._card

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        return self._files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        """Rows for positions start … len − 1. Cancelling the wait drops the work if it has not begun."""
        return await self._done(_Job(sequence, start, top_k))

    async def score_chosen(self, sequence: list[int], start: int, top_k: int, chosen: list[list[int]]) -> Rows:
        """`score`, with the log-probabilities of chosen ids, as many at every position."""
        return await self._done(_Job(sequence, start, top_k, chosen))

    async def _done(self, job: _Job) -> Rows:
        self._jobs.put(job)
        if self._closing.is_set():  # nobody may look into the queue any more
            job.answer.cancel()
        return await asyncio.wrap_future(job.answer)

    async def check(self) -> None:
        """Score one token."""
        await self.score([self._card.bos_id or 0, 0], 1, 1)

    def close(self) -> None:
        """End the thread after the batch it is at; what still waits is cancelled."""
        self._closing.set()
        self._jobs.put(None)
        self._thread.join(timeout=30)

    # --- the thread that owns the model ---

    def _work(self) -> None:
        while not self._closing.is_set():
            waiting = [self._jobs.get()]
            while not self._jobs.empty():
                waiting.append(self._jobs.get_nowait())
            for batch in batches_by_length([job for job in waiting if job is not None], self._batch_tokens):
                if self._closing.is_set():
                    for job in batch:
                        job.answer.cancel()
                self._answer([job for job in batch if job.answer.set_running_or_notify_cancel()])
        while not self._jobs.empty():  # what came while the last batch was worked on
            if (left := self._jobs.get_nowait()) is not None:
                left.answer.cancel()

    def _answer(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            hidden_BLD = self._hidden([job.sequence for job in batch])
            for job, hidden_LD in zip(batch, hidden_BLD, strict=True):
                job.answer.set_result(self._rows(hidden_LD, job))
        except Exception as error:  # the thread must outlive one bad batch; every waiter learns why
            if isinstance(error, torch.AcceleratorError):  # after it this process's GPU answers nothing
                error = EngineDead(f"the GPU failed: restart this server ({str(error).partition(NEWLINE)[0]})")
            for job in batch:
                if not job.answer.done():
                    job.answer.set_exception(error)

    @torch.inference_mode()
    def _hidden(self, sequences: list[list[int]]) -> torch.Tensor:
        """[B, L, D] last hidden states, padded on the right where no real token looks."""
        longest = max(map(len, sequences))
        ids_BL = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for i, sequence in enumerate(sequences):
            ids_BL[i, : len(sequence)] = torch.tensor(sequence)
            mask_BL[i, : len(sequence)] = 1
        device = self._options.device
        mask = None if len(sequences) == 1 else mask_BL.to(device)
        trunk = self._model.get_decoder()
        hidden: torch.Tensor = trunk(ids_BL.to(device), attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    @torch.inference_mode()
    def _logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """[C, W] float32, by the model's own head and soft cap."""
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden_CD).float()
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.inference_mode()
    def _rows(self, hidden_LD: torch.Tensor, job: _Job) -> Rows:
        positions = torch.arange(job.start, len(job.sequence))
        wanted_SM = torch.tensor(job.sequence)[positions, None]  # the actual token, and what is chosen beside it
        if job.chosen is not None:
            wanted_SM = torch.cat([wanted_SM, torch.tensor(job.chosen)], 1)
        wanted_SM = wanted_SM.to(hidden_LD.device)
        parts = [
            _top_k(self._logits(hidden_LD[chunk - 1]), wanted_SM[chunk - job.start], job.top_k)
            for chunk in positions.split(CHUNK_TOKENS)
        ]
        ids, logprobs, wanted, tail = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        chosen = None if job.chosen is None else wanted[:, 1:]
        return Rows(job.start, ids.astype(np.uint32), logprobs, wanted[:, 0], tail, chosen)

    # --- before the thread starts ---

    def _check_head(self) -> None:
        """Hold head-after-trunk against the model's own forward pass."""
        ids = torch.arange(8) % self._model.config.get_text_config().vocab_size
        ours = self._logits(self._hidden([ids.tolist()])[0])
        with torch.inference_mode():
            theirs = self._model(ids[None].to(self._options.device), use_cache=False).logits[0].float()
        if not torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max())):
            raise TeacherError(
                f"{type(self._model).__name__} changes its logits after the head in a way this engine does not know: "
                "serve it with vLLM"
            )

    def _describe(self, folder: Path) -> Card:
        options, config = self._options, self._model.config.get_text_config()
        bos_id = bos_of(self._files, config.bos_token_id)
        return describe(
            folder,
            self._files,
            config,
            options.dtype,
            engine=f"transformers {transformers.__version__}",
            bos_id=bos_id,
            expects_bos=options.bos == "yes" or (options.bos == "auto" and self._expects_bos(bos_id)),
            max_tokens=min(options.max_tokens or 1 << 31, getattr(config, "max_position_embeddings", 1 << 31)),
            max_top_k=min(options.max_top_k, config.vocab_size),
            max_chosen=MAX_CHOSEN,
        )

    def _expects_bos(self, bos_id: int | None) -> bool:
        said = says_bos(self._files, bos_id)
        if said is not None or bos_id is None:
            return bool(said)
        ids = probe_ids(self._files)
        return prefers_bos(self._probe_loss([bos_id, *ids], 2), self._probe_loss(ids, 1))

    def _probe_loss(self, sequence: list[int], start: int) -> float:
        rows = self._rows(self._hidden([sequence])[0], _Job(sequence, start, 1))
        return -float(rows.actual.mean())


def batches_by_length(jobs: list[_Job], batch_tokens: int) -> Iterator[list[_Job]]:
    """Group jobs of like length so that a batch, padded to its longest, holds at most `batch_tokens` tokens."""
    batch: list[_Job] = []
    for job in sorted(jobs, key=lambda j: len(j.sequence)):
        if batch and len(job.sequence) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _top_k(
    logits_CW: torch.Tensor, wanted_CM: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities of the K likeliest, log-probabilities of the wanted ids, and the tail."""
    logits_CK, ids_CK = logits_CW.topk(top_k, dim=-1)
    log_z = logits_CW.logsumexp(dim=-1, keepdim=True)
    logprobs_CK = (logits_CK - log_z).clamp(max=0.0)
    tail_C = (1.0 - logprobs_CK.double().exp().sum(-1)).clamp(min=0.0).float()
    wanted_logprobs_CM = (logits_CW.gather(1, wanted_CM) - log_z).clamp(max=0.0)
    return ids_CK, logprobs_CK, wanted_logprobs_CM, tail_C


def _scales_by_batch(model: Any) -> bool:
    """Whether what a sequence is answered depends on the longest one beside it: longrope takes its factors by that."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "longrope" in str(rope)


def _load(folder: Path, options: EngineOptions) -> Any:
    try:
        return load_model(folder, getattr(torch, options.dtype)).to(options.device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:  # what the libraries raise
        reason = str(error).partition("\n")[0]
        raise TeacherError(f"cannot load {folder} on {options.device}: {reason}") from error
