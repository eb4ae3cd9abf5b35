"""The transformers engine: a causal language model on a CPU or one GPU, in this process.

One thread owns the model. It takes all waiting jobs, sorts them by length and scores them in batches of at most
`batch_tokens` padded tokens. With batch_tokens = 0 every sequence is a batch of its own; its scores then do not depend
on concurrent requests, down to the last bit. The hidden states pass the LM head in chunks, with log-softmax in float32,
so that [tokens, vocabulary] never exists as a whole. At start this chunked path is compared with the model's own
forward pass: an architecture that changes its logits after the head is rejected.
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

from teachers.bos import bos_probes, prefers_bos
from teachers.engines.model_files import bos_id, describe, probe_ids, served_tokenizer, tokenizer_expects_bos
from teachers.engines.transformers_options import TransformersOptions
from teachers.model_checks import QuantizedError, check_model_files, model_errors
from teachers.model_loading import load_model, resolve_dtype
from teachers.protocol.errors import EngineDead, TeacherError
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows, clip_logprobs

CHUNK_TOKENS = 128  # logits of a chunk at a vocabulary of 262,144: [128, 262144] float32 = 134 MB
NEWLINE = "\n"
MAX_CHOSEN = 64  # chosen ids are gathered from existing logits; the limit bounds the size of a response

# Shape suffixes: B sequences, L padded length, S scored positions, C positions of a chunk, D hidden size,
# W teacher's vocabulary, K top-k, M chosen ids


@dataclass(frozen=True)
class _Job:
    sequence: list[int]
    start: int
    top_k: int
    chosen: list[list[int]] | None = None
    result: "Future[Rows]" = field(default_factory=Future)


class TransformersEngine:
    """Score with a local model directory. Raises TeacherError if the directory cannot be served."""

    def __init__(self, folder: Path, options: TransformersOptions = TransformersOptions()) -> None:
        self._options = options
        check_model_files(folder)
        self._files = served_tokenizer(folder)
        with model_errors(folder, f" on {options.device}"):
            self._dtype = resolve_dtype(options.dtype, options.device)
            self._model = _load(folder, getattr(torch, self._dtype)).to(options.device).eval()
            self._check_head()
            self._batch_tokens = 0 if _depends_on_batch(self._model) else options.batch_tokens
            self._card = self._describe(folder)
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def card(self) -> TeacherCard:
        return self._card

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        """Return the rows of positions start … len − 1. Cancelling drops the job if it has not started."""
        return await self._submit(_Job(sequence, start, top_k))

    async def score_chosen(self, sequence: list[int], start: int, top_k: int, chosen: list[list[int]]) -> Rows:
        """Return the rows like `score`, with log-probabilities of chosen ids: the same number at every position."""
        return await self._submit(_Job(sequence, start, top_k, chosen))

    async def _submit(self, job: _Job) -> Rows:
        self._jobs.put(job)
        if self._closing.is_set():  # the thread may have emptied the queue for the last time
            job.result.cancel()
        return await asyncio.wrap_future(job.result)

    async def check(self) -> None:
        """Score one token."""
        await self.score([self._card.bos_id or 0, 0], 1, 1)

    def close(self) -> None:
        """Stop the thread after its current batch and cancel all waiting jobs."""
        self._closing.set()
        self._jobs.put(None)  # wakes the thread
        self._thread.join(timeout=30)

    # --- in the thread that owns the model ---

    def _work(self) -> None:
        while not self._closing.is_set():
            waiting = [self._jobs.get()]
            while not self._jobs.empty():
                waiting.append(self._jobs.get_nowait())
            for batch in batches_by_length([job for job in waiting if job is not None], self._batch_tokens):
                if self._closing.is_set():
                    for job in batch:
                        job.result.cancel()
                self._run_batch([job for job in batch if job.result.set_running_or_notify_cancel()])
        while not self._jobs.empty():  # jobs that arrived during the last batch
            if (late := self._jobs.get_nowait()) is not None:
                late.result.cancel()

    def _run_batch(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            hidden_BLD = self._hidden([job.sequence for job in batch])
            for job, hidden_LD in zip(batch, hidden_BLD, strict=True):
                job.result.set_result(self._rows(hidden_LD, job))
        except Exception as error:  # the thread survives a failing batch; every caller receives the error
            if isinstance(error, torch.AcceleratorError):  # after it this process cannot use the GPU any more
                error = EngineDead(f"the GPU failed: restart this server ({str(error).partition(NEWLINE)[0]})")
            for job in batch:
                if not job.result.done():
                    job.result.set_exception(error)

    @torch.inference_mode()
    def _hidden(self, sequences: list[list[int]]) -> torch.Tensor:
        """Return the last hidden states [B, L, D], padded on the right, where causal attention does not see it."""
        longest = max(map(len, sequences))
        ids_BL = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for i, sequence in enumerate(sequences):
            ids_BL[i, : len(sequence)] = torch.tensor(sequence)
            mask_BL[i, : len(sequence)] = 1
        device = self._options.device
        mask = None if len(sequences) == 1 else mask_BL.to(device)
        decoder = self._model.get_decoder()
        hidden: torch.Tensor = decoder(ids_BL.to(device), attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    @torch.inference_mode()
    def _logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [C, W]: the model's LM head and its soft cap."""
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden_CD).float()
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.inference_mode()
    def _rows(self, hidden_LD: torch.Tensor, job: _Job) -> Rows:
        positions = torch.arange(job.start, len(job.sequence))
        gathered_SM = torch.tensor(job.sequence)[positions, None]  # the actual token, then the chosen ids
        if job.chosen is not None:
            gathered_SM = torch.cat([gathered_SM, torch.tensor(job.chosen)], 1)
        gathered_SM = gathered_SM.to(hidden_LD.device)
        chunks = [  # the hidden state at position i − 1 predicts token i
            _top_k(self._logits(hidden_LD[chunk - 1]), gathered_SM[chunk - job.start], job.top_k)
            for chunk in positions.split(CHUNK_TOKENS)
        ]
        ids, logprobs, gathered, tail = (torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True))
        logprobs, gathered = clip_logprobs(logprobs), clip_logprobs(gathered)
        chosen = None if job.chosen is None else gathered[:, 1:]
        return Rows(job.start, ids.astype(np.uint32), logprobs, gathered[:, 0], tail, chosen)

    # --- before the thread starts ---

    def _check_head(self) -> None:
        """Compare decoder, head and soft cap with the model's own forward pass. Raises TeacherError if they differ."""
        ids = torch.arange(8) % self._model.config.get_text_config().vocab_size
        computed = self._logits(self._hidden([ids.tolist()])[0])
        with torch.inference_mode():
            expected = self._model(ids[None].to(self._options.device), use_cache=False).logits[0].float()
        if not torch.allclose(computed, expected, atol=1e-2 * float(expected.abs().max())):
            raise TeacherError(
                f"{type(self._model).__name__} changes its logits after the LM head, which the transformers engine "
                "does not support: serve it with --engine vllm"
            )

    def _describe(self, folder: Path) -> TeacherCard:
        options, config = self._options, self._model.config.get_text_config()
        bos = bos_id(self._files, config.bos_token_id)
        return describe(
            folder,
            self._files,
            config,
            self._dtype,
            engine=f"transformers {transformers.__version__}",
            bos_id=bos,
            expects_bos=options.bos == "yes" or (options.bos == "auto" and self._expects_bos(bos)),
            max_tokens=min(options.max_tokens or 1 << 31, getattr(config, "max_position_embeddings", 1 << 31)),
            max_top_k=min(options.max_top_k, config.vocab_size),
            max_chosen=MAX_CHOSEN,
        )

    def _expects_bos(self, bos: int | None) -> bool:
        expects = tokenizer_expects_bos(self._files, bos)
        if expects is not None or bos is None:
            return bool(expects)
        return prefers_bos(*(self._probe(*probe) for probe in bos_probes(bos, probe_ids(self._files))))

    def _probe(self, sequence: list[int], start: int) -> Rows:
        return self._rows(self._hidden([sequence])[0], _Job(sequence, start, 1))


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        return load_model(folder, dtype)
    except QuantizedError as error:
        raise QuantizedError(
            f"{error}, which transformers would load with kernels from the network: serve it with --engine vllm"
        ) from error


def batches_by_length(jobs: list[_Job], batch_tokens: int) -> Iterator[list[_Job]]:
    """Group jobs of similar length, such that a batch padded to its longest job has at most `batch_tokens` tokens."""
    batch: list[_Job] = []
    for job in sorted(jobs, key=lambda j: len(j.sequence)):
        if batch and len(job.sequence) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _top_k(
    logits_CW: torch.Tensor, gathered_CM: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and log-probabilities of the top K, log-probabilities of the gathered ids, and the tail."""
    logits_CK, ids_CK = logits_CW.topk(top_k, dim=-1)
    log_z = logits_CW.logsumexp(dim=-1, keepdim=True)
    logprobs_CK = (logits_CK - log_z).clamp(max=0.0)  # the tail must not include a rounding error above 0
    tail_C = (1.0 - logprobs_CK.double().exp().sum(-1)).clamp(min=0.0).float()
    return ids_CK, logprobs_CK, logits_CW.gather(1, gathered_CM) - log_z, tail_C


def _depends_on_batch(model: Any) -> bool:
    """Return whether scores depend on the longest sequence of a batch: longrope chooses its factors by that length."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "longrope" in str(rope)
