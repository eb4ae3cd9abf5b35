"""The vLLM engine: an AsyncLLM of its own, or the engine of a vLLM server with the plugin. Imports vllm.

A score request is a generation of one token with prompt log-probabilities. vLLM's front end would convert them to
Python lists, 65 × 4 appends per position at K = 64. The engine's process sends tensors, and _TensorCollector keeps them
as they are. A position has K + 1 entries, the actual token first; the first entry belongs to position 1. The tests in
tests/teachers/test_vllm_contract.py check everything that this module uses of vLLM.
"""

import asyncio
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import vllm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from teachers.bos import bos_probes, prefers_bos
from teachers.engines.model_files import (
    bos_id,
    checked_tokenizer,
    describe,
    probe_ids,
    served_tokenizer,
    tokenizer_expects_bos,
)
from teachers.engines.vllm_options import VllmOptions
from teachers.model_checks import model_errors
from teachers.model_loading import check_for_vllm, resolve_dtype
from teachers.protocol.errors import EngineDead, TeacherError, Unavailable
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows, clip_logprobs

BATCH_TOKENS = 2048  # the logits of a prompt chunk are not in vLLM's memory profile: 1.2 GB at 152k tokens in float32
GPU_MEMORY = 0.85
DEAD = "the vLLM engine died: restart this server; its log contains the reason"
SHUTDOWN_S = 3.0  # vLLM on a CPU does not end by itself within ten seconds, and it has nothing left to save

Bos = Literal["auto", "yes", "no"]


class VllmEngine:
    """Score with vLLM. Create it with `load` or `wrap`, inside the event loop that will use it."""

    def __init__(self, client: EngineClient, card: TeacherCard, files: dict[str, bytes], owned: bool) -> None:
        self._client, self._card, self._files, self._owned = client, card, files, owned

    @classmethod
    async def load(cls, folder: Path, options: VllmOptions) -> "VllmEngine":
        """Start vLLM on a model directory. Raises TeacherError if it cannot be served."""
        await asyncio.to_thread(check_for_vllm, folder)
        await asyncio.to_thread(served_tokenizer, folder)
        with model_errors(folder, " with vLLM"):
            client = AsyncLLM.from_engine_args(engine_args(folder, options))
        try:
            return await cls.wrap(client, options.bos, owned=True)
        except BaseException:
            client.shutdown()
            raise

    @classmethod
    async def wrap(cls, client: EngineClient, bos: Bos = "auto", owned: bool = False) -> "VllmEngine":
        """Use a running engine. Raises TeacherError if it does not return log-probabilities."""
        config = client.model_config
        if config.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise TeacherError(
                f"expected --logprobs-mode raw_logprobs, received {config.logprobs_mode}: a teacher returns "
                "log-probabilities"
            )
        if config.max_logprobs == 0:
            raise TeacherError(
                "expected --max-logprobs 1 or more, received 0: start the server with --max-logprobs 128"
            )
        weights = snapshot_dir(config.model, config.revision, client.vllm_config.load_config.download_dir)
        has_config = (weights / "config.json").is_file()  # vLLM puts only weights into a download_dir
        tokenizer = snapshot_dir(config.tokenizer, config.tokenizer_revision)
        files = await asyncio.to_thread(checked_tokenizer, tokenizer)
        text_config = config.hf_text_config
        bos_token = bos_id(files, text_config.bos_token_id)
        dtype = str(config.dtype).removeprefix("torch.")
        card = await asyncio.to_thread(
            describe,
            weights,
            files,
            text_config,
            f"{dtype} {config.quantization}" if config.quantization else dtype,
            config_folder=weights if has_config else snapshot_dir(config.model, config.revision),
            engine=f"vllm {vllm.__version__}",
            bos_id=bos_token,
            expects_bos=bos == "yes" or (bos == "auto" and await expects_bos(client, files, bos_token)),
            max_tokens=config.max_model_len - 1,  # vLLM must generate one token
            max_top_k=largest_top_k(config.max_logprobs, config.get_vocab_size()),
        )
        return cls(client, card, files, owned)

    @property
    def card(self) -> TeacherCard:
        return self._card

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        """Return the rows of positions start … len − 1. Cancelling aborts the request. Raises Unavailable."""
        return await score_sequence(self._client, sequence, start, top_k)

    async def check(self) -> None:
        """Score one token. Raises EngineDead, which an idle server notices only here."""
        try:
            await self._client.check_health()
        except EngineDeadError as error:
            raise EngineDead(DEAD) from error
        await self.score([self._card.bos_id or 0, 0], 1, 1)

    def close(self) -> None:
        """Stop an engine that `load` started. An engine passed to `wrap` belongs to its server."""
        if self._owned:
            self._client.shutdown(timeout=SHUTDOWN_S)


def engine_args(folder: Path, options: VllmOptions) -> AsyncEngineArgs:
    """Return vLLM's arguments for a teacher: no prefix cache, which prompt log-probabilities bypass; bounded memory."""
    arguments: dict[str, Any] = {
        "model": str(folder),
        "trust_remote_code": False,
        "dtype": resolve_dtype(options.dtype, "cpu" if current_platform.is_cpu() else "cuda"),
        "max_model_len": options.max_tokens + 1 if options.max_tokens else None,
        "max_logprobs": options.max_top_k,
        "max_num_batched_tokens": BATCH_TOKENS,
        "gpu_memory_utilization": GPU_MEMORY,
        "tensor_parallel_size": options.tensor_parallel,
        "enable_prefix_caching": False,
    }
    return AsyncEngineArgs(**arguments | options.vllm_args)


def largest_top_k(max_logprobs: int, vocab_size: int) -> int:
    """Return the largest K for --max-logprobs, where −1 means no limit."""
    return vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)


def snapshot_dir(name: str, revision: str | None, cache: str | None = None) -> Path:
    """Return a directory as it is, a hub name as the snapshot that vLLM has loaded. Raises TeacherError if absent."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise TeacherError(f"{name} is neither a model directory nor in the hub's cache: serve a directory") from error


async def expects_bos(client: EngineClient, files: dict[str, bytes], bos: int | None) -> bool:
    """Return whether the model expects BOS: see teachers/bos.py."""
    expects = await asyncio.to_thread(tokenizer_expects_bos, files, bos)
    if expects is not None or bos is None:
        return bool(expects)
    probes = bos_probes(bos, await asyncio.to_thread(probe_ids, files))
    return prefers_bos(*await asyncio.gather(*(score_sequence(client, ids, start, 1) for ids, start in probes)))


async def score_sequence(client: EngineClient, sequence: list[int], start: int, top_k: int) -> Rows:
    """Return the rows of one sequence. Cancelling aborts the request in the engine."""
    request_id = uuid4().hex
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    try:
        prompt_logprobs = await _prompt_logprobs(client, sequence, params, request_id)
    except asyncio.CancelledError:
        await asyncio.shield(client.abort(request_id))
        raise
    except EngineDeadError as error:
        raise EngineDead(DEAD) from error
    ids, logprobs = _entries(prompt_logprobs, top_k + 1)
    if len(ids) != len(sequence) - 1:
        raise Unavailable(f"expected {len(sequence) - 1} positions, received {len(ids)}: vLLM dropped the request")
    return to_rows(ids[start - 1 :], logprobs[start - 1 :], start)


async def _prompt_logprobs(client: EngineClient, sequence: list[int], params: SamplingParams, request_id: str) -> Any:
    """Return vLLM's prompt log-probabilities: a list of tensors if `client` is an AsyncLLM, else FlatLogprobs."""
    prompt = tokens_input(sequence)
    if not isinstance(client, AsyncLLM):
        return [output.prompt_logprobs async for output in client.generate(prompt, params, request_id)][-1]
    queue = await client.add_request(request_id, prompt, params)
    state = client.output_processor.request_states.get(queue.request_id)
    if state is not None:  # None if the request is finished already; log-probabilities arrive with the last output
        state.logprobs_processor = _TensorCollector(None, None, [], None, None, params.prompt_logprobs)
    return (await queue.get()).prompt_logprobs


class _TensorCollector(LogprobsProcessor):  # type: ignore[misc] # vllm is not followed
    """vLLM's collector of the log-probabilities of one request, which keeps the prompt's as received tensors."""

    def _update_prompt_logprobs(self, prompt_logprobs_tensors: LogprobsTensors) -> None:
        self.prompt_logprobs.append(prompt_logprobs_tensors)


def _entries(prompt_logprobs: Any, width: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return ids and log-probabilities [positions − 1, K + 1]: position 0 has no entries, the others have `width`."""
    if isinstance(prompt_logprobs, FlatLogprobs):
        ids = np.array(prompt_logprobs.token_ids, np.int32)
        logprobs = np.array(prompt_logprobs.logprobs, np.float32)
    else:
        empty_ids, empty = np.empty((0, width), np.int32), np.empty((0, width), np.float32)
        ids = np.concatenate([empty_ids, *(chunk.logprob_token_ids.numpy() for chunk in prompt_logprobs)])
        logprobs = np.concatenate([empty, *(chunk.logprobs.numpy() for chunk in prompt_logprobs)])
    return ids.reshape(-1, width), logprobs.reshape(-1, width)


def to_rows(ids: NDArray[np.int32], logprobs: NDArray[np.float32], start: int) -> Rows:
    """Convert entries [S, K + 1], the actual token first, to rows.

    Invalid values are left to the client: it knows the sample and can retry on another replica, whereas an error here
    would only truncate the response.
    """
    probs = np.exp(logprobs[:, 1:], dtype=np.float64)
    tail = np.maximum(1.0 - probs.sum(axis=1), 0.0).astype(np.float32)
    logprobs = clip_logprobs(logprobs)
    return Rows(start, ids[:, 1:].astype(np.uint32), logprobs[:, 1:], logprobs[:, 0], tail)
